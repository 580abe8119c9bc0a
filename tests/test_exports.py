import csv
from itertools import pairwise
import json
import math
from pathlib import Path
import tempfile
import tracemalloc
import uuid
import warnings

from hypothesis import given, settings, strategies
from hypothesis.extra.numpy import arrays
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
import pycocotools.mask
import pytest
from skimage.color import rgb2hed, rgb_from_hed
import tifffile

from src_snippets import exports
from src_snippets.datasets import ImageRecord
from src_snippets.exports import (
    cell_features,
    coco_dataset,
    count_cells,
    crop_mask,
    export_names,
    measure_cell,
    save_labels,
    split_ring,
    trace_edges,
    trace_polygons,
    unmix_stains,
    write_exports,
)
from src_snippets.forms import Instances
from src_snippets.plots import class_color
from src_snippets.rle import encode_crop
from src_snippets.writers import BadResults

IMAGES = [ImageRecord(Path("a/one.tif"), 5, 6, 8), ImageRecord(Path("b/two.png"), 9, 4, 5)]
CATEGORIES = {3: "T cell, CD8+", 7: "Zelle µ"}
GREY = 200


def read_grey(image: ImageRecord) -> np.ndarray:
    return np.full((3, image.height, image.width), GREY, np.uint8)


def read_pink(image: ImageRecord) -> np.ndarray:
    return read_grey(image) + np.array([60, 0, 30], np.uint8)[:, None, None]


def answer_of(masks, scores, labels=None) -> Instances:
    """An answer of (N, H, W) masks, encoded by pycocotools."""
    masks = np.asarray(masks, np.uint8)
    rles = [pycocotools.mask.encode(np.asfortranarray(mask)) for mask in masks]
    rles = [rle | {"counts": rle["counts"].decode()} for rle in rles]
    boxes = np.array([pycocotools.mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([1] * len(masks) if labels is None else labels, np.int64)
    return Instances(boxes, np.array(scores, np.float32), labels, rles, masks.shape[1:])


@pytest.fixture
def answers() -> dict[int, Instances]:
    """A 2 x 4 cell, one of a pixel that lies on it, and two pixels that touch at a corner."""
    masks = np.zeros((3, 6, 8), bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 1, 2] = True
    masks[2, [4, 5], [0, 1]] = True
    found = answer_of(masks, [0.5, 0.9, 0.25], [2, 1, 2])
    return {5: found, 9: answer_of(np.zeros((0, 4, 5), bool), [], [])}


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


def test_a_mask_is_cut_out():
    mask, top, left = crop_mask(encode_crop(np.eye(2, dtype=bool), 3, 1, 6, 8))
    assert (mask.tolist(), top, left) == ([[True, False], [False, True]], 3, 1)
    full = np.ones((6, 8), bool)  # one run over all columns
    assert crop_mask(encode_crop(full, 0, 0, 6, 8))[0].shape == (6, 8)


def test_edges_of_one_pixel():
    ends, following, bends = trace_edges(np.ones((1, 1), bool))
    # Corners 0 1 / 2 3; the edges right, down, left and up, each from one to the next.
    assert ends.tolist() == [1, 3, 2, 0]
    assert following.tolist() == [1, 2, 3, 0]
    assert bends.all()


def test_rings_are_cut_where_they_meet_themselves():
    assert split_ring([]) == []
    assert split_ring([1, 2, 3]) == [[1, 2, 3, 1]]
    assert split_ring([1, 2, 3, 4, 2, 5]) == [[2, 3, 4, 2], [1, 2, 5, 1]]


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


@settings(max_examples=300, deadline=None)
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


def test_measures_worked_by_hand():
    pixels = np.full((3, 2, 4), GREY, np.uint8)
    cell = measure_cell(np.ones((2, 4), bool), pixels, 1, 2, 0.5)
    # Variances of 0..3 and 0..1: 1.25 and 0.25; the ellipse's axes are 4 times their roots.
    expected = dict(area_px=8, centroid_x_px=4.0, centroid_y_px=2.0)
    expected |= dict(major_axis_px=round(4 * math.sqrt(1.25), 3), minor_axis_px=2.0, area_um2=2.0)
    expected |= dict(centroid_x_um=2.0, centroid_y_um=1.0, minor_axis_um=1.0, solidity=1.0)
    expected |= dict(left_px=2, top_px=1, right_px=6, bottom_px=3)
    expected |= dict(eccentricity=round(math.sqrt(0.8), 3), major_axis_um=2.236)
    assert {name: cell[name] for name in expected} == expected
    assert cell["intensity"] == GREY
    assert set(cell) - set(expected) == {"intensity", "hematoxylin_od", "eosin_od"}
    notched = np.array([[1, 0, 1], [1, 1, 1]], bool)  # its hull has the sixth pixel
    part = measure_cell(notched, pixels[:, :, :3], 0, 0, 0.0)
    assert (part["solidity"], part["centroid_x_px"], part["centroid_y_px"]) == (0.833, 1.5, 1.1)
    assert not [name for name in part if "_um" in name]


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 1)])
def test_thin_cells_have_finite_numbers_and_no_warnings(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cell = measure_cell(np.ones(shape, bool), np.zeros((3, *shape), np.uint8), 0, 0, 0.25)
    assert np.isfinite(list(cell.values())).all()
    assert (cell["area_px"], cell["minor_axis_px"]) == (shape[0] * shape[1], 0.0)


def test_stains_are_those_that_were_mixed():
    amounts = np.array([[0.5, 0.3], [0.0, 0.7], [0.2, 0.0]])
    mixed = 256 * 10 ** -(amounts @ rgb_from_hed[:2]) - 1
    pixels = np.round(mixed).astype(np.uint8).T[:, None]
    assert np.allclose(unmix_stains(pixels)[0], amounts, atol=0.01)
    # skimage scales by the logarithm of its least value, 1e-6, and counts from 0 in place of 1.
    other = 6 * rgb2hed(np.moveaxis(pixels, 0, 2))[0, :, :2]
    assert np.allclose(unmix_stains(pixels)[0].clip(0), other, atol=0.02)
    assert np.allclose(unmix_stains(np.full((3, 1, 1), 255, np.uint8)), 0)


def test_the_table_measures_the_cells_own_pixels():
    pixels = np.full((3, 6, 8), 255, np.uint8)
    pixels[:2, 2, 3] = 80  # blue
    found = answer_of(np.eye(48, dtype=bool)[[19, 20]].reshape(2, 6, 8), [0.5, 0.5])
    dark, pale = (
        f["properties"]["measurements"] for f in cell_features(found, pixels, "x", ["a"], 0.0)
    )
    assert (dark["left_px"], dark["top_px"]) == (3, 2)
    assert dark["hematoxylin_od"] > 0.3
    assert pale["hematoxylin_od"] == 0


def test_label_images_are_read_by_others(answers, tmp_path):
    path = tmp_path / "x.tif"
    save_labels(answers[5], path, 0.25)
    expected = np.zeros((6, 8), int)
    expected[1:3, 2:6] = 1
    expected[1, 2] = 2  # scores more
    expected[[4, 5], [0, 1]] = 3
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray(), expected)
        assert (page.dtype, page.compression) == (np.uint16, tifffile.COMPRESSION.ADOBE_DEFLATE)
        assert page.tags["XResolution"].value == page.tags["YResolution"].value == (40000, 1)
        assert page.tags["ResolutionUnit"].value == 3  # centimetres
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), expected)
        assert image.info["dpi"] == pytest.approx((101600, 101600))
    save_labels(answers[9], path, 0.0)
    assert np.array_equal(tifffile.imread(path), np.zeros((4, 5)))
    with Image.open(path) as image:
        assert image.info.get("dpi", (1, 1)) == (1, 1)


