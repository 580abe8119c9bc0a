"""Size and speed of each recipe: `python tests/benchmarks/recipes.py [--device cuda]`.

Random weights on synthetic images: seconds for one image of 500 x 500 px, from pixels to RLE, and
for one training step on a full batch of the recipe; medians after a warm-up. Nothing is asserted.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from src_snippets.data.layouts import open_dataset
from src_snippets.data.samples import CellSamples
from src_snippets.data.synthetic import draw_field, make_synthetic
from src_snippets.model.detect import detect
from src_snippets.model.mask_rcnn import build_model, count_parameters, to_device
from src_snippets.setup.config import make_config, RECIPES
from tests.benchmarks.cases import new_trainer


def seconds(work, device: torch.device, times: int = 3) -> float:
    """Median of some runs after one that is not counted."""
    spent = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - begin)
    return median(spent[1:])


def measure(name: str, device: torch.device, root: Path, settings: dict) -> list[str]:
    """A row of the table."""
    config = make_config(name, **dict(weights="none", accumulate=1, workers=0) | settings)
    pixels = draw_field(np.random.default_rng(0), 500, 500, 60)[0]
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    model = to_device(build_model(config))
    millions = count_parameters(model) / 1e6
    per_image = seconds(lambda: detect([model], image, config), device)
    samples = CellSamples(open_dataset(root, config), 1.0)
    trainer = new_trainer(config, samples)
    images, targets = next(iter(trainer.loader))
    per_step = seconds(lambda: trainer.step(images, targets), device)
    crop = f"{config.batch_size} x {config.crop} px, scale {config.scale:g}"
    return [name, f"{millions:.1f}", f"{per_image:.2f}", f"{per_step:.2f}", crop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="a part of the recipe's name")
    parser.add_argument("--settings", type=json.loads, default={}, help="of all recipes, as JSON")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print("| recipe | M parameters | s per image | s per training step | its batch |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = make_synthetic(Path(folder) / "demo", train=8, test=1)
        for name in RECIPES:
            if options.only in name:
                row = measure(name, torch.device(options.device), root, options.settings)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
