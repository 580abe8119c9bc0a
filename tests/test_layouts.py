from collections import Counter
from contextlib import nullcontext
import json
import math
from pathlib import Path
import pickle
import shutil
from unicodedata import normalize

from hypothesis import given, settings, strategies
from hypothesis.extra.numpy import arrays
import numpy as np
import pandas as pd
from PIL import Image
import pycocotools.mask
import pytest
import torch

from src_snippets.data.images import fill_rings, read_image
from src_snippets.data.layouts import (
    check_outlines,
    dataset_roots,
    encode_outline,
    find_dataset,
    find_layout,
    image_files,
    ImageRecord,
    MAPPING_NAME,
    normal_name,
    open_dataset,
    whole,
)
from src_snippets.data.rle import pixel_indices, rle_to_csv
from src_snippets.data.structures import coco_ground_truth, ground_truth, Instances
from src_snippets.export.exports import trace_polygons, write_exports
from src_snippets.setup.config import BadInput, make_config
from src_snippets.setup.files import write_json
from tests.conftest import real_data, refused, save, write_folder

CONFIG = make_config("demo")
RGB = np.random.default_rng(1).integers(0, 256, (10, 14, 3), dtype=np.uint8)


def no_dataset(cause: str):
    return pytest.raises(FileNotFoundError, match=cause)


# The search


def make_root(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    (folder / MAPPING_NAME).write_text("[]")
    return folder


def test_class_files_are_a_dataset_and_images_alone_may_be_predicted(tmp_path):
    own = tmp_path / "own"
    (own / "train" / "a").mkdir(parents=True)
    assert find_layout(own) == "images"
    (own / "train" / "a" / "class_2.tif").touch()
    assert find_layout(own) == "images"
    (own / "train" / "a" / "image.tif").touch()
    assert find_layout(own) == "folders"  # whose reader says how it has to be called
    (own / "train" / "a" / "image.tif").unlink()
    (own / "train" / "a" / "class_2.tif").rename(own / "train" / "a" / "class2.tif")
    assert find_layout(own) == "folders"
    assert find_dataset("", [str(tmp_path)]) == own
    alone = tmp_path / "images"
    alone.mkdir()
    for name in ("b.JPG", "a.tif", ".hidden.png", "notes.txt"):
        (alone / name).touch()
    assert find_dataset(str(alone)) == alone
    assert [path.name for path in image_files(alone)] == ["a.tif", "b.JPG"]
    with no_dataset(r"but a\.tif, b\.JPG, notes\.txt"):
        find_dataset("", [str(alone)])  # images that DATA does not name are not taken
    assert image_files(tmp_path / "absent") == []


def test_uploads_without_a_dataset_are_refused(tmp_path, capsys):
    """The demo in place of a dataset that was not recognised would look like a result."""
    for name in ("sample_data", "results", ".config", "drive"):
        (tmp_path / name).mkdir()
    assert find_dataset("", [str(tmp_path)]) is None
    (tmp_path / "data.zip").touch()
    with no_dataset(r"but data\.zip\. .*Unpack archives"):
        find_dataset("", [str(tmp_path)])
    deep = make_root(tmp_path / "datasets" / "owner" / "slug" / "top" / "top")
    assert find_dataset("", [str(tmp_path)]) == deep
    make_root(tmp_path / "drive" / "MyDrive" / "other")
    make_root(tmp_path / "uploads")  # by name after a mounted Drive
    (tmp_path / "datasets").rename(tmp_path / ".datasets")
    assert find_dataset("", [str(tmp_path)]) == tmp_path / "uploads"
    assert "Several datasets" not in capsys.readouterr().out  # a Drive is not searched then
    (make_root(tmp_path / "a") / "train").rename(tmp_path / "elsewhere")
    (tmp_path / "a" / "test_release").mkdir()
    assert find_dataset("", [str(tmp_path)]) == tmp_path / "uploads"  # not a test part alone
    with no_dataset("absent, but no folder"):
        find_dataset(str(tmp_path / "absent"))
    with no_dataset("but a file.*Unpack archives"):
        find_dataset(str(tmp_path / "data.zip"))
    (tmp_path / "bare" / "train" / "a").mkdir(parents=True)
    with no_dataset(r"bare, but train\. Expected train/ and its ground truth \(class1.tif"):
        find_dataset(str(tmp_path / "bare"))


def test_data_comes_before_the_search_and_several_are_printed(tmp_path, capsys):
    nested = make_root(tmp_path / "input" / "upload" / "hw3-data-release")
    named, hidden = make_root(tmp_path / "named"), tmp_path / "results"
    make_root(hidden / ".demo-dataset")
    searched = [str(tmp_path / "absent"), str(tmp_path / "input")]
    assert find_dataset("", searched) == nested
    assert find_dataset(str(named), searched) == named
    assert find_dataset("demo", searched) is None
    assert find_dataset("", [str(hidden)]) is None
    assert capsys.readouterr().out == ""
    assert find_dataset("", [str(tmp_path)]) == nested
    assert f"set DATA for another: {named}" in capsys.readouterr().out


def test_search_stops_six_levels_down(tmp_path):
    make_root(tmp_path / "1/2/3/4/5/6/7")
    assert dataset_roots(tmp_path) == []
    assert dataset_roots(tmp_path / "1") == [tmp_path / "1/2/3/4/5/6/7"]


# Folders and the test mapping

ENTRY = dict(file_name="a.tif", id=3, height=10, width=14)


def make_mapping(root: Path, entries, folders: str = "f") -> Path:
    for name in folders:
        write_folder(root / "train" / name, {1: np.eye(12, 16)})
    (root / "test_release").mkdir(parents=True, exist_ok=True)
    save(root / "test_release" / "a.tif", RGB, photometric="rgb")
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (root / MAPPING_NAME).write_text(text)
    return root


def test_folders_and_their_mapping(tmp_path, capsys):
    root = make_mapping(tmp_path, [ENTRY], "ba")
    dataset = open_dataset(root, make_config("demo", class_names=["tumour", "other"]))
    dataset = pickle.loads(pickle.dumps(dataset))  # as workers get it
    assert (dataset.layout, dataset.names) == ("folders", ["a", "b"])
    assert dataset.categories == {1: "tumour", 2: "other"}
    assert dataset.test_images == [(root / "test_release" / "a.tif", 3, 10, 14)]
    assert dataset.read("b").name == "b/image.tif"
    (root / "train").rename(tmp_path / "inner")  # as Kaggle unpacks train.zip
    (root / "train").mkdir()
    (tmp_path / "inner").rename(root / "train" / "train")
    assert open_dataset(root, CONFIG).read("b").name == "b/image.tif"
    write_folder(root / "train" / "c", {})  # which nobody would miss
    with refused("no image.tif", root / "train" / "train"):
        open_dataset(root, CONFIG)
    shutil.rmtree(root / "train" / "c")
    (root / "train" / "train").rename(tmp_path / "inner")
    (root / "train").rmdir()
    (tmp_path / "inner").rename(root / "train")
    mapping = (root / MAPPING_NAME).rename(tmp_path / "elsewhere.json")
    with refused("test_release/ without test_image_name_to_ids.json", root):  # with unknown ids
        open_dataset(root, CONFIG)
    mapping.rename(root / MAPPING_NAME)
    (root / MAPPING_NAME).write_text(json.dumps([ENTRY]), encoding="utf-8-sig")  # from Windows
    assert len(open_dataset(root, CONFIG).test_images) == 1
    assert capsys.readouterr().out == ""
    Image.fromarray(RGB).save(root / "train" / "loose.png")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert open_dataset(root, CONFIG).names == ["a", "b"]
    (root / "train" / "a" / "slide.czi").touch()
    assert open_dataset(root, CONFIG).left_out == {
        "images without ground truth, not listed or not readable": [root / "train" / "loose.png"],
        "files of another kind": [root / "train" / "a" / "slide.czi"],
    }


def test_test_images_and_mapping_need_no_training_images(tmp_path):
    root = make_mapping(tmp_path / "data", [ENTRY], "")
    assert find_dataset("", [str(tmp_path)]) == root
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, len(dataset.test_images)) == ([], 1)
    (root / "train").mkdir()
    with refused("no folders; expected one per training image", root / "train"):
        open_dataset(root, CONFIG)


@pytest.mark.parametrize(
    ("entries", "cause"),
    [
        ("{", "cannot be read .*delimiter|cannot be read .*property"),
        ([], "lists no images"),
        (5, "lists no images"),
        ([5], "cannot be read"),
        ([{"file_name": "a.tif", "id": 1}], "1 of 1 rows.*Expected a file_name and whole id"),
        ([dict(ENTRY, id="x")], "'id': 'x'.*whole id"),
        ([dict(ENTRY, height=10.5)], "whole id, height and width"),
        ([dict(ENTRY, height=0)], "whole id, height and width"),
        ([dict(ENTRY, file_name=5)], "a file_name"),
        ([dict(ENTRY, file_name="../b.tif")], r"\['../b.tif'\], 1 of 1 names: not there"),
        ([dict(ENTRY, file_name="/etc/passwd")], "not there"),
        ([dict(ENTRY, file_name="..")], "not there"),
        ([dict(ENTRY, file_name="")], "a file_name"),
        ([ENTRY, dict(ENTRY, file_name="b.tif")], "2 of 2 rows.*each id once"),
        ([ENTRY, dict(ENTRY, id=4, file_name="b.tif")], r"\['b.tif'\], 1 of 2 names: not there"),
        ([dict(ENTRY, width=15)], r"\(10, 14\) \(H, W\), but stated as \(10, 15\)"),
    ],
)
def test_mappings_that_are_refused(tmp_path, entries, cause):
    root = make_mapping(tmp_path, entries)
    with refused(cause, root / MAPPING_NAME):
        open_dataset(root, CONFIG)


def test_a_test_image_that_is_no_tiff_is_refused(tmp_path):
    root = make_mapping(tmp_path, [ENTRY])
    (root / "test_release" / "a.tif").write_bytes(b"II*\0")
    with refused("cannot be read", root / "test_release" / "a.tif"):
        open_dataset(root, CONFIG)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("name,group\nx,p1\n", r"'x', 'p1'.*; expected images such as \['a'\]"),
        ("name,group\na,p\na,q\n", r"\('a', 'p'\).*each in one group"),
        ("image,group\nx,p1\n", r"columns \['image', 'group'\]; expected \['group', 'name'\]"),
        ("name,group\n", "no rows"),
    ],
)
def test_groups_of_a_file(tmp_path, text, cause):
    make_mapping(tmp_path, [ENTRY], "abc")
    (tmp_path / "groups.csv").write_text("name,group\na,p1\nb,\nc,p1\nc,p1\n")
    assert open_dataset(tmp_path, CONFIG).groups == {"a": "p1", "c": "p1"}
    (tmp_path / "groups.csv").write_text(text)
    with refused(cause, tmp_path / "groups.csv"):
        open_dataset(tmp_path, CONFIG)


