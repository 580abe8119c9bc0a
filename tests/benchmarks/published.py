"""Ours beside published results: `HW3_DATA=consep python tests/benchmarks/published.py best.pt ..`.

Each checkpoint predicts the validation images of its own run (`split.json` beside it). Published
results are of CoNSeP's 27 training and 14 test fields of 1000 x 1000 px; its tiles are put together
where the borders of two validation images go on in each other, and cells that a border cut are one
again. What is printed are means over the fields, so tiles without their neighbours count as fields;
first those of scores from the checkpoint's `export_score_threshold` on, then from others on, and
from the one with the best PQ on the other fields, whose F1 is a mean too, not pooled. The published
models learned from all 27 fields, ours from some of them. Last come the scores of the validation
images as they are.
`HW3_SETTINGS` changes settings of prediction, as in the notebook.
"""

import argparse
from dataclasses import replace
import json
import os
from pathlib import Path
import sys

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from src_snippets.data.appearance import find_seams, image_borders
from src_snippets.data.layouts import open_dataset
from src_snippets.data.structures import CellSample, ground_truth, pack_layers
from src_snippets.evaluation.matching import ap_interval, match_table, matches_above, score_table
from src_snippets.inference.predict import predict_validation
from src_snippets.setup.config import change_config, Config, read_settings
from src_snippets.setup.files import load_checkpoint, show_table

COLUMNS = ["DICE", "AJI", "DQ", "SQ", "PQ", "F1"]
THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)
PUBLISHED = {  # Mask R-CNN, HoVer-Net: Graham et al. 2019; CellViT++: Hoerst et al. 2025
    "Mask R-CNN": (0.740, 0.474, 0.619, 0.740, 0.460, 0.692),
    "HoVer-Net": (0.853, 0.571, 0.702, 0.778, 0.547, 0.748),
    "CellViT++ SAM-H": (0.845, 0.578, 0.709, 0.771, 0.548, 0.773),
}


def label_maps(sample: CellSample) -> tuple[np.ndarray, np.ndarray]:
    """One map of ids (H, W) int64 and the class (N + 1,) int64 of each; upper layers on top."""
    ids = np.zeros(sample.size, np.int64)
    for layer in sample.layers.numpy():
        ids = np.where(layer > 0, layer, ids)
    return ids, np.r_[0, sample.labels.numpy()]


def join_samples(first: CellSample, second: CellSample, axis: int) -> CellSample:
    """Put `second` below (axis 0) or right of (axis 1) `first`.

    Two cells are one where they are of one class and most of either's pixels at the border
    touch the other.
    """
    (ids, classes), (more, more_classes) = label_maps(first), label_maps(second)
    more = np.where(more > 0, more + len(classes) - 1, 0)
    classes = np.r_[classes, more_classes[1:]]
    ends, starts = np.take(ids, -1, axis), np.take(more, 0, axis)
    pairs, counts = np.unique(np.stack([ends, starts]), axis=1, return_counts=True)
    for (a, b), count in zip(pairs.T, counts, strict=True):
        shared = 2 * count > max((ends == a).sum(), (starts == b).sum())
        if a and b and shared and classes[a] == classes[b]:
            more[more == b] = a
    whole = np.concatenate([ids, more], axis)
    pixels = [np.flatnonzero(whole == k) for k in np.unique(whole[whole > 0])]
    parts = [(p, np.ones(len(p), np.int64), classes[whole.flat[p[0]]]) for p in pixels]
    image = torch.cat([first.image, second.image], axis + 1)
    layers, labels = pack_layers(parts, whole.shape)
    return CellSample(image, layers, labels, f"{first.name} + {second.name}")


def stitch(samples: list[CellSample]) -> list[CellSample]:
    """Join tiles until no border goes on in another; rows become fields when they are complete."""
    fields = list(samples)
    while seams := find_seams([image_borders(field.image.numpy()) for field in fields]):
        a, b = seams[0]
        borders = [image_borders(fields[k].image.numpy()) for k in (a, b)]
        beside = len(borders[0][1]) == len(borders[1][0]) and borders[0][1] @ borders[1][0] > 0.7
        joined = join_samples(fields[a], fields[b], axis=int(beside))
        fields = [field for k, field in enumerate(fields) if k not in (a, b)] + [joined]
    return fields


def by_threshold(fields: list[CellSample], predictions, config: Config) -> pd.DataFrame:
    """Means over fields of scores from each threshold on, and from that of the other fields."""
    parts = {}
    for threshold in THRESHOLDS:
        changed = replace(config, export_score_threshold=threshold)
        pairs = zip(fields, predictions, strict=True)
        rows = [score_table([f], [p], changed)[COLUMNS].iloc[0] for f, p in pairs]
        parts[threshold] = pd.DataFrame(rows, index=range(len(rows)))
    quality = pd.DataFrame({threshold: part.PQ for threshold, part in parts.items()})
    chosen = [quality.drop(index=k).mean().idxmax() for k in quality.index]
    others = pd.DataFrame([parts[t].loc[k] for k, t in enumerate(chosen)])
    rows = {f"scores from {threshold} on": part.mean() for threshold, part in parts.items()}
    return pd.DataFrame(rows | {"from the best of the other fields on": others.mean()}).T


def compare(fields: list[CellSample], predictions, config: Config) -> pd.DataFrame:
    """Our rows of `score_table`, all and by class, above those that are published."""
    ours = score_table(fields, predictions, config)[COLUMNS].dropna(how="all")
    published = pd.DataFrame.from_dict(PUBLISHED, orient="index", columns=COLUMNS)
    others = [by_threshold(fields, predictions, config)] if len(fields) > 1 else []
    return pd.concat([ours, *others, published])


def main(checkpoints: list[Path], data: Path) -> pd.DataFrame:
    """Predict, stitch and compare; prints and returns the table."""
    config = load_checkpoint(checkpoints[0])["config"]
    config = change_config(config, read_settings({}, os.environ))
    parts, whole = [], []
    dataset = open_dataset(data, config)
    for path in checkpoints:
        names = json.loads((path.parent / "split.json").read_text())["val"]
        tiles = [dataset.read(name) for name in names]
        parts.append((path, stitch(tiles)))
        whole.append((path, tiles))
        sizes = [f"{height} x {width}" for height, width in (f.size for f in parts[-1][1])]
        print(f"{path}: {len(tiles)} tiles make {len(sizes)} fields: {', '.join(sizes)} px")
    fields = [field for _, part in parts for field in part]
    table = compare(fields, predict_validation(parts, config), config)
    show_table(table)
    tiles = [tile for _, own in whole for tile in own]
    predictions = predict_validation(whole, config)
    show_table(score_table(tiles, predictions, config))
    truths = [ground_truth(tile, crowds=True) for tile in tiles]
    matches = match_table(predictions, truths, config.num_classes)
    interval = ap_interval(matches_above(matches, config.score_threshold), len(tiles))
    print(f"AP50 of the tiles, 95% CI over them: {interval}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="best.pt of runs")
    if "HW3_DATA" not in os.environ:
        parser.error("set HW3_DATA to the folder of the dataset")
    main(parser.parse_args().checkpoints, Path(os.environ["HW3_DATA"]))
