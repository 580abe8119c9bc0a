"""Run lengths: masks as COCO RLE, made and read inside their own boxes."""

# %% [markdown]
# ## How is a mask kept small?
# As run lengths (RLE): the lengths of background and cell stretches, column by column. A field of
# 1,000 cells then costs kilobytes. Nothing here makes an image-size mask for each instance.

# %%
from itertools import pairwise

import numpy as np
import pycocotools.mask


# %%
def encode_runs(starts, ends, height: int, width: int) -> dict:
    """COCO RLE of the pixels in `[starts[k], ends[k])`.

    Args:
        starts, ends: (K,) ints, column-major offsets, ascending, not overlapping.
        height, width: image size in pixels.

    Returns:
        `{"size": [height, width], "counts": str}`.
    """
    return encode_owned_runs(np.zeros(len(starts), np.int64), starts, ends, 1, height, width)[0]


def encode_owned_runs(owners, starts, ends, count: int, height: int, width: int) -> list[dict]:
    """COCO RLEs of many masks at once.

    Args:
        owners: (K,) ints, ascending: the mask 0 .. count - 1 that each run belongs to.
        starts, ends: as in `encode_runs`, ascending within an owner.

    Returns:
        `count` RLEs; a mask without runs has an empty one.
    """
    owners, starts, ends = (np.asarray(v, np.int64) for v in (owners, starts, ends))
    # A run that ends where the next begins (bottom of one column, top of the next) is one run.
    apart = (starts[1:] != ends[:-1]) | (owners[1:] != owners[:-1])
    first, last = np.r_[True, apart][: len(starts)], np.r_[apart, True][: len(starts)]
    owners, starts, ends = owners[first], starts[first], ends[last]
    before = np.r_[0, ends[:-1]][: len(ends)]
    before[np.r_[True, owners[1:] != owners[:-1]][: len(owners)]] = 0
    counts = np.stack([starts - before, ends - starts], axis=1).ravel().tolist()
    bounds = (2 * np.searchsorted(owners, np.arange(count + 1))).tolist()
    size, plain = [int(height), int(width)], []
    for begin, end in pairwise(bounds):
        own = counts[begin:end]
        rest = height * width - sum(own)
        plain.append({"size": size, "counts": [*own, rest] if rest or not own else own})
    packed = pycocotools.mask.frPyObjects(plain, height, width) if plain else []
    return [{"size": size.copy(), "counts": rle["counts"].decode("ascii")} for rle in packed]


# %%
def decode_runs(rle: dict) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the cell pixels of a COCO RLE, as column-major offsets.

    Args:
        rle: `{"size": [H, W], "counts": str, bytes or list of ints}`.

    Returns:
        starts, ends: (K,) int64 each.

    Raises:
        ValueError: a count is negative, or they do not add up to H x W.

    Source: the counts' text form, 5 bits a character with differences to the last but one count,
    is defined by `rleToString` in pycocotools' maskApi.c.
    """
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = counts_from_text(counts.encode() if isinstance(counts, str) else counts)
    counts = np.asarray(counts, np.int64)
    bounds = np.cumsum(counts)
    pixels = rle["size"][0] * rle["size"][1]
    if (counts < 0).any() or counts.sum() != pixels:
        raise ValueError(f"RLE counts add up to {counts.sum()}, its size {rle['size']} to {pixels}")
    starts, ends = bounds[0:-1:2], bounds[1::2]
    filled = ends > starts
    return starts[filled], ends[filled]


# %%
def counts_from_text(text: bytes) -> np.ndarray:
    """The (K,) int64 counts behind COCO's compressed text; see `decode_runs`."""
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0  # bit 5 says that another character follows
    first = np.r_[True, last[:-1]][: len(codes)]
    start = np.flatnonzero(first)
    place = np.arange(len(codes)) - np.repeat(start, np.diff(np.r_[start, len(codes)]))
    values = np.add.reduceat((codes & 0x1F) << (5 * place), start) if len(start) else codes
    negative = (codes[last] & 0x10) != 0  # the sign sits in bit 4 of the last character
    values = values - (negative.astype(np.int64) << (5 * (place[last] + 1)))
    # From the fourth on, a count is stored as the difference to the one two places before.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def mask_areas(rles: list[dict]) -> np.ndarray:
    """(N,) int64, the cell pixels of N RLEs. (pycocotools fails on over 255 with NumPy 2.)"""
    parts = [pycocotools.mask.area(rles[i : i + 250]) for i in range(0, len(rles), 250)]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


# %%
def encode_crop(crop: np.ndarray, top: int, left: int, height: int, width: int) -> dict:
    """COCO RLE at image size of a mask whose pixels all lie in one crop.

    Args:
        crop: (h, w) bool, the part of the mask with its corner at row `top`, column `left`.
        height, width: image size in pixels; the crop lies inside.

    Returns:
        `{"size": [height, width], "counts": str}`; memory grows with the crop, not the image.
    """
    return encode_crops(crop[None], np.array([top]), np.array([left]), height, width)[0]


