"""Mask R-CNN whose heads read instance maps; `detect` turns images into `Instances`."""

# %% [markdown]
# ## What is different from torchvision's Mask R-CNN?
# The parts and their names are torchvision's (`maskrcnn_resnet50_fpn_v2`), so its weights load. The
# mask head, though, learns from the instance map at the sampled boxes, and predicted masks become
# run lengths inside their own boxes. No array of `N` image-size masks is ever made.

# %%
import numpy as np
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
from torchvision.ops import box_iou, MultiScaleRoIAlign

from src_snippets.backbones import (
    build_backbone,
    COCO_WEIGHTS,
    find_weights,
    read_weights,
    TRUNKS,
)
from src_snippets.config import Config
from src_snippets.forms import Instances
from src_snippets.rle import encode_crop

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
    spans = (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1).ceil().long() + 3
    order = spans.argsort()
    spans = spans[order].tolist()
    answer = boxes.new_zeros((len(boxes), size, size), dtype=torch.float32)
    begin = 0
    while begin < len(spans):
        end = begin + 1
        while end < len(spans) and (end + 1 - begin) * spans[end] ** 2 <= 1_000_000:
            end += 1
        part, span = order[begin:end], spans[end - 1]
        x1, y1, x2, y2 = boxes[part].float().unbind(1)
        rows, y = axis_weights(y1, y2, size, span, height, half_pixel)
        columns, x = axis_weights(x1, x2, size, span, width, half_pixel)
        crops = layers[homes[part, None, None], y[:, :, None], x[:, None, :]]
        crops = (crops == ids[part, None, None]).float()
        with torch.autocast(boxes.device.type, enabled=False):
            answer[part] = rows @ crops @ columns.transpose(1, 2)
        begin = end
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
# Anchors are matched to cells in chunks: a table of all overlaps, cells x anchors, would grow with
# the number of cells and reach gigabytes on a dense field.


# %%
class ChunkedMatcher(Matcher):
    """torchvision's `Matcher` with equal results, given boxes in place of their table of IoUs.

    At most 4e6 overlaps are held at a time.
    """

    def __call__(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Matches (N, 4) cells and (A, 4) anchors, N >= 1.

        Returns:
            (A,) int64: the cell of each anchor, -1 below the low threshold, -2 between the two.
        """
        cells, anchors = pair
        size = max(4_000_000 // len(cells), 1)
        values = cells.new_empty(len(anchors))
        nearest = torch.empty_like(values, dtype=torch.int64)
        highest = cells.new_zeros(len(cells))
        for begin in range(0, len(anchors), size):
            part = slice(begin, begin + size)
            overlaps = box_iou(cells, anchors[part])
            values[part], nearest[part] = overlaps.max(dim=0)
            torch.maximum(highest, overlaps.amax(dim=1), out=highest)
        matches = nearest.clone()
        matches[values < self.low_threshold] = self.BELOW_LOW_THRESHOLD
        between = (values >= self.low_threshold) & (values < self.high_threshold)
        matches[between] = self.BETWEEN_THRESHOLDS
        # The best anchors of each cell are matched however little they overlap.
        for chosen in torch.where(values >= highest.min())[0].split(size):
            overlaps = box_iou(cells, anchors[chosen])
            is_best = (overlaps == highest[:, None]).any(dim=0)
            matches[chosen[is_best]] = nearest[chosen[is_best]]
        return matches


# %%
class InstanceMapRoIHeads(RoIHeads):
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
        logits = self.predict_masks(features, parts[0], image_shapes)
        parts = (*parts, maskrcnn_inference(logits, parts[2]))
        names = ("boxes", "scores", "labels", "masks")
        return [dict(zip(names, part, strict=True)) for part in zip(*parts, strict=True)], {}

    def predict_boxes(self, features, proposals, image_shapes):
        """Class logits (R, C + 1) and box offsets (R, 4C + 4), float32."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        return logits.float(), offsets.float()

    def predict_masks(self, features, boxes, image_shapes):
        """Mask logits (R, C + 1, M, M), float32."""
        pooled = self.mask_roi_pool(features, boxes, image_shapes)
        return self.mask_predictor(self.mask_head(pooled)).float()

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

    def __init__(self, scale: float):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB
        super().__init__(min_size=0, max_size=0, image_mean=mean, image_std=std)
        self.scale = scale

    def normalize(self, image):
        if image.dtype != torch.uint8:
            raise TypeError(f"Image of type {image.dtype}; expected uint8, 0..255.")
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
        return super().batch_images(images, 64 if tiny else size_divisible)

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


def build_heads(config: Config) -> InstanceMapRoIHeads:
    """The box and mask heads, named as in `maskrcnn_resnet50_fpn_v2`."""
    width, classes = config.fpn_channels, config.num_classes + 1  # 0 is background
    levels = ["0", "1", "2", "3"]
    heads = InstanceMapRoIHeads(
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
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
        mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(width, [width] * config.mask_convs, 1, nn.BatchNorm2d),
        mask_predictor=MaskRCNNPredictor(width, width, classes),
    )
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
    proposals.proposal_matcher = ChunkedMatcher(0.7, 0.3, allow_low_quality_matches=True)
    return proposals


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
    trunk_state, model_state = initial_weights(config) if load_initial else (None, None)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config, trunk_state)
    transform = InputTransform(config.scale)
    model = GeneralizedRCNN(backbone, build_proposals(config), build_heads(config), transform)
    if model_state is not None:
        load_model_state(model, model_state)
    return model


