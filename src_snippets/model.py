"""Mask R-CNN whose heads read instance maps; `detect` turns images into `Instances`."""

# %% [markdown]
# ## What is different from torchvision's Mask R-CNN?
# The parts and their names are torchvision's (`maskrcnn_resnet50_fpn_v2`), so its weights load. The
# mask head, though, learns from the instance map at the sampled boxes, and predicted masks become
# run lengths inside their own boxes. No array of `N` image-size masks is ever made.

# %%
from dataclasses import replace
import math
from pathlib import Path

import numpy as np
from timm.layers import convert_sync_batchnorm
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_inference, RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import box_area, MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms.v2.functional import rgb_to_grayscale

from src_snippets.backbones import (
    build_backbone,
    COCO_WEIGHTS,
    find_weights,
    published_weights,
    read_weights,
    use_group_norm,
)
from src_snippets.config import Config
from src_snippets.forms import Instances
from src_snippets.fusion import settle
from src_snippets.rle import encode_crops

# %% [markdown]
# Mask targets: RoIAlign (arXiv:1703.06870) of "pixel belongs to this cell" is a product of three
# small matrices, rows x crop x columns. Only the crop under each box is looked at.


# %%
def axis_weights(low: Tensor, high: Tensor, bins: int, span: int, limit: int, half_pixel: bool):
    """RoIAlign's bilinear weights along one axis.

    Args:
        low, high: (R,) float32, the boxes' edges in pixels.
        bins: M, the number of output bins.
        span: pixels looked at from the box's first on; at least its length + 3.
        limit: H or W.
        half_pixel: pixel `p` has its centre at `p + 0.5`; else at `p`, as in torchvision.

    Returns:
        weights (R, bins, span) float32 and the pixels they belong to, (R, span) int64.

    Source: `roi_align` of torchvision with `sampling_ratio=-1`, `aligned=half_pixel`; boxes shorter
    than a pixel count as one pixel long.
    """
    start = (low - 0.5 if half_pixel else low)[:, None, None]
    length = (high - low).clamp(min=1)[:, None, None]
    samples = torch.ceil(length / bins)  # a bin is sampled once a pixel, at least once
    step = torch.arange(-(-span // bins), device=low.device)
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
class BoundedRoIHeads(RoIHeads):
    """torchvision's RoI heads with memory that does not grow with cells or detections."""

    def assign_targets_to_proposals(self, proposals, gt_boxes, gt_labels):
        """The cell (R,) and class (R,) int64 of each proposal, 0 where there is none, by image."""
        matched, labels = [], []
        for boxes, cells, classes in zip(proposals, gt_boxes, gt_labels, strict=True):
            found = torch.full((len(boxes),), -1, device=boxes.device)
            if len(cells):
                found = self.proposal_matcher((cells, boxes))
            matched.append(found.clamp(min=0))
            padded = torch.cat([classes, classes.new_zeros(1)])  # found is -1 below the threshold
            labels.append(padded[found])
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
            parts.append(maskrcnn_inference(logits, classes))
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
            if not {"boxes", "labels", "layers", "ids", "homes"} <= set(target):
                raise ValueError(f"Target with {sorted(target)}: expected that of training_target.")

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        logits, offsets = self.predict_boxes(features, proposals, image_shapes)
        parts = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        parts = (*parts, self.draw_masks(features, parts[0], parts[2], image_shapes))
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)], {}

    def losses(self, features, proposals, image_shapes, targets):
        """The losses of classes, boxes and masks, each a float32 scalar."""
        sampled = self.select_training_samples(proposals, targets)
        proposals, matched, labels, wanted_offsets = sampled
        logits, offsets = self.predict_boxes(features, proposals, image_shapes)
        loss_classifier, loss_box = fastrcnn_loss(logits, offsets, labels, wanted_offsets)
        cells = [torch.where(label > 0)[0] for label in labels]
        boxes = [p[c] for p, c in zip(proposals, cells, strict=True)]
        matched = [m[c] for m, c in zip(matched, cells, strict=True)]
        logits = self.predict_masks(features, boxes, image_shapes)
        labels = torch.cat([label[c] for label, c in zip(labels, cells, strict=True)])
        size = logits.shape[-1]
        wanted = batch_targets(targets, boxes, matched, image_shapes, size, self.half_pixel)
        loss_mask = mask_loss(logits, labels, wanted)
        return dict(loss_classifier=loss_classifier, loss_box_reg=loss_box, loss_mask=loss_mask)