def encode_crops(crops: np.ndarray, tops, lefts, height: int, width: int) -> list[dict]:
    """COCO RLEs of N masks from crops of one size, (N, h, w) bool; see `encode_crop`.

    A crop may reach over the image's edge where it is empty.
    """
    columns = np.zeros((len(crops), crops.shape[2], crops.shape[1] + 2), np.int8)
    columns[:, :, 1:-1] = crops.transpose(0, 2, 1)
    steps = np.diff(columns, axis=2)
    # nonzero() goes mask by mask and column by column, so starts and ends come in matching order.
    owner, column, row = np.nonzero(steps == 1)
    starts = (lefts[owner] + column) * height + tops[owner] + row
    owner, column, row = np.nonzero(steps == -1)
    ends = (lefts[owner] + column) * height + tops[owner] + row
    return encode_owned_runs(owner, starts, ends, len(crops), height, width)


# %%
def encode_layers(layers: np.ndarray, count: int) -> list[dict]:
    """COCO RLEs of all instances of an instance map, in one pass a layer.

    Args:
        layers: (L, H, W) ints, pixel = instance id from 1 to `count`, 0 = background; an id lies
            in one layer only.
        count: N, the number of instances.

    Returns:
        N RLEs, that of id `i` at `i - 1`; an id without pixels has an empty RLE.
    """
    _, height, width = layers.shape
    runs = [(np.zeros(0, np.int64),) * 3]
    for layer in layers:
        pixels = layer.T.ravel()
        bounds = np.r_[0, np.flatnonzero(pixels[1:] != pixels[:-1]) + 1, pixels.size]
        ids = pixels[bounds[:-1]].astype(np.int64)
        cell = ids > 0
        runs.append((ids[cell], bounds[:-1][cell], bounds[1:][cell]))
    ids, starts, ends = (np.concatenate(part) for part in zip(*runs, strict=True))
    order = np.argsort(ids, kind="stable")
    return encode_owned_runs(ids[order] - 1, starts[order], ends[order], count, height, width)


# %%
def run_pixels(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(A,) int64, the offsets of all pixels in the runs `[starts[k], ends[k])`."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def row_major_pixels(rle: dict) -> np.ndarray:
    """(A,) int64, the row-major offsets of a COCO RLE's pixels, ascending."""
    height, width = rle["size"]
    columns, rows = np.divmod(run_pixels(*decode_runs(rle)), height)
    return np.sort(rows * width + columns)


# %%
def kaggle_text(rle: dict) -> str:
    """A COCO RLE as Kaggle's pairs of start and length, row-major, the first pixel being 1."""
    pixels = row_major_pixels(rle)
    apart = np.flatnonzero(np.diff(pixels) != 1) + 1
    starts = pixels[np.r_[0, apart]] if len(pixels) else pixels
    lengths = np.diff(np.r_[0, apart, len(pixels)])[: len(starts)]
    return " ".join(map(str, np.stack([starts + 1, lengths], axis=1).ravel().tolist()))


def pixels_of_kaggle_text(text: str, count: int) -> np.ndarray:
    """(A,) int64, the row-major pixel offsets, from 0 on, of pairs of start and length.

    Args:
        text: as from `kaggle_text`; count: pixels of the image.

    Raises:
        ValueError: not such pairs, or pixels that are outside or named twice.
    """
    try:
        numbers = np.array([int(word) for word in text.split()], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"run lengths with something that is no number ({error})") from error
    starts, lengths = numbers[0::2] - 1, numbers[1::2]
    if len(starts) != len(lengths) or (lengths < 1).any():
        raise ValueError(f"{len(numbers)} numbers; expected pairs of start and length from 1 on")
    if len(starts) and (starts.min() < 0 or max(starts.max(), lengths.max()) > count):
        raise ValueError(f"pixels outside of 1 to {count}")
    pixels = np.sort(run_pixels(starts, starts + lengths)) if lengths.sum() <= count else None
    if pixels is None or (len(pixels) and (np.diff(pixels) < 1).any()):
        raise ValueError("pixels that are named twice")
    if len(pixels) and pixels[-1] >= count:
        raise ValueError(f"pixel {pixels[-1] + 1} outside of 1 to {count}")
    return pixels


# %%
def paint(rles: list[dict], values, height: int, width: int) -> np.ndarray:
    """Draws masks into one map; where they overlap the later one shows.

    Args:
        rles: N COCO RLEs of that size.
        values: (N,) ints, what to write for each.

    Returns:
        (H, W) int32, 0 where there is no mask.
    """
    flat = np.zeros(height * width, np.int32)
    for rle, value in zip(rles, values, strict=True):
        for start, end in zip(*decode_runs(rle), strict=True):
            flat[start:end] = value
    return flat.reshape(width, height).T
