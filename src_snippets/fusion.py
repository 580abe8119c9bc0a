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
