from dataclasses import replace

from hypothesis import given, settings, strategies
import numpy as np
import pytest
import torch

from src_snippets.model.detect import fuse_boxes
from src_snippets.setup.config import make_config

BOXES = [[0, 0, 30, 10], [10, 0, 30, 10], [40, 0, 70, 10], [20, 0, 50, 10]]  # IoU of 0 and 1: 2/3


def part(boxes, scores, labels=None):
    """Detections (n, 6) of one model and view."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels or [1] * len(boxes))
    return torch.column_stack([boxes, torch.tensor(scores, dtype=torch.float32), labels])


def test_models_fused_worked_by_hand():
    first = part([BOXES[0], BOXES[2]], [0.9, 0.6], [1, 3])
    second = part([BOXES[1], BOXES[2], BOXES[2]], [0.6, 0.3, 0.2], [1, 3, 3])
    third = part([BOXES[1]], [0.8], [2])
    config = make_config("demo", fusion_iou=0.5, score_threshold=0.01)
    # Boxes 0 and 1 are one instance where the class is the same. A model has one voice: its best.
    fused = fuse_boxes([first, second, third], config)
    assert fused[:, 5].tolist() == [1, 3, 2]
    assert fused[:, 4].tolist() == pytest.approx([1.5 / 3, 0.9 / 3, 0.8 / 3])
    assert fused[0, :4].tolist() == pytest.approx([4, 0, 30, 10])  # 0 by 0.9 and 10 by 0.6
    assert fused[1:, :4].tolist() == [pytest.approx(BOXES[2]), BOXES[1]]
    strict = fuse_boxes([first, second, third], replace(config, fusion_iou=0.7))
    assert sorted(strict[:, 5].tolist()) == [1, 1, 2, 3]
    assert len(fuse_boxes([first, second, third], replace(config, detections=2))) == 2
    empty = first[:0]
    assert fuse_boxes([first, empty], config)[:, 4].tolist() == pytest.approx([0.45, 0.3])
    assert fuse_boxes([empty, empty], config).shape == (0, 6)


def test_a_box_counts_for_the_instance_that_it_overlaps_most():
    """Two instances of IoU 1/3, and a second view with one box between: IoU 2/3 and 3/5."""
    first = part([[0, 0, 20, 10], [10, 0, 30, 10]], [0.9, 0.8])
    second = part([[4, 0, 24, 10]], [0.7])
    fused = fuse_boxes([first, second], make_config("demo", fusion_iou=0.5))
    assert fused[:, 4].tolist() == pytest.approx([0.8, 0.4])
    assert fused[1, :4].tolist() == pytest.approx([10, 0, 30, 10])


def test_the_threshold_holds_for_fused_scores_and_includes_its_value():
    first, second = part(BOXES[:1], [0.75]), part(BOXES[:1], [0.25])
    assert len(fuse_boxes([first, second], make_config("demo", score_threshold=0.5))) == 1
    assert len(fuse_boxes([first, second], make_config("demo", score_threshold=0.51))) == 0


def test_equal_scores_keep_their_order_and_may_be_zero():
    config = make_config("demo", score_threshold=0.0)
    for score in (0.5, 0.0):
        parts = [part([BOXES[0], BOXES[2]], [score] * 2, [2, 1]), part(BOXES[3:], [score])]
        assert fuse_boxes(parts, config)[:, :4].tolist() == [
            pytest.approx(box) for box in (BOXES[0], BOXES[2], BOXES[3])
        ]


def random_parts(rng, count):
    """Three models' detections of an image: some of the same boxes, other scores."""
    corners, sides = rng.integers(0, 60, (count, 2)), rng.integers(5, 25, (count, 2))
    boxes, labels = np.concatenate([corners, corners + sides], 1), rng.integers(1, 4, count)
    chosen = [rng.permutation(count)[: rng.integers(0, count + 1)] for _ in range(3)]
    return [part(boxes[c], rng.random(len(c)), labels[c].tolist()) for c in chosen]


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from([0.3, 0.7, 1.0]))
def test_fused_detections_keep_what_all_outputs_rely_on(seed, iou):
    parts = random_parts(np.random.default_rng(seed), 12)
    config = make_config("demo", fusion_iou=iou, score_threshold=0.0, detections=40)
    fused, rows = fuse_boxes(parts, config), torch.cat(parts)
    assert fused.isfinite().all()
    assert (fused[:, 4].diff() <= 0).all()
    assert (fused[:, 2:4] > fused[:, :2]).all()
    assert {*fused[:, 5].tolist()} == {*rows[:, 5].tolist()}
    for label in rows[:, 5].unique():
        of_rows, of_fused = rows[rows[:, 5] == label, :5], fused[fused[:, 5] == label, :5]
        assert of_fused[:, 4].sum() <= of_rows[:, 4].sum() / 3 + 1e-5  # no score counts twice
        assert (of_fused[:, :4] >= of_rows[:, :4].amin(0) - 1e-3).all()
        assert (of_fused[:, :4] <= of_rows[:, :4].amax(0) + 1e-3).all()
    again = fuse_boxes(parts[::-1], config)
    assert torch.allclose(again[:, 4].sort()[0], fused[:, 4].sort()[0])


def test_blocks_of_boxes_change_nothing():
    """700 distinct boxes, over two blocks of 256, by two models: each is one instance."""
    x, y = torch.meshgrid(torch.arange(28) * 20, torch.arange(25) * 20, indexing="ij")
    corner = torch.stack([x.flatten(), y.flatten()], 1)
    boxes, scores = torch.cat([corner, corner + 15], 1), torch.linspace(0.99, 0.1, 700)
    rows = torch.column_stack([boxes, scores, torch.ones(700)])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    config = make_config("demo", score_threshold=0.0, detections=1000)
    assert torch.allclose(fuse_boxes([rows, rows[order]], config), rows, atol=1e-3)
