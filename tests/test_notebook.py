"""The notebook and its script, run as a person runs them: each in a process of its own."""

import html
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import zipfile

import nbclient
import nbformat
import pytest

from src_snippets.data.drawing import CAPTIONS
from src_snippets.data.layouts import open_dataset
from src_snippets.inference.submission import check_results
from src_snippets.setup.config import make_config
from src_snippets.training.checkpoints import load_checkpoint

ROOT = Path(__file__).parent.parent
QUICK = {"epochs": 1, "fpn_channels": 16, "proposals": 50, "roi_batch_size": 16}


def run(command, folder: Path, **environ) -> tuple[str, float]:
    """Runs Python in a folder without any of the notebook's variables set but the given ones.

    Returns:
        What it printed, and its peak of memory in GB.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_") and k != "PYTHONPATH"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone, not of other tests' children
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said[-3000:]
    return said, usage.ru_maxrss / 1e6


FIGURES = {"samples", "augmentations", "anchors", "history", "predictions", "evaluation"}
FIGURES |= {"mistakes", "test"}


def check_outputs(out: Path, data: Path) -> None:
    """The results are a valid submission for that dataset, and every picture is there."""
    results = out / "test-results.json"
    images = open_dataset(data, make_config("demo")).test_images
    check_results(results, images, range(1, 5))
    with zipfile.ZipFile(out / "test-results.zip") as archive:
        assert archive.namelist() == ["test-results.json"]
        assert archive.read("test-results.json") == results.read_bytes()
    assert (out / "report.html").stat().st_size > 100_000
    labels = {path.stem for path in (out / "exports" / "labels").glob("*.tif")}
    assert labels == {image.path.stem for image in images}
    assert {path.stem for path in (out / "figures").glob("*.png")} == FIGURES


def test_alone_in_an_empty_folder_it_finds_the_synthetic_cells(tmp_path):
    shutil.copy(ROOT / "hw3.ipynb", tmp_path)
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    _, peak = run([jupyter, "execute", "hw3.ipynb"], tmp_path)
    out = tmp_path / "results"
    check_outputs(out, out / ".synthetic-dataset")
    (folder,) = (out / "runs").iterdir()
    best = load_checkpoint(folder / "best.pt")
    score = max(row["AP50"] for row in best["history"] if "AP50" in row)
    print(f"demo: AP50 {score:.3f}, peak {peak:.2f} GB")
    assert score >= 0.95
    assert max(row["AP"] for row in best["history"] if "AP" in row) >= 0.65
    assert peak < 3.0
    truth = json.loads((folder / "val_gt.json").read_text())
    split = json.loads((folder / "split.json").read_text())
    assert [Path(i["file_name"]).parts[0] for i in truth["images"]] == split["val"]
    assert len({*split["train"], *split["val"]}) == len(split["train"] + split["val"]) == 40
    assert 6 <= len(split["val"]) <= 10


NO_NETWORK = """
import socket