# %%
def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross-entropy of each box's own class; 0 where there are no boxes.

    Args:
        logits: (R, C + 1, M, M); labels: (R,) int64, 1..C; wanted: (R, M, M), 0..1.
    """
    if len(labels) == 0:
        return logits.sum() * 0
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted)


# %%
class InputTransform(GeneralizedRCNNTransform):
    """uint8 images -> one normalised batch, magnified; instance maps keep their resolution.

    Sides are padded to a multiple of 32. Detections leave with boxes in image pixels and masks as
    they came from the head, (R, 1, M, M).
    """

    def __init__(self, config: Config):
        means = dict(image_mean=config.pixel_mean, image_std=config.pixel_std)
        super().__init__(min_size=0, max_size=0, **means)
        self.scale, self.grey = config.scale, config.grey

    def normalize(self, image):
        if image.dtype != torch.uint8:
            raise TypeError(f"Image of type {image.dtype}; expected uint8, 0..255.")
        image = rgb_to_grayscale(image, 3) if self.grey else image
        return super().normalize(image.float() / 255)

    def resize(self, image, target=None):
        if self.scale == 1:
            return image, target
        old = image.shape[-2:]
        new = [max(round(side * self.scale), 1) for side in old]
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target = target | {"boxes": resize_boxes(target["boxes"], old, new)}
        return image, target

    def batch_images(self, images, size_divisible=32):
        # A trunk that shrinks a crop to one pixel has nothing to normalise over in training.
        tiny = max(max(image.shape[-2:]) for image in images) <= 32
        batch = super().batch_images(images, 64 if tiny else size_divisible)
        return batch.contiguous(memory_format=torch.channels_last)  # as the model's weights

    def postprocess(self, result, image_shapes, original_image_sizes):
        if self.training:
            return result
        for found, seen, own in zip(result, image_shapes, original_image_sizes, strict=True):
            found["boxes"] = resize_boxes(found["boxes"], seen, own)
        return result


# %%
def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_table(model: GeneralizedRCNN, most: int = 200_000_000) -> str:
    """Parameters of each part in millions, all and trainable, to print.

    Raises:
        ValueError: over `most` are trainable; the rules of HW3 allow 200 million.
    """
    parts = {
        "trunk": model.backbone.body,
        "attention": model.backbone.attention,
        "pyramid": model.backbone.fpn,
        "proposals": model.rpn,
        "box and mask heads": model.roi_heads,
        "all": model,
    }
    lines = ["million parameters    all  trainable"]
    for name, part in parts.items():
        every = sum(p.numel() for p in part.parameters()) / 1e6
        lines.append(f"{name:<18} {every:6.1f} {count_parameters(part) / 1e6:10.1f}")
    if (found := count_parameters(model)) > most:
        raise ValueError(
            f"{found / 1e6:.1f} M trainable parameters; at most {most / 1e6:.0f} M are allowed. "
            "Take a smaller backbone, or freeze some of it with trained_stages."
        )
    return "\n".join(lines)


# %%
def build_pooler(config: Config, bins: int) -> MultiScaleRoIAlign:
    """RoIAlign on the pyramid's levels, with the strides of the settings.

    torchvision would infer them from the first image it sees, and wrongly so from a small one.
    """
    strides = [stride for stride in config.pyramid if stride <= 32]
    pooler = MultiScaleRoIAlign(list(map(str, range(len(strides)))), bins, sampling_ratio=2)
    pooler.scales = [1 / stride for stride in strides]
    low, high = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pooler.map_levels = initLevelMapper(low, high, canonical_scale=224, canonical_level=4)
    return pooler


def build_heads(config: Config) -> InstanceMapRoIHeads:
    """The box and mask heads, named as in `maskrcnn_resnet50_fpn_v2`."""
    width, classes = config.fpn_channels, config.num_classes + 1  # 0 is background
    heads = InstanceMapRoIHeads(
        box_roi_pool=build_pooler(config, 7),
        box_head=FastRCNNConvFCHead(
            (width, 7, 7), [width] * config.box_convs, [config.box_features], nn.BatchNorm2d
        ),
        box_predictor=FastRCNNPredictor(config.box_features, classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.score_floor,
        nms_thresh=config.box_nms,
        detections_per_img=config.detections,
        mask_roi_pool=build_pooler(config, 14),
        mask_head=MaskRCNNHeads(width, [width] * config.mask_convs, 1, nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )
    heads.proposal_matcher = BlockMatcher(0.5, 0.5)
    heads.half_pixel = config.half_pixel
    return heads


# %%
def build_proposals(config: Config) -> RegionProposalNetwork:
    """The region proposal network with one anchor size a level."""
    sizes = tuple((size,) for size in config.anchor_sizes)
    anchors = Float32Anchors(sizes, (config.anchor_ratios,) * len(sizes))
    head = Float32RPNHead(config.fpn_channels, len(config.anchor_ratios), config.rpn_convs)
    kept = {"training": config.proposals, "testing": config.proposals}
    proposals = RegionProposalNetwork(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n=kept,
        post_nms_top_n=kept,
        nms_thresh=config.rpn_nms,
    )
    proposals.box_similarity = lambda cells, anchors: (cells, anchors)
    proposals.proposal_matcher = BlockMatcher(0.7, 0.3, allow_low_quality_matches=True)
    return proposals


# %%
def anchor_shapes(config: Config) -> np.ndarray:
    """(A, 2) float64, width and height of all anchors in image pixels."""
    sizes, ratios = np.array(config.anchor_sizes)[:, None], np.sqrt(config.anchor_ratios)
    shapes = np.stack([sizes / ratios, sizes * ratios], axis=-1)
    return shapes.reshape(-1, 2) / config.scale


def cells_with_anchor(sides: np.ndarray, config: Config, least: float = 0.5) -> np.ndarray:
    """Which cells have an anchor whose IoU with them, centre on centre, is at least `least`.

    Args:
        sides: (N, 2), width and height of cells in image pixels.

    Returns:
        (N,) bool.
    """
    shapes = anchor_shapes(config)
    shared = np.minimum(sides[:, None], shapes).prod(-1)
    union = sides.prod(-1)[:, None] + shapes.prod(-1) - shared
    return (shared / union).max(1, initial=0) >= least


def describe_anchors(covered: np.ndarray, most: float = 0.02) -> str:
    """A line on how many cells have an anchor; a warning where over `most` of them have none."""
    without = 1 - covered.mean() if len(covered) else 0.0
    line = f"{without:.1%} of {len(covered):,} cells have no anchor with IoU 0.5"
    if without <= most:
        return line
    return f"WARNING: {line}. Change anchor_sizes, anchor_ratios or scale: the figure shows where."


# %%
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Loads a state dict; only layers that depend on the number of classes may differ.

    Returns:
        The names of the parameters that were left as they are.

    Raises:
        ValueError: any other parameter is missing, unknown or of another shape.
    """
    own = model.state_dict()
    differs = {k for k in set(own) | set(state) if k not in own or k not in state}
    differs |= {k for k in set(own) & set(state) if own[k].shape != state[k].shape}
    if wrong := sorted(k for k in differs if not k.startswith(CLASS_LAYERS)):
        raise ValueError(
            f"The weights do not fit the model: {len(wrong)} parameters are missing, unknown or of "
            f"another shape, such as {', '.join(wrong[:3])}. Set backbone, fpn_channels and the "
            "heads as they were when the weights were made."
        )
    model.load_state_dict({k: v for k, v in state.items() if k not in differs}, strict=False)
    return sorted(differs)


