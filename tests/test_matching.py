"""The table of matches and all that derives from it, against pycocotools, torchmetrics, by hand."""

from dataclasses import replace

from hypothesis import given, settings, strategies
import numpy as np
import pytest
import torch
from torchmetrics.detection import PanopticQuality

from src_snippets.data.rle import draw_masks, encode_masks, mask_areas
from src_snippets.data.structures import coco_ground_truth, ground_truth, Instances
from src_snippets.evaluation.matching import (
    aji,
    ap50,
    ap_interval,
    mask_pairs,
    match_table,
    matches_above,
    panoptic_quality,
    precision_curve,
    score_table,
    visible_instances,
)
from src_snippets.model.detect import without_overlaps
from src_snippets.setup.config import make_config
from src_snippets.training.metrics import average_precision
from tests.conftest import empty_sample, field_of_cells, jittered, make_sample

SIZE = (40, 60)
NAMES = ("round", "flat", "dark", "pale")


def instances(parts, size=SIZE) -> Instances:
    """Rectangles (top, left, height, width, class, score)."""
    boxes = [(left, top, left + width, top + height) for top, left, height, width, *_ in parts]
    rles = [encode_masks(np.ones((1, *p[2:4]), bool), [p[0]], [p[1]], *size)[0] for p in parts]
    scores, labels = (np.array([p[k] for p in parts], t) for k, t in ((5, "f4"), (4, int)))
    return Instances(np.array(boxes, np.float32).reshape(-1, 4), scores, labels, rles, size)


def truth_of(*parts, size=SIZE) -> Instances:
    return instances([(*part, 1.0) for part in parts], size)


NOTHING = instances([])
FOUR = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1), (20, 0, 10, 10, 2), (20, 40, 10, 20, 3))


def rows_of(table, *columns):
    """Rows of detections in their order, then of missed instances."""
    table = table.sort_values(["image", "detection", "target"])
    table = table[table.detection >= 0].to_dict("records"), table[table.detection < 0]
    return [tuple(row[c] for c in columns) for row in table[0] + table[1].to_dict("records")]


def jittered_fields(seed=0, crowds=False):
    """Four samples with classes 1..3 and predictions with wrong classes, doubles and ties."""
    samples = []
    for number in range(4):
        sample = field_of_cells(4 * seed + number)
        labels = torch.arange(len(sample.labels)) % 3 + 1
        if crowds:
            labels[::5] *= -1
        samples.append(replace(sample, labels=labels))
    known = coco_ground_truth(samples, dict(enumerate(NAMES, start=1)))
    return samples, known, list(jittered(known, seed).values())


# Pairs


def test_pairs_worked_by_hand():
    found = instances([(0, 0, 10, 5, 1, 0.5), (30, 30, 5, 5, 1, 0.4), (0, 5, 10, 20, 2, 0.3)])
    pairs = mask_pairs(found, FOUR)
    assert pairs[["detection", "target"]].to_numpy().tolist() == [[0, 0], [2, 0], [2, 1]]
    assert pairs.iou.tolist() == pytest.approx([0.5, 50 / 250, 50 / 250])
    areas = pairs[["area", "target_area", "shared"]].to_numpy().tolist()
    assert areas == [[50, 100, 50], [200, 100, 50], [200, 100, 50]]
    for found, truth in ((NOTHING, FOUR), (FOUR, NOTHING), (NOTHING, NOTHING)):
        assert len(mask_pairs(found, truth)) == 0


# The table


def test_matches_worked_by_hand():
    found = instances(
        [
            (0, 0, 10, 9, 2, 0.9),  # the first instance, of a wrong class
            (0, 0, 10, 10, 1, 0.8),  # the same again: right for AP50, though another has it
            (20, 0, 4, 10, 2, 0.7),  # too little of the third
            (0, 20, 10, 6, 1, 0.6),
        ]
    )
    table = match_table([NOTHING, found], [NOTHING, FOUR], 3)
    assert rows_of(table, "detection", "label", "target", "target_label", "target_area") == [
        (0, 2, 0, 1, 100),
        (1, 1, -1, 0, 0),
        (2, 2, -1, 0, 0),
        (3, 1, 1, 1, 100),
        (-1, 0, 2, 2, 100),
        (-1, 0, 3, 3, 200),
    ]
    assert rows_of(table, "iou", "tp50") == [
        (pytest.approx(0.9), False),
        (0, True),
        (0, False),
        (pytest.approx(0.6), True),
        (0, False),
        (0, False),
    ]
    assert table.score.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0, 0])
    assert set(table.image) == {1}
    assert match_table([NOTHING], [FOUR], 3).target.tolist() == [0, 1, 2, 3]
    assert match_table([FOUR], [NOTHING], 3).target.tolist() == [-1] * 4
    assert match_table([], [], 3).dtypes.equals(table.dtypes)
    with pytest.raises(ValueError, match="Image 1: label 3, expected up to 2"):
        match_table([NOTHING, FOUR], [NOTHING, FOUR], 2)
    with pytest.raises(ValueError, match="zip"):
        match_table([NOTHING], [], 2)


