"""Exports: one set of cells in all files, checked by hand and by the libraries that read them."""

import csv
from dataclasses import replace
from itertools import pairwise
import json
import math
import os
from pathlib import Path
import tempfile
import time
import tracemalloc
from unicodedata import normalize
import uuid
import warnings

from hypothesis import given, settings, strategies
from hypothesis.extra.numpy import arrays
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
import pycocotools.mask
import pytest
import roifile
from skimage.color import rgb2hed, rgb_from_hed
import tifffile
import torch

from src_snippets.data.drawing import class_color
from src_snippets.data.images import read_image
from src_snippets.data.layouts import ImageRecord, open_dataset
from src_snippets.data.rle import encode_masks, mask_areas
from src_snippets.data.samples import CellSamples
from src_snippets.data.structures import ground_truth, Instances
from src_snippets.export import exports
from src_snippets.export.exports import (
    measure_cells,
    qupath_feature,
    read_pixel_size,
    save_label_image,
    trace_polygons,
    write_exports,
)
from src_snippets.setup.config import BadInput, Config
from src_snippets.training.trainer import train
from tests import readers
from tests.conftest import read_cell_folder

IMAGES = [ImageRecord(Path("a/one.tif"), 5, 6, 8), ImageRecord(Path("b/two.png"), 9, 4, 5)]
CATEGORIES = {3: "T cell, CD8+", 7: "Zelle µ"}
GREY = 200


def save_image(record: ImageRecord, folder: Path, **options) -> ImageRecord:
    """An image as 12 bits of grey, or, with options, as 8 bits in pink."""
    pixels = np.full((record.height, record.width), 4000, np.uint16)
    if options:
        pixels = np.full((record.height, record.width, 3), [255, 200, 230], np.uint8)
    path = folder / record.path
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pixels, **options)
    return record._replace(path=path)


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> list[ImageRecord]:
    folder = tmp_path_factory.mktemp("grey")
    return [save_image(image, folder) for image in IMAGES]


@pytest.fixture(scope="module")
def pink(tmp_path_factory) -> list[ImageRecord]:
    """With a size of 0.25 um per pixel."""
    options = dict(resolution=(40000, 40000), resolutionunit="CENTIMETER", photometric="rgb")
    folder = tmp_path_factory.mktemp("pink")
    return [save_image(image, folder, **options) for image in IMAGES]