def refuse(*arguments, **options):
    with open({path!r}, "a") as file:
        print(arguments[-1:], file=file)
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_offline_without_the_optional_packages(tmp_path, demo_root):
    """imagecodecs and faster-coco-eval cannot be imported, pip finds nothing, nothing calls out.

    The dataset lies under a name with blanks and other letters, and is left as it was.
    """
    blocker, calls = tmp_path / "blocker", tmp_path / "calls"
    blocker.mkdir()
    lines = ["import sys"]
    lines += [f"sys.modules[{name!r}] = None" for name in ("imagecodecs", "faster_coco_eval")]
    lines.append(NO_NETWORK.format(path=str(calls)))
    (blocker / "sitecustomize.py").write_text("\n".join(lines))
    data = tmp_path / "mes données" / "ячейки 1"
    shutil.copytree(demo_root, data)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    said, _ = run(
        ["-m", "src_snippets.notebook"],
        ROOT,
        PYTHONPATH=str(blocker),
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
        HW3_DATA=str(data),
        HW3_OUT=str(tmp_path / "out"),
        HW3_RECIPE="demo",
        HW3_SETTINGS=json.dumps(QUICK),
    )
    assert "DEMO" not in said
    check_outputs(tmp_path / "out", data)
    assert not calls.exists(), calls.read_text()
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"HW3_RECIPE": "fast"},
            "There is no recipe 'fast'; there are: baseline, attention, ",
        ),
        (
            {"HW3_SETTINGS": '{"epoch": 3}'},
            "There is no setting epoch. Did you mean epochs? There are: seed,",
        ),
        (
            {"HW3_SETTINGS": '{"score_floor": 0.3}'},
            "Setting score_floor is called score_threshold now.",
        ),
        (
            {"HW3_DATA": "", "HW3_RECIPE": "light"},  # hours of training on synthetic cells
            "RECIPE='light', but no dataset: set DATA.",
        ),
        (
            {"HW3_DATA": "/no/such/folder"},
            "No dataset in /no/such/folder, but no folder.",
        ),
    ],
)
def test_wrong_settings_from_outside_stop_the_story_at_once(tmp_path, environ, message):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environ = kept | {"HW3_DATA": "demo", "HW3_OUT": str(tmp_path)} | environ
    command = [sys.executable, "-m", "src_snippets.notebook"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


TWO_GPUS = """
import os
import sys

if "ipykernel" in " ".join(sys.orig_argv):
    import torch

    notebook = os.getpid()

    def touched(*arguments):
        with open({path!r}, "a") as file:
            print("CUDA was initialised before the processes were forked", file=file)
        raise RuntimeError("CUDA was initialised")

    torch.cuda.is_available = lambda: os.getpid() == notebook
    torch.cuda.device_count = lambda: 2
    torch.cuda._lazy_init = touched
"""


def test_with_two_gpus_the_notebook_leaves_them_to_their_processes(tmp_path, demo_root):
    """Two GPUs are claimed to be there; the forked processes find none and take the CPU."""
    shutil.copy(ROOT / "hw3.ipynb", tmp_path)
    touched = tmp_path / "touched"
    (tmp_path / "sitecustomize.py").write_text(TWO_GPUS.format(path=str(touched)))
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    command = [jupyter, "execute", "hw3.ipynb", "--output", "done.ipynb"]
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", PYTHONPATH=str(tmp_path))
    run(command, tmp_path, **environ, HW3_SETTINGS=json.dumps(QUICK | {"max_hours": 1}))
    assert not touched.exists(), touched.read_text()
    check_outputs(tmp_path / "results", demo_root)
    done = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    (training,) = (cell for cell in done.cells if "LiveHistory(figures" in cell.source)
    shown = [o for o in training.outputs if "image/png" in o.get("data", {})]
    assert len(shown) == 1  # the figure of the first process, drawn in a fork


def test_a_train_folder_alone_then_own_pictures_with_its_checkpoint(tmp_path, demo_root):
    """Other class names; micrometres; no truth in the second run, which trains nothing."""
    data, pictures = tmp_path / "data", tmp_path / "my pictures"
    shutil.copytree(demo_root / "train", data / "train")
    names = ["round", "dark", "grainy", "spiky"]
    settings = QUICK | {"class_names": names, "um_per_px": 0.25, "score_threshold": 0.0}
    settings |= {"channels": [1, 2, 3]}
    environ = dict(HW3_RECIPE="demo", HW3_SETTINGS=json.dumps(settings))
    first = tmp_path / "first"
    story = ["-m", "src_snippets.notebook"]
    said, _ = run(story, ROOT, HW3_DATA=str(data), HW3_OUT=str(first), **environ)
    assert "No test images of a dataset: nothing to submit." in said
    assert not (first / "test-results.json").exists()
    (folder,) = (first / "runs").iterdir()
    held_out = json.loads((folder / "split.json").read_text())["val"]
    labels = {path.stem for path in (first / "exports" / "labels").glob("*.tif")}
    assert labels == set(held_out)
    header = (first / "exports" / "counts.csv").read_text().splitlines()[0]
    assert header.startswith("image,round,dark,grainy,spiky,all,area_mm2,round_per_mm2")
    truth = json.loads((folder / "train_gt.json").read_text())
    assert [category["name"] for category in truth["categories"]] == names

    pictures.mkdir()
    for name, image in zip("abc", sorted(demo_root.glob("test_release/*.tif")), strict=False):
        shutil.copy(image, pictures / f"{name}.tif")
    (pictures / "broken.tif").write_bytes(b"II*\0")
    second = tmp_path / "second"
    environ = dict(HW3_CHECKPOINTS=str(folder / "best.pt"))
    answer = dict(HW3_DATA=str(pictures), HW3_OUT=str(second))
    settings = '{"detections": 5, "um_per_px": 0.25}'  # which is not that of other images
    said, _ = run(story, ROOT, **answer, **environ, HW3_SETTINGS=settings)
    assert "epoch 1" not in said
    assert "recipe: demo" in said
    assert "(1, 2, 3)" in said  # channels, in the table of settings
    assert said.count("WARNING: left out, 1 of 4 images") == 1
    assert 'RECIPE = "light"' not in said
    assert not (second / "runs").exists()
    assert len(list((second / "exports" / "labels").iterdir())) == 3
    table = (second / "exports" / "counts.csv").read_text().splitlines()
    assert table[0] == header  # names are the checkpoint's
    assert [row.split(",")[0] for row in table[1:]] == ["a", "b", "c"]
    assert (second / "report.html").exists()
    assert not (second / "test-results.json").exists()
    assert list(second.glob("predictions-*"))
    # A checkpoint may lie where nobody can write
    assert not list(folder.glob("predictions-*"))

    test, third = tmp_path / "test", tmp_path / "third"  # test images with their ids, no train/
    shutil.copytree(demo_root / "test_release", test / "test_release")
    shutil.copy(demo_root / "test_image_name_to_ids.json", test)
    said, _ = run(story, ROOT, **environ, HW3_DATA=str(test), HW3_OUT=str(third))
    assert "training" not in said.replace("without training", "")
    assert (third / "test-results.zip").exists()
    assert f"{third / 'test-results.json'}: checked" in said


def test_without_a_gpu_the_small_recipe_is_taken(tmp_path, demo_root):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environ = dict(HW3_DATA=str(demo_root), HW3_OUT=str(tmp_path))
    environ |= dict(HW3_SETTINGS='{"weights": "/no/such/file.pt"}')
    command = [sys.executable, "-m", "src_snippets.notebook"]
    done = subprocess.run(command, cwd=ROOT, env=kept | environ, capture_output=True, text=True)
    assert "recipe: light" in done.stdout
    assert "WARNING: below 40 images and no groups.csv" in done.stdout
    assert "/no/such/file.pt" in done.stderr


def test_images_without_a_checkpoint_are_refused(tmp_path, demo_root):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environ = dict(HW3_DATA=str(demo_root / "test_release"), HW3_OUT=str(tmp_path))
    command = [sys.executable, "-m", "src_snippets.notebook"]
    done = subprocess.run(command, cwd=ROOT, env=kept | environ, capture_output=True, text=True)
    assert "no masks found; expected in train/, or CHECKPOINTS" in done.stderr


def execute(notebook, folder: Path, **environ) -> str:
    """Runs a notebook's cells in a kernel of its own; returns what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=None, resources=resources)
    client.execute(env=kept | environ)
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))


def code_cells():
    """The code cells of the committed notebook, and the index of the settings cell."""
    notebook = nbformat.read(ROOT / "hw3.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    return notebook, next(k for k, own in enumerate(tags) if "parameters" in own)


def test_changed_settings_and_changed_code_train_anew(tmp_path, demo_root):
    """In one kernel: all cells; again unchanged; with another lr; with one augmentation more."""
    notebook, place = code_cells()
    rest = [nbformat.v4.new_code_cell(cell.source) for cell in notebook.cells[place:]]

    def again(old="", new=""):
        cells = [nbformat.v4.new_code_cell(c.source.replace(old, new)) for c in rest]
        assert old == "" or [c.source for c in cells] != [c.source for c in rest]
        return cells

    mark = "# Add your own transforms here"
    augmented = again(mark, "v2.RandomInvert(1.0),\n        " + mark)
    notebook.cells += again() + again("CHANGES = dict()", "CHANGES = dict(lr=0.003)") + augmented
    settings = json.dumps(QUICK)
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=settings)
    said = execute(notebook, tmp_path, **environ)
    check_outputs(tmp_path / "results", demo_root)
    folders = sorted((tmp_path / "results" / "runs").iterdir())
    assert len(folders) == 3  # the second pass used the first's, loudly
    assert said.count("ALREADY TRAINED") == 1
    assert said.count("RESUME = False") >= 1
    saved = [load_checkpoint(folder / "best.pt") for folder in folders]
    assert {state["config"].lr for state in saved} == {0.002, 0.003}
    heads = {float(state["model"]["rpn.head.cls_logits.weight"].sum()) for state in saved}
    assert len(heads) == 3  # the model of inverted images is another one


def test_papermill_sets_parameters(tmp_path, demo_root):
    source, done = str(ROOT / "hw3.ipynb"), str(tmp_path / "done.ipynb")
    values = dict(DATA=str(demo_root), OUT=str(tmp_path / "out"), RECIPE="demo", EPOCHS=1)
    values |= dict(CHANGES=QUICK | {"epochs": 1})
    command = ["-m", "papermill", source, done, "--no-progress-bar"]
    run([*command, "-y", json.dumps(values)], tmp_path)
    check_outputs(tmp_path / "out", demo_root)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    assert load_checkpoint(folder / "best.pt")["config"].fpn_channels == 16


BROKEN = """
import builtins
from matplotlib.figure import Figure

def broken(self, path, **options):
    if any(name in str(path) for name in ("evaluation", "predictions", "mistakes", "test.png")):
        raise RuntimeError("no ink")
    return savefig(self, path, **options)

savefig, Figure.savefig = Figure.savefig, broken
"""


def test_broken_figures_cost_nothing_else(tmp_path, demo_root):
    """Figures of the evaluation and exports fail: all is shown, and the submission is there."""
    notebook, place = code_cells()
    notebook.cells.insert(place, nbformat.v4.new_code_cell(BROKEN))
    settings = json.dumps(QUICK)
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=settings)
    said = execute(notebook, tmp_path, **environ)
    out = tmp_path / "results"
    assert said.count("RuntimeError: no ink") == 4
    assert (out / "test-results.zip").exists()
    assert (out / "report.html").exists()
    assert (out / "exports" / "cells.csv").exists()


CUT = """
import itertools

# Time is over after the second fold's training began
Session.is_over = lambda self, calls=itertools.count(): bool(runs) and next(calls) > 0
runs = {}
"""


def test_a_fold_that_is_cut_in_its_first_epoch_does_not_join_the_ensemble(tmp_path, demo_root):
    notebook, _ = code_cells()
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("runs = {}"))
    cell.source = cell.source.replace("runs = {}\n", CUT)
    settings = json.dumps(QUICK | {"folds": 2})
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=settings)
    said = execute(notebook, tmp_path, **environ)
    assert "Training ends after epoch 0: the session ends" in said
    assert len(list((tmp_path / "results" / "runs").glob("*/best.pt"))) == 2
    assert re.search(r"validation AP50 0\.\d+ on 4 images", said)


def test_after_a_training_that_was_stopped_the_next_cell_says_so(tmp_path, demo_root):
    notebook, _ = code_cells()
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("runs = {}"))
    cell.source = "runs = {}"  # all that a stopped training leaves
    settings = json.dumps(QUICK)
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=settings)
    with pytest.raises(
        nbclient.exceptions.CellExecutionError, match="Training was stopped: run its cell again"
    ):
        execute(notebook, tmp_path, **environ)


def test_folds_that_are_finished_predict_after_the_end_of_the_session(tmp_path, demo_root):
    notebook, _ = code_cells()
    (cell,) = (cell for cell in notebook.cells if cell.source.startswith("runs = {}"))
    loop = "for fold, split in splits.items()"  # in the same kernel, after the session's end
    again = cell.source.replace(loop, f"session.terminated = True\n{loop}")
    assert again != cell.source
    place = notebook.cells.index(cell) + 1
    notebook.cells.insert(place, nbformat.v4.new_code_cell(again))
    settings = json.dumps(QUICK | {"folds": 2})
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=settings)
    said = execute(notebook, tmp_path, **environ)
    assert said.count("ALREADY TRAINED") == 2
    assert "is not trained" not in said
    assert re.search(r"validation AP50 0\.\d+ on 8 images", said)


def test_the_notebook_becomes_a_script_and_a_page(tmp_path):
    shutil.copy(ROOT / "hw3.ipynb", tmp_path)
    run(["-m", "nbconvert", "--to", "script", "hw3.ipynb"], tmp_path)
    compile((tmp_path / "hw3.py").read_text(), "hw3.py", "exec")
    # The template "lab" leaves out alternative texts
    run(["-m", "nbconvert", "--to", "html", "--template", "classic", "hw3.ipynb"], tmp_path)
    texts = re.findall(r'<img [^>]*?alt="([^"]*)"', (tmp_path / "hw3.html").read_text())
    assert {html.unescape(text) for text in texts} == set(CAPTIONS.values())
