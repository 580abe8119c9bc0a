"""The notebook and the story, run as a person runs them: each in a process of its own."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from src_snippets.checkpoints import load_checkpoint
from src_snippets.datasets import read_test_mapping
from src_snippets.writers import check_results, check_zip

ROOT = Path(__file__).parent.parent
QUICK = {"epochs": 1, "fpn_channels": 16, "proposals": 50, "rois": 16}


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


def check_outputs(out: Path, data: Path) -> None:
    """The results are a valid submission for that dataset, and every picture is there."""
    results = out / "test-results.json"
    check_results(results, read_test_mapping(data), range(1, 5))
    check_zip(out / "test-results.zip", results)
    assert (out / "report.html").stat().st_size > 100_000
    labels = {path.stem for path in (out / "exports" / "labels").glob("*.tif")}
    assert labels == {image.path.stem for image in read_test_mapping(data)}
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names == {
        "samples",
        "augmentations",
        "anchors",
        "schedule",
        "history",
        "predictions",
        "counts",
        "precision",
        "floors",
        "calibration",
        "confusions",
        "count_errors",
        "mistakes",
        "test",
    }


def test_alone_in_an_empty_folder_it_finds_the_drawn_cells(tmp_path):
    shutil.copy(ROOT / "hw3.ipynb", tmp_path)
    jupyter = str(Path(sys.executable).with_name("jupyter"))
    _, peak = run([jupyter, "execute", "hw3.ipynb"], tmp_path)
    out = tmp_path / "results"
    check_outputs(out, out / ".demo-dataset")
    (folder,) = (out / "runs").iterdir()
    best = load_checkpoint(folder / "best.pt")
    seconds = load_checkpoint(folder / "last.pt")["spent"]
    print(f"demo: AP50 {best['best']:.3f}, {seconds:.0f} s of training, peak {peak:.2f} GB")
    assert best["best"] >= 0.75
    assert peak < 3.0
    truth = json.loads((folder / "val_gt.json").read_text())
    split = json.loads((folder / "split.json").read_text())
    assert [Path(i["file_name"]).parts[0] for i in truth["images"]] == split["val"]
    assert len({*split["train"], *split["val"]}) == len(split["train"] + split["val"]) == 40
    assert 8 <= len(split["val"]) <= 10


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
    assert "imagecodecs is missing: Pillow reads the compressed images." in said
    assert "faster_coco_eval is missing: pycocotools computes AP, more slowly." in said
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
            {"HW3_DATA": "/no/such/folder"},
            "DATA='/no/such/folder': there is no such folder; expected a folder with train/",
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
    said = "".join(o.get("text", "") for cell in done.cells for o in cell.get("outputs", ()))
    assert said.count("Launching training on 2 CUDAs.") == 4  # how fast, train, measure, predict
    (training,) = (cell for cell in done.cells if "LiveHistory(output" in cell.source)
    shown = [o for o in training.outputs if "image/png" in o.get("data", {})]
    assert len(shown) == 1  # the picture of the first process, drawn in a fork


def test_two_processes_of_a_launcher_work_together(tmp_path, demo_root):
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    options = "launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    options += " --mixed_precision no --dynamo_backend no -m src_snippets.notebook"
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_OUT=str(tmp_path))
    command = [accelerate, *options.split()]
    said, _ = run(command, ROOT, **environ, HW3_SETTINGS=json.dumps(QUICK))
    check_outputs(tmp_path, demo_root)
    assert said.count("epoch 1: loss") == said.count("validation images, seed 0") == 1
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(json.loads((folder / "split.json").read_text())["val"]) > 0


def test_a_train_folder_alone_then_own_pictures_with_its_checkpoint(tmp_path, demo_root):
    """Other class names; micrometres; no truth in the second run, which trains nothing."""
    data, pictures = tmp_path / "data", tmp_path / "my pictures"
    shutil.copytree(demo_root / "train", data / "train")
    names = ["round", "dark", "grainy", "spiky"]
    settings = QUICK | {"class_names": names, "um_per_px": 0.25, "score_floor": 0.0}
    environ = dict(HW3_RECIPE="demo", HW3_SETTINGS=json.dumps(settings))
    first = tmp_path / "first"
    story = ["-m", "src_snippets.notebook"]
    said, _ = run(story, ROOT, HW3_DATA=str(data), HW3_OUT=str(first), **environ)
    assert "No test images of a dataset: there is nothing to submit." in said
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
    second = tmp_path / "second"
    environ = dict(HW3_CHECKPOINTS=str(folder / "best.pt"))
    answer = dict(HW3_DATA=str(pictures), HW3_OUT=str(second))
    said, _ = run(story, ROOT, **answer, **environ, HW3_SETTINGS='{"detections": 5}')
    assert "epoch 1" not in said
    assert "  > detections       5" in said
    assert not (second / "runs").exists()
    assert len(list((second / "exports" / "labels").iterdir())) == 3
    table = (second / "exports" / "counts.csv").read_text().splitlines()
    assert table[0] == header  # names and pixel size are the checkpoint's
    assert [row.split(",")[0] for row in table[1:]] == ["a", "b", "c"]
    assert (second / "report.html").exists()
    assert not (second / "test-results.json").exists()
    assert list(second.glob("answers-*.jsonl"))
    assert not list(folder.glob("answers-*.jsonl"))  # a checkpoint may lie where nobody can write


def test_pictures_without_a_checkpoint_are_refused(tmp_path, demo_root):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environ = dict(HW3_DATA=str(demo_root / "test_release"), HW3_OUT=str(tmp_path))
    command = [sys.executable, "-m", "src_snippets.notebook"]
    done = subprocess.run(command, cwd=ROOT, env=kept | environ, capture_output=True, text=True)
    assert "pictures without truth; set CHECKPOINTS to a best.pt" in done.stderr


def test_changed_settings_run_on_from_their_cell(tmp_path, demo_root):
    """All cells, then those from the settings on once more with a knob turned, in one kernel."""
    notebook = nbformat.read(ROOT / "hw3.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (place,) = (k for k, cell in enumerate(cells) if "KNOBS = dict(" in cell.source)
    again = [nbformat.v4.new_code_cell(cell.source) for cell in cells[place:]]
    again[0].source = again[0].source.replace("    lr=None", "    seed=4,\n    lr=0.003")
    notebook.cells = cells + again
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_SETTINGS=json.dumps(QUICK))
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=kept | environ)
    check_outputs(tmp_path / "results", demo_root)
    folders = sorted((tmp_path / "results" / "runs").iterdir())
    assert len(folders) == 2  # each has a run of its own
    saved = [load_checkpoint(folder / "best.pt")["config"] for folder in folders]
    assert {(config["seed"], config["lr"]) for config in saved} == {(0, 0.002), (4, 0.003)}