def instances_of(masks, scores, labels=None) -> Instances:
    """Instances of (N, H, W) masks, encoded by pycocotools."""
    masks = np.asarray(masks, np.uint8)
    rles = [pycocotools.mask.encode(np.asfortranarray(mask)) for mask in masks]
    rles = [rle | {"counts": rle["counts"].decode()} for rle in rles]
    boxes = np.array([pycocotools.mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([1] * len(masks) if labels is None else labels, np.int64)
    return Instances(boxes, np.array(scores, np.float32), labels, rles, masks.shape[1:])


@pytest.fixture
def predictions() -> dict[int, Instances]:
    """A 2 x 4 cell, one of a pixel that lies on it, two pixels that touch at a corner, a double."""
    masks = np.zeros((4, 6, 8), bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 1, 2] = True
    masks[2, 1:3, 3:6] = True
    masks[3, [4, 5], [0, 1]] = True
    found = instances_of(masks, [0.5, 0.9, 0.4, 0.25], [2, 1, 1, 2])
    return {5: found, 9: instances_of(np.zeros((0, 4, 5), bool), [], [])}


def from_least(rings) -> list[list[tuple[int, int]]]:
    """Rings without their last point, each from its least point on."""
    turned = []
    for ring in rings:
        assert ring[0] == ring[-1]
        points = [tuple(point) for point in ring[:-1]]
        first = points.index(min(points))
        turned.append(points[first:] + points[:first])
    return turned


def polygons_of(rows, top=0, left=0):
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    return [from_least(rings) for rings in trace_polygons(mask, top, left)]


# Outlines


def test_polygons_worked_by_hand():
    assert polygons_of(["#"], 3, 5) == [[[(5, 3), (6, 3), (6, 4), (5, 4)]]]
    assert polygons_of(["##", "#."]) == [[[(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)]]]
    hole = [(1, 1), (1, 2), (2, 2), (2, 1)]
    assert polygons_of(["###", "#.#", "###"]) == [[[(0, 0), (3, 0), (3, 3), (0, 3)], hole]]
    assert polygons_of(["#.#"]) == [
        [[(0, 0), (1, 0), (1, 1), (0, 1)]],
        [[(2, 0), (3, 0), (3, 1), (2, 1)]],
    ]


def test_pixels_that_touch_at_a_corner_do_not_cross():
    assert polygons_of(["#.", ".#"]) == [
        [[(0, 0), (1, 0), (1, 1), (0, 1)]],
        [[(1, 1), (2, 1), (2, 2), (1, 2)]],
    ]
    # A piece that bites its own tail: what it holds is a hole, not a part of the outer ring.
    outer = [(0, 0), (3, 0), (3, 2), (2, 2), (2, 3), (0, 3)]
    hole = [(1, 1), (1, 2), (2, 2), (2, 1)]
    assert polygons_of(["###", "#.#", "##."]) == [[outer, hole]]
    # Two pixels that are missing, with one corner in common: two holes.
    ((_, *holes),) = polygons_of(["####", "#.##", "##.#", "####"])
    assert sorted(holes) == [hole, [(2, 2), (2, 3), (3, 3), (3, 2)]]
    # An island in a hole is a polygon of its own.
    island = polygons_of(["#####", "#...#", "#.#.#", "#...#", "#####"])
    assert [len(rings) for rings in island] == [2, 1]


def inside(rings, height: int, width: int) -> np.ndarray:
    """(H, W) bool, the pixels whose centres are inside: a ray to the left meets an odd number."""
    odd = np.zeros((height, width), bool)
    y, x = np.mgrid[:height, :width] + 0.5
    for ring in rings:
        for (x1, y1), (x2, y2) in pairwise(ring):
            odd ^= (min(y1, y2) < y) & (y < max(y1, y2)) & (x1 == x2) & (x1 < x)
    return odd


def signed_area(ring) -> float:
    """Positive for counter-clockwise, y upwards."""
    x, y = np.array(ring, float).T
    return ((x[:-1] * y[1:]) - (x[1:] * y[:-1])).sum() / 2


@settings(max_examples=100, deadline=None)
@given(arrays(bool, strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9))))
def test_outlines_filled_are_the_mask(pixels):
    mask = np.zeros((13, 12), bool)
    mask[2 : 2 + pixels.shape[0], 3 : 3 + pixels.shape[1]] = pixels
    polygons = trace_polygons(pixels, 2, 3)
    filled = np.zeros(mask.shape, int)
    for outer, *holes in polygons:
        filled += inside([outer, *holes], *mask.shape)
        assert signed_area(outer) > 0
        assert all(signed_area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):
            steps = np.diff(ring, axis=0)
            assert ring[0] == ring[-1]
            assert len({tuple(point) for point in ring}) == len(ring) - 1  # no point twice
            assert ((steps == 0).sum(1) == 1).all()  # along the pixels
            across = steps[:, 0] != 0
            assert (across != np.roll(across, 1)).all()  # each point is a corner
    assert np.array_equal(filled, mask.astype(int))  # each pixel in one polygon


# Measurements


def test_small_intensities_are_kept():
    values = np.full((1, 2, 3), 0.00042, np.float32)
    table = measure_cells(np.ones((2, 3), int), values, 0.0)
    assert table["intensity_1"].tolist() == pytest.approx([0.00042])


def test_measures_worked_by_hand():
    numbers = np.zeros((4, 7), int)
    numbers[1:3, 2:6] = 1
    numbers[0, 0], numbers[3, 6] = 2, 2  # in two pieces
    cell, other = measure_cells(numbers, np.full((3, 4, 7), GREY, np.uint8), 0.5).to_dict("records")
    # Variances of 0..3 and 0..1: 1.25 and 0.25; the ellipse's axes are 4 times their roots.
    expected = dict(cell=1, area_px=8, centroid_x_px=4.0, centroid_y_px=2.0)
    expected |= dict(major_axis_px=round(4 * math.sqrt(1.25), 3), minor_axis_px=2.0, area_um2=2.0)
    expected |= dict(centroid_x_um=2.0, centroid_y_um=1.0, minor_axis_um=1.0, solidity=1.0)
    expected |= dict(left=2, top=1, right=6, bottom=3, intensity_1=GREY)
    expected |= dict(eccentricity=round(math.sqrt(0.8), 3), major_axis_um=2.236)
    assert cell == expected  # a grey image has one channel, and tells nothing of stains
    assert (other["area_px"], other["centroid_x_px"], other["right"]) == (2, 3.5, 7)
    notched = np.array([[1, 0, 1], [1, 1, 1]])  # its hull has the sixth pixel
    (part,) = measure_cells(notched, np.zeros((3, 2, 3), np.uint8), 0).to_dict("records")
    assert (part["solidity"], part["centroid_x_px"], part["centroid_y_px"]) == (0.833, 1.5, 1.1)
    assert not [name for name in part if "_um" in name]
    raw = np.array([[[1, 2, 3000], [1, 1, 1]], [[0.5, 0.5, 0.5], [7, 8, 9]]])
    (part,) = measure_cells(notched, raw, 0).to_dict("records")  # numbers as they are in the file
    assert (part["intensity_1"], part["intensity_2"]) == (3004 / 5, 25 / 5)
    assert "hematoxylin_od" not in part
    nothing = measure_cells(np.zeros((2, 3), int), np.zeros((3, 2, 3), np.uint8), 0.5)
    assert (len(nothing), list(nothing)) == (0, list(cell))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 1)])
