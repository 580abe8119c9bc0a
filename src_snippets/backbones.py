"""Feature extractors with a feature pyramid: trunks of torchvision and timm, attention, norms."""

# %% [markdown]
# ## What looks at the image?
# A trunk trained on ImageNet, with a feature pyramid (FPN, arXiv:1612.03144) on top.

# %%
from collections import OrderedDict
from collections.abc import Sequence
import math
from pathlib import Path

import timm
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
import torch
from torch import nn, Tensor
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from src_snippets.config import Config
from src_snippets.weights import attached_file, ATTACHED_FOLDERS, read_weights, WeightsNotFound

# %% [markdown]
# torchvision's trunks by name, and any of timm's behind `timm:`, such as
# `timm:convnextv2_base.fcmae_ft_in1k` or `timm:swin_tiny_patch4_window7_224.ms_in1k`. The tag says
# what the weights learned from: where only ImageNet-1k is allowed, leave those with `in22k` alone.

# %%
# By the beginning of the name: which children give features with strides 2, 4, 8, 16, 32.
STAGES = {
    "res": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "mobilenet": ("1", "3", "6", "13", "17"),
    "efficientnet": ("1", "2", "3", "5", "7"),
    "convnext": (None, "1", "3", "5", "7"),
}
COCO_WEIGHTS = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1


def trunk_strides(config: Config) -> list[int]:
    """Strides of the pyramid's levels that the trunk gives; one above comes from pooling."""
    return [stride for stride in config.pyramid if stride <= (16 if config.fine_stem else 32)]


def published_weights(name: str):
    """The member of torchvision's weights enum for a trunk; None where there is none."""
    if name in ("resnet10", "resnet50_v1"):
        return None
    if name == "resnet50_v2":
        return get_model_weights("resnet50").IMAGENET1K_V2
    return get_model_weights(name).IMAGENET1K_V1


# %% [markdown]
# Attention may be put behind each stage. It starts as the identity, so pretrained features survive,
# and it lies beside the trunk, so the names of pretrained parameters stay.


