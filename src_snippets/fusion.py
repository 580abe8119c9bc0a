"""Which detections stay: mask NMS, and outputs without overlaps."""

# %% [markdown]
# ## Two detections, one cell?
# Boxes of crowded cells overlap where the cells do not, so the last word belongs to the masks. Both
# steps work on run lengths: nothing of cells x height x width is made.

# %%
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pycocotools.mask
import torch

from src_snippets.config import Config
from src_snippets.forms import by_class, instance_boxes, Instances
from src_snippets.rle import decode_runs, encode_layers, encode_runs, mask_areas, paint, run_pixels


# %%
def mask_nms(found: Instances, most: float, rows: int = 256) -> Instances:
    """Drops detections whose mask IoU with a better one that stays, of any class, is over `most`.

    Args:
        rows: so many masks are compared with all weaker ones at a time, 8 * rows * N bytes.

    Returns:
        The others, best first; equal scores keep their order.
    """
    found = found.select(np.argsort(-found.scores, kind="stable"))
    kept = np.ones(len(found), bool)
    for begin in range(0, len(found), rows):
        rest = found.rles[begin:]
        table = pycocotools.mask.iou(rest, rest[:rows], [0] * len(rest[:rows]))
        for row, overlaps in enumerate(table.T):
            if kept[begin + row]:
                kept[begin + row + 1 :] &= overlaps[row + 1 :] <= most
    return found.select(kept)


# %%
def without_overlaps(found: Instances) -> Instances:
    """Gives each pixel to the best detection that claims it.

    Returns:
        Detections with what is left of their masks, tight boxes, and no mask empty; their order
        stays. Memory: two maps of the image's size.
    """
    order = np.argsort(-found.scores, kind="stable")[::-1]  # the best, and first, is painted last
    drawn = paint([found.rles[i] for i in order], order + 1, *found.size)[None]
    boxes, areas, _ = instance_boxes(torch.from_numpy(drawn), len(found))
    rles = encode_layers(drawn, len(found))
    left = Instances(boxes.numpy(), found.scores, found.labels, rles, found.size)
    return left.select(areas.numpy() > 0)


def settle(found: Instances, config: Config) -> Instances:
    """Applies `class_nms`, `mask_nms`, `overlaps` and `least_area` of the settings."""
    if min(config.class_nms) < 1:
        parts = [found.select(found.labels == label) for label in np.unique(found.labels)]
        most = [float(by_class(config.class_nms, part.labels[:1])[0]) for part in parts]
        parts = [mask_nms(part, limit) for part, limit in zip(parts, most, strict=True)]
        found = concatenate([found.select([]), *parts])[0]
        found = found.select(np.argsort(-found.scores, kind="stable"))
    if config.mask_nms < 1:
        found = mask_nms(found, config.mask_nms)
    found = found if config.overlaps else without_overlaps(found)
    if max(config.least_area) > 1:
        least = by_class(config.least_area, found.labels)
        found = found.select(mask_areas(found.rles) >= least)
    return found


# %% [markdown]
# Several views and models answer together: what most of them see rises above what one alone sees.


# %%
def concatenate(answers: Sequence[Instances]) -> tuple[Instances, np.ndarray]:
    """Several answers for one image as one, and (N,) int64, which of them each detection is of."""
    owners = np.repeat(np.arange(len(answers)), [len(found) for found in answers])
    columns = ("boxes", "scores", "labels")
    arrays = (np.concatenate([getattr(a, column) for a in answers]) for column in columns)
    rles = [rle for found in answers for rle in found.rles]
    return Instances(*arrays, rles, answers[0].size), owners


def vote(found: Instances) -> Instances:
    """One detection out of several of one cell, the first of which lends its score and class.

    A pixel is the cell's where half of the scores say so; the box is the mean, weighed by them.
    """
    weights = found.scores + 1e-6  # scores may be 0
    parts = [run_pixels(*decode_runs(rle)) for rle in found.rles]
    pixels, where = np.unique(np.concatenate(parts), return_inverse=True)
    voices = np.bincount(where, np.repeat(weights, list(map(len, parts))))
    pixels = pixels[voices >= weights.sum() / 2 * (1 - 1e-6)]
    if not len(pixels):
        return found.select([0])
    apart = np.flatnonzero(np.diff(pixels) != 1)
    starts, ends = pixels[np.r_[0, apart + 1]], pixels[np.r_[apart, len(pixels) - 1]] + 1
    box = np.average(found.boxes, axis=0, weights=weights)[None].astype(np.float32)
    rles = [encode_runs(starts, ends, *found.size)]
    return Instances(box, found.scores[:1], found.labels[:1], rles, found.size)