# %%
def build_model(config: Config, load_initial: bool = True) -> GeneralizedRCNN:
    """Builds the Mask R-CNN of a configuration.

    Args:
        config: settings.
        load_initial: False builds it with random weights for a checkpoint that is loaded next.

    Raises:
        WeightsNotFound: the weights asked for cannot be had.
        ValueError: they do not fit, or nobody publishes such weights.
    """
    trunk_file, model_state = initial_weights(config) if load_initial else (None, None)
    torch.manual_seed(config.seed)
    start = config if load_initial else replace(config, weights="none")
    backbone = build_backbone(start, trunk_file)
    transform = InputTransform(config)
    model = GeneralizedRCNN(backbone, build_proposals(config), build_heads(config), transform)
    if config.norm == "group":
        use_group_norm(model)
    if config.norm == "sync":
        model = convert_sync_batchnorm(model)
    if model_state is not None:
        load_model_state(model, model_state)
    return model.to(memory_format=torch.channels_last)  # the layout that convolutions prefer


# %%
def initial_weights(config: Config) -> tuple[Path | None, dict | None]:
    """What to start from: a file with the trunk's weights, the model's state dict, or neither.

    timm finds the weights of its trunks itself: see `build_timm_trunk`.
    """
    if config.weights == "none":
        return None, None
    if config.weights == "coco":
        if config.backbone != "resnet50":
            raise ValueError(
                f"weights='coco' are published for backbone='resnet50', not {config.backbone!r}."
            )
        return None, read_weights(find_weights(COCO_WEIGHTS))
    if config.weights == "imagenet":
        if config.backbone.startswith("timm:"):
            return None, None
        published = published_weights(config.backbone)
        if published is None:
            raise ValueError(
                f"There are no published ImageNet weights for {config.backbone!r}: set weights to "
                "'none' or to a file, or take another backbone."
            )
        return find_weights(published), None
    state = read_weights(config.weights)
    whole = any(key.startswith("roi_heads.") for key in state)
    return (None, state) if whole else (Path(config.weights), None)


