"""Thresholds by class, chosen on validation images, measured on others."""

# %% [markdown]
# ## Which thresholds suit each class?
# Where a mask ends, from which overlap two masks are one cell, how small a cell can be: each class
# has its best value, by AP50 of the validation images. A number measured on the images that a value
# was chosen on flatters it, so each half of them is measured with what was chosen on the other.

# %%
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from src_snippets.config import Config
from src_snippets.evaluate import ap_of_hits, class_ap, Hits, hits_of
from src_snippets.forms import by_class, Instances
from src_snippets.fusion import settle

# %%
TRIED = {
    "mask_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    "class_nms": (0.1, 0.3, 0.5, 0.7, 1.0),
    "least_area": (1, 16, 32, 64, 128),
}
FLOORS = tuple(round(0.05 * k, 2) for k in range(1, 20))
LEAST_GAIN = 0.002  # of AP50, below which the value in the settings stays


# %%
Curves = Mapping[str, Mapping[float, list[Hits]]]  # by setting and value, one an image


def sweep_thresholds(
    ask: Callable[..., list[Instances]], truths: Sequence[Instances], config: Config
) -> Curves:
    """Hits on validation images for each value of each setting, the others as they are.

    Args:
        ask: changes to settings as keywords -> answers, one an image; by models that were not
            trained on it.
        truths: of the same images, with crowds.
    """
    loose = dict(class_nms=(1.0,), mask_nms=1.0, least_area=(1,), overlaps=True)  # settled below
    answers, curves = ask(**loose), {}  # what all values but those of masks are tried on
    for name, values in TRIED.items():
        curves[name] = {}
        for value in sorted({*values, *getattr(config, name)}):
            changes = {name: (value,)}
            redrawn = name == "mask_threshold" and (value,) != config.mask_threshold
            found = ask(**loose | changes) if redrawn else answers
            settled = [settle(a, replace(config, **changes)) for a in found]
            curves[name][value] = hits_of(settled, truths, config.num_classes)
    return curves


# %%
def each_class(values: tuple, config: Config) -> list:
    """The values of the classes 1..C out of one for all, or one for each."""
    return by_class(values, np.arange(1, config.num_classes + 1)).tolist()


def choose_thresholds(curves: Curves, config: Config, images: Sequence[int]) -> dict[str, tuple]:
    """The best value of each setting for each class, by AP50 of some images.

    Returns:
        Changes to the settings; where no value gains `LEAST_GAIN`, that of `config` stays.
    """
    changes = {}
    for name, by_value in curves.items():
        chosen = []
        for label, own in enumerate(each_class(getattr(config, name), config), start=1):
            scores = {v: class_ap([h[i] for i in images], label) for v, h in by_value.items()}
            best = max(scores, key=lambda v: (scores[v] or 0.0, v == own))
            gain = (scores[best] or 0.0) - (scores[own] or 0.0)
            chosen.append(best if gain > LEAST_GAIN else own)
        changes[name] = tuple(chosen)
    return changes


def class_f1(hits: Sequence[Hits], label: int, floor: float) -> float:
    """F1 of the detections of a class from a score on, 0..1."""
    strong = [(h.labels == label) & (h.scores >= floor) for h in hits]
    right = sum((h.found[s] >= 0).sum() for h, s in zip(hits, strong, strict=True))
    every = sum(s.sum() for s in strong) + sum(h.cells[label] for h in hits)
    return float(2 * right / every) if every else 0.0


def choose_floors(hits: Sequence[Hits], config: Config) -> tuple[float, ...]:
    """The score of each class from which on F1 is highest: for what is shown and put in tables."""
    chosen = []
    for label, own in enumerate(each_class(config.show_floor, config), start=1):
        scores = {floor: class_f1(hits, label, floor) for floor in (own, *FLOORS)}
        chosen.append(max(scores, key=scores.get))
    return tuple(chosen)


# %%
def tuned_on_halves(ask, truths: Sequence[Instances], curves: Curves, config: Config) -> list[Hits]:
    """Hits on all images, each answered with what was chosen on the other half of them."""
    order = np.random.default_rng(config.seed).permutation(len(truths))
    hits, halves = [None] * len(truths), (order[::2], order[1::2])
    for half, other in (halves, halves[::-1]):
        answers = ask(**choose_thresholds(curves, config, other))
        found = hits_of([answers[i] for i in half], [truths[i] for i in half], config.num_classes)
        for i, hit in zip(half, found, strict=True):
            hits[i] = hit
    return hits


# %%
class Tuned(NamedTuple):
    """What `tune_thresholds` chose.

    Attributes:
        changes: to the settings: those of `TRIED`, and `show_floor`, for each class.
        curves: hits by setting and value; hits: with what was chosen.
        before, after: AP50 with the settings and with what was chosen, each image measured by what
            the other half of the images chose.
    """

    changes: dict[str, tuple]
    curves: Curves
    hits: list[Hits]
    before: float
    after: float


def tune_thresholds(
    ask, truths: Sequence[Instances], before: Sequence[Hits], config: Config
) -> Tuned:
    """Chooses the settings of `TRIED` and `show_floor` for each class on validation images.

    Args:
        ask, truths: see `sweep_thresholds`; two images or more.
        before: hits of the answers with the settings as they are, one an image.
    """
    curves = sweep_thresholds(ask, truths, config)
    changes = choose_thresholds(curves, config, range(len(truths)))
    hits = hits_of(ask(**changes), truths, config.num_classes)
    changes["show_floor"] = choose_floors(hits, config)
    after = tuned_on_halves(ask, truths, curves, config)
    return Tuned(changes, curves, hits, ap_of_hits(before), ap_of_hits(after))


def threshold_lines(tuned: Tuned, config: Config) -> dict[str, list[tuple]]:
    """What `plot_thresholds` draws: AP50 by value, and F1 by least score, for each class."""
    classes, lines = range(1, config.num_classes + 1), {}
    for name, by_value in tuned.curves.items():
        scores = {k: [class_ap(found, k) for found in by_value.values()] for k in classes}
        chosen = tuned.changes[name]
        lines[f"{name}: AP50"] = [(list(by_value), scores[k], chosen[k - 1]) for k in classes]
    floors = sorted({*FLOORS, *tuned.changes["show_floor"]})
    lines["show_floor: F1"] = [
        (floors, [class_f1(tuned.hits, k, f) for f in floors], tuned.changes["show_floor"][k - 1])
        for k in classes
    ]
    return lines
