"""Detection: images of any size to `Instances`, tile by tile."""

# %% [markdown]
# ### Detect instances
# The model sees an image whole or in tiles with half overlap, so that memory does not grow with
# the image. Boxes and 28 x 28 masks are carried back to the image, pasted at pixel centres and
# stored as RLEs on the spot. An instance that a tile's edge cuts gives way to one of another tile
# that holds it; the trap: an edge that is the border of the image itself is no cut.

# %%
# @title Paste masks, group the detections of one instance
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pycocotools.mask
import torch
from torch import nn, Tensor

from src_snippets.data.rle import draw_masks, encode_layers, encode_masks, mask_areas
from src_snippets.data.structures import instance_boxes, Instances
from src_snippets.setup.config import Config
from src_snippets.setup.devices import autocast_for, free_memory, is_out_of_memory


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> list:
    """Paste masks as N COCO RLEs at image size, None where no pixel reaches the threshold.

    masks: (N, M, M) probabilities inside the boxes; boxes: (N, 4) XYXY pixels; size: (H, W).
    Bilinear, at pixel centres inside box and image; 100,000 pixels or one mask at a time.
    """
    rles, bins = [None] * len(boxes), torch.arange(masks.shape[-1], device=boxes.device)
    limits, threshold = boxes.new_tensor(size[::-1]), max(threshold, 1e-6)  # 0 is outside
    spans = (boxes[:, 2:] - boxes[:, :2]).clamp(0, max(size)).ceil().long().cpu() + 1
    order = spans.amax(1).argsort(descending=True)
    while len(order):
        side = int(spans[order[0]].max())
        part, order = order.tensor_split([max(100_000 // side**2, 1)])  # crops of similar sizes
        low, high = boxes[part, None].float().split(2, dim=2)
        first = (low - 0.5).ceil().clamp(min=0)
        centers = first + torch.arange(side, device=boxes.device)[:, None] + 0.5  # (n, side, 2)
        place = (centers - low) / (high - low).clamp(min=1e-6) * len(bins) - 0.5
        weights = 1 - (place.clamp(0, len(bins) - 1)[..., None] - bins).abs()
        weights = weights.clamp(min=0) * ((centers < high) & (centers < limits))[..., None]
        crops = weights[:, :, 1] @ masks[part].float() @ weights[:, :, 0].mT >= threshold
        lefts, tops = first[:, 0].long().cpu().numpy().T
        encoded = encode_masks(crops.cpu().numpy(), tops, lefts, *size)
        for index, rle, area in zip(part.tolist(), encoded, mask_areas(encoded), strict=True):
            rles[index] = rle if area else None
    return rles


def concatenate(parts: list[Instances]) -> tuple[Instances, np.ndarray]:
    """Concatenate predictions of one image; return owners (N,) int64: the part that each is of."""
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    names = ("boxes", "scores", "labels")
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
    return Instances(*arrays, [rle for part in parts for rle in part.rles], parts[0].size), owners


def greedy_groups(every: Instances, owners: np.ndarray, min_iou: float, cut=None, rows: int = 256):
    """Yield indices of the detections of one instance; the first of them stands for it.

    A detection takes those after it of its class with mask IoU > `min_iou`: the first of each
    other owner. With `cut` (N,) bool it takes all of them, and cut ones that lie in it by over
    half. `rows` masks are compared with all after them at a time: 16 * rows * N bytes.
    """
    free = np.ones(len(every), bool)
    for begin in range(0, len(every), rows):
        rest, leads = every.rles[begin:], every.rles[begin : begin + rows]
        joined = pycocotools.mask.iou(rest, leads, [0] * len(leads)) > min_iou
        joined &= every.labels[begin:, None] == every.labels[begin : begin + rows]
        if cut is not None:  # for a crowd the overlap counts by the area of the other mask alone
            inside = pycocotools.mask.iou(rest, leads, [1] * len(leads)) > 0.5
            joined |= inside & cut[begin:, None]
        joined &= owners[begin:, None] != owners[begin : begin + rows]
        for lead, column in enumerate(joined.T, start=begin):
            if free[lead]:
                others = begin + np.flatnonzero(column & free[begin:])
                if cut is None:
                    others = others[np.unique(owners[others], return_index=True)[1]]
                free[lead], free[others] = False, False
                yield [lead, *others.tolist()]


def without_overlaps(instances: Instances) -> Instances:
    """Give each pixel to its best detection, the first of equals; order stays, empty ones go."""
    order = np.argsort(-instances.scores, kind="stable")[::-1]  # the best is drawn last
    drawn = draw_masks([instances.rles[i] for i in order], order + 1, *instances.size)[None]
    boxes, areas, _ = instance_boxes(torch.from_numpy(drawn), len(instances))
    rles = encode_layers(drawn, len(instances))
    return replace(instances, boxes=boxes.numpy(), rles=rles).select(areas.numpy() > 0)


# %%
# @title detect: one image, in tiles that fit into memory
TILE_BATCH = 4  # tiles at a time
MIN_TILE = 128  # px; smaller tiles would cut too many instances


class View(NamedTuple):
    """How the model sees an image: scaled, turned by quarters to the left, then mirrored."""

    scale: float = 1.0
    turns: int = 0
    mirrored: bool = False

    def apply(self, image: Tensor) -> Tensor:
        """Turn and mirror (3, H, W); `detect` scales."""
        turned = torch.rot90(image, self.turns, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned

    def undo(self, boxes: Tensor, masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Carry boxes (N, 4) and masks (N, M, M) of a view of `size` (H, W) back to the image."""
        x, y = boxes[:, ::2], boxes[:, 1::2]  # (N, 2), of both corners
        if self.mirrored:
            x, masks = size[1] - x, masks.flip(-1)
        for turn in range(self.turns):
            x, y = size[turn % 2] - y, x
        boxes = torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)
        return boxes, torch.rot90(masks, -self.turns, (-2, -1))


def tile_corners(length: int, tile: int) -> list[int]:
    """List where tiles begin along a side, evenly, overlapping by half or more; tile=0: one."""
    count = -(-2 * (length - tile) // tile) + 1 if 0 < tile < length else 1
    return np.linspace(0, length - tile if count > 1 else 0, count).round().astype(int).tolist()


def join_tiles(pieces: list[Instances], cut: list[np.ndarray], config: Config) -> Instances:
    """Join the detections of tiles, at image size; cut: (N,) bool each, cut by the tile's edge.

    A cut one gives way to one of another tile that holds over half of it, the largest of cut
    ones first; of whole ones that overlap (class, IoU > `fusion_iou`) the better stays.
    """
    (every, owners), cut = concatenate(pieces), np.concatenate(cut)
    order = np.lexsort((np.where(cut, -mask_areas(every.rles), -every.scores), cut))
    groups = greedy_groups(every.select(order), owners[order], config.fusion_iou, cut[order])
    best = every.select(order[[group[0] for group in groups]])
    return best.select(np.argsort(-best.scores, kind="stable")[: config.detections])


@torch.inference_mode()
def detect_tiles(model: nn.Module, image: Tensor, config: Config, view: View, tile, batch):
    """`detect` with tiles of side `tile`, `batch` of them at a time."""
    heads, device = model.eval().roi_heads, next(model.parameters()).device
    heads.score_thresh, heads.nms_thresh = config.score_threshold, config.box_nms
    heads.detections_per_img = config.detections
    size, pieces, cut = tuple(image.shape[-2:]), [], []
    tall, wide = (min(length, tile) for length in size)
    corners = [(y, x) for y in tile_corners(size[0], tile) for x in tile_corners(size[1], tile)]
    model.transform.fixed_scale = config.scale * view.scale
    for begin in range(0, len(corners), batch):
        part = corners[begin : begin + batch]
        tiles = [view.apply(image[:, y : y + tall, x : x + wide].to(device)) for y, x in part]
        with autocast_for(config, device):
            results = model(tiles)
        for (y, x), pixels, found in zip(part, tiles, results, strict=True):
            boxes, masks = view.undo(found["boxes"], found["masks"][:, 0], pixels.shape[-2:])
            boxes = boxes + boxes.new_tensor([x, y, x, y])
            rles = paste_masks(masks, boxes, size, config.mask_threshold)
            arrays = (v.cpu().numpy() for v in (boxes, found["scores"], found["labels"]))
            pieces.append(Instances(*arrays, rles, size).select([rle is not None for rle in rles]))
            edges = np.abs(pieces[-1].boxes - [x, y, x + wide, y + tall])  # 1 px: touches it
            inner = [x > 0, y > 0, x + wide < size[1], y + tall < size[0]]
            cut.append(((edges < 1) & inner).any(1))
    return join_tiles(pieces, cut, config) if len(pieces) > 1 else pieces[0]


def detect(model: nn.Module, image: Tensor, config: Config, view: View | None = None) -> Instances:
    """Detect the instances of an image (3, H, W) uint8 in one view, best first.

    Where memory is full, smaller batches, then smaller tiles are used, for later images too; it
    raises torch.OutOfMemoryError where one tile of `MIN_TILE` px is too much.
    """
    limits, longest = model.__dict__.setdefault("memory_limits", {}), max(image.shape[-2:])
    while True:
        tile, batch = limits.get(config.tile, (config.tile or longest, TILE_BATCH))
        try:
            return detect_tiles(model, image, config, view or View(), tile, batch)
        except Exception as error:
            if not is_out_of_memory(error) or (tile <= MIN_TILE and batch == 1):
                raise
        finally:
            model.transform.fixed_scale = None
        free_memory()  # not in the handler, which still holds the tensors that did not fit
        if tile < longest and batch > 1:
            batch //= 2
        else:
            tile, batch = max(min(tile, longest) // 2, MIN_TILE), 1
        limits[config.tile] = tile, batch
        print(f"Memory is full: from now on {batch} tile(s) of {tile} px at a time.")
