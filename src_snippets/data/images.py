"""Images, instance maps and outlines from files."""

# %%
# @title Read images: tifffile for TIFF, Pillow for the others
from collections.abc import Sequence
from contextlib import contextmanager, suppress
import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
import skimage
from tifffile import TiffFile

from src_snippets.data.rle import csv_to_pixels, pixel_indices, run_pixels
from src_snippets.setup.config import BadInput, require

MAX_VALUES = 10**9  # of an image, all channels: RGB of 18,000 x 18,000 px


@contextmanager
def name_file(path: Path | str):
    """Turn any error in the block into a BadInput that names the file, or the part of one."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise BadInput(f"{path}: {error} Cut it into fields of view.") from error
    except Exception as error:  # decoders raise many types; each one means a bad file
        raise BadInput(f"{path}: cannot be read ({error}). Copy or export it again.") from error


def decode(path: Path, stacked: bool = False, indexed: bool = False) -> tuple:
    """Read the one image in a file, planes where `stacked`, ids of instances where `indexed`.

    Returns values (H, W) or (H, W, S) in the file's dtype, a palette's colours as RGB unless they
    show ids, turned as EXIF says; photometric ("RGB", ..); whether the last channel is alpha; bits.
    """
    with path.open("rb") as file:
        is_tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    if is_tiff:
        values, kind, alpha, bits, lossy, orientation = decode_tiff(path, stacked, indexed)
    else:
        with Image.open(path) as image:  # a phone's MPO has previews behind the first picture
            single = image.format == "MPO" or getattr(image, "n_frames", 1) == 1
            require(single, "several images; expected one.")
            plain = image.mode in ("1", "L", "LA", "RGB", "RGBA", "F") or image.mode[0] == "I"
            plain |= indexed and image.mode == "P"  # numbers of instances, shown in colours
            halved = ";16" in str(image.tile) and image.mode[0] != "I"  # Pillow keeps high bytes
            orientation = image.getexif().get(274, 1)
            values = np.asarray(image if plain else image.convert("RGB"))
            require(not halved, "RGB of 16 bits in a PNG. Save it as TIFF.")
            kind, bits = None, 1 if image.mode == "1" else 8 * values.itemsize
            alpha, lossy = image.mode[-1] == "A", image.format in ("JPEG", "MPO", "WEBP")
    require(not (indexed and lossy), "JPEG or WebP, which changes ids. Save it without loss.")
    kind = kind or ("RGB" if values.shape[2:] in ((3,), (4,)) else "MINISBLACK")
    values = values[:, ::-1] if orientation in (2, 4, 5, 7) else values  # mirrored, then turned
    quarter_turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.rot90(values, quarter_turns), kind, alpha, bits


def decode_tiff(path: Path, stacked: bool, indexed: bool) -> tuple:
    """The largest plane of a TIFF, others are previews: as `decode`, whether lossy, orientation."""
    with TiffFile(path) as tif:
        pages = [p for top in tif.pages[:] for p in (top, *(top.pages or ())[:])]  # [:]: or endless
        tif.filehandle.seek(tif.pages.next_page_offset)
        is_whole = not any(tif.filehandle.read(tif.tiff.offsetsize))
        require(is_whole, "cut short, its list of pages goes on after its end. Copy it again.")
        page = max(pages, key=lambda page: page.imagelength * page.imagewidth)
        half = page.imagelength * page.imagewidth / 2
        full = [p for p in pages if p.imagelength * p.imagewidth > half and not p.is_reduced]
        planes = full if stacked and 1 < len(full) <= 64 and page.axes == "YX" else [page]
        series = max(tif.series, key=lambda s: s.size)
        count = max(len(full), series.size // page.size)
        issue = f"axes {series.axes}, shape {series.shape}, {count} pages of similar size; expected"
        help_text = "Save one plane (images: or RGB, Fiji: Type > RGB Color; or set channels)."
        valid = count == len(planes) and page.axes in ("YX", "YXS", "SYX")
        valid &= len(planes) == 1 or sum(n > 1 for n in series.shape) <= 3  # no z, time beside
        require(valid, f"{issue} one image. {help_text}")
        require(count * page.size <= MAX_VALUES, f"{issue} at most {MAX_VALUES:,} values.")
        parts = (v for p in planes for v in zip(p.dataoffsets, p.databytecounts, strict=False))
        size, needed = tif.filehandle.size, max(map(sum, parts))
        require(needed <= size, f"cut short, {size} of {needed} bytes. Copy it again.")
        kind = page.photometric.name if 262 in page.tags else None
        orientation = page.tags.valueof(274, 1)
        try:
            values = np.dstack([p.asarray() for p in planes]) if count > 1 else page.asarray()
            values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
            values, readable = np.zeros(0), ("RGB", "MINISBLACK", "PALETTE", "YCBCR")
            with suppress(OSError), Image.open(path) as image:
                image.load()  # first: it turns the image
                values, orientation = np.asarray(image), 1
            same = values.dtype == page.dtype and values.size == page.size
            require(same and kind in readable, f"{error}, and Pillow fails. Install imagecodecs.")
        alpha = tuple(page.extrasamples)[-1:] in ((1,), (2,))
        lossy, bits = page.compression.name[:4] in ("JPEG", "WEBP"), page.bitspersample
        palette = getattr(page, "colormap", None)  # (3, K)
        if kind == "PALETTE" and palette is not None and values.ndim == 2 and not indexed:
            colors = palette.T >> (8 if palette.max() > 255 else 0)  # of 16 bits, or of 8
            values, kind, bits = colors.astype(np.uint8)[values.astype(int)], "RGB", 8
        return values, kind, alpha, bits, lossy, orientation


def read_image(path: Path, channels: Sequence[int] = ()) -> np.ndarray:
    """Read an image as (3, H, W) uint8, contiguous, without alpha. Raises BadInput.

    uint8 and palettes stay as they are, grey of 1, 2 or 4 bits spans its range. In all others 0.1
    and 99.9 % of the pixels' lowest and highest channel (minimum and maximum where these are equal)
    become 0 and 255 in every channel: 12 bits in 16 and hot pixels do no harm. channels: those of
    the file, from 1 on, that become red, green and blue, each scaled alone; one is grey.
    """
    return read_image_values(path, channels)[1]


def read_image_values(path: Path, channels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read the values (S, H, W) of an image as in its file, and what `read_image` gives."""
    with name_file(path):
        pixels, kind, alpha, bits = decode(path, stacked=bool(channels))
        pixels = np.moveaxis(np.atleast_3d(pixels), 2, 0)
        if channels:
            require(max(channels) <= len(pixels), f"{len(pixels)} channels, but {channels=} set.")
            planes = [scale_brightness(pixels[[k - 1]], bits) for k in channels]
            others = planes * 2 if len(planes) == 1 else [planes[0] * 0] * (3 - len(planes))
            return pixels, np.concatenate(planes + others)
        rgb = kind in ("RGB", "YCBCR") and len(pixels) in (3, 4)
        grey = kind in ("MINISBLACK", "MINISWHITE") and len(pixels) == 1 + alpha
        issue = f"colour model {kind}, {len(pixels)} channels of {pixels.dtype}"
        valid = pixels.dtype.kind in "buif" and (rgb or grey)
        require(valid, f"{issue}; expected RGB or grey numbers. Export it as RGB.")
        values = pixels = pixels[: 3 if rgb else 1]
        if pixels.dtype != np.uint8 or bits < 8:
            pixels = scale_brightness(pixels, bits)
        pixels = 255 - pixels if kind == "MINISWHITE" else pixels
        return values, np.broadcast_to(pixels, (3, *pixels.shape[1:])).astype(np.uint8, order="C")


