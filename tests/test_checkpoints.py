from dataclasses import asdict, dataclass, fields, replace
import linecache
import os
from pathlib import Path
import subprocess
import sys

import pytest
import torch

from src_snippets.setup.config import Config, make_config
from src_snippets.setup.files import saved_config
from src_snippets.training.checkpoints import (
    check_same_settings,
    code_digest,
    copy_newer,
    load_checkpoint,
    open_run,
    PREDICTION_SETTINGS,
    run_folder,
    save_checkpoint,
)
from src_snippets.training.trainer import Trainer
from tests.conftest import ROOT


def content(config=None, **more):
    return dict(model={"w": torch.ones(2)}, config=asdict(config or make_config("demo"))) | more


def test_saved_config_with_changes_of_prediction(tmp_path):
    config, path = make_config("demo", class_names=["a", "b"], epochs=7), tmp_path / "best.pt"
    save_checkpoint(content(config), path)
    assert saved_config(path, {}) == config
    save_checkpoint(content(replace(config, um_per_px=0.25)), path)  # of the training images
    assert [saved_config(path, c).um_per_px for c in ({}, {"um_per_px": 0.5})] == [0, 0.5]
    changed = saved_config(path, {"detections": 5, "export_score_threshold": 0.25})
    assert changed == replace(config, detections=5, export_score_threshold=0.25)
    save_checkpoint(content(replace(config, precision="bf16")), path)  # of a GPU that has it
    assert saved_config(path, {}) == config
    with pytest.raises(
        ValueError, match=r"Settings \['epochs'\]: without training only .*detections.* change"
    ):
        saved_config(path, {"epochs": 3})
    with pytest.raises(ValueError, match="detections='many': expected int"):
        saved_config(path, {"detections": "many"})


def test_settings_of_prediction_are_fields():
    assert set(PREDICTION_SETTINGS) < {item.name for item in fields(Config)}


class RunsCode:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    "wrong", [[1, 2], {"conv.weight": torch.ones(1)}, {"model": RunsCode(), "config": {}}, "other"]
)
def test_other_files_are_refused_and_run_no_code(tmp_path, wrong, capsys):
    path = tmp_path / "best.pt"
    if wrong == "other":  # of a version of the notebook with another setting
        wrong = content()
        wrong["config"]["rois"] = 3
    torch.save(wrong, path)
    with pytest.raises(ValueError, match=r"best\.pt: expected a best\.pt of this version"):
        load_checkpoint(path)
    assert "must never run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"absent\.pt: .*No such file"):
        load_checkpoint(tmp_path / "absent.pt")


def test_checkpoints_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(content(epoch=1), path)
    with pytest.raises(AttributeError):  # what cannot be pickled leaves the file that was there
        save_checkpoint(content(f=lambda: None), path)
    number = path.stat().st_ino
    save_checkpoint(content(epoch=2), path)
    assert path.stat().st_ino != number  # renamed, not copied into the old file
    assert load_checkpoint(path)["epoch"] == 2

    def full_disk(_, partial):
        partial.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"last\.pt: cannot be written .*Free some space"):
        save_checkpoint(content(epoch=3), path)
    assert load_checkpoint(path)["epoch"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_the_checkpoint_of_a_run(tmp_path):
    last = tmp_path / "last.pt"
    assert open_run(tmp_path, tmp_path, resume=True) is None
    save_checkpoint(content(epoch=1), last)
    assert open_run(tmp_path, tmp_path, resume=True)["epoch"] == 1
    last.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"last\.pt: expected .*in OUT set RESUME = False"):
        open_run(tmp_path, tmp_path, resume=True)
    (tmp_path / "best.pt").touch()
    (tmp_path / "notes.txt").touch()
    assert open_run(tmp_path, tmp_path, resume=False) is None
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "best.old", "last.old"}


def test_the_newer_checkpoint_of_a_run_and_its_local_disk(tmp_path):
    folders = tmp_path / "drive", tmp_path / "local"
    assert open_run(*folders, resume=True) is None
    for epoch, folder in enumerate(folders, start=1):
        save_checkpoint(content(epoch=epoch), folder / "last.pt")
        os.utime(folder / "last.pt", (epoch, epoch))
        assert open_run(*folders, resume=True)["epoch"] == epoch
    os.utime(folders[0] / "last.pt", (3, 3))  # another machine went on
    assert open_run(*folders, resume=True)["epoch"] == 1
    inode = (folders[0] / "last.pt").stat().st_ino
    (folders[1] / ".last.pt.partial").touch()  # of a kill
    copy_newer(*reversed(folders))
    assert [path.name for path in folders[0].iterdir()] == ["last.pt"]
    assert (folders[0] / "last.pt").stat().st_ino == inode  # of equal times nothing is copied
    assert open_run(*folders, resume=False) is None
    assert not list(tmp_path.rglob("*.pt"))


def test_checkpoints_of_an_ensemble_have_the_classes_in_this_order():
    config = make_config("demo", class_names=["a", "b"])
    for names in (("a", "b"), ("nucleus", "other"), ("a", "other")):  # or other names for them
        saved = replace(config, class_names=names, lr=0.5)
        check_same_settings(saved, config, Path("best.pt"), same=False)
    for names in (("b", "a"), ("a", "b", "c"), ("c", "a")):
        saved = replace(config, class_names=names)
        with pytest.raises(ValueError, match=r"best\.pt: made with other settings"):
            check_same_settings(saved, config, Path("best.pt"), same=False)


