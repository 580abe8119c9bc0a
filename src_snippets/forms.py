"""The two forms that everything passes through: `CellSample` and `Instances`."""

# %% [markdown]
# ## Which forms does the data take?
# Two. `CellSample` is an image with its truth, `Instances` is the answer for one image. Letters:
# `N` instances, `B` images, `C` classes, `L` layers, `H, W` pixels. Boxes are XYXY in pixels, the
# right and lower edge outside: a cell in column 3 alone spans x from 3 to 4.

# %%
from collections.abc import Iterable, Mapping, Sequence
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
            overlap share a layer, so there are as many as cells lie on each other at most.
        labels: (N,) int64, class 1..C of id `i` at `labels[i - 1]`; -k for a crowd of class k,
            cells that nobody told apart: nothing is learned from it, and what is found in it is
            not scored.
        name: where the image lies below `train/`.
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

    def above(self, floors: Sequence[float]) -> "Instances":
        """The instances with at least the floor as score; one for all classes, or one for each."""
        return self.select(self.scores >= by_class(floors, self.labels))


def by_class(values: Sequence[float], labels: np.ndarray) -> np.ndarray:
    """(N,), for each label 1..C its value out of C, or the only one."""
    return np.asarray(values)[labels - 1 if len(values) > 1 else np.zeros_like(labels)]


# %% [markdown]
# Layers are packed once, when a folder is read: class maps that do not overlap are laid into one.
# Real fields mostly end up with a single layer, four times less to move than one a class.


# %%
def renumber(ids: np.ndarray, first: int) -> tuple[np.ndarray, int]:
    """Gives ids consecutive numbers from `first` on, in their ascending order.

    Args:
        ids: (K,) ints from 1 on.
        first: the new number of the smallest id, at least 1.

    Returns:
        The new ids (K,) int32, and how many different ones there are.
    """
    if ids.max(initial=0) > 4 * ids.size + 1000:  # a table up to the highest would be too large
        known, inverse = np.unique(ids, return_inverse=True)
        return (inverse + first).astype(np.int32), len(known)
    present = np.bincount(ids) > 0
    table = (np.cumsum(present) + first - 1).astype(np.int32)
    return table[ids], int(present.sum())


# %%
def pack_parts(parts: Iterable[tuple], size: tuple[int, int], overlaps: bool = True):
    """Packs instances into as few layers as overlaps allow.

    Args:
        parts: (places, ids, label) each: (K,) row-major pixel offsets, (K,) ints from 1 on that
            tell the part's instances apart, and their label.
        size: H, W.
        overlaps: False: a pixel belongs to the first part that claims it alone.

    Returns:
        layers (L, H, W) int16 or int32 and labels (N,) int64 as in `CellSample`.
    """
    layers, labels = [np.zeros(size[0] * size[1], np.int16)], []
    for places, ids, label in parts:
        if not overlaps:
            ours = layers[0][places] == 0
            places, ids = places[ours], ids[ours]
        numbered, count = renumber(ids, len(labels) + 1)
        labels += [label] * count
        if len(labels) >= 2**15 and layers[0].dtype == np.int16:
            layers = [layer.astype(np.int32) for layer in layers]
        home = next((layer for layer in layers if not layer[places].any()), None)
        if home is None:
            layers.append(home := np.zeros_like(layers[0]))
        home[places] = numbered
    stacked = layers[0][None] if len(layers) == 1 else np.stack(layers)
    stacked = stacked.reshape(len(layers), *size)
    return torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64)


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
    """The truth of a sample in the form of an answer, with scores of 1 and without crowds."""
    known = with_crowds(sample)
    return known.select(known.labels > 0)


# %%
def with_crowds(sample: CellSample) -> Instances:
    """The truth of a sample in the form of an answer; crowds keep their negative labels."""
    count = len(sample.labels)
    boxes, _, _ = instance_boxes(sample.layers, count)
    rles = encode_layers(sample.layers.numpy(), count)
    scores = np.ones(count, np.float32)
    return Instances(boxes.numpy(), scores, sample.labels.numpy(), rles, sample.size)


# %%
def with_categories(truth: dict, categories: Mapping[int, str]) -> dict:
    """A COCO dictionary of `coco_truth` with a dataset's own ids and names of classes 1..C."""
    ids = dict(enumerate(categories, start=1))
    rows = [row | {"category_id": ids[row["category_id"]]} for row in truth["annotations"]]
    named = [dict(id=key, name=name) for key, name in categories.items()]
    return truth | dict(annotations=rows, categories=named)


def coco_truth(samples: Sequence[CellSample], num_classes: int) -> dict:
    """The truth of samples as a COCO dictionary; image ids are 1, 2, .. in their order.

    Returns:
        `images` (id, file_name, height, width), `annotations` with RLEs, XYWH boxes and areas in
        pixels, and `categories` class1 .. classC with ids 1..C.
    """
    images, annotations = [], []
    for image_id, sample in enumerate(samples, start=1):
        height, width = sample.size
        images.append(dict(id=image_id, file_name=sample.name, height=height, width=width))
        truth = with_crowds(sample)
        columns = (truth.boxes, truth.labels, truth.rles, mask_areas(truth.rles).tolist())
        for box, label, rle, area in zip(*columns, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=abs(int(label)),
                    segmentation=rle,
                    area=area,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    iscrowd=int(label < 0),
                )
            )
    categories = [dict(id=k, name=f"class{k}") for k in range(1, num_classes + 1)]
    return dict(images=images, annotations=annotations, categories=categories)
