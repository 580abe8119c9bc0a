"""Checkpoints and the folders of runs."""

# %% [markdown]
# ## Where is a run kept?
# A run has a folder of its own, named after its recipe and a fingerprint of settings and images:
# changed settings never overwrite an earlier run, and the same ones continue it. The fingerprint is
# free of the settings below; what `overlaps` does to the truth shows in the images'.

# %%
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
import hashlib
import json
from pathlib import Path
import shutil

import torch

from src_snippets.config import checked_changes, Config
from src_snippets.places import written_whole
from src_snippets.processes import from_first
from src_snippets.readers import BadInput

# %%
NOT_TRAINED = (
    "cache_gb",
    "workers",
    "gpus",
    "score_floor",
    "mask_threshold",
    "box_nms",
    "class_nms",
    "mask_nms",
    "fusion_iou",
    "least_area",
    "rescore",
    "tile",
    "tile_batch",
    "test_views",
    "test_scales",
    "vote",
    "overlaps",
    "fold",
    "detections",
    "show_floor",
    "tune",
    "max_hours",
    "class_names",
    "um_per_px",
)


# %%
def run_folder(out: Path, config: Config, data: dict) -> Path:
    """The folder of a run: `out/runs/<recipe>-<fingerprint>`, made if absent.

    Args:
        data: anything JSON that tells the images apart, such as the split.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_TRAINED}
    text = json.dumps([settings, data], sort_keys=True)
    name = f"{config.recipe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    folder = out / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def epochs_done(folder: Path) -> int:
    """How many epochs of a run its `history.csv` has."""
    path = folder / "history.csv"
    return max(len(path.read_text().splitlines()) - 1, 0) if path.is_file() else 0


# %%
def save_checkpoint(content: dict, path: Path, before: Path | None = None) -> None:
    """Writes a checkpoint, whole or not at all; the one that is there moves to `before`.

    Raises:
        OSError: it cannot be written; what was there is kept.
    """
    with written_whole(path) as partial:
        try:
            torch.save(content, partial)
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            free = shutil.disk_usage(path.parent).free / 1e9
            raise OSError(
                f"{path}: cannot be written ({error}); {free:.1f} GB are free. What was written "
                "before is kept: make room and run again."
            ) from error
        if before and path.exists():
            path.replace(before)


# %%
def load_checkpoint(path: Path) -> dict:
    """Reads a checkpoint without running any code from it.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: is not there; expected a best.pt of this notebook. Correct the path."
        ) from error
    except Exception as error:  # the unpickler raises many types; each means a bad file
        raise BadInput(
            f"{path}: not a checkpoint, or a damaged one ({error}). Correct the path; one in the "
            "folder of this run may be removed: it is trained anew."
        ) from error
    if not isinstance(state, dict) or not {"model", "config"} <= set(state):
        raise BadInput(f"{path}: not a checkpoint of this notebook, such as its best.pt.")
    return state


# %%
def latest_state(folder: Path) -> dict | None:
    """The newest whole checkpoint of a run, None where there is none.

    `last.pt`, or `before.pt`, the one before it, where that is damaged or missing: a session may
    end, or a disk fill up, while it is written.

    Raises:
        BadInput: there is one, but none is whole.
    """
    last, before = folder / "last.pt", folder / "before.pt"
    if last.exists():
        try:
            return load_checkpoint(last)
        except BadInput as error:
            if not before.exists():
                raise
            print(f"damaged, the checkpoint before it is taken: {error}")
    if not before.exists():
        return None
    state = load_checkpoint(before)
    last.unlink(missing_ok=True)  # or it would take the place of the good one
    return state


# %%
def check_same_settings(saved: dict, config: Config, path: Path) -> None:
    """Raises ValueError where a checkpoint was made with other settings that shape training."""
    now = asdict(config)
    if differ := [k for k in now if k not in NOT_TRAINED and saved.get(k) != now[k]]:
        shown = ", ".join(f"{k}={saved.get(k)!r} (now {now[k]!r})" for k in differ)
        raise ValueError(
            f"{path}: made with other settings: {shown}. Run the cells from the settings on, so "
            "that they get a run of their own."
        )


def as_config(saved: Mapping) -> Config:
    """The settings in a checkpoint; those that are no more are left out, new ones as by default."""
    known = {item.name for item in fields(Config)}
    return Config(**{name: value for name, value in saved.items() if name in known})


def saved_settings(path: Path, changes: Mapping) -> Config:
    """The settings that a checkpoint was made with, those of prediction changed.

    Raises:
        FileNotFoundError, BadInput: see `load_checkpoint`.
        ValueError: a change of what shaped the training, or one that is not valid.
    """
    if shaped := sorted(set(changes) - set(NOT_TRAINED)):
        raise ValueError(
            f"Setting {shaped[0]}: {path} was trained with another; without training only settings "
            f"of prediction can be changed: {', '.join(NOT_TRAINED)}."
        )
    own = as_config(from_first(load_checkpoint, path)["config"])
    return replace(own, precision="auto", **checked_changes(changes))  # here, not where it was made