def test_run_folders_tell_settings_data_and_code_apart(tmp_path):
    config = make_config("demo")

    def name(config=config, data=("a",), code="x"):
        return run_folder(tmp_path, config, dict(data=data), code).name

    assert name().startswith("demo-")
    start = tmp_path / "start.pt"
    from_file, names = replace(config, weights=str(start)), set()
    for content in (b"one", b"other"):
        start.write_bytes(content)
        names.add(name(config=from_file))
    assert len(names) == 2
    assert (tmp_path / "runs" / name()).is_dir()
    renamed = replace(config, class_names=("p", "q", "r", "s"), score_threshold=0.3, workers=2)
    assert name() == name(renamed)
    fewer = replace(config, class_names=("p", "q", "r"))
    others = [name(replace(config, lr=1e-5)), name(fewer), name(data=["b"]), name(code="y")]
    assert len({name(), *others}) == 5


# The digest of code, of cells as a notebook runs them

CELLS = {
    "limit": "LIMIT = 3",
    "table": 'TABLE = {"a": [1, 2]}',
    "part": (
        "from torch import nn\nfrom torchvision.transforms import v2\n"
        "class Part(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
        "PARTS = [v2.RandomErasing(p=0.1)]\nPART = Part()\n"
        "import torch\nWEIGHTS = torch.tensor([1.0, 5.0])"
    ),
    "leaf": "def leaf(x):\n    return PART(PARTS[0](x + LIMIT)) * WEIGHTS",
    "base": "class Base:\n    size = 4\n    def width(self):\n        return leaf(self.size)",
    "model": (
        "import torch\nfrom dataclasses import dataclass\n"
        "class Model(Base):\n"
        "    @staticmethod\n    def twice(x):\n        return 2 * x\n"
        "    @property\n    def depth(self):\n        return [TABLE['a'] for _ in range(2)]\n"
        "    @torch.no_grad()\n    def run(self):\n        return self.history"
    ),
    "unused": "def unused():\n    return 1",
}


def cells_digest(changes=(), **live):
    """The digest of `Model` when the cells, some of them changed, have run in `__main__`."""
    space = {"__name__": "__main__"}
    for name, source in {**CELLS, **dict(changes)}.items():
        file = f"<cell {name} {hash(source)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), space)
    space |= live
    return code_digest(space["Model"])


@pytest.mark.parametrize(
    ("cell", "before", "after"),
    [
        ("limit", "3", "4"),
        ("table", "2", "3"),
        ("part", "x + 1", "x + 2"),
        ("part", "p=0.1", "p=0.2"),
        ("part", "5.0", "6.0"),
        ("leaf", "x + LIMIT", "x - LIMIT"),
        ("base", "size = 4", "size = 5"),
        ("base", "self.size", "-self.size"),
        ("model", "2 * x", "3 * x"),
        ("model", "range(2)", "range(3)"),
        ("model", "self.history", "self.scores"),
    ],
)
def test_the_digest_follows_what_code_uses(cell, before, after):
    assert before in CELLS[cell]
    assert cells_digest({cell: CELLS[cell].replace(before, after)}) != cells_digest()


def test_the_digest_leaves_out_what_code_does_not_use():
    changed = {"unused": "def unused():\n    return 2"}
    # An attribute of the name of a live variable is not that variable.
    assert cells_digest(changed, history=[1, 2], scores=3) == cells_digest() == cells_digest()


def test_methods_without_source_and_libraries_are_left_out():
    @dataclass
    class Pair:
        left: int = 1

    Pair.__module__ = "__main__"
    assert code_digest(Pair) == code_digest(Pair)
    assert code_digest(torch.nn.Linear) == code_digest(dict) == code_digest()


def test_the_digest_of_the_trainer_is_the_same_in_another_process():
    script = "from src_snippets.training.trainer import Trainer\n"
    script += (
        "from src_snippets.training.checkpoints import code_digest\nprint(code_digest(Trainer))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == code_digest(Trainer)


@pytest.mark.parametrize(
    "place",
    [
        "data.transforms.build_augmentation",
        "data.transforms.MIN_AREA",
        "model.heads.mask_loss",
        "model.mask_rcnn.InputTransform.normalize",
        "model.backbone.build_backbone",
        "training.trainer.Trainer.step",
        "training.trainer.lr_factor",
    ],
)
def test_the_digest_of_the_trainer_reaches(place, monkeypatch):
    before, last = code_digest(Trainer), place.split(".")[-1]
    module = f"src_snippets.{'.'.join(place.split('.')[:2])}"

    def changed():
        return 7

    changed.__module__ = module
    for owner in [m for n, m in sys.modules.items() if n.startswith("src_snippets.")]:
        for part in place.split(".")[2:-1]:
            owner = getattr(owner, part, None)
        if last in vars(owner or object):
            monkeypatch.setattr(owner, last, 99 if last.isupper() else changed)
    assert code_digest(Trainer) != before