# %%
def initial_weights(config: Config) -> tuple[dict | None, dict | None]:
    """The state dicts to start from: of the trunk, of the whole model; None where there is none."""
    if config.weights == "none":
        return None, None
    if config.weights == "coco":
        if config.backbone != "resnet50":
            raise ValueError(
                f"weights='coco' are published for backbone='resnet50', not {config.backbone!r}."
            )
        return None, read_weights(find_weights(COCO_WEIGHTS))
    if config.weights == "imagenet":
        published = TRUNKS[config.backbone][1]
        if published is None:
            raise ValueError(
                f"There are no published ImageNet weights for {config.backbone!r}: set weights to "
                "'none' or to a file, or take another backbone."
            )
        return read_weights(find_weights(published)), None
    state = read_weights(config.weights)
    whole = any(key.startswith("roi_heads.") for key in state)
    return (None, state) if whole else (state, None)


# %% [markdown]
# Prediction: each 28 x 28 answer is drawn at the pixel centres inside its box, cut at the threshold
# and turned into run lengths on the spot. torchvision rounds boxes to whole pixels first, which
# moves the edge of a small cell by up to a pixel; `half_pixel=False` does the same.


# %%
def paste_weights(low: float, high: float, size: int, limit: int, half_pixel: bool):
    """Bilinear weights that carry a mask of `size` bins onto the pixels of one axis.

    Args:
        low, high: edges of the box in pixels; limit: H or W.
        half_pixel: draw at pixel centres inside the box, and nothing outside. Else as torchvision's
            `paste_masks_in_image`: the box grows by one bin on each side and is cut to integers.

    Returns:
        The first pixel, and weights (pixels, size) float32; no pixels where the box is empty.
    """
    if half_pixel:
        first, last = int(np.ceil(low - 0.5)), int(np.ceil(high - 0.5))
        pixels = np.arange(max(first, 0), min(last, limit))
        place = (pixels + 0.5 - low) * (size / max(high - low, 1e-6)) - 0.5
        place = place.clip(0, size - 1) + 1
    else:
        grow = np.float32((size + 2) / size)
        middle, half = np.float32((high + low) * 0.5), np.float32((high - low) * 0.5) * grow
        first, last = int(middle - half), int(middle + half)
        pixels = np.arange(max(first, 0), min(last + 1, limit))
        place = (pixels - first + np.float32(0.5)) * np.float32(
            (size + 2) / max(last - first + 1, 1)
        )
        place = (place - np.float32(0.5)).clip(0, size + 1)
    below = np.minimum(place.astype(np.int64), size)
    # Bins 0 and size + 1 are a border of zeros, cut off again at the end.
    weights = np.zeros((len(pixels), size + 2), np.float32)
    index = np.arange(len(pixels))
    weights[index, below] = 1 - (place - below)
    weights[index, below + 1] = place - below
    return int(pixels[0]) if len(pixels) else 0, weights[:, 1:-1]


# %%
def paste_mask(mask: np.ndarray, box, size, threshold: float, half_pixel: bool) -> dict | None:
    """The COCO RLE of one predicted mask, made inside its box.

    Args:
        mask: (M, M) float32 probabilities; box: (4,) XYXY pixels; size: H, W of the image.
        threshold: probability from which a pixel belongs to the cell.

    Returns:
        The RLE at image size, or None where no pixel reaches the threshold.
    """
    height, width = size
    left, columns = paste_weights(float(box[0]), float(box[2]), mask.shape[1], width, half_pixel)
    top, rows = paste_weights(float(box[1]), float(box[3]), mask.shape[0], height, half_pixel)
    crop = rows @ mask @ columns.T >= threshold
    return encode_crop(crop, top, left, height, width) if crop.any() else None


# %%
def to_instances(found: dict, size, threshold: float, half_pixel: bool) -> Instances:
    """Detections of one image, as they leave the model, in the common form.

    Detections whose mask is empty are left out: an empty mask matches nothing.
    """
    arrays = {key: value.detach().cpu().numpy() for key, value in found.items()}
    pairs = zip(arrays["masks"], arrays["boxes"], strict=True)
    rles = [paste_mask(m[0], box, size, threshold, half_pixel) for m, box in pairs]
    kept = [i for i, rle in enumerate(rles) if rle is not None]
    boxes, scores, labels = (arrays[key][kept] for key in ("boxes", "scores", "labels"))
    return Instances(boxes, scores, labels, [rles[i] for i in kept], tuple(size))


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
        config: `mask_threshold`, `half_pixel` and `precision` are read; score floor, NMS and cap
            are the model's.

    Returns:
        B `Instances`, best first.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        answers = model.eval()([image.to(device, non_blocking=True) for image in images])
    return [
        to_instances(found, image.shape[-2:], config.mask_threshold, config.half_pixel)
        for found, image in zip(answers, images, strict=True)
    ]
