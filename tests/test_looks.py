from dataclasses import replace

import numpy as np
import pytest
import torch

from src_snippets.config import recipe
from src_snippets.evaluate import (
    ap_of_hits,
    average_precision,
    class_ap,
    find_hits,
    Hits,
    hits_of,
    outside_crowds,
)
from src_snippets.forms import coco_truth, Instances, truth_instances, with_crowds
from src_snippets.looks import (
    assign_cells,
    calibrate,
    CellPairs,
    closest,
    companions,
    count_by_class,
    count_confusions,
    count_errors,
    find_mistakes,
    floor_curves,
    match_cells,
    mean_curves,
    merges_and_splits,
    mistake_title,
    overlapping_pairs,
    plot_calibration,
    plot_confusions,
    plot_count_errors,
    plot_floors,
    plot_mistakes,
    plot_precision,
    precision_curves,
    view_window,
)
from src_snippets.plots import class_color
from src_snippets.rle import encode_crop
from tests.conftest import empty_sample, field_of_cells, jittered, make_sample

SIZE = (40, 60)
NAMES = ["round", "flat", "dark"]


def instances(parts, size=SIZE) -> Instances:
    """Rectangles (top, left, height, width, class, score)."""
    boxes = [(left, top, left + width, top + height) for top, left, height, width, _, _ in parts]
    crops = [np.ones(part[2:4], bool) for part in parts]
    corners = [part[:2] for part in parts]
    rles = [encode_crop(c, *corner, *size) for c, corner in zip(crops, corners, strict=True)]
    return Instances(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([part[5] for part in parts], np.float32),
        np.array([part[4] for part in parts], np.int64),
        rles,
        size,
    )


def truth_of(parts, size=SIZE) -> Instances:
    return instances([(*part, 1.0) for part in parts], size)


NOTHING = instances([])
FOUR = truth_of([(0, 0, 10, 10, 1), (0, 20, 10, 10, 1), (20, 0, 10, 10, 2), (20, 40, 10, 20, 3)])


def axis_texts(axis):
    return [text.get_text() for text in axis.texts]