def test_thin_cells_have_finite_numbers_and_no_warnings(shape):
    image = np.zeros((3, *shape), np.uint8)
    image[0] = 9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (cell,) = measure_cells(np.ones(shape, int), image, 0.25).to_dict("records")
    assert np.isfinite(list(cell.values())).all()
    assert (cell["area_px"], cell["minor_axis_px"]) == (shape[0] * shape[1], 0.0)


def test_stains_are_those_that_were_mixed():
    amounts = np.array([[0.5, 0.3], [0.0, 0.7], [0.2, 0.0]])
    pixels = np.round(255 * 10 ** -(amounts @ rgb_from_hed[:2])).astype(np.uint8).T[:, None]
    cells = measure_cells(np.array([[1, 2, 3]]), pixels, 0)
    measured = cells[["hematoxylin_od", "eosin_od"]].to_numpy()
    assert np.allclose(measured, amounts, atol=0.01)
    # scikit-image scales by the logarithm of its least value, 1e-6.
    assert np.allclose(
        measured.clip(0), 6 * rgb2hed(np.moveaxis(pixels, 0, 2))[0, :, :2], atol=2e-3
    )


# Label images


def test_label_images_are_read_by_others(tmp_path):
    path, numbers = tmp_path / "x.tif", np.arange(12).reshape(3, 4)
    save_label_image(numbers, path, 0.25)
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray(), numbers)
        assert (page.dtype, page.compression) == (np.uint16, tifffile.COMPRESSION.ADOBE_DEFLATE)
        # As ImageJ writes it: pixels per unit, and the unit in the description
        assert page.tags["XResolution"].value == page.tags["YResolution"].value == (4, 1)
        assert page.tags["ResolutionUnit"].value == 1
        assert file.is_imagej
        assert file.imagej_metadata["unit"] == "um"
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), numbers)
    save_label_image(np.zeros((2, 3), int), path, 0.0)
    assert tifffile.imread(path).tolist() == [[0] * 3] * 2
    assert tifffile.imread(path).dtype == np.uint16
    with tifffile.TiffFile(path) as file:
        assert not file.is_imagej


@pytest.mark.parametrize(("count", "kind"), [(65535, np.uint16), (65536, np.uint32)])
def test_many_cells_have_wider_numbers(count, kind, tmp_path):
    save_label_image(np.array([[0, count]]), tmp_path / "x.tif", 0.5)
    assert tifffile.imread(tmp_path / "x.tif").tolist() == [[0, count]]
    assert tifffile.imread(tmp_path / "x.tif").dtype == kind
    with Image.open(tmp_path / "x.tif") as image:
        assert np.asarray(image).tolist() == [[0, count]]


