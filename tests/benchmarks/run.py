"""Measures the same work done by torchvision and by us: `python tests/benchmarks/run.py`.

Each case and side runs in a fresh process: inputs are made, one warm-up, then repeats. Reported are
the median seconds, the peak memory above what the process holds after the warm-up (on a GPU, of
the GPU's memory), and baseline / ours. Nothing is asserted.
"""

import argparse
from collections.abc import Iterator
import ctypes
from dataclasses import dataclass, field
import gc
import json
import math
from pathlib import Path
import resource
from statistics import median
import subprocess
import sys
import time

ROOT = Path(__file__).parents[2]
LIMIT_GB = 12  # of memory for one process on the CPU; beyond it the table says out of memory
LIMIT_SECONDS = 1200  # for one side of one case
REPEAT_SECONDS = 30  # after which no further repeat begins
OURS, BASELINE = "ours", "baseline"


@dataclass(frozen=True)
class Case:
    """A row of the table: a function of `cases`, its arguments, and where it can run."""

    work: str
    arguments: dict = field(default_factory=dict)
    extra: tuple[str, ...] = ()  # further sides, shown beside the two
    on_gpu: bool = True
    quick: bool = True


CASES = {
    "training sample, 161 instances, 397x482": Case(
        "training_sample", dict(times=1), ("decode", "cached"), on_gpu=False
    ),
    "training sample, 644 instances, 794x964": Case(
        "training_sample", dict(times=2), ("decode", "cached"), on_gpu=False
    ),
    "training sample, 1,449 instances, 1191x1446": Case(
        "training_sample", dict(times=3), ("decode", "cached"), on_gpu=False, quick=False
    ),
    "colour of a crop of 512 px": Case("colour", on_gpu=False),
    "200 crops of 50 real sizes, in pairs; baseline: padded": Case(
        "padding", dict(batch=2), on_gpu=False, quick=False
    ),
    "mask targets of 128 boxes, 644 instances": Case("box_targets"),
    "161 instances matched to the anchors of a 1024 px crop": Case("matching", dict(count=161)),
    "1,449 instances matched to the anchors of a 1024 px crop": Case("matching", dict(count=1449)),
    "200 detections at 1000x1000 to RLE": Case("paste", dict(count=200, height=1000, width=1000)),
    "1,000 detections at 1771x1760 to RLE": Case(
        "paste", dict(count=1000, height=1771, width=1760), quick=False
    ),
    "AP of 6 images, 300 instances each": Case("ap", dict(images=6, cells=300), on_gpu=False),
    "AP of 42 images, 300 instances each": Case(
        "ap", dict(images=42, cells=300), on_gpu=False, quick=False
    ),
    "128 boxes cut from features of a 512 px crop, and back": Case(
        "pooling", dict(count=128, channels=256, size=512), on_gpu=False
    ),
    "training epoch, 161 instances per image": Case("training", dict(times=1)),
    "training epoch, 644 instances per image": Case("training", dict(times=2), quick=False),
    "4 training steps; baseline: contiguous layout, AdamW's default": Case("step_layout"),
    "4 steps of `light`, frozen norms; baseline: live ones": Case(
        "step_norms", dict(baseline="live")
    ),
    "4 steps of `light`, frozen norms; baseline: timm's": Case("step_norms", dict(baseline="timm")),
    "every 20th image of the test set to JSON": Case("inference", dict(step=20, detections=200)),
    "the test set of 101 images to JSON": Case(
        "inference", dict(step=1, detections=200), quick=False
    ),
    "the same, up to 1,000 detections per image": Case(
        "inference", dict(step=1, detections=1000), quick=False
    ),
}
CELLS, SIDES = (100, 200, 500, 1000, 2000, 5000), (256, 512, 1024, 2048, 4096)


def growth_cases(quick: bool) -> dict[str, list[tuple[int, str, Case]]]:
    """The points of the two curves: x, name and case."""
    step = 3 if quick else 1

    def point(x: int, cells: int, size: int):
        name = f"growth, {cells} instances on {size} px"
        return x, name, Case("there_and_back", dict(cells=cells, size=size), on_gpu=False)

    return {
        "instances on an image of 1024 x 1024 px": [point(n, n, 1024) for n in CELLS[::step]],
        "side in px of an image with 500 instances": [point(s, 500, s) for s in SIDES[::step]],
    }


