"""A small synthetic dataset in the layout of the real one, for when no data is attached."""

# %%
# @title Synthetic dataset: tissue and four kinds of cell
from pathlib import Path
import shutil
import uuid

import numpy as np
from PIL import Image
from scipy import ndimage
from tifffile import imwrite

from src_snippets.setup.files import write_json

SYNTHETIC_NAMES = ("epithelial-like", "lymphocyte-like", "macrophage-like", "neutrophil-like")
# By class: radius in px, depth and number of lobes of the outline, rim, inside, graininess
SYNTHETIC_CELLS = {
    1: ((10, 14), 0.10, 2, (106, 72, 140), (176, 150, 198), 10),
    2: ((5, 7), 0.04, 2, (52, 30, 98), (66, 44, 120), 5),
    3: ((12, 16), 0.07, 5, (150, 96, 96), (206, 172, 152), 26),
    4: ((7, 9), 0.30, 3, (124, 26, 86), (168, 44, 110), 8),
}
SYNTHETIC_SIZES = ((128, 128), (144, 176), (176, 144), (160, 160), (128, 192))


def place_cells(rng: np.random.Generator, height: int, width: int, count: int) -> list[tuple]:
    """Choose outlines and places: about half of the cells touch another, a few overlap one.

    Returns `(class, region, mask, depth, row, column, reach)` each: slices of the image, (h, w)
    bool, (h, w) from 0 at the centre to 1 on the outline, the centre and half the window.
    """
    covered, placed = np.zeros((height, width), bool), []
    for _ in range(40 * count):
        label = int(rng.choice(4, p=(0.3, 0.4, 0.15, 0.15))) + 1
        radii, bump, lobes, *_ = SYNTHETIC_CELLS[label]
        radius = rng.uniform(*radii)
        reach = int(np.ceil(radius * (1.2 + bump))) + 1
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
        stretch, tilt = rng.uniform(0.85, 1.15), rng.uniform(0, np.pi)
        u = (x * np.cos(tilt) + y * np.sin(tilt)) * stretch
        v = (y * np.cos(tilt) - x * np.sin(tilt)) / stretch
        lobe = np.cos(lobes * np.arctan2(v, u) + rng.uniform(0, 2 * np.pi))
        depth = np.hypot(u, v) / (radius * (1 + bump * lobe))
        row, column = rng.integers(0, height), rng.integers(0, width)
        if placed and rng.random() < 0.5:  # beside another one
            *_, other_row, other_column, other = placed[rng.integers(len(placed))]
            angle, gap = rng.uniform(0, 2 * np.pi), other + reach - 3
            row = int(other_row + gap * np.sin(angle))
            column = int(other_column + gap * np.cos(angle))
        top, bottom = np.clip([row - reach, row + reach + 1], 0, height)
        left, right = np.clip([column - reach, column + reach + 1], 0, width)
        region, shift = np.s_[top:bottom, left:right], (reach - row, reach - column)
        area = (depth <= 1).sum()
        depth = depth[top + shift[0] : bottom + shift[0], left + shift[1] : right + shift[1]]
        mask = depth <= 1
        shared = (covered[region] & mask).sum()
        # Most of it is inside the image; touching cells share a pixel or two, few overlap.
        limit = 0.15 if rng.random() < 0.2 else 0.02
        if mask.sum() >= 0.5 * area and shared <= limit * area:
            covered[region] |= mask
            placed.append((label, region, mask, depth, row, column, reach))
        if len(placed) == count:
            break
    return placed


def draw_field(rng: np.random.Generator, height: int, width: int, count: int):
    """Draw one image (H, W, 3) uint8 and `{class: (H, W) float64}`, pixel = instance id.

    Ids are unique over the classes, as in the real files; a class without cells is absent.
    """
    fibres = ndimage.gaussian_filter(rng.normal(size=(height, width)), (1.2, 5.0))[..., None] * 2.2
    gaps = ndimage.gaussian_filter(rng.normal(size=(height, width)), 14.0)[..., None] * 14.0
    pale = 1 / (1 + np.exp(-3 * (gaps - 0.4)))
    pink = np.array([222, 158, 190]) + fibres * np.array([26, 34, 22])
    image = (pink * (1 - pale) + np.array([241, 232, 240]) * pale).astype(np.float32)
    image, maps = image * rng.uniform(0.88, 1.04, 3), {}  # stains differ
    placed = sorted(place_cells(rng, height, width, count), key=lambda cell: cell[0])
    for number, (label, region, mask, depth, *_) in enumerate(placed, start=1):
        _, _, _, rim, fill, grain = SYNTHETIC_CELLS[label]
        edge = np.clip((depth - 0.65) / 0.3, 0, 1)[..., None]
        colour = np.array(fill) * (1 - edge) + np.array(rim) * edge
        texture = ndimage.gaussian_filter(rng.normal(size=depth.shape), 0.8) * 2.5 * grain
        colour = colour + texture[..., None] + rng.normal(0, 5, 3)
        soft = np.clip((1.04 - depth) / 0.16, 0, 1)[..., None] * 0.95
        image[region][mask] = (image[region] * (1 - soft) + colour * soft)[mask]
        maps.setdefault(label, np.zeros((height, width)))[region][mask] = number
    image = ndimage.gaussian_filter(image, (0.6, 0.6, 0)) + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), maps


def save_rgba(image: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 as an RGBA TIFF with LZW compression, as the real images are."""
    Image.fromarray(image).convert("RGBA").save(path, compression="tiff_lzw")


def make_synthetic(root: Path, train: int = 40, test: int = 8, seed: int = 7) -> Path:
    """Draw `train/`, `test_release/` and the mapping below `root`, unless they are complete.

    The first training image has no cells. The same seed draws the same files. Returns `root`.
    """
    mapping, rng, entries = root / "test_image_name_to_ids.json", np.random.default_rng(seed), []
    if mapping.is_file():  # written last
        return root
    shutil.rmtree(root, ignore_errors=True)
    (root / "test_release").mkdir(parents=True)
    for index in range(train + test):
        height, width = SYNTHETIC_SIZES[index % len(SYNTHETIC_SIZES)]
        image, maps = draw_field(rng, height, width, int(rng.integers(10, 30)) if index else 0)
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if index < train:
            folder = root / "train" / name
            folder.mkdir(parents=True)
            save_rgba(image, folder / "image.tif")
            for label, ids in maps.items():
                imwrite(folder / f"class{label}.tif", ids)
        else:
            save_rgba(image, root / "test_release" / f"{name}.tif")
            size = dict(height=height, width=width)
            entries.append(dict(file_name=f"{name}.tif", id=len(entries) + 1) | size)
    write_json(entries, mapping)
    return root