# CSV

HEADER = "id,annotation,width,height,cell_type\n"


def make_csv(root: Path, text: str) -> Path:
    """A CSV dataset with the images a.png and b.png, and c.png to predict."""
    for part, names in (("train", "ab"), ("test", "c")):
        (root / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(RGB[..., 0]).save(root / part / f"{name}.png")
    (root / "train.csv").write_text(text)
    return root


def test_csv_with_the_line_ends_of_windows(tmp_path):
    rows = "a,1 1,14,10,NA\nb,3 3,14,10,round\n"
    root = make_csv(tmp_path, "")
    text = (HEADER + rows).replace("\n", "\r\n")
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (root / "groups.csv").write_bytes(b"name,group\r\na,slide 1\r\nb,slide 2\r\n")
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.categories) == (["a", "b"], {1: "NA", 2: "round"})
    assert dataset.groups == {"a": "slide 1", "b": "slide 2"}
    assert dataset.read("b").labels.tolist() == [2]


def test_csv(tmp_path):
    rows = "b,2 2 16 1,14,10,round\na,1 1,14,10,long\nb,3 3,14,10,long\nb,,14,10,long\n"
    dataset = open_dataset(make_csv(tmp_path, HEADER + rows), CONFIG)
    assert (dataset.layout, dataset.names) == ("csv", ["a", "b"])
    assert dataset.categories == {1: "long", 2: "round"}
    assert dataset.test_images == [(tmp_path / "test" / "c.png", 1, 10, 14)]
    sample = dataset.read("b")
    assert (sample.name, sample.size, sample.labels.tolist()) == ("b.png", (10, 14), [2, 1])
    assert sample.image[0].numpy().tolist() == RGB[..., 0].tolist()
    first, second = sample.layers[:, :2, :5].tolist()  # pixel 3 belongs to both
    assert first == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert second == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]
    alone = open_dataset(tmp_path, make_config("demo", overlaps=False)).read("b")
    assert alone.layers[:, :2, :5].tolist() == [[[0, 1, 1, 2, 2], [0, 1, 0, 0, 0]]]
    assert [rle_to_csv(rle) for rle in ground_truth(sample).rles] == ["2 2 16 1", "3 3"]


def test_images_without_rows_are_left_out(tmp_path):
    dataset = open_dataset(make_csv(tmp_path, HEADER + "b,-1,14,10,long\n"), CONFIG)
    assert len(dataset.read("b").labels) == 0  # as submissions write an image without instances
    assert dataset.categories == {1: "cell"}  # no annotation names another class
    (paths,) = dataset.left_out.values()
    assert paths == [tmp_path / "train" / "a.png"]


@pytest.mark.parametrize(
    ("rows", "categories"),
    [
        ("a,1 1,14.0,10.0,cort\nb,,,,\n", {1: "cort"}),  # as pandas writes what is missing
        ("a,1 1,14,10,\nb,2 1,14,10,\n", {1: "cell"}),
        ("a,1 1,,,cort\nb,2 1,14,,cort\n", {1: "cort"}),
        ("a.png,1 1,14,10,x\nA,3 1,14,10,x\nb,2 1,14,10,y\n", {1: "x", 2: "y"}),
    ],
)
def test_empty_cells_and_numbers_of_tables(tmp_path, rows, categories):
    dataset = open_dataset(make_csv(tmp_path, HEADER + rows), CONFIG)
    assert (dataset.names, dataset.categories) == (["a", "b"], categories)
    labels = [dataset.read(name).labels.tolist() for name in "ab"]
    assert sum(map(len, labels)) == rows.count(" 1,")


def test_equal_rows_count_once(tmp_path):
    rows = "a,1 2,14,10,x\na,1 2,14,10,x\na,1 2,14,10,y\na,2 2,14,10,x\na,,14,10,x\na,,14,10,x\n"
    sample = open_dataset(make_csv(tmp_path, HEADER + rows), CONFIG).read("a")
    assert sample.labels.tolist() == [1, 2, 1]  # another class or other pixels are another cell
    assert sample.left_out == {"annotated twice": 1}


def stripes(height: int, width: int, order: str) -> str:
    """Rows of a.png with three discs, their runs along rows ("C") or columns ("F")."""
    y, x = np.mgrid[:height, :width]
    lines = []
    for row, column in ((10, 12), (12, 30), (25, 20)):
        flat = (np.hypot(y - row, x - column) < 7).ravel(order)
        ends = np.flatnonzero(np.diff(flat, prepend=False, append=False))
        runs = " ".join(f"{a + 1} {b - a}" for a, b in zip(ends[::2], ends[1::2], strict=True))
        lines.append(f"a,{runs}")
    return "id,annotation\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (40, 46)])
def test_run_lengths_column_by_column_are_refused(tmp_path, size):
    make_csv(tmp_path, stripes(*size, "C"))
    Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "train" / "a.png")
    sample = open_dataset(tmp_path, CONFIG).read("a")
    assert ground_truth(sample).boxes.tolist() == [
        [6, 4, 19, 17],
        [24, 6, 37, 19],
        [14, 19, 27, 32],
    ]
    (tmp_path / "train.csv").write_text(stripes(*size, "F"))
    with refused(
        f"stripes, with runs {size[0]} px apart.*expected {size[1]}", tmp_path / "train.csv"
    ):
        open_dataset(tmp_path, CONFIG).read("a")


def field_with_cells(height: int, width: int, contrast: float, seed: int = 0):
    """A noisy image (H, W, 3) and its 20 cells, bool masks (N, H, W) that do not touch."""
    rng, masks = np.random.default_rng(seed), []
    y, x = np.mgrid[:height, :width]
    places = [(r, c) for r in range(9, height, 16) for c in range(17, width, 16)]
    for row, column in rng.permutation(places)[:20]:
        radii = rng.uniform(3, 7, 2)
        masks.append(((y - row) / radii[0]) ** 2 + ((x - column) / radii[1]) ** 2 < 1)
    image = rng.normal(120, 10, (height, width)) + contrast * np.any(masks, axis=0)
    return np.repeat(image.clip(0, 255)[..., None], 3, 2).astype(np.uint8), masks


def flat_runs(mask: np.ndarray, order: str) -> list[int]:
    """First pixel from 0 on and end of each run, counted along rows ("C") or columns ("F")."""
    return np.flatnonzero(np.diff(mask.ravel(order), prepend=False, append=False)).tolist()


def make_field(root: Path, image: np.ndarray, masks, order: str, layout: str) -> Path:
    """A dataset of one image whose RLEs are counted in an order: "csv" expects C, "coco" F."""
    (root / "train").mkdir(parents=True)
    Image.fromarray(image).save(root / "train" / "a.png")
    if layout == "csv":
        rows = [np.reshape(flat_runs(m, order), (-1, 2)) for m in masks]
        lines = [" ".join(f"{a + 1} {b - a}" for a, b in runs) for runs in rows]
        (root / "train.csv").write_text("id,annotation\n" + "".join(f"a,{x}\n" for x in lines))
        return root / "train.csv"
    size = list(image.shape[:2])
    counts = [np.diff([0, *flat_runs(mask, order), image[..., 0].size]).tolist() for mask in masks]
    images = [dict(file_name="a.png", id=4, height=size[0], width=size[1])]
    rows = [square_row(k, segmentation=dict(size=size, counts=c)) for k, c in enumerate(counts)]
    write_json(coco_content(images=images, annotations=rows), root / "train.json")
    return root / "train.json"


@pytest.mark.parametrize("size", [(96, 96), (96, 120), (120, 96)])
@pytest.mark.parametrize("layout", ["csv", "coco"])
def test_runs_counted_along_the_other_axis_are_refused(tmp_path, layout, size):
    image, masks = field_with_cells(*size, contrast=-60)
    right, wrong = ("C", "F") if layout == "csv" else ("F", "C")
    make_field(tmp_path / "right", image, masks, right, layout)
    dataset = open_dataset(tmp_path / "right", CONFIG)
    (name,) = dataset.names
    assert pixels_of(dataset.read(name)) == [np.flatnonzero(mask).tolist() for mask in masks]
    path = make_field(tmp_path / "wrong", image, masks, wrong, layout)
    cause = "mirrored at its diagonal" if size == (96, 96) else "are stripes"
    with refused(f"{cause}.*transpose the masks", path):
        open_dataset(tmp_path / "wrong", CONFIG).read(name)


@pytest.mark.parametrize("order", ["C", "F"])
def test_light_that_falls_off_to_one_side_does_not_decide(tmp_path, order):
    """All cells are on the left, it is darker downwards, and they themselves are hardly seen."""
    image, masks = field_with_cells(160, 160, contrast=-25)
    masks = [mask for mask in masks if np.nonzero(mask)[1].mean() < 80]
    assert len(masks) >= 10
    image = (image + np.linspace(70, 0, 160)[:, None, None]).clip(0, 255).astype(np.uint8)
    make_field(tmp_path, image, masks, order, "csv")
    with nullcontext() if order == "C" else refused("mirrored at its", tmp_path / "train.csv"):
        assert len(open_dataset(tmp_path, CONFIG).read("a").labels) == len(masks)


def test_one_cell_with_a_thin_process_and_specks_is_read(tmp_path):
    mask = np.eye(120, dtype=bool)  # touches itself at corners alone
    mask[50:70, 50:70] = True
    mask[5, 60:100:4] = True  # specks
    make_field(tmp_path, np.full((120, 120, 3), 90, np.uint8), [mask], "F", "coco")
    (name,) = (dataset := open_dataset(tmp_path, CONFIG)).names
    assert len(dataset.read(name).labels) == 1


@pytest.mark.parametrize("layout", ["csv", "coco"])
def test_one_annotation_for_all_cells_is_refused(tmp_path, layout):
    image, masks = field_with_cells(96, 96, contrast=-60)
    make_field(tmp_path, image, [np.any(masks, axis=0)], "C" if layout == "csv" else "F", layout)
    (name,) = (dataset := open_dataset(tmp_path, CONFIG)).names
    with refused("1 annotations in .. pieces; expected one per cell", tmp_path):
        dataset.read(name)