def test_ties_are_those_of_coco():
    # Two instances with IoU exactly 0.5 each: COCOeval takes the last; of equal scores the first.
    truth = truth_of((0, 0, 10, 10, 1), (0, 10, 10, 10, 1))
    both = instances([(0, 0, 10, 20, 1, 0.5), (0, 10, 10, 10, 1, 0.5), (0, 0, 10, 9, 1, 0.5)])
    assert match_table([both], [truth], 1).target.tolist() == [1, -1, 0]
    better = replace(both, scores=np.array([0.5, 0.6, 0.5], np.float32))
    assert rows_of(match_table([better], [truth], 1), "target") == [(0,), (1,), (-1,)]


def test_only_what_lies_half_in_a_crowd_of_its_class_is_left_out():
    truth = truth_of((0, 0, 20, 20, -1), (25, 5, 10, 10, 1), (0, 40, 10, 10, -2))
    found = instances(
        [
            (2, 2, 5, 5, 1, 0.9),  # inside: ignored
            (2, 15, 5, 10, 1, 0.8),  # half of it: ignored
            (12, 15, 5, 11, 1, 0.7),  # 5 of 11 columns: a false positive
            (2, 2, 5, 5, 2, 0.6),  # of another class: a false positive
            (25, 5, 10, 10, 1, 0.5),  # a true positive, no crowd near
        ]
    )
    table = match_table([found], [truth], 2)
    assert rows_of(table, "detection", "target", "tp50") == [
        (2, -1, False),
        (3, -1, False),
        (4, 1, True),
    ]
    # What is right stays, though a crowd covers it.
    table = match_table(
        [truth_of((25, 5, 10, 10, 1))], [truth_of((25, 5, 10, 10, 1), (20, 0, 20, 20, -1))], 1
    )
    assert table.tp50.tolist() == [True]


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_ap50_is_that_of_coco(seed, crowds):
    samples, known, predictions = jittered_fields(seed, crowds)
    truths = [ground_truth(sample, crowds=True) for sample in samples]
    table = match_table(predictions, truths, 4)
    expected = average_precision(known, dict(enumerate(predictions, start=1)))
    assert 0.1 < expected["AP50"] < 0.5
    assert ap50(table) == pytest.approx(expected["AP50"], abs=1e-6)
    for label, row in expected["classes"].items():
        curve = precision_curve(table, label)
        assert np.isnan(curve).all() if row["AP50"] is None else True
        assert row["AP50"] is None or curve.mean() == pytest.approx(row["AP50"], abs=1e-6)


@pytest.mark.parametrize("min_score", [0.0, 0.3, 0.505, 1.0])
def test_matches_above_a_score_are_those_of_the_better_detections(min_score):
    samples, _, predictions = jittered_fields()
    truths = [ground_truth(sample) for sample in samples]
    expected = match_table([found.above(min_score) for found in predictions], truths, 4)
    order = ["image", "target", "score", "label", "iou"]
    some, other = (
        t.drop(columns="detection").sort_values(order, ignore_index=True)
        for t in (matches_above(match_table(predictions, truths, 4), min_score), expected)
    )
    assert some.equals(other)


# AP50 and its interval


def test_ap50_worked_by_hand():
    # One of two is found, after a stronger false positive: precision 1/2 up to recall 1/2.
    truth = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1))
    found = instances([(30, 0, 5, 5, 1, 0.9), (0, 0, 10, 10, 1, 0.8)])
    table = match_table([found], [truth], 2)
    assert precision_curve(table, 1).tolist() == [0.5] * 51 + [0.0] * 50
    assert ap50(table) == pytest.approx(0.5 * 51 / 101)  # class 2 does not count
    assert np.isnan(precision_curve(table, 2)).all()
    assert ap50(match_table([NOTHING], [truth], 2)) == 0
    assert np.isnan(ap50(match_table([NOTHING], [NOTHING], 2)))