# %% [markdown]
# Prediction: each 28 x 28 answer is drawn at the pixel centres inside its box, cut at the threshold
# and turned into run lengths on the spot. torchvision rounds boxes to whole pixels first, which
# moves the edge of a small cell by up to a pixel; `half_pixel=False` does the same.


# %%
def paste_weights(low: Tensor, high: Tensor, size: int, span: int, limit: int, half_pixel: bool):
    """Bilinear weights that carry masks of `size` bins onto the pixels of one axis.

    Args:
        low, high: (R,) float32, edges of the boxes in pixels; limit: H or W.
        span: pixels from the first one on; at least the longest box + 3, grown by a bin each side.
        half_pixel: draw at pixel centres inside the box, and nothing outside. Else as torchvision's
            `paste_masks_in_image`: the box grows by one bin on each side and is cut to integers.

    Returns:
        first pixels (R,) int64; weights (R, span, size) float32; which of these pixels lie in both
        box and image, (R, span) bool.
    """
    if half_pixel:
        begin, end = torch.ceil(low - 0.5), torch.ceil(high - 0.5)
        origin, step = low - 0.5, size / (high - low).clamp(min=1e-6)
        shift, least, most = 0.5, 1, size
    else:
        middle, half = (high + low) * 0.5, (high - low) * 0.5 * ((size + 2) / size)
        begin, end = (middle - half).trunc(), (middle + half).trunc() + 1
        origin, step = begin - 0.5, (size + 2) / (end - begin).clamp(min=1)
        shift, least, most = -0.5, 0, size + 1
    first = begin.clamp(0, limit)
    pixels = first[:, None] + torch.arange(span, device=low.device)
    inside = pixels < end.clamp(max=limit)[:, None]
    place = ((pixels - origin[:, None]) * step[:, None] + shift).clamp(least, most)
    below = place.floor().clamp(max=size)
    # Bins 0 and size + 1 are a border of zeros, cut off again at the end.
    weights = place.new_zeros((len(low), span, size + 2))
    weights.scatter_(2, below.long()[..., None], (1 - (place - below))[..., None])
    weights.scatter_(2, below.long()[..., None] + 1, (place - below)[..., None])
    return first.long(), weights[..., 1:-1], inside


