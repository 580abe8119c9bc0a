from hypothesis import given, settings, strategies
import numpy as np
import pytest

from src_snippets.data.rle import encode_masks
from src_snippets.data.structures import Instances
from src_snippets.inference.fusion import fuse, majority_mask
from src_snippets.setup.config import make_config
from tests.test_detect import decoded, make_instances, ROWS


def test_models_fused_worked_by_hand():
    first = make_instances([ROWS[0], ROWS[2]], [0.9, 0.6], [1, 3])
    second = make_instances([ROWS[1], ROWS[2], ROWS[2]], [0.6, 0.3, 0.2], [1, 3, 3])
    third = make_instances([ROWS[1]], [0.8], [2])
    config = make_config("demo", fusion_iou=0.5, score_threshold=0.01)
    # IoU of rows 0 and 1 is 2/3: one instance if the class is the same. A model has one voice.
    fused = fuse([first, second, third], config)
    assert fused.labels.tolist() == [1, 3, 2, 3]
    assert np.allclose(fused.scores, [1.5 / 3, 0.9 / 3, 0.8 / 3, 0.2 / 3])
    assert fused.rles == [first.rles[0], first.rles[1], third.rles[0], second.rles[2]]
    assert np.allclose(fused.boxes[0], [0.4, 0, 3, 1])  # 0 by 0.9 and 1 by 0.6
    strict = fuse([first, second, third], make_config("demo", fusion_iou=0.7, score_threshold=0.01))
    assert sorted(strict.labels.tolist()) == [1, 1, 2, 3, 3]
    assert len(fuse([first, second, third], make_config("demo", detections=2))) == 2
    empty = first.select([])
    assert np.allclose(fuse([first, empty], config).scores, [0.45, 0.3])
    assert len(fuse([empty, empty], config)) == 0


def test_the_threshold_holds_for_fused_scores_and_includes_its_value():
    first, second = make_instances(ROWS[:1], [0.75]), make_instances(ROWS[:1], [0.25])
    assert len(fuse([first, second], make_config("demo", score_threshold=0.5))) == 1
    assert len(fuse([first, second], make_config("demo", score_threshold=0.51))) == 0


def test_equal_scores_keep_their_order():
    parts = [
        make_instances([ROWS[0], ROWS[2]], [0.5, 0.5], [2, 1]),
        make_instances(ROWS[3:], [0.5]),
    ]
    config = make_config("demo", score_threshold=0.0)
    assert fuse(parts, config).rles == [rle for part in parts for rle in part.rles]


def test_the_majority_is_half_of_the_scores():
    rows = [[[1, 1, 1, 1, 0, 0]], [[0, 1, 1, 1, 1, 0]], [[0, 0, 1, 1, 1, 1]]]
    every = make_instances(rows, [0.5, 0.3, 0.2])
    # Votes: 0.5, 0.8, 1, 1, 0.5, 0.2 of 1
    fused = fuse([every.select([k]) for k in range(3)], make_config("demo", fusion_iou=0.3))
    assert decoded(fused)[0].astype(int).tolist() == [[1, 1, 1, 1, 1, 0]]
    assert np.allclose(fused.boxes, [[0.7, 0, 4.7, 1]])
    assert np.allclose(fused.scores, [1 / 3])
    zeros = make_instances(rows, [0.0, 0.0, 0.0])  # each has the same weight
    config = make_config("demo", fusion_iou=0.3, score_threshold=0.0)
    fused = fuse([zeros.select([k]) for k in range(3)], config)
    assert decoded(fused)[0].astype(int).tolist() == [[0, 1, 1, 1, 1, 0]]
    apart = make_instances([[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]], [0.3, 0.3, 0.3]).rles
    assert majority_mask(apart, np.full(3, 0.3)) == apart[0]  # no pixel has half


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**31))
def test_the_majority_on_runs_is_that_of_pixels(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((rng.integers(1, 6), 7, 9)) < rng.random()
    masks[:, 3, 4] = True
    weights = rng.integers(1, 9, len(masks)) / 8
    zeros = np.zeros(len(masks), int)
    rle = majority_mask(encode_masks(masks, zeros, zeros, 7, 9), weights)
    expected = (masks * weights[:, None, None]).sum(0) >= weights.sum() / 2
    assert rle == encode_masks(expected[None], [0], [0], 7, 9)[0]


def random_predictions(rng, count=8, size=(14, 11)):
    """Three models' predictions of an image: some of the same rectangles, other scores."""
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        y, x, h, w = (*rng.integers(0, 9, 2), *rng.integers(1, 6, 2))
        mask[y : y + h, x : x + w] = True
    labels = rng.integers(1, 4, count)
    chosen = [rng.permutation(count)[: rng.integers(0, count + 1)] for _ in range(3)]
    return [make_instances(masks[c], rng.random(len(c)), labels[c]) for c in chosen]


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from([0.3, 0.7]))
def test_fused_predictions_keep_what_all_outputs_rely_on(seed, iou):
    predictions = random_predictions(np.random.default_rng(seed))
    config = make_config("demo", fusion_iou=iou, score_threshold=0.0, detections=20)
    fused = fuse(predictions, config)
    masks, found = np.concatenate([decoded(p) for p in predictions]), decoded(fused)
    assert found.any((1, 2)).all()
    assert not (found.any(0) & ~masks.any(0)).any()  # no pixel that no model has
    assert (np.diff(fused.scores) <= 0).all()
    labels = np.concatenate([p.labels for p in predictions])
    assert {*fused.labels} == {*labels}
    for label in {*labels}:  # no fewer than of the model that detects most of a class
        most = max(int((p.labels == label).sum()) for p in predictions)
        assert (fused.labels == label).sum() >= most
    again = fuse(predictions[::-1], config)
    assert np.allclose(np.sort(again.scores), np.sort(fused.scores))


def test_thousands_of_detections_are_fused_in_seconds():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 990, (5000, 2))
    rles = encode_masks(np.ones((5000, 10, 10), bool), corners[:, 0], corners[:, 1], 1000, 1000)
    boxes = np.concatenate([corners[:, ::-1], corners[:, ::-1] + 10], 1).astype(np.float32)
    labels = rng.integers(1, 5, 5000)
    every = Instances(boxes, rng.random(5000, np.float32), labels, rles, (1000, 1000))
    shuffled = every.select(rng.permutation(5000))
    config = make_config("demo", score_threshold=0.0, detections=20_000)
    fused = fuse([every, shuffled], config)
    assert len(fused) == 5000
    assert np.sort(fused.scores) == pytest.approx(np.sort(every.scores))
