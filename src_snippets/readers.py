"""Readers: HW3 folders on disk -> `CellSample`s, the test mapping, the split."""

# %% [markdown]
# ## What lies on disk?
# `train/<name>/image.tif` with `class1.tif .. class4.tif` beside it (pixel = instance id; an absent
# class has no file), test images in `test_release/`, and a mapping from their names to ids. What
# cannot be read is refused with the file's name and the cause; nothing is guessed.

# %%
from collections.abc import Sequence
from contextlib import contextmanager
import hashlib
import json
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from PIL import Image
import tifffile
import torch
from tqdm.auto import tqdm

from src_snippets.forms import CellSample, pack_layers
from src_snippets.places import MAPPING_NAME, written_whole


# %%
class BadInput(ValueError):
    """A file or folder is not what it should be; the message names it and says what to do."""


@contextmanager
def opened_tiff(path: Path):
    """Yields the first page of a TIFF that holds one whole picture.

    Raises:
        BadInput: not a TIFF, cut short, several pictures, or any error of the decoder in the block.
    """
    try:
        with tifffile.TiffFile(path) as tif:
            page, series = tif.pages[0], tif.series[0]
            one = math.prod(series.shape) == math.prod(page.shape)  # axes of length 1 are fine
            if page.axes not in ("YX", "YXS", "SYX") or not one:
                raise BadInput(
                    f"{path}: axes {series.axes}, shape {series.shape}; expected one picture. "
                    "Save a single plane or projection."
                )
            pieces = zip(page.dataoffsets, page.databytecounts, strict=False)
            needed, size = max(start + count for start, count in pieces), path.stat().st_size
            if needed > size:
                raise BadInput(f"{path}: cut short, {size} of {needed} bytes. Copy it again.")
            yield page
    except (BadInput, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise many types; each one means a bad file
        raise BadInput(
            f"{path}: cannot be read as TIFF ({error}). Copy or export it again."
        ) from error


# %%
class Pixels(NamedTuple):
    """A decoded picture: (H, W) or (H, W, S) in the file's dtype, and what the file says of it."""

    values: np.ndarray
    photometric: str  # RGB, MINISBLACK, PALETTE, ..
    palette: np.ndarray | None  # (3, K) uint16
    alpha: bool  # the last channel is marked as alpha
    lossy: bool  # JPEG and its kind: values are not exactly those that were saved


def read_pixels(path: Path) -> Pixels:
    """Decodes the picture of a TIFF, with tifffile or, where imagecodecs is missing, with Pillow.

    Raises:
        BadInput: as `opened_tiff`, or a codec that neither library has.
    """
    with opened_tiff(path) as page:
        try:
            values = page.asarray()
        except (ValueError, ImportError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            values = read_with_pillow(path, page, error)
        else:
            values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
        alpha = tuple(page.extrasamples)[-1:] in ((1,), (2,))
        lossy = "JPEG" in page.compression.name or page.compression.name == "WEBP"
        palette = getattr(page, "colormap", None)
        return Pixels(values, page.photometric.name, palette, alpha, lossy)


# %%
def read_with_pillow(path: Path, page: tifffile.TiffPage, cause: Exception) -> np.ndarray:
    """Decodes a TIFF with Pillow; refuses where Pillow would change the values."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except OSError as error:
        raise BadInput(f"{path}: {cause}; Pillow says: {error}. Install imagecodecs.") from error
    channels = 1 if values.ndim == 2 else values.shape[2]
    same = values.dtype == page.dtype and channels == page.samplesperpixel
    if not same or page.photometric.name not in ("RGB", "MINISBLACK", "PALETTE", "YCBCR"):
        raise BadInput(f"{path}: {cause}; Pillow reads it as {image.mode}. Install imagecodecs.")
    return values


# %%
def to_uint8(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Brings pixel values to 0..255.

    uint8 stays. Larger integers lose their low bits: the range is the least power of two, from 256
    on, that holds the image's maximum, so a 12-bit image in a 16-bit file keeps its brightness.
    Floats up to 1 are multiplied by 255, floats up to 255 are rounded.

    Raises:
        BadInput: NaN, infinite or negative values, floats over 255, or another dtype.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "uif":
        raise BadInput(f"{path}: pixels of type {pixels.dtype}; expected integers or floats.")
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadInput(f"{path}: NaN or infinite pixels; expected finite ones. Export it again.")
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    if low < 0 or (pixels.dtype.kind == "f" and high > 255):
        raise BadInput(
            f"{path}: values from {low} to {high}; expected 0..1 or 0..255 in a float "
            "image. Save it as uint8 or uint16."
        )
    if pixels.dtype.kind == "f":
        return np.round(pixels * (255 if high <= 1 else 1)).astype(np.uint8)
    return (pixels >> max(int(high).bit_length() - 8, 0)).astype(np.uint8)


# %%
def read_image(path: Path) -> np.ndarray:
    """Reads an image as RGB.

    RGB, RGBA (alpha is dropped), grey, palette, JPEG-in-TIFF; uint8, uint16, float: see `to_uint8`.

    Returns:
        (3, H, W) uint8, contiguous.

    Raises:
        BadInput: as `read_pixels` and `to_uint8`, or a colour model other than these.
    """
    pixels, photometric, palette, alpha, _ = read_pixels(path)
    if photometric == "PALETTE" and palette is not None and pixels.ndim == 2:
        pixels, photometric = np.moveaxis(palette[:, pixels] >> 8, 0, 2).astype(np.uint8), "RGB"
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    channels = pixels.shape[2]
    if photometric in ("RGB", "YCBCR") and channels in (3, 4):
        pixels = pixels[:, :, :3]
    elif photometric in ("MINISBLACK", "MINISWHITE") and channels == 1 + alpha:
        pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
    else:
        raise BadInput(
            f"{path}: colour model {photometric} with {channels} channels; expected RGB or grey, "
            "with or without alpha. Export it as RGB."
        )
    pixels = to_uint8(pixels, path)
    if photometric == "MINISWHITE":
        pixels = 255 - pixels
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


# %%
def read_instance_map(path: Path) -> np.ndarray:
    """Reads a `classK.tif`.

    Returns:
        (H, W) int64 or smaller, pixel = instance id, 0 = background.

    Raises:
        BadInput: as `read_pixels`; more than one channel; fractional, negative, not finite ids.
    """
    pixels, _, _, _, lossy = read_pixels(path)
    if lossy:
        raise BadInput(f"{path}: JPEG or its kind, which changes ids. Save it without loss.")
    if pixels.ndim != 2:
        raise BadInput(f"{path}: shape {pixels.shape}; expected (H, W), one instance id a pixel.")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    if pixels.dtype.kind not in "uif":
        raise BadInput(f"{path}: pixels of type {pixels.dtype}; expected whole numbers.")
    ids = pixels
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise BadInput(f"{path}: NaN or infinite ids; expected whole numbers from 0 on.")
        with np.errstate(invalid="ignore"):
            ids = pixels.astype(np.int64)
        if not np.array_equal(ids, pixels):
            wrong = pixels[ids != pixels].flat[0]
            raise BadInput(f"{path}: id {wrong}; expected whole numbers from 0 on, below 2^53.")
    if ids.size and ids.min() < 0:
        raise BadInput(f"{path}: id {ids.min()}; expected whole numbers from 0 on.")
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise BadInput(f"{path}: id {ids.max()}; expected whole numbers below 2^63.")
    return ids.astype(np.int64, copy=False) if ids.dtype.kind == "u" else ids


# %%
def class_files(folder: Path, num_classes: int) -> dict[int, Path]:
    """The class files of a training folder by class, ascending.

    Raises:
        BadInput: a TIFF, or a file named class.., that is not class1.tif .. classC.tif.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        picture = name.startswith("class") or name.endswith((".tif", ".tiff"))
        if not picture or name.startswith(".") or path.name == "image.tif":
            continue
        match = re.fullmatch(r"class([1-9]\d*)\.tif", path.name)
        if match is None or int(match[1]) > num_classes:
            raise BadInput(
                f"{path}: not a known class; expected class1.tif .. class{num_classes}.tif. "
                "Rename or remove it, or raise num_classes in the settings."
            )
        found[int(match[1])] = path
    return dict(sorted(found.items()))


# %%
def read_cell_folder(folder: Path, num_classes: int) -> CellSample:
    """Reads one training folder.

    Returns:
        A `CellSample` named after the folder. Ids may restart in each class file or not, need not
        be contiguous, and classes may overlap: the reader numbers the instances anew.

    Raises:
        BadInput: a file is missing, unknown or broken, or sizes differ.
    """
    folder = Path(folder)
    if not (folder / "image.tif").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise BadInput(
            f"{folder}: no image.tif, but {there}; expected one in each training folder. Rename "
            "the image, or remove the folder."
        )
    image = read_image(folder / "image.tif")
    size = image.shape[1:]
    maps = {}
    for label, path in class_files(folder, num_classes).items():
        maps[label] = read_instance_map(path)
        if maps[label].shape != size:
            raise BadInput(
                f"{path}: {maps[label].shape} (H, W), but image.tif beside it is {size}; "
                "expected the same size."
            )
    layers, labels = pack_layers(list(maps.values()), list(maps), size)
    return CellSample(torch.from_numpy(image), layers, labels, folder.name)


# %% [markdown]
# Every training folder is read once before training, so that a bad file shows in the first minute
# and not in the third epoch. What fits the memory budget stays decoded.


# %%
class CellFolders(Sequence):
    """Training folders as a sequence of `CellSample`s, decoded fields kept up to a budget.

    Args:
        folders: training folders.
        num_classes: C.
        cache_gb: 1e9 bytes of decoded fields that stay in memory; the rest is read on demand.

    Raises:
        BadInput: on construction, which reads every folder: the first bad one, or no cells at all.
    """

    def __init__(self, folders: Sequence[Path], num_classes: int, cache_gb: float):
        self.folders = [Path(folder) for folder in folders]
        self.num_classes = num_classes
        self.counts = np.zeros((len(folders), num_classes + 1), np.int64)
        self._kept, left, digest = {}, cache_gb * 1e9, hashlib.sha256()
        for index, folder in enumerate(tqdm(self.folders, desc="reading", unit="image")):
            sample = read_cell_folder(folder, num_classes)
            self.counts[index] = np.bincount(sample.labels, minlength=num_classes + 1)
            for part in (sample.image, sample.layers, sample.labels):
                digest.update(part.numpy().tobytes())
            left -= sample.image.nbytes + sample.layers.nbytes
            if left >= 0:
                self._kept[index] = sample
        self.digest = digest.hexdigest()  # changes with any pixel, id or class
        if not self.counts.any():
            raise BadInput(f"{self.folders[0].parent}: no cells in any folder; expected some.")

    def __len__(self):
        return len(self.folders)

    def __getitem__(self, index: int) -> CellSample:
        if index not in self._kept:
            return read_cell_folder(self.folders[index], self.num_classes)
        return self._kept[index]


# %%
def training_folders(root: Path) -> list[Path]:
    """The folders in `train/`, by name.

    Raises:
        BadInput: there are none.
    """
    folders = sorted(p for p in (root / "train").iterdir() if p.is_dir() and p.name[0] != ".")
    if not folders:
        raise BadInput(f"{root / 'train'}: no folders; expected one a training image.")
    return folders


# %%
class ImageRecord(NamedTuple):
    """A line of the test mapping: where the image lies, its id and its size in pixels."""

    path: Path
    image_id: int
    height: int
    width: int


def read_test_mapping(root: Path) -> list[ImageRecord]:
    """Reads `test_image_name_to_ids.json` and checks it against the files in `test_release/`.

    Raises:
        BadInput: not such a mapping; duplicated ids or names; a name that leaves the folder; an
            image that is missing or whose size is not the stated one.
    """
    path, folder = root / MAPPING_NAME, root / "test_release"
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = [(e["file_name"], e["id"], e["height"], e["width"]) for e in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(
            f"{path}: {type(error).__name__}: {error}; expected a JSON list of objects with "
            "file_name, id, height and width."
        ) from error
    if not rows:
        raise BadInput(f"{path}: lists no images; expected at least one.")
    for name, *numbers in rows:
        if not isinstance(name, str) or any(type(n) is not int for n in numbers):
            raise BadInput(f"{path}: entry {name!r}, {numbers}; expected a name and whole numbers.")
        if not name or Path(name).name != name or "\\" in name or name == "..":
            raise BadInput(f"{path}: file name {name!r}; expected a plain name without folders.")
    for what, values in (("id", [r[1] for r in rows]), ("file_name", [r[0] for r in rows])):
        if twice := sorted({v for v in values if values.count(v) > 1}):
            raise BadInput(f"{path}: {what} {twice[0]!r} occurs twice; expected each once.")
    images = [ImageRecord(folder / name, *numbers) for name, *numbers in rows]
    for image in images:
        check_test_image(image, path)
    return images


# %%
def check_test_image(image: ImageRecord, mapping: Path) -> None:
    """Raises BadInput where a test image is missing, cannot be read or has another size."""
    if not image.path.is_file():
        raise BadInput(
            f"{image.path}: is not there, but {mapping} lists it as {image.image_id}. Add it or "
            "correct the name."
        )
    size = read_image(image.path).shape[1:]
    if size != (image.height, image.width):
        raise BadInput(
            f"{image.path}: {size} (H, W), but {mapping} says {(image.height, image.width)}. "
            "Correct the one that is wrong."
        )


# %%
def split_images(names: Sequence[str], val_fraction: float, seed: int) -> dict[str, list[str]]:
    """Splits images, not cells, into a training and a validation part.

    Args:
        names: unique image names; their order does not matter.
        val_fraction: share for validation, rounded; at least one image where it is over 0, and
            at least one image is left for training.
        seed: the same seed and names give the same parts.

    Returns:
        `{"train": [...], "val": [...]}`, each sorted.
    """
    order = np.random.default_rng(seed).permutation(sorted(names)).tolist()
    wanted = max(round(len(order) * val_fraction), 1) if val_fraction > 0 else 0
    count = min(wanted, len(order) - 1)
    return {"train": sorted(order[count:]), "val": sorted(order[:count])}


def write_json(content, path: Path) -> None:
    """Writes JSON, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content))
