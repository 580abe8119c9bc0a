"""What `ablate.py`, `leakage.py` and `race.py` share: timed trainings, results in a file."""

import argparse
import json
import os
from pathlib import Path
import time
from types import SimpleNamespace

import torch

from src_snippets.data.layouts import open_dataset
from src_snippets.data.samples import CellSamples
from src_snippets.data.structures import coco_ground_truth, Instances
from src_snippets.inference.predict import predict_image
from src_snippets.setup.config import change_config, Config, make_config
from src_snippets.setup.files import write_json
from src_snippets.training import trainer
from src_snippets.training.checkpoints import load_trained
from src_snippets.training.metrics import average_precision


def core_seconds() -> float:
    """Seconds that this process kept all cores of torch busy."""
    return time.process_time() / torch.get_num_threads()


def command_line(description: str, minutes: float, out: str) -> argparse.ArgumentParser:
    """The options that all of them have, with their defaults of `minutes` and `out`."""
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
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when CUDA is first used
        trainer.time = SimpleNamespace(
            perf_counter=core_seconds, monotonic=core_seconds, time=time.time
        )
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")


def timed_config(options, samples: CellSamples, minutes: float, **changes) -> Config:
    """Settings that train until the minutes are over, without a validation in between."""
    names = [str(name) for name in samples.dataset.categories.values()]
    limits = dict(epochs=10_000, eval_every=10_000, train_hours=minutes / 60)
    limits |= dict(detections=600, score_threshold=0.05)
    config = make_config(options.recipe, **limits | options.settings | changes)
    return change_config(config, dict(class_names=names))


def read_samples(options) -> CellSamples:
    """The training images of the dataset."""
    config = make_config(options.recipe)
    return CellSamples(open_dataset(options.data, config), config.cache_gb)


def train_timed(config: Config, samples, folder: Path) -> int:
    """Trains until the time is over, or continues; the number of epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    return len(trainer.Trainer(config, samples, [], folder).fit())


def predict_samples(checkpoint: Path, samples, config: Config) -> list[Instances]:
    """Predicts samples with a checkpoint, by the thresholds of the settings."""
    model = load_trained(checkpoint, config)
    return [predict_image([model], sample.image, config) for sample in samples]


def score(samples, predictions: list[Instances], config: Config) -> dict:
    """`average_precision` of the predictions for samples, in their order."""
    known = coco_ground_truth(samples, dict(enumerate(config.class_names, start=1)))
    return average_precision(known, dict(enumerate(predictions, start=1)))


class Results:
    """Results in a JSON file, with what they depend on.

    Args:
        path: of the file.
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
        columns = self.results.setdefault(row, {})
        if column not in columns:
            columns[column] = work()
            write_json(dict(about=self.about, results=self.results), self.path)
        return columns[column]
