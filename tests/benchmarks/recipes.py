"""Size and speed of each recipe: `python tests/benchmarks/recipes.py [--device cuda]`.

Random weights on drawn fields: seconds for one field of 500 x 500 px, from pixels to run lengths,
and for one step of training on a full batch of the recipe; medians after a warm-up. Nothing is
asserted.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from tqdm import tqdm

from src_snippets.config import recipe, RECIPES
from src_snippets.datasets import CellSamples, open_dataset
from src_snippets.demo import draw_field, make_demo
from src_snippets.model import build_model, count_parameters
from src_snippets.train import train_epoch, training_loader, TrainingRun
from tests.conftest import detect


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


def measure(name: str, device: torch.device, root: Path) -> list[str]:
    """A row of the table."""
    config = recipe(name, weights="none")
    config = replace(config, accumulate=1, workers=0, fill=True)
    image, _ = draw_field(np.random.default_rng(0), 500, 500, 60)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    model = build_model(config).to(device)
    millions = count_parameters(model) / 1e6
    found = seconds(lambda: detect(model, [pixels], config), device)
    samples = CellSamples(open_dataset(root, config), 1.0)
    batch = torch.utils.data.Subset(samples, range(config.batch_size))
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config, Path(folder), training_loader(batch, config, device))
        parts = (run.optimizer, run.schedule, run.accelerator, config, tqdm(disable=True))
        learned = seconds(lambda: train_epoch(run.model, run.loader, *parts), device)
    crop = f"{config.batch_size} x {config.crop} px, scale {config.scale:g}"
    return [name, f"{millions:.1f}", f"{found:.2f}", f"{learned:.2f}", crop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="a part of the recipe's name")
    options = parser.parse_args()
    print("| recipe | M parameters | s a field | s a step | batch |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = make_demo(Path(folder) / "demo", train=8, test=1)
        for name in RECIPES:
            if options.only in name:
                row = measure(name, torch.device(options.device), root)
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
