"""Checkpoints, and the folder and fingerprint of a run."""

# %% [markdown]
# ### Keep each run in a folder of its own
# A run's folder is named after its recipe and a fingerprint of settings, images and the source code
# that trains. The same ones continue it; a change of any of them starts another run and overwrites
# nothing. Settings of prediction (`PREDICTION_SETTINGS`) stay out of the fingerprint, but two of
# them, `channels` and `overlaps`, change the images that are read, and so start another run.

# %%
# @title Fingerprints, checkpoints and trained models
from contextlib import suppress
from dataclasses import asdict, replace
from dis import get_instructions
from hashlib import sha256
import inspect
import json
from pathlib import Path
import re
import shutil

import torch
from torch import nn

from src_snippets.data.samples import CellSamples, subset
from src_snippets.data.structures import coco_ground_truth
from src_snippets.model.mask_rcnn import build_model, load_model_state, to_device
from src_snippets.setup.config import Config
from src_snippets.setup.devices import broadcast
from src_snippets.setup.files import (
    atomic_write,
    load_checkpoint,
    PREDICTION_SETTINGS,
    write_json,
)


def code_digest(*roots) -> str:
    """Digest of the source of functions and classes, and of every global of ours that they load."""
    pending, visited, sources = [("", root) for root in roots], set(), set()
    while pending:
        name, item = pending.pop()
        item = inspect.unwrap(getattr(item, "__func__", getattr(item, "fget", item)))
        is_value = isinstance(item, nn.Module) or not (callable(item) or inspect.ismodule(item))
        if is_value and name[:2] != "__":
            sources.add(f"{name} = {re.sub(' at 0x[0-9a-f]+', '', repr(item))}")
            item = type(item)  # of a module the class too
        if not (inspect.isclass(item) or inspect.isfunction(item)) or item in visited:
            continue
        visited.add(item)
        if item.__module__.split(".")[0] not in ("__main__", __name__.split(".")[0]):
            continue
        if inspect.isclass(item):  # method by method: in a notebook a class has no source
            pending += [*vars(item).items(), *(("", base) for base in item.__bases__)]
            continue
        with suppress(OSError):  # methods that `dataclass` makes have no source
            sources.add(inspect.getsource(item))
        codes = [item.__code__]
        while codes:
            code = codes.pop()
            codes += filter(inspect.iscode, code.co_consts)  # functions inside
            used = {i.argval for i in get_instructions(code) if i.opname == "LOAD_GLOBAL"}
            pending += [(n, item.__globals__[n]) for n in used & item.__globals__.keys()]
    return sha256("\n".join(sorted(sources)).encode()).hexdigest()


def training_settings(config: Config) -> dict:
    """The settings that shape training."""
    settings = {k: v for k, v in asdict(config).items() if k not in PREDICTION_SETTINGS}
    return settings | dict(num_classes=config.num_classes)


def run_folder(out: Path, config: Config, data: dict, code: str) -> Path:
    """`out/runs/<recipe>-<fingerprint>`, made if absent; data: JSON that identifies the images."""
    if (weights := Path(config.weights)).is_file():
        data = data | dict(weights=sha256(weights.read_bytes()).hexdigest())
    text = json.dumps([training_settings(config), data, code], sort_keys=True)
    name = f"{config.recipe}-{sha256(text.encode()).hexdigest()[:8]}"
    (out / "runs" / name).mkdir(parents=True, exist_ok=True)
    return out / "runs" / name


def write_split(folder: Path, split: dict[str, list[str]], samples: CellSamples) -> None:
    """Write a run's `split.json` and the ground truth of its parts, COCO: `train_gt.json`, .."""
    write_json(split, folder / "split.json")
    for part, names in split.items():
        truth = coco_ground_truth(subset(samples, names), samples.dataset.categories)
        write_json(truth, folder / f"{part}_gt.json")


def save_checkpoint(content: dict, path: Path) -> None:
    """Write a checkpoint whole or not at all: the one that is there stays until then."""
    with atomic_write(path) as partial:
        try:
            torch.save(content, partial)
        except (OSError, RuntimeError) as error:  # torch raises either on a full disk
            message = f"{path}: cannot be written ({error}). Free some space and run again: "
            raise OSError(f"{message}the checkpoint before it is kept.") from error


def copy_newer(source: Path, target: Path) -> None:
    """Copy files of a run that `target` lacks or has in an older version, `last.pt` last."""
    for path in sorted(source.glob("[!.]*.[pc]*")):  # best.pt, history.csv, last.pt
        copy = target / path.name
        if not copy.exists() or copy.stat().st_mtime < path.stat().st_mtime:
            with atomic_write(copy) as partial:
                shutil.copy2(path, partial)


def open_run(folder: Path, local: Path, resume: bool) -> dict | None:
    """`last.pt` of a run, the newer one, if any; `resume=False` puts all checkpoints aside."""
    for each in (folder, local):
        each.mkdir(parents=True, exist_ok=True)
        for path in () if resume else each.glob("*.pt"):
            path.replace(path.with_suffix(".old"))
    copy_newer(folder, local)
    return load_checkpoint(local / "last.pt") if (local / "last.pt").exists() else None


def check_same_settings(saved: Config, config: Config, path: Path, same: bool = True) -> None:
    """Raise ValueError where what shapes training, else (`same=False`) the classes, differ."""
    before, now = (asdict(each) | training_settings(each) for each in (saved, config))
    moved = {a for a, b in zip(saved.class_names, config.class_names, strict=False) if a != b}
    names = ["class_names" if moved & {*config.class_names} else "num_classes"]
    names = training_settings(config) if same else names
    if differ := [k for k in names if before[k] != now[k]]:
        pairs = ", ".join(f"{k}={before[k]!r} (now {now[k]!r})" for k in differ)
        raise ValueError(f"{path}: made with other settings: {pairs}. Correct or leave it out.")


def load_trained(path: Path, config: Config, same: bool = True) -> nn.Module:
    """The model of a checkpoint, trained as `config` unless `same=False`, on the device."""
    state = broadcast(load_checkpoint, path)
    check_same_settings(state["config"], config, path, same)
    names = PREDICTION_SETTINGS if same else (*PREDICTION_SETTINGS, "precision")
    own = replace(state["config"], **{name: getattr(config, name) for name in names})
    model = build_model(own, load_initial=False)
    load_model_state(model, state["model"])
    return to_device(model).eval()