def test_exports_corrected_by_hand_are_kept(predictions, tmp_path, capsys, pink):
    folder = tmp_path / "exports"
    for _ in range(2):
        write_exports(predictions, pink, folder, CATEGORIES, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["exports"]
    corrected = folder / "training" / "one" / "class1.tif"
    os.utime(corrected, (corrected.stat().st_atime, corrected.stat().st_mtime + 60))
    content = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    write_exports(predictions, pink, folder, CATEGORIES, Config())
    said = capsys.readouterr().out
    (kept,) = (path for path in tmp_path.iterdir() if path != folder)
    assert {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == content
    assert f"exports: changed, or not written to its end; kept as {kept}" in said
    assert (folder / "counts.csv").is_file()


def test_exports_without_an_end_and_of_others_are_kept(predictions, tmp_path, pink):
    """Of a run that was stopped, or a folder that is not ours; a change beside a newer table."""
    folder = tmp_path / "exports"
    (folder / "labels").mkdir(parents=True)
    (folder / "labels" / "mine.tif").touch()
    write_exports(predictions, pink, folder, CATEGORIES, Config())
    (kept,) = (path for path in tmp_path.iterdir() if path != folder)
    assert (kept / "labels" / "mine.tif").exists()
    for name in ("labels/one.tif", "cells.coco.json"):  # the table is the newest
        with (folder / name).open("ab") as file:
            file.write(b" ")
        os.utime(folder / name, (time.time() + 60,) * 2)
    write_exports(predictions, pink, folder, CATEGORIES, Config())
    assert len([path for path in tmp_path.iterdir() if path != folder]) == 2
    (folder / "labels" / ".DS_Store").touch()  # looked at in Finder
    write_exports(predictions, pink, folder, CATEGORIES, Config())
    assert len([path for path in tmp_path.iterdir() if path != folder]) == 2


# All files


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_all_files_hold_the_same_cells(predictions, tmp_path, capsys, pink):
    old = tmp_path / "training" / "old" / "class1.tif"
    old.parent.mkdir(parents=True)
    old.touch()  # of an earlier run
    (tmp_path / ".written").touch()
    counts = write_exports(predictions, pink, tmp_path, CATEGORIES, Config(um_per_px=0.5))
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert there == {
        "labels/one.tif",
        "labels/two.tif",
        "qupath/one.geojson",
        "qupath/two.geojson",
        "rois/one.zip",
        "rois/two.zip",
        "overlays/one.png",
        "overlays/two.png",
        "training/one/image.tif",
        "training/one/class1.tif",
        "training/one/class2.tif",
        "training/two/image.tif",
        "cells.csv",
        "counts.csv",
        "cells.coco.json",
        ".written",
    }
    assert "3 cells of 2 images, 1 duplicates left out" in capsys.readouterr().out
    with (tmp_path / "cells.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [(c["image"], c["cell"], c["class"], c["score"]) for c in cells] == [
        ("one", "1", "Zelle µ", "0.5"),
        ("one", "2", "T cell, CD8+", "0.9"),
        ("one", "3", "Zelle µ", "0.25"),
    ]
    areas = [(float(c["area_px"]), float(c["area_um2"])) for c in cells]
    assert areas == [(7, 1.75), (1, 0.25), (2, 0.5)]  # the second has a pixel of the first
    assert [(c["centroid_x_px"], c["centroid_y_um"]) for c in cells][1] == ("2.5", "0.75")
    assert not [value for cell in cells for value in cell.values() if value in ("", "nan", None)]
    # 48 and 20 pixels of 0.25 um2
    density = ["T cell, CD8+_per_mm2", "Zelle µ_per_mm2", "all_per_mm2"]
    assert read_rows(tmp_path / "counts.csv") == [
        ["image", "T cell, CD8+", "Zelle µ", "all", "area_mm2", *density],
        ["one", "1", "2", "3", "1.2e-05", "83333.333", "166666.667", "250000.0"],
        ["two", "0", "0", "0", "5e-06", "0.0", "0.0", "0.0"],
    ]
    assert counts["all"].tolist() == [3, 0]
    labels = tifffile.imread(tmp_path / "labels" / "one.tif")
    expected = np.zeros((6, 8), int)
    expected[1:3, 2:6], expected[1, 2], expected[[4, 5], [0, 1]] = 1, 2, 3
    assert np.array_equal(labels, expected)
    assert not tifffile.imread(tmp_path / "labels" / "two.tif").any()


def test_without_a_pixel_size_nothing_is_in_um(predictions, tmp_path, grey):
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    header, *rows = read_rows(tmp_path / "cells.csv")
    assert header[:5] == ["image", "cell", "class", "score", "area_px"]
    assert header[-2:] == ["right", "intensity_1"]  # no stains without colour
    assert {row[-1] for row in rows} == {"4000.0"}  # as in the file of 12 bits
    assert not [name for name in header if "um" in name]
    assert {len(row) for row in rows} == {len(header)}
    assert read_rows(tmp_path / "counts.csv")[1] == ["one", "1", "2", "3"]


def test_channels_stay_in_tables_and_in_what_is_trained_on(predictions, tmp_path):
    planes = np.arange(2 * 48, dtype=np.uint16).reshape(2, 6, 8) * 500
    source = tmp_path / "one.tif"
    images = [IMAGES[0]._replace(path=source)]
    tifffile.imwrite(source, planes, photometric="minisblack")
    config = Config(channels=(2, 1))
    folder = tmp_path / "exports"
    write_exports(predictions, images, folder, CATEGORIES, config)
    header, *rows = read_rows(folder / "cells.csv")
    assert header[-2:] == ["intensity_1", "intensity_2"]
    assert [float(row[-1]) - float(row[-2]) for row in rows] == [24_000.0] * 3
    copy = folder / "training" / "one" / "image.tif"
    assert np.array_equal(tifffile.imread(copy), planes)
    assert np.array_equal(read_image(copy, (2, 1)), read_image(source, (2, 1)))
    dark = np.full((6, 8, 3), 40, np.uint8)
    dark[..., 1] = 90
    tifffile.imwrite(source, dark, photometric="rgb")  # fluorescence has no stains
    write_exports(predictions, images, folder, CATEGORIES, Config())
    assert read_rows(folder / "cells.csv")[0][-3:] == [f"intensity_{k}" for k in (1, 2, 3)]


def test_the_pixel_size_of_each_file_counts_where_none_is_set(
    predictions, tmp_path, grey, pink, capsys
):
    images = [pink[0], grey[1]]
    counts = write_exports(predictions, images, tmp_path, CATEGORIES, Config())
    assert "Pixel size in um, by the setting or the files: 0.25\n" in capsys.readouterr().out
    assert counts["area_mm2"].tolist()[0] == pytest.approx(48 / 16e6)
    assert math.isnan(counts["area_mm2"][1])
    assert math.isnan(counts["all_per_mm2"][1])
    with tifffile.TiffFile(tmp_path / "labels" / "one.tif") as file:
        assert file.pages[0].tags["XResolution"].value == (4, 1)
    write_exports(
        predictions, images[:1], tmp_path, CATEGORIES, Config(um_per_px=0.5)
    )  # the setting wins
    header, row, *_ = read_rows(tmp_path / "cells.csv")
    assert float(row[header.index("area_um2")]) == 7 / 4


def test_training_folders_and_rois_are_the_label_image(predictions, tmp_path, pink):
    """Pixel for pixel, ids and classes too, as the reader of datasets and as ImageJ see them."""
    write_exports(predictions, pink, tmp_path, CATEGORIES, Config())
    labels = tifffile.imread(tmp_path / "labels" / "one.tif")
    folder = tmp_path / "training" / "one"
    sample = read_cell_folder(folder, 2)
    assert torch.equal(sample.image, torch.from_numpy(read_image(pink[0].path)))
    assert sample.labels.tolist() == [1, 2, 2]  # classes in the order of CATEGORIES
    for number, label in ((1, 2), (2, 1), (3, 2)):
        own = tifffile.imread(folder / f"class{label}.tif") == number
        assert np.array_equal(own, labels == number)
    rois = roifile.roiread(tmp_path / "rois" / "one.zip")
    assert [roi.name for roi in rois] == ["1 Zelle µ", "2 T cell, CD8+", "3 Zelle µ"]
    for number, roi in enumerate(rois, start=1):
        rings = roi.coordinates(multi=True)
        rings = rings if isinstance(rings, list) else [np.append(rings, rings[:1], axis=0)]
        assert np.array_equal(inside(rings, 6, 8), labels == number)
        y, x = np.nonzero(labels == number)
        assert (roi.left, roi.top) == (x.min(), y.min())
    assert roifile.roiread(tmp_path / "rois" / "two.zip") == []
    with Image.open(tmp_path / "overlays" / "one.png") as image:
        assert image.size[0] % 8 == 0
        assert image.size[0] / 8 == image.size[1] / 6


def test_a_correction_is_in_the_next_training(tiny_config, demo_samples, tmp_path):
    """Predicted, exported, one cell given another class and outline in its file, trained on."""
    sample = demo_samples[1]
    path = tmp_path / "first.tif"
    path.write_bytes(sample.path.read_bytes())
    image = ImageRecord(path, 1, *sample.size)
    kinds = dict(enumerate(tiny_config.class_names, start=1))
    write_exports({1: ground_truth(sample)}, [image], tmp_path, kinds, Config())
    (tmp_path / "training").rename(tmp_path / "train")
    before = CellSamples(open_dataset(tmp_path, tiny_config), 1.0)
    assert torch.equal(before[0].image, sample.image)
    label = int(sample.labels[0])
    paths = [tmp_path / "train" / "first" / f"class{k}.tif" for k in (label, label % 4 + 1)]
    maps = [tifffile.imread(path) for path in paths]
    cell = maps[0] == maps[0][maps[0] > 0][0]
    maps[0][cell] = 0
    y, x = np.nonzero(cell)
    maps[1][y[: len(y) // 2], x[: len(y) // 2]] = 999
    for path, ids in zip(paths, maps, strict=True):
        tifffile.imwrite(path, ids)
    after = CellSamples(open_dataset(tmp_path, tiny_config), 1.0)
    moved = np.subtract(after.counts, before.counts)[0].tolist()
    assert moved == [-(k == label) + (k == label % 4 + 1) for k in range(5)]
    assert len(y) // 2 in mask_areas(ground_truth(after[0]).rles)
    config, both = replace(tiny_config, epochs=1), (before, after)
    runs = [train(config, samples, [], tmp_path / samples.digest) for samples in both]
    assert runs[0][-1]["loss"] != runs[1][-1]["loss"]


def test_readers_of_others_are_asked(predictions, tmp_path, grey, capsys):
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    assert readers.main([str(tmp_path), str(tmp_path)]) == 0
    assert "roifile: 3 of 3 cells" in capsys.readouterr().out
    (tmp_path / "rois" / "one.zip").unlink()
    assert readers.main([str(tmp_path), str(tmp_path)]) == 1


def test_without_roifile_there_are_no_rois(predictions, tmp_path, monkeypatch, grey):
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    assert list((tmp_path / "rois").iterdir()) == []


def test_qupath_gets_a_feature_a_cell(predictions, tmp_path, grey):
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    path = tmp_path / "qupath" / "one.geojson"
    collection = json.loads(path.read_text())
    assert collection["type"] == "FeatureCollection"
    first, second, third = collection["features"]
    assert {f["type"] for f in collection["features"]} == {"Feature"}
    assert first["geometry"]["type"] == second["geometry"]["type"] == "Polygon"
    assert from_least(second["geometry"]["coordinates"]) == [[(2, 1), (3, 1), (3, 2), (2, 2)]]
    assert third["geometry"]["type"] == "MultiPolygon"
    assert [from_least(rings) for rings in third["geometry"]["coordinates"]] == [
        [[(0, 4), (1, 4), (1, 5), (0, 5)]],
        [[(1, 5), (2, 5), (2, 6), (1, 6)]],
    ]
    properties = second["properties"]
    assert (properties["objectType"], properties["name"]) == ("annotation", "2")
    kind = properties["classification"]
    assert kind["name"] == "T cell, CD8+"
    assert "#" + bytes(kind["color"]).hex() == class_color(1)
    assert (properties["measurements"]["score"], properties["measurements"]["area_px"]) == (0.9, 1)
    assert {type(v) for v in properties["measurements"].values()} <= {int, float}
    assert "hematoxylin_od" not in properties["measurements"]
    assert {"image", "cell", "class"}.isdisjoint(properties["measurements"])
    ids = [uuid.UUID(f["id"]) for f in collection["features"]]
    assert len(set(ids)) == 3
    before = path.read_bytes()
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    assert path.read_bytes() == before
    other = json.loads((tmp_path / "qupath" / "two.geojson").read_text())
    assert other == {"type": "FeatureCollection", "features": []}


def test_pycocotools_opens_the_dataset(predictions, tmp_path, capsys, grey):
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    coco = COCO(tmp_path / "cells.coco.json")
    assert coco.loadCats(coco.getCatIds()) == [
        {"id": 3, "name": "T cell, CD8+"},
        {"id": 7, "name": "Zelle µ"},
    ]
    assert coco.loadImgs(9) == [{"id": 9, "file_name": "b/two.png", "height": 4, "width": 5}]
    rows = coco.loadAnns(coco.getAnnIds(imgIds=5))
    assert [row["category_id"] for row in rows] == [7, 3, 7]
    assert [row["area"] for row in rows] == [7, 1, 2]
    assert [row["score"] for row in rows] == pytest.approx([0.5, 0.9, 0.25])
    assert [(row["bbox"], row["iscrowd"]) for row in rows[1:2]] == [([2, 1, 1, 1], 0)]
    labels = tifffile.imread(tmp_path / "labels" / "one.tif")
    drawn = np.array([coco.annToMask(row) for row in rows])
    assert np.array_equal(drawn, [labels == number for number in (1, 2, 3)])
    assert coco.getAnnIds(imgIds=9) == []
    assert coco.getAnnIds(catIds=3) == [rows[1]["id"]]


@pytest.mark.parametrize("name", ["x$1$ y", normalize("NFD", "ä"), "a%20b", "細" * 80, "A.B"])
def test_names_of_all_kinds(name, predictions, tmp_path, grey):
    image = save_image(IMAGES[0]._replace(path=Path(f"{name}.PNG")), tmp_path / "images")
    counts = write_exports(predictions, [image], tmp_path, {3: "$x$", 7: "größe, 'b'"}, Config())
    assert counts["image"].tolist() == [name]
    assert {"$x$", "größe, 'b'"} < set(counts)
    assert (
        tifffile.imread(tmp_path / "labels" / f"{name}.tif").max()
        == len(read_rows(tmp_path / "cells.csv")) - 1
    )
    assert (tmp_path / "qupath" / f"{name}.geojson").is_file()
    content = json.loads((tmp_path / "cells.coco.json").read_text(encoding="utf-8"))
    assert content["images"][0]["file_name"] == f"{name}.PNG"
    assert [row["name"] for row in content["categories"]] == ["$x$", "größe, 'b'"]


def test_classes_called_as_other_columns(predictions, tmp_path, grey):
    counts = write_exports(predictions, grey, tmp_path, {3: "all", 7: "image"}, Config())
    columns = ["image", "class all", "class image", "all"]
    assert list(counts)[:4] == columns
    assert (counts["class all"] + counts["class image"] == counts["all"]).all()
    assert {row[2] for row in read_rows(tmp_path / "cells.csv")[1:]} == {"all", "image"}


def test_counts_that_the_maximum_may_have_cut_are_told(predictions, tmp_path, grey, capsys):
    most = max(len(predictions[image.image_id]) for image in grey)
    for detections, told in ((most + 1, False), (most, True)):
        write_exports(predictions, grey, tmp_path, CATEGORIES, Config(detections=detections))
        text = f"WARNING: 1 images may have more cells: raise detections={most}"
        assert (text in capsys.readouterr().out) is told


def test_no_cells_at_all(predictions, tmp_path, grey):
    counts = write_exports(predictions, grey[1:], tmp_path, CATEGORIES, Config())
    assert len(read_rows(tmp_path / "cells.csv")) == 1
    assert counts.to_numpy().tolist() == [["two", 0, 0, 0]]
    assert json.loads((tmp_path / "cells.coco.json").read_text())["annotations"] == []


def test_images_of_one_name_get_files_of_their_own(predictions, tmp_path, grey):
    records = [IMAGES[1]._replace(path=Path(name), image_id=9) for name in ("one-8.png", "ONE.png")]
    others = [save_image(record, tmp_path / record.path.stem) for record in records]
    images = [grey[0], others[0], others[1]._replace(image_id=8)]
    write_exports(predictions | {8: predictions[9]}, images, tmp_path, CATEGORIES, Config())
    names = ["one", "one-8", "ONE-8-8"]
    assert {p.stem for p in (tmp_path / "labels").iterdir()} == {*names}
    assert [row[0] for row in read_rows(tmp_path / "counts.csv")[1:]] == names


def test_bad_predictions_are_refused_before_anything_is_written(predictions, tmp_path, grey):
    for wrong, categories in (({5: predictions[5]}, CATEGORIES), (predictions, {3: "one"})):
        with pytest.raises(LookupError):
            write_exports(wrong, grey, tmp_path, categories, Config())
    assert list(tmp_path.iterdir()) == []


def test_tables_are_whole_or_as_they_were(predictions, tmp_path, grey, pink):
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.csv")}

    images = [grey[0], pink[0]._replace(image_id=9)]
    with pytest.raises(BadInput, match=r"one\.tif: \(3, 6, 8\), not as predicted"):
        write_exports(predictions, images, tmp_path, CATEGORIES, Config(um_per_px=0.5))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.csv")} == before
    assert len(before) == 2
    assert not list(tmp_path.rglob(".*.partial"))


@settings(max_examples=15, deadline=None)
@given(strategies.integers(0, 2**31), strategies.integers(0, 6))
def test_whatever_was_predicted_is_exported_alike(seed, count):
    """Any masks, with holes and in pieces: outlines, label image, tables and COCO agree."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, 6, 8)) < rng.uniform(0.05, 0.9)
    masks = masks[masks.any((1, 2))]
    found = instances_of(masks, rng.permutation(len(masks)) / 8, rng.integers(1, 3, len(masks)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = save_image(IMAGES[0], folder)
        write_exports({5: found}, [image], folder, CATEGORIES, Config(um_per_px=0.25))
        labels = tifffile.imread(folder / "labels" / "one.tif")
        features = json.loads((folder / "qupath" / "one.geojson").read_text())["features"]
        rows = read_rows(folder / "cells.csv")[1:]
        counts = read_rows(folder / "counts.csv")[1]
        known = json.loads((folder / "cells.coco.json").read_text())["annotations"]
    filled = np.zeros((len(features), 6, 8), int)
    for cell, feature in zip(filled, features, strict=True):
        shapes = feature["geometry"]["coordinates"]
        for rings in [shapes] if feature["geometry"]["type"] == "Polygon" else shapes:
            cell += inside(rings, 6, 8)
    numbers = np.arange(1, len(features) + 1)
    assert np.array_equal(filled, labels == numbers[:, None, None])
    areas = filled.sum((1, 2)).tolist()
    assert [float(row[4]) for row in rows] == [row["area"] for row in known] == areas
    assert int(counts[3]) == len(rows) == len(known) == labels.max()
    assert all(areas)
    for row, cell in zip(known, filled, strict=True):
        y, x = np.nonzero(cell)
        size = [int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
        assert row["bbox"] == [x.min(), y.min(), *size]  # tight


def test_memory_does_not_grow_with_cells_times_pixels(predictions, tmp_path, grey):
    """300 cells in 300 x 300 pixels would be 27 MB as bytes, 216 MB as floats."""
    places = [(y, x) for y in range(0, 300, 20) for x in range(0, 300, 15)]
    masks = np.ones((len(places), 3, 3), bool)
    rles = encode_masks(masks, *np.array(places).T, 300, 300)
    boxes = np.array([[x, y, x + 3, y + 3] for y, x in places], np.float32)
    labels = np.ones(len(rles), np.int64)
    found = Instances(boxes, labels.astype(np.float32), labels, rles, (300, 300))
    image = save_image(ImageRecord(Path("x.tif"), 1, 300, 300), tmp_path)
    write_exports(predictions, grey, tmp_path, CATEGORIES, Config())  # loads what is used first
    tracemalloc.start()
    write_exports({1: found}, [image], tmp_path, CATEGORIES, Config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(places) == 300
    assert peak < 25e6


# Pixel size

OME = '<OME><Image><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.5"{}/></Image></OME>'
PREVIEW = '<Image><Pixels PhysicalSizeX="8" PhysicalSizeXUnit="mm"/></Image></OME>'


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(), 0),
        (dict(resolution=(300, 300), resolutionunit="INCH"), 0),  # of a printer
        (dict(resolution=(50800, 50800), resolutionunit="INCH"), 0.5),
        (dict(resolution=(40000, 40000), resolutionunit="CENTIMETER"), 0.25),
        (dict(resolution=(40000, 20000), resolutionunit="CENTIMETER"), 0),  # two sizes
        (dict(imagej=True, resolution=(4, 4), metadata=dict(unit="um")), 0.25),
        (dict(imagej=True, resolution=(4, 4), metadata=dict(unit="\\u00B5m")), 0.25),
        (dict(imagej=True, resolution=(4000, 4000), metadata=dict(unit="mm")), 0.25),
        (dict(imagej=True, resolution=(4, 4)), 0),  # of no unit
        (dict(imagej=True, resolution=(1, 1), metadata=dict(unit="pixel")), 0),
        (dict(description=OME.format("")), 0.5),
        (dict(description=OME.format("").replace("</OME>", PREVIEW)), 0.5),  # of the first image
        (dict(description=OME.format(' PhysicalSizeXUnit="nm"')), 0),
        (dict(description=OME.format(' PhysicalSizeXUnit="&#181;m"')), 0.5),  # of ElementTree
        (dict(description=OME.replace("0.5", "500").format(' PhysicalSizeXUnit="nm"')), 0.5),
    ],
)
def test_pixel_sizes_by_the_tags(options, size, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 5), np.uint8), **dict(metadata=None) | options)
    assert read_pixel_size(path) == pytest.approx(size)


def test_the_pixel_size_is_that_of_the_largest_page(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for side in (8, 32):  # a preview comes first
            options = dict(resolution=(1250 * side,) * 2, resolutionunit="CENTIMETER")
            file.write(np.zeros((side, side), np.uint8), metadata=None, **options)
    assert read_pixel_size(tmp_path / "a.tif") == 0.25


def test_measurements_that_are_not_finite_are_left_out_of_geojson():
    cell = {"image": "a", "cell": 1, "class": "x", "score": 0.5, "area_px": 4}
    cell |= dict(intensity_1=np.inf, intensity_2=np.nan)
    feature = qupath_feature([[[[0, 0], [2, 0], [2, 2], [0, 0]]]], 1, cell)
    assert feature["properties"]["measurements"] == {"score": 0.5, "area_px": 4}


def test_other_files_tell_no_pixel_size(tmp_path):
    Image.new("RGB", (4, 5)).save(tmp_path / "a.png")
    assert read_pixel_size(tmp_path / "a.png") == 0
