"""Exports: `Instances` -> label images, QuPath, tables of cells and counts, a COCO dataset."""

# %% [markdown]
# ## How do the cells reach Fiji, napari, QuPath and a spreadsheet?
# As label images, as outlines, as a row of numbers a cell, as counts, and as a COCO dataset with
# names. A cell has one number, its place in the answer from 1 on, in all of them. Coordinates count
# from the upper left edge of the image, as in boxes; each mask is handled in its own box.

# %%
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
import csv
import math
import os
from pathlib import Path
import uuid

import numpy as np
import scipy.ndimage
from skimage.color import hed_from_rgb
from skimage.measure import regionprops_table
import tifffile
from tqdm.auto import tqdm

from src_snippets.datasets import ImageRecord, write_json
from src_snippets.evaluate import coco_results, label_image
from src_snippets.forms import Instances, with_categories
from src_snippets.places import fresh_folder, written_whole
from src_snippets.plots import class_color
from src_snippets.rle import decode_runs, mask_areas, run_pixels
from src_snippets.stains import DENSITIES
from src_snippets.writers import BadResults, check_complete, check_entry


# %%
def crop_mask(rle: dict) -> tuple[np.ndarray, int, int]:
    """A mask in its tight box.

    Args:
        rle: a COCO RLE of at least one pixel.

    Returns:
        (h, w) bool, and the row and the column of its upper left pixel in the image.
    """
    columns, rows = np.divmod(run_pixels(*decode_runs(rle)), rle["size"][0])
    top, left = int(rows.min()), int(columns.min())
    mask = np.zeros((rows.max() - top + 1, columns.max() - left + 1), bool)
    mask[rows - top, columns - left] = True
    return mask, top, left


# %% [markdown]
# An outline runs along the edges of pixels, so that who fills it gets the mask back. The trap is
# pixels that touch at a corner alone: there a ring would meet itself, which is no valid polygon, so
# it is cut in two.


