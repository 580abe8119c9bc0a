"""Exports: `Instances` -> label images, outlines for QuPath and ImageJ, tables, COCO, overlays."""

# %% [markdown]
# ### Export for Fiji, napari, QuPath and spreadsheets
# Every file holds the same cells, each with one number, from 1 on in an image; coordinates count
# from its upper left corner. Label images, ROIs and overlays carry no scores: to leave out weak
# detections, raise `export_score_threshold`. To train on corrections, put a folder of `training`
# into `train/` (folder layout), or the label image or GeoJSON beside its image (pairs).

# %%
# @title Pixel size; measurements and outlines of cells
from contextlib import suppress
import importlib.util
import os
from pathlib import Path
import shutil
import uuid

import numpy as np
import pandas as pd
from PIL import Image
import skimage
from tifffile import imwrite, TiffFile, xml2dict
from tqdm.auto import tqdm

from src_snippets.data.drawing import class_color, draw_outlines
from src_snippets.data.images import name_file, read_image_values
from src_snippets.data.rle import crop_mask, draw_masks
from src_snippets.data.samples import image_stem
from src_snippets.data.structures import coco_dataset
from src_snippets.model.detect import visible_instances
from src_snippets.setup.config import require
from src_snippets.setup.files import atomic_write, write_json

REGION_PROPERTIES = ("label", "area", "centroid", "axis_major_length", "axis_minor_length")
REGION_PROPERTIES += ("eccentricity", "solidity", "bbox", "intensity_mean")
MEASURE_NAMES = ("cell", "area_px", "centroid_y_px", "centroid_x_px", "major_axis_px")
MEASURE_NAMES += ("minor_axis_px", "eccentricity", "solidity", "top", "left", "bottom", "right")
UM_PER_UNIT = dict.fromkeys(("um", "µm", "\u03bcm", "\\u00B5m", "micron", "microns"), 1.0)
UM_PER_UNIT |= dict(nm=1e-3, mm=1e3, cm=1e4, inch=25400.0)


def read_pixel_size(path: Path) -> float:
    """Micrometres per pixel by a TIFF's OME, ImageJ or resolution tags, 0.01..10; else 0."""
    with suppress(Exception), TiffFile(path) as tif:  # of any kind: the image itself is readable
        page = max(tif.pages, key=lambda page: page.imagelength * page.imagewidth)
        sides = [1 / r if r else 0 for r in page.resolution]
        unit = {2: "inch", 3: "cm"}.get(page.resolutionunit, "")
        if tif.is_imagej:
            unit = tif.imagej_metadata.get("unit", "")
        if tif.is_ome:
            pixels = np.ravel(xml2dict(tif.ome_metadata)["OME"]["Image"])[0]["Pixels"]  # no preview
            sides = [float(pixels[f"PhysicalSize{axis}"]) for axis in "XY"]
            unit = pixels.get("PhysicalSizeXUnit", "um")
        size = sides[0] * UM_PER_UNIT[unit]
        if 0.01 <= size <= 10 and abs(sides[0] - sides[1]) < 0.01 * sides[0]:
            return size
    return 0.0  # screens and printers leave 72 or 300 per inch, which are 353 and 85 um


def measure_cells(numbers: np.ndarray, values: np.ndarray, um_per_px: float) -> pd.DataFrame:
    """Measure each cell of a label image (H, W) ints and its image (S, H, W), a row each.

    Lengths in pixels, and in um unless `um_per_px` is 0; intensities as in the file. Stains, of
    bright uint8 in colour: optical densities to base 10 by Ruifrok and Johnston's vectors, 2001.
    """
    values = values[:1] if (values == values[0]).all() else values  # grey has one channel
    names = [*MEASURE_NAMES, *(f"intensity_{k}" for k in range(1, len(values) + 1))]
    if len(values) == 3 and values.dtype == np.uint8 and values.mean() > 64:  # no fluorescence
        density = -np.log10(np.maximum(values, 1) / np.float32(255))
        stains = np.tensordot(skimage.color.hed_from_rgb[:, :2].T.astype("f4"), density, 1)
        values, names = np.concatenate([values, stains]), [*names, "hematoxylin_od", "eosin_od"]
    values = np.moveaxis(values, 0, 2)
    table = skimage.measure.regionprops_table(numbers, values, properties=REGION_PROPERTIES)
    table = pd.DataFrame(table).set_axis(names, axis=1)
    table[["centroid_x_px", "centroid_y_px"]] += 0.5  # from pixel centres to the image's edge
    if um_per_px:
        um = table.filter(regex="(centroid|axis).*_px") * um_per_px
        table["area_um2"] = table.area_px * um_per_px**2
        table = table.join(um.rename(columns=lambda name: name.replace("_px", "_um")))
    return table.round({name: 3 for name in table if not name.startswith("intensity")})


