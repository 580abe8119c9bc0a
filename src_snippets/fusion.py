"""Which detections stay: mask NMS, and outputs without overlaps."""

# %% [markdown]
# ## Two detections, one cell?
# Boxes of crowded cells overlap where the cells do not, so the last word belongs to the masks. Both
# steps work on run lengths: nothing of cells x height x width is made.

# %%
import numpy as np
import pycocotools.mask
import torch

from src_snippets.config import Config
from src_snippets.forms import instance_boxes, Instances
from src_snippets.rle import encode_layers, paint


# %%
def overlapping_pairs(rles: list[dict], least: float, rows: int = 256):
    """Yields (K,) int64 arrays i, j with i < j: masks whose IoU is over `least`.

    Args:
        rles: N COCO RLEs of one size; least: 0..1.
        rows: so many masks are compared with all others at a time, 8 * rows * N bytes.
    """
    for begin in range(0, len(rles), rows):
        rest = rles[begin:]
        table = pycocotools.mask.iou(rest, rles[begin : begin + rows], [0] * len(rest[:rows]))
        later, earlier = np.nonzero(table > least)
        apart = later > earlier
        yield begin + earlier[apart], begin + later[apart]


def mask_nms(found: Instances, most: float) -> Instances:
    """Drops detections whose mask IoU with a better one that stays, of any class, is over `most`.

    Returns:
        The others, best first; equal scores keep their order.
    """
    found = found.select(np.argsort(-found.scores, kind="stable"))
    weaker = [[] for _ in found.rles]
    for better, worse in overlapping_pairs(found.rles, most):
        for i, j in zip(better.tolist(), worse.tolist(), strict=True):
            weaker[i].append(j)
    kept = np.ones(len(found), bool)
    for i, rivals in enumerate(weaker):
        if kept[i]:
            kept[rivals] = False
    return found.select(kept)


# %%
def without_overlaps(found: Instances) -> Instances:
    """Gives each pixel to the best detection that claims it.

    Returns:
        Detections with what is left of their masks, tight boxes, and no mask empty; their order
        stays. Memory: two maps of the image's size.
    """
    order = np.argsort(found.scores, kind="stable")  # the best is painted last
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
