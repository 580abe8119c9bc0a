from dataclasses import replace

import numpy as np
import pytest

from src_snippets.config import recipe
from src_snippets.evaluate import hits_of
from src_snippets.forms import Instances
from src_snippets.fusion import settle
from src_snippets.plots import plot_thresholds
from src_snippets.rle import encode_crop
from src_snippets.thresholds import (
    choose_floors,
    choose_thresholds,
    class_f1,
    each_class,
    sweep_thresholds,
    threshold_lines,
    tune_thresholds,
    tuned_on_halves,
)

CONFIG = recipe("demo", num_classes=2)
SIZE = (40, 40)


def square(top, left, side):
    """The RLE of a square, and its box."""
    box = [left, top, left + side, top + side]
    return encode_crop(np.ones((side, side), bool), top, left, *SIZE), box


def instances(rows) -> Instances:
    """Of (top, left, side, label, score)."""
    rles, boxes = zip(*(square(*row[:3]) for row in rows), strict=True) if rows else ((), ())
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.array([row[3] for row in rows], np.int64)
    scores = np.array([row[4] for row in rows], np.float32)
    return Instances(boxes, scores, labels, list(rles), SIZE)


TRUTH = instances([(0, 0, 10, 1, 1), (20, 20, 10, 2, 1)])


def answer_with(mask_threshold=(0.5,), **_):
    """A model whose masks of class 1 are too large but at a threshold of 0.7; with a speck."""
    cut = each_class(mask_threshold, CONFIG)
    first = (0, 0, 10, 1, 0.6) if cut[0] == 0.7 else (0, 0, 20, 1, 0.6)
    return instances([first, (20, 20, 10, 2, 0.6), (5, 30, 3, 2, 0.9)])


def ask(**changes):
    return [answer_with(**changes) for _ in range(4)]


def test_each_class_gets_its_own_value():
    curves = sweep_thresholds(ask, [TRUTH] * 4, CONFIG)
    assert list(curves) == ["mask_threshold", "class_nms", "least_area"]
    chosen = choose_thresholds(curves, CONFIG, range(4))
    # Masks of class 1 are right at 0.7; specks of 9 px are of class 2; nothing overlaps.
    assert chosen == {"mask_threshold": (0.7, 0.5), "class_nms": (1.0, 1.0), "least_area": (1, 16)}
    hits = tuned_on_halves(ask_settled, [TRUTH] * 4, curves, CONFIG)
    assert [hit.found.tolist() for hit in hits] == [[0, 1]] * 4


def ask_settled(**changes):
    """As `ask`, with small cells left out as `settle` does."""
    least = each_class(changes.get("least_area", (1,)), CONFIG)
    found = ask(**changes)
    return [
        a.select((a.boxes[:, 2] - a.boxes[:, 0]) ** 2 >= np.array(least)[a.labels - 1])
        for a in found
    ]


def tuned_from(ask, truths):
    return tune_thresholds(ask, truths, hits_of(ask(), truths, CONFIG.num_classes), CONFIG)


def test_what_was_chosen_is_measured_on_other_images():
    tuned = tuned_from(ask_settled, [TRUTH] * 4)
    assert (tuned.before, tuned.after) == (pytest.approx(0.25), 1.0)
    assert tuned.changes["mask_threshold"] == (0.7, 0.5)
    assert tuned.changes["show_floor"] == (0.5, 0.5)
    # Two images whose best values differ: each is answered with the other's.
    first, other = TRUTH, instances([(0, 0, 20, 1, 1), (20, 20, 10, 2, 1)])
    tuned = tuned_from(lambda **changes: ask_settled(**changes)[:2], [first, other])
    assert tuned.after == 0.5  # class 1 is wrong on both, the specks of class 2 are gone


def test_looser_values_than_those_set_are_tried():
    """The answers that are compared were not settled before with the settings."""
    small = instances([(0, 0, 5, 1, 1)])
    strict = replace(CONFIG, least_area=(64,))

    def settled(**changes):
        return [settle(small, replace(strict, **changes))]

    curves = sweep_thresholds(settled, [small], strict)
    assert choose_thresholds(curves, strict, [0])["least_area"][0] in (1, 16)


def test_floor_of_the_best_f1_worked_by_hand():
    found = instances([(0, 0, 10, 1, 0.9), (10, 30, 5, 1, 0.4), (20, 20, 10, 2, 0.3)])
    hits = sweep_thresholds(lambda **_: [found], [TRUTH], CONFIG)["least_area"][1]
    assert class_f1(hits, 1, 0.0) == pytest.approx(2 / 3)  # one right of two, one cell
    assert class_f1(hits, 1, 0.5) == 1.0
    assert class_f1(hits, 2, 0.5) == 0.0
    assert class_f1([], 1, 0.5) == 0.0
    # The floor in the settings stays where it is as good as any.
    assert choose_floors(hits, CONFIG) == (0.5, 0.05)
    assert choose_floors(hits, replace(CONFIG, show_floor=(0.7, 0.2))) == (0.7, 0.2)


def test_curves_with_the_chosen_values():
    tuned = tuned_from(ask_settled, [TRUTH] * 4)
    lines = threshold_lines(tuned, CONFIG)
    assert list(lines) == [
        "mask_threshold: AP50",
        "class_nms: AP50",
        "least_area: AP50",
        "show_floor: F1",
    ]
    values, scores, chosen = lines["mask_threshold: AP50"][0]
    assert (values, chosen) == ([0.3, 0.4, 0.5, 0.6, 0.7], 0.7)
    assert scores == [0, 0, 0, 0, 1]
    figure = plot_thresholds(lines, ["a", "b"])
    assert [axis.get_xlabel() for axis in figure.axes] == list(lines)
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [dot.get_xydata().tolist() for dot in dots] == [[[0.7, 1.0]], [[0.5, 0.5]]]


def test_without_cells_the_settings_stay():
    empty = instances([])
    tuned = tuned_from(lambda **_: [empty, empty], [empty, empty])
    assert tuned.changes["mask_threshold"] == (0.5, 0.5)
    assert (tuned.before, tuned.after) == (0.0, 0.0)
    plot_thresholds(threshold_lines(tuned, CONFIG), ["a", "b"])
