"""The table of matches and all that derives from it, against pycocotools, torchmetrics, by hand."""

from dataclasses import replace
from itertools import permutations
import math

from hypothesis import given, settings, strategies
import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.detection import PanopticQuality

from src_snippets.data.rle import draw_masks, encode_masks, mask_areas
from src_snippets.data.structures import coco_ground_truth, ground_truth, Instances
from src_snippets.evaluation.matching import (
    ap50,
    ap_interval,
    image_table,
    mask_pairs,
    match_table,
    matches_above,
    pair_centroids,
    precision_curve,
    quality_table,
    score_table,
    wrong_instances,
)
from src_snippets.model.detect import visible_instances, without_overlaps
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
        return ap_interval(
            match_table(*zip(*pairs, strict=True), 1) if pairs else table, len(pairs)
        )

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
    # One that is left out hides nothing: here a merge of two cells, by its second cell alone.
    merged = instances([(0, 0, 10, 10, 1, 0.9), (0, 0, 10, 19, 2, 0.8), (0, 10, 10, 9, 1, 0.7)])
    assert visible_instances(merged).scores.tolist() == pytest.approx([0.9, 0.7])
    assert len(visible_instances(NOTHING)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_quality_is_that_of_torchmetrics(seed):
    """Image by image, since ours is a mean over images."""
    samples, _, predictions = jittered_fields(seed)
    for sample, found in zip(samples, predictions, strict=True):
        sides, images = (without_overlaps(found), ground_truth(sample)), []
        for side in sides:
            ids = np.arange(1, len(side) + 1)
            layers = [draw_masks(side.rles, values, *side.size) for values in (side.labels, ids)]
            images.append(torch.from_numpy(np.stack(layers, axis=-1))[None])
        metric = PanopticQuality({1, 2, 3, 4}, {0}, return_per_class=True)
        metric.update(*images)
        expected = metric.compute().ravel()[:4].numpy()  # background is last
        quality = quality_table(sides[:1], sides[1:], 4).PQ
        present = np.unique(np.concatenate([side.labels for side in sides]))
        assert np.allclose(quality[present], expected[present - 1], atol=1e-6)
        assert quality.drop([0, *present]).isna().all()


# Measures of the field


def test_quality_worked_by_hand():
    truth = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1), (20, 0, 10, 10, 2))
    found = instances(
        [
            (0, 0, 10, 8, 2, 0.9),  # 80 shared, union 100; of a wrong class
            (0, 20, 10, 20, 1, 0.8),  # 100 shared, union 200: no match of PQ, too far for F1? 5 px
            (30, 30, 5, 5, 1, 0.7),  # invented
        ]
    )
    table = quality_table([found], [truth], 3)
    assert table.columns.tolist() == ["DICE", "AJI", "DQ", "SQ", "PQ", "F1"]
    assert table.loc[0].tolist() == pytest.approx(
        [
            2 * 180 / (80 + 200 + 25 + 300),
            (80 + 100) / (100 + 200 + 100 + 25),
            1 / 3,  # one of three and three
            0.8,
            0.8 / 3,
            2 / 3,  # centroids 1 and 5 px apart
        ]
    )
    # Class 1: of two instances and two detections only the second share pixels. F1: a pair of its
    # own, one invented, and the pair with the wrong class twice.
    assert table.loc[1].tolist() == pytest.approx(
        [2 * 100 / (225 + 200), 100 / (200 + 100 + 25), 0, 0, 0, 2 / (2 + 1 + 2)]
    )
    # Class 2: one missed, one that lies elsewhere; that one's pair is of the wrong class.
    assert table.loc[2].tolist() == [0] * 6
    assert table.loc[3].isna().all()


def test_a_detection_may_serve_two_instances_in_aji_only():
    truth, both = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1)), instances([(0, 0, 10, 30, 1, 1)])
    table = quality_table([both], [truth], 1)
    assert table.AJI[0] == pytest.approx(200 / (300 + 300))
    assert table.DICE[0] == pytest.approx(2 * 200 / 500)
    assert table.F1[0] == pytest.approx(2 / 3)  # centroids 10 px from both
    half = instances([(0, 0, 10, 5, 1, 1)])  # IoU 0.5 is a match for AP50, not for PQ
    assert quality_table([half], [truth], 1).loc[1, ["DQ", "SQ", "PQ"]].tolist() == [0, 0, 0]