def test_many_cells_have_wider_numbers(tmp_path, monkeypatch):
    drawn = np.array([[[0, 0], [0, 65536]]])
    monkeypatch.setattr(exports, "label_image", lambda found: drawn)
    rles = [encode_crop(np.ones((1, 1), bool), 0, 0, 1, 2)] * 65536
    zeros = np.zeros(65536, np.int64)
    found = Instances(np.zeros((65536, 4), np.float32), zeros, zeros + 1, rles, (1, 2))
    save_labels(found, tmp_path / "x.tif", 0.0)
    assert tifffile.imread(tmp_path / "x.tif").tolist() == [[0, 65536]]
    assert tifffile.imread(tmp_path / "x.tif").dtype == np.uint32
    with Image.open(tmp_path / "x.tif") as image:
        assert np.asarray(image).tolist() == [[0, 65536]]


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_all_files_are_written_and_read_back(answers, tmp_path, capsys):
    paths = write_exports(answers, IMAGES, read_pink, tmp_path, CATEGORIES, 0.5)
    there = {path.relative_to(tmp_path).as_posix() for path in paths}
    assert there == {
        "labels/one.tif",
        "labels/two.tif",
        "qupath/one.geojson",
        "qupath/two.geojson",
        "cells.csv",
        "counts.csv",
        "cells.coco.json",
    }
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(paths)
    assert "3 cells of 2 images exported" in capsys.readouterr().out
    with (tmp_path / "cells.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert [(c["image"], c["cell"], c["class"], c["score"]) for c in cells] == [
        ("one", "1", "Zelle µ", "0.5"),
        ("one", "2", "T cell, CD8+", "0.9"),
        ("one", "3", "Zelle µ", "0.25"),
    ]
    assert [(c["area_px"], c["area_um2"]) for c in cells] == [
        ("8", "2.0"),
        ("1", "0.25"),
        ("2", "0.5"),
    ]
    assert [(c["centroid_x_px"], c["centroid_y_um"]) for c in cells][1] == ("2.5", "0.75")
    assert not [value for cell in cells for value in cell.values() if value in ("", "nan", None)]
    # 48 and 20 pixels of 0.25 um2
    density = ["T cell, CD8+_per_mm2", "Zelle µ_per_mm2", "all_per_mm2"]
    assert read_rows(tmp_path / "counts.csv") == [
        ["image", "T cell, CD8+", "Zelle µ", "all", "area_mm2", *density],
        ["one", "1", "2", "3", "1.2e-05", "83333.333", "166666.667", "250000.0"],
        ["two", "0", "0", "0", "5e-06", "0.0", "0.0", "0.0"],
    ]


