import json
import subprocess
import sys

from tests.benchmarks.run import as_row, list_cases, run_case
from tests.conftest import ROOT


def test_a_case_is_measured_in_a_process_of_its_own():
    name = "200 detections at 1000x1000 to RLE"
    found = run_case(name, "ours", quick=True)
    assert set(found) == {"seconds", "peak_mb"}
    assert 0 < found["seconds"] < 60
    command = [
        sys.executable,
        "tests/benchmarks/run.py",
        "--case",
        name,
        "--side",
        "ours",
        "--quick",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["peak_mb"] < 50


def test_rows_of_the_table():
    stock, ours = dict(seconds=3.0, peak_mb=500.0), dict(seconds=0.5, peak_mb=2.0)
    row = as_row("work", {"stock": stock, "ours": ours})
    assert row == "| work | 3.0000 | 0.5000 | x6.0 | 500.0 | 2.0 | x250.0 |  |"
    row = as_row("work", {"stock": dict(out_of_memory=True), "ours": ours, "decode": ours})
    assert row == "| work | out of memory | 0.5000 | - | out of memory | 2.0 | - | 0.5000 |"


def test_quick_leaves_out_the_largest():
    assert len(list_cases(quick=True)) < len(list_cases(quick=False))