# %%
class SqueezeExcitation(nn.Module):
    """Weighs channels by what the whole image shows (arXiv:1709.01507, equations 2 to 4).

    Twice the sigmoid with zeros in the last layer: the identity at the start.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 4)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x):
        return x * 2 * self.mlp(x.mean((2, 3), keepdim=True)).sigmoid()


class ConvBlockAttention(SqueezeExcitation):
    """CBAM (arXiv:1807.06521): weighs channels (equation 2), then places (equation 3).

    Both weights are twice the sigmoid, with zeros in the last layer: the identity at the start.
    """

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__(channels, reduction)
        self.places = nn.Conv2d(2, 1, 7, padding=3)
        nn.init.zeros_(self.places.weight)
        nn.init.zeros_(self.places.bias)

    def forward(self, x):
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        x = x * 2 * sum(map(self.mlp, pooled)).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * 2 * self.places(maps).sigmoid()


ATTENTION = {"none": nn.Identity, "se": SqueezeExcitation, "cbam": ConvBlockAttention}


# %%
class Trunk(nn.Module):
    """The children of a classifier of torchvision up to its last stage, under their own names.

    Args:
        children: name and module, in the order they are run.
        stages: names of the children whose outputs are wanted.
        marks: names of the children that end a stage, strides 4 to 32.
    """

    def __init__(self, children: dict[str, nn.Module], stages: Sequence[str], marks: Sequence[str]):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
            if name == stages[-1]:
                break
        self.stages, self.marks = tuple(stages), tuple(marks)

    def forward(self, x, attention: Sequence[nn.Module]) -> list[Tensor]:
        found, attention = [], iter(attention)
        for name, child in self.named_children():
            x = child(x)
            if name in self.stages:
                x = next(attention)(x)
                found.append(x)
        return found


class TimmTrunk(nn.Module):
    """A timm model that gives features; attention is put on its outputs, not between its stages."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")

    def forward(self, x, attention: Sequence[nn.Module]) -> list[Tensor]:
        maps = self.model(x)
        maps = [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else maps
        return [part(m) for part, m in zip(attention, maps, strict=True)]


# %%
class Backbone(nn.Module):
    """Trunk, attention and feature pyramid; parameters are named as in torchvision's.

    Returns:
        Features "0", "1", .., "pool" of shape (B, fpn_channels, H / stride, W / stride).
    """

    def __init__(self, body: nn.Module, attention: nn.ModuleList, fpn: nn.Module, width: int):
        super().__init__()
        self.body, self.attention, self.fpn = body, attention, fpn
        self.out_channels = width  # torchvision's name for it

    def forward(self, x):
        maps = self.body(x, self.attention)
        return self.fpn(OrderedDict((str(level), m) for level, m in enumerate(maps)))


# %%
def build_trunk(config: Config, weights: Path | None) -> nn.Module:
    """The trunk of a recipe, giving features of the pyramid's strides.

    Args:
        config: `backbone` and `pyramid` are read.
        weights: a state dict of torchvision's classifier, or None for random weights.

    Raises:
        ValueError: weights that do not fit, or a stride that it cannot give.
    """
    name = config.backbone
    if name == "resnet10":
        whole = ResNet(BasicBlock, [1, 1, 1, 1])  # arXiv:1512.03385; nobody publishes weights
    else:
        whole = get_model("resnet50" if name.startswith("resnet50_v") else name, weights=None)
    if weights is not None:
        load_classifier(whole, read_weights(weights), name)
    children = dict((whole.features if hasattr(whole, "features") else whole).named_children())
    known = next(names for prefix, names in STAGES.items() if name.startswith(prefix))
    strides = (1, 2, 4, 8, 16) if config.fine_stem else (2, 4, 8, 16, 32)
    stages = [known[strides.index(stride)] for stride in trunk_strides(config)]
    if None in stages:
        raise ValueError(f"pyramid={config.pyramid}: {name} has no features with stride 2.")
    trunk = Trunk(children, stages, known[1:])
    if config.fine_stem:
        refine_stem(trunk)
    if name == "resnet50_v1":
        for block in trunk.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return trunk


# %%
def refine_stem(trunk: nn.Module) -> None:
    """Halves the stride of a stem, weights kept: of a ResNet's pooling, else of the first layer."""
    if hasattr(trunk, "maxpool"):
        trunk.maxpool.stride = 1
        return
    first = next(layer for layer in trunk.modules() if isinstance(layer, nn.Conv2d))
    first.stride = (first.stride[0] // 2, first.stride[1] // 2)
    if first.kernel_size == (4, 4):  # the patches of ConvNeXt now overlap by half
        first.padding = (1, 1)


# %%
def load_classifier(model: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Loads a classifier's state dict; its last layers may be missing or of another size."""
    last = ("fc.", "classifier.")
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(last)}
    state = {key: value for key, value in state.items() if not key.startswith(last)}
    shared = own.keys() & state.keys()
    wrong = {
        "missing": sorted(own.keys() - state.keys()),
        "unknown": sorted(state.keys() - own.keys()),
        "of another shape": sorted(key for key in shared if own[key].shape != state[key].shape),
    }
    if found := ", ".join(f"{what} {keys[:2]}" for what, keys in wrong.items() if keys):
        raise ValueError(
            f"The weights do not fit {name}: {found}; expected those of torchvision's classifier."
        )
    model.load_state_dict(state, strict=False)


# %%
def build_timm_trunk(config: Config, weights: Path | None, attached=ATTACHED_FOLDERS) -> TimmTrunk:
    """A trunk of timm, giving features of the pyramid's strides.

    Args:
        config: `backbone`, `pyramid` and `weights` are read. With `weights="imagenet"` a file
            `<name>.safetensors`, `.pth` or `.bin` is looked for in `attached`, then in the cache of
            the Hugging Face hub, then there.
        weights: a file to take them from, or None.

    Raises:
        WeightsNotFound: they cannot be had.
        ValueError: no such model, or a stride that it cannot give.
    """
    name, strides = config.backbone.removeprefix("timm:"), trunk_strides(config)
    options = dict(strict_img_size=False) if name.startswith("swin") else {}
    files = (attached_file(name + end, attached) for end in (".safetensors", ".pth", ".bin"))
    if config.weights == "imagenet":
        weights = next((path for path in files if path), None)
    try:
        reduction = timm.create_model(name, features_only=True, **options).feature_info.reduction()
    except (RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"backbone={config.backbone!r}: timm gives no features: {error}"
        ) from error
    if missing := set(strides) - set(reduction):
        raise ValueError(f"pyramid={config.pyramid}: {name} has no features with stride {missing}.")
    options |= dict(features_only=True, out_indices=[reduction.index(s) for s in strides])
    if weights is not None:
        options["pretrained_cfg_overlay"] = dict(file=str(weights))
    try:
        model = timm.create_model(name, pretrained=config.weights != "none", **options)
    except (OSError, RuntimeError) as error:
        raise WeightsNotFound(
            f"Weights of {config.backbone} cannot be had ({error}). Turn the internet on, attach "
            f'{name}.safetensors, or set weights to its path. weights="none" is a random start.'
        ) from error
    return TimmTrunk(model)


# %%
def stage_groups(body: nn.Module) -> list[list[nn.Module]]:
    """The trunk's modules in order: the stem, then a group for each stage from stride 4 on."""
    model = body.model if isinstance(body, TimmTrunk) else body
    outputs = body.marks if isinstance(body, Trunk) else list(getattr(model, "return_layers", []))
    if not outputs:
        return [[model]]  # timm does not say which of its children are stages
    groups, waiting = [], []
    for name, child in model.named_children():
        if name in outputs and not groups:
            groups.append(waiting)  # what comes before the first output is the stem
            waiting = []
        waiting.append(child)
        if name in outputs:
            groups.append(waiting)
            waiting = []
    return groups


# %%
def use_group_norm(module: nn.Module) -> None:
    """Puts group normalisation in the place of batch normalisation, affine weights kept."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            use_group_norm(child)
            continue
        new = nn.GroupNorm(math.gcd(32, child.num_features), child.num_features, child.eps)
        new.load_state_dict({"weight": child.weight, "bias": child.bias})
        if isinstance(child, BatchNormAct2d):  # timm's, with an activation behind it
            new = nn.Sequential(new, child.drop, child.act)
        setattr(module, name, new)


def freeze_stages(body: nn.Module, config: Config) -> None:
    """Freezes all but the upper `trained_stages` of the trunk, statistics of norms too.

    Raises:
        ValueError: only a part should be frozen, but timm does not say where its stages begin.
    """
    groups = stage_groups(body)
    if len(groups) == 1 and 0 < config.trained_stages < 5:
        raise ValueError(
            f"trained_stages={config.trained_stages}: timm does not say where the stages of "
            f"{config.backbone} begin; expected 0 or 5."
        )
    frozen = 0 if config.trained_stages == 5 else max(len(groups) - config.trained_stages, 0)
    for module in [module for group in groups[:frozen] for module in group]:
        module.requires_grad_(False)
        names = [name for name, child in body.named_modules() if child is module]
        parent, _, name = names[0].rpartition(".")
        setattr(body.get_submodule(parent), name, freeze_batch_norm_2d(module))


# %%
def build_backbone(config: Config, weights: Path | None) -> Backbone:
    """Builds trunk, attention and pyramid.

    Args:
        config: `backbone`, `weights`, `pyramid`, `attention`, `norm`, `trained_stages` and
            `fpn_channels` are read.
        weights: a file with the trunk's weights, or None; see `build_trunk`, `build_timm_trunk`.
    """
    build = build_timm_trunk if config.backbone.startswith("timm:") else build_trunk
    body = build(config, weights).eval()
    plain = [nn.Identity() for stride in trunk_strides(config)]
    try:
        with torch.no_grad():
            seen = body(torch.zeros(1, 3, 64, 64), plain)
    except AssertionError as error:
        raise ValueError(f"{config.backbone}: takes images of one size only ({error}).") from error
    body.train()
    channels = [int(features.shape[1]) for features in seen]
    if config.norm == "frozen":
        body = freeze_batch_norm_2d(body)
    freeze_stages(body, config)
    attention = nn.ModuleList(ATTENTION[config.attention](c) for c in channels)
    fpn = FeaturePyramidNetwork(
        channels,
        config.fpn_channels,
        LastLevelMaxPool() if len(config.pyramid) > len(channels) else None,
        nn.BatchNorm2d if config.head_norm == "batch" else None,
    )
    return Backbone(body, attention, fpn, config.fpn_channels)
