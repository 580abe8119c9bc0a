"""Detection: images of any size to `Instances`, by models, views and tiles together."""

# %% [markdown]
# ### Detect instances
# Boxes first, masks last, as in detectron2's `GeneralizedRCNNWithTTA`. Each model sees the image in
# each view, whole or in tiles with half overlap, so that memory does not grow with the image; a box
# cut by its tile counts only where no tile is nearer to it. Boxes of one instance are fused; their
# score is the mean over models and views (0 where one finds nothing), lower than that of one view.
# Masks of 28 x 28 are predicted in the fused boxes alone, averaged, pasted and stored as RLE.

# %%
# @title Paste masks, separate instances; views of an image and their boxes fused
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import nn, Tensor
from torchvision import ops

from src_snippets.data.rle import decode_runs, encode_layers, encode_masks, mask_areas, run_pixels
from src_snippets.data.structures import draw_by_score, instance_boxes, Instances
from src_snippets.setup.config import Config
from src_snippets.setup.devices import autocast_for, free_memory, is_out_of_memory


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> list:
    """Paste masks as N COCO RLEs at image size, None where no pixel reaches the threshold.

    masks: (N, M, M) probabilities inside the boxes; boxes: (N, 4) XYXY pixels; size: (H, W).
    Bilinear, at pixel centres inside box and image; 100,000 pixels or one mask at a time.
    """
    rles, bins = [None] * len(boxes), torch.arange(masks.shape[-1], device=boxes.device)
    limits, threshold = boxes.new_tensor(size[::-1]), max(threshold, 1e-6)  # 0: outside too
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


def without_overlaps(instances: Instances) -> Instances:
    """Give each pixel to its best detection; order stays, empty ones go."""
    numbers = draw_by_score(instances)[None]
    boxes, areas, _ = instance_boxes(torch.from_numpy(numbers), len(instances))
    rles = encode_layers(numbers, len(instances))
    return replace(instances, boxes=boxes.numpy(), rles=rles).select(areas.numpy() > 0)


def visible_instances(instances: Instances) -> Instances:
    """Instances without overlaps; one that is hidden by over half by those kept goes."""
    covered, keep = np.zeros(np.prod(instances.size), bool), np.zeros(len(instances), bool)
    for index in np.argsort(-instances.scores, kind="stable"):  # the best first
        pixels = run_pixels(*decode_runs(instances.rles[index]))
        keep[index] = 2 * covered[pixels].sum() <= len(pixels)
        covered[pixels] |= keep[index]
    return without_overlaps(instances.select(keep))


