"""The figures of the evaluation: what is in them, by hand; drawn for many and for no images."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from src_snippets.data.drawing import brighten, class_color
from src_snippets.data.structures import coco_ground_truth, ground_truth
from src_snippets.evaluation.figures import find_mistakes, plot_evaluation, plot_mistakes
from src_snippets.evaluation.matching import ap50, match_table, matches_above
from src_snippets.setup.config import make_config
from tests.conftest import empty_sample, field_of_cells, jittered, make_sample
from tests.test_matching import FOUR, instances, NOTHING, truth_of

NAMES = ("round", "flat", "dark")
CONFIG = make_config("demo", class_names=NAMES)
KINDS = ("missed", "false positive", "wrong class", "merged or split", "duplicate")


def axis_texts(axis):
    return [text.get_text() for text in axis.texts]


def legend_texts(owner):
    legends = owner.legends if hasattr(owner, "legends") else [owner.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


# Six panels


@pytest.fixture(scope="module")
def panels():
    """The axes for two images: one with five detections, one with none and the same truth."""
    found = instances(
        [
            (0, 0, 10, 10, 1, 0.9),
            (0, 20, 10, 10, 3, 0.8),  # of class 1
            (20, 0, 10, 10, 2, 0.7),
            (20, 0, 10, 9, 2, 0.6),  # the same instance again
            (32, 30, 4, 4, 3, 0.4),  # nothing there, and below the export threshold
        ]
    )
    table = match_table([found, NOTHING], [FOUR, FOUR], 3)
    return plot_evaluation(table, CONFIG, 2).axes


def test_precision_by_class_and_their_mean(panels):
    round_, flat, dark, mean = panels[0].lines
    # Of four round instances one is found, before any other: precision 1 up to recall 1/4.
    assert round_.get_ydata().tolist() == [1.0] * 26 + [0.0] * 75
    assert flat.get_ydata().tolist() == [1.0] * 51 + [0.0] * 50  # one of two
    assert dark.get_ydata().max() == 0
    assert mean.get_ydata().mean() == pytest.approx((26 + 51) / 303)
    assert [line.get_color() for line in panels[0].lines[:3]] == [*map(class_color, (1, 2, 3))]
    assert legend_texts(panels[0]) == [*NAMES, "mean, AP50 0.254"]


def test_ap50_and_f1_over_the_threshold(panels):
    ap, f1, submitted, exported = panels[1].lines
    thresholds = ap.get_xdata().round(2).tolist()
    assert thresholds == [round(0.05 * k, 2) for k in range(1, 20)]
    assert ap.get_ydata()[0] == pytest.approx((26 + 51) / 303)
    assert ap.get_ydata()[-1] == f1.get_ydata()[-1] == 0
    # Two true positives, eight instances; five detections, four from 0.5 on, one from 0.85 on.
    at = dict(zip(thresholds, f1.get_ydata(), strict=True))
    assert (at[0.05], at[0.5], at[0.85]) == pytest.approx((4 / 13, 4 / 12, 2 / 9))
    lines = [submitted.get_xdata()[0], exported.get_xdata()[0]]
    assert lines == [CONFIG.score_threshold, CONFIG.export_score_threshold]
    best, *limits = legend_texts(panels[1])[1:]
    assert best == "F1, best 0.364 from 0.65 on"  # two of three
    assert limits == ["score_threshold", "export_score_threshold"]


def test_scores_of_true_and_false_positives(panels):
    true, false = (patch.get_xy() for patch in panels[2].patches)
    assert sorted({x for x, y in true.round(3).tolist() if y}) == [0.65, 0.7, 0.85, 0.9]  # float32
    assert false[:, 1].max() == 1
    assert sorted({x for x, y in false.round(3).tolist() if y})[:2] == [0.4, 0.45]


def test_confusions_are_fractions_of_the_row(panels):
    texts = axis_texts(panels[3])
    assert texts[:4] == ["1\n25%", "0", "1\n25%", "2\n50%"]  # of four round instances
    assert texts[4:8] == ["0", "1\n50%", "0", "1\n50%"]
    assert texts[8:12] == ["0", "0", "0", "2\n100%"]
    assert texts[12:] == ["0", "1", "0", ""]  # the weak one is not exported
    for ticks in (panels[3].get_xticklabels(), panels[3].get_yticklabels()):
        assert [label.get_text() for label in ticks] == [*NAMES, "background"]


def test_counts_are_moved_by_less_than_half(panels):
    # Two images, true and predicted: round 2, 1 and 2, 0; flat 1, 2 and 1, 0; dark 1, 1 and 1, 0.
    dots = [line.get_xydata() for line in panels[4].lines[:3]]
    expected = [[[2, 1], [2, 0]], [[1, 2], [1, 0]], [[1, 1], [1, 0]]]
    assert np.abs(np.array(dots) - expected).max() < 0.31
    assert len(np.unique(np.array(dots))) == 12  # none lies on another
    errors = dict(round=1.5, flat=1.0, dark=0.5)
    expected = [f"{name}, mean absolute error {error}" for name, error in errors.items()]
    assert list(legend_texts(panels[4])) == expected


def test_images_without_cells_are_counted_too():
    """Two images are empty and found to be, one has a cell that is missed."""
    truths = [instances([(0, 0, 9, 9, 1, 1.0)]), NOTHING, NOTHING]
    for group in (truths, truths[::-1]):
        table = match_table([NOTHING] * 3, group, 1)
        axes = plot_evaluation(table, replace(CONFIG, class_names=("cell",)), 3).axes
        assert legend_texts(axes[4]) == ["cell, mean absolute error 0.3"]


def test_recall_by_size_has_error_bars(panels):
    points = [bars.lines[0].get_xydata()[0].tolist() for bars in panels[5].containers]
    # Eight instances in six groups by size: areas 100 (6 of them) and 200.
    assert [x for x, _ in points] == pytest.approx([10] * 4 + [200**0.5] * 2)
    assert sum(y > 0 for _, y in points) in (1, 2)
    for bars, (_, recall) in zip(panels[5].containers, points, strict=True):
        (low, high) = bars.lines[2][0].get_segments()[0][:, 1]
        assert 0 <= low <= recall <= high <= 1
        assert high - low > 0.5  # one or two instances say little


@pytest.mark.parametrize("num_classes", [1, 8])
def test_figures_of_many_and_of_no_images(num_classes, tmp_path):
    names = [f"kind {k}" for k in range(1, num_classes + 1)]
    config = make_config("demo", class_names=names)
    samples = [field_of_cells(0), empty_sample()]
    labels = [torch.arange(len(sample.labels)) % num_classes + 1 for sample in samples]
    samples = [replace(s, labels=own) for s, own in zip(samples, labels, strict=True)]
    known = coco_ground_truth(samples, dict(enumerate(names, start=1)))
    predictions = [p.select(p.labels <= num_classes) for p in jittered(known).values()]
    empty = [p.select([]) for p in predictions]
    for group, found in (
        (samples, predictions),
        (samples, empty),
        (samples[1:], empty[1:]),
        ([], []),
    ):
        truths = [ground_truth(sample, crowds=True) for sample in group]
        table = match_table(found, truths, num_classes)
        plots = (
            plot_evaluation(table, config, len(group)),
            plot_mistakes(group, truths, found, table, config),
        )
        for figure in plots:
            figure.savefig(tmp_path / "figure.png", dpi=20)
    assert np.isnan(ap50(table))


# Mistakes


def mistakes_of(*pairs, min_score=0.0):
    """`find_mistakes` of (prediction, truth) pairs: (image, detections, targets) by kind."""
    predictions, truths = zip(*pairs, strict=True)
    table = matches_above(match_table(predictions, truths, 3), min_score)
    mistakes = find_mistakes(truths, predictions, table)
    rows = {kind: mistakes[mistakes.kind == kind] for kind in KINDS}
    assert len(mistakes) == sum(map(len, rows.values()))
    return {
        kind: group[["image", "detections", "targets"]].to_numpy().tolist()
        for kind, group in rows.items()
        if len(group)
    }


def test_mistakes_worked_by_hand():
    first = instances(
        [
            (0, 0, 10, 30, 1, 0.6),  # merges 0 and 1
            (20, 0, 10, 10, 1, 0.7),  # instance 2 in a wrong class
            (20, 40, 10, 9, 3, 0.9),  # two halves of instance 3
            (20, 50, 10, 10, 3, 0.8),
            (34, 20, 5, 5, 2, 0.4),  # nothing there
        ]
    )
    second = instances([(20, 0, 10, 9, 2, 0.5), (20, 0, 10, 10, 2, 0.9)])  # instance 2 twice
    assert mistakes_of((first, FOUR), (second, FOUR)) == {
        "missed": [[1, [], [3]], [1, [], [0]], [1, [], [1]]],  # by area
        "false positive": [[0, [4], []]],
        "wrong class": [[0, [1], [2]]],
        "merged or split": [[0, [0], [0, 1]], [0, [2, 3], [3]]],
        "duplicate": [[1, [0, 1], [2]]],  # then the one that has the instance
    }
    # Right by class, although a better one of another class has the instance
    both = instances([(20, 0, 10, 10, 1, 0.9), (20, 0, 10, 10, 2, 0.8)])
    assert set(mistakes_of((both, truth_of((20, 0, 10, 10, 2))))) == {"wrong class"}
    # What is not exported is no mistake, but its instances are missed.
    assert mistakes_of((first, FOUR), min_score=0.85) == {
        "missed": [[0, [], [3]], [0, [], [0]], [0, [], [1]], [0, [], [2]]],
        "false positive": [[0, [2], []]],
    }
    assert mistakes_of((FOUR, FOUR), (NOTHING, NOTHING)) == {}


def test_a_merge_has_most_of_several_instances_one_of_them_missed():
    little = instances([(0, 0, 10, 25, 1, 0.9)])  # half of the second: not most of it
    both = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1))
    assert "merged or split" not in mistakes_of((little, both))
    each = [(0, 0, 10, 30, 1, 0.9), (0, 0, 10, 10, 1, 0.8), (0, 20, 10, 10, 1, 0.7)]
    assert mistakes_of((instances(each), both)) == {"false positive": [[0, [0], []]]}
    # Found, and swallows its neighbour.
    truth = truth_of((0, 0, 20, 20, 1), (0, 20, 20, 4, 2))
    found = instances([(0, 0, 20, 24, 1, 0.9)])
    assert mistakes_of((found, truth)) == {"merged or split": [[0, [0], [0, 1]]]}
    # The largest comes first.
    row = truth_of(*((0, 10 * k, 10, 8, 1) for k in range(5)))
    found = instances([(0, 0, 10, 18, 1, 0.9), (0, 20, 10, 28, 1, 0.2)])
    merges = mistakes_of((found, row))["merged or split"]
    assert [targets for _, _, targets in merges] == [[2, 3, 4], [0, 1]]


def test_a_split_instance_has_most_of_several_detections():
    uneven = instances([(20, 40, 10, 15, 3, 0.9), (20, 56, 10, 4, 3, 0.8)])
    truth = truth_of((20, 40, 10, 20, 3))
    assert mistakes_of((uneven, truth)) == {"merged or split": [[0, [0, 1], [0]]]}
    beside = instances([(20, 40, 10, 15, 3, 0.9), (20, 55, 20, 5, 3, 0.8)])  # half of it outside
    assert mistakes_of((beside, truth)) == {"false positive": [[0, [1], []]]}


# The gallery


def test_the_gallery_shows_truth_and_prediction():
    ids = np.zeros((40, 60), int)
    ids[:10, :10], ids[:10, 20:30], ids[20:30, 40:] = 1, 2, 3
    sample = replace(make_sample([ids], [1]), labels=torch.tensor([1, 1, 3]))
    found = instances(
        [
            (0, 0, 10, 10, 2, 0.75),  # wrong class
            (20, 40, 10, 20, 3, 0.9),
            (20, 40, 10, 18, 3, 0.8),  # a duplicate of it
            (30, 0, 5, 5, 1, 0.3),  # not exported
        ]
    )
    table = match_table([found], [ground_truth(sample)], 3)
    figure = plot_mistakes([sample], [ground_truth(sample)], [found], table, CONFIG, 2)
    axes = figure.axes
    counts = ("1", "none", "1", "none", "1")
    rows = [axes[2 * k].texts[-1].get_text() for k in range(5)]
    assert rows == [f"{kind}:\n{count}" for kind, count in zip(KINDS, counts, strict=True)]
    missed, wrong, again = axes[0], axes[4], axes[8]
    assert wrong.get_title() == "0.75 flat\ntrue: round"
    assert missed.get_title() == "true: round"
    assert again.get_title() == "0.80 dark\n0.90 dark\ntrue: dark"
    # Three true instances, the one that it is about thick, then its detection, dashed.
    colors = [class_color(k) for k in (1, 1, 3)]
    assert [line.get_color() for line in wrong.lines] == [*colors, "black"]
    assert [line.get_linewidth() for line in wrong.lines] == [3, 1, 1, 2]
    assert [line.is_dashed() for line in wrong.lines] == [False] * 3 + [True]
    assert [line.get_color() for line in again.lines[3:]] == ["black", "#ff00ff"]  # and the winner
    assert again.lines[4].get_xydata().max(0).tolist() == [59.5, 29.5]  # the border of pixel 59
    assert (wrong.get_xlim(), wrong.get_ylim()) == ((-0.5, 59.5), (39.5, -0.5))
    assert not wrong.axison
    assert legend_texts(figure)[:2] == ["prediction", "better prediction of the same cell"]
    assert "true round" in legend_texts(figure)


def test_a_crop_shows_what_is_near():
    ids = np.zeros((300, 300), int)
    ids[100:110, 150:160], ids[100:110, 170:180], ids[280:290, :10] = 1, 2, 3
    sample = make_sample([ids], [1])
    sample = replace(sample, image=torch.full_like(sample.image, 20))
    sample.image[:, 285, 5] = 200
    found = ground_truth(sample).select([])
    table = match_table([found], [ground_truth(sample)], 3)
    figure = plot_mistakes([sample], [ground_truth(sample)], [found], table, CONFIG, 3)
    first, _, last = figure.axes[:3]
    assert (first.get_xlim(), first.get_ylim()) == ((122.5, 186.5), (136.5, 72.5))
    shown = first.images[0]  # in the brightness of the whole image, not of the crop
    assert np.array_equal(shown.get_array(), brighten(sample.image.numpy())[73:137, 123:187])
    assert shown.get_extent() == [122.5, 186.5, 136.5, 72.5]
    assert len(first.lines) == 2  # the third is far
    x, y = first.lines[0].get_xydata().mean(0).round().astype(int)
    assert ids[y, x] == 1  # the outline is on its instance
    assert (last.get_xlim(), last.get_ylim()) == ((-0.5, 63.5), (299.5, 235.5))