def trace_polygons(mask: np.ndarray, top: int, left: int) -> list:
    """Trace a mask (h, w) bool along its pixels' edges; its corner is at row `top`, column `left`.

    Returns a polygon per piece: closed rings of [x, y] px, the outer one, then holes, wound as RFC
    7946 asks (counter-clockwise, clockwise if y goes up). No ring meets itself.
    """
    pieces, count = skimage.measure.label(mask, connectivity=1, return_num=True)
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


def imagej_roi(polygons: list, name: str):
    """A cell's `trace_polygons` as an ROI of ImageJ, composite where there are several rings."""
    roifile = importlib.import_module("roifile")
    rings = [ring[:-1] for rings in polygons for ring in rings]
    roi = roifile.ImagejRoi.frompoints(np.concatenate(rings), name=name)
    if len(rings) > 1:  # a path of operations: 0 move to, 1 line to, 4 close
        path = []
        for ring in rings:
            path += [v for k, (x, y) in enumerate(ring) for v in (int(k > 0), x, y)] + [4]
        roi.roitype, roi.n_coordinates, roi.shape_roi_size = roifile.ROI_TYPE.RECT, 0, len(path)
        roi.integer_coordinates, roi.multi_coordinates = None, np.array(path, np.float32)
    return roi


def qupath_feature(polygons: list, label: int, cell: dict) -> dict:
    """A row of `cells.csv` as the GeoJSON feature that QuPathTypeAdapters of QuPath 0.4 reads."""
    many = dict(type="MultiPolygon", coordinates=polygons)
    shape = many if len(polygons) > 1 else dict(type="Polygon", coordinates=polygons[0])
    kind = dict(name=cell["class"], color=list(bytes.fromhex(class_color(label)[1:])))
    properties = dict(objectType="annotation", name=str(cell["cell"]), classification=kind)
    properties["measurements"] = {k: v for k, v in list(cell.items())[3:] if np.isfinite(v)}
    key = uuid.uuid5(uuid.NAMESPACE_OID, f"{cell['image']} {cell['cell']} {polygons}")
    return dict(type="Feature", id=str(key), geometry=shape, properties=properties)


# %%
# @title write_exports
PARTS_OF_EXPORTS = {"labels": ".tif", "qupath": ".geojson", "rois": ".zip", "overlays": ".png"}


def save_label_image(numbers: np.ndarray, path: Path, um_per_px: float) -> None:
    """Write a label image (H, W): uint16, from 65,536 cells on uint32; its scale as in ImageJ."""
    numbers = numbers.astype(np.uint16 if numbers.max(initial=0) < 2**16 else np.uint32)
    options = dict(resolution=(1 / um_per_px,) * 2, resolutionunit="NONE") if um_per_px else {}
    options |= dict(description="ImageJ=1.54f\nunit=um\n") if um_per_px else {}
    with atomic_write(path) as partial:
        imwrite(partial, numbers, compression="zlib", metadata=None, **options)


def save_training_folder(numbers: np.ndarray, labels: np.ndarray, image: np.ndarray, folder: Path):
    """Write image.tif (S, H, W) and class1.tif .. of a label image (H, W), classes (N,) by id."""
    folder.mkdir(parents=True)
    is_rgb = image.dtype == np.uint8 and len(image) == 3
    image, kind = (np.moveaxis(image, 0, 2), "rgb") if is_rgb else (image, "minisblack")
    imwrite(folder / "image.tif", image, compression="zlib", photometric=kind)
    for label in np.unique(labels):
        own = np.where(np.append(0, labels)[numbers] == label, numbers, 0)
        save_label_image(own, folder / f"class{label}.tif", 0)


def keep_corrections(folder: Path) -> None:
    """Move exports aside, all of them, where one changed over a second after all were written."""
    parts, mark = (*PARTS_OF_EXPORTS, "training"), folder / ".written"
    paths = [*folder.glob("c*s.*"), *(p for part in parts for p in (folder / part).rglob("[!.]*"))]
    times = (max(p.stat().st_mtime, p.stat().st_ctime) for p in paths if p.is_file())
    if (latest := max(times, default=0)) > (mark.stat().st_ctime + 1 if mark.exists() else 0):
        aside = folder.rename(f"{folder}-{latest:.2f}")
        print(f"{folder}: changed, or not written to its end; kept as {aside}")


