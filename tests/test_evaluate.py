from contextlib import redirect_stdout
from dataclasses import replace
import importlib.util
import io
import json

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import pytest
import torch

from src_snippets import evaluate
from src_snippets.evaluate import (
    ap_interval,
    ap_of_hits,
    average_precision,
    class_ap,
    coco_api,
    coco_results,
    find_hits,
    format_scores,
    hits_of,
    label_image,
    outside_crowds,
    panoptic_quality,
    precision_table,
    score_rows,
)
from src_snippets.forms import coco_truth, Instances, truth_instances, with_crowds
from src_snippets.rle import encode_crop, mask_areas, paint
from tests.conftest import empty_sample, field_of_cells, jittered, make_sample, real_data


def answer(masks, labels, scores) -> Instances:
    """An answer from (H, W) masks."""
    masks = [np.asarray(m, bool) for m in masks]
    size = masks[0].shape
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    rles = [encode_crop(mask, 0, 0, *size) for mask in masks]
    return Instances(
        np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels), rles, size
    )


def cell(top, left, side=4, size=(20, 20)):
    mask = np.zeros(size, np.int64)
    mask[top : top + side, left : left + side] = 1
    return mask


@pytest.fixture
def two_cells():
    """A field with a cell of class 1 and one of class 2; class 3 is absent."""
    return make_sample([cell(0, 0), cell(10, 10)], [1, 2])


def test_ap_worked_by_hand(two_cells):
    truth = coco_truth([two_cells], 3)
    # Class 1: found exactly, after a stronger false positive: precision 1/2. Class 2: missed.
    found = answer([cell(0, 0), cell(14, 0)], [1, 1], [0.8, 0.9])
    scores = average_precision(truth, {1: found})
    assert scores["classes"][1] == {"AP": 0.5, "AP50": 0.5, "AP75": 0.5, "cells": 1}
    assert scores["classes"][2] == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "cells": 1}
    assert scores["classes"][3] == {"AP": None, "AP50": None, "AP75": None, "cells": 0}
    assert (scores["AP"], scores["AP50_100"]) == (0.25, 0.25)
    # Half of the pixels: IoU 0.5 counts for AP50 alone, one of ten thresholds.
    half = cell(0, 0)
    half[2:4] = 0
    scores = average_precision(truth, {1: answer([half], [1], [1.0])})
    assert scores["classes"][1] == pytest.approx({"AP": 0.1, "AP50": 1.0, "AP75": 0.0, "cells": 1})


def test_a_cap_of_100_hides_the_101st():
    ids = np.arange(1, 121).reshape(8, 15).repeat(4, 0).repeat(4, 1)
    sample = make_sample([ids], [1])
    scores = average_precision(coco_truth([sample], 1), {1: truth_instances(sample)})
    assert scores["AP"] == 1.0
    assert scores["AP_100"] == pytest.approx(84 / 101)  # recall up to 100/120: 0, 0.01, .. 0.83


def test_nothing_found_nothing_there(two_cells):
    truth = coco_truth([two_cells], 2)
    assert average_precision(truth, {})["AP50"] == 0.0
    bare = average_precision(coco_truth([empty_sample()], 2), {})
    assert bare["AP50"] is None
    assert "-1" not in format_scores(score_rows(bare))
    assert format_scores(score_rows(bare)).splitlines()[1].split() == [
        "all",
        "-",
        "-",
        "-",
        "-",
        "0",
    ]


@pytest.fixture(scope="module")
def real_truth():
    return json.loads((real_data("hw3-real") / "masks50_coco.json").read_text())