# %%
def trace_edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixel edges around a mask, each of which leads to the next.

    They have the cell on their right as one sees the image. From a corner where only two pixels
    touch, the way goes on along the same pixel.

    Args:
        mask: (h, w) bool.

    Returns:
        ends: (E,) ints, row * (w + 1) + column of the corner that the edge leads to; following:
        (E,) ints, the next edge; bends: (E,) bool, whether that one has another direction. The
        upper edges of pixels come first, row by row.
    """
    height, width = mask.shape
    free = ~np.pad(mask, 1)
    leaves = np.zeros((4, height + 1, width + 1), bool)  # a corner: right, down, left, up
    leaves[0, :-1, :-1] = mask & free[:-2, 1:-1]
    leaves[1, :-1, 1:] = mask & free[1:-1, 2:]
    leaves[2, 1:, 1:] = mask & free[2:, 1:-1]
    leaves[3, 1:, :-1] = mask & free[1:-1, :-2]
    leaves = leaves.reshape(4, -1)
    way, begins = np.nonzero(leaves)
    ends = begins + np.array([1, width + 1, -1, -width - 1])[way]
    right, left = (way + 1) % 4, (way + 3) % 4
    then = np.where(leaves[right, ends], right, np.where(leaves[way, ends], way, left))
    numbers = np.cumsum(leaves) - 1
    return ends, numbers[then * leaves.shape[1] + ends], then != way


# %%
def split_ring(corners: Sequence[int]) -> list[list[int]]:
    """Cuts a ring where it meets itself; the parts are closed and keep its direction."""
    rings, path = [], {}
    for corner in [*corners, *corners[:1]]:
        if corner in path:
            ring = [corner, path.popitem()[0]]
            while ring[-1] != corner:
                ring.append(path.popitem()[0])
            rings.append(ring[::-1])
        path[corner] = None
    return rings


# %%
def trace_polygons(mask: np.ndarray, top: int, left: int) -> list[list[list[list[int]]]]:
    """The polygons of a mask along its pixels' edges.

    Args:
        mask: (h, w) bool; its upper left pixel lies at row `top` and column `left` of the image.

    Returns:
        A polygon for each piece whose pixels share edges: closed rings of [x, y] pixels, first the
        outer one, then the holes. Rings touch at single corners at most. Read as numbers, with y
        upwards, the outer one is counter-clockwise and holes are clockwise, as RFC 7946 asks; on
        the screen, where y goes down, it is the other way round.
    """
    ends, following, bends = (values.tolist() for values in trace_edges(mask))
    pieces, _ = scipy.ndimage.label(mask)
    owners = pieces[mask & ~np.pad(mask, ((1, 0), (0, 0)))[:-1]]  # of all upper edges
    seen, polygons = [False] * len(ends), {}
    for edge, owner in enumerate(owners.tolist()):  # every ring has an upper edge
        corners = []
        while not seen[edge]:
            seen[edge] = True
            if bends[edge]:
                corners.append(ends[edge])
            edge = following[edge]
        polygons.setdefault(owner, []).extend(split_ring(corners))
    wide = mask.shape[1] + 1
    return [  # the first corner of a piece, row by row, is one of its outer ring alone
        [[[c % wide + left, c // wide + top] for c in ring] for ring in sorted(rings, key=min)]
        for rings in polygons.values()
    ]


# %% [markdown]
# Shape and stain are measured on the whole mask, also where another cell lies on it. The amounts of
# hematoxylin and eosin are optical densities to base 10, as QuPath states them.


# %%
def unmix_stains(pixels: np.ndarray) -> np.ndarray:
    """(h, w, 2) float64, the optical density, base 10, of hematoxylin and eosin in each pixel.

    Colours that no mix of stains has may give an amount slightly below 0.

    Args:
        pixels: (3, h, w) uint8.

    Source: the stain vectors of skimage's `rgb2hed` (Ruifrok and Johnston 2001).
    """
    density = DENSITIES.numpy()[pixels] / np.log(10)
    return np.moveaxis(density, 0, 2) @ hed_from_rgb[:, :2]


# %%
MEASURED = (
    "area",
    "centroid",
    "axis_major_length",
    "axis_minor_length",
    "eccentricity",
    "solidity",
    "intensity_mean",
)


# %%
def measure_cell(
    mask: np.ndarray, pixels: np.ndarray, top: int, left: int, um_per_px: float, coloured=True
) -> dict[str, float]:
    """Numbers of one cell by column of the table, to three decimals.

    Axes are those of the ellipse with the same second moments: 0 where a cell is one pixel thin.

    Args:
        mask: (h, w) bool, at row `top` and column `left` of the image; pixels: (3, h, w) uint8.
        um_per_px: micrometres a pixel; 0: not known, and no columns in them.
        coloured: False leaves the stains out: a grey picture tells nothing of them.
    """
    seen = np.dstack([pixels.mean(0), unmix_stains(pixels)])
    table = regionprops_table(mask.astype(np.uint8), seen, properties=MEASURED)
    area, y, x, major, minor, eccentricity, solidity, intensity, *stains = (
        float(v[0]) for v in table.values()
    )
    # Pixel centres, which regionprops counts, lie half a pixel inside the edges.
    lengths = dict(centroid_x=left + x + 0.5, centroid_y=top + y + 0.5)
    lengths |= dict(major_axis=major, minor_axis=minor)
    values = dict(area_px=int(area)) | {f"{name}_px": value for name, value in lengths.items()}
    if um_per_px:
        values["area_um2"] = area * um_per_px**2
        values |= {f"{name}_um": value * um_per_px for name, value in lengths.items()}
    height, width = mask.shape
    values |= dict(eccentricity=eccentricity, solidity=solidity)
    values |= dict(left_px=left, top_px=top, right_px=left + width, bottom_px=top + height)
    values["intensity"] = intensity
    values |= dict(hematoxylin_od=stains[0], eosin_od=stains[1]) if coloured else {}
    return {name: round(value, 3) for name, value in values.items()}


# %%
def cell_features(
    found: Instances, pixels: np.ndarray, name: str, kinds: Sequence[str], um_per_px: float
) -> Iterator[dict]:
    """Yields a GeoJSON feature a cell, as QuPath reads them from version 0.4 on.

    Its name is the cell's number, its measurements are `measure_cell` and the score, its id is the
    same for the same mask, number and name of the image.

    Args:
        pixels: (3, H, W) uint8; name: of the image; kinds: names of the classes 1..C.

    Source: the fields that `QuPathTypeAdapters` in qupath-core reads and writes.
    """
    columns = zip(found.rles, found.scores.tolist(), found.labels.tolist(), strict=True)
    coloured = bool((pixels != pixels[:1]).any())
    for number, (rle, score, label) in enumerate(columns, start=1):
        mask, top, left = crop_mask(rle)
        own = pixels[:, top : top + mask.shape[0], left : left + mask.shape[1]]
        polygons = trace_polygons(mask, top, left)
        kind = "Polygon" if len(polygons) == 1 else "MultiPolygon"
        yield dict(
            type="Feature",
            id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {number} {rle['counts']}")),
            geometry=dict(type=kind, coordinates=polygons[0] if kind == "Polygon" else polygons),
            properties=dict(
                objectType="detection",
                name=str(number),
                classification=dict(
                    name=kinds[label - 1],
                    color=list(bytes.fromhex(class_color(label)[1:])),
                ),
                measurements=dict(score=round(score, 4))
                | measure_cell(mask, own, top, left, um_per_px, coloured),
            ),
        )


# %%
def save_labels(found: Instances, path: Path, um_per_px: float) -> None:
    """Writes a label image: (H, W), a pixel is the number of its cell, 0 background.

    Where masks overlap the better-scored cell has the pixel. uint16, from 65,536 cells on uint32;
    deflate, which tifffile writes without imagecodecs; pixels per cm where `um_per_px` is not 0.
    """
    numbers = label_image(found)[..., 1].astype(np.uint16 if len(found) < 2**16 else np.uint32)
    options = dict(photometric="minisblack", compression="zlib", metadata=None)
    if um_per_px:
        options |= dict(resolution=(1e4 / um_per_px,) * 2, resolutionunit="CENTIMETER")
    with written_whole(path) as partial:
        tifffile.imwrite(partial, numbers, **options)


def count_cells(found: Instances, classes: int, um_per_px: float) -> list[float]:
    """Cells of each class and of all; with `um_per_px` also the image's mm2, and cells a mm2."""
    counts = np.bincount(found.labels, minlength=classes + 1)[1:].tolist()
    counts.append(len(found))
    if not um_per_px:
        return counts
    area = math.prod(found.size) * um_per_px**2 / 1e6
    return [*counts, round(area, 6), *(round(count / area, 3) for count in counts)]


