"""How much a random split flatters: `python tests/benchmarks/leakage.py --data DIR --minutes 1.5`.

The same settings trained in folds, split once by look-alike groups and once image by image. Either
way every image is answered by a model that never saw it, and the two APs are over the same images:
they differ by what fields of one slide on both sides tell. Groups of the dataset (`groups.csv`)
take the place of looks. Results go to `leakage.json` below `--out`, where what is there already is
not measured again. On a CPU the minutes are those of its cores: see `timed.py`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).parents[2]))

from src_snippets.answers import answer_held_out
from src_snippets.datasets import CellSamples, choose_splits, pick
from src_snippets.evaluate import ap_interval, ap_of_hits, hits_of
from src_snippets.forms import with_crowds
from src_snippets.train import fit, load_trained
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    for_classes,
    Kept,
    read_samples,
    timed_settings,
)


def measure(options, split_by: str, seed: int, samples: CellSamples) -> dict:
    """AP50 over all images, out of fold, and its interval over images."""
    own = dict(seed=seed, folds=options.folds, split_by=split_by)
    config = for_classes(timed_settings(options, options.minutes, **own), samples)
    asked, dataset = [], samples.dataset
    if split_by == "image":  # or groups that the dataset states would be kept
        samples.dataset = replace(dataset, groups={})
    splits = choose_splits(samples, config)
    samples.dataset = dataset
    for fold, split in splits.items():
        folder = options.out / "runs" / f"{split_by}-{seed}-{fold}"
        fit(config, pick(samples, split["train"]), [], folder)
        held_out = pick(samples, split["val"])
        asked.append((load_trained(folder / "best.pt", config), held_out))
    truths = [with_crowds(sample) for _, part in asked for sample in part]
    hits = hits_of(answer_held_out(asked, config), truths, config.num_classes)
    return dict(AP50=ap_of_hits(hits), interval=ap_interval(hits))


def main() -> None:
    parser = command_line(__doc__, 1.5, "results/leakage")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    choose_clock(parser, options.device)
    samples = read_samples(options)
    kept = Kept(options.out / "leakage.json", options, ("folds",), samples.digest)
    print("| split by | seed | AP50, out of fold | with other images |\n|---|---|---|---|")
    for seed in range(options.seeds):
        for split_by in ("look", "image"):
            work = partial(measure, options, split_by, seed, samples)
            found = kept.get(split_by, str(seed), work)
            low, high = found["interval"]
            row = f"| {split_by} | {seed} | {found['AP50']:.3f} | {low:.3f} to {high:.3f} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
