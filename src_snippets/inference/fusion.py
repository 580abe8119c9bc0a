"""Fusion: the predictions of several views and models for one image as one."""

# %% [markdown]
# ### Fuse views and models
# What most views and models detect rises above what one alone does. In: one `Instances` for each
# view and model; out: one for the image. The trap: a score becomes the mean over all of them, those
# without such a detection too, so that fused scores are lower.

# %%
# @title Fusion: groups by mask IoU, mean score, mask by majority
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from src_snippets.data.rle import decode_runs, encode_runs
from src_snippets.data.structures import Instances
from src_snippets.model.detect import concatenate, greedy_groups
from src_snippets.setup.config import Config


def majority_mask(rles: Sequence[dict], weights: np.ndarray) -> dict:
    """Return the RLE of the pixels that masks with half of the weight have, or the first RLE.

    rles: K RLEs of one size; weights: (K,) float64. Works on run lengths, never on pixels.
    """
    runs = [decode_runs(rle) for rle in rles]
    changes = np.repeat(weights, [len(starts) for starts, _ in runs])
    changes = np.concatenate([changes, -changes])
    bounds = np.concatenate([starts for starts, _ in runs] + [ends for _, ends in runs])
    order = np.argsort(bounds, kind="stable")
    bounds, votes = bounds[order], np.cumsum(changes[order])[:-1]  # votes from a bound to the next
    agreed = (votes >= weights.sum() / 2 * (1 - 1e-6)) & (np.diff(bounds) > 0)
    if not agreed.any():
        return rles[0]
    return encode_runs(bounds[:-1][agreed], bounds[1:][agreed], *rles[0]["size"])


def fuse(predictions: Sequence[Instances], config: Config) -> Instances:
    """Fuse predictions of one image, one for each view and model, at least one.

    Detections of one instance (see `greedy_groups`, mask IoU > `fusion_iou`) become one: its score
    is the sum of theirs over the number of all predictions, its mask what the majority by score
    says, its box the mean weighted by score.

    Returns:
        The fused detections from `score_threshold` on, best first, at most `detections`.
    """
    every, owners = concatenate(predictions)
    order = np.argsort(-every.scores, kind="stable")
    every, owners = every.select(order), owners[order]
    groups = list(greedy_groups(every, owners, config.fusion_iou))
    fused = every.select([group[0] for group in groups])
    boxes, rles, weights = fused.boxes.copy(), list(fused.rles), every.scores + 1e-6  # may be 0
    for index, group in enumerate(groups):
        if len(group) > 1:
            boxes[index] = np.average(every.boxes[group], axis=0, weights=weights[group])
            rles[index] = majority_mask([every.rles[k] for k in group], weights[group])
    scores = np.array([every.scores[group].sum() for group in groups], np.float32)
    fused = replace(fused, boxes=boxes, rles=rles, scores=scores / len(predictions))
    fused = fused.select(np.argsort(-fused.scores, kind="stable"))
    return fused.above(config.score_threshold).select(slice(config.detections))