def test_branched_cells_on_a_narrow_image_are_no_stripes(tmp_path):
    mask = np.zeros((100, 1000), bool)
    for left in (100, 110, 120):
        mask[20:60, left : left + 3] = True  # three runs per row, 10 px apart
    mask[60:64, 100:123] = True
    make_field(tmp_path, np.full((100, 1000, 3), 90, np.uint8), [mask], "C", "csv")
    assert len(open_dataset(tmp_path, CONFIG).read("a").labels) == 1


@pytest.mark.parametrize("is_down", [False, True])
def test_cells_with_long_arms_are_no_stripes(is_down):
    """Runs of two arms in a row are as far apart as they like."""
    y, x = np.mgrid[:520, :704]
    rng, image = np.random.default_rng(0), np.full((3, 520, 704), 90, np.uint8)
    for _ in range(20):
        mask = np.zeros((520, 704), bool)
        row, column = rng.integers(150, 370), rng.integers(150, 554)
        for angle in np.arange(5) * 2 * np.pi / 5 + rng.uniform(0, 6):
            down, right = np.sin(angle), np.cos(angle)
            along = (x - column) * right + (y - row) * down
            beside = np.abs((x - column) * down - (y - row) * right)
            mask |= (along > 0) & (along < rng.uniform(100, 150)) & (beside < 3)
        turned = np.rot90(image, axes=(1, 2)) if is_down else image
        pixels = np.flatnonzero(np.rot90(mask) if is_down else mask)
        check_outlines(turned, [pixels], is_down)


@pytest.mark.parametrize("layout", ["csv", "coco"])
@pytest.mark.parametrize("kind", ["invisible", "bright", "flat", "few", "symmetric", "lines"])
def test_cells_that_the_image_does_not_show_are_read(tmp_path, layout, kind):
    """Nothing is refused where the image says nothing, or shows cells at the mirrored place too."""
    contrast = 0 if kind in ("invisible", "bright") else -60
    image, masks = field_with_cells(96, 96, contrast)
    if kind == "bright":  # dead cells, at places where cells would be if mirrored
        image[np.any(masks[:4], axis=0).T] = 255
    image = np.full_like(image, 9) if kind == "flat" else image
    if kind == "few":  # 9 cells where others, not annotated, are seen
        masks = [mask.T for mask in masks[:9]]
    if kind == "symmetric":
        image = np.maximum(image, image.transpose(1, 0, 2))
    if kind == "lines":  # many pieces of one pixel's height each
        masks = [mask & (np.indices(mask.shape)[k % 2] % 2 == 0) for k, mask in enumerate(masks)]
    make_field(tmp_path, image, masks, "C" if layout == "csv" else "F", layout)
    dataset = open_dataset(tmp_path, CONFIG)
    assert len(dataset.read(*dataset.names).labels) == len(masks)


