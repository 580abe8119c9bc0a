"""Images and instance maps from files; one training folder as a `CellSample`."""

# %%
# @title Read images and instance maps: tifffile first, else Pillow
from collections import namedtuple
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
import re

import numpy as np
from PIL import Image
from scipy import ndimage
from tifffile import TiffFile
import torch

from src_snippets.data.structures import CellSample, pack_layers
from src_snippets.setup.files import BadInput

MAX_VALUES = 10**9  # of an image, all channels: RGB of 18,000 x 18,000 px


@contextmanager
def name_file(path: Path):
    """Turn any error in the block into a BadInput that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:  # decoders raise many types; each one means a bad file
        raise BadInput(f"{path}: cannot be read ({error}). Copy or export it again.") from error


def require(condition, message: str) -> None:
    """Raise BadInput where a condition does not hold; `name_file` around it adds the file."""
    if not condition:
        raise BadInput(message)


def decode(path: Path) -> tuple:
    """Read the one image in a file.

    Returns:
        values (H, W) or (H, W, S) in the file's dtype, photometric ("RGB", "PALETTE", ..), palette
        (3, K) uint16 or None, whether the last channel is alpha, whether compression is lossy.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        with Image.open(path) as image:
            require(getattr(image, "n_frames", 1) == 1, "several images; expected one.")
            plain = image.mode in ("1", "L", "LA", "RGB", "RGBA") or image.mode[0] == "I"
            values = np.asarray(image if plain else image.convert("RGB"))
            kind = "RGB" if values.shape[2:] in ((3,), (4,)) else "MINISBLACK"
            return values, kind, None, image.mode[-1] == "A", image.format in ("JPEG", "WEBP")
    with TiffFile(path) as tif:
        page, series, size = tif.pages[0], tif.series[0], path.stat().st_size
        single = page.axes in ("YX", "YXS", "SYX") and prod(series.shape) == prod(page.shape)
        found = f"axes {series.axes}, shape {series.shape}; expected"
        require(single, f"{found} one image. Save a single plane or projection.")
        require(prod(page.shape) <= MAX_VALUES, f"{found} at most {MAX_VALUES:,} values.")
        needed = max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=False)))
        require(needed <= size, f"cut short, {size} of {needed} bytes. Copy it again.")
        kind, codec = page.photometric.name, page.compression.name
        try:
            values = page.asarray()
            values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
            values, readable = np.zeros(0), ("RGB", "MINISBLACK", "PALETTE", "YCBCR")
            with suppress(OSError), Image.open(path) as image:
                values = np.asarray(image)
            same = values.dtype == page.dtype and values.size == prod(page.shape)
            require(same and kind in readable, f"{error}, and Pillow fails. Install imagecodecs.")
        alpha = tuple(page.extrasamples)[-1:] in ((1,), (2,))
        return values, kind, getattr(page, "colormap", None), alpha, codec[:4] in ("JPEG", "WEBP")


def read_image(path: Path) -> np.ndarray:
    """Read an image as (3, H, W) uint8, contiguous, without alpha. Raises BadInput.

    Larger integers lose low bits: the smallest range 2**8, 2**9, .. that holds the maximum becomes
    0..255, so 12 bits in a 16-bit file keep their brightness. Floats are 0..1 or 0..255.
    """
    with name_file(path):
        pixels, kind, palette, alpha, _ = decode(path)
        if kind == "PALETTE" and palette is not None and pixels.ndim == 2:
            pixels, kind = np.moveaxis(palette[:, pixels] >> 8, 0, 2), "RGB"
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        rgb = kind in ("RGB", "YCBCR") and pixels.shape[2] in (3, 4)
        grey = kind in ("MINISBLACK", "MINISWHITE") and pixels.shape[2] == 1 + alpha
        found = f"colour model {kind}, {pixels.shape[2]} channels of {pixels.dtype}"
        known = pixels.dtype.kind in "buif" and (rgb or grey)
        require(known, f"{found}; expected RGB or grey numbers. Export it as RGB.")
        pixels = np.moveaxis(pixels[:, :, : 3 if rgb else 1], 2, 0)
        low, high = pixels.min(initial=0), pixels.max(initial=0)
        valid = low >= 0 and (pixels.dtype.kind != "f" or high <= 255)  # NaN is not
        require(valid, f"values from {low} to {high}; expected 0..1 or 0..255. Save it as uint8.")
        if pixels.dtype.kind in "bf":
            pixels = np.round(pixels * (255.0 if high <= 1 else 1.0))
        elif pixels.dtype != np.uint8:
            pixels = pixels >> max(int(high).bit_length() - 8, 0)
        pixels = 255 - pixels if kind == "MINISWHITE" else pixels
        return np.broadcast_to(pixels, (3, *pixels.shape[1:])).astype(np.uint8, order="C")


