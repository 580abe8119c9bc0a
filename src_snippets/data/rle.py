"""Run-length encoding: masks as COCO RLE, encoded and decoded by runs or inside their boxes."""

# %%
# @title RLE: encode and decode masks, COCO and CSV
import numpy as np
import pycocotools.mask

from src_snippets.setup.config import require


def encode_runs(owners, starts, ends, count: int, height: int, width: int) -> list[dict]:
    """Encode runs of pixels as `count` COCO RLEs, `{"size": [height, width], "counts": str}`.

    owners: (K,) ints, the mask 0 .. count - 1 of each run; starts, ends: (K,) ints, column-major
    offsets of `[start, end)`. The runs of a mask do not overlap; any order.
    """
    owners, starts, ends = (np.asarray(v, np.int64) for v in (owners, starts, ends))
    pixels, rles = height * width, []
    owners = owners * (pixels + 1)
    keys, repeats = np.unique(np.r_[owners + starts, owners + ends], return_counts=True)
    # Nothing changes where one run ends and the next one starts, nor at the end of the image.
    keys = keys[(repeats % 2 == 1) & (keys % (pixels + 1) < pixels)]
    cuts = np.searchsorted(keys, np.arange(1, count + 1) * (pixels + 1))
    for bounds in np.split(keys % (pixels + 1), cuts)[:-1]:
        counts = np.diff(bounds, prepend=0, append=pixels).tolist()
        rle = pycocotools.mask.frPyObjects(dict(size=[height, width], counts=counts), height, width)
        rles.append(rle | {"counts": rle["counts"].decode("ascii")})
    return rles


def encode_masks(masks: np.ndarray, tops, lefts, height: int, width: int) -> list[dict]:
    """Encode masks (N, h, w) bool, corners at `tops`, `lefts`, (N,) ints; all pixels are inside."""
    tops, lefts = np.asarray(tops, np.int64), np.asarray(lefts, np.int64)
    steps = np.diff(masks.transpose(0, 2, 1), prepend=False, append=False)
    owners, x, y = np.nonzero(steps)  # down a column, start and end of a run take turns
    bounds = (lefts[owners] + x) * height + tops[owners] + y
    return encode_runs(owners[::2], bounds[::2], bounds[1::2], len(masks), height, width)


def encode_layers(layers: np.ndarray, count: int) -> list[dict]:
    """Encode instance layers (L, H, W) ints: N = `count` RLEs, that of id `i` at `i - 1`."""
    columns = layers.transpose(0, 2, 1).reshape(len(layers), -1)
    columns = np.pad(columns, ((0, 0), (1, 1)))  # so that no run goes over to the next layer
    layer, bounds = np.nonzero(np.diff(columns))
    ids = columns[layer, bounds + 1]  # from each bound to the next one
    runs = np.flatnonzero(ids)
    return encode_runs(ids[runs] - 1, bounds[runs], bounds[runs + 1], count, *layers.shape[1:])


def decode_runs(rle: dict) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends, (K,) int64 column-major offsets, of the foreground runs of a COCO RLE.

    Raises ValueError where counts do not fill H x W. Source: rleToString in COCO's maskApi.c.
    """
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):  # 5 bits a character; bit 5: another character follows
        text = counts.encode() if isinstance(counts, str) else counts
        codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
        last = np.flatnonzero((codes & 0x20) == 0)
        first = np.r_[0, last + 1][:-1]
        codes = codes[: last[-1] + 1 if len(last) else 0]
        place = 5 * (np.arange(len(codes)) - np.repeat(first, last - first + 1))
        counts = np.add.reduceat((codes & 0x1F) << place, first)
        counts -= (codes[last] >> 4 & 1) << place[last] + 5  # bit 4 of the last one is the sign
        # From the fourth on, a count is stored as the difference to the one two places before.
        counts[1::2], counts[2::2] = np.cumsum(counts[1::2]), np.cumsum(counts[2::2])
    counts, (height, width) = np.asarray(counts, np.int64), rle["size"]
    valid = (counts >= 0).all() and counts.sum() == height * width
    require(valid, f"RLE counts add up to {counts.sum()}, expected {height} x {width} pixels")
    bounds = np.cumsum(counts)
    starts, ends = bounds[0:-1:2], bounds[1::2]
    return starts[ends > starts], ends[ends > starts]


def mask_areas(rles: list[dict]) -> np.ndarray:
    """(N,) int64, the foreground pixels of N RLEs."""
    return np.array([pycocotools.mask.area(rle) for rle in rles], np.int64)


def run_pixels(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(A,) int64, the offsets of all pixels in the runs `[starts[k], ends[k])`."""
    lengths = ends - starts
    return np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())


def pixel_indices(rle: dict) -> np.ndarray:
    """(A,) int64, the row-major offsets of an RLE's pixels, ascending."""
    height, width = rle["size"]
    columns, rows = np.divmod(run_pixels(*decode_runs(rle)), height)
    return np.sort(rows * width + columns)


def crop_mask(rle: dict) -> tuple[np.ndarray, int, int]:
    """The mask (h, w) bool in its tight box, its top row and left column; at least one pixel."""
    columns, rows = np.divmod(run_pixels(*decode_runs(rle)), rle["size"][0])
    top, left = int(rows.min()), int(columns.min())
    mask = np.zeros((rows.max() - top + 1, columns.max() - left + 1), bool)
    mask[rows - top, columns - left] = True
    return mask, top, left


def draw_masks(rles: list[dict], values, height: int, width: int) -> np.ndarray:
    """Draw masks with `values` (N,) into (H, W) int32, 0 elsewhere; later ones on top."""
    flat = np.zeros(height * width, np.int32)
    for rle, value in zip(rles, values, strict=True):
        flat[run_pixels(*decode_runs(rle))] = value
    return flat.reshape(width, height).T


def rle_to_csv(rle: dict) -> str:
    """An RLE as pairs of start and length as Kaggle has them: row-major, the first pixel is 1."""
    pixels = pixel_indices(rle)
    runs = np.split(pixels, np.flatnonzero(np.diff(pixels) != 1) + 1)
    return " ".join(f"{run[0] + 1} {len(run)}" for run in runs if len(run))


def csv_to_pixels(text: str, count: int) -> np.ndarray:
    """(A,) int64, ascending row-major offsets of the pixels in text as from `rle_to_csv`.

    count: pixels of the image. Raises ValueError for other text, pixels outside or listed twice.
    """
    words = text.split()
    valid = len(words) % 2 == 0 and all(w.isdecimal() and len(w) < 19 for w in words)
    require(valid, f"{text[:40]!r}; expected pairs of start and length")
    starts, lengths = np.array(words, np.int64).reshape(-1, 2).T
    valid = (np.minimum(starts, lengths) > 0).all() and (starts + lengths <= count + 1).all()
    require(valid, f"{text[:40]!r}; expected pixels from 1 to {count}, lengths from 1 on")
    pixels = np.sort(run_pixels(starts - 1, starts + lengths - 1))
    require((np.diff(pixels) > 0).all(), "pixels that are listed twice")
    return pixels
