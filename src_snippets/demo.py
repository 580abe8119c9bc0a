"""Draws a small dataset in the real folder layout: the embedded default."""

# %% [markdown]
# ## No data at hand?
# Then a small dataset is drawn: pink tissue with four kinds of cell that differ in size, colour and
# texture, touch and sometimes overlap. It lies on disk just as the real one does.

# %%
import json
from pathlib import Path
import shutil
import uuid

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
import tifffile

from src_snippets.places import MAPPING_NAME, written_whole

# %%
# Radius in pixels, how far the outline departs from a circle and with how many lobes, colours of
# rim and inside, and how grainy the inside is.
DEMO_CELLS = {
    1: dict(
        radius=(10, 14), bump=0.10, lobes=2, rim=(106, 72, 140), fill=(176, 150, 198), grain=10
    ),
    2: dict(radius=(5, 7), bump=0.04, lobes=2, rim=(52, 30, 98), fill=(66, 44, 120), grain=5),
    3: dict(radius=(12, 16), bump=0.07, lobes=5, rim=(150, 96, 96), fill=(206, 172, 152), grain=26),
    4: dict(radius=(7, 9), bump=0.30, lobes=3, rim=(124, 26, 86), fill=(168, 44, 110), grain=8),
}
DEMO_SIZES = ((128, 128), (144, 176), (176, 144), (160, 160), (128, 192))


