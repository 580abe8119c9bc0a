"""What each choice is worth: `python tests/benchmarks/ablate.py --data DIR --minutes 2`.

A base and one change a row, each trained for the same minutes with two seeds or more; changes of
the answer alone share the base's checkpoint. Each seed has a split of its own, on which a row is
compared with the base; the spread is the standard deviation of these differences. On a CPU the
minutes are those of its cores: see `timed.py`. Results go to
`ablation.json` below `--out`; what is there already is not measured again, and a training that was
stopped goes on. Nothing is asserted.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
import sys

sys.path.insert(0, str(Path(__file__).parents[2]))

from src_snippets import train
from src_snippets.answers import answer_held_out
from src_snippets.config import Config
from src_snippets.datasets import CellSamples, choose_splits, pick
from src_snippets.evaluate import average_precision, hits_of
from src_snippets.forms import coco_truth, with_crowds
from src_snippets.predict import answer_samples
from src_snippets.thresholds import tune_thresholds
from src_snippets.train import by_image_id, fit, load_trained
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    for_classes,
    Kept,
    read_samples,
    timed_settings,
)

BASE = "base"
TRAINED = {
    BASE: {},
    "running mean of weights 0.99": dict(ema=0.99),
    "masks rounded as torchvision's": dict(half_pixel=False),
    "stain jitter 0.3": dict(stain_jitter=0.3),
    "stains normalised": dict(stain_norm=True),
    "crops around cells": dict(cell_crops=1.0),
    "crops around cells of each class": dict(rare_crops=0.5),
    "copy and paste": dict(copy_paste=0.5),
    "crops by class with copy and paste": dict(rare_crops=0.5, copy_paste=0.5),
    "these with stain jitter 0.3": dict(rare_crops=0.5, copy_paste=0.5, stain_jitter=0.3),
    "no colour jitter": dict(color_jitter=0.0),
    "zoom 0.5 to 2": dict(zoom=(0.5, 2.0)),
    "crops of 256 px": dict(crop=256),
    "scale 2 on crops of 96 px": dict(scale=2.0, crop=96),
    "anchors 4 to 64 px": dict(anchor_sizes=(4, 8, 16, 32, 64)),
    "1000 proposals": dict(proposals=1000),
    "RPN NMS 0.45": dict(rpn_nms=0.45),
    "cascade": dict(cascade=True),
    "CBAM": dict(attention="cbam"),
    "all that gained together": dict(
        rare_crops=0.5,
        copy_paste=0.5,
        tile=256,
        test_views="flips",
    ),
}
ANSWERED = {
    "up to 100 detections": dict(detections=100),
    "up to 300 detections": dict(detections=300),
    "score floor 0.1": dict(score_floor=0.1),
    "score floor 0.3": dict(score_floor=0.3),
    "score floor 0.5": dict(score_floor=0.5),
    "box NMS 0.3": dict(box_nms=0.3),
    "mask NMS 0.5": dict(mask_nms=0.5),
    "mask NMS by class 0.5": dict(class_nms=0.5),
    "cells from 32 px on": dict(least_area=32),
    "thresholds by class from the other half": dict(tune=True),
    "scores times mask probability": dict(rescore=True),
    "tiles of 256 px": dict(tile=256),
    "three flips": dict(test_views="flips"),
    "eight symmetries": dict(test_views="all"),
    "scales 0.8 and 1 and 1.25": dict(test_scales=(0.8, 1.0, 1.25)),
    "tiles of 256 px with three flips": dict(tile=256, test_views="flips"),
    "the same without a vote on masks": dict(tile=256, test_views="flips", vote=False),
    "these tiles and flips from score 0.01 on": dict(
        tile=256,
        test_views="flips",
        score_floor=0.01,
    ),
    "thresholds of recipe baseline": dict(
        box_nms=0.3,
        detections=200,
        score_floor=0.5,
        mask_threshold=(0.6,),
    ),
}


def seeded(options, name: str, seed: int) -> Config:
    """The settings of a row."""
    own = TRAINED.get(name, ANSWERED.get(name))
    return timed_settings(options, options.minutes, seed=seed, **own)


def measure(options, name: str, seed: int, samples: CellSamples) -> dict:
    """Trains what has to be trained, and scores the seed's validation part."""
    config = for_classes(seeded(options, name, seed), samples)
    (split,) = choose_splits(samples, config).values()
    trained = name if name in TRAINED else BASE
    folder = options.out / "runs" / f"{trained}-{seed}".replace(" ", "-")
    history = fit(config, pick(samples, split["train"]), [], folder)
    held_out = pick(samples, split["val"])
    start = train.time.perf_counter()
    model, own = load_trained(folder / "best.pt", config)
    answers = answer_samples([(model, own)], held_out, config)
    spent = (train.time.perf_counter() - start) / len(held_out)
    scores = average_precision(coco_truth(held_out, config.num_classes), by_image_id(answers))
    named = {name: scores[name] for name in ("AP50", "AP", "AP50_100")}
    if config.tune:
        ask = partial(answer_held_out, [((model, own), held_out)], config)
        truths = [with_crowds(sample) for sample in held_out]
        before = hits_of(answers, truths, config.num_classes)
        after = tune_thresholds(ask, truths, before, config).after
        named = dict(AP50=after, AP=None, AP50_100=None)  # the others are not measured so
    return named | dict(
        seconds_a_field=round(spent, 3),
        epochs=len(history),
        classes=[row["AP50"] for row in scores["classes"].values()],
    )


def as_rows(results: dict[str, dict[str, dict]]) -> Iterator[str]:
    """The table, line by line: names to seeds to figures."""
    yield "| change | AP50 | to base | spread | AP | epochs | s a field |"
    yield "|---|---|---|---|---|---|---|"
    base = results.get(BASE, {})
    for name, seeds in results.items():
        gains = [seeds[k]["AP50"] - base[k]["AP50"] for k in seeds if k in base]
        keys = ("AP50", "AP", "epochs")
        means = [mean(run[key] or 0.0 for run in seeds.values()) for key in keys]
        means.append(mean(run["seconds_a_field"] for run in seeds.values()))
        gain = f"{mean(gains):+.3f}" if name != BASE and gains else "-"
        values = gains if name != BASE else [run["AP50"] for run in seeds.values()]
        spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
        shown = [name, f"{means[0]:.3f}", gain, spread]
        shown += ["-" if any(run["AP"] is None for run in seeds.values()) else f"{means[1]:.3f}"]
        shown += [f"{means[2]:.0f}", f"{means[3]:.2f}"]
        yield "| " + " | ".join(shown) + " |"


def run_rows(options, names: list[str]) -> dict:
    """Measures what is missing, seed after seed, and writes each result at once."""
    samples = read_samples(options)
    kept = Kept(options.out / "ablation.json", options, (), samples.digest)
    for seed in range(options.seeds):
        for name in names:
            print(f"seed {seed}: {name}", flush=True)
            kept.get(name, str(seed), partial(measure, options, name, seed, samples))
    return {row: kept.results[row] for row in TRAINED | ANSWERED if row in kept.results}


def main() -> None:
    parser = command_line(__doc__, 2.0, "results/ablation")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="names of rows, with commas between; base too")
    options = parser.parse_args()
    choose_clock(parser, options.device)
    every = list(TRAINED | ANSWERED)
    chosen = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in every]:
        parser.error(f"no row {unknown[0]!r}; there are:\n" + "\n".join(every))
    for line in as_rows(run_rows(options, [BASE, *(n for n in chosen or every if n != BASE)])):
        print(line)


if __name__ == "__main__":
    main()
