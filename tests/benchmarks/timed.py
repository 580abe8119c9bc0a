"""What `ablate.py`, `leakage.py` and `race.py` share: timed trainings, kept results."""

import argparse
from dataclasses import replace
import json
import os
from pathlib import Path
import time
from types import SimpleNamespace

import torch

from src_snippets import train
from src_snippets.config import Config, recipe
from src_snippets.datasets import CellSamples, open_dataset, write_json


def core_seconds() -> float:
    """Seconds that this process kept all cores of torch busy."""
    return time.process_time() / torch.get_num_threads()


def command_line(description: str, minutes: float, out: str) -> argparse.ArgumentParser:
    """The options that all of them have, with their defaults of these two."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="a dataset's folder")
    parser.add_argument("--minutes", type=float, default=minutes, help="of one training")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--settings", type=json.loads, default={}, help="of all trainings, as JSON")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def choose_clock(parser: argparse.ArgumentParser, device: str) -> None:
    """On a CPU minutes are those of its cores: a run held by SIGSTOP loses none of them.

    Other work beside it makes threads wait for each other and costs steps.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch looks at it when it is first asked
        train.time = SimpleNamespace(perf_counter=core_seconds, time=time.time)
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")


def timed_settings(options, minutes: float, **changes) -> Config:
    """Settings whose epochs have no limit but the time; their end is not looked at in training."""
    limits = dict(epochs=10_000, eval_every=10_000, train_hours=minutes / 60, detections=600)
    return recipe(options.recipe, **limits | options.settings | changes)


def for_classes(config: Config, samples: CellSamples) -> Config:
    """The settings with as many classes as the samples have."""
    return replace(config, num_classes=len(samples.dataset.categories))


class Kept:
    """Results in a file, with what they were measured of.

    Args:
        path: of the JSON file.
        options: of the command line; names: those that results depend on; digest: of the data.

    Raises:
        SystemExit: the file is of other options or data.
    """

    def __init__(self, path: Path, options, names: tuple[str, ...], digest: str):
        about = {name: getattr(options, name) for name in ("recipe", "settings", "minutes", *names)}
        about |= dict(data=digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text()) if path.is_file() else dict(about=about, results={})
        if known["about"] != about:
            raise SystemExit(f"{path}: of other settings or data. Give another folder as --out.")
        self.path, self.about, self.results = path, about, known["results"]

    def get(self, row: str, column: str, work):
        """The result of a row and column; where there is none, `work()`'s, written at once."""
        found = self.results.setdefault(row, {})
        if column not in found:
            found[column] = work()
            write_json(dict(about=self.about, results=self.results), self.path)
        return found[column]


def read_samples(options) -> CellSamples:
    """The training fields of the dataset."""
    settings = recipe(options.recipe)
    return CellSamples(open_dataset(options.data, settings), settings.cache_gb)
