"""Backbones of timm with an FPN, and the weights they start from."""

# %% [markdown]
# ### Build the backbone and the FPN
# A backbone of timm with ImageNet weights extracts features; a feature pyramid (FPN,
# arXiv:1612.03144) merges them at strides 4 to 64. Weights are looked for below `/kaggle/input`,
# then downloaded, never left random unless `weights="none"` says so. If only ImageNet-1k is allowed
# name them in full (`timm:convnextv2_tiny.fcmae_ft_in1k`): bare names may mean in12k, in22k, jft.

# %%
# @title Attention, backbone, FPN and initial weights
from functools import partial
from itertools import pairwise
from pathlib import Path

import timm
import torch
from torch import nn, Tensor
from torchvision import ops

from src_snippets.setup.config import Config, require


class Attention(nn.Module):
    """timm's SE or CBAM (arXiv:1709.01507, arXiv:1807.06521), the identity at the start."""

    def __init__(self, kind: str, channels: int):
        super().__init__()
        self.gates = dict(se=timm.layers.SEModule, cbam=timm.layers.cbam.CbamModule)[kind](channels)
        self.factor = dict(se=2, cbam=4)[kind]  # since zeros leave each gate half open
        for last in (p for name, p in self.named_parameters() if "fc2" in name or "bn" in name):
            nn.init.zeros_(last)

    def forward(self, x):
        return self.factor * self.gates(x)

    def replace_output(self, stage, inputs, output):
        """A forward hook of a stage, so that the names of pretrained parameters stay."""
        return self(output)


STRIDES = [4, 8, 16, 32]  # of the backbone's features; the FPN adds 64
ALIASES = {  # short names for models of timm
    "resnet10": "resnet18",  # with one block per stage
    "resnet50_v1": "resnet50",  # with the stride in a block's first convolution, as in detectron2
    **{f"resnet{depth}": f"resnet{depth}.tv_in1k" for depth in (18, 34, 50, 101)},
    **{f"convnext_{size}": f"convnext_{size}.fb_in1k" for size in ("tiny", "small", "base")},
}


def find_weights_file(names, folders=("/kaggle/input",)) -> Path | None:
    """The first file with one of these names below the folders, at any depth."""
    return next((p for folder in folders for name in names for p in Path(folder).rglob(name)), None)


