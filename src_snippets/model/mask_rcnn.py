"""The Mask R-CNN as a whole: input, model, its weights and its anchors."""

# %% [markdown]
# ### Build the Mask R-CNN
# `build_model` puts torchvision's parts together: backbone and FPN, region proposals (RPN), box and
# mask heads. Images go in as uint8 of any size; detections come out in image pixels, with masks of
# 28 x 28 inside their boxes. Anchors need sizes like those of the cells: see the figure.

# %%
# @title InputTransform, and initial weights
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
import numpy as np
import torch
from torch import nn, Tensor
import torch.nn.functional as F
from torchvision import ops
from torchvision.models import detection
from torchvision.transforms import v2

from src_snippets.model.backbone import build_backbone, find_weights_file, read_state_dict
from src_snippets.model.heads import BlockMatcher, CellRoIHeads
from src_snippets.model.roi_align import CellRoIAlign
from src_snippets.setup.config import Config, require
from src_snippets.setup.devices import default_device

# Layers that initial weights may lack; attention starts as the identity
CLASS_LAYERS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
CLASS_LAYERS += ("backbone.attention.", "roi_heads.my_")  # the latter: of a head of your own
# Settings that go with a model's weights
MODEL_SETTINGS = ("backbone", "attention", "grey", "scale", "fpn_channels", "head_norm")
MODEL_SETTINGS += ("rpn_convs", "box_convs", "box_layers", "box_features", "mask_convs")
MODEL_SETTINGS += ("anchor_sizes", "anchor_ratios")


class InputTransform(detection.transform.GeneralizedRCNNTransform):
    """uint8 images -> one normalised float32 batch at network scale; instance maps stay.

    Sides are padded to multiples of 64 (else anchors of the FPN's top level drift from its pixels).
    """

    def __init__(self, config: Config, mean, std):
        super().__init__(min_size=0, max_size=0, image_mean=mean, image_std=std, size_divisible=64)
        self.scale, self.grey = config.scale, config.grey
        self.layout, self.memory_limits = torch.channels_last, {}  # of `detect`, by tile

    def normalize(self, image):
        require(image.dtype == torch.uint8, f"Image of {image.dtype}; expected uint8, 0..255.")
        image = v2.functional.rgb_to_grayscale(image, 3) if self.grey else image
        return super().normalize(image.float() / 255)

    def resize(self, image, target=None):
        old = image.shape[-2:]
        new = [max(round(side * self.scale), 1) for side in old]
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            boxes = detection.transform.resize_boxes(target["boxes"], old, new)
            target = target | dict(boxes=boxes)
        return image, target

    def batch_images(self, images, size_divisible):
        return super().batch_images(images, size_divisible).contiguous(memory_format=self.layout)

    def postprocess(self, result, image_shapes, original_image_sizes):
        for output, *sizes in zip(result, image_shapes, original_image_sizes, strict=False):
            output["boxes"] = detection.transform.resize_boxes(output["boxes"], *sizes)
        return result


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def whole_model_state(config: Config) -> dict[str, Tensor] | None:
    """The state dict of a whole model that `weights` names; None where it is of a backbone."""
    if config.weights in ("none", "imagenet"):
        return None
    if config.weights != "coco":
        state = read_state_dict(config.weights)
        return state if any(name.startswith("roi_heads.") for name in state) else None
    fits = config.backbone == "resnet50"
    require(fits, f"weights='coco' needs backbone='resnet50', not {config.backbone!r}.")
    coco = detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1
    name = Path(coco.url).name
    if file := find_weights_file([name]):
        return read_state_dict(file)
    try:
        return coco.get_state_dict(check_hash=True, weights_only=True)
    except Exception as error:  # downloads fail in many ways
        message = f"weights='coco': no {name} below /kaggle/input and no download ({error})."
        raise FileNotFoundError(f"{message} Attach it or turn the internet on.") from error


def with_model_settings(config: Config, changes: Mapping) -> Config:
    """The settings with those of the model in a best.pt that `weights` names, but for `changes`."""
    settings = {}
    with suppress(Exception):  # none of ours; a bad file is refused where its weights are read
        saved = torch.load(config.weights, map_location="cpu", weights_only=True)["config"]
        names = [k for k in MODEL_SETTINGS if k in saved and k not in changes]
        settings = {k: saved[k] for k in names if saved[k] != getattr(config, k)}
    if settings:
        print(f"Settings of the model in {config.weights}: {settings}")
    return replace(config, **settings)


def load_model_state(model: nn.Module, state: dict[str, Tensor], new_classes: bool = False) -> None:
    """Load a state dict that fits, or with `new_classes` all but `CLASS_LAYERS`; ValueError."""
    own, new = ({k: v.shape for k, v in side.items()} for side in (model.state_dict(), state))
    # Norms of detectron2 do not count batches
    differ = sorted({k for k, _ in own.items() ^ new.items() if "num_batches" not in k})
    wrong = [name for name in differ if not (new_classes and name.startswith(CLASS_LAYERS))]
    issue = f"The weights do not fit the model: {len(wrong)} parameters, such as {wrong[:3]}, are"
    help_text = "Set backbone, fpn_channels and heads as they were when the weights were made."
    require(not wrong, f"{issue} missing, unknown or of another shape. {help_text}")
    model.load_state_dict({k: v for k, v in state.items() if k not in differ}, strict=False)
    if differ:
        print(f"Not in these weights, so not pretrained: {', '.join(differ)}")