def test_centroids_are_paired_within_twelve_pixels():
    truth = truth_of((0, 0, 3, 3, 1), (20, 0, 3, 3, 1))
    for column, hits in ((12, 1), (13, 0)):
        found = instances([(0, column, 3, 3, 1, 1.0)])
        assert pair_centroids(found, truth).tolist() == [[0] * hits] * 2
    # One each, though both detections are nearest to the first: 3 + 11 px, not 4 + 20.
    found = instances([(0, 3, 3, 3, 1, 1.0), (9, 0, 3, 3, 1, 1.0)])
    assert pair_centroids(found, truth).tolist() == [[0, 1], [0, 1]]
    for sides in ((NOTHING, truth), (truth, NOTHING), (NOTHING, NOTHING)):
        assert pair_centroids(*sides).shape == (2, 0)


def test_quality_is_a_mean_of_images_but_f1():
    truth = truth_of((0, 0, 10, 10, 1), (0, 20, 10, 10, 1), (20, 0, 10, 10, 1))
    table = quality_table([truth, NOTHING, NOTHING], [truth, truth.select([0]), NOTHING], 2)
    assert table.loc[0, ["DICE", "AJI", "DQ", "SQ", "PQ"]].tolist() == [0.5] * 5
    assert table.F1[1] == pytest.approx(2 * 3 / (3 + 4))
    assert table.loc[2].isna().all()
    for sides in (([], []), ([NOTHING], [NOTHING])):
        table = quality_table(*sides, 2)
        assert table.shape == (3, 6)
        assert table.isna().all(axis=None)
    with pytest.raises(ValueError, match="zip"):
        quality_table([NOTHING], [], 2)


def published_scores(ids, ids_found) -> dict[str, float]:
    """The definitions on label maps (H, W), pixel by pixel: masks, IoUs of all pairs, then sums."""
    masks, found = ([side == k for k in np.unique(side[side > 0])] for side in (ids, ids_found))
    ious = np.array([[(m & f).sum() / (m | f).sum() for f in found] for m in masks])
    shared, union, used = 0, 0, set()
    for row, mask in enumerate(masks):
        best = int(ious[row].argmax())
        other = found[best] if ious[row, best] > 0 else np.zeros_like(mask)
        used |= {best} if other.any() else set()
        shared, union = shared + (mask & other).sum(), union + (mask | other).sum()
    union += sum(mask.sum() for k, mask in enumerate(found) if k not in used)
    true = ious[ious > 0.5]
    wrong = len(masks) + len(found) - 2 * len(true)
    dq, sq = len(true) / (len(true) + wrong / 2), true.mean() if len(true) else 0
    dice = 2 * ((ids > 0) & (ids_found > 0)).sum() / ((ids > 0).sum() + (ids_found > 0).sum())
    return dict(DICE=dice, AJI=shared / union, DQ=dq, SQ=sq, PQ=dq * sq)


def published_f1(truths, predictions, label) -> float:
    """F of detection (label 0) or of a class over images: TP 2, pairs of two classes 2, alone 1."""
    hits = wrong = alone = 0
    for (centers, kinds), (others, found) in zip(truths, predictions, strict=True):
        options = []
        for order in permutations(range(max(len(centers), len(others)))):
            pairs = [(i, j) for i, j in enumerate(order) if i < len(centers) and j < len(others)]
            far = [np.hypot(*(centers[i] - others[j])) for i, j in pairs]
            options.append((sum(far), [p for p, d in zip(pairs, far, strict=True) if d <= 12]))
        pairs = min(options)[1]
        for i, j in pairs:
            known = {kinds[i], found[j]} if label else {0}
            hits += known == {label}
            wrong += label in known and known != {label}
        left = [k for i, k in enumerate(kinds) if i not in {i for i, _ in pairs}]
        left += [k for j, k in enumerate(found) if j not in {j for _, j in pairs}]
        alone += sum(label in (0, k) for k in left)
    total = 2 * hits + 2 * wrong + alone
    return 2 * hits / total if total else np.nan


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31))
def test_quality_is_as_published(seed):
    """Against the definitions on random label maps, three images with two classes."""
    rng = np.random.default_rng(seed)
    truths, predictions, rows, centers = [], [], [], ([], [])
    for _ in range(3):
        maps = [rng.integers(0, 4, (5, 6)).repeat(5, 0).repeat(3, 1) for _ in "ab"]
        maps = [side * (rng.random(side.shape) < 0.9) for side in maps]
        maps[1][:, 3:] = np.where(rng.random((25, 18)) < 0.8, maps[0], maps[1])[:, 3:]
        for side, own, places in zip(maps, (truths, predictions), centers, strict=True):
            sample = make_sample([side], [1])
            labels = torch.from_numpy(rng.integers(1, 3, len(sample.labels)))
            own.append(ground_truth(replace(sample, labels=labels)))
            ids = np.unique(side[side > 0])
            places.append(([np.argwhere(side == k).mean(0) for k in ids], labels.tolist()))
        rows.append(published_scores(*maps))
    table = quality_table(predictions, truths, 2)
    expected = pd.DataFrame(rows).mean().to_dict()
    assert table.loc[0].drop("F1").to_dict() == pytest.approx(expected, abs=1e-6)
    for label in range(3):
        assert table.F1[label] == pytest.approx(published_f1(*centers, label), nan_ok=True)