# %%
def paste_masks(masks: Tensor, boxes: Tensor, size, threshold: float, half_pixel: bool) -> list:
    """The COCO RLEs of predicted masks, each made inside its box.

    Args:
        masks: (R, M, M) float32 probabilities; boxes: (R, 4) XYXY pixels; size: H, W of the image.
        threshold: probability from which a pixel belongs to the cell.

    Returns:
        R RLEs at image size, None where no pixel reaches the threshold. Memory is bounded by 1e5
        crop pixels at a time, or one crop.
    """
    bins, rles = masks.shape[-1], [None] * len(boxes)
    spans = (boxes[:, [3, 2]] - boxes[:, [1, 0]]).clamp(0, max(size)) * ((bins + 2) / bins)
    for part, tall, wide in similar_chunks(spans.ceil().long() + 3, 100_000):
        x1, y1, x2, y2 = boxes[part].float().unbind(1)
        top, rows, in_rows = paste_weights(y1, y2, bins, tall, size[0], half_pixel)
        left, columns, in_columns = paste_weights(x1, x2, bins, wide, size[1], half_pixel)
        with torch.autocast(boxes.device.type, enabled=False):
            crops = rows @ masks[part].float() @ columns.transpose(1, 2) >= threshold
        crops &= in_rows[:, :, None] & in_columns[:, None, :]
        arrays = (v.cpu().numpy() for v in (crops, top, left))
        filled = crops.flatten(1).any(1).tolist()
        for index, rle, any_pixel in zip(
            part.tolist(), encode_crops(*arrays, *size), filled, strict=True
        ):
            rles[index] = rle if any_pixel else None
    return rles


# %%
def to_instances(found: dict, size, config: Config) -> Instances:
    """Detections of one image, as they leave the model, in the common form.

    Detections whose mask is empty are left out: an empty mask matches nothing.
    """
    masks, half = found["masks"][:, 0], config.half_pixel
    rles = paste_masks(masks, found["boxes"], size, config.mask_threshold, half)
    kept = [i for i, rle in enumerate(rles) if rle is not None]
    arrays = (found[key].cpu().numpy()[kept] for key in ("boxes", "scores", "labels"))
    return settle(Instances(*arrays, [rles[i] for i in kept], tuple(size)), config)


def choose_precision(config: Config, device: torch.device) -> str:
    """`no`, `fp16` or `bf16`: what `auto` means on a device. ValueError for fp16 on a CPU."""
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' needs a GPU; there is none. Take 'auto' or 'no'.")
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# %%
@torch.inference_mode()
def detect(model: GeneralizedRCNN, images: list[Tensor], config: Config) -> list[Instances]:
    """Finds the cells of a batch of images.

    Args:
        model: from `build_model`; left in evaluation mode.
        images: B images (3, H, W) uint8; sizes may differ.
        config: `mask_threshold`, `half_pixel`, `mask_nms`, `overlaps` and `precision` are read;
            score floor, box NMS and cap are the model's.

    Returns:
        B `Instances`, best first.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        answers = model.eval()([image.to(device, non_blocking=True) for image in images])
    pairs = zip(answers, images, strict=True)
    return [to_instances(found, image.shape[-2:], config) for found, image in pairs]