def test_without_a_pixel_size_nothing_is_in_um(answers, tmp_path):
    write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES)
    header, *rows = read_rows(tmp_path / "cells.csv")
    assert header[:5] == ["image", "cell", "class", "score", "area_px"]
    assert header[-3:] == ["intensity", "hematoxylin_od", "eosin_od"]
    assert {(*row[-3:],) for row in rows} == {(f"{GREY:.1f}", "", "")}  # no stains without colour
    assert not [name for name in header if "um" in name]
    assert {len(row) for row in rows} == {len(header)}
    assert read_rows(tmp_path / "counts.csv")[1] == ["one", "1", "2", "3"]


def test_qupath_gets_a_feature_a_cell(answers, tmp_path):
    write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES)
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
    assert (properties["objectType"], properties["name"]) == ("detection", "2")
    kind = properties["classification"]
    assert kind["name"] == "T cell, CD8+"
    assert "#" + bytes(kind["color"]).hex() == class_color(1)
    assert (properties["measurements"]["score"], properties["measurements"]["area_px"]) == (0.9, 1)
    assert {type(v) for v in properties["measurements"].values()} <= {int, float}
    assert "hematoxylin_od" not in properties["measurements"]
    ids = [uuid.UUID(f["id"]) for f in collection["features"]]
    assert len(set(ids)) == 3
    assert {number.version for number in ids} == {5}
    before = path.read_bytes()
    write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES)
    assert path.read_bytes() == before
    other = json.loads((tmp_path / "qupath" / "two.geojson").read_text())
    assert other == {"type": "FeatureCollection", "features": []}


def test_ids_tell_cells_masks_and_images_apart():
    square, row = np.ones((2, 2), bool), np.array([[1, 1], [0, 0]], bool)
    pixels = np.zeros((3, 2, 2), np.uint8)

    def ids(name, masks):
        found = answer_of(masks, [0.5] * len(masks))
        return [feature["id"] for feature in cell_features(found, pixels, name, ["a"], 0.0)]

    known = ids("x", [square, square])
    assert known == ids("x", [square, square])
    assert len({*known, *ids("x", [row]), *ids("y", [square])}) == 4


def test_pycocotools_opens_the_dataset(answers, tmp_path, capsys):
    write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES)
    coco = COCO(tmp_path / "cells.coco.json")
    assert coco.loadCats(coco.getCatIds()) == [
        {"id": 3, "name": "T cell, CD8+"},
        {"id": 7, "name": "Zelle µ"},
    ]
    assert coco.loadImgs(9) == [{"id": 9, "file_name": "b/two.png", "height": 4, "width": 5}]
    rows = coco.loadAnns(coco.getAnnIds(imgIds=5))
    assert [row["category_id"] for row in rows] == [7, 3, 7]
    assert [row["area"] for row in rows] == [8, 1, 2]
    assert [row["score"] for row in rows] == pytest.approx([0.5, 0.9, 0.25])
    assert [(row["bbox"], row["iscrowd"]) for row in rows[:1]] == [([2, 1, 4, 2], 0)]
    drawn = np.array([coco.annToMask(row) for row in rows])
    assert np.array_equal(drawn, [pycocotools.mask.decode(rle) for rle in answers[5].rles])
    assert coco.getAnnIds(imgIds=9) == []
    assert coco.getAnnIds(catIds=3) == [rows[1]["id"]]


def test_no_cells_and_no_images(tmp_path):
    paths = write_exports({}, [], read_grey, tmp_path, CATEGORIES, 0.5)
    assert sorted(p.name for p in paths) == ["cells.coco.json", "cells.csv", "counts.csv"]
    empty = {9: answer_of(np.zeros((0, 4, 5), bool), [], [])}
    write_exports(empty, IMAGES[1:], read_grey, tmp_path, CATEGORIES)
    assert len(read_rows(tmp_path / "cells.csv")) == 1
    assert tifffile.imread(tmp_path / "labels" / "two.tif").dtype == np.uint16
    assert json.loads((tmp_path / "cells.coco.json").read_text())["annotations"] == []
    assert count_cells(empty[9], 2, 0.0) == [0, 0, 0]