# The table of scores


def test_scores_worked_by_hand():
    truth = make_sample([np.pad(np.kron([[1, 0, 2]], np.ones((4, 4), int)), 2)], [1], name="x")
    size = truth.size
    found = instances([(2, 2, 4, 4, 1, 0.9), (2, 10, 4, 3, 1, 0.3), (0, 0, 2, 2, 1, 0.04)], size)
    config = make_config("demo", class_names=("round", "flat"), score_threshold=0.5)
    table = score_table([truth], [found], config)
    every = "overall"
    assert table.index.tolist() == [every, "round", "flat"]
    expected = "AP AP50 AP75 instances DICE AJI DQ SQ PQ F1"
    assert table.columns.tolist() == expected.split()
    # One of two from 0.5 on; the others too: only that one is exported, 16 of 32 pixels
    assert table.AP50.tolist()[:2] == pytest.approx([51 / 101] * 2)
    expected = dict(DICE=2 / 3, AJI=0.5, DQ=2 / 3, SQ=1, PQ=2 / 3, F1=2 / 3)
    for row in (every, "round"):
        assert table.loc[row, list(expected)].to_dict() == pytest.approx(expected)
    assert table.instances[every] == table.instances["round"] == 2
    assert table.loc["flat"].drop("instances").isna().all()
    assert "NaN" not in table.to_html(na_rep="-")
    low = replace(config, score_threshold=0.3, export_score_threshold=0.04)
    table = score_table([truth], [found], low)
    assert table.AP50[every] == 1
    assert table.PQ[every] == pytest.approx((1 + 0.75) / 2.5)  # one of three is invented
    assert table.AJI[every] == pytest.approx(28 / 36)
    nothing = ground_truth(empty_sample())
    table = score_table([truth, empty_sample()], [found, nothing], low)
    assert table.AJI[every] == pytest.approx(28 / 36)  # an image without instances does not count


def test_ground_truth_that_overlaps_is_scored_as_a_label_image():
    """Two instances share 20 of 100 px each: the first keeps them, in prediction and truth."""
    ids = np.zeros((2, 30, 30), int)
    ids[0, :10, :10], ids[1, 8:18, :10] = 1, 1
    sample = make_sample(ids, [1, 1])
    config = make_config("demo", class_names=("round",))
    table = score_table([sample], [ground_truth(sample)], config)
    assert table.loc["round"].tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1, 1]


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


# Images


def test_images_by_hand_the_worst_first():
    """One right, one wrong and one missed in the first image; all right in the second; none."""
    columns = dict(image=[0, 0, 0, 1, 1], detection=[0, 1, -1, 0, 1], target=[0, -1, 1, 0, 1])
    columns |= dict(label=[1, 1, 0, 1, 2], target_label=[1, 0, 1, 1, 2], target_area=[9] * 5)
    columns |= dict(score=[0.9, 0.8, 0.0, 0.7, 0.3], iou=[0.6, 0.0, 0.0, 0.7, 0.8])
    table = pd.DataFrame(columns | dict(tp50=[True, False, False, True, True]))
    rows = image_table(table, ["a", "b", "c"], 0.2)
    assert rows.reset_index().to_numpy()[:2].tolist() == [["a", 2, 2, 1, 0.5], ["b", 2, 2, 2, 1.0]]
    assert rows.index[2] == "c"
    assert math.isnan(rows["F1 at IoU 0.5"]["c"])
    assert wrong_instances(table, 0) == ([1], [1])
    assert wrong_instances(table, 1) == wrong_instances(table, 2) == ([], [])
    strict = image_table(table, ["a", "b", "c"], 0.75)  # one of the second image is missed now
    assert strict.loc["b"].tolist() == [2, 0, 0, 0.0]
    assert list(strict.index) == ["b", "a", "c"]
    assert image_table(table[:0], [], 0.5).empty
