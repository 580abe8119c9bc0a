"""Exports: `Instances` -> label images, outlines for QuPath, tables of cells and counts, COCO."""

# %% [markdown]
# ### Export for Fiji, napari, QuPath and spreadsheets
# Every file holds the same cells: overlaps are removed once, and a cell has one number in all of
# them, from 1 on in each image. Coordinates count from the upper left edge of the image. The trap:
# scores are lost in most of these files, so weak detections should be left out before.

# %%
# @title Outlines and measurements of cells
from collections.abc import Sequence
import os
from pathlib import Path
import uuid

import numpy as np
import pandas as pd
from scipy import ndimage
import skimage
from tifffile import imwrite
from tqdm.auto import tqdm

from src_snippets.data.drawing import class_color
from src_snippets.data.images import name_file, require
from src_snippets.data.layouts import ImageRecord
from src_snippets.data.rle import crop_mask, draw_masks
from src_snippets.data.structures import coco_dataset
from src_snippets.evaluation.matching import visible_instances
from src_snippets.setup.files import atomic_write, clear_folder, write_json

REGION_PROPERTIES = ("label", "area", "centroid", "axis_major_length", "axis_minor_length")
REGION_PROPERTIES += ("eccentricity", "solidity", "bbox", "intensity_mean")
MEASURE_NAMES = ("cell", "area_px", "centroid_y_px", "centroid_x_px", "major_axis_px")
MEASURE_NAMES += ("minor_axis_px", "eccentricity", "solidity", "top", "left", "bottom", "right")
MEASURE_NAMES += ("intensity", "hematoxylin_od", "eosin_od")


def measure_cells(numbers: np.ndarray, image: np.ndarray, um_per_px: float) -> pd.DataFrame:
    """Measure each cell of a label image (H, W) ints and its image (3, H, W) uint8, a row each.

    Lengths in pixels, also in um unless `um_per_px` is 0. Stains are optical densities to base 10,
    NaN in a grey image. Source: Ruifrok and Johnston 2001, the vectors of scikit-image.
    """
    density = np.moveaxis(-np.log10(np.maximum(image, 1) / 255), 0, 2)
    is_grey = (image == image[0]).all()
    stains = np.where(is_grey, np.nan, density @ skimage.color.hed_from_rgb[:, :2])
    values = np.dstack([image.mean(axis=0), stains])
    properties = skimage.measure.regionprops_table(numbers, values, properties=REGION_PROPERTIES)
    table = pd.DataFrame(properties).set_axis(MEASURE_NAMES, axis=1)
    table[["centroid_x_px", "centroid_y_px"]] += 0.5  # from pixel centres to the image's edge
    if um_per_px:
        um = table.filter(regex="(centroid|axis).*_px") * um_per_px
        table["area_um2"] = table.area_px * um_per_px**2
        table = table.join(um.rename(columns=lambda name: name.replace("_px", "_um")))
    return table.round(3)


def trace_polygons(mask: np.ndarray, top: int, left: int) -> list:
    """Trace a mask (h, w) bool along its pixels' edges; its corner is at row `top`, column `left`.

    Returns a polygon per piece: closed rings of [x, y] px, the outer one, then holes, wound as RFC
    7946 asks (counter-clockwise, clockwise if y goes up). No ring meets itself.
    """
    pieces, count = ndimage.label(mask)
    polygons = [[] for _ in range(count)]
    for piece, rings in enumerate(polygons, start=1):
        # "high": of two holes that touch at a corner each has a ring of its own
        for line in skimage.measure.find_contours(np.pad(pieces == piece, 1), 0.5, "high"):
            first, second = line[:-1] - 0.5, line[1:] - 0.5  # middles of pixel edges
            bends = (first != second).all(axis=1)
            corners = np.where(first % 1 == 0, first, second)[bends, ::-1] + (left, top)
            rings.append(np.append(corners, corners[:1], axis=0).astype(int).tolist())
        rings.sort(key=min)  # the outer one is farthest to the left
    return polygons