def draw_tissue(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pink fibres with pale gaps: (H, W, 3) float32, 0..255."""
    fibres = gaussian_filter(rng.normal(size=(height, width)), (1.2, 5.0)) * 2.2
    gaps = gaussian_filter(rng.normal(size=(height, width)), 14.0) * 14.0
    pale = 1 / (1 + np.exp(-3 * (gaps - 0.4)))[..., None]
    pink = np.array([222, 158, 190]) + fibres[..., None] * np.array([26, 34, 22])
    return (pink * (1 - pale) + np.array([241, 232, 240]) * pale).astype(np.float32)


# %%
def cell_shape(rng: np.random.Generator, kind: dict) -> tuple[np.ndarray, np.ndarray]:
    """A star-shaped outline around the middle of a window.

    Returns:
        mask (S, S) bool and depth (S, S) float32: 0 at the middle, 1 on the outline.
    """
    radius = rng.uniform(*kind["radius"])
    reach = int(np.ceil(radius * (1.2 + kind["bump"]))) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    stretch, tilt = rng.uniform(0.85, 1.15), rng.uniform(0, np.pi)
    u = (x * np.cos(tilt) + y * np.sin(tilt)) * stretch
    v = (y * np.cos(tilt) - x * np.sin(tilt)) / stretch
    bump = 1 + kind["bump"] * np.cos(kind["lobes"] * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
    depth = np.hypot(u, v) / (radius * bump)
    return depth <= 1, depth


def paint_cell(rng: np.random.Generator, window: np.ndarray, mask, depth, kind: dict) -> None:
    """Paints one cell into `window`, (S, S, 3) float32, in place: fill, grain, darker rim."""
    rim = np.clip((depth - 0.65) / 0.3, 0, 1)[..., None]
    colour = np.array(kind["fill"]) * (1 - rim) + np.array(kind["rim"]) * rim
    grain = gaussian_filter(rng.normal(size=depth.shape), 0.8) * 2.5 * kind["grain"]
    colour = colour + grain[..., None] + rng.normal(0, 5, 3)
    soft = np.clip((1.04 - depth) / 0.16, 0, 1)[..., None] * 0.95
    window[mask] = (window * (1 - soft) + colour * soft)[mask]


# %%
def place_cells(rng: np.random.Generator, height: int, width: int, count: int) -> list[tuple]:
    """Chooses cells and places: about half of them touch another, a few overlap one.

    Returns:
        `(class, mask, depth, row, column)` each, row and column of the window's corner, which may
        lie outside the field.
    """
    covered = np.zeros((height, width), bool)
    placed = []
    for _ in range(40 * count):
        if len(placed) == count:
            break
        label = int(rng.choice(list(DEMO_CELLS), p=(0.3, 0.4, 0.15, 0.15)))
        mask, depth = cell_shape(rng, DEMO_CELLS[label])
        reach = mask.shape[0] // 2
        row, column = rng.integers(0, height), rng.integers(0, width)
        if placed and rng.random() < 0.5:  # beside a cell that is there
            _, other, _, top, left = placed[rng.integers(len(placed))]
            angle, gap = rng.uniform(0, 2 * np.pi), other.shape[0] // 2 + reach - 3
            row = int(top + other.shape[0] // 2 + gap * np.sin(angle))
            column = int(left + other.shape[1] // 2 + gap * np.cos(angle))
        inside, window = clip_window(row - reach, column - reach, mask.shape[0], height, width)
        seen = mask[window]
        shared = (covered[inside] & seen).sum()
        # Most of the cell is in view; touching may share a pixel or two, overlaps are now and then.
        most = 0.15 if rng.random() < 0.2 else 0.02
        if seen.sum() < 0.5 * mask.sum() or shared > most * mask.sum():
            continue
        covered[inside] |= seen
        placed.append((label, mask, depth, row - reach, column - reach))
    return placed


def clip_window(row: int, column: int, side: int, height: int, width: int):
    """Slices of a square window in the field, and of what is in view in the window."""
    top, left = max(row, 0), max(column, 0)
    bottom, right = max(min(row + side, height), top), max(min(column + side, width), left)
    inside = (slice(top, bottom), slice(left, right))
    return inside, (slice(top - row, bottom - row), slice(left - column, right - column))


# %%
def draw_field(rng: np.random.Generator, height: int, width: int, count: int):
    """Draws one field.

    Returns:
        image (H, W, 3) uint8 and maps: `{class: (H, W) float64}`, pixel = id, the ids unique over
        the classes as in the real files; a class without cells is absent.
    """
    image = draw_tissue(rng, height, width) * rng.uniform(0.88, 1.04, 3)  # stains differ
    maps = {}
    placed = sorted(place_cells(rng, height, width, count), key=lambda cell: cell[0])
    for number, (label, mask, depth, row, column) in enumerate(placed, start=1):
        inside, window = clip_window(row, column, mask.shape[0], height, width)
        mask, depth = mask[window], depth[window]
        paint_cell(rng, image[inside], mask, depth, DEMO_CELLS[label])
        maps.setdefault(label, np.zeros((height, width)))[inside][mask] = number
    image = gaussian_filter(image, (0.6, 0.6, 0)) + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), maps


def save_lzw(image: np.ndarray, path: Path) -> None:
    """Writes (H, W, 3) uint8 as an RGBA TIFF with LZW, as the real images are."""
    opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
    Image.fromarray(np.concatenate([image, opaque], axis=2)).save(path, compression="tiff_lzw")


# %%
def make_demo(root: Path, train: int = 40, test: int = 8, seed: int = 7) -> Path:
    """Draws the demo dataset, unless it is there already.

    Args:
        root: where `train/`, `test_release/` and the mapping go; replaced if it is incomplete.
        train, test: number of fields; the first training field has no cells.
        seed: the same seed draws the same files.

    Returns:
        `root`.
    """
    if (root / MAPPING_NAME).is_file():  # written last
        return root
    shutil.rmtree(root, ignore_errors=True)
    (root / "test_release").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    entries = []
    for index in range(train + test):
        height, width = DEMO_SIZES[index % len(DEMO_SIZES)]
        count = 0 if index == 0 else int(rng.integers(10, 30))
        image, maps = draw_field(rng, height, width, count)
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if index < train:
            (root / "train" / name).mkdir(parents=True)
            save_lzw(image, root / "train" / name / "image.tif")
            for label, ids in maps.items():
                tifffile.imwrite(root / "train" / name / f"class{label}.tif", ids)
        else:
            save_lzw(image, root / "test_release" / f"{name}.tif")
            entry = dict(file_name=f"{name}.tif", id=index - train + 1, height=height, width=width)
            entries.append(entry)
    with written_whole(root / MAPPING_NAME) as partial:
        partial.write_text(json.dumps(entries))
    return root
