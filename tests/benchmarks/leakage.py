"""How much a random split adds: `python tests/benchmarks/leakage.py --data DIR --minutes 1.5`.

The same settings trained in folds, split once by appearance and once image by image. Either way
every image is predicted by a model that was not trained on it, and the two APs are over the same
images: they differ by what images of one slide on both sides tell. Groups of the dataset
(`groups.csv`) take the place of appearance. Results go to `leakage.json` below `--out`; what is
there is not measured again. On a CPU the minutes are those of its cores: see `timed.py`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[2]))

from src_snippets.data.samples import CellSamples, make_splits, subset
from src_snippets.data.structures import ground_truth
from src_snippets.evaluation.matching import ap_interval, match_table
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    predict_samples,
    read_samples,
    Results,
    score,
    timed_config,
    train_timed,
)


def measure(options, split_by: str, seed: int, samples: CellSamples) -> dict:
    """Out-of-fold AP50 over all images, and its interval over images."""
    changes = dict(seed=seed, folds=options.folds, split_by=split_by)
    config = timed_config(options, samples, options.minutes, **changes)
    dataset, held_out, predictions = samples.dataset, [], []
    if split_by == "image":  # or groups that the dataset states would stay together
        samples.dataset = replace(dataset, groups={})
    splits = make_splits(samples, config)
    samples.dataset = dataset
    for fold, split in splits.items():
        folder = options.out / "runs" / f"{split_by}-{seed}-{fold}"
        train_timed(config, subset(samples, split["train"]), folder)
        part = list(subset(samples, split["val"]))
        predictions += predict_samples(folder / "best.pt", part, config)
        held_out += part
    truths = [ground_truth(sample, crowds=True) for sample in held_out]
    interval = ap_interval(match_table(predictions, truths, config.num_classes), len(truths))
    return dict(AP50=score(held_out, predictions, config)["AP50"], interval=interval)


def main() -> None:
    parser = command_line(__doc__, 1.5, "results/leakage")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    choose_clock(parser, options.device)
    samples = read_samples(options)
    results = Results(options.out / "leakage.json", options, ("folds",), samples.digest)
    print("| split by | seed | AP50, out of fold | 95% CI |\n|---|---|---|---|")
    for seed in range(options.seeds):
        for split_by in ("appearance", "image"):
            work = partial(measure, options, split_by, seed, samples)
            found = results.get(split_by, str(seed), work)
            low, high = found["interval"]
            row = f"| {split_by} | {seed} | {found['AP50']:.3f} | {low:.3f} to {high:.3f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
