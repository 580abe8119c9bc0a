"""Weights to start from: where they are found, how they are read, and detectron2's names."""

# %% [markdown]
# ## Where do the first weights come from?
# They are looked for on disk first, so that the notebook works with the internet off; a run never
# starts from random weights unless `weights="none"` says so. Reading runs no code from a file.

# %%
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
import pickle
import re

import numpy as np
from safetensors.torch import load_file
import torch
from torch import Tensor

from src_snippets.config import Config


# %%
class WeightsNotFound(FileNotFoundError):
    """Asked-for weights cannot be had; the message says where they were looked for."""


ATTACHED_FOLDERS = ("/kaggle/input",)


def attached_file(name: str, attached: Sequence[str]) -> Path | None:
    """The first file of a name below some folders, at any depth."""
    return next((path for folder in attached for path in Path(folder).rglob(name)), None)


# %%
def find_weights(published, attached: Sequence[str] = ATTACHED_FOLDERS) -> Path:
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
    if path := attached_file(name, attached):
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
class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers, and refuses whatever else a pickle may ask for."""

    allowed = (
        "numpy.ndarray",
        "numpy.dtype",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "collections.OrderedDict",
        "_codecs.encode",
    )

    def find_class(self, module, name):
        module = module.replace("numpy.core.", "numpy._core.")  # as older NumPy wrote it
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict:
    """The content of a pickle, with tensors in place of arrays. Raises UnpicklingError."""
    with path.open("rb") as file:
        content = ArrayUnpickler(file, encoding="latin1").load()
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    arrays = content.items() if isinstance(content, dict) else []
    return {k: torch.from_numpy(np.array(v)) for k, v in arrays if isinstance(v, np.ndarray)}


# %%
def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without running any code from the file, and tells which it is.

    Returns:
        Names to tensors; of a checkpoint of this notebook or of detectron2, its model.

    Raises:
        WeightsNotFound: there is no such file.
        ValueError: the file holds something else.
    """
    if not Path(path).is_file():
        raise WeightsNotFound(
            f"weights={str(path)!r}: no such file. Expected imagenet, coco, none or the path of a "
            "state dict (.pth, .pt, .safetensors, .pkl)."
        )
    try:
        if Path(path).suffix == ".safetensors":
            content = load_file(path)
        elif Path(path).suffix == ".pkl":
            content = read_pickle(Path(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types; each means a bad file
        raise ValueError(f"{path}: not a state dict that can be loaded safely ({error})") from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: expected a state dict, names to tensors.")
    print(f"first weights: {path}")
    return state


# %% [markdown]
# Checkpoints of detectron2's `mask_rcnn_R_50_FPN` have the same layers under other names. Those of
# its large-scale jitter runs fit `baseline`; the older ones have no norms in pyramid and heads, and
# see blue first.

# %%
DETECTRON2_NAMES = (  # a pattern, and what takes its place; later ones see what earlier ones made
    (r"^backbone\.bottom_up\.stem\.", "backbone.body."),
    (r"^backbone\.bottom_up\.res(\d)\.", lambda m: f"backbone.body.layer{int(m[1]) - 1}."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
    (r"(body\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"\.fpn_lateral(\d)\.", lambda m: f".fpn.inner_blocks.{int(m[1]) - 2}.0."),
    (r"\.fpn_output(\d)\.", lambda m: f".fpn.layer_blocks.{int(m[1]) - 2}.0."),
    (r"^proposal_generator\.rpn_head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.head.conv.\1.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.head.bbox_pred."),
    (r"box_head\.conv(\d)\.", lambda m: f"box_head.{int(m[1]) - 1}.0."),
    (r"mask_head\.mask_fcn(\d)\.", lambda m: f"mask_head.{int(m[1]) - 1}.0."),
    (r"mask_head\.deconv\.", "mask_predictor.conv5_mask."),
    (r"mask_head\.predictor\.", "mask_predictor.mask_fcn_logits."),
    (r"\.0\.norm\.", ".1."),
)


# %%
def is_detectron2(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has detectron2's names."""
    return any(name.startswith("backbone.bottom_up.") for name in state)


def detectron2_settings(state: Mapping[str, Tensor]) -> dict:
    """The settings of `Config` that a checkpoint of detectron2 fits.

    Raises:
        ValueError: it is of another model, without masks for example.
    """
    needed = ("backbone.fpn_lateral2", "roi_heads.box_head.fc1", "roi_heads.mask_head.predictor")
    if missing := [name for name in needed if f"{name}.weight" not in state]:
        raise ValueError(f"No {missing[0]}: expected detectron2's mask_rcnn_R_50_FPN.")
    parts = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    count = Counter(re.sub(r"\d+$", "", name) for name in parts)
    newer = "backbone.fpn_lateral2.norm.weight" in state
    return dict(
        backbone="resnet50" if newer else "resnet50_v1",
        fpn_channels=len(state["backbone.fpn_lateral2.weight"]),
        head_norm="batch" if newer else "none",
        rpn_convs=count["proposal_generator.rpn_head.conv.conv"] or 1,
        box_convs=count["roi_heads.box_head.conv"],
        box_layers=count["roi_heads.box_head.fc"],
        box_features=len(state["roi_heads.box_head.fc1.weight"]),
        mask_convs=count["roi_heads.mask_head.mask_fcn"],
    )


# %%
def from_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a checkpoint of detectron2's `mask_rcnn_R_50_FPN`; see `detectron2_settings`.

    There the background is the last class, here the first. Its first layer is made to fit the
    colours and the normalisation of ours: pixels of 0..255, blue first and not divided by their
    spread in the older checkpoints.

    Raises:
        ValueError: a name that is not of such a model.
    """
    convs = detectron2_settings(state)["box_convs"]
    made = {}
    for old, value in state.items():
        if old in ("pixel_mean", "pixel_std") or "cell_anchors" in old:
            continue
        name = re.sub(
            r"box_head\.fc(\d)\.", lambda m: f"box_head.{convs - 1 + 2 * int(m[1])}.", old
        )
        for pattern, ours in DETECTRON2_NAMES:
            name = re.sub(pattern, ours, name)
        if not name.startswith(("backbone.body.", "backbone.fpn.", "rpn.head.", "roi_heads.")):
            raise ValueError(f"{old}: no layer of detectron2's mask_rcnn_R_50_FPN.")
        made[name] = value
        if name.endswith(".running_mean"):
            made[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    ends = {"box_predictor.cls_score": 0, "box_predictor.bbox_pred": 4}
    ends["mask_predictor.mask_fcn_logits"] = 1
    for name, rows in ends.items():
        for key in (f"roi_heads.{name}.weight", f"roi_heads.{name}.bias"):
            made[key] = background_first(made[key], rows)
    if "backbone.fpn_lateral2.norm.weight" not in state:
        spread = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        made["backbone.body.conv1.weight"] = made["backbone.body.conv1.weight"].flip(1) * spread
    return made


# %%
def fit_detectron2(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """`from_detectron2` for a model of these settings; ValueError names the file `weights`."""
    try:
        wanted, made = detectron2_settings(state), from_detectron2(state)
    except ValueError as error:
        raise ValueError(f"{config.weights}: {error}") from error
    if differ := {k: v for k, v in wanted.items() if getattr(config, k) != v}:
        raise ValueError(f"{config.weights}: of detectron2; to load it, set {differ}.")
    return made


# %%
def background_first(rows: Tensor, added: int) -> Tensor:
    """Class rows with the background before them: `added` rows of zeros, or its own, the last."""
    if added:
        return torch.cat([rows.new_zeros((added, *rows.shape[1:])), rows])
    return rows.roll(1, 0)