# %%
def coco_dataset(
    answers: Mapping[int, Instances],
    images: Sequence[ImageRecord],
    categories: Mapping[int, str],
) -> dict:
    """Answers as a whole COCO dataset: annotations with scores, images, and classes with names.

    Args:
        answers: `Instances` by image id, one for every image.
        categories: names of the classes 1..C by the dataset's own ids, as `CellDataset` has them.

    Raises:
        BadResults: an image has no answer, or a cell breaks a rule of `check_entry`.
    """
    check_complete(answers, images)
    rows = coco_results({image.image_id: answers[image.image_id] for image in images})
    sizes = {image.image_id: (image.height, image.width) for image in images}
    paths = {image.image_id: image.path for image in images}
    areas = mask_areas([row["segmentation"] for row in rows]).tolist()
    for number, (row, area) in enumerate(zip(rows, areas, strict=True), start=1):
        if problem := check_entry(row, sizes, range(1, len(categories) + 1)):
            raise BadResults(f"{paths[row['image_id']]}, entry {number}: {problem}.")
        row.update(id=number, area=area, iscrowd=0)
    above = Path(os.path.commonpath([i.path.parent for i in images])) if images else Path()
    names = [i.path.relative_to(above).as_posix() for i in images]
    records = [
        dict(id=i.image_id, file_name=name, height=i.height, width=i.width)
        for i, name in zip(images, names, strict=True)
    ]
    return with_categories(dict(images=records, annotations=rows), categories)