def test_no_real_cells_are_refused_for_their_axes_and_mirrored_ones_are():
    dataset, refusals = open_dataset(real_data("dsb2018-csv"), CONFIG), Counter()
    for name in dataset.names[::4]:
        sample = dataset.read(name)
        image, maps = sample.image.numpy(), sample.layers.numpy()
        owners = range(1, len(sample.labels) + 1)
        parts = [np.flatnonzero((maps == owner).any(axis=0)) for owner in owners]
        height, width = sample.size
        down = [np.sort(pixels % width * height + pixels // width) for pixels in parts]
        check_outlines(image, parts, is_down=False)
        check_outlines(image, parts, is_down=True)
        if height != width or len(parts) >= 10:
            refusals["all"] += 1
            try:
                check_outlines(image, down, is_down=False)
            except BadInput:
                refusals["refused"] += 1
    assert refusals["all"] > 20
    assert refusals["refused"] > 0.9 * refusals["all"]


def test_csv_with_wells_and_a_sample_submission(tmp_path):
    make_csv(tmp_path, "id,annotation,sample_id\na,1 1,w1\nb,1 1,w1\n")
    (tmp_path / "test" / "unlisted.png").write_bytes(b"")
    (tmp_path / "sample_submission.csv").write_text("id,predicted\nc,1 1\nc,\n")
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.groups == {"a": "w1", "b": "w1"}
    assert [image.path.name for image in dataset.test_images] == ["c.png"]
    assert dataset.categories == {1: "cell"}
    Image.fromarray(RGB).save(tmp_path / "test" / "c_mask.png")  # listed: no output of Cellpose
    (tmp_path / "test" / "s").mkdir()
    Image.fromarray(RGB).save(tmp_path / "test" / "s" / "c.png")
    ids = ["c_mask", "c.png", "s/c.png"]
    (tmp_path / "sample_submission.csv").write_text(
        "\n".join(["id,predicted", *map("{},".format, ids)])
    )
    dataset = open_dataset(tmp_path, CONFIG)
    paths = [tmp_path / "test" / name for name in ("c_mask.png", "c.png", "s/c.png")]
    assert [image.path for image in dataset.test_images] == paths
    assert [dataset.test_ids[path] for path in paths] == ids  # as the competition has them
    (tmp_path / "sample_submission.csv").write_text("idx,id,annotation\n0,c,-1\n")
    assert [i.path.name for i in open_dataset(tmp_path, CONFIG).test_images] == ["c.png"]
    (tmp_path / "sample_submission.csv").write_text("ImageId,rle\nc,\n")
    assert [i.path.name for i in open_dataset(tmp_path, CONFIG).test_images] == ["c.png"]
    (tmp_path / "sample_submission.csv").write_text("id,predicted\n../train/a,1 1\n")
    with refused("train/a'.*not there", tmp_path / "sample_submission.csv"):
        open_dataset(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("id,mask\na,1 1\n", r"columns \['id', 'mask'\]; expected \['annotation', 'id'\]"),
        ("", "cannot be read"),
        (HEADER, "no rows"),
        (HEADER + "a,1 1\n", "some without a value for each column"),
        (HEADER + "a,1 1,14,10,x,y\n", "some without a value for each column"),
        (HEADER + "a,1 1,14,10,x\na,1 1,14,10,x,y\n", "Expected 5 fields in line 3, saw 6"),
        (HEADER + 'a,"1 1,14,10,x\n', "cannot be read"),
        (HEADER + "a,1,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,1 0,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,0 1,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,139 3,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,1 99999999999999,14,10,x\n", ", a, annotation 2: "),
        (HEADER + f"a,{2**63 - 1} 2,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,1 3 2 1,14,10,x\n", ", a, annotation 2: "),
        (HEADER + "a,1 x,14,10,x\n", ", a, annotation 2: "),
        (
            HEADER + "a,1 99999999999999999999,14,10,x\n",
            ", a, annotation 2: ",
        ),
        (HEADER + "a,1 1,15,10,x\n", r"\(10, 14\) \(H, W\), but stated as \(10, 15\)"),
        (HEADER + "a,1 1,14,10,x\na,2 1,14,11,x\n", "2 of 2 rows.*one size for each image"),
        (HEADER + "a,1 1,14,10,x\na,2 1,14,10,\n", "1 of 2 rows.*a cell_type in each row"),
        (HEADER + "d,1 1,14,10,x\n", r"\['d'\], 1 of 1 names: not there"),
        (HEADER + "../d,1 1,14,10,x\n", "not there"),
        (HEADER + "a,1,14,10,x\na,2 1,14,10,x\na,0 1,14,10,x\n", ", a, annotation 2: .*pairs"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, cause):
    with refused(cause, tmp_path / "train.csv"):
        dataset = open_dataset(make_csv(tmp_path, text), CONFIG)
        dataset.read(dataset.names[0])


def test_all_of_the_real_csv_round_trips():
    root = real_data("dsb2018-csv")
    dataset = open_dataset(root, CONFIG)
    rows = Counter(
        tuple(line.split(",")[:2]) for line in (root / "train.csv").read_text().splitlines()[1:]
    )
    found = Counter()
    for name in dataset.names:
        rles = ground_truth(dataset.read(name)).rles
        found.update((name, rle_to_csv(rle)) for rle in rles)
    assert (len(dataset.names), len(dataset.test_images), found.total()) == (200, 60, 9_827)
    assert found == rows
    assert dataset.categories == {1: "nucleus"}


# COCO


def coco_content(**changes) -> dict:
    """Two images; a polygon, both kinds of RLE and a crowd in two pieces on the second."""
    square = np.zeros((10, 14), np.uint8, order="F")
    square[2:5, 3:9] = 1
    compressed = pycocotools.mask.encode(square)
    compressed["counts"] = compressed["counts"].decode()
    plain = {"size": [10, 14], "counts": [0, 2, 138]}
    crowd = {"size": [10, 14], "counts": [0, 2, 98, 40]}
    shapes = [[[3, 2, 9, 2, 9, 5, 3, 5]], crowd, compressed, plain]
    rows = [
        dict(id=k, image_id=9, category_id=(7, 3)[k % 2], segmentation=shape, iscrowd=int(k == 1))
        for k, shape in enumerate(shapes)
    ]
    images = [
        dict(file_name=name, id=number, height=10, width=14)
        for name, number in (("a.png", 4), ("deep/b.png", 9))
    ]
    categories = [dict(id=7, name="long"), dict(id=3, name="round")]
    return dict(images=images, annotations=rows, categories=categories) | changes


def make_coco(root: Path, content, file: str = "train.json") -> Path:
    """A COCO dataset with those two images, and a third to predict."""
    (root / "train" / "deep").mkdir(parents=True)
    (root / "test").mkdir()
    for place in ("train/a.png", "train/deep/b.png", "test/c.png"):
        Image.fromarray(RGB).save(root / place)
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text(json.dumps(content))
    return root


def test_coco_with_one_folder_of_images_for_all_parts(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(RGB).save(tmp_path / "images" / f"{name}.png")
    for part, name in (("train", "a"), ("test", "c")):
        images = [dict(file_name=f"{name}.png", id=9, height=10, width=14)]
        rows = coco_content()["annotations"] if part == "train" else []
        content = coco_content(images=images, annotations=rows)
        write_json(content, tmp_path / "annotations" / f"{part}.json")
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.layout, dataset.names) == ("coco", ["a.png"])
    assert [(path.name, key) for path, key, *_ in dataset.test_images] == [("c.png", 9)]
    assert [path.name for path in next(iter(dataset.left_out.values()))] == ["b.png"]


def test_coco_with_one_folder_for_training_and_validation(tmp_path):
    """As a file that was split by hand; ids as pandas writes them after a merge."""
    content = coco_content()
    rows = [row | dict(image_id=9.0) for row in content["annotations"]]
    root = make_coco(tmp_path, content | dict(images=content["images"][:1], annotations=[]))
    own = content | dict(images=content["images"][1:], annotations=rows)
    write_json(own, root / "val.json")
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.validation) == (["a.png", "deep/b.png"], ["deep/b.png"])
    assert dataset.left_out == {}
    assert dataset.read("deep/b.png").labels.tolist() == [2, 1, -1]
    write_json(own, root / "train.json")
    with refused("1 images of the training part; expected others", root / "val.json"):
        open_dataset(root, CONFIG)
    write_json(own | dict(images=[dict(own["images"][0], file_name="v.png")]), root / "val.json")
    with refused("'v.png'.*not there", root / "val.json"):
        open_dataset(root, CONFIG)


def test_a_coco_file(tmp_path):
    dataset = open_dataset(make_coco(tmp_path, coco_content()), CONFIG)
    assert (dataset.layout, dataset.names) == ("coco", ["a.png", "deep/b.png"])
    assert list(dataset.categories.items()) == [(3, "round"), (7, "long")]
    assert dataset.test_images == [(tmp_path / "test" / "c.png", 1, 10, 14)]
    assert len(dataset.read("a.png").labels) == 0
    sample = dataset.read("deep/b.png")
    assert (sample.name, sample.labels.tolist()) == ("deep/b.png", [2, 1, -1])
    assert [int((sample.layers == i).sum()) for i in (1, 2, 3)] == [18, 2, 42]
    assert sample.left_out == {"annotated twice": 1}  # as polygon and as RLE
    # Without overlaps the crowd, though listed first, gets no pixel that an instance has.
    alone = open_dataset(tmp_path, make_config("demo", overlaps=False)).read("deep/b.png")
    assert alone.labels.tolist() == [2, 1, -1]
    assert [int((alone.layers == i).sum()) for i in (1, 2, 3)] == [18, 2, 40]
    entry = dict(file_name="c.png", id="77", height=10.0, width="14")
    (tmp_path / "test.json").write_text(json.dumps({"images": [entry, entry | dict(id=78)]}))
    images = open_dataset(tmp_path, CONFIG).test_images
    assert images == [
        (tmp_path / "test" / "c.png", 77, 10, 14),
        (tmp_path / "test" / "c.png", 78, 10, 14),
    ]


@pytest.mark.parametrize(
    "file",
    [
        "train_gt.json",
        "annotations/train.json",
        "annotations/instances_train.json",
        "train/_annotations.coco.json",
    ],
)
def test_names_of_coco_files(tmp_path, file):
    root = make_coco(tmp_path, coco_content(), file)
    assert find_dataset(str(root)) == root
    assert open_dataset(root, CONFIG).layout == "coco"


ROW = dict(id=5, image_id=9, category_id=3, segmentation=[[1, 1, 4, 1, 4, 4]])


def rle_row(size=(10, 14), counts=(140,)) -> dict:
    return dict(annotations=[dict(ROW, segmentation=dict(size=list(size), counts=list(counts)))])


def polygon_row(*points) -> dict:
    return dict(annotations=[dict(ROW, segmentation=[list(points)])])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (dict(images=[]), "lists no images"),
        (dict(images=5), "lists no images"),
        (dict(annotations=5), "expected lists of images, annotations and categories"),
        (dict(annotations=[5]), "cannot be read"),
        (dict(annotations=[dict(ROW, image_id=8)] * 4), "4 of 4 rows.*'image_id': 8.*of listed"),
        (dict(annotations=[dict(ROW, image_id=[9])]), r"'image_id': \[9\].*of listed images"),
        (dict(annotations=[dict(ROW, category_id=1)]), "'category_id': 1.*listed images and cat"),
        (dict(annotations=[dict(ROW, iscrowd=2)]), "'iscrowd': 2.*iscrowd 0 or 1"),
        (dict(annotations=[{k: ROW[k] for k in ("image_id", "category_id")}]), "1 of 1 .*outline"),
        (dict(annotations=[dict(ROW, segmentation="1 5")]), "annotation 5: could not convert"),
        (polygon_row(1, 2, 3, 4, 1e9, 5), "1 of 1 annotations cannot be used: 1 without a pixel"),
        (polygon_row(1, 2, 3, 4), "1 polygons of fewer than 3 points"),
        (polygon_row(1, 2, 3, 4, 5, 6, 7), "1 of 1 annotations: annotation 5: polygon"),
        (polygon_row(1, 2, 3, 4, "x", 5), "annotation 5: could not convert"),
        (polygon_row(1, 2, 3, 4, math.nan, 5), "annotation 5: polygon"),
        (dict(annotations=[dict(ROW, segmentation=[])] * 3), "3 of 3 .* 3 without an outline"),
        (dict(annotations=[ROW, *[dict(ROW, segmentation=None)] * 2]), "2 of 3 annotations cannot"),
        (polygon_row(0.1, 0.1, 0.9, 0.1, 0.9, 0.9), "without a pixel .*coordinates of another"),
        (rle_row(counts=[math.inf]), "annotation 5"),
        (rle_row(counts=[10**20]), "annotation 5"),
        (rle_row(size=[9, 9], counts=[81]), r"RLE of size \[9, 9\] in an image of \[10, 14\]"),
        (rle_row(counts=[7]), "add up to 7"),
        (dict(categories=[dict(name="x")]), "a name and a whole id, each once"),
        (dict(categories=[dict(id="x", name="x")]), "'name': 'x'.*a whole id, each once"),
        (dict(categories=[dict(id=3)]), "a name and a whole id"),
        (dict(categories=[dict(id=3, name=n) for n in "ab"]), "2 of 2 rows.*whole id, each once"),
        (dict(images=[dict(file_name="../x.png", id=9, height=1, width=1)]), "not there"),
        (dict(images=[dict(file_name="a.png", id=9, height=9, width=9)]), "3 of 4 .*RLE of size"),
        (dict(images=[dict(file_name="a.png", id=9, height=9, width=9)], annotations=[]), "stated"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, changes, cause):
    make_coco(tmp_path, coco_content(**changes))
    with refused(cause, tmp_path / "train.json"):
        dataset = open_dataset(tmp_path, CONFIG)
        for name in dataset.names:
            dataset.read(name)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe{", b"{", b"[" * 100_000])
def test_what_is_no_coco_file_is_refused(tmp_path, content):
    make_coco(tmp_path, [])
    (tmp_path / "train.json").write_bytes(content)
    with refused("cannot be read|lists no images", tmp_path / "train.json"):
        open_dataset(tmp_path, CONFIG)


def outline_pixels(segmentation, height, width) -> list[int]:
    rle, _ = encode_outline(segmentation, height, width)
    return pixel_indices(rle).tolist()


def test_polygons_beside_the_image_are_cut_at_its_border():
    assert outline_pixels([[-9, -9, 2, -9, 2, 2, -9, 2]], 4, 5) == [0, 1, 5, 6]
    # A triangle that leaves the image on the left: no side of it is bent.
    assert 800 < len(outline_pixels([[-100, 0, 50, 50, -100, 100]], 100, 100)) < 870
    two = [[0, 0, 1, 0, 1, 1, 0, 1], [4, 0, 5, 0, 5, 1, 4, 1]]  # one instance in two pieces
    assert outline_pixels(two, 4, 5) == [0, 4]


SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]
SQUARE_RLE = dict(size=[4, 5], counts=[5, 2, 2, 2, 9])


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        SQUARE,  # flat, as of VIA
        [[1, 1], [3, 1], [3, 3], [1, 3]],  # a list of points
        [[[1, 1], [3, 1], [3, 3], [1, 3]]],
        [list(map(str, SQUARE))],
        SQUARE_RLE,
        dict(size=["4.0", 5], counts=SQUARE_RLE["counts"]),
        pycocotools.mask.frPyObjects(SQUARE_RLE, 4, 5),
        dict(size=[4, 5], counts=str(pycocotools.mask.frPyObjects(SQUARE_RLE, 4, 5)["counts"])),
    ],
)
def test_ways_to_write_one_square(segmentation):
    assert outline_pixels(segmentation, 4, 5) == [6, 7, 11, 12]
    assert encode_outline(segmentation, 4, 5)[1] == ""


@pytest.mark.parametrize(
    ("segmentation", "pixels", "reason"),
    [
        ([], 0, "without an outline"),
        (None, 0, "without an outline"),
        (math.nan, 0, "without an outline"),
        ({}, 0, "without an outline"),
        ([[]], 0, "fewer than 3 points"),
        ([[1, 1, 3, 3]], 0, "fewer than 3 points"),
        ([[1, 1, 3, 3], SQUARE], 4, "fewer than 3 points"),
        (dict(size=[4, 5], counts=[20]), 0, "without a pixel"),
        ([[v + 9 for v in SQUARE]], 0, "without a pixel"),
        ([[v - 9 for v in SQUARE]], 0, "without a pixel"),
        ([[v / 5 for v in SQUARE]], 0, "without a pixel"),  # fractions of the image
        ([[2, 2, 2, 2, 2, 2]], 0, "without a pixel"),
    ],
)
def test_what_is_no_outline_has_a_reason(segmentation, pixels, reason):
    rle, found = encode_outline(segmentation, 4, 5)
    assert reason in found
    assert (0 if rle is None else pycocotools.mask.area(rle)) == pixels


def square_row(number: int, shift: float = 0, **changes) -> dict:
    points = [v + shift for v in (1, 1, 4, 1, 4, 4, 1, 4)]
    return dict(id=number, image_id=4, category_id=3, segmentation=[points]) | changes


def test_a_third_without_a_pixel_is_counted_and_more_is_refused(tmp_path):
    rows = [square_row(0), square_row(1, 2), square_row(2, 20)]
    make_coco(tmp_path, coco_content(annotations=rows))
    sample = open_dataset(tmp_path, CONFIG).read("a.png")
    assert sample.labels.tolist() == [1, 1]
    assert list(sample.left_out.values()) == [1]
    rows += [square_row(3, 30), square_row(4, segmentation=[])]
    (tmp_path / "train.json").write_text(json.dumps(coco_content(annotations=rows)))
    with refused("3 of 5 annotations cannot be used: 2 without a pixel .*, 1 without an outline"):
        open_dataset(tmp_path, CONFIG)


def brush(number: int, *columns: int, crowd: int = 1) -> dict:
    """A row with an RLE of 4 pixels down each of some columns."""
    mask = np.zeros((10, 14), np.uint8, order="F")
    mask[2:6, columns] = 1
    rle = pycocotools.mask.encode(mask)
    rle["counts"] = rle["counts"].decode()
    return square_row(number, segmentation=rle, iscrowd=crowd)


def test_a_brush_mask_with_a_speck_is_a_cell(tmp_path):
    rows = [brush(k, *range(9)) for k in range(3)]
    counts = [2, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 51, 1, 0]
    counts[-1] = 140 - sum(counts)
    rows[1]["segmentation"] = dict(size=[10, 14], counts=counts)  # 36 px and one
    make_coco(tmp_path, coco_content(annotations=rows))
    assert open_dataset(tmp_path, CONFIG).read("a.png").labels.tolist() == [1, 1]


def test_a_project_of_roboflow_that_is_called_as_its_class(tmp_path):
    kinds = [dict(id=3, name="cells", supercategory="cells")]
    kinds.append(dict(id=0, name="cells", supercategory="none"))
    make_coco(tmp_path, coco_content(annotations=[square_row(0)], categories=kinds))
    assert open_dataset(tmp_path, CONFIG).categories == {3: "cells"}


def test_an_rle_in_a_list_is_read():
    rle = dict(size=[10, 14], counts=[0, 2, 138])
    assert outline_pixels([rle], 10, 14) == outline_pixels(rle, 10, 14) == [0, 14]


def test_brush_masks_of_cvat_are_cells(tmp_path, capsys):
    """In one piece and up to 4 times the median area, here 4 x 8 px."""
    rows = [brush(0, 1, 2, crowd=0), brush(1, 4, 5), brush(2, 1, 9), brush(3, *range(9))]
    rows += [brush(4, *range(4, 12)), square_row(5, iscrowd=1), brush(6, 7, 8, crowd=0)]
    make_coco(tmp_path, coco_content(annotations=rows))
    sample = open_dataset(tmp_path, CONFIG).read("a.png")
    assert sample.labels.tolist() == [1, 1, 1, 1, -1, -1, -1]
    assert "2 crowds of a cell's size" in capsys.readouterr().out
    rows = [brush(k, k, k + 1) for k in range(5)]  # all of them
    (tmp_path / "train.json").write_text(json.dumps(coco_content(annotations=rows)))
    assert open_dataset(tmp_path, CONFIG).read("a.png").labels.tolist() == [1] * 5


def test_boxes_as_outlines_are_told(tmp_path, capsys):
    triangle = [[1, 1, 9, 1, 1, 9]]
    rows = [square_row(k, k / 2) for k in range(10)]
    for count, is_told in ((9, True), (10, False), (0, True)):
        more = [square_row(20 + k, k / 4, segmentation=triangle) for k in range(count)]
        folder = tmp_path / str(count)
        open_dataset(make_coco(folder, coco_content(annotations=rows + more)), CONFIG)
        told = f"WARNING: {folder}/train.json: 10 of {10 + count} outlines are upright boxes"
        assert (told in capsys.readouterr().out) == is_told


def test_an_image_that_is_listed_twice_keeps_the_cells_of_both_ids(tmp_path, capsys):
    images = [dict(file_name="a.png", id=k, height=10, width=14) for k in (4, 5)]
    rows = [square_row(0), square_row(1, image_id=5), square_row(2, 3, image_id=5)]
    make_coco(tmp_path, coco_content(images=images, annotations=rows))
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.names == ["a.png"]
    assert "1 images are listed again" in capsys.readouterr().out
    sample = dataset.read("a.png")
    assert (len(sample.labels), sample.left_out) == (2, {"annotated twice": 1})


@pytest.mark.parametrize(
    ("changes", "categories"),
    [
        (dict(categories=[dict(id=3, name="cell"), dict(id=7, name="cell")]), ["cell 3", "cell 7"]),
        (dict(categories=[dict(id="7.0", name="x"), dict(id=3, name="y")]), ["y", "x"]),
        (  # Roboflow's name of the project
            dict(
                categories=[
                    dict(id=0, name="cells", supercategory="none"),
                    dict(id=3, name="a", supercategory="cells"),
                    dict(id=7, name="b", supercategory="cells"),
                ]
            ),
            ["a", "b"],
        ),
        (dict(annotations={"5": square_row(5), "6": square_row(6, 3)}), ["round", "long"]),
        (dict(annotations=[square_row(5, image_id="4", category_id="3")]), ["round", "long"]),
        (dict(annotations=[]), ["round", "long"]),
    ],
)
def test_categories_and_ids_as_people_export_them(tmp_path, changes, categories):
    dataset = open_dataset(make_coco(tmp_path, coco_content(**changes)), CONFIG)
    assert list(dataset.categories.values()) == categories
    assert all(type(key) is int for key in dataset.categories)
    count = sum(len(dataset.read(name).labels) for name in dataset.names)
    assert count == len(changes.get("annotations", "abc"))


def test_validation_images_of_the_dataset(tmp_path):
    root = make_coco(tmp_path, coco_content(), "train/_annotations.coco.json")
    (root / "valid").mkdir()
    for name in ("a.png", "other.webp"):
        Image.fromarray(RGB).save(root / "valid" / name)
    own = dict(images=[dict(file_name="a.png", id=4, height=10, width=14)])
    content = coco_content(annotations=[square_row(0, category_id=7)]) | own
    (root / "valid" / "_annotations.coco.json").write_text(json.dumps(content))
    dataset = open_dataset(root, CONFIG)
    assert dataset.names == ["a.png", "deep/b.png", "valid/a.png"]
    assert dataset.validation == ["valid/a.png"]
    assert [len(dataset.read(name).labels) for name in dataset.names] == [0, 3, 1]
    assert dataset.read("valid/a.png").labels.tolist() == [2]
    assert dataset.left_out == {"files of another kind": [root / "valid" / "other.webp"]}
    (root / "valid" / "_annotations.coco.json").unlink()
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.validation) == (["a.png", "deep/b.png"], [])
    assert len(dataset.left_out["images without ground truth, not listed or not readable"]) == 1


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("train2017", "annotations/instances_train2017.json"),
        ("train2017", "train2017.json"),
        ("images/default", "annotations/instances_default.json"),
        ("images", "annotations/instances_default.json"),
        ("images/train", "annotations/instances_train.json"),
        ("images/Train", "annotations/instances_Train.json"),
    ],
)
def test_folders_of_coco_and_cvat(tmp_path, folder, file):
    root = tmp_path / "data"
    make_coco(root, coco_content(), file)
    (root / folder).parent.mkdir(exist_ok=True)
    (root / "train").rename(root / folder)
    assert find_dataset(str(tmp_path)) == root
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.left_out) == (["a.png", "deep/b.png"], {})
    assert len(dataset.read("deep/b.png").labels) == 3


