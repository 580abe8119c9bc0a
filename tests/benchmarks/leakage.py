"""How much a random split flatters: `python tests/benchmarks/leakage.py --data DIR --minutes 1.5`.

The same settings trained in folds, split once by look-alike groups and once image by image. Either
way every image is answered by a model that never saw it, and the two APs are over the same images:
they differ by what fields of one slide on both sides tell. Groups of the dataset (`groups.csv`)
take the place of looks. Results go to `leakage.json` below `--out`, where what is there already is
not measured again. On a CPU the minutes are those of its cores: see `ablate.py`.
"""

import argparse
from dataclasses import replace
import json
import os
from pathlib import Path
import sys
import time
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

from src_snippets import train
from src_snippets.config import recipe
from src_snippets.datasets import CellSamples, choose_splits, open_dataset, pick, write_json
from src_snippets.evaluate import ap_interval, ap_of_hits, hits_of
from src_snippets.forms import with_crowds
from src_snippets.predict import answer_held_out
from src_snippets.train import fit, load_trained
from tests.benchmarks.ablate import core_seconds


def measure(options, split_by: str, seed: int, samples: CellSamples) -> dict:
    """AP50 over all images, out of fold, and its interval over images."""
    changes = dict(epochs=10_000, eval_every=10_000, train_hours=options.minutes / 60, seed=seed)
    changes |= dict(folds=options.folds, split_by=split_by, detections=600) | options.settings
    config = replace(recipe(options.recipe, **changes), num_classes=len(samples.dataset.categories))
    asked, own = [], samples.dataset
    if split_by == "image":  # or groups that the dataset states would be kept
        samples.dataset = replace(own, groups={})
    splits = choose_splits(samples, config)
    samples.dataset = own
    for fold, split in splits.items():
        folder = options.out / "runs" / f"{split_by}-{seed}-{fold}"
        fit(config, pick(samples, split["train"]), [], folder)
        held_out = pick(samples, split["val"])
        asked.append((load_trained(folder / "best.pt", config), held_out))
    truths = [with_crowds(sample) for _, part in asked for sample in part]
    hits = hits_of(answer_held_out(asked, config), truths, config.num_classes)
    return dict(AP50=ap_of_hits(hits), interval=ap_interval(hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a dataset's folder")
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, a fold")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--settings", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--out", type=Path, default=Path("results/leakage"))
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        train.time = SimpleNamespace(perf_counter=core_seconds, time=time.time)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "leakage.json"
    samples = CellSamples(open_dataset(options.data, recipe(options.recipe)), 4.0)
    names = ("recipe", "settings", "minutes", "folds")
    about = {name: getattr(options, name) for name in names} | dict(data=samples.digest)
    known = json.loads(path.read_text()) if path.is_file() else dict(about=about, results={})
    if known["about"] != about:
        raise SystemExit(f"{path}: of other settings or data. Give another folder as --out.")
    results = known["results"]
    print("| split by | seed | AP50, out of fold | with other images |\n|---|---|---|---|")
    for seed in range(options.seeds):
        for split_by in ("look", "image"):
            if str(seed) not in results.setdefault(split_by, {}):
                results[split_by][str(seed)] = measure(options, split_by, seed, samples)
                write_json(known, path)
            found = results[split_by][str(seed)]
            low, high = found["interval"]
            row = f"| {split_by} | {seed} | {found['AP50']:.3f} | {low:.3f} to {high:.3f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
