from contextlib import redirect_stdout
from dataclasses import replace
import json
import sys

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pytest
import torch

from src_snippets.data.rle import encode_masks, mask_areas
from src_snippets.data.structures import (
    coco_annotations,
    coco_ground_truth,
    ground_truth,
    Instances,
)
from src_snippets.training.metrics import (
    average_precision,
    coco_classes,
    precision_table,
)
from tests.conftest import empty_sample, field_of_cells, jittered, make_sample, real_data

NAMES = {1: "a", 2: "b", 3: "c"}


def detections(masks, labels, scores) -> Instances:
    """A prediction of (H, W) masks; its boxes do not matter for mask AP."""
    masks = np.array(masks, bool)
    zeros = np.zeros(len(masks), int)
    rles = encode_masks(masks, zeros, zeros, *masks.shape[1:])
    boxes, scores = np.zeros((len(masks), 4), np.float32), np.array(scores, np.float32)
    return Instances(boxes, scores, np.array(labels), rles, masks.shape[1:])


def square(top, left, side=4, size=(20, 20)):
    mask = np.zeros(size, np.int64)
    mask[top : top + side, left : left + side] = 1
    return mask


@pytest.fixture
def two_cells():
    """An instance of class 1 and one of class 2; class 3 is absent."""
    return make_sample([square(0, 0), square(10, 10)], [1, 2])


def row(ap, ap50, ap75, instances):
    return {"AP": ap, "AP50": ap50, "AP75": ap75, "instances": instances}


def test_ap_worked_by_hand(two_cells):
    truth = coco_ground_truth([two_cells], NAMES)
    # Class 1: exact, after a false positive with a higher score: precision 1/2. Class 2: missed.
    predicted = detections([square(0, 0), square(14, 0)], [1, 1], [0.8, 0.9])
    scores = average_precision(truth, {1: predicted})
    assert scores["classes"] == {
        1: row(0.5, 0.5, 0.5, 1),
        2: row(0.0, 0.0, 0.0, 1),
        3: row(None, None, None, 0),
    }
    assert (scores["AP"], scores["AP50_100"]) == (0.25, 0.25)
    # Half of the pixels: IoU 0.5 counts for AP50 alone, one of ten thresholds.
    half = square(0, 0)
    half[2:4] = 0
    scores = average_precision(truth, {1: detections([half], [1], [1.0])})
    assert scores["classes"][1] == pytest.approx(row(0.1, 1.0, 0.0, 1))


def test_a_cap_of_100_hides_the_101st():
    ids = np.arange(1, 121).reshape(8, 15).repeat(4, 0).repeat(4, 1)
    sample = make_sample([ids], [1])
    scores = average_precision(coco_ground_truth([sample], {1: "a"}), {1: ground_truth(sample)})
    assert scores["AP"] == 1.0
    assert scores["AP_100"] == pytest.approx(84 / 101)  # recall up to 100/120: 0, 0.01, .. 0.83


def test_no_detections_no_ground_truth(two_cells):
    assert average_precision(coco_ground_truth([two_cells], NAMES), {})["AP50"] == 0.0
    bare = coco_ground_truth([empty_sample()], NAMES)
    for predictions in ({}, {1: detections([square(0, 0, size=(40, 50))], [1], [1.0])}):
        scores = average_precision(bare, predictions)
        assert scores["AP50"] is scores["AP_100"] is scores["classes"][1]["AP"] is None
    assert average_precision(coco_ground_truth([], NAMES), {})["AP"] is None
    assert coco_annotations({}, NAMES) == []


def test_a_detection_in_a_crowd_is_ignored_and_no_miss():
    ids = np.zeros((20, 30), int)
    ids[:10], ids[12:18, 2:8] = 1, 2
    sample = replace(make_sample([ids], [2]), labels=torch.tensor([-2, 2]))
    truth = coco_ground_truth([sample], NAMES)
    strips = [(ids == 1) * (np.arange(30) // 3 == k) for k in range(3)]
    predicted = detections([*strips, ids == 2], [2] * 4, [0.9, 0.8, 0.7, 0.6])
    scores = average_precision(truth, {1: predicted})
    assert scores["classes"][2] == row(1.0, 1.0, 1.0, 1)
    outside = np.arange(600).reshape(20, 30) > 590
    predicted = detections([outside, ids == 2], [2] * 2, [0.9, 0.6])
    assert average_precision(truth, {1: predicted})["AP"] == 0.5


def test_annotations_are_coco_results(two_cells):
    known = ground_truth(two_cells)
    first, second = coco_annotations({7: known}, NAMES)
    assert (first["image_id"], first["category_id"], first["bbox"]) == (7, 1, [0.0, 0.0, 4.0, 4.0])
    assert second["bbox"] == [10.0, 10.0, 4.0, 4.0]
    assert json.loads(json.dumps(first))["segmentation"] == known.rles[0]
    assert mask_areas([first["segmentation"]]) == [16]
    assert [result["image_id"] for result in coco_annotations({3: known, 2: known}, NAMES)] == [
        2,
        2,
        3,
        3,
    ]


def oracle(truth, results, caps):
    """pycocotools' own precision, (10, 101, C, caps), with its areas, boxes and ids."""
    with redirect_stdout(None):
        coco = COCO()
        rows = [a | {"id": k} for k, a in enumerate(truth["annotations"], start=1)]
        coco.dataset = truth | {"annotations": rows}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.params.maxDets = caps
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0]


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_pycocotools(seed):
    truth = coco_ground_truth([field_of_cells(k) for k in range(3)], NAMES)
    predictions = jittered(truth, seed)
    wanted = oracle(truth, coco_annotations(predictions, NAMES), [1, 5, 100])
    assert np.allclose(precision_table(truth, predictions, [1, 5, 100]), wanted, atol=1e-9)


def test_equal_to_pycocotools_on_the_real_ground_truth():
    truth = json.loads((real_data("hw3-real") / "masks50_coco.json").read_text())
    predictions = jittered(truth)
    assert max(map(len, predictions.values())) > 600
    results = coco_annotations(predictions, [kind["id"] for kind in truth["categories"]])
    wanted = oracle(truth, results, [1, 100, 10_000])
    scores = average_precision(truth, predictions)
    assert scores["AP50"] == pytest.approx(wanted[0, :, :, 2].mean(), abs=1e-6)
    assert scores["AP75_100"] == pytest.approx(wanted[5, :, :, 1].mean(), abs=1e-6)
    assert scores["AP"] > scores["AP_100"] > 0.01


def test_without_faster_coco_eval_the_values_are_the_same(monkeypatch):
    truth = coco_ground_truth([field_of_cells(k) for k in range(3)], NAMES)
    predictions = jittered(truth)
    fast = average_precision(truth, predictions)
    assert "faster" in coco_classes()[0].__module__
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_classes() == (COCO, COCOeval)
    assert average_precision(truth, predictions) == fast