def qupath_feature(rle: dict, label: int, cell: dict) -> dict:
    """A row of `cells.csv` as the GeoJSON feature that QuPathTypeAdapters of QuPath 0.4 reads."""
    polygons = trace_polygons(*crop_mask(rle))
    shape = dict(type="MultiPolygon", coordinates=polygons)
    if len(polygons) == 1:
        shape = dict(type="Polygon", coordinates=polygons[0])
    kind = dict(name=cell["class"], color=list(bytes.fromhex(class_color(label)[1:])))
    properties = dict(objectType="detection", name=str(cell["cell"]), classification=kind)
    properties["measurements"] = {k: v for k, v in list(cell.items())[3:] if v == v}  # no NaN
    key = uuid.uuid5(uuid.NAMESPACE_OID, f"{cell['image']} {cell['cell']} {rle}")
    return dict(type="Feature", id=str(key), geometry=shape, properties=properties)


# %%
# @title write_exports
def save_label_image(numbers: np.ndarray, path: Path, um_per_px: float) -> None:
    """Write a label image (H, W): uint16, from 65,536 cells on uint32; its scale as in ImageJ."""
    numbers = numbers.astype(np.uint16 if numbers.max(initial=0) < 2**16 else np.uint32)
    options = dict(resolution=(1 / um_per_px,) * 2, resolutionunit="NONE") if um_per_px else {}
    options |= dict(description="ImageJ=1.54f\nunit=um\n") if um_per_px else {}
    with atomic_write(path) as partial:
        imwrite(partial, numbers, compression="zlib", metadata=None, **options)


def write_exports(
    predictions, images: Sequence[ImageRecord], read, folder: Path, categories, um_per_px=0.0
) -> pd.DataFrame:
    """Write labels/*.tif, qupath/*.geojson, cells.csv, counts.csv and cells.coco.json.

    Args:
        predictions: `Instances` by image id; see `visible_instances` for what is left of overlaps.
        images: at least one; read: gives the (3, H, W) uint8 of one.
        categories: names of the classes 1..C by the dataset's own ids.
        um_per_px: micrometres per pixel; 0: unknown, and nothing is given in um or mm.

    Returns:
        The table of counts.csv, a row per image.
    """
    visible = {image.image_id: visible_instances(predictions[image.image_id]) for image in images}
    kinds, stems = list(categories.values()), [image.path.stem.casefold() for image in images]
    above, tables, areas = os.path.commonpath([image.path.parent for image in images]), [], {}
    named = [(path.relative_to(above).as_posix(), *facts) for path, *facts in images]
    classes = {key: [kinds[label - 1] for label in own.labels] for key, own in visible.items()}
    for part, suffix in (("labels", ".tif"), ("qupath", ".geojson")):
        clear_folder(folder / part, suffix)
    for image in tqdm(images, desc="exports"):
        instances, name = visible[image.image_id], image.path.stem
        name += f"-{image.image_id}" if stems.count(name.casefold()) > 1 else ""
        numbers = draw_masks(instances.rles, range(1, len(instances) + 1), *instances.size)
        save_label_image(numbers, folder / "labels" / f"{name}.tif", um_per_px)
        with name_file(image.path):
            pixels = read(image)
            require(pixels.shape[1:] == instances.size, f"{pixels.shape}, not as predicted.")
        table = measure_cells(numbers, pixels, um_per_px)
        table.insert(0, "image", name)
        table.insert(2, "class", classes[image.image_id])
        table.insert(3, "score", instances.scores.astype(float).round(4))
        rows = zip(instances.rles, instances.labels, table.to_dict("records"), strict=True)
        content = dict(type="FeatureCollection", features=[qupath_feature(*row) for row in rows])
        write_json(content, folder / "qupath" / f"{name}.geojson")
        tables.append(table)
        areas[name] = numbers.size * um_per_px**2 / 1e6
    cells = pd.concat(tables)
    counts = pd.crosstab(cells.image, cells["class"])
    counts = counts.reindex(index=list(areas), columns=kinds, fill_value=0)
    counts["all"] = counts.sum(axis=1)
    if um_per_px:
        density = counts.div(pd.Series(areas), axis=0).add_suffix("_per_mm2").round(3)
        counts = counts.assign(area_mm2=pd.Series(areas)).join(density)
    counts = counts.rename_axis(index="image", columns=None).reset_index()
    for name, table in (("cells.csv", cells), ("counts.csv", counts)):
        with atomic_write(folder / name) as partial:
            table.to_csv(partial, index=False)
    write_json(coco_dataset(visible, named, categories), folder / "cells.coco.json")
    hidden = sum(len(predictions[image.image_id]) for image in images) - len(cells)
    print(f"{folder}: {len(cells)} cells of {len(images)} images, {hidden} duplicates left out.")
    return counts