def read_state_dict(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict, or that of a checkpoint, without running code from the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: no such file, nor imagenet, coco or none.")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        valid = state and all(isinstance(value, Tensor) for value in state.values())
        require(valid, "expected names to tensors")
    except Exception as error:  # of many types; each means a bad file
        raise ValueError(f"{path}: not a state dict that can be read safely: {error}") from error
    print(f"Initial weights: {path}")
    return state


def backbone_stages(body: nn.Module) -> list[list[nn.Module]]:
    """Modules of the stem and of the four stages; one group where timm does not name the stages."""
    ends, modules = [name.replace(".", "_") for name in body.feature_info.module_name()], {}
    for name, child in body.named_children():
        inner = {f"{name}_{key}": module for key, module in child.named_children()}
        modules |= inner if inner.keys() & set(ends) else {name: child}
    if not set(ends) <= modules.keys():
        return [list(body.children())]
    order = list(modules)
    cuts = [0, order.index(ends[0]), *(order.index(end) + 1 for end in ends)]
    return [[modules[name] for name in order[i:j]] for i, j in pairwise(cuts)]


class Backbone(nn.Module):
    """A timm backbone, attention and the FPN; ResNets have torchvision's parameter names.

    Images (B, 3, H, W) -> "0".."3", "pool", (B, out_channels, H / stride, W / stride), strides 4 to
    64. `mean` and `std` are those of the images it was trained on.
    """

    def __init__(self, body: nn.Module, config: Config):
        super().__init__()
        self.body, self.out_channels = body, config.fpn_channels
        channels = body.feature_info.channels()
        attend = partial(Attention, config.attention) if config.attention != "none" else nn.Identity
        self.attention = nn.ModuleList(attend(width) for width in channels)
        norm = nn.BatchNorm2d if config.head_norm == "batch" else None
        top = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork(channels, self.out_channels, top, norm)
        self.mean, self.std = (tuple(body.pretrained_cfg[key]) for key in ("mean", "std"))
        self.is_nhwc = str(getattr(body, "output_fmt", "")).endswith("NHWC")
        stages = [] if self.is_nhwc or config.attention == "none" else backbone_stages(body)[1:]
        self.attends_inside = bool(stages)
        for stage, attention in zip(stages, self.attention, strict=False):
            stage[-1].register_forward_hook(attention.replace_output)

    def forward(self, x):
        maps = self.body(x)
        maps = [features.permute(0, 3, 1, 2) for features in maps] if self.is_nhwc else maps
        if not self.attends_inside:
            maps = [attention(m) for attention, m in zip(self.attention, maps, strict=True)]
        return self.fpn({str(level): features for level, features in enumerate(maps)})


def build_backbone(config: Config, load_initial: bool = True) -> Backbone:
    """Build backbone and FPN with the weights of the settings ("coco": see `build_model`).

    Raises FileNotFoundError; ValueError for a file or a model of timm that does not fit.
    """
    name = ALIASES.get(config.backbone, config.backbone.removeprefix("timm:"))
    weights = config.weights if load_initial else "none"
    cfg = timm.models.get_pretrained_cfg(name)
    names = [f"{name}.safetensors", f"{name}.pth", f"{name}.bin"]
    names += [Path(cfg.url).name] if cfg and cfg.url else []
    file = find_weights_file(names) if weights == "imagenet" else weights
    state = {} if file in (None, "none") else read_state_dict(file)
    options = dict(features_only=True, out_indices=(-4, -3, -2, -1))
    options["strict_img_size"] = False if name.startswith("swin") else None  # timm drops None
    options["drop_path_rate"] = config.drop_path or None
    if config.backbone == "resnet10":  # from random weights last norms of 1, as torchvision's, gain
        options |= dict(layers=(1, 1, 1, 1), zero_init_last=False)
    options["pretrained_cfg_overlay"] = dict(file=str(file)) if state else None
    try:
        if weights == "imagenet" and config.backbone in ("resnet10", "resnet50_v1"):
            raise LookupError("nobody publishes these weights")
        body = timm.create_model(name, weights != "none", **options)
        issue = f"no features with strides {STRIDES}"
        require(body.feature_info.reduction() == STRIDES, issue)
        for features, s in zip(body.eval()(torch.zeros(1, 3, 128, 192)), STRIDES, strict=True):
            require({128 // s, 192 // s} <= {*features.shape}, issue)  # inception_v3 pads nothing
        body.train()
        # timm skips names that it does not know: compare the number and the maximum of the values.
        values = {(v.numel(), v.max().item()) for v in state.values() if v.numel()}
        own = {key: (v.numel(), v.max().item()) for key, v in body.named_parameters()}
        if state and (missing := [key for key, value in own.items() if value not in values]):
            raise LookupError(f"{len(missing)} parameters are not in the file: {missing[:3]}")
    except Exception as error:  # timm and the Hugging Face hub raise many types
        raise (FileNotFoundError if weights == "imagenet" else ValueError)(
            f"backbone={config.backbone!r}, weights={weights!r}: {error}. Files looked for below "
            f"/kaggle/input: {', '.join(names)}. Attach one of them, turn the internet on, or set "
            "weights to a path; weights='none' starts from random weights."
        ) from error
    if config.backbone == "resnet50_v1":
        for block in (m for m in body.modules() if isinstance(m, timm.models.resnet.Bottleneck)):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    if config.norm == "frozen":
        for norm in (module for module in body.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.requires_grad_(False)
            norm.register_forward_pre_hook(lambda norm, _: setattr(norm, "training", False))
    return Backbone(body, config)
