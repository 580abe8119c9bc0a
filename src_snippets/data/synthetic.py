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
# By class: radius in px, number and depth of lobes of the outline, rim, inside, graininess
SYNTHETIC_CELLS = {
    1: ((10, 14), 2, 0.15, (106, 72, 140), (176, 150, 198), 10),
    2: ((5, 7), 2, 0.10, (52, 30, 98), (66, 44, 120), 5),
    3: ((12, 16), 5, 0.07, (150, 96, 96), (206, 172, 152), 26),
    4: ((7, 9), 3, 0.30, (124, 26, 86), (168, 44, 110), 8),
}
SYNTHETIC_SIZES = ((128, 128), (144, 176), (176, 144), (160, 160), (128, 192))
REACH = 20  # px, more than any radius


def blurred_noise(rng: np.random.Generator, size: tuple[int, int], sigma) -> np.ndarray:
    """Draw noise (H, W, 1) around 0, blurred by `sigma` pixels."""
    return ndimage.gaussian_filter(rng.normal(size=size), sigma)[..., None]


def draw_field(rng: np.random.Generator, height: int, width: int, count: int):
    """Draw one image (H, W, 3) uint8 and `{class: (H, W) float64}` of ids, unique over classes."""
    size = height + 2 * REACH, width + 2 * REACH  # with a margin, cut off in the end
    pale = 1 / (1 + np.exp(1.2 - 42 * blurred_noise(rng, size, 14.0)))  # gaps in the tissue
    fibres = blurred_noise(rng, size, (1.2, 5.0)) * (57, 75, 48)
    image = pale * (241, 232, 240) + (1 - pale) * (fibres + np.array([222, 158, 190]))
    image, maps, placed = image * rng.uniform(0.88, 1.04, 3), {}, []  # stains differ
    covered, (y, x) = np.zeros(size, bool), np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]
    for _ in range(40 * count):
        label = int(rng.choice(4, p=(0.3, 0.4, 0.15, 0.15))) + 1
        radii, lobes, bump, rim, inside, grain = SYNTHETIC_CELLS[label]
        radius, (row, column) = rng.uniform(*radii), rng.integers((height, width))
        if placed and rng.random() < 0.5:  # beside another one
            other_row, other_column, other_radius = placed[rng.integers(len(placed))]
            angle, gap = rng.uniform(0, 2 * np.pi), other_radius + radius + 2
            row = int(np.clip(other_row + gap * np.sin(angle), 0, height - 1))
            column = int(np.clip(other_column + gap * np.cos(angle), 0, width - 1))
        lobe = np.cos(lobes * np.arctan2(y, x) + rng.uniform(0, 2 * np.pi))
        depth = np.hypot(y, x) / (radius * (1 + bump * lobe))  # 0 at the centre, 1 on the outline
        mask, window = depth <= 1, np.s_[row : row + len(y), column : column + len(x)]
        if covered[window][mask].mean() > (0.15 if rng.random() < 0.2 else 0.02):
            continue
        placed.append((row, column, radius))
        covered[window] |= mask
        maps.setdefault(label, np.zeros(size))[window][mask] = len(placed)
        edge = np.clip((depth - 0.65) / 0.3, 0, 1)[..., None]
        colour = np.array(rim) * edge + np.array(inside) * (1 - edge) + rng.normal(0, 5, 3)
        colour = colour + blurred_noise(rng, y.shape, 0.8) * 2.5 * grain
        soft = np.clip((1.04 - depth) / 0.16, 0, 0.95)[..., None] * mask[..., None]
        image[window] += (colour - image[window]) * soft
        if len(placed) == count:
            break
    inner = np.s_[REACH:-REACH, REACH:-REACH]
    image = ndimage.gaussian_filter(image, (0.6, 0.6, 0)) + rng.normal(0, 3, image.shape)
    image = np.clip(image[inner], 0, 255).astype(np.uint8)
    return image, {label: ids[inner] for label, ids in maps.items()}


def make_synthetic(root: Path, train: int = 40, test: int = 8, seed: int = 7) -> Path:
    """Draw `train/` (first image: no cells), `test_release/` and mapping, unless they exist."""
    mapping, rng, entries = root / "test_image_name_to_ids.json", np.random.default_rng(seed), []
    if mapping.is_file():  # written last
        return root
    shutil.rmtree(root, ignore_errors=True)
    for index in range(train + test):
        height, width = SYNTHETIC_SIZES[index % len(SYNTHETIC_SIZES)]
        image, maps = draw_field(rng, height, width, int(rng.integers(10, 30)) if index else 0)
        name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        path = root / (f"train/{name}/image.tif" if index < train else f"test_release/{name}.tif")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGBA").save(path, compression="tiff_lzw")  # as real ones
        if index < train:
            for label, ids in maps.items():
                imwrite(path.with_name(f"class{label}.tif"), ids)
        else:
            row = dict(file_name=path.name, id=len(entries) + 1, height=height, width=width)
            entries.append(row)
    write_json(entries, mapping)
    return root