def test_equal_to_pycocotools_on_the_real_truth(real_truth):
    answers = jittered(real_truth)
    assert max(len(found) for found in answers.values()) > 600
    results = coco_results(answers)
    with redirect_stdout(io.StringIO()):
        truth = COCO()
        rows = [a | {"id": k} for k, a in enumerate(real_truth["annotations"], start=1)]
        truth.dataset = real_truth | {"annotations": rows}
        truth.createIndex()
        oracle = COCOeval(truth, truth.loadRes(results), "segm")
        oracle.params.maxDets = [1, 100, 10_000]
        oracle.evaluate()
        oracle.accumulate()
    wanted = oracle.eval["precision"][:, :, :, 0, 1:]
    table = precision_table(real_truth, answers, [100, 10_000])
    assert np.allclose(table, wanted, atol=1e-6)
    scores = average_precision(real_truth, answers)
    assert scores["AP50"] == pytest.approx(wanted[0, :, :, 1].mean(), abs=1e-6)
    assert scores["AP75_100"] == pytest.approx(wanted[5, :, :, 0].mean(), abs=1e-6)
    assert scores["AP"] > scores["AP_100"] > 0.01


def test_without_faster_coco_eval_the_numbers_are_the_same(demo_samples, monkeypatch):
    truth = coco_truth(demo_samples, 4)
    answers = jittered(truth)
    fast = average_precision(truth, answers)
    assert "faster" in coco_api()[0].__module__
    known = importlib.util.find_spec
    monkeypatch.setattr(evaluate, "find_spec", lambda n: None if "faster" in n else known(n))
    assert coco_api() == (COCO, COCOeval)
    assert average_precision(truth, answers) == fast


