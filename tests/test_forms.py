from dataclasses import replace

import numpy as np
import pycocotools.mask
import torch

from src_snippets.forms import (
    coco_truth,
    instance_boxes,
    pack_parts,
    renumber,
    truth_instances,
    with_categories,
)
from tests.conftest import empty_sample, make_sample, pack_maps


def test_ids_are_numbered_anew():
    numbered, count = renumber(np.array([9, 9, 4, 700]), 3)
    assert numbered.tolist() == [4, 4, 3, 5]
    assert (count, numbered.dtype) == (3, np.int32)
    huge, count = renumber(np.array([10**15, 5]), 1)
    assert (huge.tolist(), count) == ([2, 1], 2)
    assert renumber(np.zeros(0, int), 1)[1] == 0


def test_maps_that_do_not_overlap_share_a_layer():
    one, two = np.array([[1, 0, 0]]), np.array([[0, 1, 1]])
    layers, labels = pack_maps([one, two], [1, 3])
    assert layers.tolist() == [[[1, 2, 2]]]
    assert (labels.tolist(), layers.dtype, labels.dtype) == ([1, 3], torch.int16, torch.int64)


def test_maps_that_overlap_get_layers_of_their_own():
    one, two = np.array([[1, 1, 0]]), np.array([[0, 1, 0]])
    layers, labels = pack_maps([one, two], [2, 2])
    assert layers.tolist() == [[[1, 1, 0]], [[0, 2, 0]]]
    assert labels.tolist() == [2, 2]


def test_without_overlaps_the_first_has_the_pixel():
    one, two = np.array([[1, 1, 0]]), np.array([[0, 3, 4]])
    layers, labels = pack_maps([one, two], [1, 2], overlaps=False)
    assert (layers.tolist(), labels.tolist()) == ([[[1, 1, 2]]], [1, 2])


def test_more_than_32767_cells():
    ids = np.arange(1, 200 * 200 + 1).reshape(200, 200)
    layers, labels = pack_maps([ids[:100], ids[100:]], [1, 2])
    assert (layers.dtype, layers.shape, len(labels)) == (torch.int32, (2, 100, 200), 40_000)
    assert layers[0].flatten().tolist() == list(range(1, 20_001))
    assert layers[1].flatten().tolist() == list(range(20_001, 40_001))


def test_crowds_are_in_coco_alone():
    sample = make_sample([[[1, 0, 2]]], [3])
    sample = replace(sample, labels=torch.tensor([3, -3]))
    assert truth_instances(sample).labels.tolist() == [3]
    rows = coco_truth([sample], 4)["annotations"]
    assert [(row["category_id"], row["iscrowd"]) for row in rows] == [(3, 0), (3, 1)]


def test_no_maps_give_one_empty_layer():
    layers, labels = pack_parts([], (3, 4))
    assert (layers.shape, labels.shape) == ((1, 3, 4), (0,))
    assert not layers.any()


def test_boxes_are_tight_with_the_far_edge_outside():
    layers = torch.zeros(2, 6, 8, dtype=torch.int32)
    layers[0, 1:3, 2:7] = 1
    layers[1, 5, 7] = 3
    boxes, areas, homes = instance_boxes(layers, 3)
    assert boxes.tolist() == [[2, 1, 7, 3], [0, 0, 0, 0], [7, 5, 8, 6]]
    assert (areas.tolist(), homes.tolist()) == ([10, 0, 1], [0, 0, 1])
    assert instance_boxes(layers * 0, 0)[0].shape == (0, 4)


def test_truth_as_answer_and_as_coco():
    sample = make_sample([[[0, 7, 7], [0, 7, 0]], [[1, 0, 0], [0, 0, 0]]], [2, 4])
    truth = truth_instances(sample)
    assert [pycocotools.mask.decode(r).tolist() for r in truth.rles] == [
        [[0, 1, 1], [0, 1, 0]],
        [[1, 0, 0], [0, 0, 0]],
    ]
    assert truth.boxes.tolist() == [[1, 0, 3, 2], [0, 0, 1, 1]]
    assert (truth.labels.tolist(), truth.scores.tolist(), truth.size) == ([2, 4], [1, 1], (2, 3))
    assert truth.select(np.array([False, True])).boxes.tolist() == [[0, 0, 1, 1]]
    coco = coco_truth([empty_sample(), sample], 4)
    assert [image["id"] for image in coco["images"]] == [1, 2]
    first = coco["annotations"][0]
    assert (first["image_id"], first["bbox"], first["area"]) == (2, [1, 0, 2, 2], 3)
    assert [c["id"] for c in coco["categories"]] == [1, 2, 3, 4]


def test_empty_truth():
    truth = truth_instances(empty_sample())
    assert (len(truth), truth.boxes.shape) == (0, (0, 4))
    assert len(truth.select(truth.scores > 0)) == 0
    assert coco_truth([], 4)["annotations"] == []


def test_a_datasets_own_categories():
    truth = coco_truth([make_sample([[[1, 0, 2]]], [2])], 2)
    own = with_categories(truth, {3: "long", 7: "round"})
    assert own["categories"] == [dict(id=3, name="long"), dict(id=7, name="round")]
    assert {row["category_id"] for row in own["annotations"]} == {7}
    assert {row["category_id"] for row in truth["annotations"]} == {2}
