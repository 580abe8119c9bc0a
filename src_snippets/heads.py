"""Proposals and heads of Mask R-CNN that read instance maps; memory does not grow with cells."""

# %% [markdown]
# ## What is different from torchvision's Mask R-CNN?
# The parts and their names are torchvision's (`maskrcnn_resnet50_fpn_v2`), so its weights load. The
# mask head, though, learns from the instance map at the sampled boxes, and cells are matched block
# by block. No array of `N` image-size masks is ever made.

# %%
import math

import torch
from torch import nn, Tensor
import torch.nn.functional as F
from torchvision.models.detection._utils import (
    BalancedPositiveNegativeSampler,
    BoxCoder,
    Matcher,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_inference, RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_area, clip_boxes_to_image, MultiScaleRoIAlign, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format
from torchvision.ops.poolers import initLevelMapper

from src_snippets.backbones import trunk_strides
from src_snippets.config import Config

# %% [markdown]
# Mask targets: RoIAlign (arXiv:1703.06870) of "pixel belongs to this cell" is a product of three
# small matrices, rows x crop x columns. Only the crop under each box is looked at.


# %%
def axis_weights(
    low: Tensor, high: Tensor, bins: int, span: int, limit: int, half_pixel: bool, each: int = 0
):
    """RoIAlign's bilinear weights along one axis.

    Args:
        low, high: (R,) float32, the boxes' edges in pixels.
        bins: M, the number of output bins.
        span: pixels looked at from the box's first on; at least its length + 3.
        limit: H or W.
        half_pixel: pixel `p` has its centre at `p + 0.5`; else at `p`, as in torchvision.
        each: samples of a bin; 0: one a pixel, at least one.

    Returns:
        weights (R, bins, span) float32 and the pixels they belong to, (R, span) int64.

    Source: `roi_align` of torchvision with `sampling_ratio=each or -1`, `aligned=half_pixel`; boxes
    shorter than a pixel count as one pixel long.
    """
    start = (low - 0.5 if half_pixel else low)[:, None, None]
    length = (high - low).clamp(min=1)[:, None, None]
    samples = torch.full_like(length, each) if each else torch.ceil(length / bins)
    step = torch.arange(each or -(-span // bins), device=low.device)
    bin_start = start + torch.arange(bins, device=low.device)[:, None] * (length / bins)
    place = bin_start + (step + 0.5) * (length / bins) / samples  # (R, bins, steps)
    inside = (step < samples) & (place >= -1) & (place <= limit)
    place = place.clamp(0, limit - 1)
    below = place.floor()
    first = start.floor().clamp(0, limit - 1)
    index = (below - first).long().clamp(0, span - 2)
    share = inside / samples
    weights = place.new_zeros((len(low), bins, span))
    weights.scatter_add_(2, index, (1 - (place - below)) * share)
    weights.scatter_add_(2, index + 1, (place - below) * share)
    pixels = first[:, :, 0].long() + torch.arange(span, device=low.device)
    return weights, pixels.clamp(max=limit - 1)


# %%
def similar_chunks(spans: Tensor, limit: int):
    """Groups boxes of like size, so that crops of one size waste little.

    Args:
        spans: (R, 2) int64, rows and columns to look at.
        limit: most crop pixels of a group of more than one box.

    Yields:
        Indices (K,) int64 of a group, the most rows and the most columns in it.
    """
    order = spans.amax(1).argsort()
    sizes, begin = spans[order].tolist(), 0
    while begin < len(sizes):
        end, (rows, columns) = begin + 1, sizes[begin]
        for height, width in sizes[end:]:
            most = max(rows, height), max(columns, width)
            if (end + 1 - begin) * most[0] * most[1] > limit:
                break
            end, (rows, columns) = end + 1, most
        yield order[begin:end], rows, columns
        begin = end


# %%
@torch.no_grad()
def mask_targets(target: dict, boxes: Tensor, matched: Tensor, size: int, half_pixel: bool):
    """What the mask head should answer at some boxes.

    Args:
        target: as from `training_target`.
        boxes: (R, 4) float32 XYXY in pixels of the instance map.
        matched: (R,) int64, the instance each box belongs to, an index into `target["ids"]`.
        size: M, side of the answer.
        half_pixel: see `axis_weights`.

    Returns:
        (R, M, M) float32, 0..1. Memory is bounded by 1e6 crop pixels at a time, or one crop.
    """
    layers, ids, homes = target["layers"], target["ids"][matched], target["homes"][matched]
    height, width = layers.shape[-2:]
    spans = (boxes[:, [3, 2]] - boxes[:, [1, 0]]).clamp(min=1).ceil().long() + 3
    answer = boxes.new_zeros((len(boxes), size, size), dtype=torch.float32)
    for part, tall, wide in similar_chunks(spans, 1_000_000):
        x1, y1, x2, y2 = boxes[part].float().unbind(1)
        rows, y = axis_weights(y1, y2, size, tall, height, half_pixel)
        columns, x = axis_weights(x1, x2, size, wide, width, half_pixel)
        crops = layers[homes[part, None, None], y[:, :, None], x[:, None, :]]
        crops = (crops == ids[part, None, None]).float()
        with torch.autocast(boxes.device.type, enabled=False):
            answer[part] = rows @ crops @ columns.transpose(1, 2)
    return answer


# %%
def batch_targets(targets, boxes, matched, image_shapes, size: int, half_pixel: bool) -> Tensor:
    """`mask_targets` of a batch, joined; boxes are in pixels of images of `image_shapes`."""
    parts = []
    for target, box, match, shape in zip(targets, boxes, matched, image_shapes, strict=True):
        own = resize_boxes(box, shape, target["layers"].shape[-2:])  # network -> map pixels
        parts.append(mask_targets(target, own, match, size, half_pixel))
    return torch.cat(parts)


# %% [markdown]
# Under mixed precision, anchors are made and boxes decoded in float32. In bfloat16 neighbouring
# numbers near 512 lie 4 apart: rounding would move an anchor by up to 2 pixels, a quarter of the
# smallest one.


# %%
class Float32Anchors(AnchorGenerator):
    """Anchors in float32, whatever the features' type."""

    def forward(self, image_list, feature_maps):
        shapes = [m.new_empty((1, 1, *m.shape[-2:]), dtype=torch.float32) for m in feature_maps]
        return super().forward(image_list, shapes)


class Float32RPNHead(RPNHead):
    """Objectness and box offsets in float32, whatever the features' type."""

    def forward(self, x):
        logits, offsets = super().forward(x)
        return [v.float() for v in logits], [v.float() for v in offsets]


# %% [markdown]
# Anchors are matched to cells block by block, and only with the cells that a block touches: a table
# of all overlaps, cells x anchors, would reach gigabytes on a dense field, nearly all of it zeros.


# %%
def paired_iou(cells: Tensor, anchors: Tensor) -> Tensor:
    """(N, A) float32: torchvision's `box_iou` to the bit, with a third of its temporaries."""
    later, earlier = torch.maximum, torch.minimum
    width = earlier(cells[:, None, 2], anchors[:, 2]).sub_(later(cells[:, None, 0], anchors[:, 0]))
    height = earlier(cells[:, None, 3], anchors[:, 3]).sub_(later(cells[:, None, 1], anchors[:, 1]))
    shared = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = torch.add(box_area(cells)[:, None], box_area(anchors), out=height).sub_(shared)
    return shared.div_(union)


def touching_blocks(cells: Tensor, anchors: Tensor, size: int, limit: int = 1_000_000):
    """Yields (slice of `anchors`, indices of the `cells` that may overlap them), ascending.

    Neighbours in `anchors` are neighbours in the image, so few cells touch a block of `size`.

    Args:
        limit: most pairs in one block, where it has more than one anchor.
    """
    wanted = -(-len(anchors) // size) * size
    padded = torch.cat([anchors, anchors[-1:].expand(wanted - len(anchors), 4)]).view(-1, size, 4)
    low, high = padded[..., :2].amin(1), padded[..., 2:].amax(1)
    touches = (cells[:, :2] < high[:, None]) & (cells[:, 2:] > low[:, None])  # blocks, cells, 2
    block, cell = touches.all(-1).nonzero(as_tuple=True)
    for begin, near in zip(
        range(0, wanted, size),
        cell.split(block.bincount(minlength=len(low)).tolist()),
        strict=True,
    ):
        step = min(max(limit // max(len(near), 1), 1), size)
        for start in range(begin, min(begin + size, len(anchors)), step):
            yield slice(start, min(start + step, begin + size, len(anchors))), near


# %%
class BlockMatcher(Matcher):
    """torchvision's `Matcher`, given boxes in place of their table of IoUs.

    Results are equal, but for a cell that overlaps no anchor at all: torchvision then matches every
    anchor that does not touch it, here it has none.
    """

    def __call__(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Matches (N, 4) cells and (A, 4) anchors, N >= 1.

        Returns:
            (A,) int64: the cell of each anchor, -1 below the low threshold, -2 between the two.
        """
        cells, anchors = pair
        values, highest = cells.new_zeros(len(anchors)), cells.new_zeros(len(cells))
        nearest = torch.zeros_like(values, dtype=torch.int64)
        size = 2048 if anchors.device.type == "cpu" else 16_384  # cache, or fewer launches
        blocks = [pair for pair in touching_blocks(cells, anchors, size) if len(pair[1])]
        for part, near in blocks:
            overlaps = paired_iou(cells[near], anchors[part])
            values[part], index = overlaps.max(dim=0)
            nearest[part] = near[index]
            highest[near] = torch.maximum(highest[near], overlaps.amax(dim=1))
        matches = nearest.clone()
        matches[values < self.low_threshold] = self.BELOW_LOW_THRESHOLD
        between = (values >= self.low_threshold) & (values < self.high_threshold)
        matches[between] = self.BETWEEN_THRESHOLDS
        # If wanted, the best anchors of each cell are matched however little they overlap.
        for part, near in blocks if self.allow_low_quality_matches else []:
            overlaps = paired_iou(cells[near], anchors[part])
            is_best = ((overlaps == highest[near, None]) & (overlaps > 0)).any(dim=0)
            matches[part] = torch.where(is_best, nearest[part], matches[part])
        return matches


# %%
def within_crowds(boxes: Tensor, crowds: Tensor, share: float = 0.5) -> Tensor:
    """(R,) bool: which of (R, 4) boxes have over `share` of their area in one of (K, 4) crowds."""
    inside = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for crowd in crowds:
        low, high = torch.maximum(boxes[:, :2], crowd[:2]), torch.minimum(boxes[:, 2:], crowd[2:])
        inside |= (high - low).clamp(min=0).prod(1) > share * box_area(boxes)
    return inside


class CountingSampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of what losses are of; `drawn` is how many of the last batch."""

    drawn = 0

    def __call__(self, matched_idxs):
        chosen = super().__call__(matched_idxs)
        self.drawn = sum(mask.sum() for masks in chosen for mask in masks)
        return chosen


class CrowdProposals(RegionProposalNetwork):
    """torchvision's proposals; anchors in a crowd that are no cell's are no background either."""

    crowded = False

    def assign_targets_to_anchors(self, anchors, targets):
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        crowds = [target.get("crowds", ()) for target in targets]
        self.crowded = any(map(len, crowds))
        for own, places, some in zip(labels, anchors, crowds, strict=True):
            if len(some):
                own[(own == 0) & within_crowds(places, some)] = -1
        return labels, boxes

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        if self.crowded and not any((own >= 0).any() for own in labels):
            self.fg_bg_sampler.drawn = 0
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0  # nothing but crowds
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)


# %%
class BoundedRoIHeads(RoIHeads):
    """torchvision's RoI heads with memory that does not grow with cells or detections."""

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels, matcher=None):
        """The cell (R,) and class (R,) int64 of each proposal, 0 where there is none, by image.

        The class is -1, which nothing is learned from, where there is none in a crowd.
        """
        matched, labels = [], []
        matcher = matcher or self.proposal_matcher
        sides = zip(proposals, gt_boxes, gt_labels, self.crowds, strict=True)
        for boxes, cells, classes, crowds in sides:
            found = torch.full((len(boxes),), -1, device=boxes.device)
            if len(cells):
                found = matcher((cells, boxes))
            matched.append(found.clamp(min=0))
            padded = torch.cat([classes, classes.new_zeros(1)])  # found is -1 below the threshold
            own = padded[found]
            labels.append(own.masked_fill((own == 0) & within_crowds(boxes, crowds), -1))
        return matched, labels

    def predict_boxes(self, features, proposals, image_shapes):
        """Class logits (R, C + 1) and box offsets (R, 4C + 4), float32."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        return logits.float(), offsets.float()

    def predict_masks(self, features, boxes, image_shapes):
        """Mask logits (R, C + 1, M, M), float32."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

    def draw_masks(self, features, boxes, labels, image_shapes, size=200):
        """Mask probabilities (R, 1, M, M) of each image, at most `size` boxes of each at a time."""
        parts = []
        for begin in range(0, max(map(len, boxes)), size) or [0]:
            some, classes = ([v[begin : begin + size] for v in side] for side in (boxes, labels))
            logits = self.predict_masks(features, some, image_shapes)
            own = [label.clamp(max=logits.shape[1] - 1) for label in classes]  # see mask_loss
            parts.append(maskrcnn_inference(logits, own))
        return [torch.cat(part) for part in zip(*parts, strict=True)]


# %%
class InstanceMapRoIHeads(BoundedRoIHeads):
    """torchvision's RoI heads with mask targets from instance maps.

    Targets are those of `training_target`; boxes are in network pixels, `layers` may have another
    resolution. The state dict is that of `RoIHeads`.
    """

    half_pixel = True

    def check_targets(self, targets):
        for target in targets or [{}]:
            if not {"boxes", "labels", "layers", "ids", "homes", "crowds"} <= set(target):
                raise ValueError(f"Target with {sorted(target)}: expected that of training_target.")

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        answers = self.find_boxes(features, proposals, image_shapes)
        parts = self.postprocess_detections(*answers, image_shapes)
        parts = (*parts, self.draw_masks(features, parts[0], parts[2], image_shapes))
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)], {}

    def find_boxes(self, features, proposals, image_shapes):
        """Class logits (R, C + 1), offsets (R, 4C + 4), and the boxes by image that they move."""
        return *self.predict_boxes(features, proposals, image_shapes), proposals

    def box_losses(self, features, sampled, image_shapes, targets):
        """The losses of classes and of boxes; `sampled` is from `select_training_samples`."""
        proposals, _, labels, wanted = sampled
        logits, offsets = self.predict_boxes(features, proposals, image_shapes)
        if len(logits) == 0:  # nothing but crowds
            return logits.sum() * 0, offsets.sum() * 0
        return fastrcnn_loss(logits, offsets, labels, wanted)

    def losses(self, features, proposals, image_shapes, targets):
        """The losses of classes, boxes and masks, each a float32 scalar."""
        self.check_targets(targets)
        self.crowds = [target["crowds"] for target in targets]
        sampled = self.select_training_samples(proposals, targets)
        loss_classifier, loss_box = self.box_losses(features, sampled, image_shapes, targets)
        proposals, matched, labels, _ = sampled
        cells = [torch.where(label > 0)[0] for label in labels]
        boxes = [p[c] for p, c in zip(proposals, cells, strict=True)]
        matched = [m[c] for m, c in zip(matched, cells, strict=True)]
        logits = self.predict_masks(features, boxes, image_shapes)
        labels = torch.cat([label[c] for label, c in zip(labels, cells, strict=True)])
        size = logits.shape[-1]
        wanted = batch_targets(targets, boxes, matched, image_shapes, size, self.half_pixel)
        loss_mask = mask_loss(logits, labels, wanted)
        self.masks_drawn = len(labels)
        return dict(loss_classifier=loss_classifier, loss_box_reg=loss_box, loss_mask=loss_mask)


# %%
def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross-entropy of each box's own class; 0 where there are no boxes.

    Args:
        logits: (R, C + 1, M, M), or (R, 1, M, M) where classes share their masks.
        labels: (R,) int64, 1..C; wanted: (R, M, M), 0..1.
    """
    if len(labels) == 0:
        return logits.sum() * 0
    own = labels.clamp(max=logits.shape[1] - 1)
    own = logits[torch.arange(len(labels), device=labels.device), own]
    return F.binary_cross_entropy_with_logits(own, wanted)


# %% [markdown]
# A cascade (arXiv:1712.00726) has three box heads: each begins with the boxes of the one before and
# learns from cells that overlap them by more. Their boxes are the same for all classes.

# %%
# Added to the IoU from which a box is a cell's, weights of the offsets, share of the loss: by head.
CASCADE = (
    (0.0, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.1, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.2, (30.0, 30.0, 15.0, 15.0), 0.25),
)


# %%
class CascadeRoIHeads(InstanceMapRoIHeads):
    """RoI heads with a cascade of box heads; the first keeps the names of torchvision's.

    Answers have the mean of the heads' probabilities and the boxes of the last head.
    """

    least_iou = 0.5

    def add_heads(self, build) -> None:
        """Adds the second and third; `build` makes a box head and its predictor."""
        later = [dict(zip(("head", "predictor"), build(), strict=True)) for _ in CASCADE[1:]]
        self.later_heads = nn.ModuleList(nn.ModuleDict(parts) for parts in later)

    def run_heads(self, features, boxes, image_shapes):
        """Yields boxes by image, and what a head says of them: logits (R, C + 1), offsets (R, 4).

        After the last one, the boxes that it ends with, None and None.
        """
        heads = [(self.box_head, self.box_predictor)]
        heads += [(later["head"], later["predictor"]) for later in self.later_heads]
        for (head, predictor), (_, weights, _) in zip(heads, CASCADE, strict=True):
            pooled = self.box_roi_pool(features, boxes, image_shapes)
            logits, offsets = (values.float() for values in predictor(head(pooled)))
            yield boxes, logits, offsets
            moved = BoxCoder(weights).decode_single(offsets.detach(), torch.cat(boxes))
            moved = moved.split([len(own) for own in boxes])
            boxes = list(map(clip_boxes_to_image, moved, image_shapes))
        yield boxes, None, None

    def find_boxes(self, features, proposals, image_shapes):
        *stages, (boxes, _, _) = self.run_heads(features, proposals, image_shapes)
        chances = torch.stack([logits.softmax(-1) for _, logits, _ in stages]).mean(0)
        still = chances.new_zeros((len(chances), 4 * chances.shape[1]))
        return chances.clamp(min=1e-12).log(), still, boxes

    def box_losses(self, features, sampled, image_shapes, targets):
        cells, classes = ([target[key] for target in targets] for key in ("boxes", "labels"))
        loss_classifier, loss_box = 0, 0
        stages = self.run_heads(features, sampled[0], image_shapes)
        for (more, weights, share), (boxes, logits, offsets) in zip(CASCADE, stages, strict=False):
            matcher = BlockMatcher(self.least_iou + more, self.least_iou + more)
            matched, labels = self.assign_targets_to_proposals(boxes, cells, classes, matcher)
            goals = [c[m[k > 0]] for c, m, k in zip(cells, matched, labels, strict=True)]
            labels = torch.cat(labels)
            found = labels > 0
            wanted = BoxCoder(weights).encode_single(torch.cat(goals), torch.cat(boxes)[found])
            distance = F.smooth_l1_loss(offsets[found], wanted, beta=1 / 9, reduction="sum")
            wrong = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            loss_classifier = loss_classifier + share * wrong / (labels >= 0).sum().clamp(min=1)
            loss_box = loss_box + share * distance / max(len(labels), 1)
        return loss_classifier, loss_box


# %% [markdown]
# RoIAlign cuts the features under each box. torchvision does it value by value, which on a CPU is a
# third of a training step; the same sums are products of small matrices, as for mask targets.


# %%
def crop_weights(rois: Tensor, shape, bins: int, scale: float, each: int):
    """What RoIAlign sums, in groups of boxes of at most 1e6 values of crops, or one box.

    Args:
        rois: (R, 5) float32, number of the image and XYXY; scale: feature pixels per pixel.
        shape: of the features, (B, C, H, W); bins, each: see `axis_weights`.

    Yields:
        Indices (K,) int64 of a group; weights (K, bins, h) and (K, bins, w) float32 of the rows and
        columns of its crops; (K * h * w,) int64, their places in the features of all images.
    """
    _, channels, height, width = shape
    boxes, homes = rois[:, 1:].float() * scale, rois[:, 0].long() * height
    spans = (boxes[:, [3, 2]] - boxes[:, [1, 0]]).clamp(min=1).ceil().long() + 3
    for part, tall, wide in similar_chunks(spans, 1_000_000 // channels):
        x1, y1, x2, y2 = boxes[part].unbind(1)
        rows, y = axis_weights(y1, y2, bins, tall, height, False, each)
        columns, x = axis_weights(x1, x2, bins, wide, width, False, each)
        places = (homes[part, None] + y)[:, :, None] * width + x[:, None, :]
        yield part, rows, columns, places.flatten()


# %%
class MatrixRoIAlign(torch.autograd.Function):
    """torchvision's `roi_align` for CPUs, equal to rounding."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # sums are float32, as torchvision's
    def forward(ctx, features, rois, bins: int, scale: float, each: int):
        """Features (B, C, H, W) at boxes (R, 5), image and XYXY -> (R, C, bins, bins)."""
        ctx.save_for_backward(rois)
        ctx.known = features.shape, features.dtype, bins, scale, each
        shape, dtype, *options = ctx.known
        flat = features.permute(0, 2, 3, 1).reshape(-1, shape[1])
        pooled = features.new_empty((len(rois), bins, bins, shape[1]))
        for part, rows, columns, places in crop_weights(rois, shape, *options):
            count, _, tall = rows.shape
            own = flat[places].float().view(count, tall, -1)  # columns and channels in one
            own = (rows @ own).view(count, bins, columns.shape[2], -1)
            pooled[part] = (columns[:, None] @ own).to(dtype)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad):
        """The gradient of the features."""
        (rois,), (shape, dtype, bins, *options) = ctx.saved_tensors, ctx.known
        images, channels, height, width = shape
        sums = rois.new_zeros((images * height * width, channels), dtype=torch.float32)
        for part, rows, columns, places in crop_weights(rois, shape, bins, *options):
            own = grad[part].float().permute(0, 2, 3, 1).reshape(len(part), bins, -1)
            own = (rows.transpose(1, 2) @ own).view(len(part), rows.shape[2], bins, channels)
            own = columns.transpose(1, 2)[:, None] @ own  # boxes, rows, columns, channels
            places = places[:, None].expand(-1, channels)
            sums.scatter_add_(0, places, own.view(-1, channels))
        sums = sums.view(images, height, width, channels).permute(0, 3, 1, 2)
        return sums.to(dtype), None, None, None, None


# %%
class FastPooler(MultiScaleRoIAlign):
    """torchvision's pooler, with `MatrixRoIAlign` on a CPU."""

    def forward(self, x, boxes, image_shapes):
        """Feature maps by name, (R, 4) boxes by image -> (R, C, bins, bins)."""
        rois, levels = convert_boxes_to_roi_format(boxes), self.map_levels(boxes)
        maps = [x[name] for name in self.featmap_names]
        pooled = maps[0].new_zeros((len(rois), *self.output_size, maps[0].shape[1]))
        pooled = pooled.permute(0, 3, 1, 2)  # channels last, as the model's weights
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            own = torch.where(levels == level)[0]
            align = roi_align if features.is_cuda else MatrixRoIAlign.apply
            crops = align(features, rois[own], self.output_size[0], scale, self.sampling_ratio)
            pooled[own] = crops.to(pooled.dtype)
        return pooled


# %%
HEAD_NORMS = {"batch": nn.BatchNorm2d, "none": None}


def build_pooler(config: Config, bins: int) -> FastPooler:
    """RoIAlign on the pyramid's levels, with the strides of the settings.

    torchvision would infer them from the first image it sees, and wrongly so from a small one.
    """
    strides = trunk_strides(config)
    pooler = FastPooler(list(map(str, range(len(strides)))), bins, sampling_ratio=2)
    pooler.scales = [1 / stride for stride in strides]
    low, high = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pooler.map_levels = initLevelMapper(low, high, canonical_scale=224, canonical_level=4)
    return pooler


# %%
def build_box_head(config: Config) -> tuple[nn.Module, nn.Module]:
    """A box head and its predictor."""
    width, norm = config.fpn_channels, HEAD_NORMS[config.head_norm]
    layers = [config.box_features] * config.box_layers
    head = FastRCNNConvFCHead((width, 7, 7), [width] * config.box_convs, layers, norm)
    predictor = FastRCNNPredictor(config.box_features, config.num_classes + 1)  # 0: background
    if config.cascade:
        predictor.bbox_pred = nn.Linear(config.box_features, 4)
    return head, predictor


def build_heads(config: Config) -> InstanceMapRoIHeads:
    """The box and mask heads, named as in `maskrcnn_resnet50_fpn_v2`."""
    width, norm = config.fpn_channels, HEAD_NORMS[config.head_norm]
    box_head, box_predictor = build_box_head(config)
    heads = (CascadeRoIHeads if config.cascade else InstanceMapRoIHeads)(
        box_roi_pool=build_pooler(config, 7),
        box_head=box_head,
        box_predictor=box_predictor,
        fg_iou_thresh=config.roi_iou,
        bg_iou_thresh=config.roi_iou,
        batch_size_per_image=config.rois,
        positive_fraction=config.roi_cells,
        bbox_reg_weights=None,
        score_thresh=config.score_floor,
        nms_thresh=config.box_nms,
        detections_per_img=config.detections,
        mask_roi_pool=build_pooler(config, 14),
        mask_head=MaskRCNNHeads(width, [width] * config.mask_convs, 1, norm),
        mask_predictor=MaskRCNNPredictor(
            width, width, 1 if config.shared_masks else config.num_classes + 1
        ),
    )
    if config.cascade:
        heads.add_heads(lambda: build_box_head(config))
        heads.least_iou = config.roi_iou
    heads.fg_bg_sampler = CountingSampler(config.rois, config.roi_cells)
    heads.proposal_matcher = BlockMatcher(config.roi_iou, config.roi_iou)
    heads.half_pixel = config.half_pixel
    return heads


# %%
def build_proposals(config: Config) -> RegionProposalNetwork:
    """The region proposal network with one anchor size a level."""
    sizes = tuple((size,) for size in config.anchor_sizes)
    anchors = Float32Anchors(sizes, (config.anchor_ratios,) * len(sizes))
    head = Float32RPNHead(config.fpn_channels, len(config.anchor_ratios), config.rpn_convs)
    kept = {"training": config.proposals, "testing": config.proposals}
    proposals = CrowdProposals(
        anchors,
        head,
        fg_iou_thresh=config.rpn_iou[1],
        bg_iou_thresh=config.rpn_iou[0],
        batch_size_per_image=config.rpn_samples,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=config.rpn_nms,
    )
    proposals.fg_bg_sampler = CountingSampler(config.rpn_samples, 0.5)
    proposals.box_similarity = lambda cells, anchors: (cells, anchors)
    low, high = config.rpn_iou
    proposals.proposal_matcher = BlockMatcher(high, low, allow_low_quality_matches=True)
    return proposals