# Names


def test_normal_names_and_whole_numbers():
    names = ["C:\\x\\My%20Cell.PNG", "/home/x/my cell.png", "my cell.png"]
    assert {normal_name(name) for name in names} == {"my cell.png"}
    assert normal_name(normalize("NFD", "Zelle_ä")) == normal_name(normalize("NFC", "zelle_ä"))
    found = whole(
        pd.Series([128, 128.0, "128", "1.5", "", None, math.inf, 10**20, [9]], dtype=object)
    )
    assert found[:3].tolist() == [128] * 3
    assert found[3:].isna().all()
    assert whole(pd.Series([], dtype=object)).tolist() == []


@pytest.mark.parametrize(
    ("on_disk", "listed"),
    [
        (normalize("NFD", "zelle_ä.png"), normalize("NFC", "zelle_ä.png")),
        ("my cell.png", "my%20cell.png"),
        ("a b.PNG", "a b.png"),
        ("x$1$.png", "/home/someone/x$1$.png"),
        ("x.png", "..\\train\\x.png"),
        ("細胞.png", "細胞"),
    ],
)
def test_listed_names_that_differ_from_those_on_disk(tmp_path, capsys, on_disk, listed):
    image = dict(file_name=listed, id=4, height=10, width=14)
    make_coco(tmp_path, coco_content(images=[image], annotations=[square_row(0)]))
    Image.fromarray(RGB).save(tmp_path / "train" / on_disk)
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.names == [on_disk]
    assert len(dataset.read(on_disk).labels) == 1
    assert ("1 names differ on disk" in capsys.readouterr().out) == (listed != "細胞")


def test_names_that_fit_several_files_are_refused(tmp_path):
    make_csv(tmp_path, "id,annotation\nA,1 1\n")
    for name in ("A.png", "b.tif"):  # beside a.png and b.png
        Image.fromarray(RGB).save(tmp_path / "train" / name)
    assert open_dataset(tmp_path, CONFIG).names == ["A"]  # exactly as written
    for text in ("b", "x/a.png"):
        (tmp_path / "train.csv").write_text(f"id,annotation\n{text},1 1\n")
        with refused("not there, or several files", tmp_path / "train.csv"):
            open_dataset(tmp_path, CONFIG)


def test_names_with_dollars_and_accents_of_groups(tmp_path):
    disk = normalize("NFD", "ä$1$")
    make_csv(tmp_path, "id,annotation,cell_type\n" + normalize("NFC", "ä$1$") + ",1 1,$x$\n")
    Image.fromarray(RGB).save(tmp_path / "train" / f"{disk}.png")
    (tmp_path / "groups.csv").write_text("name,group\n" + normalize("NFC", "ä$1$") + ",p\n")
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.names, dataset.categories) == ([disk], {1: "$x$"})
    assert dataset.groups == {disk: "p"}


# Pairs of an image and a label image

IDS = np.zeros((10, 14), np.uint16)
IDS[1:4, 1:4], IDS[5:8, 5:9] = 3, 7


def save_images(root: Path, image: str, test: str) -> Path:
    """Writes an image to train from, one alone beside it, one to predict."""
    for path in (image, test, Path(image).with_name("alone.png")):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(root / path)
    return root


