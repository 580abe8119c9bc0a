"""Readers: pictures and instance maps on disk -> arrays, a training folder -> a `CellSample`."""

# %% [markdown]
# ## How is a picture read?
# Microscopes and their programs write many kinds of files. What can be read without a guess becomes
# RGB of 8 bits; all else is refused with the file's name and the cause.

# %%
from contextlib import contextmanager
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from PIL import Image
import scipy.ndimage
import tifffile
import torch

from src_snippets.forms import CellSample, pack_parts


# %%
class BadInput(ValueError):
    """A file or folder is not what it should be; the message names it and says what to do."""


MOST_PIECES, LEAST_PIECE = 3, 10  # of a cell in a class file; pieces of fewer px are slivers
MOST_VALUES = 10**9  # of a picture, all channels: RGB of 18,000 x 18,000 px


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
            if math.prod(page.shape) > MOST_VALUES:
                raise BadInput(
                    f"{path}: shape {page.shape}; expected at most {MOST_VALUES:,} values. Cut it "
                    "into fields."
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
    """Decodes a picture: TIFF with tifffile, or with Pillow where imagecodecs is missing; PNG, JPEG
    and others with Pillow.

    Raises:
        BadInput: as `opened_tiff`, or a codec that neither library has.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        return read_other(path)
    with opened_tiff(path) as page:
        try:
            values = page.asarray()
        except (ValueError, ImportError) as error:
            if isinstance(error, ValueError) and "imagecodecs" not in str(error):
                raise
            values = read_with_pillow(path, page, error)
        else:
            values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
        if values.ndim not in (2, 3):
            raise BadInput(
                f"{path}: pixels of shape {values.shape}; expected rows and columns of one "
                "picture. Copy or export it again."
            )
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
def read_other(path: Path) -> Pixels:
    """Decodes a picture that is no TIFF with Pillow.

    Raises:
        BadInput: Pillow cannot, or it is an animation.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise BadInput(f"{path}: {image.n_frames} pictures; expected one. Save one.")
            plain = image.mode in ("1", "L", "LA", "RGB", "RGBA") or image.mode.startswith("I")
            values = np.asarray(image if plain else image.convert("RGB"))
            lossy = image.format in ("JPEG", "WEBP")
    except (BadInput, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise many types; each one means a bad file
        raise BadInput(f"{path}: cannot be read ({error}). Copy or export it again.") from error
    channels = 1 if values.ndim == 2 else values.shape[2]
    kind = "RGB" if channels > 2 else "MINISBLACK"
    return Pixels(values, kind, None, channels in (2, 4), lossy)


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
class InstanceMap(NamedTuple):
    """A class file without its background: most pixels are that."""

    places: np.ndarray  # (K,) int64, row-major offsets of the pixels of cells
    ids: np.ndarray  # (K,) ints from 1 on
    size: tuple[int, int]  # H, W


def read_instance_map(path: Path) -> InstanceMap:
    """Reads a `classK.tif`.

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
    places = np.flatnonzero(pixels != 0)  # NaN is one of them
    found, size = pixels.ravel()[places], pixels.shape
    del pixels  # the largest of what is held here
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise BadInput(f"{path}: NaN or infinite ids; expected whole numbers from 0 on.")
    low, high = found.min(initial=0), found.max(initial=0)
    if low < 0:
        raise BadInput(f"{path}: id {low}; expected whole numbers from 0 on.")
    if high >= 2**63:
        raise BadInput(f"{path}: id {high}; expected whole numbers from 0 on, below 2^63.")
    ids = found.astype(np.int32 if high < 2**31 else np.int64)
    if (ids != found).any():
        wrong = found[ids != found][0]
        raise BadInput(f"{path}: id {wrong}; expected whole numbers from 0 on.")
    return InstanceMap(places, ids, size)


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
                "Rename or remove it, or set class_names to the names of all classes."
            )
        found[int(match[1])] = path
    return dict(sorted(found.items()))


# %%
def read_cell_folder(folder: Path, num_classes: int, overlaps: bool = True) -> CellSample:
    """Reads one training folder.

    Args:
        overlaps: False: a pixel that two classes claim belongs to the first alone.

    Returns:
        A `CellSample`. Ids may restart in each class file or not, need not
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
    files = class_files(folder, num_classes)
    parts = (read_class(path, size, label) for label, path in files.items())
    layers, labels = pack_parts(parts, size, overlaps)  # one class file in memory at a time
    return CellSample(torch.from_numpy(image), layers, labels, f"{folder.name}/image.tif")


# %%
def check_instances(path: Path, found: InstanceMap) -> None:
    """Raises BadInput where all cells have one id, as in a mask of cells and background."""
    places, ids, size = found
    if not len(ids) or (ids != ids[0]).any():
        return
    drawn = np.zeros(size, bool)
    drawn.ravel()[places] = True
    sizes = np.bincount(scipy.ndimage.label(drawn)[0].ravel())[1:]
    if (pieces := int((sizes >= LEAST_PIECE).sum())) > MOST_PIECES:
        raise BadInput(
            f"{path}: one id, {ids[0]}, in {pieces} pieces: a mask of cells and background? "
            "Expected an id a cell. Label the pieces first, as Fiji's Analyze Particles (count "
            "masks) does."
        )


# %%
def read_class(path: Path, size: tuple[int, int], label: int) -> tuple:
    """A part for `pack_parts`; BadInput where its size is not that of the image beside it."""
    found = read_instance_map(path)
    check_instances(path, found)
    places, ids, own = found
    if own != size:
        raise BadInput(
            f"{path}: {own} (H, W), but image.tif beside it is {size}; expected the same size."
        )
    return places, ids, label