def test_the_interval_holds_95_of_100_draws():
    truth = truth_of((0, 0, 10, 10, 1))
    good, bad = (truth, truth), (NOTHING, truth)

    def interval(*pairs):
        return ap_interval(match_table(*zip(*pairs, strict=True), 1) if pairs else table)

    table = match_table([], [], 1)
    assert interval(*[good] * 5) == (1.0, 1.0)
    assert interval(bad, bad) == (0.0, 0.0)
    assert interval(good) is interval(*[(NOTHING, NOTHING)] * 5) is interval() is None
    assert interval(good, (NOTHING, NOTHING), (NOTHING, NOTHING), good) == (1.0, 1.0)
    # Of 16 images, half are good. The good ones in a draw are binomial: 4 to 12 in 95% of draws
    # (5 to 11 in 90%), and AP50 is recall up to their fraction: 26 and 76 of 101 points.
    assert interval(*[good, bad] * 8) == pytest.approx((26 / 101, 76 / 101))


# Masks without overlaps


def test_duplicates_are_left_out_and_slivers_with_them():
    found = instances(
        [
            (0, 0, 10, 10, 1, 0.9),
            (0, 6, 10, 10, 1, 0.8),  # 4 of 10 columns are hidden: stays, cut
            (0, 1, 10, 10, 2, 0.7),  # nearly the same as the first: a duplicate
            (20, 0, 10, 10, 1, 0.6),
            (20, 5, 10, 10, 1, 0.9),  # hides exactly half of the one before
        ]
    )
    visible = visible_instances(found)
    assert visible.scores.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.9])
    assert visible.boxes.tolist()[1:3] == [[10, 0, 16, 10], [0, 20, 5, 30]]
    # What a duplicate had hidden of another is not lost.
    chain = instances([(0, 0, 10, 10, 1, 0.9), (0, 4, 10, 9, 1, 0.8), (0, 10, 10, 10, 1, 0.7)])
    assert mask_areas(visible_instances(chain).rles).tolist() == [100, 100]
    assert len(visible_instances(NOTHING)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_quality_is_that_of_torchmetrics(seed):
    samples, _, predictions = jittered_fields(seed)
    metric = PanopticQuality({1, 2, 3, 4}, {0}, return_per_class=True)
    truths, visible = [ground_truth(sample) for sample in samples], []
    for found, truth in zip(predictions, truths, strict=True):
        visible.append(without_overlaps(found))
        images = []
        for side in (visible[-1], truth):
            ids = np.arange(1, len(side) + 1)
            layers = [draw_masks(side.rles, values, *side.size) for values in (side.labels, ids)]
            images.append(torch.from_numpy(np.stack(layers, axis=-1))[None])
        metric.update(*images)
    expected = metric.compute().ravel()[:4].numpy()  # background is last
    quality = panoptic_quality(match_table(visible, truths, 4), 4)
    present = np.bincount(np.concatenate([s.labels for s in (*visible, *truths)]), minlength=5)[1:]
    assert np.allclose(quality[present > 0], expected[present > 0], atol=1e-6)
    assert quality[present == 0].isna().all()


def test_panoptic_quality_worked_by_hand():
    # Class 1: one with IoU 0.75, one invented: 0.75 / 1.5. Class 2: missed. Class 3: absent.
    truth = truth_of((0, 0, 4, 4, 1), (10, 10, 4, 4, 2))
    found = instances([(0, 0, 3, 4, 1, 0.9), (0, 12, 4, 4, 1, 0.9)])
    quality = panoptic_quality(match_table([found], [truth], 3), 3)
    assert quality.tolist() == pytest.approx([0.5, 0, np.nan], nan_ok=True)
    half = instances([(0, 0, 2, 4, 1, 0.9)])  # IoU 0.5 is a match for AP50, not for PQ
    assert panoptic_quality(match_table([half], [truth], 3), 3)[1] == 0
    assert np.isnan(panoptic_quality(match_table([], [], 2), 2)).all()


def test_aji_worked_by_hand():
    truth = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1), (20, 0, 10, 10, 2))
    found = instances(
        [
            (0, 0, 10, 8, 2, 0.9),  # 80 shared, union 100; its class plays no part
            (0, 20, 10, 20, 1, 0.8),  # 100 shared, union 200
            (30, 30, 5, 5, 1, 0.7),  # not used: 25
        ]
    )
    assert aji(truth, found) == pytest.approx((80 + 100) / (100 + 200 + 100 + 25))
    assert (aji(truth, truth), aji(NOTHING, found)) == (1, 0)
    # A detection over two instances is the best of both and counts for both.
    both = instances([(0, 0, 10, 30, 1, 0.9)])
    assert aji(truth.select([0, 1]), both) == pytest.approx(200 / (300 + 300))
    assert aji(truth, NOTHING) == 0
    assert np.isnan(aji(NOTHING, NOTHING))


