from dataclasses import asdict, replace
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src_snippets.data.rle import mask_areas
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import make_config
from src_snippets.training import trainer
from src_snippets.training.checkpoints import PREDICTION_SETTINGS
from tests.benchmarks import ablate, leakage, published, race, recipes
from tests.benchmarks.cases import (
    ap,
    baseline_model,
    benchmark_config,
    grid_sample,
    inference,
    matching,
    padding,
    pooling,
    step_layout,
    step_norms,
    training,
)
from tests.benchmarks.run import as_row, CASES, find_case, growth_cases, plot_growth, run_case
from tests.benchmarks.timed import timed_config, train_timed
from tests.conftest import make_sample, real_data, ROOT


def test_an_error_in_a_case_is_shown():
    with pytest.raises(RuntimeError, match=r"no such case, ours:\n(.|\n)*KeyError"):
        run_case("no such case", "ours", quick=True)


@pytest.mark.parametrize("options", [["--only", "no such"], ["--quick", "--only", "2,000 det"]])
def test_options_that_leave_no_case_are_refused(options):
    command = [sys.executable, "tests/benchmarks/run.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there are:\ntraining sample, 161 instances" in done.stderr


def test_a_case_is_measured_in_processes_of_its_own(tmp_path):
    options = ["--quick", "--only", "161 INSTANCES matched", "--json", str(tmp_path / "all.json")]
    command = [sys.executable, "tests/benchmarks/run.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert len(rows) == 3
    assert rows[2].startswith("| 161 instances matched to the anchors of a 1024 px crop | ")
    (sides,) = json.loads((tmp_path / "all.json").read_text()).values()
    assert set(sides["ours"]) == {"seconds", "peak_mb", "figures"}
    assert 0 < sides["ours"]["seconds"] < 60
    assert sides["baseline"]["figures"] == sides["ours"]["figures"]
    assert sides["baseline"]["peak_mb"] > 10 * sides["ours"]["peak_mb"]


def test_rows_of_the_table():
    baseline = dict(seconds=3.0, peak_mb=500.0, figures={"AP": 0.5, "images/s": 2})
    ours = dict(seconds=0.5, peak_mb=2.0, figures={"AP": 0.5, "images/s": 12.0})
    row = as_row("work", {"baseline": baseline, "ours": ours})
    assert row == (
        "| work | 3.0000 | 0.5000 | x6.00 | 500.0 | 2.0 | x250.0 | AP 0.5 both; images/s 2 -> 12 |"
    )
    row = as_row("work", dict(baseline=dict(failed="out of memory"), ours=baseline, decode=ours))
    assert row == (
        "| work | out of memory | 3.0000 | - | out of memory | 500.0 | - | "
        "decode 0.5000 s; AP 0.5; images/s 2 |"
    )


def test_quick_cases_and_curves_are_known():
    assert 5 < sum(case.quick for case in CASES.values()) < len(CASES)
    points = [point for curve in growth_cases(True).values() for point in curve]
    assert len(points) == 4
    assert find_case(points[0][1]).arguments == dict(cells=100, size=1024)


def test_curves_end_where_a_side_failed(tmp_path):
    good, bad = dict(seconds=1.0, peak_mb=9.0, figures={}), dict(failed="out of memory")
    lines = [
        ("instances", "baseline", [(10, good), (20, bad)]),
        ("instances", "ours", [(10, good), (20, good)]),
    ]
    plot_growth(lines, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        (matching, dict(count=40)),
        (ap, dict(images=2, cells=30)),
    ],
)
def test_both_sides_do_the_same_work(case, arguments):
    baseline, ours = (case(side, "cpu", **arguments)() for side in ("baseline", "ours"))
    assert ours == pytest.approx(baseline)


def test_samples_on_a_grid():
    sample = grid_sample(50, 128)
    assert (len(sample.labels), sample.size) == (50, (128, 128))


@pytest.mark.parametrize("side", ["baseline", "ours"])
def test_pooling_runs(side):
    pooling(side, "cpu", count=6, channels=4, size=128)()


def test_the_baseline_has_our_weights_and_no_settings_of_its_own():
    config = benchmark_config("cpu")
    model = baseline_model(config, "cpu").eval()
    assert model.roi_heads.detections_per_img == config.detections
    assert model.rpn.nms_thresh == build_model(config).rpn.nms_thresh
    with torch.inference_mode():
        assert len(model([torch.rand(3, 96, 96)])[0]["boxes"]) == config.detections


@pytest.mark.parametrize("side", ["baseline", "ours"])
def test_whole_loops(side):
    real_data("hw3-real")
    assert training(side, "cpu", times=1)()["images/s"] > 0
    assert 0 < inference(side, "cpu", step=60, detections=20)()["detections"] <= 40
    step_layout(side, "cpu")()
    step_norms(side, "cpu", "timm")()


def test_padding_is_counted():
    real_data("hw3-real")
    baseline, ours = (padding(side, "cpu", batch=2)() for side in ("baseline", "ours"))
    assert ours["padding % worst"] < 100 / 3 < baseline["padding % worst"]


def test_a_recipe_is_measured(demo_root):
    name, millions, per_image, per_step, batch = recipes.measure(
        "demo", torch.device("cpu"), demo_root, {}
    )
    assert (name, millions, batch) == ("demo", "6.1", "4 x 128 px, scale 1")
    assert 0 < float(per_image) < 60
    assert 0 < float(per_step) < 60


# Ablations, leakage, race

SMALL = dict(fpn_channels=16, box_features=32, mask_convs=1, proposals=50, roi_batch_size=16)


@pytest.fixture
def options(demo_root, tmp_path):
    """What the command line gives, for a moment of training with the smallest model."""
    return SimpleNamespace(
        data=demo_root,
        out=tmp_path,
        device="cpu",
        recipe="demo",
        settings=SMALL | dict(crop=64),
        minutes=0.01,
        seeds=2,
        seed=0,
        folds=2,
    )


def test_ablation_compares_with_the_base_and_continues(options, monkeypatch):
    names = ["base", "copy-paste", "box NMS 0.3"]
    first = ablate.run_rows(options, names[:2])
    assert [list(first[name]) for name in names[:2]] == [["0", "1"]] * 2
    runs = sorted(path.name for path in (options.out / "runs").iterdir())
    assert runs == ["base-0", "base-1", "copy-paste-0", "copy-paste-1"]
    measured = []
    measure = ablate.measure

    def counted(options, name, *arguments):
        measured.append(name)
        return measure(options, name, *arguments)

    monkeypatch.setattr(ablate, "measure", counted)
    every = ablate.run_rows(options, names)
    assert measured == ["box NMS 0.3"] * 2  # predicted with the base's checkpoints
    assert sorted(path.name for path in (options.out / "runs").iterdir()) == runs
    assert {name: every[name] for name in names[:2]} == first
    assert list(json.loads((options.out / "ablation.json").read_text())["results"]) == names
    options.minutes = 0.02
    with pytest.raises(SystemExit, match="of other settings or data"):
        ablate.run_rows(options, names)


def test_rows_of_the_ablation():
    def run(score):
        return dict(AP50=score, AP=score / 2, epochs=10, seconds_per_image=0.5)

    results = {"base": {"0": run(0.2), "1": run(0.3)}, "more": {"0": run(0.25), "1": run(0.31)}}
    # Differences 0.05 and 0.01: mean 0.03, standard deviation 0.028.
    assert list(ablate.as_rows(results))[2:] == [
        "| base | 0.250 | - | 0.071 | 0.125 | 10 | 0.50 |",
        "| more | 0.280 | +0.030 | 0.028 | 0.140 | 10 | 0.50 |",
    ]


@pytest.mark.parametrize("name", ablate.TRAINED | ablate.PREDICTED)
def test_every_row_is_a_change_of_known_settings(name, options, demo_samples):
    changed, base = (asdict(ablate.row_config(options, n, 0, demo_samples)) for n in (name, "base"))
    differs = {key for key in changed if changed[key] != base[key]}
    assert differs == set(ablate.TRAINED.get(name, ablate.PREDICTED.get(name)))
    assert name in ablate.TRAINED or differs <= set(PREDICTION_SETTINGS)


def test_an_unknown_row_is_refused(monkeypatch, capsys, demo_root):
    command = ["ablate.py", "--data", str(demo_root), "--only", "no such"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(trainer, "time", trainer.time)  # put back afterwards
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        ablate.main()
    assert "no row 'no such'; there are:\nbase\n" in capsys.readouterr().err


def test_leakage_measures_all_images_out_of_fold(options, demo_samples, monkeypatch):
    def run(split_by):
        result = leakage.measure(options, split_by, 0, demo_samples)
        low, high = result["interval"]
        assert 0 <= low <= result["AP50"] <= high <= 1

    run("appearance")
    one_slide = replace(demo_samples.dataset, groups=dict.fromkeys(demo_samples.names, "one slide"))
    monkeypatch.setattr(demo_samples, "dataset", one_slide)
    run("image")  # which leaves the groups of the dataset aside
    assert demo_samples.dataset is one_slide
    assert len(list((options.out / "runs").iterdir())) == 4
    with pytest.raises(ValueError, match="groups"):
        leakage.measure(options, "appearance", 0, demo_samples)


# In the place of a Python with ultralytics: a model that finds what the labels hold
PEER = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from skimage.draw import polygon2mask

folder = Path(sys.argv[2])
(folder / "4").mkdir()
for path in (folder / "labels" / "val").iterdir():
    width, height = Image.open(folder / "images" / "val" / (path.stem + ".png")).size
    rows = [line.split() for line in path.read_text().splitlines()]
    rings = [np.array(row[1:], float).reshape(-1, 2) * (width, height) - 0.5 for row in rows]
    masks = [polygon2mask((height, width), ring[:, ::-1]) for ring in rings]
    boxes = np.array([[*ring.min(0), *ring.max(0)] for ring in rings], np.float32).reshape(-1, 4)
    masks = np.packbits(np.reshape(masks, (-1, height, width)).astype(bool), axis=-1)
    labels, scores = np.array([row[0] for row in rows], np.float32), np.ones(len(rows), np.float32)
    arrays = dict(boxes=boxes, scores=scores, labels=labels, masks=masks, width=width)
    np.savez_compressed(folder / "4" / (path.stem + ".npz"), **arrays)
point = dict(minutes=1.0, wall=1.0, epochs=2, seconds_per_image=0.5)
(folder / "points.json").write_text(json.dumps({{"4": point}}))
"""


def test_the_sides_of_the_race(options, demo_samples, tmp_path):
    options.peer = tmp_path / "python"
    options.peer.write_text(PEER.format(python=sys.executable))
    options.peer.chmod(0o755)
    sides = ("torchvision", "ultralytics", "ours, a sixth")
    results = {side: {"0": race.measure(options, side, demo_samples)} for side in sides}
    for side in sides:
        points = results[side]["0"]  # as many as differ, by the machine's speed
        minutes = [point["minutes"] for point in points]
        assert 1 <= len(points) <= len(race.POINTS)
        assert minutes == sorted(minutes)
        assert minutes[-1] >= options.minutes * race.SIDES[side][0]
        assert all(point["epochs"] > 0 and point["seconds_per_image"] > 0 for point in points)
        assert all(0 <= point["AP50"] <= 1 for point in points)
    assert results["ultralytics"]["0"][0]["AP50"] > 0.95
    assert results["ultralytics"]["0"][0]["seconds_per_image"] == 0.5
    race.plot_race(results, tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 5000


def test_weights_are_kept_where_a_point_is_passed(tmp_path):
    keeper, saved = race.Keeper(tmp_path / "run", 60), []
    for fraction in (0.01, 0.1, 0.2, 0.6, 0.7, 1.01):
        keeper(saved.append, fraction, 1)
    assert [path.name for path in saved] == ["1.pt", "3.pt", "4.pt"]
    assert [point["minutes"] for _, point in keeper.kept] == pytest.approx([6, 36, 60.6])


def test_predictions_of_the_baseline_are_torchvisions(demo_samples):
    config = make_config("demo", score_threshold=0.0, detections=5)
    model = baseline_model(config, "cpu").eval()
    sample = demo_samples[0]
    with torch.inference_mode():
        (expected,) = model([sample.image / 255])
    (found,) = race.predict_baseline(model, [sample])
    areas = (expected["masks"][:, 0] >= 0.5).flatten(1).sum(1)
    assert mask_areas(found.rles).tolist() == areas[areas > 0].tolist()
    assert np.allclose(found.scores, expected["scores"][areas > 0])


# Published results


def cut(sample, rows: slice, columns: slice):
    """A tile of a sample of one layer, with ids from 1 on."""
    ids = sample.layers[0, rows, columns].numpy()
    known, own = np.unique(ids[ids > 0], return_inverse=True)
    tile = np.zeros_like(ids)
    tile[ids > 0] = own + 1
    labels = sample.labels[known.astype(np.int64) - 1]
    layers = torch.from_numpy(tile)[None]
    return replace(sample, image=sample.image[:, rows, columns], layers=layers, labels=labels)


def test_tiles_become_the_field_that_they_were_cut_from():
    """A strip above two tiles; squares of two classes that the cuts go through."""
    ids = np.zeros((220, 240), int)
    corners = [(10, 10), (110, 20), (50, 130), (190, 110), (100, 200)]
    for number, (top, left) in enumerate(corners, start=1):
        ids[top : top + 30, left : left + 30] = number
    field = make_sample([ids], [1])
    labels = torch.tensor([1, 2, 1, 2, 1])
    image = field.image[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2)
    field = replace(field, image=image[:, 1:, 1:], layers=field.layers[:, 1:, 1:], labels=labels)
    cuts = [
        (slice(120), slice(None)),
        (slice(120, None), slice(125)),
        (slice(120, None), slice(125, None)),
    ]
    tiles = [cut(field, *part) for part in cuts]
    assert [len(tile.labels) for tile in tiles] == [4, 2, 2]
    for order in ([0, 1, 2], [2, 0, 1]):
        (joined,) = published.stitch([tiles[k] for k in order])
        assert torch.equal(joined.image, field.image)
        assert len(joined.labels) == 5
        pairs = (
            torch.stack([joined.layers[0].long(), field.layers[0].long()]).flatten(1).unique(dim=1)
        )
        assert pairs.shape[1] == 6  # one id for each, and the background
        ours, known = pairs[:, pairs[0] > 0]
        assert torch.equal(joined.labels[ours - 1], labels[known - 1])
    assert published.stitch([]) == []
    assert published.stitch(tiles[:1]) == tiles[:1]


def test_cells_that_only_touch_stay_two():
    one = np.zeros((4, 6), int)
    one[3, :3], one[3, 3:] = 1, 2
    below = np.zeros((4, 6), int)
    below[0, :3], below[0, 4:] = 1, 2
    first, second = make_sample([one], [1]), make_sample([below], [1])
    second = replace(second, labels=torch.tensor([2, 1]))  # under the first another class
    joined = published.join_samples(first, second, axis=0)
    assert joined.size == (8, 6)
    assert sorted(joined.labels.tolist()) == [1, 1, 2]
    few = np.zeros((4, 6), int)
    few[0, 5] = 1  # a third of the border
    assert len(published.join_samples(first, make_sample([few], [1]), axis=0).labels) == 3


def test_checkpoints_stand_beside_published_results(options, demo_samples, capsys):
    config = timed_config(options, demo_samples, options.minutes)
    folder = options.out / "run"
    train_timed(config, demo_samples, folder)
    names = demo_samples.names[:2]
    (folder / "split.json").write_text(json.dumps(dict(train=[], val=names)))
    table = published.main([folder / "best.pt"], demo_samples.dataset.root)
    assert table.columns.tolist() == ["DICE", "AJI", "DQ", "SQ", "PQ", "F1"]
    assert table.index[0] == "overall"
    assert table.loc["Mask R-CNN"].tolist() == [0.74, 0.474, 0.619, 0.74, 0.46, 0.692]
    assert table.loc["overall"].between(0, 1).all()
    assert "2 tiles make 2 fields" in capsys.readouterr().out


def test_published_results_need_a_folder():
    command = [sys.executable, "tests/benchmarks/published.py", "best.pt"]
    environment = {key: value for key, value in os.environ.items() if key != "HW3_DATA"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "set HW3_DATA to the folder of the dataset" in done.stderr
