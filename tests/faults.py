"""Kills a run at random moments until it is done: `python -m tests.faults --kills 20`.

The story runs on a small drawn dataset once without interruption, then again and again, killed by
SIGKILL at random events (inside a step, half through writing a checkpoint or a result, between two
renames, in validation, in prediction), until it gets to its end. Weights, history and results of
both must be equal, byte by byte.
"""

import argparse
import hashlib
import os
from pathlib import Path
import random
import runpy
import signal
import subprocess
import sys
import tempfile

import torch

ROOT = Path(__file__).parents[1]
SETTINGS = (
    '{"epochs": 4, "eval_every": 2, "crop": 64, "fpn_channels": 16, "box_features": 32, '
    '"mask_convs": 1, "proposals": 50, "roi_batch_size": 16, "ema": 0.9, "copy_paste": 0.5, '
    '"folds": 2, "score_threshold": 0.0, "detections": 20}'
)
EVENTS = "events that a kill may meet:"


def half_saved(content, path, *_, **__) -> None:
    """Leaves the first half of what `torch.save` would write."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        really_save(content, whole)
        Path(path).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def half_written(path, text, *_, **__) -> None:
    """Leaves, behind what is there, all but the last letter or half of a text."""
    kept = len(text) - 1 if len(text) % 2 else len(text) // 2
    with path.open("ab") as file:
        file.write(text.encode()[:kept])


def half_appended(path, *_, **__) -> None:
    """Leaves half a line at the end of a file of predictions."""
    with path.open("ab") as file:
        file.write(b"[3, [[[0.5, 1.0")


really_save = torch.save


def run_story(kill_at: int) -> None:
    """Runs the story in this process; it is killed at an event, counted from 1, 0 for none."""
    from src_snippets.inference import predict
    from src_snippets.training import trainer

    count = 0

    def watch(owner, name: str, half=None, mode=None) -> None:
        real = getattr(owner, name)

        def watched(*arguments, **options):
            nonlocal count
            count += mode is None or mode in arguments
            if count == kill_at and (mode is None or mode in arguments):
                if half:
                    half(*arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, watched)

    watch(torch, "save", half_saved)
    watch(Path, "write_text", half_written)
    watch(Path, "replace")
    watch(trainer, "lr_factor")  # inside a step
    watch(trainer, "detect")
    watch(trainer, "average_precision")
    watch(predict, "detect")
    watch(Path, "open", half_appended, mode="a")
    runpy.run_module("src_snippets.notebook", run_name="__main__")
    print(EVENTS, count)


def start(out: Path, data: Path, kill_at: int) -> int | None:
    """Runs the story in a process of its own.

    Returns:
        The number of events, None where it was killed.

    Raises:
        RuntimeError: it ended by itself before its end.
    """
    environment = os.environ | dict(HW3_DATA=str(data), HW3_OUT=str(out), HW3_RECIPE="demo")
    environment |= dict(HW3_SETTINGS=SETTINGS)
    command = [sys.executable, "-m", "tests.faults", "--kill-at", str(kill_at)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise RuntimeError(f"killed at {kill_at}, it ended with:\n{done.stderr[-3000:]}")
    return int(done.stdout.split(EVENTS)[1])


def digests(out: Path) -> dict[str, str]:
    """What has to be equal, by name: best weights, histories, results; and the states' weights."""
    names = ["test-results.json", "test-results.zip"]
    files = [out / name for name in names]
    files += sorted((out / "runs").glob("*/best.pt")) + sorted((out / "runs").glob("*/*.csv"))
    files += sorted((out / "runs").glob("*/[!.]*.json*"))
    found = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    for path in sorted((out / "runs").glob("*/last.pt")):
        state = torch.load(path, weights_only=True)
        digest = hashlib.sha256()
        for part in ("model", "ema", "optimizer", "steps", "history"):
            digest.update(repr(flat(state[part])).encode())
        found[f"{path.parent.name}/last.pt"] = digest.hexdigest()
    return found


def flat(value):
    """A state with tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else value


def kill_and_compare(kills: int, seed: int, folder: Path, data: Path) -> list[int]:
    """Runs to the end with so many kills on the way and compares with a run without.

    Returns:
        The events at which it was killed, counted from the start of each attempt.

    Raises:
        AssertionError: something differs; it says what.
    """
    events = start(folder / "whole", data, 0)
    draw, points = random.Random(seed), []
    while len(points) < kills:
        # Some early, some late; each attempt has fewer events left than the one before.
        point = draw.randint(1, max(events // 4, 2))
        if start(folder / "cut", data, point) is not None:
            break  # it came to its end before: nothing is left to kill
        points.append(point)
        print(f"killed at event {point}", flush=True)
    start(folder / "cut", data, 0)
    wanted, found = digests(folder / "whole"), digests(folder / "cut")
    differ = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    assert not differ, f"different after {len(points)} kills at {points}: {', '.join(differ)}"
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kill_at is not None:
        run_story(options.kill_at)
        return
    from src_snippets.data.synthetic import make_synthetic

    killed, attempt = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = make_synthetic(Path(folder) / "data", train=8, test=3)
        while killed < options.kills:
            own, seed = Path(folder) / f"{attempt}", options.seed + attempt
            points = kill_and_compare(options.kills - killed, seed, own, data)
            killed, attempt = killed + len(points), attempt + 1
            print(f"{len(points)} kills on the way: weights, history and results are equal")
    print(f"{killed} kills in {attempt} runs")


if __name__ == "__main__":
    main()
