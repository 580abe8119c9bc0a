"""The two data structures that everything passes through: `CellSample` and `Instances`."""

# %%
# @title CellSample, Instances, and layers that hold instances
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage
import torch
from torch import Tensor

from src_snippets.data.rle import draw_masks, encode_layers, mask_areas


@dataclass(frozen=True)
class CellSample:
    """One image and its ground truth; instances that do not overlap share a layer."""

    image: Tensor  # (3, H, W) uint8, RGB
    layers: Tensor  # (L, H, W) int16 (int32 from N = 32,768 on): ids 1..N, 0 = background; L >= 1
    labels: Tensor  # (N,) int64, class 1..C of id i at labels[i - 1]; -k: a crowd of class k
    name: str = ""  # path of the image, below its part or the dataset
    left_out: Mapping[str, int] = field(default_factory=dict)  # instances in its files, by reason
    path: Path | None = None  # of the image, where it is one of a file

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.image.shape[-2:])


@dataclass(frozen=True, repr=False)
class Instances:
    """The prediction for one image, best first, or its ground truth with scores of 1."""

    boxes: np.ndarray  # (N, 4) float32, XYXY pixels, inside the image
    scores: np.ndarray  # (N,) float32, 0..1
    labels: np.ndarray  # (N,) int64, 1..C; -k: a crowd of class k
    rles: Sequence[dict]  # N COCO RLEs at image size
    size: tuple[int, int]  # height and width of the image in pixels

    def __len__(self):
        return len(self.rles)

    def __repr__(self):
        high, (height, width) = (self.scores >= 0.5).sum(), self.size
        return f"Instances({len(self)} detections, {high} with score >= 0.5, {height} x {width} px)"

    def select(self, index) -> "Instances":
        """The instances at `index`, (N,) bool, (K,) ints or a slice, in that order."""
        index = np.arange(len(self))[index]
        rles = [self.rles[i] for i in index]
        return Instances(self.boxes[index], self.scores[index], self.labels[index], rles, self.size)

    def above(self, threshold: float) -> "Instances":
        return self.select(self.scores >= threshold)


def pack_layers(parts: Iterable[tuple], size: tuple[int, int], overlaps: bool = True):
    """Pack instances into as few layers as overlaps allow; (layers, labels) of a `CellSample`.

    parts: (pixels, ids, label) each: (K,) row-major offsets, (K,) ints that tell instances apart,
    their label; size: H, W. Without `overlaps` a pixel belongs to the first part that claims it.
    """
    layers, labels = [np.zeros(size[0] * size[1], np.int32)], []
    for pixels, ids, label in parts:
        if not overlaps:
            free = layers[0][pixels] == 0
            pixels, ids = pixels[free], ids[free]
        unique, ids = np.unique(ids, return_inverse=True)
        layer = next((layer for layer in layers if not layer[pixels].any()), None)
        if layer is None:
            layers.append(layer := np.zeros_like(layers[0]))
        layer[pixels] = ids + len(labels) + 1
        labels += [label] * len(unique)
    dtype = np.int16 if len(labels) < 2**15 else np.int32
    stacked = np.stack(layers).astype(dtype).reshape(-1, *size)
    return torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64)


def instance_boxes(layers: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tight boxes (N, 4) float32 XYXY pixels, areas (N,) int64 pixels and layer_index (N,) int64.

    layers: (L, H, W) ints; count: N. An id that does not occur has area 0 and a box of zeros.
    """
    boxes, areas = np.zeros((count, 4), np.float32), np.zeros(count + 1, np.int64)
    layer_index = np.zeros(count, np.int64)
    for index, layer in enumerate(layers.numpy()):
        areas += np.bincount(layer.ravel(), minlength=count + 1)
        for i, region in enumerate(ndimage.find_objects(layer, max_label=count)):
            if region is not None:
                rows, columns = region
                boxes[i] = columns.start, rows.start, columns.stop, rows.stop
                layer_index[i] = index
    return torch.from_numpy(boxes), torch.from_numpy(areas[1:]), torch.from_numpy(layer_index)


def ground_truth(sample: CellSample, crowds: bool = False) -> Instances:
    """The ground truth of a sample; crowds too (with their negative labels) where `crowds`."""
    count, labels = len(sample.labels), sample.labels.numpy()
    boxes, _, _ = instance_boxes(sample.layers, count)
    rles = encode_layers(sample.layers.numpy(), count)
    every = Instances(boxes.numpy(), np.ones(count, np.float32), labels, rles, sample.size)
    return every if crowds else every.select(labels > 0)


def draw_by_score(instances: Instances) -> np.ndarray:
    """(H, W) int32: index + 1 of the best detection at each pixel, the first of equals; 0: none."""
    order = np.argsort(-instances.scores, kind="stable")[::-1]  # the best is drawn last
    return draw_masks([instances.rles[i] for i in order], order + 1, *instances.size)


def coco_annotations(instances: Mapping[int, Instances], category_ids: Iterable[int]) -> list[dict]:
    """Instances by image id as COCO annotations, which with `score` are results too.

    category_ids: of the classes 1..C; another label has None. Boxes are XYWH in pixels.
    """
    rows, ids = [], dict(enumerate(category_ids, start=1))
    for image_id, own in sorted(instances.items()):
        boxes = own.boxes.astype(float)
        boxes[:, 2:] -= boxes[:, :2]
        columns = [v.tolist() for v in (own.labels, own.scores, boxes, mask_areas(own.rles))]
        for label, score, box, area, rle in zip(*columns, own.rles, strict=True):
            row = dict(id=len(rows) + 1, image_id=image_id, category_id=ids.get(abs(label)))
            row |= dict(segmentation=rle, area=area, bbox=box, iscrowd=int(label < 0), score=score)
            rows.append(row)
    return rows


def coco_dataset(instances, images: Iterable[tuple], categories: Mapping[int, str]) -> dict:
    """A COCO dataset of `Instances` by image id; images: (file name, id, height, width) each."""
    keys = ("file_name", "id", "height", "width")
    kinds = [dict(id=key, name=name) for key, name in categories.items()]
    records = [dict(zip(keys, image, strict=True)) for image in images]
    annotations = coco_annotations(instances, categories)
    return dict(images=records, annotations=annotations, categories=kinds)


def coco_ground_truth(samples: Sequence[CellSample], categories: Mapping[int, str]) -> dict:
    """The ground truth of samples as a `coco_dataset`; image ids are 1, 2, .. in their order."""
    images = [(sample.name, key, *sample.size) for key, sample in enumerate(samples, start=1)]
    truths = {key: ground_truth(sample, crowds=True) for key, sample in enumerate(samples, start=1)}
    return coco_dataset(truths, images, categories)