def open_pair(root: Path, image: str):
    """Opens the one pair, and checks what kind of dataset it is."""
    assert find_dataset(str(root.parent)) == root
    dataset = open_dataset(root, make_config("demo", class_names=["x", "y"]))
    assert (dataset.layout, dataset.categories) == ("pairs", {1: "cell"})
    assert [Path(name).name for name in dataset.names] == [Path(image).name]
    return dataset


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("train/a.png", "train/a_masks.tif"),
        ("train/a.PNG", "train/a_cp_masks.png"),
        ("train/a_img.png", "train/a_masks.png"),
        ("train/images/a.png", "train/masks/a.png"),
        ("train/images/a.png", "train/labels/a.tif"),
        ("images/a.png", "masks/a.png"),
        ("images/a.png", "labels/a.tif"),
        ("train/a.ome.tif", "train/a_masks.tif"),
        ("images/a.ome.tif", "masks/a_masks.ome.tif"),
        ("train/images/classA_1.png", "train/masks/classA_1.png"),  # no class files of a folder
    ],
)
def test_pairs_of_cellpose_and_stardist(tmp_path, image, labels):
    root = save_images(tmp_path / "data", image, "test/images/t.png")
    for path in (labels, "test/masks/none"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IDS).save(root / labels)
    dataset = open_pair(root, image)
    sample = pickle.loads(pickle.dumps(dataset.read))(dataset.names[0])  # as workers get it
    assert sample.labels.tolist() == [1, 1]
    assert sample.layers[0].tolist() == np.where(IDS == 3, 1, np.where(IDS == 7, 2, 0)).tolist()
    assert [path.name for path, *_ in dataset.test_images] == ["t.png"]
    (paths,) = dataset.left_out.values()
    assert [path.name for path in paths] == ["alone.png"]
    stray = IDS.copy()
    stray[0, 0] = 7  # one pixel far from its cell of 12
    Image.fromarray(stray).save(root / labels)
    sample = dataset.read(dataset.names[0])
    assert (sample.left_out, int((sample.layers == 2).sum())) == ({"stray pieces": 1}, 12)
    Image.fromarray(IDS[:9]).save(root / labels)
    with refused(r"\(9, 14\) \(H, W\); expected \(10, 14\)", root / labels):
        dataset.read(dataset.names[0])


def test_sub_folders_of_pairs_are_classes(tmp_path):
    for path in ("train/round/a", "train/long/images/a", "val/round/b", "test/images/t"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / f"{path}.png")
    (tmp_path / "train/long/masks").mkdir()
    for path in ("train/round/a_masks.tif", "train/long/masks/a.tif", "val/round/b_masks.tif"):
        Image.fromarray(IDS).save(tmp_path / path)
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.layout, dataset.categories) == ("pairs", {1: "long", 2: "round"})
    assert dataset.names == ["long/images/a.png", "round/a.png", "val/round/b.png"]
    labels = [dataset.read(name).labels.tolist() for name in dataset.names]
    assert labels == [[1, 1], [2, 2], [2, 2]]
    assert (dataset.validation, dataset.left_out) == (["val/round/b.png"], {})
    assert [image.path.name for image in dataset.test_images] == ["t.png"]


# Pairs of an image and outlines of QuPath


def write_geojson(path: Path, features) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(features if isinstance(features, str) else json.dumps(features))
    return path


def outline(*rings, kind=None, **properties) -> dict:
    """A feature as QuPath writes it; the rings of a Polygon, or of each part of a MultiPolygon."""
    shape = "MultiPolygon" if isinstance(rings[0][0][0], list) else "Polygon"
    classified = dict(classification=dict(name=kind, color=[200, 0, 0])) if kind else {}
    properties = dict(objectType="annotation") | classified | properties
    geometry = dict(type=shape, coordinates=list(rings))
    return dict(type="Feature", id="5a", geometry=geometry, properties=properties)


def ring(top, left, bottom, right) -> list:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def pair_root(root: Path, features, place: str = "train/a.geojson") -> Path:
    image = root / ("images/a.tif" if "images" in place or "/a" not in place else "train/a.tif")
    image.parent.mkdir(parents=True, exist_ok=True)
    save(image, RGB, photometric="rgb")
    write_geojson(root / place, features)
    return root


def pixels_of(sample) -> list[list[int]]:
    layers = sample.layers.numpy()
    owners = range(1, len(sample.labels) + 1)
    return [np.flatnonzero((layers == i).any(axis=0)).tolist() for i in owners]


def block(top, left, bottom, right) -> list[int]:
    mask = np.zeros((10, 14), bool)
    mask[top:bottom, left:right] = True
    return np.flatnonzero(mask).tolist()


@pytest.mark.parametrize(
    ("image", "outlines"),
    [
        ("train/a.tif", "train/a.geojson"),
        ("train/a.png", "train/a.png.geojson"),  # QuPath's name of an image may have its suffix
        ("train/images/a.png", "train/geojson/a.geojson"),
        ("images/a.png", "geojson/a.geojson"),
        ("images/a.tif", "qupath/a.geojson"),
        ("images/a.ome.tif", "geojson/a.geojson"),
    ],
)
def test_pairs_of_qupath(tmp_path, image, outlines):
    root = save_images(tmp_path / "data", image, "test/t.png")
    write_geojson(root / outlines, [outline(ring(1, 2, 4, 6)), outline(ring(5, 0, 7, 3))])
    dataset = open_pair(root, image)
    sample = dataset.read(dataset.names[0])
    assert sample.labels.tolist() == [1, 1]
    assert pixels_of(sample) == [block(1, 2, 4, 6), block(5, 0, 7, 3)]
    assert [path.name for paths in dataset.left_out.values() for path in paths] == ["alone.png"]
    (root / "groups.csv").write_text(f"name,group\n{dataset.names[0]},p\n")
    assert open_dataset(root, CONFIG).groups == {dataset.names[0]: "p"}


def test_pairs_beside_train_are_counted_as_left_out(tmp_path):
    root = save_images(tmp_path / "data", "train/a.tif", "images/old.tif")
    for path in ("train/a_masks.tif", "masks/old.tif"):
        (root / path).parent.mkdir(exist_ok=True)
        save(root / path, IDS)
    dataset = open_dataset(root, CONFIG)
    assert dataset.names == ["a.tif"]
    lost = [path for paths in dataset.left_out.values() for path in paths]
    assert root / "images" / "old.tif" in lost
    # A label image is no image, though an outline or a label image of its own lies beside it
    save(root / "train" / "a_masks_cp_masks.tif", IDS)
    assert open_dataset(root, CONFIG).names == ["a.tif"]


def test_a_drive_and_results_beside_images_are_not_looked_at(tmp_path, monkeypatch):
    """On Colab all of them lie in /content."""
    root = save_images(tmp_path, "images/a.tif", "images/b.tif")
    save_images(root, "drive/My/c.png", "results/figures/d.png")
    (root / "masks").mkdir()
    for path in (root / "LICENSE", root / "masks" / "a.tif", root / "notes.pdf"):
        save(path.with_suffix(".tif"), IDS).rename(path)
    (root / "loop").symlink_to(root)
    seen, really = set(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, *rest: seen.add(path) or really(path, *rest))
    for layout in ("pairs", "images"):
        dataset = open_dataset(root, CONFIG)
        assert dataset.layout == layout
        lost = {path.name for paths in dataset.left_out.values() for path in paths}
        alone = {"alone.png", "b.tif"} if layout == "pairs" else set()
        assert lost == alone | {"notes.pdf"}
        for path in (root / "images").iterdir():
            path.rename(root / path.name)
        (root / "masks" / "a.tif").unlink(missing_ok=True)
    assert root not in seen
    assert not seen & {root / "drive", root / "loop"}


@pytest.mark.parametrize("wrap", ["collection", "list", "one"])
def test_outlines_drawn_by_hand_in_qupath(tmp_path, wrap):
    """A cell with a hole, one in two pieces, points with a third coordinate, half pixels."""
    first = outline(ring(0, 0, 6, 6), ring(2, 2, 4, 4), kind="tumour", name="a")
    second = outline([ring(7, 0, 9, 2)], [ring(7, 5, 9, 7)], kind="immune")
    deep = [[*point, 0.0] for point in ring(0.6, 8.6, 3.4, 11.4)]  # centres 1.5, 2.5 and 9.5, 10.5
    third = outline(deep, objectType="detection", classification=None)
    names = dict(names=["tumour", "positive"], color=[1, 2, 3])
    fourth = outline(ring(8, 9, 12, 30), classification=names)  # cut at the image's border
    features = [first, second, third, fourth][: 1 if wrap == "one" else 4]
    content = dict(collection=dict(type="FeatureCollection", features=features), list=features)
    pair_root(tmp_path, content.get(wrap, first))
    dataset = open_dataset(tmp_path, CONFIG)
    sample = dataset.read("a.tif")
    hole = sorted({*block(0, 0, 6, 6)} - {*block(2, 2, 4, 4)})
    pieces = sorted(block(7, 0, 9, 2) + block(7, 5, 9, 7))
    pixels = [hole, pieces, block(1, 9, 3, 11), block(8, 9, 10, 14)]
    if wrap == "one":
        assert dataset.categories == {1: "tumour"}
    else:
        assert [*dataset.categories.values()] == ["cell", "immune", "tumour", "tumour: positive"]
        assert sample.labels.tolist() == [3, 2, 1, 4]
    assert pixels_of(sample) == pixels[: len(features)]


def test_outlines_are_filled_by_the_even_odd_rule():
    star = [[0, 0], [9, 0], [0, 8], [9, 8]]  # crosses itself, not closed
    filled = np.zeros((8, 9), bool)
    filled.ravel()[fill_rings([star], 8, 9)] = True
    y, x = np.mgrid[:8, :9] + 0.5
    assert np.array_equal(filled, np.abs(x - 4.5) / 4.5 < np.abs(y - 4) / 4)
    far = ring(-1e8, -1e8, 1e8, 1e8)
    assert fill_rings([far], 5, 6).tolist() == list(range(30))
    for nothing in (ring(3, 3, 3, 9), ring(0, 7, 5, 9), ring(1.1, 1.1, 1.4, 9)):
        assert fill_rings([nothing], 5, 6).tolist() == []


def test_a_large_outline_of_many_points_is_filled():
    # Point by point it would take minutes
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 2000 + 2100
    y, x = np.divmod(fill_rings([circle, circle / 2 + 1050], 4200, 4200), 4200)
    distance = np.hypot(x - 2099.5, y - 2099.5)
    assert (distance.min(), distance.max()) == pytest.approx((1000, 2000), abs=1)
    assert len(x) == pytest.approx(np.pi * (2000**2 - 1000**2), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(arrays(bool, strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9))))
