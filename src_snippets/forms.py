"""The two forms that everything passes through: `CellSample` and `Instances`."""

# %% [markdown]
# ## Which forms does the data take?
# Two. `CellSample` is an image with its truth, `Instances` is the answer for one image. Letters:
# `N` instances, `B` images, `C` classes, `L` layers, `H, W` pixels. Boxes are XYXY in pixels, the
# right and lower edge outside: a cell in column 3 alone spans x from 3 to 4.

# %%
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import find_objects
import torch
from torch import Tensor

from src_snippets.rle import encode_layers, mask_areas


# %%
@dataclass(frozen=True)
class CellSample:
    """One image and its truth.

    Attributes:
        image: (3, H, W) uint8, RGB.
        layers: (L, H, W) int16, from 32,768 instances on int32, with L >= 1; pixel = instance id,
            0 = background. Ids run from 1 to N and lie in one layer each; instances that do not
            overlap share a layer.
        labels: (N,) int64, class 1..C of id `i` at `labels[i - 1]`.
        name: the folder's name.
    """

    image: Tensor
    layers: Tensor
    labels: Tensor
    name: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.image.shape[-2:])


# %%
@dataclass(frozen=True)
class Instances:
    """The answer for one image, best first where a model made it.

    Attributes:
        boxes: (N, 4) float32, XYXY pixels, inside the image.
        scores: (N,) float32, 0..1.
        labels: (N,) int64, 1..C.
        rles: N COCO RLEs at image size.
        size: height and width of the image in pixels.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    rles: Sequence[dict]
    size: tuple[int, int]

    def __len__(self):
        return len(self.rles)

    def select(self, keep: np.ndarray) -> "Instances":
        """The instances at `keep`, (N,) bool or (K,) ints, in that order."""
        index = np.arange(len(self))[keep]
        rles = [self.rles[i] for i in index]
        return Instances(self.boxes[index], self.scores[index], self.labels[index], rles, self.size)


# %% [markdown]
# Layers are packed once, when a folder is read: class maps that do not overlap are laid into one.
# Real fields mostly end up with a single layer, four times less to move than one a class.


# %%
def renumber(instance_map: np.ndarray, first: int) -> tuple[np.ndarray, int]:
    """Gives the ids of a map consecutive numbers from `first` on, in ascending order of old id.

    Args:
        instance_map: (H, W) ints, 0 = background.
        first: the new number of the smallest id, at least 1.

    Returns:
        The (H, W) int32 map, and how many ids it holds.
    """
    highest = int(instance_map.max(initial=0))
    if highest > 4 * instance_map.size + 1000:  # a table up to the highest id would be too large
        ids, inverse = np.unique(instance_map, return_inverse=True)
        table = np.where(ids > 0, np.cumsum(ids > 0) + first - 1, 0).astype(np.int32)
        return table[inverse].reshape(instance_map.shape), int((ids > 0).sum())
    present = np.bincount(instance_map.ravel(), minlength=1) > 0
    present[0] = False
    table = np.where(present, np.cumsum(present) + first - 1, 0).astype(np.int32)
    return table[instance_map], int(present.sum())


# %%
def pack_layers(maps: Sequence[np.ndarray], classes: Sequence[int], size: tuple[int, int]):
    """Packs one instance map a class into as few layers as overlaps allow.

    Args:
        maps: (H, W) ints each, pixel = instance id within that class, 0 = background.
        classes: the class 1..C of each map.
        size: H, W; needed where there are no maps.

    Returns:
        layers (L, H, W) int16 or int32 and labels (N,) int64 as in `CellSample`.
    """
    layers, labels = [], []
    for instance_map, label in zip(maps, classes, strict=True):
        numbered, count = renumber(instance_map, len(labels) + 1)
        labels += [label] * count
        free = (k for k, layer in enumerate(layers) if not ((layer > 0) & (numbered > 0)).any())
        slot = next(free, None)
        if count and slot is None:
            layers.append(numbered)
        elif count:
            layers[slot] = layers[slot] + numbered
    layers = np.stack(layers) if layers else np.zeros((1, *size), np.int32)
    kind = np.int16 if len(labels) < 2**15 else np.int32
    return torch.from_numpy(layers.astype(kind)), torch.tensor(labels, dtype=torch.int64)


# %%
def instance_boxes(layers: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tight boxes of all instances of an instance map.

    Args:
        layers: (L, H, W) ints as in `CellSample`, or a crop of it.
        count: N, the highest id that may occur.

    Returns:
        boxes (N, 4) float32 XYXY pixels, areas (N,) int64 pixels, layer index (N,) int64. An id
        that is not there has area 0 and a box of zeros.
    """
    boxes = np.zeros((count, 4), np.float32)
    areas = np.zeros(count + 1, np.int64)
    home = np.zeros(count, np.int64)
    for index, layer in enumerate(layers.numpy()):
        areas += np.bincount(layer.ravel(), minlength=count + 1)
        for i, found in enumerate(find_objects(layer, max_label=count)):
            if found is not None:
                rows, columns = found
                boxes[i] = columns.start, rows.start, columns.stop, rows.stop
                home[i] = index
    return torch.from_numpy(boxes), torch.from_numpy(areas[1:]), torch.from_numpy(home)


# %%
def truth_instances(sample: CellSample) -> Instances:
    """The truth of a sample in the form of an answer, with scores of 1."""
    count = len(sample.labels)
    boxes, _, _ = instance_boxes(sample.layers, count)
    rles = encode_layers(sample.layers.numpy(), count)
    scores = np.ones(count, np.float32)
    return Instances(boxes.numpy(), scores, sample.labels.numpy(), rles, sample.size)


def coco_truth(samples: Sequence[CellSample], num_classes: int) -> dict:
    """The truth of samples as a COCO dictionary; image ids are 1, 2, .. in their order.

    Returns:
        `images` (id, file_name, height, width), `annotations` with RLEs, XYWH boxes and areas in
        pixels, and `categories` class1 .. classC with ids 1..C.
    """
    images, annotations = [], []
    for image_id, sample in enumerate(samples, start=1):
        height, width = sample.size
        name = f"{sample.name}/image.tif"
        images.append(dict(id=image_id, file_name=name, height=height, width=width))
        truth = truth_instances(sample)
        columns = (truth.boxes, truth.labels, truth.rles, mask_areas(truth.rles).tolist())
        for box, label, rle, area in zip(*columns, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=int(label),
                    segmentation=rle,
                    area=area,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    iscrowd=0,
                )
            )
    categories = [dict(id=k, name=f"class{k}") for k in range(1, num_classes + 1)]
    return dict(images=images, annotations=annotations, categories=categories)
