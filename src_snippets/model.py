"""Mask R-CNN whose heads read instance maps; its answers as `Instances`."""

# %% [markdown]
# ## How are the parts put together?
# Pictures of any size go in, `Instances` come out. Predicted masks become run lengths inside their
# own boxes, so that nothing of the size of the image is made for each of them.

# %%
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from timm.layers import convert_sync_batchnorm
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.transforms.v2.functional import rgb_to_grayscale

from src_snippets.backbones import (
    build_backbone,
    COCO_WEIGHTS,
    published_weights,
    use_group_norm,
)
from src_snippets.config import Config
from src_snippets.forms import by_class, Instances
from src_snippets.heads import build_heads, build_proposals, similar_chunks
from src_snippets.rle import encode_crops
from src_snippets.transforms import magnification
from src_snippets.weights import (
    find_weights,
    fit_detectron2,
    is_detectron2,
    read_weights,
)


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
        self.short_side = config.short_sides[-1]
        self.fixed = None  # a magnification that takes the place of both, for parts of an image

    def normalize(self, image):
        if image.dtype != torch.uint8:
            raise TypeError(f"Image of type {image.dtype}; expected uint8, 0..255.")
        image = rgb_to_grayscale(image, 3) if self.grey else image
        return super().normalize(image.float() / 255)

    def resize(self, image, target=None):
        old = image.shape[-2:]
        # Crops come in network pixels where short_sides are set: see ZoomCrop.
        whole = not (self.training and self.short_side)
        factor = magnification(old, self.scale, self.short_side) if whole else 1
        factor = self.fixed or factor
        if factor == 1:
            return image, target
        new = [max(round(side * factor), 1) for side in old]
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            moved = {key: resize_boxes(target[key], old, new) for key in ("boxes", "crowds")}
            target = target | moved
        return image, target

    def batch_images(self, images, size_divisible=32):
        # A trunk that shrinks a crop to one pixel has nothing to normalise over in training.
        tiny = max(max(image.shape[-2:]) for image in images) <= 32
        batch = super().batch_images(images, 64 if tiny else size_divisible)
        return batch.contiguous(memory_format=torch.channels_last)  # as the model's weights

    def postprocess(self, result, image_shapes, original_image_sizes):
        if not result:  # losses were asked for
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


class CheckpointBytes(NamedTuple):
    """What a run takes of the disk at most: `kept` to its end, `writing` more while it writes."""

    kept: int
    writing: int


def checkpoint_bytes(model: nn.Module, config: Config) -> CheckpointBytes:
    """The room for two checkpoints and the best weights, one of each twice while it is written.

    A checkpoint has the weights, up to two moments of each, and their running mean.
    """
    own = sum(value.nbytes for value in model.state_dict().values())
    means = own if config.ema else 0
    one, best = 3 * own + means, own + means
    return CheckpointBytes(2 * one + best, one + best)


# %%
def anchor_shapes(config: Config) -> np.ndarray:
    """(A, 2) float64, width and height of all anchors in network pixels."""
    sizes, ratios = np.array(config.anchor_sizes)[:, None], np.sqrt(config.anchor_ratios)
    return np.stack([sizes / ratios, sizes * ratios], axis=-1).reshape(-1, 2)


def cells_with_anchor(sides: np.ndarray, config: Config, least: float = 0.5) -> np.ndarray:
    """Which cells have an anchor whose IoU with them, centre on centre, is at least `least`.

    Args:
        sides: (N, 2), width and height of cells in network pixels.

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
CLASS_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "roi_heads.later_heads.",
)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Loads a state dict; only layers that depend on the classes, or a cascade's, may differ.

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
    if is_detectron2(state):
        return None, fit_detectron2(state, config)
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
def paste_masks(masks: Tensor, boxes: Tensor, size, threshold, half_pixel: bool) -> list:
    """The COCO RLEs of predicted masks, each made inside its box.

    Args:
        masks: (R, M, M) float32 probabilities; boxes: (R, 4) XYXY pixels; size: H, W of the image.
        threshold: probability from which a pixel belongs to the cell; a number, or (R,) float32.

    Returns:
        R RLEs at image size, None where no pixel reaches the threshold. Memory is bounded by 1e5
        crop pixels at a time, or one crop.
    """
    bins, rles = masks.shape[-1], [None] * len(boxes)
    cuts = torch.as_tensor(threshold, device=boxes.device).expand(len(boxes))[:, None, None]
    spans = (boxes[:, [3, 2]] - boxes[:, [1, 0]]).clamp(0, max(size)) * ((bins + 2) / bins)
    for part, tall, wide in similar_chunks(spans.ceil().long() + 3, 100_000):
        x1, y1, x2, y2 = boxes[part].float().unbind(1)
        top, rows, in_rows = paste_weights(y1, y2, bins, tall, size[0], half_pixel)
        left, columns, in_columns = paste_weights(x1, x2, bins, wide, size[1], half_pixel)
        with torch.autocast(boxes.device.type, enabled=False):
            crops = rows @ masks[part].float() @ columns.transpose(1, 2) >= cuts[part]
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
    """Detections of one image, as they leave the model, in the common form, best first.

    Detections whose mask is empty are left out: an empty mask matches nothing. With `rescore` a
    score is multiplied by the mean probability inside the mask. See `settle` for what follows.
    """
    masks, half = found["masks"][:, 0], config.half_pixel
    labels = found["labels"].cpu().numpy()
    cuts = torch.from_numpy(by_class(config.mask_threshold, labels)).to(masks)
    rles = paste_masks(masks, found["boxes"], size, cuts, half)
    kept = [i for i, rle in enumerate(rles) if rle is not None]
    scores = found["scores"]
    if config.rescore:
        inside = masks >= cuts[:, None, None]
        scores = scores * (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    boxes, scores = (values.cpu().numpy()[kept] for values in (found["boxes"], scores))
    every = Instances(boxes, scores, labels[kept], [rles[i] for i in kept], tuple(size))
    return every.select(np.argsort(-every.scores, kind="stable"))


def choose_precision(config: Config, device: torch.device) -> str:
    """`no`, `fp16` or `bf16`: what `auto` means on a device. ValueError for what it cannot do."""
    wanted = config.precision
    if device.type != "cuda":
        if wanted == "fp16":
            raise ValueError("precision='fp16' needs a GPU; there is none. Take 'auto' or 'no'.")
        return "no" if wanted == "auto" else wanted
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not has_bf16:
        raise ValueError("precision='bf16': this GPU has none, as a T4. Take 'auto' or 'fp16'.")
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16 else "fp16"


# %%
@torch.inference_mode()
def find_raw(model: GeneralizedRCNN, images: list[Tensor], config: Config) -> list[dict]:
    """What the model says of a batch, before masks are drawn.

    Args:
        model: from `build_model`; left in evaluation mode.
        images: B images (3, H, W) uint8; sizes may differ.
        config: `precision` is read; score floor, box NMS and cap are the model's.

    Returns:
        B dictionaries of boxes (R, 4) XYXY in image pixels, scores (R,), labels (R,) 1..C and masks
        (R, 1, M, M), probabilities inside the boxes, on the model's device.
    """
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype, enabled=precision != "no"):
        return model.eval()([image.to(device, non_blocking=True) for image in images])
