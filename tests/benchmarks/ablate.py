"""Ablations: `python tests/benchmarks/ablate.py --data DIR --minutes 2`.

A base and one change per row, each trained for the same minutes with two seeds or more; changes of
the prediction alone share the base's checkpoint. Each seed has a split of its own, on which a row
is compared with the base; the spread is the standard deviation of these differences. On a CPU the
minutes are those of its cores: see `timed.py`. Results go to `ablation.json` below `--out`; what is
there is not measured again, and a training that was stopped continues. Nothing is asserted.

Rows of `light` are for a pretrained backbone: `--recipe light --minutes 10 --settings '{"weights":
FILE, "tta": "none"}'`; they are measured where the recipe is not `demo`.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, stdev
import sys
import time
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn, Tensor
import torch.nn.functional as F
from torchvision.transforms import v2

from src_snippets.data import transforms
from src_snippets.data.samples import CellSamples, make_splits, subset
from src_snippets.data.structures import CellSample
from src_snippets.data.transforms import random_scaled_crop, TrainingSet
from src_snippets.model import heads, mask_rcnn
from src_snippets.model.heads import CellRoIHeads, mask_loss
from src_snippets.setup.config import Config
from src_snippets.training import trainer
from tests.benchmarks.timed import (
    choose_clock,
    command_line,
    core_seconds,
    predict_samples,
    read_samples,
    Results,
    score,
    timed_config,
    train_timed,
)

BASE = "base"
TRAINED = {
    BASE: {},
    "EMA 0.99": dict(ema=0.99),
    "crops around instances of each class": dict(class_crops=0.5),
    "copy-paste": dict(copy_paste=0.5),
    "class crops with copy-paste": dict(class_crops=0.5, copy_paste=0.5),
    "no colour jitter": dict(color_jitter=0.0),
    "scale jitter 0.5 to 2": dict(scale_jitter=(0.5, 2.0)),
    "crops of 256 px": dict(crop=256),
    "scale 2 on crops of 96 px": dict(scale=2.0, crop=96),
    "anchors 4 to 64 px": dict(anchor_sizes=(4, 8, 16, 32, 64)),
    "1000 proposals": dict(proposals=1000),
    "CBAM": dict(attention="cbam"),
    "all that gained together": dict(class_crops=0.5, copy_paste=0.5, tile=256, tta="flips"),
}
PRETRAINED = {  # of a recipe with class crops, copy-paste and EMA, at scale 1.5
    BASE: {},
    "scale jitter 0.5 to 2": dict(scale_jitter=(0.5, 2.0)),
    "batch norm frozen": dict(norm="frozen"),
    "neither class crops nor copy-paste": dict(class_crops=0.0, copy_paste=0.0),
    "Dice beside cross-entropy": {},  # these are patched in, see `PATCHES`
    "class of each pixel as a loss": {},
    "images drawn by their area": {},
    "crops over the border": {},
    "stochastic depth 0.1": dict(drop_path=0.1),
    "scale 2 on crops of 192 px": dict(scale=2.0, crop=192, anchor_sizes=(16, 32, 64, 128, 256)),
    "learning rate 2e-3": dict(lr=2e-3),
    "no EMA": dict(ema=0.0),
    "no colour jitter": dict(color_jitter=0.0),
    "colour jitter 0.4": dict(color_jitter=0.4),
    "scale 1.33": dict(scale=1.333, crop=288),
    "scale jitter 0.7 to 1.4": dict(scale_jitter=(0.7, 1.4)),
}
PREDICTED = {
    "up to 100 detections": dict(detections=100),
    "up to 300 detections": dict(detections=300),
    "score threshold 0.1": dict(score_threshold=0.1),
    "score threshold 0.3": dict(score_threshold=0.3),
    "score threshold 0.5": dict(score_threshold=0.5),
    "box NMS 0.3": dict(box_nms=0.3),
    "tiles of 256 px": dict(tile=256),
    "TTA: 3 flips": dict(tta="flips"),
    "TTA: 8 symmetries": dict(tta="d4"),
    "tiles of 256 px with 3 flips": dict(tile=256, tta="flips"),
    "these tiles and flips, scores from 0.01 on": dict(tile=256, tta="flips", score_threshold=0.01),
    "thresholds of recipe baseline": dict(
        box_nms=0.3, detections=200, score_threshold=0.5, mask_threshold=0.6
    ),
}


def row_config(options, name: str, seed: int, samples: CellSamples) -> Config:
    """The settings of a row."""
    changes = (TRAINED | PRETRAINED | PREDICTED)[name]
    return timed_config(options, samples, options.minutes, seed=seed, **changes)


class SemanticHeads(CellRoIHeads):
    """RoI heads with half the cross-entropy of the class of each pixel, from features at stride 4.

    Source: the semantic branch of arXiv:1901.07518.
    """

    def __init__(self, *parts):
        super().__init__(*parts)
        logits = self.mask_predictor.mask_fcn_logits
        self.semantic = nn.Conv2d(logits.in_channels, logits.out_channels, 1)

    def forward(self, features, proposals, image_shapes, targets=None):
        """As `CellRoIHeads`, with `loss_semantic` in training."""
        found, losses = super().forward(features, proposals, image_shapes, targets)
        if not self.training:
            return found, losses
        values = []
        for logits, shape, target in zip(
            self.semantic(features["0"]).float(), image_shapes, targets, strict=True
        ):
            layer = target["layers"].amax(0).long()
            table = layer.new_zeros(max(int(layer.max()), *target["ids"].tolist(), 0) + 1)
            table[target["ids"]] = target["labels"]
            height, width = (side // 4 for side in shape)
            kinds = F.interpolate(table[layer][None, None].float(), (height, width))[0].long()
            values.append(F.cross_entropy(logits[None, :, :height, :width], kinds))
        return found, losses | dict(loss_semantic=sum(values) / len(values) / 2)


class ByArea(TrainingSet):
    """As many crops of an image as its area asks for, in place of one."""

    def augmented(self, index: int) -> CellSample:
        """A random crop of a random image."""
        areas = [sample.layers[0].numel() / self.config.crop**2 for sample in self.samples]
        return super().augmented(int(torch.multinomial(torch.tensor(areas).clamp(min=1), 1)))


def dice_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """`mask_loss`, and 1 - Dice of each box's own class, the mean over boxes."""
    own = logits[torch.arange(len(labels)), labels].sigmoid().flatten(1)
    shared, both = (own * targets.flatten(1)).sum(1), own.sum(1) + targets.flatten(1).sum(1)
    dice = 1 - (2 * shared + 1) / (both + 1)
    return mask_loss(logits, labels, targets) + dice.sum() / max(len(dice), 1)


