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
from src_snippets.forms import instance_boxes, Instances
from src_snippets.rle import encode_layers, paint


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
    """Applies `mask_nms` and `overlaps` of the settings."""
    if config.mask_nms < 1:
        found = mask_nms(found, config.mask_nms)
    return found if config.overlaps else without_overlaps(found)


# %% [markdown]
# Several models answer together: what most of them see rises above what one alone sees.


# %%
def fuse(answers: Sequence[Instances], config: Config, rows: int = 256) -> Instances:
    """Joins the answers of several models for one image.

    The best detection stands for those of its class that overlap it (mask IoU above `fusion_iou`),
    the best one of each other model. Its score is the sum of theirs over the number of models.

    Args:
        answers: one `Instances` a model, at least one, all of one image.
        rows: so many masks are compared with all weaker ones at a time, 8 * rows * N bytes.

    Returns:
        The joined detections from `score_floor` on, best first, at most `detections`; then as from
        `settle`.
    """
    model = np.repeat(np.arange(len(answers)), [len(found) for found in answers])
    columns = ("boxes", "scores", "labels")
    boxes, scores, labels = (np.concatenate([getattr(a, c) for a in answers]) for c in columns)
    rles = [rle for found in answers for rle in found.rles]
    order = np.argsort(-scores, kind="stable")
    every = Instances(boxes, scores, labels, rles, answers[0].size).select(order)
    model, free, joined = model[order], np.ones(len(every), bool), every.scores.copy()
    leads = np.zeros(len(every), bool)
    for begin in range(0, len(every), rows):
        rest = every.rles[begin:]
        table = pycocotools.mask.iou(rest, rest[:rows], [0] * len(rest[:rows]))
        for lead, overlaps in enumerate(table.T, start=begin):
            if not free[lead]:
                continue
            alike = free[begin:] & (overlaps > config.fusion_iou) & (model[begin:] != model[lead])
            alike = begin + np.flatnonzero(alike & (every.labels[begin:] == every.labels[lead]))
            others = alike[np.unique(model[alike], return_index=True)[1]]  # the best of each
            leads[lead], free[lead], free[others] = True, False, False
            joined[lead] = every.scores[[lead, *others]].sum() / len(answers)
    chosen = np.flatnonzero(leads & (joined >= config.score_floor))
    chosen = chosen[np.argsort(-joined[chosen], kind="stable")][: config.detections]
    return settle(replace(every, scores=joined).select(chosen), config)