def test_images_of_one_name_get_files_of_their_own(answers, tmp_path):
    images = [IMAGES[0], ImageRecord(Path("c/ONE.png"), 9, 4, 5)]
    assert export_names(IMAGES) == ["one", "two"]
    assert export_names(images) == ["one-5", "ONE-9"]
    write_exports(answers, images, read_grey, tmp_path, CATEGORIES)
    assert sorted(p.name for p in (tmp_path / "labels").iterdir()) == ["ONE-9.tif", "one-5.tif"]
    assert [row[0] for row in read_rows(tmp_path / "counts.csv")[1:]] == ["one-5", "ONE-9"]


def test_bad_answers_are_refused_before_anything_is_written(answers, tmp_path):
    with pytest.raises(BadResults, match="No answer for 1 images, the first with id 9"):
        write_exports({5: answers[5]}, IMAGES, read_grey, tmp_path, CATEGORIES)
    with pytest.raises(BadResults, match=r"one\.tif, entry 1: category_id 2; expected one of 1"):
        write_exports(answers, IMAGES, read_grey, tmp_path, {3: "one"})
    hollow = answer_of(np.zeros((1, 4, 5), bool), [0.5])
    with pytest.raises(BadResults, match=r"two\.png, entry 4"):
        coco_dataset(answers | {9: hollow}, IMAGES, CATEGORIES)
    for size in (-0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"um_per_px={size}: expected"):
            write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES, size)
    assert list(tmp_path.iterdir()) == []


def test_tables_are_whole_or_as_they_were(answers, tmp_path):
    write_exports(answers, IMAGES, read_grey, tmp_path, CATEGORIES)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.csv")}

    def read_first(image):
        return read_grey(image)[:, : 6 if image.image_id == 5 else 3]

    with pytest.raises(BadResults, match=r"two\.png: read as \(3, 3, 5\); .* of \(4, 5\)"):
        write_exports(answers, IMAGES, read_first, tmp_path, CATEGORIES, 0.5)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.csv")} == before
    assert len(before) == 2
    assert not list(tmp_path.rglob(".*.partial"))


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.integers(0, 6))
def test_whatever_was_found_is_exported_alike(seed, count):
    """Any masks, with holes and in pieces: outlines, label image, table and COCO agree."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, 6, 8)) < rng.uniform(0.05, 0.9)
    masks = masks[masks.any((1, 2))]
    scores = rng.permutation(len(masks)) / 8
    found = answer_of(masks, scores, rng.integers(1, 3, len(masks)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_exports({5: found}, IMAGES[:1], read_grey, folder, CATEGORIES, 0.25)
        labels = tifffile.imread(folder / "labels" / "one.tif")
        features = json.loads((folder / "qupath" / "one.geojson").read_text())["features"]
        rows = read_rows(folder / "cells.csv")[1:]
        known = json.loads((folder / "cells.coco.json").read_text())["annotations"]
    filled = np.zeros(masks.shape, int)
    for cell, feature in zip(filled, features, strict=True):
        shapes = feature["geometry"]["coordinates"]
        for rings in [shapes] if feature["geometry"]["type"] == "Polygon" else shapes:
            cell += inside(rings, 6, 8)
    assert np.array_equal(filled, masks)
    expected = np.zeros((6, 8), int)
    for number in np.argsort(scores):
        expected[masks[number]] = number + 1
    assert np.array_equal(labels, expected)
    assert [int(row[4]) for row in rows] == masks.sum((1, 2)).tolist()
    assert [row["area"] for row in known] == masks.sum((1, 2)).tolist()


def test_memory_does_not_grow_with_cells_times_pixels(tmp_path):
    """200 cells in 1000 x 1000 pixels would be 200 MB as bytes; the image alone is 3."""
    places = range(0, 1000, 5)
    rles = [encode_crop(np.ones((3, 3), bool), k, k, 1000, 1000) for k in places]
    boxes = np.array([[k, k, k + 3, k + 3] for k in places], np.float32)
    labels = np.ones(len(rles), np.int64)
    found = Instances(boxes, labels.astype(np.float32), labels, rles, (1000, 1000))
    image = ImageRecord(Path("x.tif"), 1, 1000, 1000)
    write_exports({}, [], read_grey, tmp_path, CATEGORIES)  # what is loaded on first use
    tracemalloc.start()
    write_exports({1: found}, [image], read_grey, tmp_path, CATEGORIES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