class View(NamedTuple):
    """How a model sees an image: turned by quarters to the left, then mirrored."""

    turns: int = 0
    mirrored: bool = False

    @property
    def inverse(self) -> "View":
        """The view that turns and mirrors back."""
        return self if self.mirrored else self._replace(turns=-self.turns % 4)

    def apply(self, pixels: Tensor) -> Tensor:
        """Turn and mirror images or masks (.., H, W)."""
        turned = torch.rot90(pixels, self.turns, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned

    def apply_to_boxes(self, boxes: Tensor) -> Tensor:
        """Turn and mirror boxes (N, 4), XYXY in fractions of the image's width and height."""
        x, y = boxes[:, ::2], boxes[:, 1::2]  # (N, 2), of both corners
        for _ in range(self.turns):
            x, y = y, 1 - x
        x = 1 - x if self.mirrored else x
        return torch.stack([x.amin(1), y.amin(1), x.amax(1), y.amax(1)], 1)


def fuse_boxes(parts: Sequence[Tensor], config: Config) -> Tensor:
    """Fuse detections (n, 6), XYXY, score and label, one part of each model and view; best first.

    NMS by class at IoU `fusion_iou` leaves one box of each instance; the others join the one that
    they overlap most. The fused box is their mean weighted by score, the fused score the mean over
    the parts of the best in each, 0 where there is none. Source: arXiv:1910.13302.
    """
    rows, sizes = torch.cat(parts), [len(part) for part in parts]
    min_iou = min(config.fusion_iou, 0.99)  # at 1 equal boxes would all stay
    leads = rows[ops.batched_nms(rows[:, :4], rows[:, 4], rows[:, 5], min_iou)]
    if len(leads) == 0:
        return leads
    groups = []  # the lead that each box joins
    for some in rows.split(256):  # bounds the memory
        overlaps = ops.box_iou(some[:, :4], leads[:, :4]) * (some[:, 5:] == leads[:, 5])
        groups.append(overlaps.argmax(1))
    groups, weights = torch.cat(groups), rows[:, 4:5].clamp(min=1e-6)  # a score may be 0
    weighted = torch.cat([rows[:, :4] * weights, weights], 1)
    boxes = torch.zeros_like(leads[:, :5]).index_add(0, groups, weighted)
    zeros, pairs = boxes[:, 4] * 0, zip(groups.split(sizes), parts, strict=True)
    best = torch.stack([zeros.scatter_reduce(0, own, part[:, 4], "amax") for own, part in pairs])
    fused = torch.column_stack([boxes[:, :4] / boxes[:, 4:], best.mean(0), leads[:, 5]])
    return fused[fused[:, 4].argsort(descending=True, stable=True)][: config.detections]


# %%
# @title detect: boxes of all models, views and tiles, then masks of those that stay
LOW_SCORE = 0.05  # validation keeps scores from here on, or from a lower setting on
TILE_BATCH = 4  # tiles at a time
KEPT_FEATURES = 2**30  # bytes of features that masks take from the boxes; others are recomputed
MIN_TILE = 128  # px; smaller tiles would cut too many instances


def tile_corners(length: int, tile: int) -> list[int]:
    """List where tiles begin along a side, evenly, overlapping by half or more; tile=0: one."""
    count = -(-2 * (length - tile) // tile) + 1 if 0 < tile < length else 1
    return np.linspace(0, length - tile if count > 1 else 0, count).round().astype(int).tolist()


@torch.inference_mode()
def detect_tiles(models, image: Tensor, config: Config, views, tile: int, batch: int) -> Instances:
    """`detect` with tiles of side `tile`, `batch` of them at a time."""
    size, device = tuple(image.shape[-2:]), next(models[0].parameters()).device
    tall, wide = (min(length, tile) for length in size)
    corners = [(x, y) for y in tile_corners(size[0], tile) for x in tile_corners(size[1], tile)]
    origins = torch.tensor(corners, device=device).float().repeat(1, 2)  # (T, 4)
    sides = origins.new_tensor([wide, tall]).repeat(2)
    parts = torch.arange(len(corners)).split(batch)
    passes, cached, bytes_left = list(product(models, views, parts)), {}, KEPT_FEATURES

    def extract(model, view, part):
        """`ImageList` of tiles in a view, their sides (4,) in network pixels, FPN features."""
        tiles = [image[:, y : y + tall, x : x + wide] for x, y in (corners[k] for k in part)]
        images, _ = model.transform([view.apply(pixels.to(device)) for pixels in tiles])
        extent = origins.new_tensor(images.image_sizes[0][::-1]).repeat(2)
        return images, extent, model.backbone(images.tensors)

    def nearest_tile(boxes):
        """(N,) int64: the tile whose middle is nearest to the middle of each box."""
        middles = (origins + sides / 2)[:, :2]
        return torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, middles, p=1).argmin(1)

    rows, by_view = [], []
    with autocast_for(config, device):
        for step, (model, view, part) in enumerate(passes):
            features = None  # frees those of the tiles before
            images, extent, features = extract(model, view, part)
            bytes_left -= sum(level.nbytes for level in features.values())
            if bytes_left >= 0 or len(passes) == 1:
                cached[step] = images, extent, features
            proposals, _ = model.rpn(images, features)
            heads, sizes = model.roi_heads, images.image_sizes
            outputs = heads.predict_boxes(features, proposals, sizes)
            columns = heads.postprocess_detections(*outputs, proposals, sizes)
            for k, boxes, scores, labels in zip(part, *columns, strict=True):
                boxes = view.inverse.apply_to_boxes(boxes / extent) * sides
                is_whole = ((boxes >= 1) & (boxes <= sides - 1)).all(1)  # touches no edge
                boxes = boxes + origins[k]
                keep = is_whole | (nearest_tile(boxes) == k)
                rows.append(torch.column_stack([boxes, scores, labels])[keep])
        for k in range(0, len(rows), len(corners)):  # by model and view
            merged = torch.cat(rows[k : k + len(corners)])  # (n, 6)
            if len(corners) > 1:  # NMS removes the duplicates of overlapping tiles
                keep = ops.batched_nms(merged[:, :4], merged[:, 4], merged[:, 5], config.fusion_iou)
                merged = merged[keep[: config.detections]]
            by_view.append(merged)
        fused = fuse_boxes(by_view, config) if len(by_view) > 1 else by_view[0]
        fused = fused[fused[:, 4] >= config.score_threshold]
        boxes = ops.clip_boxes_to_image(fused[:, :4], size)  # means may be rounded to outside
        scores, labels = fused[:, 4], fused[:, 5].long()
        masks, tile_of = boxes.new_zeros(len(boxes), 28, 28), nearest_tile(boxes)
        for step, (model, view, part) in enumerate(passes):
            features = None
            images, extent, features = cached.pop(step, None) or extract(model, view, part)
            indices = [torch.where(tile_of == k)[0] for k in part]
            rois = view.apply_to_boxes((boxes - origins[tile_of]) / sides) * extent
            inputs = [rois[i] for i in indices], [labels[i] for i in indices]  # by tile
            probs = model.roi_heads.detect_masks(features, *inputs, images.image_sizes)
            masks[torch.cat(indices)] += view.inverse.apply(torch.cat(probs)[:, 0]) / len(by_view)
    rles = paste_masks(masks, boxes, size, config.mask_threshold)
    every = Instances(*(values.cpu().numpy() for values in (boxes, scores, labels)), rles, size)
    return every.select([rle is not None for rle in rles])


def detect(models: Sequence[nn.Module], image: Tensor, config: Config, views=None) -> Instances:
    """Detect the instances of an image (3, H, W) uint8 by all models in all `views`, best first.

    Where memory is full, smaller batches, then smaller tiles are used, for later images too; it
    raises the error where one tile of `MIN_TILE` px is too much.
    """
    limits, longest = models[0].transform.memory_limits, max(image.shape[-2:])
    for heads in (model.eval().roi_heads for model in models):
        heads.score_thresh = min(config.score_threshold, LOW_SCORE)  # fused ones are compared later
        heads.nms_thresh, heads.detections_per_img = config.box_nms, config.detections
    while True:
        tile, batch = limits.get(config.tile, (config.tile or longest, TILE_BATCH))
        try:
            return detect_tiles(models, image, config, views or [View()], tile, batch)
        except Exception as error:
            if not is_out_of_memory(error) or (tile <= MIN_TILE and batch == 1):
                raise
        free_memory()  # not in the handler, which still holds the tensors that did not fit
        if tile < longest and batch > 1:
            batch //= 2
        else:
            tile, batch = max(min(tile, longest) // 2, MIN_TILE), 1
        limits[config.tile] = tile, batch
        print(f"Memory is full: from now on {batch} tile(s) of {tile} px at a time.")