# %%
def clusters(every: Instances, owners: np.ndarray, least: float, rows: int = 256):
    """Yields indices of the detections of one cell, its best first.

    The best detection stands for those of its class that overlap it (mask IoU above `least`), the
    best one of each other owner. `every` is sorted, best first.

    Args:
        rows: so many masks are compared with all weaker ones at a time, 8 * rows * N bytes.
    """
    free = np.ones(len(every), bool)
    for begin in range(0, len(every), rows):
        rest = every.rles[begin:]
        table = pycocotools.mask.iou(rest, rest[:rows], [0] * len(rest[:rows]))
        for lead, overlaps in enumerate(table.T, start=begin):
            if not free[lead]:
                continue
            alike = free[begin:] & (overlaps > least) & (owners[begin:] != owners[lead])
            alike = begin + np.flatnonzero(alike & (every.labels[begin:] == every.labels[lead]))
            others = alike[np.unique(owners[alike], return_index=True)[1]]  # the best of each
            free[lead], free[others] = False, False
            yield [lead, *others.tolist()]


# %%
def fuse(answers: Sequence[Instances], config: Config) -> Instances:
    """Joins the answers of several views or models for one image.

    A cell's score is the sum of the scores of those that see it over the number of all: see
    `clusters`. With `vote` its mask is what most of them say, else that of the best.

    Args:
        answers: one `Instances` a view or model, at least one, all of one image.

    Returns:
        The joined detections from `score_floor` on, best first, at most `detections`.
    """
    every, owners = concatenate(answers)
    order = np.argsort(-every.scores, kind="stable")
    every, owners = every.select(order), owners[order]
    joined = [np.zeros(0, np.float32)]
    cells = [every.select([])]
    for own in clusters(every, owners, config.fusion_iou):
        joined.append(every.scores[own].sum(keepdims=True) / len(answers))
        several = config.vote and len(own) > 1
        cells.append(vote(every.select(own)) if several else every.select(own[:1]))
    found = replace(concatenate(cells)[0], scores=np.concatenate(joined).astype(np.float32))
    best = np.argsort(-found.scores, kind="stable")
    return found.select(best[found.scores[best] >= config.score_floor][: config.detections])


# %%
def join_tiles(
    pieces: Sequence[Instances], cut: Sequence[np.ndarray], config: Config, rows: int = 256
) -> Instances:
    """Joins the answers of tiles that overlap.

    A cell that is cut by its tile's inner edge gives way to one of another tile that holds over
    half of it, the largest first; of whole ones that overlap (class and `fusion_iou` as in `fuse`)
    the better stays.

    Args:
        pieces: one `Instances` a tile, at image size; cut: (N,) bool each.

    Returns:
        The others, best first, at most `detections`.
    """
    every, owners = concatenate(pieces)
    cut = np.concatenate(cut)
    order = np.lexsort((np.where(cut, -mask_areas(every.rles), -every.scores), cut))
    every, owners, cut = every.select(order), owners[order], cut[order]
    kept = np.ones(len(every), bool)
    for begin in range(0, len(every), rows):
        rest = every.rles[begin:]
        leads = rest[:rows]
        alike = pycocotools.mask.iou(rest, leads, [0] * len(leads)) > config.fusion_iou
        within = pycocotools.mask.iou(rest, leads, [1] * len(leads)) > 0.5  # of their own area
        for lead in range(begin, begin + len(leads)):
            if kept[lead]:
                doubles = alike[:, lead - begin] & (every.labels[begin:] == every.labels[lead])
                doubles |= cut[begin:] & within[:, lead - begin]
                doubles &= owners[begin:] != owners[lead]
                kept[lead + 1 :] &= ~doubles[lead + 1 - begin :]
    best = np.flatnonzero(kept)
    best = best[np.argsort(-every.scores[best], kind="stable")]
    return every.select(best[: config.detections])