def find_case(name: str) -> Case:
    """The case of a name, of the table or of the curves."""
    points = (point for curve in growth_cases(False).values() for point in curve)
    return {**CASES, **{title: case for _, title, case in points}}[name]


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measure(name: str, side: str, device: str, quick: bool) -> dict:
    """Runs one side of one case in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.benchmarks import cases

    case, gpu = find_case(name), device == "cuda"
    work = getattr(cases, case.work)(side, device, **case.arguments)
    if not gpu:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_GB * 10**9,) * 2)
    seconds, figures = [], None
    try:
        work()  # warm-up: what libraries load and keep is no part of the work
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = memory("VmRSS")
        while len(seconds) < (3 if quick else 5) and sum(seconds) < REPEAT_SECONDS:
            start = time.perf_counter()
            figures = work()
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        return dict(failed="out of memory")
    peak = torch.cuda.max_memory_allocated() if gpu else memory("VmHWM")
    numbers = isinstance(figures, dict) and all(type(v) in (int, float) for v in figures.values())
    figures = figures if numbers else {}
    return dict(seconds=median(seconds), peak_mb=(peak - before) / 1e6, figures=figures)


def run_case(name: str, side: str, device: str = "cpu", quick: bool = False) -> dict:
    """Runs one side of one case in a fresh process."""
    command = [sys.executable, __file__, "--case", name, "--side", side, "--device", device]
    try:
        done = subprocess.run(
            command + ["--quick"] * quick,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return dict(failed=f"over {LIMIT_SECONDS} s")
    if done.returncode == -9:
        return dict(failed="out of memory")
    if done.returncode:
        raise RuntimeError(f"{name}, {side}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def as_row(name: str, found: dict[str, dict]) -> str:
    """A line of the table."""
    baseline, ours = found[BASELINE], found[OURS]

    def text(result, key, digits):
        return result.get("failed") or f"{result[key]:,.{digits}f}"

    cells = [name]
    for key, digits in (("seconds", 4), ("peak_mb", 1)):
        ratio = "-"
        if "failed" not in baseline and "failed" not in ours:
            times = baseline[key] / max(ours[key], 1e-9)
            ratio = f"x{times:,.{1 if times >= 10 else 2}f}"
        cells += [text(baseline, key, digits), text(ours, key, digits), ratio]
    notes = [
        f"{side} {r['seconds']:.4f} s" for side, r in found.items() if side not in (BASELINE, OURS)
    ]
    for key, value in ours.get("figures", {}).items():
        other = baseline.get("figures", {}).get(key, value)
        texts = [f"{v:,}" if type(v) is int else f"{v:,.3g}" for v in (other, value)]
        if "failed" in baseline:
            notes.append(f"{key} {texts[1]}")
        elif math.isclose(value, other, abs_tol=1e-6):
            notes.append(f"{key} {texts[1]} both")
        else:
            notes.append(f"{key} {' -> '.join(texts)}")
    return "| " + " | ".join([*cells, "; ".join(notes)]) + " |"


def measure_growth(quick: bool) -> Iterator[tuple[str, str, list]]:
    """Yields title, side and points (x, result) of each line; a line ends where a side failed."""
    for title, points in growth_cases(quick).items():
        for side in (BASELINE, OURS):
            line = []
            for x, name, _ in points:
                line.append((x, run_case(name, side, quick=quick)))
                if "failed" in line[-1][1]:
                    break
            yield title, side, line


def plot_growth(lines: list[tuple[str, str, list]], path: Path) -> None:
    """Draws seconds above megabytes, one column per curve, both axes logarithmic."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(title for title, _, _ in lines))
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    axes = figure.subplots(2, len(titles), sharex="col", sharey="row", squeeze=False)
    for title, side, line in lines:
        column = titles.index(title)
        color = {BASELINE: "#b04a2f", OURS: "#1f6fb4"}[side]
        done = [(x, result) for x, result in line if "failed" not in result]
        for axis, key, unit in zip(
            axes[:, column], ("seconds", "peak_mb"), ("seconds", "MB"), strict=True
        ):
            ys = [max(result[key], 1e-4) for _, result in done]
            axis.loglog([x for x, _ in done], ys, "o-", color=color, label=side)
            if done and len(done) < len(line):
                end = f"{line[-1][1]['failed']}\nat {line[-1][0]:,}"
                place = dict(xytext=(8, -6), textcoords="offset points", va="top")
                axis.annotate(end, (done[-1][0], ys[-1]), color=color, fontsize=9, **place)
            if side == OURS:
                axis.set_xticks([x for x, _ in line], [f"{x:,}" for x, _ in line], minor=False)
                axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_ylabel(unit if column == 0 else "")
        axes[1, column].set_xlabel(title)
    axes[0, 0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints the table; `--json` also writes every figure, `--figure` draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases, fewer repeats")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--figure", type=Path, help="measure the curves and draw them here, as PNG")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.side, options.device, options.quick)))
        return
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU on this machine")
    chosen = {
        name: case
        for name, case in CASES.items()
        if options.only.lower() in name.lower()
        and (case.quick or not options.quick)
        and (case.on_gpu or options.device == "cpu")
    }
    if not chosen:
        parser.error(
            f"no case with {options.only!r} in its name runs with these options; there are:\n"
            + "\n".join(CASES)
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    print("| case | baseline s | ours s | ratio | baseline MB | ours MB | ratio | also |")
    print("|---|---|---|---|---|---|---|---|")
    figures = {}
    for name, case in chosen.items():
        figures[name] = {
            side: run_case(name, side, options.device, options.quick)
            for side in (BASELINE, OURS, *case.extra)
        }
        print(as_row(name, figures[name]), flush=True)
    if options.figure:
        figures["growth"] = list(measure_growth(options.quick))
        plot_growth(figures["growth"], options.figure)
        print(f"curves: {options.figure}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