def test_traced_outlines_give_back_their_pixels(pixels):
    rings = [ring for polygon in trace_polygons(pixels, 2, 3) for ring in polygon]
    mask = np.zeros((13, 12), bool)
    mask[2 : 2 + pixels.shape[0], 3 : 3 + pixels.shape[1]] = pixels
    found = fill_rings(rings, 13, 12) if rings else np.zeros(0, int)
    assert found.tolist() == np.flatnonzero(mask).tolist()


def test_our_own_export_for_qupath_is_read_back(tmp_path):
    """Two classes, a hole with another cell in it, a cell in two pieces, and then a correction."""
    masks = np.zeros((4, 40, 50), np.uint8)
    y, x = np.mgrid[:40, :50]
    masks[0] = (np.hypot(y - 12, x - 14) < 10) & (np.hypot(y - 12, x - 14) > 4)
    masks[1] = np.hypot(y - 12, x - 14) < 3
    masks[2, 25:30, 5:9], masks[2, 31:35, 9:12] = 1, 1
    masks[3] = np.random.default_rng(0).random((40, 50)) < 0.5
    masks[3, :, :30] = 0
    rles = [pycocotools.mask.encode(np.asfortranarray(mask)) for mask in masks]
    boxes = pycocotools.mask.toBbox(rles).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels, scores = np.array([2, 1, 1, 2]), np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    found = Instances(boxes, scores, labels, rles, (40, 50))
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "a.png"
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(path)
    images = [ImageRecord(path, 5, 40, 50)]
    write_exports({5: found}, images, tmp_path, {3: "T", 7: "B µ"}, CONFIG)
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.names, dataset.categories) == (["images/a.png"], {1: "B µ", 2: "T"})
    sample = dataset.read("images/a.png")
    assert sample.labels.tolist() == [1, 2, 2, 1]
    assert pixels_of(sample) == [np.flatnonzero(mask).tolist() for mask in masks]
    assert [len(layer.unique()) - 1 for layer in sample.layers] == [4]

    file = tmp_path / "qupath" / "a.geojson"
    content = json.loads(file.read_text())
    content["features"][1]["properties"]["classification"]["name"] = "new"
    content["features"][2]["geometry"] = dict(type="Polygon", coordinates=[ring(20, 2, 23, 9)])
    write_geojson(file, content)
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.categories == {1: "B µ", 2: "T", 3: "new"}
    sample = dataset.read("images/a.png")
    assert sample.labels.tolist() == [1, 3, 2, 1]
    assert pixels_of(sample)[2] == [row * 50 + x for row in (20, 21, 22) for x in range(2, 9)]


@pytest.mark.parametrize("size", [(96, 96), (96, 130), (130, 96)])
@pytest.mark.parametrize("kind", ["coco", "geojson"])
def test_points_with_x_and_y_exchanged_are_refused(tmp_path, kind, size):
    """As contours of scikit-image and StarDist, rows first, dumped into a file of x, y."""
    image, masks = field_with_cells(*size, contrast=-60)
    outlines = [trace_polygons(mask, 0, 0)[0][0] for mask in masks]
    for step, place in ((1, "right"), (-1, "wrong")):
        (tmp_path / place / "train").mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / place / "train" / "a.png")
        points = [[point[::step] for point in line] for line in outlines]
        if kind == "geojson":
            write_geojson(tmp_path / place / "train" / "a.geojson", [outline(p) for p in points])
            continue
        images = [dict(file_name="a.png", id=4, height=size[0], width=size[1])]
        rows = [square_row(k, segmentation=[np.ravel(p).tolist()]) for k, p in enumerate(points)]
        rows = coco_content(images=images, annotations=rows)
        write_json(rows, tmp_path / place / "train.json")
    dataset = open_dataset(tmp_path / "right", CONFIG)
    assert len(dataset.read(dataset.names[0]).labels) == 20
    dataset = open_dataset(tmp_path / "wrong", CONFIG)
    with refused("mirrored at its diagonal.*points are x, y"):
        dataset.read(dataset.names[0])


def test_a_folder_per_image_is_no_class(tmp_path):
    for k in range(6):
        (tmp_path / "train" / f"s{k}").mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / "train" / f"s{k}" / f"s{k}.png")
        Image.fromarray(IDS).save(tmp_path / "train" / f"s{k}" / f"s{k}_masks.tif")
    dataset = open_dataset(tmp_path, CONFIG)
    assert (len(dataset.names), dataset.categories) == (6, {1: "cell"})


def test_outlines_in_the_folder_of_images_come_before_a_label_image(tmp_path):
    root = pair_root(tmp_path, [outline(ring(1, 1, 4, 4))], "train/images/a.geojson")
    (root / "train" / "images").mkdir(exist_ok=True)
    save(root / "train" / "images" / "a.tif", RGB, photometric="rgb")
    (root / "train" / "masks").mkdir()
    Image.fromarray(IDS).save(root / "train" / "masks" / "a.tif")
    assert open_dataset(root, CONFIG).read("images/a.tif").labels.tolist() == [1]


def test_cells_that_others_cover_are_counted(tmp_path):
    text = HEADER + "a,1 3 15 3,14,10,x\na,2 1,14,10,x\nb,5 2,14,10,x\n"
    make_csv(tmp_path, text)
    assert open_dataset(tmp_path, CONFIG).read("a").left_out == {}
    sample = open_dataset(tmp_path, make_config("demo", overlaps=False)).read("a")
    assert sample.labels.tolist() == [1]
    assert sample.left_out == {"covered by others": 1}


def test_a_region_around_detections_is_no_cell(tmp_path):
    """As QuPath exports all objects; one that was drawn by hand beside the detections is a cell."""
    cells = [outline(ring(1, 1 + 4 * k, 4, 4 + 4 * k), objectType="detection") for k in range(3)]
    region, drawn = outline(ring(0, 0, 6, 14), kind="Tumor"), outline(ring(7, 2, 9, 5))
    root = pair_root(tmp_path, [region, *cells, drawn])
    dataset = open_dataset(root, CONFIG)
    sample = dataset.read("a.tif")
    assert dataset.categories == {1: "cell"}
    assert sample.labels.tolist() == [1] * 4
    assert sample.left_out == {"annotations around others": 1}
    root = pair_root(tmp_path, [region, cells[0]])  # one detection is enough
    assert open_dataset(root, CONFIG).read("a.tif").left_out == sample.left_out
    old = [outline(line["geometry"]["coordinates"][0]) for line in (region, *cells)]
    for feature, kind in zip(old, ("annotation", *["detection"] * 3), strict=True):
        feature["properties"] = dict(object_type=kind)  # QuPath 0.3
    root = pair_root(tmp_path, old)
    assert open_dataset(root, CONFIG).read("a.tif").left_out == sample.left_out
    places = [(1 + 3 * row, 1 + 3 * column) for row in range(3) for column in range(4)]
    many = [outline(ring(top, left, top + 2, left + 2)) for top, left in places]
    tissue = outline(ring(0, 0, 10, 13), kind="Tissue")
    root = pair_root(tmp_path, [tissue, *many])  # all are drawn, or exported anew
    assert open_dataset(root, CONFIG).read("a.tif").left_out == {"annotations around others": 1}
    assert len(open_dataset(root, CONFIG).read("a.tif").labels) == 12
    points = [dict(outline(ring(1, 1, 2, 2)), geometry=dict(type="Point", coordinates=[1, 1]))] * 11
    root = pair_root(tmp_path, [outline(ring(0, 0, 10, 13)), outline(ring(1, 1, 3, 3)), *points])
    with refused("outlines without an area", tmp_path):
        open_dataset(root, CONFIG)
    root = pair_root(tmp_path, [outline(ring(0, 0, 10, 13)), *many[:9]])  # a large cell
    assert len(open_dataset(root, CONFIG).read("a.tif").labels) == 10
    region["properties"]["classification"]["name"] = "Ignore*"
    root = pair_root(tmp_path, [*[region] * 3, drawn])  # meant to be left out: no loss
    assert open_dataset(root, CONFIG).read("a.tif").labels.tolist() == [1]
    region["properties"]["classification"]["name"] = "Tumor"
    root = pair_root(tmp_path, [region, drawn])  # nothing was detected: both were drawn
    assert open_dataset(root, CONFIG).read("a.tif").labels.tolist() == [1, 2]


@pytest.mark.parametrize("image", ["a.tif", "a_img.tif", "a.ome.tif"])
def test_corrected_outlines_come_before_a_label_image(tmp_path, image):
    """Under the name of our own export, and with a label image named after the image."""
    root = save_images(tmp_path / "data", f"train/{image}", "test/t.png")
    Image.fromarray(IDS).save(root / "train" / "a_masks.tif")
    path = write_geojson(
        root / "train" / f"{Path(image).stem}.geojson", [outline(ring(1, 2, 4, 6))]
    )
    dataset = open_dataset(root, CONFIG)
    assert pixels_of(dataset.read(image)) == [block(1, 2, 4, 6)]
    path.unlink()
    assert len(open_dataset(root, CONFIG).read(image).labels) == 2


def test_what_has_no_area_in_geojson_is_counted(tmp_path):
    cells = [outline(ring(k, 0, k + 1, 3), kind="x") for k in range(8)]
    point = outline(ring(0, 0, 1, 1), kind="dot") | dict(
        geometry=dict(type="Point", coordinates=[1.0, 2.0])
    )
    line = outline(ring(0, 0, 1, 1)) | dict(
        geometry=dict(type="LineString", coordinates=[[0, 0], [3, 3]])
    )
    region = outline(ring(0, 0, 10, 14), kind="Region*")
    others = [point, line, outline(ring(30, 30, 32, 32), kind="x"), cells[0]]
    pair_root(tmp_path, [*cells, *others, region])
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.categories == {1: "x"}
    sample = dataset.read("a.tif")
    assert sample.labels.tolist() == [1] * 8
    assert {k: n for k, n in sample.left_out.items() if n} == {
        "outlines without an area (Point)": 1,
        "outlines without an area (LineString)": 1,
        "regions that QuPath ignores (Region*)": 1,
        "annotated twice": 1,
        "without a pixel in the image (coordinates of another size?)": 1,
    }
    write_geojson(tmp_path / "train" / "a.geojson", [cells[0], point])
    with refused(r"1 of 2 annotations cannot be used: 1 outlines without an area \(Point\)"):
        open_dataset(tmp_path, CONFIG)
    write_geojson(tmp_path / "train" / "a.geojson", dict(type="FeatureCollection", features=[]))
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.categories, dataset.left_out) == ({1: "cell"}, {})
    assert len(dataset.read("a.tif").labels) == 0


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "cannot be read"),
        ("5", "cannot be read"),
        ("{}", "cannot be read"),
        ([5], "cannot be read"),
        ([outline(ring(0, 0, 1, 1)) | dict(geometry=dict(type="Polygon"))], "cannot be read"),
        ([outline([[0, 0], [1, 1]])], "feature 1: expected rings of at least 3 points"),
        ([outline([[0, 0], [1, 1], [1e99, 3]])], "feature 1: expected rings"),
        ([outline([[0, 0], [1, 1], [math.nan, 3]])], "feature 1: expected rings"),
        ([outline([[0, 0], [1, 1], ["x", 3]])], "cannot be read"),
        ([outline([[0, 0], [1, 1], [1]])], "cannot be read"),
    ],
)
def test_geojson_that_is_refused(tmp_path, content, cause):
    pair_root(tmp_path, content)
    with refused(cause, tmp_path / "train" / "a.geojson"):
        open_dataset(tmp_path, CONFIG)