# Pixels of instances: row-major offsets (K,) int64, ids (K,) ints from 1 on, size (H, W)
InstanceMap = namedtuple("InstanceMap", "pixels ids size")


def read_instance_map(path: Path) -> InstanceMap:
    """Read a class file: pixel = instance id, 0 = background. Raises BadInput."""
    with name_file(path):
        values, _, _, _, lossy = decode(path)
        require(not lossy, "JPEG or WebP, which changes ids. Save it without loss.")
        found = f"shape {values.shape}, {values.dtype}"
        known = values.ndim == 2 and values.dtype.kind in "buif"
        require(known, f"{found}; expected (H, W) with one instance id per pixel.")
        pixels = np.flatnonzero(values)  # NaN is one of them
        ids = values.ravel()[pixels]
        wrong = ids[(np.floor(ids) != ids) | (ids < 0) | (ids >= 2.0**63)]
        require(not len(wrong), f"ids {wrong[:3]}; expected whole numbers from 0 to 2^63 - 1.")
        if len(ids) and (ids == ids[0]).all():
            sizes = np.bincount(ndimage.label(values)[0].ravel())[1:]
            pieces = int((sizes >= 10).sum())  # smaller ones are slivers
            found = f"one id, {int(ids[0])}, in {pieces} pieces: a mask of cells and background?"
            help_text = "Label the pieces first (Fiji: Analyze Particles, count masks)."
            require(pieces <= 3, f"{found} Expected an id per cell. {help_text}")
        dtype = np.int32 if ids.max(initial=0) < 2**31 else np.int64
        return InstanceMap(pixels, ids.astype(dtype), values.shape)


def read_cell_folder(folder: Path, num_classes: int, overlaps: bool = True) -> CellSample:
    """Read `image.tif` and `class1.tif` .. of a folder; ids may restart in each and have gaps.

    Without `overlaps` a pixel that two classes claim belongs to the first. Raises BadInput where a
    file is missing, unknown or broken, or sizes differ.
    """
    known = {f"class{label}.tif": label for label in range(1, num_classes + 1)}
    with name_file(folder):
        names = sorted(path.name for path in folder.iterdir())
        require("image.tif" in names, f"no image.tif, but {', '.join(names[:5]) or 'nothing'}.")
        classes = {name for name in names if re.match(r"(?i)class|[^.].*\.tiff?$", name)}
        unknown = ", ".join(sorted(classes - {"image.tif", *known}))
        expected = f"expected class1.tif .. class{num_classes}.tif: rename it or set class_names"
        require(not unknown, f"{unknown} is no known class; {expected}.")
    image = read_image(folder / "image.tif")

    def read_classes():  # one class file in memory at a time
        for name in filter(names.__contains__, known):
            pixels, ids, size = read_instance_map(folder / name)
            with name_file(folder / name):
                expected = f"expected {image.shape[1:]} as of image.tif beside it"
                require(size == image.shape[1:], f"{size} (H, W); {expected}.")
            yield pixels, ids, known[name]

    packed = pack_layers(read_classes(), image.shape[1:], overlaps)
    return CellSample(torch.from_numpy(image), *packed, f"{folder.name}/image.tif")