def legend_texts(owner):
    legends = owner.legends if hasattr(owner, "legends") else [owner.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


# Precision over recall


def test_precision_worked_by_hand():
    sample = make_sample([np.repeat([[1, 0, 2, 0, 3]], 5, 0).repeat(4, 0).repeat(4, 1)], [1])
    truth = coco_truth([sample], 2)
    one = truth_instances(sample).select([0])
    # One of three cells is found: precision 1 up to a recall of 1/3.
    table = precision_curves(truth, {1: one})
    assert table.shape == (10, 101, 2)
    assert table[0, :, 0].tolist() == [1.0] * 34 + [0.0] * 67
    assert (table[..., 1] == -1).all()
    curves = mean_curves(table)
    assert list(curves) == [0.5, 0.75, 0.9]
    assert curves[0.9].sum() == 34  # class 2, which has no cells, does not count
    figure = plot_precision(table, ["round", "flat"])
    mean, single = figure.axes
    assert legend_texts(mean) == [f"IoU {iou}: AP 0.337" for iou in (0.5, 0.75, 0.9)]
    assert legend_texts(figure) == ["round: AP50 0.337", "flat: no cells"]
    assert single.lines[0].get_ydata().tolist() == table[0, :, 0].tolist()
    assert len(single.lines[1].get_ydata()) == 0


def test_areas_below_the_curves_are_ap():
    samples = [field_of_cells(k) for k in range(3)]
    truth = coco_truth(samples, 4)
    answers = jittered(truth)
    table, scores = precision_curves(truth, answers), average_precision(truth, answers)
    means = [curve.mean() for curve in mean_curves(table).values()]
    assert means[:2] == pytest.approx([scores["AP50"], scores["AP75"]])
    assert means[0] > means[1] > means[2]
    assert table[0, :, 1].mean() == pytest.approx(scores["classes"][2]["AP50"])


def test_precision_of_nothing():
    bare = precision_curves(coco_truth([empty_sample()], 3), {})
    assert mean_curves(bare) == {}
    figure = plot_precision(bare, NAMES)
    assert legend_texts(figure) == ["round: no cells", "flat: no cells", "dark: no cells"]
    assert mean_curves(precision_curves(coco_truth([field_of_cells()], 3), {}))[0.5].max() == 0


# Matching


def test_pairs_worked_by_hand():
    found = instances([(0, 0, 10, 5, 1, 0.5), (30, 30, 5, 5, 1, 0.4), (0, 5, 10, 20, 2, 0.3)])
    pairs = overlapping_pairs(found, FOUR)
    assert pairs.found.tolist() == [0, 2, 2]
    assert pairs.cell.tolist() == [0, 0, 1]
    assert pairs.iou.tolist() == pytest.approx([0.5, 50 / 250, 50 / 250])
    assert pairs.of_found.tolist() == pytest.approx([1, 0.25, 0.25])
    assert pairs.of_cell.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert pairs.where(pairs.iou > 0.3).cell.tolist() == [0]
    for column, same in zip(pairs, overlapping_pairs(found, FOUR, rows=1), strict=True):
        assert column.tolist() == same.tolist()
    for found, truth in ((NOTHING, FOUR), (FOUR, NOTHING), (NOTHING, NOTHING)):
        assert [len(column) for column in overlapping_pairs(found, truth)] == [0] * 5


def test_the_better_one_chooses_first():
    def assigned(rows, cells, ious, scores):
        columns = np.array(rows), np.array(cells), np.array(ious)
        return assign_cells(CellPairs(*columns, *columns[2:] * 2), np.array(scores)).tolist()

    # Detection 1 takes cell 0, the best of its two; what is left for 0 is too little.
    assert assigned([0, 0, 1, 1], [0, 1, 0, 1], [0.9, 0.4, 0.7, 0.6], [0.5, 0.8]) == [-1, 0]
    assert assigned([0, 0, 1, 1], [0, 1, 0, 1], [0.9, 0.5, 0.7, 0.6], [0.5, 0.8]) == [1, 0]
    assert assigned([0, 1], [0, 0], [0.6, 0.9], [0.5, 0.5]) == [0, -1]  # equal scores: in order


def test_matching_worked_by_hand():
    # The first cell is found as class 2, then as class 1; the third is too little overlapped.
    parts = [(0, 0, 10, 9, 2, 0.9), (0, 0, 10, 10, 1, 0.8), (20, 0, 4, 10, 2, 0.7)]
    match = match_cells(instances([*parts, (0, 20, 10, 10, 1, 0.6)]), FOUR)
    assert match.cell.tolist() == [0, -1, -1, 1]
    assert match.right.tolist() == [False, True, False, True]
    assert match.missed.tolist() == [False, False, True, True]
    assert len(match_cells(NOTHING, FOUR).cell) == 0
    assert match_cells(NOTHING, FOUR).missed.all()
    assert match_cells(FOUR, NOTHING).cell.tolist() == [-1] * 4
    assert match_cells(FOUR, FOUR).cell.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_right_is_what_the_scorer_says(seed):
    sample = field_of_cells(seed)
    found = jittered(coco_truth([sample], 4), seed)[1]
    found = found.select(np.argsort(-found.scores, kind="stable"))
    truth = truth_instances(sample)
    hits = find_hits(found, truth, 4)
    assert match_cells(found, truth).right.tolist() == (hits.found >= 0).tolist()
    # With one class for all, so is the cell.
    alike = [replace(side, labels=np.ones_like(side.labels)) for side in (found, truth)]
    assert match_cells(found, truth).cell.tolist() == find_hits(*alike, 1).found.tolist()


def test_what_lies_in_a_crowd_is_left_out():
    ids = np.zeros(SIZE, int)
    ids[:20, :20], ids[25:35, 5:15] = 1, 2
    sample = replace(make_sample([ids], [1]), labels=torch.tensor([-1, 1]))
    inside, beside = (2, 2, 5, 5, 2, 0.9), (2, 15, 5, 12, 1, 0.8)  # 5 of 12 columns are in it
    found = instances([inside, beside, (25, 5, 10, 10, 1, 0.7)])
    match = match_cells(found, with_crowds(sample))
    assert match.found.rles == outside_crowds(found, sample).rles == found.rles[1:]
    assert match.cell.tolist() == [-1, 0]
    assert len(match.truth) == 1
    nothing = match_cells(found.select([]), with_crowds(sample))
    assert nothing.missed.tolist() == [True]


# Classes


def test_confusions_worked_by_hand():
    found = instances(
        [
            (0, 0, 10, 10, 1, 0.9),
            (0, 20, 10, 10, 3, 0.8),  # of class 1
            (20, 0, 10, 10, 2, 0.7),
            (20, 0, 10, 9, 2, 0.6),  # the same cell again
            (32, 30, 4, 4, 3, 0.5),  # nothing there
        ]
    )
    table = count_confusions([match_cells(found, FOUR), match_cells(NOTHING, FOUR)], 3)
    assert table.tolist() == [[1, 0, 1, 2], [0, 1, 0, 1], [0, 0, 0, 2], [0, 1, 1, 0]]
    (axis,) = plot_confusions(table, NAMES).axes
    texts = axis_texts(axis)
    assert texts[:4] == ["1\n25%", "0", "1\n25%", "2\n50%"]
    assert len(texts) == 15  # nothing missed where nothing is: no such thing
    assert [label.get_text() for label in axis.get_xticklabels()] == [*NAMES, "missed"]
    assert [label.get_text() for label in axis.get_yticklabels()] == [*NAMES, "nothing there"]
    assert axis.images[0].get_array()[2:].tolist() == [[0, 0, 0, 1], [0] * 4]


def test_confusions_of_nothing():
    assert count_confusions([], 2).tolist() == [[0] * 3] * 3
    assert count_confusions([match_cells(NOTHING, NOTHING)], 1).tolist() == [[0, 0], [0, 0]]
    (axis,) = plot_confusions(np.zeros((2, 2), int), ["cell"]).axes
    assert axis_texts(axis) == ["0"] * 3


# Scores


def hits_with(scores, right, cells=1) -> Hits:
    """Hits of class 1, of which the `right` ones find a cell each."""
    found = np.where(right, np.cumsum(right) - 1, -1)
    labels = np.ones(len(scores), np.int64)
    return Hits(labels, np.array(scores, np.float32), found, np.array([0, cells]))


def test_calibration_worked_by_hand():
    # Two near 0.9, one of them right; one at 0.3, right: (2 * |0.9 - 0.5| + |0.3 - 1|) / 3.
    hits = [hits_with([0.92, 0.3], [True, True], 2), hits_with([0.88 + 0.02], [False])]
    counts, scores, right, error = calibrate(hits)
    assert counts.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert scores[[3, 9]].tolist() == pytest.approx([0.3, 0.91])
    assert right[[3, 9]].tolist() == [1, 0.5]
    assert error == pytest.approx((0.7 + 2 * 0.41) / 3)
    (axis,) = plot_calibration(counts, scores, right, error).axes
    assert axis.get_title() == "expected calibration error 0.507"
    assert [bar.get_height() for bar in axis.patches] == [1, 0.5]
    assert [bar.get_x() for bar in axis.patches] == pytest.approx([0.3, 0.9])
    assert axis.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert axis.lines[1].get_xdata().tolist() == pytest.approx([0.3, 0.91])
    assert axis_texts(axis) == ["1", "2"]


def test_edges_of_calibration():
    counts = calibrate([hits_with([1.0, 0.7, 0.0], [True] * 3, 3)])[0]
    assert np.flatnonzero(counts).tolist() == [0, 7, 9]  # 1.0 is in the last bin
    assert calibrate([hits_with([1.0], [True])])[3] == 0.0
    assert calibrate([hits_with([1.0], [False])])[3] == 1.0
    counts, _, _, error = nothing = calibrate([hits_with([], np.zeros(0, bool))])
    assert (counts.sum(), error) == (0, None)
    assert calibrate([])[3] is None
    (axis,) = plot_calibration(*nothing).axes
    assert (axis.get_title(), len(axis.patches)) == ("no detections", 0)


# Floors


def test_floors_worked_by_hand():
    config = recipe("demo", num_classes=2, score_floor=0.3, show_floor=(0.5, 0.62))
    hits = hits_with([0.9, 0.6, 0.3], [True, False, True], 2)
    hits = [hits._replace(cells=np.array([0, 2, 0]))]
    floors, ap, f1 = floor_curves(hits, config)
    assert floors.tolist() == sorted([*(round(0.05 * k, 2) for k in range(6, 20)), 0.62])
    at = {floor: row for row, floor in enumerate(floors.tolist())}
    # All: precision 1 up to a recall of 1/2, then 2/3. Without the last: F1 = 2 * 1 / (2 + 2).
    assert ap[at[0.3], 0] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert f1[at[0.3], 0] == pytest.approx(2 * 2 / (3 + 2))
    assert (ap[at[0.5], 0], f1[at[0.5], 0]) == (pytest.approx(51 / 101), 2 / 4)
    assert f1[at[0.62], 0] == pytest.approx(2 / 3)
    assert (ap[at[0.95], 0], f1[at[0.95], 0]) == (0, 0)
    assert np.isnan(ap[:, 1]).all()
    assert np.isnan(f1[:, 1]).all()
    figure = plot_floors(floors, ap, f1, config, ["round", "flat"])
    assert [axis.get_title() for axis in figure.axes] == [
        "AP50, dots: score_floor",
        "F1, dots: show_floor",
    ]
    assert legend_texts(figure) == ["round", "flat", "mean of the classes"]
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == ap[:, 0].tolist()
    assert left.lines[1].get_xydata().tolist() == [[0.3, ap[at[0.3], 0]]]
    assert right.lines[1].get_xydata().tolist() == [[0.5, 0.5]]
    assert right.lines[-1].get_ydata().tolist() == f1[:, 0].tolist()


def test_floors_say_what_leaving_out_says():
    samples = [field_of_cells(k) for k in range(3)]
    answers = list(jittered(coco_truth(samples, 4)).values())
    truths = [truth_instances(sample) for sample in samples]
    config = recipe("demo", num_classes=4, score_floor=0.0, show_floor=(0.5,))
    floors, ap, _ = floor_curves(hits_of(answers, truths, 4), config)
    for row in (0, 8, 19):
        left = hits_of([found.above(floors[row : row + 1]) for found in answers], truths, 4)
        assert np.nanmean(ap[row]) == pytest.approx(ap_of_hits(left))
        assert ap[row, 1] == pytest.approx(class_ap(left, 2))
    assert (np.diff(ap[:, 1]) <= 1e-12).all()  # AP never gains from a higher floor


def test_floors_of_nothing():
    config = recipe("demo", num_classes=1, score_floor=0.7, show_floor=(0.5,))
    for hits in ([], [hits_with([], np.zeros(0, bool), 0)], [hits_with([0.8], [False], 0)]):
        floors, ap, f1 = floor_curves(hits, config)
        assert floors.min() == 0.7  # nothing is known below
        assert np.isnan([ap, f1]).all()
        assert legend_texts(plot_floors(floors, ap, f1, config, ["cell"])) == ["cell"]
    floors, ap, f1 = floor_curves([hits_with([], np.zeros(0, bool), 3)], config)
    assert (ap.max(), f1.max()) == (0, 0)
    (_, right) = plot_floors(floors, ap, f1, config, ["cell"]).axes
    assert right.lines[1].get_xydata().tolist() == [[0.7, 0]]  # the dot is where the curve begins


# Counts


def test_counts_worked_by_hand():
    crowd = replace(FOUR, labels=np.array([1, -1, 2, 3]))
    assert count_by_class([FOUR, crowd, NOTHING], 3).tolist() == [[2, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert count_by_class([], 3).shape == (0, 3)
    true, found = np.array([[10, 2], [20, 2]]), np.array([[7, 2], [21, 4]])
    mae, bias = count_errors(true, found)
    assert (mae.tolist(), bias.tolist()) == ([2, 1], [-1, 1])
    (axis,) = plot_count_errors(true, found, ["round", "flat"]).axes
    assert legend_texts(axis) == [
        "as many",
        "round: MAE 2.0, bias -1.0",
        "flat: MAE 1.0, bias +1.0",
    ]
    assert axis.lines[1].get_xydata().tolist() == [[10, 7], [20, 21]]
    assert axis.lines[1].get_color() == class_color(1)
    assert axis.get_xlim()[1] == axis.get_ylim()[1] > 21
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2", "5", "10", "20"]


def test_counts_of_nothing():
    none = np.zeros((0, 2), np.int64)
    assert np.array(count_errors(none, none)).tolist() == [[0, 0], [0, 0]]
    (axis,) = plot_count_errors(none, none, ["round", "flat"]).axes
    assert legend_texts(axis)[1] == "round: MAE 0.0, bias +0.0"


# The worst


def test_groups_of_two_and_more():
    assert companions(np.array([3, 1, 3, 2, 3]), np.arange(5)) == {3: [0, 2, 4]}
    assert companions(np.zeros(0, int), np.zeros(0, int)) == {}


def test_the_closest_is_not_one_that_just_touches():
    found = instances([(0, 0, 10, 25, 1, 0.9), (0, 0, 10, 9, 1, 0.8), (9, 0, 20, 20, 1, 0.7)])
    cell_of, found_of = closest(overlapping_pairs(found, FOUR))
    assert cell_of == {0: [0], 1: [0], 2: [2]}  # 100 of 250 pixels, 50 of 300
    assert found_of == {0: [1], 1: [0], 2: [2]}
    touching = instances([(0, 9, 10, 10, 1, 0.9)])
    assert closest(overlapping_pairs(touching, FOUR)) == ({}, {})


def test_a_merge_has_most_of_several_cells_in_it():
    both = instances([(0, 0, 10, 30, 1, 0.9)])
    assert merges_and_splits(match_cells(both, FOUR)) == ({0: [0, 1]}, {})
    little = instances([(0, 0, 10, 25, 1, 0.9)])  # half of the second: not most of it
    assert merges_and_splits(match_cells(little, FOUR)) == ({}, {})
    # Found one by one as well, nothing is lost.
    each = instances([(0, 0, 10, 30, 1, 0.9), (0, 0, 10, 10, 1, 0.8), (0, 20, 10, 10, 1, 0.7)])
    assert merges_and_splits(match_cells(each, FOUR))[0] == {}
    # A cell that is found, and swallows its neighbour.
    truth = truth_of([(0, 0, 20, 20, 1), (0, 20, 20, 4, 2)])
    match = match_cells(instances([(0, 0, 20, 24, 1, 0.9)]), truth)
    assert (match.right.tolist(), merges_and_splits(match)[0]) == ([True], {0: [0, 1]})


def test_a_split_cell_has_most_of_several_detections_in_it():
    halves = instances([(20, 40, 10, 9, 3, 0.9), (20, 50, 10, 10, 3, 0.8)])
    assert merges_and_splits(match_cells(halves, FOUR)) == ({}, {3: [0, 1]})
    uneven = instances([(20, 40, 10, 15, 3, 0.9), (20, 56, 10, 4, 1, 0.8)])
    match = match_cells(uneven, FOUR)
    assert (match.cell.tolist(), merges_and_splits(match)[1]) == ([3, -1], {3: [0, 1]})
    twice = instances([(20, 40, 10, 20, 3, 0.9), (20, 40, 10, 19, 3, 0.8)])
    assert merges_and_splits(match_cells(twice, FOUR)) == ({}, {})  # found twice, not split
    beside = instances([(20, 40, 10, 15, 3, 0.9), (20, 55, 20, 5, 3, 0.8)])  # half of it outside
    assert merges_and_splits(match_cells(beside, FOUR)) == ({}, {})


def described(mistakes):
    return {kind: [(m.image, m.found, m.cells) for m in every] for kind, every in mistakes.items()}


def test_mistakes_worked_by_hand():
    first = instances(
        [
            (0, 0, 10, 30, 1, 0.6),  # merges 0 and 1
            (20, 0, 10, 10, 1, 0.7),  # cell 2 in a wrong class
            (20, 40, 10, 9, 3, 0.9),  # two halves of cell 3
            (20, 50, 10, 10, 3, 0.8),
            (34, 20, 5, 5, 2, 0.4),  # nothing there
        ]
    )
    second = instances([(20, 0, 10, 10, 2, 0.9), (20, 0, 10, 9, 2, 0.5)])  # cell 2 twice
    matchings = [match_cells(first, FOUR), match_cells(second, FOUR)]
    mistakes = find_mistakes(matchings)
    assert described(mistakes) == {
        "false positives": [(0, [1], [2]), (1, [1], [2]), (0, [4], [])],  # by score
        "misses": [(1, [], [3]), (1, [], [0]), (1, [], [1])],  # by area
        "merges": [(0, [0], [0, 1])],
        "splits": [(0, [2, 3], [3])],
    }
    titles = {
        kind: [mistake_title(m, matchings[m.image], NAMES) for m in every]
        for kind, every in mistakes.items()
    }
    assert titles == {
        "false positives": [
            "found 0.70: round\ntrue IoU 1.00: flat",
            "found again 0.50: flat\ntrue IoU 0.90: flat",
            "found 0.40: flat\ntrue: nothing",
        ],
        "misses": ["found: nothing\ntrue: dark"] + ["found: nothing\ntrue: round"] * 2,
        "merges": ["found 0.60: round\ntrue 2 cells: round"],
        "splits": ["found 0.90 0.80: dark\ntrue: dark"],
    }
    long = ["dysplastic epithelial cell", "healthy epithelial cell", "other"]
    lines = mistake_title(mistakes["false positives"][0], matchings[0], long).splitlines()
    assert max(map(len, lines)) <= 30
    assert len(lines) == 4


def test_the_largest_merge_and_split_come_first():
    row = truth_of([(0, 10 * k, 10, 8, 1) for k in range(5)])
    found = instances([(0, 0, 10, 18, 1, 0.9), (0, 20, 10, 28, 1, 0.2)])
    merges = find_mistakes([match_cells(found, row)])["merges"]
    assert [mistake.cells for mistake in merges] == [[2, 3, 4], [0, 1]]
    splits = find_mistakes([match_cells(row, truth_of([(0, 0, 10, 48, 2)]))])["splits"]
    assert [mistake.found for mistake in splits] == [[0, 1, 2, 3, 4]]


def test_no_mistakes():
    none = {kind: [] for kind in ("false positives", "misses", "merges", "splits")}
    assert find_mistakes([]) == find_mistakes([match_cells(FOUR, FOUR)]) == none
    assert find_mistakes([match_cells(NOTHING, NOTHING)]) == none
    figure = plot_mistakes(none, [], [], NAMES)
    assert [part.get_suptitle() for part in figure.subfigs] == [f"{kind}: none" for kind in none]
    assert figure.axes == []


def test_a_window_lies_in_the_image():
    def window(*boxes, size=(200, 300), least=40):
        found = view_window(np.array(boxes, np.float32), size, least)
        return [(part.start, part.stop) for part in found]

    assert window((100, 50, 110, 60)) == [(35, 75), (85, 125)]
    assert window((0, 0, 10, 10)) == [(0, 40), (0, 40)]
    assert window((290, 190, 300, 200)) == [(160, 200), (260, 300)]
    assert window((100, 50, 110, 60), (150, 50, 160, 60)) == [(0, 120), (70, 190)]
    assert window((0, 0, 10, 10), size=(20, 300)) == [(0, 20), (0, 40)]
    assert window((0, 0, 300, 200)) == [(0, 200), (0, 300)]


def test_the_gallery_shows_truth_and_finding():
    found = instances([(0, 0, 10, 10, 2, 0.75), (20, 40, 10, 9, 3, 0.9), (20, 50, 10, 10, 3, 0.8)])
    matchings = [match_cells(found, FOUR)]
    image = np.arange(3 * 40 * 60, dtype=np.uint32).reshape(3, *SIZE).astype(np.uint8)
    figure = plot_mistakes(find_mistakes(matchings), matchings, [image], NAMES)
    headings = [part.get_suptitle() for part in figure.subfigs]
    assert headings == [
        "false positives without those of merges and splits: 1",
        "misses without those of merges and splits: 2",
        "merges: none",
        "splits: 1",
    ]
    assert [len(part.axes) for part in figure.subfigs] == [1, 2, 0, 1]
    wrong, split = figure.axes[0], figure.axes[-1]
    assert wrong.get_title() == "found 0.75: flat\ntrue IoU 1.00: round"
    assert np.array_equal(wrong.images[0].get_array(), np.moveaxis(image, 0, 2))  # the whole field
    # Four true cells, the one that it is about thick, in the colours of their classes; then one
    # detection on it, dashed.
    colors = [class_color(k) for k in (1, 1, 2, 3)]
    assert [line.get_color() for line in wrong.lines] == [*colors, "black"]
    assert [line.get_linewidth() for line in wrong.lines] == [3, 1, 1, 1, 2]
    assert [line.is_dashed() for line in wrong.lines] == [False] * 4 + [True]
    assert np.array_equal(wrong.lines[0].get_xydata(), wrong.lines[4].get_xydata())
    assert wrong.lines[0].get_xydata().max(0).tolist() == [9.5, 9.5]  # the border of pixel 9
    assert [line.is_dashed() for line in split.lines] == [False] * 4 + [True] * 2
    assert not wrong.axison
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["true round", "true flat", "true dark", "found"]


def test_a_crop_shows_what_is_near_it():
    size = (300, 300)
    truth = truth_of([(100, 150, 10, 10, 1), (100, 170, 10, 10, 2), (280, 0, 10, 10, 1)], size)
    matchings = [match_cells(instances([], size), truth)]
    image = np.zeros((3, *size), np.uint8)
    image[:, 100:110, 150:160] = 200
    figure = plot_mistakes(find_mistakes(matchings), matchings, [image], NAMES, most=2)
    assert [axis.images[0].get_array().shape for axis in figure.axes] == [(64, 64, 3)] * 2
    first = figure.axes[0]
    assert len(first.lines) == 2  # the third is far
    x, y = first.lines[0].get_xydata().mean(0).round().astype(int)
    assert first.images[0].get_array()[y, x].tolist() == [200] * 3  # the outline is on its cell


@pytest.mark.parametrize("num_classes", [1, 7])
def test_all_figures_can_be_drawn(num_classes, tmp_path):
    samples = [field_of_cells(0), empty_sample()]
    labels = [torch.arange(len(sample.labels)) % num_classes + 1 for sample in samples]
    samples = [replace(s, labels=own) for s, own in zip(samples, labels, strict=True)]
    truth, names = coco_truth(samples, num_classes), [f"kind {k}" for k in range(num_classes)]
    truths = [truth_instances(sample) for sample in samples]
    answers = [found.select(found.labels <= num_classes) for found in jittered(truth).values()]
    config = recipe("demo", num_classes=num_classes)
    matchings = [match_cells(*pair) for pair in zip(answers, truths, strict=True)]
    hits = hits_of(answers, truths, num_classes)
    counts = [count_by_class(side, num_classes) for side in (truths, answers)]
    images = [sample.image.numpy() for sample in samples]
    figures = [
        plot_precision(precision_curves(truth, dict(enumerate(answers, start=1))), names),
        plot_confusions(count_confusions(matchings, num_classes), names),
        plot_calibration(*calibrate(hits)),
        plot_floors(*floor_curves(hits, config), config, names),
        plot_count_errors(*counts, names),
        plot_mistakes(find_mistakes(matchings), matchings, images, names),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_classes_without_a_name_are_refused():
    with pytest.raises(IndexError):
        count_confusions([match_cells(FOUR, FOUR)], 1)
    with pytest.raises(ValueError, match="zip"):
        plot_precision(np.ones((10, 101, 3)), NAMES[:2])
    with pytest.raises(ValueError, match="zip"):
        plot_count_errors(np.ones((1, 3)), np.ones((1, 3)), NAMES[:2])