def partition(sample) -> set:
    """Class and pixels of every instance."""
    truth = ground_truth(sample)
    return {(int(k), rle["counts"]) for k, rle in zip(truth.labels, truth.rles, strict=True)}


def test_folders_to_coco_lose_nothing(demo_root, demo_samples, tmp_path):
    (tmp_path / "train").symlink_to(demo_root / "train")
    names = {k: f"class{k}" for k in range(1, 5)}
    write_json(coco_ground_truth(demo_samples, names), tmp_path / "train_gt.json")
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.categories == names
    assert len(dataset.names) == len(demo_samples)
    for sample, name in zip(demo_samples, dataset.names, strict=True):
        again = dataset.read(name)
        assert torch.equal(sample.image, again.image)
        assert partition(sample) == partition(again)


# Validation images of the dataset


def write_pair(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB).save(folder / f"{name}.png")
    Image.fromarray(IDS).save(folder / f"{name}_masks.png")


def test_validation_folders_of_class_files(tmp_path):
    root = make_mapping(tmp_path, [ENTRY], "ba")
    write_folder(root / "valid" / "a", {1: np.eye(12, 16), 2: np.eye(12, 16)})
    write_folder(root / "valid" / "empty", {})
    Image.fromarray(RGB).save(root / "valid" / "loose.png")
    dataset = open_dataset(root, CONFIG)
    assert dataset.names == ["a", "b", "valid/a", "valid/empty"]
    assert dataset.validation == ["valid/a", "valid/empty"]
    samples = [dataset.read(name) for name in dataset.names]
    assert [len(sample.labels) for sample in samples] == [1, 1, 2, 0]
    assert [sample.name for sample in samples[::2]] == ["a/image.tif", "valid/a/image.tif"]
    assert [*dataset.left_out.values()] == [[root / "valid" / "loose.png"]]
    (root / "groups.csv").write_text("name,group\na,p\nvalid/a,q\n")
    assert open_dataset(root, CONFIG).groups == {"a": "p", "valid/a": "q"}
    for path in (root / "groups.csv", *(root / "valid").rglob("class*.tif")):
        path.unlink()
    dataset = open_dataset(root, CONFIG)  # images without ground truth
    assert (dataset.names, dataset.validation) == (["a", "b"], [])
    assert len(dataset.left_out["images without ground truth, not listed or not readable"]) == 3


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("train", "images/val"), ("", "val"), ("train", "validation")],
)
def test_validation_folders_of_pairs(tmp_path, train, val):
    write_pair(tmp_path / (train or "images"), "a")
    write_pair(tmp_path / val, "a")
    Image.fromarray(RGB).save(tmp_path / val / "b.png")
    write_geojson(tmp_path / val / "b.geojson", [outline(ring(0, 0, 2, 2), kind="x")])
    Image.fromarray(RGB).save(tmp_path / val / "alone.png")
    dataset = open_dataset(tmp_path, CONFIG)
    own, others = [f"{val}/a.png", f"{val}/b.png"], ["a.png" if train else "images/a.png"]
    assert (dataset.layout, dataset.validation) == ("pairs", own)
    assert sorted(dataset.names) == sorted(own + others)
    assert dataset.categories == {1: "cell", 2: "x"}
    labels = [dataset.read(name).labels.tolist() for name in own + others]
    assert labels == [[1, 1], [2], [1, 1]]
    assert [*dataset.left_out.values()] == [[tmp_path / val / "alone.png"]]


@pytest.mark.parametrize("listed", ["v", "v.png", "val/v", "val/v.png"])
def test_validation_images_of_a_table(tmp_path, listed):
    root = make_csv(tmp_path, f"id,annotation\na,1 1\nval/a,1 2 15 2\n{listed},2 2\n")
    (root / "val").mkdir()
    for name in ("a", "v", "alone"):
        Image.fromarray(RGB).save(root / "val" / f"{name}.png")
    dataset = open_dataset(root, CONFIG)
    assert dataset.names == ["a", "val/a", "val/v"]  # a: as written, of train/
    assert dataset.validation == ["val/a", "val/v"]
    samples = [dataset.read(name) for name in dataset.names]
    assert [sample.name for sample in samples] == ["a.png", "val/a.png", "val/v.png"]
    assert [int((sample.layers > 0).sum()) for sample in samples] == [1, 4, 2]
    (paths,) = dataset.left_out.values()
    assert {path.relative_to(root).as_posix() for path in paths} == {"train/b.png", "val/alone.png"}
    (root / "train.csv").write_text("id,annotation\na,1 1\nb,1 1\n")
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.validation) == (["a", "b"], [])
    assert len(*dataset.left_out.values()) == 3


# Images alone, real data


def test_label_images_beside_images_are_left_out(tmp_path):
    kept = ["a.png", "b.png", "c_masks.png", "d_img.png", "h.ome.tif"]
    outputs = ["a_cp_masks.png", "a_cp_output.png", "a_flows.tif", "a_outlines_cp_masks.png"]
    outputs += ["b_masks.tif", "d_img_cp_masks.tif", "d_labels.png", "d_masks.png"]
    outputs += ["h.ome_cp_masks.tif", "h_masks.ome.tif", "a_dP.tif", "a_flows_cp_masks.tif"]
    outputs = sorted(outputs)
    others = ["e.webp", "f.czi"]
    for name in (*kept, *outputs):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / name)
    for name in (*others, "notes.txt", ".hidden.czi"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    Image.fromarray(RGB).save(tmp_path / "sub" / "g.png")
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.layout, dataset.names) == ("images", [])
    assert dataset.test_images == [(tmp_path / name, k, 8, 9) for k, name in enumerate(kept, 1)]
    assert dataset.left_out == {
        "files of labels, outputs of Cellpose or StarDist": [tmp_path / name for name in outputs],
        "files of another kind": [tmp_path / name for name in others],
        "images without ground truth, not listed or not readable": [tmp_path / "sub" / "g.png"],
    }


def test_an_odd_file_among_pictures_is_left_out(tmp_path, capsys):
    for name in ("a.png", "c.png"):
        Image.fromarray(RGB).save(tmp_path / name)
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    dataset = open_dataset(tmp_path, CONFIG)
    assert [record[:2] for record in dataset.test_images] == [
        (tmp_path / "a.png", 1),
        (tmp_path / "c.png", 2),
    ]
    printed = capsys.readouterr().out
    assert f"WARNING: left out, 2 of 4 images: {tmp_path / 'b.png'}: cannot be read" in printed
    (paths,) = dataset.left_out.values()
    assert paths == [tmp_path / "b.png"]
    for name in ("a.png", "c.png"):
        (tmp_path / name).unlink()
    with refused("2 of 2 images: .*b.png: cannot be read"):
        open_dataset(tmp_path, CONFIG)


def test_a_listed_image_that_cannot_be_read_is_refused(tmp_path):
    root = make_csv(tmp_path, "id,annotation\na,1 2\n")
    (root / "test").mkdir(exist_ok=True)
    (root / "test" / "t.png").write_text("no picture")
    (root / "sample_submission.csv").write_text("id,predicted\nt,\n")
    with refused("1 of 1 images: .*t.png: cannot be read"):
        open_dataset(root, CONFIG)


@pytest.mark.parametrize("layout", ["folders", "csv", "coco", "pairs", "images"])
def test_all_layouts_read_the_chosen_channels(tmp_path, layout):
    planes = np.stack([RGB[..., 0], RGB[..., 1]]) * np.uint16(50)
    name = "train/a/image.tif" if layout == "folders" else "train/a.tif"
    for path in (name, "test/t.tif"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / path, planes, photometric="minisblack")
    if layout == "folders":
        save(tmp_path / "train/a/class1.tif", IDS)
    elif layout == "csv":
        (tmp_path / "train.csv").write_text("id,annotation\na,16 3\n")
    elif layout == "coco":
        images = [dict(id=1, file_name="a.tif", height=10, width=14)]
        rows = [dict(id=1, image_id=1, category_id=1, segmentation=[[1, 1, 4, 1, 4, 3]])]
        content = dict(images=images, annotations=rows, categories=[dict(id=1, name="x")])
        write_json(content, tmp_path / "train.json")
    elif layout == "pairs":
        save(tmp_path / "train/a_masks.tif", IDS)
    else:
        tmp_path = tmp_path / "test"
    config = make_config("demo", channels=(2, 1), class_names=["x"])
    dataset = open_dataset(tmp_path, config)
    assert dataset.layout == layout
    assert [image[2:] for image in dataset.test_images] == [(10, 14)]
    for name in dataset.names:
        image = dataset.read(name).image.numpy()
        assert np.array_equal(image, read_image(tmp_path / "test/t.tif", (2, 1)))
        assert np.corrcoef(image[0].ravel(), RGB[..., 1].ravel())[0, 1] > 0.99
        assert np.corrcoef(image[1].ravel(), RGB[..., 0].ravel())[0, 1] > 0.99
    assert len(dataset.names) == (layout != "images")
    with refused("2 pages of similar size"):
        plain = open_dataset(tmp_path, CONFIG)
        plain.read(plain.names[0])


def test_the_real_mapping_without_its_images_is_refused():
    root = real_data("hw3-real")
    with refused("101 of 101 names: not there", root / MAPPING_NAME):
        open_dataset(root, CONFIG)
