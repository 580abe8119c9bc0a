"""Files: where results go, how they are written whole; checkpoints read back."""

# %%
# @title Files: output folder, atomic writing, tables; read a checkpoint
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
import json
import os
from pathlib import Path
import traceback

import IPython
import numpy as np
import pandas as pd
import torch

from src_snippets.setup.config import BadInput, change_config, Config, require

KAGGLE_WORKING = Path("/kaggle/working")  # exists on Kaggle, whose sessions keep what is in it
DRIVE = Path("/content/drive")  # where Colab mounts a Google Drive
FREE_SETTINGS = ("cache_gb", "workers", "gpus", "max_hours", "fold", "class_names")
FREE_SETTINGS += ("um_per_px", "export_score_threshold")  # no new predictions
PREDICTION_SETTINGS = ("channels", "score_threshold", "mask_threshold", "box_nms", "detections")
PREDICTION_SETTINGS += ("overlaps", "fusion_iou", "tile", "tta", *FREE_SETTINGS)


@contextmanager
def keep_going(part: str):
    """Show an error of an optional part, and go on after it."""
    try:
        yield
    except Exception:  # of any kind: the submission is written, and no figure may cost the rest
        print(f"{part} failed; the rest goes on.\n{traceback.format_exc()}")


def show_table(table: pd.DataFrame) -> None:
    """Show a table in a notebook, print it in a script; `-` for what is not defined."""
    if IPython.get_ipython() is None:
        print(table.to_string(na_rep="-", float_format="{:.3f}".format))
    else:
        pd.set_option("styler.html.mathjax", False)  # "$" in a name begins no formula
        style = table.style.format_index(escape="html").format_index(escape="html", axis="columns")
        IPython.display.display(style.format(precision=3, na_rep="-", escape="html"))


@contextmanager
def atomic_write(path: Path):
    """Yield a partial path, flushed to disk and renamed to `path` unless the block raises."""
    partial = path.with_name(f".{path.name[-40:]}.partial")  # names have at most 255 bytes
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(content, path: Path) -> None:
    """Write JSON, of arrays too; see `atomic_write`. NaN and infinity raise ValueError."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, allow_nan=False, default=np.ndarray.tolist))


def output_folder(out: str) -> Path:
    folder = Path(out or (KAGGLE_WORKING if KAGGLE_WORKING.is_dir() else "results")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint and its `Config` without running code from it; BadInput if it is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state | dict(model=state["model"], config=Config(**state["config"]))  # or KeyError
    except Exception as error:  # of many types; each means a file that cannot be used
        issue = f"{path}: expected a best.pt of this version of the notebook, undamaged ({error!r})"
        raise BadInput(f"{issue}. Correct the path; in OUT set RESUME = False.") from error


def saved_config(path: Path, changes: Mapping) -> Config:
    """A checkpoint's settings (no `um_per_px`, `precision`), changed for prediction; BadInput."""
    shaping = sorted(set(changes) - {*PREDICTION_SETTINGS, "precision"})
    require(not shaping, f"Settings {shaping}: without training only {PREDICTION_SETTINGS} change.")
    config = load_checkpoint(path)["config"]
    print(f"nothing to train: the recipe and its settings are those of {path}")
    return change_config(replace(config, precision="auto", um_per_px=0.0), changes)