def test_label_image_shows_the_better_score():
    found = answer([cell(0, 0, 3), cell(1, 1, 3)], [2, 1], [0.4, 0.9])
    image = label_image(found)
    assert image[:5, :5, 0].tolist() == [
        [2, 2, 2, 0, 0],
        [2, 1, 1, 1, 0],
        [2, 1, 1, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert len(np.unique(image[..., 1])) == 3


def test_pq_worked_by_hand(two_cells):
    truth = truth_instances(two_cells)
    # Class 1: one found with IoU 12/16, one invented on background: PQ = 0.75 / (1 + 0.5).
    part = cell(0, 0)
    part[3] = 0
    found = answer([part, cell(0, 12)], [1, 1], [0.9, 0.9])
    quality = panoptic_quality([(truth, found)], 3)
    assert quality == {1: pytest.approx(0.5), 2: 0.0, 3: None}
    assert panoptic_quality([(truth, found.above([0.95]))], 3) == {1: 0.0, 2: 0.0, 3: None}
    same = panoptic_quality([(truth, truth)], 3)
    assert same == {1: pytest.approx(1.0), 2: pytest.approx(1.0), 3: None}
    empty = truth_instances(empty_sample())
    assert panoptic_quality([(empty, empty)], 2) == {1: None, 2: None}
    assert panoptic_quality([], 2) == {1: None, 2: None}


def test_results_are_coco_results(two_cells):
    found = truth_instances(two_cells)
    first, second = coco_results({7: found})
    assert (first["image_id"], first["category_id"], first["bbox"]) == (7, 1, [0.0, 0.0, 4.0, 4.0])
    assert second["bbox"] == [10.0, 10.0, 4.0, 4.0]
    assert json.loads(json.dumps(first))["segmentation"] == found.rles[0]
    assert mask_areas([first["segmentation"]]) == [16]
    assert paint([first["segmentation"]], [1], 20, 20).sum() == 16
    assert coco_results({}) == []


def test_scores_as_text(two_cells):
    truth = coco_truth([two_cells], 2)
    scores = average_precision(truth, {1: truth_instances(two_cells)})
    lines = format_scores(score_rows(scores, {1: 1.0, 2: 0.5})).splitlines()
    assert lines[0].split() == ["AP", "AP50", "AP75", "PQ", "cells"]
    assert lines[1].split() == ["all", "1.000", "1.000", "1.000", "0.750", "2"]
    assert lines[2].split() == ["best", "100", "1.000", "1.000", "1.000"]
    assert lines[4].split() == ["class2", "1.000", "1.000", "1.000", "0.500", "1"]


def test_what_lies_in_a_crowd_is_not_scored():
    ids = np.zeros((20, 30), int)
    ids[:10], ids[12:18, 2:8] = 1, 2
    sample = replace(make_sample([ids], [2]), labels=torch.tensor([-1, 2]))
    found = truth_instances(make_sample([(ids > 0) * (np.arange(30) // 3 + 1)], [2]))
    assert len(outside_crowds(found, sample)) < len(found)
    alone = truth_instances(sample)
    assert outside_crowds(alone, sample).rles == alone.rles
    assert len(outside_crowds(found.select(found.scores > 1), sample)) == 0
    truth = coco_truth([sample], 2)
    scores = average_precision(truth, {1: alone})
    assert (scores["AP50"], scores["classes"][1]["cells"]) == (1.0, 0)


# Hits


def test_hits_worked_by_hand(two_cells):
    truth = truth_instances(two_cells)
    part = cell(0, 0)
    part[3] = 0  # IoU 12/16
    masks = [part, cell(0, 0), cell(10, 10), cell(10, 10)]
    hits = find_hits(answer(masks, [1, 1, 1, 2], [0.9, 0.8, 0.7, 0.6]), truth, 3)
    # The better one has the cell, though the other fits better; the third is of the wrong class.
    assert hits.found.tolist() == [0, -1, -1, 1]
    assert hits.cells.tolist() == [0, 1, 1, 0]
    assert [class_ap([hits], k) for k in (1, 2, 3)] == [1.0, 1.0, None]
    assert ap_of_hits([hits]) == 1.0
    strict = find_hits(answer(masks, [1, 1, 1, 2], [0.9, 0.8, 0.7, 0.6]), truth, 3, least=0.8)
    assert strict.found.tolist() == [-1, 0, -1, 1]
    assert ap_of_hits([strict]) == 0.75
    nothing = find_hits(truth.select([]), truth, 3)
    assert (len(nothing.found), ap_of_hits([nothing]), ap_of_hits([])) == (0, 0.0, 0.0)
    empty = truth_instances(empty_sample())
    assert ap_of_hits([find_hits(empty, empty, 3)]) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_ap_of_hits_is_that_of_coco(seed):
    samples = [field_of_cells(k) for k in range(4)]
    truth = coco_truth(samples, 4)
    answers = jittered(truth, seed)
    rng = np.random.default_rng(seed)  # no ties: their order is nobody's
    for number, found in answers.items():
        found.scores[:] = rng.permutation(len(found)) / 1000 + number / 9000
    hits = hits_of(answers.values(), map(truth_instances, samples), 4)
    assert ap_of_hits(hits) == pytest.approx(average_precision(truth, answers)["AP50"], abs=1e-9)


def test_hits_leave_crowds_out():
    ids = np.zeros((20, 30), int)
    ids[:10], ids[12:18, 2:8] = 1, 2
    sample = replace(make_sample([ids], [2]), labels=torch.tensor([-2, 2]))
    corner = np.arange(600).reshape(20, 30) > 590
    masks = [ids == 1, ids == 2, (ids == 1) * (np.arange(30) < 5), corner]
    found = answer(masks, [2] * 4, [0.9, 0.8, 0.7, 0.6])
    hits = find_hits(found, with_crowds(sample), 2)
    assert hits.found.tolist() == [1, -1]
    assert hits.cells.tolist() == [0, 0, 1]
    expected = average_precision(coco_truth([sample], 2), {1: found})["AP50"]
    assert ap_of_hits([hits]) == pytest.approx(expected)


def test_interval_of_images(two_cells):
    truth = truth_instances(two_cells)
    good, bad = find_hits(truth, truth, 2), find_hits(truth.select([]), truth, 2)
    assert ap_interval([good] * 5) == (1.0, 1.0)
    assert ap_interval([bad] * 2) == (0.0, 0.0)
    empty = truth_instances(empty_sample())
    nothing = find_hits(empty, empty, 2)
    assert ap_interval([good]) is ap_interval([nothing] * 5) is ap_interval([]) is None
    assert ap_interval([good, nothing, nothing, good]) == (1.0, 1.0)
    low, high = ap_interval([good, bad] * 8)
    assert 0.2 < low < 0.5 < high < 0.8
    assert ap_interval([good, bad] * 8) == (low, high)
    # Twice an image is the same as two copies of it.
    assert ap_of_hits([good, bad], np.array([2, 1])) == ap_of_hits([good, good, bad])
