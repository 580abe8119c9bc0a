from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
import numpy as np
import pycocotools.mask
import pytest

from src_snippets.data.rle import (
    crop_mask,
    csv_to_pixels,
    decode_runs,
    draw_masks,
    encode_layers,
    encode_masks,
    encode_runs,
    mask_areas,
    pixel_indices,
    rle_to_csv,
)

shapes = strategies.tuples(strategies.integers(1, 12), strategies.integers(1, 12))
masks = shapes.flatmap(lambda shape: arrays(bool, shape))
seeds = strategies.integers(0, 2**31)


def oracle(mask) -> dict:
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def encode(mask, top=0, left=0, height=None, width=None) -> dict:
    size = (height or mask.shape[0], width or mask.shape[1])
    return encode_masks(np.asarray(mask, bool)[None], [top], [left], *size)[0]


def test_worked_example():
    # Columns of 3: pixels 1, 2 (column 0) and 3 (column 1) are one run from 1 to 4.
    rle = encode(np.array([[0, 1], [1, 0], [1, 0]]))
    starts, ends = decode_runs(rle)
    assert (starts.tolist(), ends.tolist()) == ([1], [4])
    assert pycocotools.mask.decode(rle).tolist() == [[0, 1], [1, 0], [1, 0]]
    assert mask_areas([rle]).tolist() == [3]
    assert decode_runs({"size": [3, 2], "counts": [1, 3, 2]})[0].tolist() == [1]
    assert decode_runs({"size": [3, 2], "counts": [1, 0, 2, 3]})[1].tolist() == [6]


@given(masks, *[strategies.integers(0, 5)] * 4)
def test_a_mask_in_its_box_is_encoded_as_pycocotools_does(mask, top, left, below, right):
    whole = np.pad(mask, ((top, below), (left, right)))
    rle = encode(mask, top, left, *whole.shape)
    assert rle == oracle(whole)
    assert mask_areas([rle]) == [whole.sum()]
    assert (draw_masks([rle], [7], *whole.shape) == 7 * whole).all()
    assert pixel_indices(rle).tolist() == np.flatnonzero(whole).tolist()
    assert csv_to_pixels(rle_to_csv(rle), whole.size).tolist() == np.flatnonzero(whole).tolist()
    if mask.any():
        crop, top, left = crop_mask(rle)
        assert encode(crop, top, left, *whole.shape) == rle
        assert all(edge.any() for edge in (crop[0], crop[-1], crop[:, 0], crop[:, -1]))


@given(seeds)
def test_many_masks_equal_one_by_one(seed):
    rng = np.random.default_rng(seed)
    crops = rng.random((6, 4, 5)) < rng.choice([0.1, 0.5, 1.0], (6, 1, 1))
    crops[2] = False
    tops, lefts = rng.integers(0, 5, 6), rng.integers(0, 5, 6)
    rles = encode_masks(crops, tops, lefts, 8, 9)
    assert rles == [encode(*one, 8, 9) for one in zip(crops, tops, lefts, strict=True)]
    assert mask_areas(rles * 90).tolist() == crops.sum((1, 2)).tolist() * 90


def test_runs_that_touch_are_one_in_a_mask_and_stay_apart_in_two():
    (one,) = encode_runs([0, 0], [0, 3], [3, 5], 1, 3, 2)
    assert one == oracle(np.array([[1, 1], [1, 1], [1, 0]]))
    first, second = encode_runs([0, 1], [0, 3], [3, 6], 2, 3, 2)
    assert (decode_runs(first)[1].tolist(), decode_runs(second)[0].tolist()) == ([3], [3])
    # Any order, and a mask between them without runs
    assert encode_runs([2, 0], [3, 0], [6, 3], 3, 3, 2)[::2] == [first, second]


@given(seeds, strategies.integers(1, 400), strategies.integers(1, 400))
def test_long_runs_decode(seed, height, width):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.5, 0.999])
    flat = np.zeros(height * width, bool)
    for start, end in zip(*decode_runs(oracle(mask)), strict=True):
        flat[start:end] = True
    assert (mask == flat.reshape(width, height).T).all()


@pytest.mark.parametrize("counts", [[1, 3, 2], [-1, 13], [], "", b"P", "o" * 40, b"\xff\x00"])
def test_counts_that_do_not_fill_the_image_are_refused(counts):
    with pytest.raises(ValueError, match="expected 3 x 4 pixels"):
        decode_runs({"size": [3, 4], "counts": counts})


def test_empty():
    empty = encode(np.zeros((0, 0)), 0, 0, 4, 5)
    assert empty == oracle(np.zeros((4, 5), bool)) == encode_runs([], [], [], 1, 4, 5)[0]
    assert mask_areas([empty]).tolist() == [0]
    assert mask_areas([]).tolist() == pixel_indices(empty).tolist() == []
    assert encode_masks(np.zeros((0, 3, 3), bool), np.zeros(0), np.zeros(0), 4, 5) == []
    assert encode_layers(np.zeros((1, 4, 5), np.int32), 0) == []
    assert not draw_masks([], [], 4, 5).any()
    assert (rle_to_csv(empty), csv_to_pixels(" ", 20).tolist()) == ("", [])


@given(seeds)
def test_layers_give_the_mask_of_each_id(seed):
    rng = np.random.default_rng(seed)
    layers = np.zeros((2, 9, 11), np.int32)
    layers[0] = rng.choice([0, 1, 3], (9, 11))
    layers[1] = rng.choice([0, 2], (9, 11))
    rles = encode_layers(layers, 4)  # id 4 has no pixels
    assert rles == [oracle((layers == i).any(0)) for i in range(1, 5)]


def test_later_masks_are_drawn_on_top():
    rles = [oracle(np.array([[1, 1, 0]])), oracle(np.array([[0, 1, 1]]))]
    assert draw_masks(rles, [5, 6], 1, 3).tolist() == [[5, 6, 6]]


def test_csv_is_row_major_from_one():
    rle = encode(np.array([[1, 1, 0], [0, 1, 1]]), 1, 2, 4, 5)
    assert rle_to_csv(rle) == "8 2 14 2"
    assert rle_to_csv(encode(np.ones((2, 5)), 0, 0, 4, 5)) == "1 10"  # over the end of a row
    assert csv_to_pixels("14 2 8 2", 20).tolist() == [7, 8, 13, 14]
    assert csv_to_pixels("19 2", 20).tolist() == [18, 19]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        *[(text, "pairs of start and length") for text in ("1 2 3", "1 x", "1.5 2", "-1 2")],
        (f"1 {2**64}", "pairs of start and length"),
        *[(text, "pixels from 1 to 20") for text in ("0 2", "3 0", "20 2", f"1 {10**17}")],
        *[(text, "listed twice") for text in ("1 3 3 1", "3 1 1 3", "4 1 4 1")],
    ],
)
def test_other_csv_is_refused(text, cause):
    with pytest.raises(ValueError, match=cause):
        csv_to_pixels(text, 20)
