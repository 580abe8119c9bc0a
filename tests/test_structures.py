from dataclasses import replace

from hypothesis import given, strategies
import numpy as np
import pycocotools.mask
import torch

from src_snippets.data.structures import (
    coco_ground_truth,
    ground_truth,
    instance_boxes,
    Instances,
    pack_layers,
)
from tests.conftest import empty_sample, make_sample, pack_maps

NAMES = {3: "long", 7: "round", 12: "flat", 1: "other"}  # ids that are not 1..C, nor ascending


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


def test_ids_become_consecutive_whatever_they_are():
    layers, labels = pack_maps([[[9, 9, 4, 700]], [[0, 0, 10**15, 5]]], [1, 2])
    assert layers.tolist() == [[[2, 2, 1, 3]], [[0, 0, 5, 4]]]
    assert labels.tolist() == [1, 1, 1, 2, 2]


def test_int16_holds_32767_instances_and_no_more():
    for count, dtype in ((32_767, torch.int16), (32_768, torch.int32), (40_000, torch.int32)):
        ids = np.arange(1, count + 1)[None]
        layers, labels = pack_maps([ids, ids > count - 1], [1, 2])  # the second in a layer above
        last = count + 1
        assert layers[0, 0].tolist() == ids[0].tolist()
        assert (layers[1].max(), len(labels)) == (last, last)
        assert layers.dtype == (torch.int32 if last > 32_767 else dtype)
        layers, labels = pack_maps([ids], [1])
        assert (layers.dtype, layers.max(), len(labels)) == (dtype, count, count)


def test_no_maps_give_one_empty_layer():
    layers, labels = pack_layers([], (3, 4))
    assert (layers.shape, labels.shape, labels.dtype) == ((1, 3, 4), (0,), torch.int64)
    assert not layers.any()


@given(strategies.integers(0, 2**31), strategies.booleans())
def test_layers_lose_nothing(seed, overlaps):
    rng = np.random.default_rng(seed)
    maps = rng.choice([0, 0, 2, 5], (3, 4, 6))
    layers, labels = pack_maps(maps, [1, 2, 3], overlaps)
    first = np.cumsum(maps > 0, axis=0) == 1
    masks = [
        (m == i) & (overlaps | own) for m, own in zip(maps, first, strict=True) for i in (2, 5)
    ]
    expected = [mask.tolist() for mask in masks if mask.any()]
    present = [(layers == i).any(0).tolist() for i in range(1, len(labels) + 1)]
    assert present == expected
    assert len(layers) == 1 or overlaps


def test_boxes_are_tight_with_the_far_edge_outside():
    layers = torch.zeros(2, 6, 8, dtype=torch.int32)
    layers[0, 1:3, 2:7] = 1
    layers[1, 5, 7] = 3
    boxes, areas, layer_index = instance_boxes(layers, 3)
    assert boxes.tolist() == [[2, 1, 7, 3], [0, 0, 0, 0], [7, 5, 8, 6]]
    assert (areas.tolist(), layer_index.tolist()) == ([10, 0, 1], [0, 0, 1])
    assert instance_boxes(layers * 0, 0)[0].shape == (0, 4)


def test_ground_truth_as_instances_and_as_coco():
    sample = make_sample([[[0, 7, 7], [0, 7, 0]], [[1, 0, 0], [0, 0, 0]]], [2, 4])
    truth = ground_truth(sample)
    assert [pycocotools.mask.decode(r).tolist() for r in truth.rles] == [
        [[0, 1, 1], [0, 1, 0]],
        [[1, 0, 0], [0, 0, 0]],
    ]
    assert truth.boxes.tolist() == [[1, 0, 3, 2], [0, 0, 1, 1]]
    assert (truth.labels.tolist(), truth.scores.tolist(), truth.size) == ([2, 4], [1, 1], (2, 3))
    coco = coco_ground_truth([empty_sample(), sample], NAMES)
    assert [image["id"] for image in coco["images"]] == [1, 2]
    size = dict(file_name="drawn", height=2, width=3)
    assert coco["images"][1] == dict(id=2, **size)
    first, second = coco["annotations"]
    assert (first["image_id"], first["bbox"], first["area"]) == (2, [1, 0, 2, 2], 3)
    assert [row["id"] for row in (first, second)] == [1, 2]
    assert [row["category_id"] for row in (first, second)] == [7, 1]  # classes 2 and 4
    assert coco["categories"] == [dict(id=key, name=name) for key, name in NAMES.items()]


def test_crowds_are_left_out_unless_asked_for_and_are_marked_in_coco():
    sample = replace(make_sample([[[1, 0, 2]]], [3]), labels=torch.tensor([3, -3]))
    assert ground_truth(sample).labels.tolist() == [3]
    assert ground_truth(sample, crowds=True).labels.tolist() == [3, -3]
    rows = coco_ground_truth([sample], NAMES)["annotations"]
    assert [(row["category_id"], row["iscrowd"]) for row in rows] == [(12, 0), (12, 1)]


def test_select_and_above():
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    scores = np.array([0.9, 0.5, 0.4], np.float32)
    one = Instances(boxes, scores, np.array([1, 2, 3]), [dict(n=i) for i in range(3)], (5, 6))
    for index in (np.array([False, True, True]), [1, 2], slice(1, None)):
        part = one.select(index)
        assert (part.labels.tolist(), part.rles) == ([2, 3], [dict(n=1), dict(n=2)])
        assert (part.boxes.tolist(), part.size) == (boxes[1:].tolist(), (5, 6))
    assert one.select([2, 0]).labels.tolist() == [3, 1]
    assert one.above(0.5).labels.tolist() == [1, 2]  # the threshold itself is enough
    assert repr(one) == "Instances(3 detections, 2 with score >= 0.5, 5 x 6 px)"
    assert len(one.select([])) == len(one.above(2.0)) == 0


def test_empty_ground_truth():
    truth = ground_truth(empty_sample())
    assert (len(truth), truth.boxes.shape) == (0, (0, 4))
    assert repr(truth) == "Instances(0 detections, 0 with score >= 0.5, 40 x 50 px)"
    assert coco_ground_truth([], NAMES)["annotations"] == []
