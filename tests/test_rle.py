from hypothesis import given, strategies
from hypothesis.extra.numpy import arrays
import numpy as np
import pycocotools.mask
import pytest

from src_snippets.rle import (
    decode_runs,
    encode_crop,
    encode_crops,
    encode_layers,
    encode_runs,
    kaggle_text,
    mask_areas,
    paint,
    pixels_of_kaggle_text,
    row_major_pixels,
)

masks = strategies.tuples(strategies.integers(1, 12), strategies.integers(1, 12)).flatmap(
    lambda s: arrays(bool, s)
)


def oracle(mask) -> dict:
    rle = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def test_worked_example():
    # Columns of 3: the pixels are numbers 1, 2 (column 0) and 3 (column 1): one run from 1 to 4.
    mask = np.array([[0, 1], [1, 0], [1, 0]], bool)
    rle = encode_crop(mask, 0, 0, 3, 2)
    starts, ends = decode_runs(rle)
    assert (starts.tolist(), ends.tolist()) == ([1], [4])
    assert pycocotools.mask.decode(rle).tolist() == mask.astype(int).tolist()
    assert mask_areas([rle]).tolist() == [3]
    assert decode_runs({"size": [3, 2], "counts": [1, 3, 2]})[0].tolist() == [1]


@given(masks)
def test_same_text_as_pycocotools(mask):
    assert encode_crop(mask, 0, 0, *mask.shape) == oracle(mask)


@given(
    masks,
    strategies.integers(0, 5),
    strategies.integers(0, 5),
    strategies.integers(0, 5),
    strategies.integers(0, 5),
)
def test_crop_equals_whole(crop, top, left, below, right):
    whole = np.pad(crop, ((top, below), (left, right)))
    rle = encode_crop(crop, top, left, *whole.shape)
    assert rle == oracle(whole)
    assert mask_areas([rle]) == [whole.sum()]
    assert (paint([rle], [7], *whole.shape) == 7 * whole).all()


@given(strategies.integers(0, 2**31))
def test_many_crops_equal_one_by_one(seed):
    rng = np.random.default_rng(seed)
    crops = rng.random((6, 4, 5)) < rng.choice([0.1, 0.5, 1.0], (6, 1, 1))
    crops[2] = False
    tops, lefts = rng.integers(0, 5, 6), rng.integers(0, 5, 6)
    rles = encode_crops(crops, tops, lefts, 8, 9)
    corners = zip(crops, tops, lefts, strict=True)
    assert rles == [encode_crop(crop, top, left, 8, 9) for crop, top, left in corners]
    assert mask_areas(rles * 90).tolist() == crops.sum((1, 2)).tolist() * 90


def test_touching_runs_of_two_masks_stay_apart():
    # One mask ends at the bottom of column 0, the next begins at the top of column 1.
    full = np.ones((2, 3, 1), bool)
    first, second = encode_crops(full, np.array([0, 0]), np.array([0, 1]), 3, 2)
    assert (decode_runs(first)[1].tolist(), decode_runs(second)[0].tolist()) == ([3], [3])


@given(strategies.integers(0, 2**31), strategies.integers(1, 400), strategies.integers(1, 400))
def test_long_runs_decode(seed, height, width):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.choice([0.001, 0.5, 0.999])
    starts, ends = decode_runs(oracle(mask))
    flat = np.zeros(height * width, bool)
    for start, end in zip(starts, ends, strict=True):
        flat[start:end] = True
    assert (mask == flat.reshape(width, height).T).all()


def test_counts_that_do_not_fill_the_image_are_refused():
    with pytest.raises(ValueError, match="to 12"):
        decode_runs({"size": [3, 4], "counts": [1, 3, 2]})


def test_empty():
    empty = encode_crop(np.zeros((0, 0), bool), 0, 0, 4, 5)
    assert empty == oracle(np.zeros((4, 5), bool))
    assert encode_runs([], [], 4, 5) == empty
    assert mask_areas([empty]).tolist() == [0]
    assert mask_areas([]).tolist() == []
    assert encode_crops(np.zeros((0, 3, 3), bool), np.zeros(0), np.zeros(0), 4, 5) == []
    assert encode_layers(np.zeros((1, 4, 5), np.int32), 0) == []
    assert not paint([], [], 4, 5).any()


@given(strategies.integers(0, 2**31))
def test_layers_give_the_mask_of_each_id(seed):
    rng = np.random.default_rng(seed)
    layers = np.zeros((2, 9, 11), np.int32)
    layers[0] = rng.choice([0, 1, 3], (9, 11))
    layers[1] = rng.choice([0, 2], (9, 11))
    rles = encode_layers(layers, 4)  # id 4 has no pixels
    assert rles == [oracle((layers == i).any(0)) for i in range(1, 5)]


def test_later_paint_covers_earlier():
    rles = [oracle(np.array([[1, 1, 0]], bool)), oracle(np.array([[0, 1, 1]], bool))]
    assert paint(rles, [5, 6], 1, 3).tolist() == [[5, 6, 6]]


def test_kaggle_text_is_row_major_from_one():
    crop = np.array([[1, 1, 0], [0, 1, 1]], bool)
    rle = encode_crop(crop, 1, 2, 4, 5)
    assert kaggle_text(rle) == "8 2 14 2"
    assert kaggle_text(encode_crop(np.ones((2, 5), bool), 0, 0, 4, 5)) == "1 10"
    assert kaggle_text(encode_crop(np.zeros((1, 1), bool), 0, 0, 4, 5)) == ""
    assert row_major_pixels(rle).tolist() == [7, 8, 13, 14]
    assert pixels_of_kaggle_text("14 2 8 2", 20).tolist() == [7, 8, 13, 14]
    assert pixels_of_kaggle_text(" ", 20).tolist() == []
