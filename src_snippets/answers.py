"""Answers of checkpoints: of the one that never saw an image, or of all of them together."""

# %% [markdown]
# ## Whom is it asked?
# A validation image is answered by the one model that was not trained on it, a test image by all
# models together. Checkpoints are loaded where they are asked: in each GPU's own process.

# %%
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
import hashlib
import json
from pathlib import Path

from src_snippets.config import Config
from src_snippets.datasets import ImageRecord
from src_snippets.evaluate import Hits
from src_snippets.forms import CellSample, Instances
from src_snippets.predict import answer_samples, Member, predict_images
from src_snippets.processes import from_first
from src_snippets.thresholds import tune_thresholds, Tuned
from src_snippets.train import load_trained

# %%
Asked = Sequence[tuple[Path, Sequence[CellSample]]]  # a `best.pt`, and images it never saw


def answer_held_out(
    parts: Sequence[tuple[Member, Sequence[CellSample]]], config: Config, **changes
) -> list[Instances]:
    """`answer_samples` of several parts, each by the one model that never saw it.

    Args:
        parts: a model with its settings, and samples, each.
        changes: to `config` and to the models' settings, those of prediction alone.
    """
    answers = []
    for (model, own), samples in parts:
        member = (model, replace(own, **changes))
        answers += answer_samples([member], samples, replace(config, **changes))
    return answers


def load_asked(asked: Asked, config: Config) -> list[tuple[Member, Sequence[CellSample]]]:
    """Loads the models that are asked."""
    return [(load_trained(path, config), samples) for path, samples in asked]


def answer_validation(asked: Asked, config: Config) -> list[Instances]:
    """Finds the cells of validation images, part after part.

    Raises:
        FileNotFoundError, BadInput, ValueError: see `load_trained`.
    """
    return answer_held_out(load_asked(asked, config), config)


def tune_on_validation(
    asked: Asked, truths: Sequence[Instances], before: Sequence[Hits], config: Config
) -> Tuned:
    """See `tune_thresholds`."""
    ask = partial(answer_held_out, load_asked(asked, config), config)
    return tune_thresholds(ask, truths, before, config)


# %%
def answers_file(
    folder: Path, checkpoints: Sequence[Path], images: Sequence[ImageRecord], config: Config
) -> Path:
    """Where answers are kept while they are made: a name for these models, images and settings."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for path in checkpoints:
        digest.update(Path(path).read_bytes())
    for image in images:
        digest.update(f"{image} {image.path.stat().st_mtime_ns}".encode())
    return folder / f"answers-{digest.hexdigest()[:8]}.jsonl"


def answer_test(
    own: Sequence[Path],
    others: Sequence[Path],
    images: Sequence[ImageRecord],
    folder: Path,
    config: Config,
) -> Mapping[int, Instances]:
    """Finds the cells of test images, all models together; goes on where it was stopped.

    Args:
        own: checkpoints of these settings; others: of any recipe.
        folder: keeps the answers while they are made.
        config: answers with its settings for prediction.

    Returns:
        `Instances` by image id, one for every image.

    Raises:
        FileNotFoundError, BadInput, ValueError: see `load_trained`; an image cannot be read.
    """
    members = [load_trained(path, config) for path in own]
    members += [load_trained(path, config, same=False) for path in others]
    print(f"{len(members)} models answer together" if len(members) > 1 else "one model answers")
    kept = from_first(answers_file, folder, [*own, *others], images, config)
    return predict_images(members, images, config, kept)