def scale_brightness(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Map numbers (S, H, W) of `bits` each to 0..255 uint8, see `read_image`."""
    require(np.isfinite(pixels).all(), "NaN or infinite values; expected numbers. Replace them.")
    low, high = 0, 2**bits - 1
    if (bits > 8 or pixels.dtype.kind != "u") and bits > 1 and pixels.size:
        low = float(np.percentile(pixels.min(axis=0), 0.1, method="higher"))
        high = float(np.percentile(pixels.max(axis=0), 99.9, method="lower"))
        if low >= high:
            low, high = float(pixels.min()), float(pixels.max())
    scaled = (np.clip(pixels.astype(np.float64), low, high) - low) / ((high - low) or 1)
    return np.round(scaled * 255).astype(np.uint8)


# %%
# @title Read instance maps and outlines
def check_instance_map(values: np.ndarray, pixels: np.ndarray, ids: np.ndarray) -> tuple:
    """Refuse a map (H, W) that shows no instances; its pixels (K,) without strays, their number.

    pixels, ids: (K,). In turn: ids that are compact, within 2 sqrt(area) of their centres (a disc:
    0.6, a rod of 16:1: 2), are fine; an id around the others is background; ids of many pieces are
    a mask, classes or restarted; a far piece below a tenth of its id's largest is a stray.
    """
    unique, owners, areas = np.unique(ids, return_inverse=True, return_counts=True)
    count, spread = len(unique), np.zeros(len(pixels))
    for places in np.divmod(pixels, max(values.shape[1], 1)):
        centres = np.bincount(owners, places) / areas
        spread += (places - centres[owners]) ** 2 / 4  # to be compared with areas
    is_binary = count == 1 and unique[0] == 255
    compact = not is_binary and (spread <= areas[owners]).all()
    if compact and 20 * areas.max(initial=0) <= values.size:
        return pixels, 0
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    name, dense = unique[areas.argmax()], count > 20  # or some small ones beside a large cell
    if (2 + 3 * dense) * areas.max() > values.size and (border == name).mean() > 0.5 - 0.4 * dense:
        holes = max(ndimage.label(values != name)[1], dense * (count - 1))  # 4: a cell's corners
        issue = f"id {name:g} is around {holes} pieces: the background? It has to be 0."
        require(holes <= 4, f"{issue} Set it to 0 (an inverted mask: invert and label it).")
    pieces = skimage.measure.label(values, connectivity=2).flat[pixels]
    index, first, sizes = np.unique(pieces, return_index=True, return_counts=True)
    if len(index) == count:
        return pixels, 0
    far = ndimage.maximum(spread, pieces, index)
    parts = pd.DataFrame(dict(id=owners[first], size=sizes, far=far), index=index)
    small = 10 * parts["size"] < parts.groupby("id")["size"].transform("max")
    large = parts[~small].groupby("id")["far"].agg(["size", "max"])
    # a cell that others cover in part may be little and far, but no farther than a whole cell
    apart = (large["size"] > 1) & (large["max"] > np.maximum(areas, np.percentile(areas, 90)))
    total = len(parts) if count > 5 else large["size"].sum()
    issue = f"{count} ids in {total} pieces, {apart.sum()} ids far apart; expected an id per cell."
    limit = min(count / 2, max(2, count / 20)) if unique[-1] != 255 or count < 255 else 0  # uint8
    instances = total <= (1 if is_binary else 3 * count) and apart.sum() <= limit
    causes = "a mask of cells and background, classes, blurred by resizing, ids that start again?"
    help_text = "Label cells (Fiji: Analyze Particles, count masks), resize without smoothing."
    require(instances, f"{issue} Is it {causes} {help_text}")
    strays = small & (parts["far"] > areas[parts["id"]])
    return pixels[~strays[pieces].to_numpy()], int(strays.sum())


def read_instance_map(path: Path, size: tuple[int, int] | None = None) -> tuple:
    """Read a label image, pixel = id or 0, of an image of `size` H, W. Raises BadInput.

    Returns row-major offsets of the instances' pixels, (K,) int64, their ids, (K,) ints from 1 on,
    and how many stray pieces were left out.
    """
    with name_file(path):
        values = decode(path, indexed=True)[0]
        valid = values.ndim == 2 and values.dtype.kind in "buif"
        require(valid, f"{values.dtype} {values.shape}; expected (H, W), an instance id per pixel.")
        fits = size in (None, values.shape)
        require(fits, f"{values.shape} (H, W); expected {size} as of the image beside it.")
        pixels = np.flatnonzero(values)  # NaN is one of them
        ids = values.ravel()[pixels]
        wrong = ids[(np.floor(ids) != ids) | (ids < 0) | (ids >= 2.0**63)]
        require(not len(wrong), f"ids {wrong[:3]}; expected whole numbers from 0 to 2^63 - 1.")
        pixels, strays = check_instance_map(values, pixels, ids)
        ids = values.ravel()[pixels]
        return pixels, ids.astype(np.int32 if ids.max(initial=0) < 2**31 else np.int64), strays


def read_geojson(path: Path) -> list[tuple]:
    """Read the outlines that QuPath exports: kind, shape, number, reason each. Raises BadInput."""
    with name_file(path):
        content, rows, types, boxes = json.loads(path.read_text(encoding="utf-8-sig")), [], [], []
        features = content if isinstance(content, list) else content.get("features", [content])
        for number, feature in enumerate(features, start=1):
            facts, form = feature.get("properties") or {}, feature["geometry"] or {}
            kind = facts.get("classification") or {}
            name = str(kind.get("name") or ": ".join(kind.get("names", ["cell"])))  # or derived
            types.append(facts.get("objectType", facts.get("object_type")))  # QuPath 0.3
            points = form.get("coordinates")
            polygons = dict(Polygon=[points], MultiPolygon=points).get(form.get("type"), [])
            rings = [np.asarray(ring, float)[:, :2] for polygon in polygons for ring in polygon]
            valid = all(len(ring) > 2 and np.abs(ring).max() < 1e9 for ring in rings)
            require(valid, f"feature {number}: expected rings of at least 3 points x, y.")
            reason = "" if rings else f"outlines without an area ({form.get('type', 'nothing')})"
            reason = f"regions that QuPath ignores ({name})" if name.endswith("*") else reason
            shape = "" if reason else json.dumps([ring.tolist() for ring in rings])
            rows.append((name, shape, number, reason))
            points = np.concatenate(rings) if shape else np.full((1, 2), np.nan)
            boxes.append([*points.min(axis=0), *-points.max(axis=0)])  # inside is >= in all four
        is_cell, boxes = np.isin(types, ["detection", "cell"]), np.array(boxes).reshape(-1, 4)
        areas = (-boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        cells, limit = (boxes[is_cell], 2) if is_cell.any() else (boxes, 10)  # a large cell has few
        for index in np.flatnonzero(~is_cell & (areas > 4 * np.nanmedian(np.append(areas, 0)))):
            inside = (cells >= boxes[index]).all(axis=1).sum()
            if inside > limit or (inside and inside == is_cell.sum()):
                rows[index] = rows[index][0], "", index + 1, "annotations around others"
    return rows


def fill_rings(rings: list, height: int, width: int) -> np.ndarray:
    """(A,) int64, ascending row-major offsets of the pixels with centres inside rings of [x, y] px.

    Even-odd rule: a ring in another one is a hole, and edges along pixels give back their mask.
    """
    edges = np.concatenate([np.c_[ring, np.roll(ring, -1, axis=0)] for ring in rings])
    x1, y1, x2, y2 = edges[edges[:, 1] != edges[:, 3]].T
    first, stop = np.ceil(np.clip(np.sort([y1, y2], axis=0) - 0.5, 0, height)).astype(int)
    rows, edge = run_pixels(first, stop), np.repeat(np.arange(len(first)), stop - first)
    columns = np.ceil(x1[edge] + (rows + 0.5 - y1[edge]) * ((x2 - x1) / (y2 - y1))[edge] - 0.5)
    bounds = rows * width + np.clip(columns, 0, width).astype(int)
    return run_pixels(*np.sort(bounds).reshape(-1, 2).T)


def shape_pixels(shape, height: int, width: int) -> np.ndarray:
    """(A,) int64, row-major offsets of the pixels of CSV text, JSON text of rings or a COCO RLE."""
    if isinstance(shape, dict):
        return pixel_indices(shape)
    if shape.startswith("["):
        return fill_rings(json.loads(shape), height, width)
    return csv_to_pixels(shape, height * width)
