"""Converts a checkpoint of detectron2's `mask_rcnn_R_50_FPN` for the setting `weights`.

    python -m src_snippets.convert_detectron2 model_final.pkl model.pt

It writes a state dict with the names of our model and prints the settings that it needs. No part of
the notebook. Checkpoints of detectron2's large-scale jitter runs fit `baseline`; the older ones
have no norms in FPN and heads, and see blue first.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
import pickle
import re
import sys

import numpy as np
import torch
from torch import Tensor

# A pattern and what takes its place; later ones see what earlier ones made.
NAMES = (
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


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers and refuses whatever else a pickle may call."""

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
            raise pickle.UnpicklingError(f"the file calls {module}.{name}")
        return super().find_class(module, name)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Reads a state dict from `.pkl` or `.pth` without running code from the file.

    Raises:
        ValueError: it cannot be read safely, or holds something else.
    """
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("model", content)
        state = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()
        }
    except Exception as error:  # of many types; each means a bad file
        raise ValueError(f"{path}: not a checkpoint that can be read safely: {error}") from error
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def required_settings(state: Mapping[str, Tensor]) -> dict:
    """The settings of `Config` that a checkpoint of detectron2 needs.

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


def background_first(rows: Tensor, added: int) -> Tensor:
    """Class rows with the background before them: `added` rows of zeros, or its own, the last."""
    if added:
        return torch.cat([rows.new_zeros((added, *rows.shape[1:])), rows])
    return rows.roll(1, 0)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a checkpoint of detectron2's `mask_rcnn_R_50_FPN`.

    There the background is the last class, here the first. The first layer is made to fit our
    colours and normalisation: the older checkpoints see pixels of 0..255, blue first and not
    divided by their standard deviation.

    Raises:
        ValueError: a name that is not of such a model.
    """
    convs = required_settings(state)["box_convs"]
    made = {}
    for old, value in state.items():
        if old in ("pixel_mean", "pixel_std") or "cell_anchors" in old:
            continue
        name = re.sub(
            r"box_head\.fc(\d)\.", lambda m: f"box_head.{convs - 1 + 2 * int(m[1])}.", old
        )
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if not name.startswith(("backbone.body.", "backbone.fpn.", "rpn.head.", "roi_heads.")):
            raise ValueError(f"{old}: no layer of detectron2's mask_rcnn_R_50_FPN.")
        made[name] = value
        if name.endswith(".running_mean"):
            made[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    rows = {"box_predictor.cls_score": 0, "box_predictor.bbox_pred": 4}
    rows["mask_predictor.mask_fcn_logits"] = 1
    for name, added in rows.items():
        for key in (f"roi_heads.{name}.weight", f"roi_heads.{name}.bias"):
            made[key] = background_first(made[key], added)
    if "backbone.fpn_lateral2.norm.weight" not in state:
        spread = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        made["backbone.body.conv1.weight"] = made["backbone.body.conv1.weight"].flip(1) * spread
    return made


def main(source: str, target: str) -> dict:
    """Converts a file and returns the settings that it needs."""
    state = read_checkpoint(Path(source))
    try:
        settings, made = required_settings(state), convert(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    torch.save({name: value.contiguous() for name, value in made.items()}, target)
    changes = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    print(f"Written: {target}. Settings: weights={target!r}, {changes}")
    return settings


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Use: python -m src_snippets.convert_detectron2 model_final.pkl model.pt")
    main(*sys.argv[1:])