def write_exports(predictions, images, folder, categories, config) -> pd.DataFrame:
    """Write the files of all images, see the README; the table of counts.csv, a row per image.

    predictions: `Instances` by image id, of which `visible_instances` count; images: at least one
    `ImageRecord`; categories: names by the dataset's ids; config: um_per_px, channels, detections.
    """
    visible = {image.image_id: visible_instances(predictions[image.image_id]) for image in images}
    kinds, tables, counts, ums = list(categories.values()), [], [], set()
    columns = [f"class {name}" if name in ("image", "all", "area_mm2") else name for name in kinds]
    classes = {key: [kinds[label - 1] for label in p.labels] for key, p in visible.items()}
    keep_corrections(folder)
    for part in (*PARTS_OF_EXPORTS, "training"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True, exist_ok=True)
    for image in tqdm(images, desc="exports"):
        instances, name = visible[image.image_id], image_stem(image.path)
        while name.casefold() in (row["image"].casefold() for row in counts):
            name += f"-{image.image_id}"
        paths = {part: folder / part / f"{name}{end}" for part, end in PARTS_OF_EXPORTS.items()}
        values, pixels = read_image_values(image.path, config.channels)
        with name_file(image.path):
            require(pixels.shape[1:] == instances.size, f"{pixels.shape}, not as predicted.")
        um = config.um_per_px or read_pixel_size(image.path)
        ums |= {um} - {0.0}
        numbers = draw_masks(instances.rles, range(1, len(instances) + 1), *instances.size)
        save_label_image(numbers, paths["labels"], um)
        original = values if config.channels else pixels
        save_training_folder(numbers, instances.labels, original, folder / "training" / name)
        with atomic_write(paths["overlays"]) as partial:
            Image.fromarray(draw_outlines(pixels, instances)).save(partial, "PNG")
        table = measure_cells(numbers, values, um)
        table.insert(0, "image", name)
        table.insert(2, "class", classes[image.image_id])
        table.insert(3, "score", instances.scores.astype(float).round(4))
        polygons = [trace_polygons(*crop_mask(rle)) for rle in instances.rles]
        rows = zip(polygons, instances.labels, table.to_dict("records"), strict=True)
        content = dict(type="FeatureCollection", features=[qupath_feature(*row) for row in rows])
        write_json(content, paths["qupath"])
        if importlib.util.find_spec("roifile"):
            names = [f"{k} {kind}".replace("/", "_") for k, kind in enumerate(table["class"], 1)]
            rois = [imagej_roi(*item) for item in zip(polygons, names, strict=True)]
            with atomic_write(paths["rois"]) as partial:
                importlib.import_module("roifile").roiwrite(partial, rois, mode="w")
        tables.append(table)
        per_class = table["class"].value_counts().reindex(kinds, fill_value=0)
        row = dict(image=name, **per_class.set_axis(columns))
        counts.append(row | dict(all=len(table), area_mm2=numbers.size * um**2 / 1e6 or np.nan))
    cells, counts = pd.concat(tables), pd.DataFrame(counts)
    density = counts[[*columns, "all"]].div(counts.area_mm2, axis=0).add_suffix("_per_mm2").round(3)
    counts = counts.join(density).dropna(axis=1, how="all")
    for name, table in (("cells.csv", cells), ("counts.csv", counts)):
        with atomic_write(folder / name) as partial:
            table.to_csv(partial, index=False)
    above = os.path.commonpath([image.path.parent for image in images])
    listing = [(path.relative_to(above).as_posix(), *facts) for path, *facts in images]
    write_json(coco_dataset(visible, listing, categories), folder / "cells.coco.json")
    (folder / ".written").touch()
    hidden = sum(len(predictions[image.image_id]) for image in images) - len(cells)
    print(f"{folder}: {len(cells)} cells of {len(images)} images, {hidden} duplicates left out.")
    if full := sum(len(predictions[image.image_id]) >= config.detections for image in images):
        print(f"WARNING: {full} images may have more cells: raise detections={config.detections}.")
    sizes = ", ".join(f"{um:.4g}" for um in sorted(ums)) or "unknown; set um_per_px"
    print(f"Pixel size in um, by the setting or the files: {sizes}")
    return counts
