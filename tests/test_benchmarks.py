from dataclasses import replace
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src_snippets import train
from src_snippets.checkpoints import NOT_TRAINED
from src_snippets.config import recipe
from src_snippets.rle import mask_areas
from tests.benchmarks import ablate, leakage, race
from tests.benchmarks.cases import (
    benchmark_config,
    grid_sample,
    inference,
    mask_suppression,
    matching,
    padding,
    stock_model,
    training,
)
from tests.benchmarks.run import as_row, CASES, find_case, growth_cases, plot_growth, run_case
from tests.conftest import real_data, ROOT


def test_a_case_is_measured_in_a_process_of_its_own():
    name = "200 detections at 1000x1000 to RLE"
    found = run_case(name, "ours", quick=True)
    assert set(found) == {"seconds", "peak_mb", "figures"}
    assert 0 < found["seconds"] < 60
    assert found["peak_mb"] < 50


def test_an_error_in_a_case_is_shown():
    with pytest.raises(RuntimeError, match=r"no such case, ours:\n(.|\n)*KeyError"):
        run_case("no such case", "ours", quick=True)


@pytest.mark.parametrize("options", [["--only", "no such"], ["--quick", "--only", "2,000 det"]])
def test_options_that_leave_no_case_are_refused(options):
    command = [sys.executable, "tests/benchmarks/run.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there are:\ntraining sample, 161 cells" in done.stderr


def test_only_some_cases_and_a_file_of_figures(tmp_path):
    options = ["--quick", "--only", "MASK nms", "--json", str(tmp_path / "figures.json")]
    command = [sys.executable, "tests/benchmarks/run.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    assert len(rows) == 3
    assert rows[2].startswith("| mask NMS of 300 detections at 1000x1000 | ")
    figures = json.loads((tmp_path / "figures.json").read_text())
    (found,) = figures.values()
    assert found["stock"]["figures"] == found["ours"]["figures"]
    assert found["stock"]["peak_mb"] > 100 * found["ours"]["peak_mb"]


def test_rows_of_the_table():
    stock = dict(seconds=3.0, peak_mb=500.0, figures={"AP": 0.5, "images/s": 2})
    ours = dict(seconds=0.5, peak_mb=2.0, figures={"AP": 0.5, "images/s": 12.0})
    row = as_row("work", {"stock": stock, "ours": ours})
    assert row == (
        "| work | 3.0000 | 0.5000 | x6.00 | 500.0 | 2.0 | x250.0 | AP 0.5 both; images/s 2 -> 12 |"
    )
    row = as_row("work", {"stock": dict(failed="out of memory"), "ours": stock, "decode": ours})
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
        ("cells", "stock", [(10, good), (20, bad)]),
        ("cells", "ours", [(10, good), (20, good)]),
    ]
    plot_growth(lines, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_both_sides_do_the_same_work():
    for case, arguments in (
        (matching, dict(count=40)),
        (mask_suppression, dict(count=60, size=200)),
    ):
        assert case("stock", "cpu", **arguments)() == case("ours", "cpu", **arguments)()
    sample = grid_sample(50, 128)
    assert (len(sample.labels), sample.size) == (50, (128, 128))


def test_the_stock_model_has_our_weights_and_no_settings_of_its_own():
    config = benchmark_config("cpu")
    model = stock_model(config, "cpu").eval()
    assert model.roi_heads.detections_per_img == config.detections
    assert model.rpn.nms_thresh == config.rpn_nms
    with torch.inference_mode():
        assert len(model([torch.rand(3, 96, 96)])[0]["boxes"]) == config.detections


@pytest.mark.parametrize("side", ["stock", "ours"])
def test_whole_loops(side):
    real_data("hw3-real")
    assert training(side, "cpu", times=1)()["images/s"] > 0
    found = inference(side, "cpu", step=60, detections=20)()
    assert 0 < found["detections"] <= 40


def test_padding_is_counted():
    real_data("hw3-real")
    stock, ours = (padding(side, "cpu", batch=2)() for side in ("stock", "ours"))
    assert ours["padding % worst"] < 100 / 3 < stock["padding % worst"]


# What choices are worth

SMALL = dict(fpn_channels=16, box_features=32, mask_convs=1, proposals=50, rois=16, crop=64)


@pytest.fixture
def options(demo_root, tmp_path):
    """What the command line gives, for a moment of training with the smallest model."""
    return SimpleNamespace(
        data=demo_root,
        out=tmp_path,
        recipe="demo",
        settings=SMALL,
        minutes=0.01,
        seeds=2,
        seed=0,
        folds=2,
    )


def test_ablation_compares_with_the_base_and_goes_on_where_it_was(options, monkeypatch):
    names = ["base", "copy and paste", "mask NMS 0.5"]
    first = ablate.run_rows(options, names[:2])
    assert [list(first[name]) for name in names[:2]] == [["0", "1"]] * 2
    runs = sorted(path.name for path in (options.out / "runs").iterdir())
    assert runs == ["base-0", "base-1", "copy-and-paste-0", "copy-and-paste-1"]
    measured = []
    measure = ablate.measure

    def counted(options, name, *arguments):
        measured.append(name)
        return measure(options, name, *arguments)

    monkeypatch.setattr(ablate, "measure", counted)
    every = ablate.run_rows(options, names)
    assert measured == ["mask NMS 0.5"] * 2  # answered by the base's checkpoints
    assert sorted(path.name for path in (options.out / "runs").iterdir()) == runs
    assert {name: every[name] for name in names[:2]} == first
    assert list(json.loads((options.out / "ablation.json").read_text())["results"]) == names
    options.minutes = 0.02
    with pytest.raises(SystemExit, match="of other settings or data"):
        ablate.run_rows(options, names)


def test_rows_of_the_ablation():
    def run(score):
        return dict(AP50=score, AP=score / 2, epochs=10, seconds_a_field=0.5)

    results = {"base": {"0": run(0.2), "1": run(0.3)}, "more": {"0": run(0.25), "1": run(0.31)}}
    rows = list(ablate.as_rows(results))[2:]
    # Differences 0.05 and 0.01: mean 0.03, standard deviation 0.028.
    assert rows == [
        "| base | 0.250 | - | 0.071 | 0.125 | 10 | 0.50 |",
        "| more | 0.280 | +0.030 | 0.028 | 0.140 | 10 | 0.50 |",
    ]
    results["more"]["1"]["AP"] = None
    assert list(ablate.as_rows(results))[3] == "| more | 0.280 | +0.030 | 0.028 | - | 10 | 0.50 |"


def test_tuned_thresholds_are_measured_on_the_other_half(options, demo_samples):
    names = ["base", "thresholds by class from the other half"]
    found = [ablate.measure(options, name, 0, demo_samples) for name in names]
    assert 0 <= found[1]["AP50"] <= 1
    assert found[1]["AP"] is None
    assert len(list((options.out / "runs").iterdir())) == 1  # answered by the base


@pytest.mark.parametrize("name", ablate.TRAINED | ablate.ANSWERED)
def test_every_row_is_a_change_that_the_settings_know(name, options):
    changed = vars(ablate.seeded(options, name, 0))
    base = vars(ablate.seeded(options, "base", 0))
    differs = {key for key in changed if changed[key] != base[key]}
    wanted = ablate.TRAINED.get(name, ablate.ANSWERED.get(name))
    assert differs == set(wanted)
    assert name in ablate.TRAINED or differs <= set(NOT_TRAINED)


def test_an_unknown_row_is_refused(monkeypatch, capsys, demo_root):
    command = ["ablate.py", "--data", str(demo_root), "--only", "no such"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(train, "time", train.time)  # put back afterwards
    with pytest.raises(SystemExit):
        ablate.main()
    assert "no row 'no such'; there are:\nbase\n" in capsys.readouterr().err


def test_leakage_measures_all_images_out_of_fold(options, demo_samples):
    for split_by in ("look", "image"):
        found = leakage.measure(options, split_by, 0, demo_samples)
        assert 0 <= found["interval"][0] <= found["AP50"] <= found["interval"][1] <= 1
    assert len(list((options.out / "runs").iterdir())) == 4
    demo_samples.dataset = replace(demo_samples.dataset, groups={"no": "group"})
    leakage.measure(options, "image", 1, demo_samples)
    assert demo_samples.dataset.groups == {"no": "group"}  # put back
    demo_samples.dataset = replace(demo_samples.dataset, groups={})


def test_the_race_has_both_sides(options, demo_samples, tmp_path):
    results = {
        side: {"0.5": race.measure(options, side, 0.5, demo_samples)} for side in ("stock", "ours")
    }
    assert {r["0.5"]["minutes"] for r in results.values()} == {0.005}
    assert all(0 <= r["0.5"]["AP50"] <= 1 and r["0.5"]["epochs"] > 0 for r in results.values())
    race.draw(results, tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 5000


def test_answers_of_stock_are_torchvisions(demo_samples):
    config = recipe("demo", half_pixel=False, score_floor=0.0, detections=5)
    model = stock_model(config, "cpu").eval()
    model.transform.min_size, model.transform.max_size = (200,), 400
    sample = demo_samples[0]
    with torch.inference_mode():
        (wanted,) = model([sample.image / 255])
    found = race.answers_of_stock(model, [sample], config)[1]
    masks = wanted["masks"][:, 0] >= 0.5
    areas = masks.flatten(1).sum(1)
    assert mask_areas(found.rles).tolist() == areas[areas > 0].tolist()
    assert np.allclose(found.scores, wanted["scores"][areas > 0])
