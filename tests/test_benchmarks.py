import json
import subprocess
import sys

import pytest
import torch

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