def export_names(images: Sequence[ImageRecord]) -> list[str]:
    """The images' names without suffix; with the ids where two would be the same file."""
    stems = [image.path.stem for image in images]
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{image.path.stem}-{image.image_id}" for image in images]


# %% [markdown]
# All answers are checked before the first file is written; images are read one by one.


# %%
@contextmanager
def new_table(path: Path, header: Sequence[str]):
    """Yields a `csv.writer` of a file that gets its name only if the block succeeds."""
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        yield table


def table_headers(kinds: Sequence[str], um_per_px: float) -> tuple[list[str], list[str]]:
    """The columns of `cells.csv` and of `counts.csv`."""
    one = measure_cell(np.ones((1, 1), bool), np.zeros((3, 1, 1), np.uint8), 0, 0, um_per_px)
    columns = [*kinds, "all"]
    columns += ["area_mm2", *(f"{kind}_per_mm2" for kind in columns)] if um_per_px else []
    return ["image", "cell", "class", "score", *one], ["image", *columns]


def export_images(answers, images, read, folder, kinds, um_per_px) -> list[Path]:
    """Writes all but the COCO dataset; see `write_exports`."""
    paths = [folder / "cells.csv", folder / "counts.csv"]
    headers = table_headers(kinds, um_per_px)
    with new_table(paths[0], headers[0]) as cells, new_table(paths[1], headers[1]) as counts:
        bar = tqdm(images, desc="exporting", unit="image")
        for image, name in zip(bar, export_names(images), strict=True):
            found, pixels = answers[image.image_id], read(image)
            if pixels.shape != (3, *found.size):
                raise BadResults(
                    f"{image.path}: read as {pixels.shape}; its answer expects (3, H, W) with H, W "
                    f"of {found.size}."
                )
            paths.append(folder / "labels" / f"{name}.tif")
            save_labels(found, paths[-1], um_per_px)
            paths.append(folder / "qupath" / f"{name}.geojson")
            features = list(cell_features(found, pixels, name, kinds, um_per_px))
            write_json(dict(type="FeatureCollection", features=features), paths[-1])
            for own in (feature["properties"] for feature in features):
                values = [own["measurements"].get(column, "") for column in headers[0][3:]]
                cells.writerow([name, own["name"], own["classification"]["name"], *values])
            counts.writerow([name, *count_cells(found, len(kinds), um_per_px)])
    return paths


# %%
def write_exports(
    answers: Mapping[int, Instances],
    images: Sequence[ImageRecord],
    read: Callable[[ImageRecord], np.ndarray],
    folder: Path,
    categories: Mapping[int, str],
    um_per_px: float = 0.0,
) -> list[Path]:
    """Writes what people use next; one image is held at a time.

    `labels/<name>.tif` (see `save_labels`), `qupath/<name>.geojson` (see `cell_features`),
    `cells.csv` with a row a cell, `counts.csv` with a row an image, and `cells.coco.json`.

    Args:
        answers: `Instances` by image id, one for every image. Most of these files have no place
            for doubt, so weak cells should have been left out.
        read: gives the (3, H, W) uint8 of an image.
        categories: see `coco_dataset`.
        um_per_px: micrometres a pixel; 0: not known, and nothing is given in um or mm.

    Returns:
        The paths of all.

    Raises:
        BadResults: see `coco_dataset`, or an image is not of its answer's size.
        ValueError: `um_per_px` is negative or not finite.
    """
    if not 0 <= um_per_px < math.inf:
        raise ValueError(f"um_per_px={um_per_px}: expected micrometres a pixel, 0 if not known.")
    coco, kinds = coco_dataset(answers, images, categories), list(categories.values())
    for part, suffix in (("labels", ".tif"), ("qupath", ".geojson")):
        fresh_folder(folder / part, suffix)
    paths = export_images(answers, images, read, folder, kinds, um_per_px)
    write_json(coco, folder / "cells.coco.json")
    print(f"{folder}: {len(coco['annotations'])} cells of {len(images)} images exported.")
    return [*paths, folder / "cells.coco.json"]