@settings(max_examples=30, deadline=None)
@given(strategies.integers(0, 2**31))
def test_aji_of_any_label_images(seed):
    """Against the definition, pixel by pixel."""
    rng = np.random.default_rng(seed)
    sides = [rng.integers(0, 4, (5, 6)).repeat(2, 0) * (rng.random((10, 6)) < 0.9) for _ in "ab"]
    truth, found = (ground_truth(make_sample([side], [1])) for side in sides)
    masks = [[side == k for k in np.unique(side[side > 0])] for side in sides]
    shared, union, used = 0, 0, set()
    for mask in masks[0]:
        ious = [(mask & other).sum() / (mask | other).sum() for other in masks[1]]
        if max(ious, default=0) > 0:
            best = max(np.flatnonzero(np.array(ious) == max(ious)))
            if ious.count(max(ious)) > 1:
                return  # the definition leaves open which is taken
            used.add(best)
            shared, union = (
                shared + (mask & masks[1][best]).sum(),
                union + (mask | masks[1][best]).sum(),
            )
        else:
            union += mask.sum()
    union += sum(mask.sum() for k, mask in enumerate(masks[1]) if k not in used)
    assert aji(truth, found) == pytest.approx(shared / union)


# The table of scores


def test_scores_worked_by_hand():
    truth = make_sample([np.pad(np.kron([[1, 0, 2]], np.ones((4, 4), int)), 2)], [1], name="x")
    size = truth.size
    found = instances([(2, 2, 4, 4, 1, 0.9), (2, 10, 4, 3, 1, 0.3), (0, 0, 2, 2, 1, 0.04)], size)
    config = make_config("demo", class_names=("round", "flat"), score_threshold=0.5)
    table = score_table([truth], [found], config)
    assert table.index.tolist() == ["all", "best 100 per image and class", "round", "flat"]
    assert table.columns.tolist() == ["AP", "AP50", "AP75", "PQ", "AJI", "instances"]
    # One of two from 0.5 on; PQ and AJI too: only that one is exported, 16 of 32 pixels
    assert table.AP50.tolist()[:3] == pytest.approx([51 / 101] * 3)
    assert (table.PQ["all"], table.AJI["all"]) == pytest.approx((2 / 3, 0.5))
    assert table.instances["all"] == table.instances["round"] == 2
    assert table.loc["flat", ["AP", "AP50", "PQ"]].isna().all()
    assert "NaN" not in table.to_html(na_rep="-")
    low = replace(config, score_threshold=0.3, export_score_threshold=0.04)
    table = score_table([truth], [found], low)
    assert table.AP50["all"] == 1
    assert table.PQ["all"] == pytest.approx((1 + 0.75) / 2.5)  # one of three is invented
    assert table.AJI["all"] == pytest.approx(28 / 36)
    nothing = ground_truth(empty_sample())
    table = score_table([truth, empty_sample()], [found, nothing], low)
    assert table.AJI["all"] == pytest.approx(28 / 36)  # an image without instances does not count


def test_a_cap_of_100_hides_the_101st():
    sample = make_sample([np.arange(1, 121).reshape(8, 15).repeat(4, 0).repeat(4, 1)], [1])
    config = make_config("demo", class_names=("round",))
    table = score_table([sample], [ground_truth(sample)], config)
    assert table.AP.tolist()[:2] == pytest.approx([1, 84 / 101])  # recall up to 100/120


def test_scores_ignore_what_lies_in_a_crowd():
    ids = np.zeros((20, 30), int)
    ids[:10], ids[12:18, 2:8] = 1, 2
    sample = replace(make_sample([ids], [2]), labels=torch.tensor([-2, 2]))
    found = replace(ground_truth(sample, crowds=True), labels=np.array([2, 2]))
    config = make_config("demo", class_names=("round", "flat"))
    table = score_table([sample], [found], config)
    assert table.loc["flat", ["AP50", "PQ"]].tolist() == [1, 1]
    assert (table.AJI.iloc[0], table.instances.iloc[0]) == (1, 1)


def test_scores_of_nothing():
    config = make_config("demo")
    none = ground_truth(empty_sample())
    for samples, predictions in (([], []), ([empty_sample()], [none])):
        table = score_table(samples, predictions, config)
        assert table.drop(columns="instances").isna().all(axis=None)
    sample = field_of_cells()
    table = score_table([sample], [ground_truth(sample).select([])], config)
    assert (table.AP50.iloc[0], table.PQ.iloc[0], table.AJI.iloc[0]) == (0, 0, 0)
