"""Feature extractors with a feature pyramid, and the search for their weights."""

# %% [markdown]
# ## Which trunk, and where do its weights come from?
# A trunk trained on ImageNet, with a feature pyramid (FPN, arXiv:1612.03144) on top. Weights are
# looked for on disk first, so that the notebook works with the internet off; a run never starts
# from random weights unless `weights="none"` says so.

# %%
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn, Tensor
from torchvision.models import mobilenet_v2, MobileNet_V2_Weights, resnet50, ResNet50_Weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet

from src_snippets.config import Config


# %%
def build_resnet10(weights=None) -> nn.Module:
    """A ResNet with one basic block a stage (arXiv:1512.03385); nobody publishes weights for it."""
    return ResNet(BasicBlock, [1, 1, 1, 1])


# Constructor, published ImageNet weights, features with strides 4, 8, 16, 32, their channels.
TRUNKS = {
    "resnet50": (
        resnet50,
        ResNet50_Weights.IMAGENET1K_V1,
        ("layer1", "layer2", "layer3", "layer4"),
        (256, 512, 1024, 2048),
    ),
    "mobilenet_v2": (
        mobilenet_v2,
        MobileNet_V2_Weights.IMAGENET1K_V1,
        ("3", "6", "13", "17"),
        (24, 32, 96, 320),
    ),
    "resnet10": (
        build_resnet10,
        None,
        ("layer1", "layer2", "layer3", "layer4"),
        (64, 128, 256, 512),
    ),
}
COCO_WEIGHTS = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1


# %%
class WeightsNotFound(FileNotFoundError):
    """Asked-for weights cannot be had; the message says where they were looked for."""


def find_weights(published, attached: Sequence[str] = ("/kaggle/input",)) -> Path:
    """Finds published weights on disk, else downloads them.

    Args:
        published: a member of a torchvision weights enum.
        attached: folders that are searched at any depth for a file of the published name.

    Returns:
        The path of the file.

    Raises:
        WeightsNotFound: neither on disk nor to be downloaded.
    """
    name = published.url.rsplit("/", 1)[-1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.is_file():
        return cached
    for folder in attached:
        if path := next(Path(folder).rglob(name), None):
            return path
    cached.parent.mkdir(parents=True, exist_ok=True)
    digest = name.rsplit("-", 1)[-1].removesuffix(".pth")
    try:
        torch.hub.download_url_to_file(published.url, str(cached), hash_prefix=digest)
    except (OSError, RuntimeError) as error:
        looked = "\n".join(["", str(cached), *(f"{folder}/**/{name}" for folder in attached)])
        raise WeightsNotFound(
            f"Weights {published} are not on this machine and cannot be downloaded ({error}). "
            f"Looked for:{looked}\nOn Kaggle, add {name} as an input or turn the internet on; "
            f"elsewhere, put the file from {published.url} in one of these places or set "
            'weights to its path. weights="none" starts from random weights.'
        ) from error
    return cached


# %%
def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without running any code from the file.

    Returns:
        Names to tensors; of a checkpoint of this notebook, its model.

    Raises:
        WeightsNotFound: there is no such file.
        ValueError: the file holds something else.
    """
    if not Path(path).is_file():
        raise WeightsNotFound(
            f"weights={str(path)!r}: no such file. Expected imagenet, coco, none or the path of a "
            "state dict (.pth, .pt)."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types; each means a bad file
        raise ValueError(f"{path}: not a state dict that can be loaded safely ({error})") from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict, names to tensors.")
    return state


# %%
def build_backbone(config: Config, state: dict[str, Tensor] | None) -> BackboneWithFPN:
    """Builds trunk and pyramid.

    Args:
        config: `backbone` and `fpn_channels` are read.
        state: a state dict of the trunk as torchvision's classifier, or None.

    Returns:
        A module from images (B, 3, H, W) to features "0", "1", "2", "3", "pool" with strides 4, 8,
        16, 32, 64, of shape (B, fpn_channels, H / stride, W / stride).

    Raises:
        ValueError: `state` does not fit the trunk; its classifier may be missing.
    """
    build, _, stages, channels = TRUNKS[config.backbone]
    trunk = build(weights=None)
    if state is not None:
        missing, unexpected = trunk.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith(("fc.", "classifier."))]
        if missing or unexpected:
            raise ValueError(
                f"The weights do not fit {config.backbone}: missing {missing[:3]}, "
                f"unknown {unexpected[:3]}; expected those of torchvision's classifier."
            )
    body = trunk.features if config.backbone == "mobilenet_v2" else trunk
    levels = {stage: str(level) for level, stage in enumerate(stages)}
    return BackboneWithFPN(
        body, levels, list(channels), config.fpn_channels, norm_layer=nn.BatchNorm2d
    )
