"""Measures the same work done the stock way and ours: `python tests/benchmarks/run.py`.

Each case and side runs in a fresh process: inputs are made, one warm-up, then repeats. Reported are
the median seconds, the peak of memory above what the inputs took, and stock / ours. Nothing is
asserted.
"""

import argparse
import ctypes
import gc
import json
from pathlib import Path
import resource
from statistics import median
import subprocess
import sys
import time

ROOT = Path(__file__).parents[2]
LIMIT_GB = 12  # of memory for one process; beyond it the table says out of memory
OURS, STOCK = "ours", "stock"


def list_cases(quick: bool) -> dict[str, tuple]:
    """Name -> (function of `cases`, its arguments, sides)."""
    both, with_decode = (STOCK, OURS), (STOCK, OURS, "decode")
    sizes = {1: "161 cells, 397x482", 2: "644 cells, 794x964", 3: "1,449 cells, 1191x1446"}
    cases = {
        f"training sample, {what}": ("training_sample", dict(times=n), with_decode)
        for n, what in sizes.items()
        if n < 3 or not quick
    }
    cases["mask targets of 128 boxes, 644 cells"] = ("box_targets", {}, both)
    cases["1,449 cells matched to the anchors of a 1024 px crop"] = ("matching", {}, both)
    cases["200 detections at 1000x1000 to RLE"] = (
        "paste",
        dict(count=200, height=1000, width=1000),
        both,
    )
    if not quick:
        many = dict(count=1000, height=1771, width=1760)
        cases["1,000 detections at 1771x1760 to RLE"] = ("paste", many, both)
    images = 6 if quick else 42
    cases[f"AP of {images} images, 300 cells each"] = ("ap", dict(images=images, cells=300), both)
    return cases


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(name: str, side: str, quick: bool) -> dict:
    """Runs one side of one case in this process."""
    sys.path.insert(0, str(ROOT))
    from tests.benchmarks import cases

    function, arguments, _ = list_cases(quick)[name]
    work = getattr(cases, function)(side, **arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_GB * 10**9,) * 2)
    seconds = []
    try:
        work()  # warm-up: what libraries load and keep is no part of the work
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        for _ in range(3 if quick else 5):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        return dict(out_of_memory=True)
    return dict(seconds=median(seconds), peak_mb=(memory("VmHWM") - before) / 1e6)


def run_case(name: str, side: str, quick: bool) -> dict:
    """Runs one side of one case in a fresh process."""
    command = [sys.executable, __file__, "--case", name, "--side", side]
    done = subprocess.run(
        command + ["--quick"] * quick, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode == -9:
        return dict(out_of_memory=True)
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def as_row(name: str, found: dict[str, dict]) -> str:
    """A line of the table."""

    def text(side, key, digits):
        result = found[side]
        return "out of memory" if "out_of_memory" in result else f"{result[key]:,.{digits}f}"

    def ratio(key):
        if "out_of_memory" in found[STOCK]:
            return "-"
        return f"x{found[STOCK][key] / max(found[OURS][key], 1e-9):,.1f}"

    cells = [name]
    for key, digits in (("seconds", 4), ("peak_mb", 1)):
        cells += [text(STOCK, key, digits), text(OURS, key, digits), ratio(key)]
    decode = f"{found['decode']['seconds']:.4f}" if "decode" in found else ""
    return "| " + " | ".join([*cells, decode]) + " |"


def main() -> None:
    """Prints the table; `--json` also writes every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller cases, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.side, options.quick)))
        return
    print("| case | stock s | ours s | ratio | stock MB | ours MB | ratio | bare TIFF decode s |")
    print("|---|---|---|---|---|---|---|---|")
    figures = {}
    for name, (_, _, sides) in list_cases(options.quick).items():
        figures[name] = {side: run_case(name, side, options.quick) for side in sides}
        print(as_row(name, figures[name]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