def crop_over_border(image, layers, size, scale, contains: int | None = None):
    """`random_scaled_crop` whose window may start an eighth outside, and is moved in: border cells
    are seen as often as others.
    """
    sides, limits = torch.tensor(image.shape[-2:]), torch.tensor(size)
    factor = scale[0] * (scale[1] / scale[0]) ** float(torch.rand(()))
    window = torch.minimum(sides, (limits / factor - 1e-6).ceil().long())
    corner = (torch.rand(2) * (sides - 0.75 * window + 1) - window / 8).floor().long()
    corner = torch.minimum(corner.clamp(min=0), sides - window)
    if contains:
        return random_scaled_crop(image, layers, size, (float(factor),) * 2, contains)
    (top, left), (tall, wide) = corner.tolist(), window.tolist()
    cut = [v2.functional.crop(pixels, top, left, tall, wide) for pixels in (image, layers)]
    return random_scaled_crop(*cut, size, (float(factor),) * 2)


PATCHES = {  # of a module: the name there, what takes its place
    "Dice beside cross-entropy": (heads, "mask_loss", dice_loss),
    "class of each pixel as a loss": (mask_rcnn, "CellRoIHeads", SemanticHeads),
    "images drawn by their area": (trainer, "TrainingSet", ByArea),
    "crops over the border": (transforms, "random_scaled_crop", crop_over_border),
}


def measure(options, name: str, seed: int, samples: CellSamples) -> dict:
    """Trains what has to be trained, and scores the seed's validation part."""
    with patch.object(*PATCHES[name]) if name in PATCHES else nullcontext():
        return measure_patched(options, name, seed, samples)


def measure_patched(options, name: str, seed: int, samples: CellSamples) -> dict:
    """`measure` where the patches of the row are in."""
    config = row_config(options, name, seed, samples)
    (split,) = make_splits(samples, config).values()
    trained = BASE if name in PREDICTED else name
    folder = options.out / "runs" / f"{trained}-{seed}".replace(" ", "-")
    epochs = train_timed(config, subset(samples, split["train"]), folder)
    held_out = list(subset(samples, split["val"]))
    clock = core_seconds if options.device == "cpu" else time.perf_counter
    start = clock()
    predictions = predict_samples(folder / "best.pt", held_out, config)
    spent = (clock() - start) / len(held_out)
    scores = score(held_out, predictions, config)
    return {key: scores[key] for key in ("AP50", "AP", "AP50_100")} | dict(
        seconds_per_image=round(spent, 3),
        epochs=epochs,
        classes=[row["AP50"] for row in scores["classes"].values()],
    )


def as_rows(results: dict[str, dict[str, dict]]) -> Iterator[str]:
    """The table, line by line: names to seeds to figures."""
    yield "| change | AP50 | to base | spread | AP | epochs | s per image |"
    yield "|---|---|---|---|---|---|---|"
    base = results.get(BASE, {})
    for name, seeds in results.items():
        gains = [seeds[k]["AP50"] - base[k]["AP50"] for k in seeds if k in base]
        keys = ("AP50", "AP", "epochs", "seconds_per_image")
        ap50, ap, epochs, seconds = (mean(run[k] or 0.0 for run in seeds.values()) for k in keys)
        gain = f"{mean(gains):+.3f}" if name != BASE and gains else "-"
        values = gains if name != BASE else [run["AP50"] for run in seeds.values()]
        spread = f"{stdev(values):.3f}" if len(values) > 1 else "-"
        columns = (
            name,
            f"{ap50:.3f}",
            gain,
            spread,
            f"{ap:.3f}",
            f"{epochs:.0f}",
            f"{seconds:.2f}",
        )
        yield f"| {' | '.join(columns)} |"


def run_rows(options, names: list[str]) -> dict:
    """Measures what is missing, seed after seed, and writes each result at once."""
    samples = read_samples(options)
    results = Results(options.out / "ablation.json", options, (), samples.digest)
    for seed in range(options.seeds):
        for name in names:
            print(f"seed {seed}: {name}", flush=True)
            results.get(name, str(seed), partial(measure, options, name, seed, samples))
    rows = TRAINED | PRETRAINED | PREDICTED
    return {row: results.results[row] for row in rows if row in results.results}


def main() -> None:
    parser = command_line(__doc__, 2.0, "results/ablation")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="", help="names of rows, with commas between; base too")
    options = parser.parse_args()
    choose_clock(parser, options.device)
    every = list((TRAINED if options.recipe == "demo" else PRETRAINED) | PREDICTED)
    chosen = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in every]:
        parser.error(f"no row {unknown[0]!r}; there are:\n" + "\n".join(every))
    for line in as_rows(run_rows(options, [BASE, *(n for n in chosen or every if n != BASE)])):
        print(line)


if __name__ == "__main__":
    main()