# %%
# @title build_model: torchvision's parts put together; plot_anchors
def build_model(config: Config, load_initial: bool = True) -> nn.Module:
    """Build the Mask R-CNN of the settings, with torchvision's names of parameters.

    `load_initial=False`: random weights, for a checkpoint to load. Raises FileNotFoundError;
    ValueError for weights that do not fit or over 200 M trainable parameters.
    """
    torch.manual_seed(config.seed)
    state = whole_model_state(config) if load_initial else None
    backbone = build_backbone(config, load_initial and state is None)
    width, norm = config.fpn_channels, nn.BatchNorm2d if config.head_norm == "batch" else None
    sizes, ratios = tuple((v,) for v in config.anchor_sizes), config.anchor_ratios
    anchors = detection.anchor_utils.AnchorGenerator(sizes, (ratios,) * 5)
    head = detection.rpn.RPNHead(width, len(ratios), config.rpn_convs)
    # Anchors in float32: bfloat16 steps by 4 px near 512. Of maps only H, W and dtype are used
    anchors.register_forward_pre_hook(lambda _, args: (args[0], [v[:0].float() for v in args[1]]))
    head.register_forward_hook(lambda _, args, out: [[v.float() for v in part] for part in out])
    top = dict(training=config.proposals, testing=config.proposals)
    sampling = 0.7, 0.3, 256, 0.5  # IoU of positives and negatives, batch size, fraction
    rpn = detection.rpn.RegionProposalNetwork(anchors, head, *sampling, top, top, nms_thresh=0.7)
    rpn.proposal_matcher = BlockMatcher(*sampling[:2], allow_low_quality_matches=True)
    rpn.box_similarity = lambda *boxes: boxes  # BlockMatcher compares them itself
    box_sampling = 0.5, 0.5, config.roi_batch_size, 0.25  # at most a quarter of them positive
    layers, classes = [config.box_features] * config.box_layers, config.num_classes + 1
    faster, mask = detection.faster_rcnn, detection.mask_rcnn
    box_head = faster.FastRCNNConvFCHead((width, 7, 7), [width] * config.box_convs, layers, norm)
    box_parts = CellRoIAlign(7), box_head, faster.FastRCNNPredictor(config.box_features, classes)
    mask_head = mask.MaskRCNNHeads(width, [width] * config.mask_convs, 1, norm)
    mask_parts = CellRoIAlign(14), mask_head, mask.MaskRCNNPredictor(width, width, classes)
    limits = config.score_threshold, config.box_nms, config.detections
    roi_heads = CellRoIHeads(*box_parts, *box_sampling, None, *limits, *mask_parts)
    roi_heads.proposal_matcher = BlockMatcher(*box_sampling[:2])
    # Add your own head here: roi_heads.my_head = .., its loss goes into CellRoIHeads.forward
    transform = InputTransform(config, backbone.mean, backbone.std)
    model = detection.generalized_rcnn.GeneralizedRCNN(backbone, rpn, roi_heads, transform)
    if state is not None:
        load_model_state(model, state, new_classes=True)
    millions, help_text = count_parameters(model) / 1e6, "Take a smaller backbone."
    require(millions <= 200, f"{millions:.1f} M trainable parameters; at most 200 M. {help_text}")
    return model.to(memory_format=transform.layout)


def to_device(model: nn.Module) -> nn.Module:
    """Move a model to the device, in the memory format that is fast there."""
    device, convs = default_device(), [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    depthwise7 = [conv for conv in convs if conv.groups > 1 and conv.kernel_size[0] > 5]
    if depthwise7 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        model.transform.layout = torch.contiguous_format  # cuDNN is slow or fails in channels_last
        for conv in depthwise7:  # norms of timm permute what these get
            conv.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model.to(device, memory_format=model.transform.layout)


def plot_anchors(sides: np.ndarray, config: Config) -> Figure:
    """Plot sides (N, 2) of boxes and anchors, network px; red: IoU below 0.5 on their grid."""
    sizes, ratios = np.array(config.anchor_sizes)[:, None], np.sqrt(config.anchor_ratios)
    anchors = np.stack([sizes / ratios, sizes * ratios], axis=-1).reshape(-1, 2)
    anchors = 2 * np.round(anchors / 2)  # as AnchorGenerator does
    shift = np.repeat(2.0 ** np.arange(len(sizes)), len(ratios))[:, None]  # stride / 4, the mean
    corners = np.c_[-sides, sides] / 2, np.c_[shift - anchors / 2, shift + anchors / 2]
    fits = (ops.box_iou(*map(torch.from_numpy, corners)).amax(1) >= 0.5).numpy()
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for chosen, color, label in ((fits, "0.5", "matched box"), (~fits, "tab:red", "unmatched box")):
        label = f"{label} ({chosen.sum():,})"
        axes.scatter(*sides[chosen].T, s=3, alpha=0.3, color=color, label=label)
    axes.scatter(*anchors.T, s=60, marker="+", color="tab:blue", label=f"anchor ({len(anchors)})")
    axes.set(xscale="log", yscale="log", xlabel="width, px", ylabel="height, px")
    axes.set_title("Box sizes and anchors, network px", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure
