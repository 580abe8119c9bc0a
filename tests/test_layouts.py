from collections import Counter
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
import pycocotools.mask
import pytest
import torch

from src_snippets.data.layouts import (
    dataset_roots,
    find_dataset,
    has_ground_truth,
    image_files,
    MAPPING_NAME,
    open_dataset,
    segmentation_pixels,
)
from src_snippets.data.rle import rle_to_csv
from src_snippets.data.structures import coco_ground_truth, ground_truth
from src_snippets.setup.config import make_config
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
    assert not has_ground_truth(own)
    (own / "train" / "a" / "class2.tif").touch()
    assert has_ground_truth(own)
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


def test_uploads_without_a_dataset_are_refused(tmp_path):
    """The demo in place of a dataset that was not recognised would look like a result."""
    for name in ("sample_data", "results", ".config", "drive"):
        (tmp_path / name).mkdir()
    assert find_dataset("", [str(tmp_path)]) is None
    (tmp_path / "data.zip").touch()
    with no_dataset(r"but data\.zip\. .*Unpack archives"):
        find_dataset("", [str(tmp_path)])
    deep = make_root(tmp_path / "datasets" / "owner" / "slug" / "top" / "top")
    assert find_dataset("", [str(tmp_path)]) == deep
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
    assert (dataset.layout, dataset.names) == ("folders", ["a", "b"])
    assert dataset.categories == {1: "tumour", 2: "other"}
    assert dataset.test_images == [(root / "test_release" / "a.tif", 3, 10, 14)]
    assert dataset.read("b").name == "b/image.tif"
    (root / MAPPING_NAME).write_text(json.dumps([ENTRY]), encoding="utf-8-sig")  # from Windows
    assert len(open_dataset(root, CONFIG).test_images) == 1
    assert capsys.readouterr().out == ""
    Image.fromarray(RGB).save(root / "train" / "loose.png")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert open_dataset(root, CONFIG).names == ["a", "b"]
    assert "read 2 of 3 images, left out 1: not listed, or not in a" in capsys.readouterr().out


def test_test_images_and_mapping_need_no_training_images(tmp_path):
    root = make_mapping(tmp_path / "data", [ENTRY], "")
    assert find_dataset("", [str(tmp_path)]) == root
    assert not has_ground_truth(root)
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
        ([{"file_name": "a.tif", "id": 1}], "expected a plain file_name .* height and width"),
        ([dict(ENTRY, id="1")], "expected a plain file_name .*whole id"),
        ([dict(ENTRY, height=10.5)], "whole id, height and width"),
        ([dict(ENTRY, file_name="../a.tif")], "expected a plain file_name"),
        ([dict(ENTRY, file_name="/etc/passwd")], "expected a plain file_name"),
        ([dict(ENTRY, file_name="..")], "expected a plain file_name"),
        ([dict(ENTRY, file_name="")], "expected a plain file_name"),
        ([dict(ENTRY, file_name="a\\b.tif")], "is not there"),
        ([ENTRY, dict(ENTRY, file_name="b.tif")], "id 3 occurs twice"),
        ([ENTRY, dict(ENTRY, id=4)], "file_name 'a.tif' occurs twice"),
        ([dict(ENTRY, file_name="b.tif")], "b.tif is not there"),
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


def test_images_without_rows_are_counted(tmp_path, capsys):
    dataset = open_dataset(make_csv(tmp_path, HEADER + "b,-1,14,10,long\n"), CONFIG)
    assert len(dataset.read("b").labels) == 0  # as submissions write an image without instances
    out = capsys.readouterr().out
    assert "read 1 of 2 images, left out 1: not listed" in out
    assert str(tmp_path / "train" / "a.png") in out


def test_csv_with_wells_and_a_sample_submission(tmp_path):
    make_csv(tmp_path, "id,annotation,sample_id\na,1 1,w1\nb,1 1,w1\n")
    (tmp_path / "test" / "unlisted.png").write_bytes(b"")
    (tmp_path / "sample_submission.csv").write_text("id,predicted\nc,1 1\nc,\n")
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.groups == {"a": "w1", "b": "w1"}
    assert [image.path.name for image in dataset.test_images] == ["c.png"]
    assert dataset.categories == {1: "cell"}
    (tmp_path / "sample_submission.csv").write_text("id,predicted\n../train/a,1 1\n")
    with refused("train/a'.*no such image", tmp_path / "sample_submission.csv"):
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
        (HEADER + "a,1,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 0,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,0 1,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,139 3,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 99999999999999,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + f"a,{2**63 - 1} 2,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 3 2 1,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 x,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 99999999999999999999,14,10,x\n", "a, annotation 2: cannot be read"),
        (HEADER + "a,1 1,15,10,x\n", r"\(10, 14\) \(H, W\), but stated as \('10', '15'\)"),
        (HEADER + "a,1 1,14,10,x\na,2 1,14,11,x\n", "of one id state different sizes"),
        (HEADER + "d,1 1,14,10,x\n", r"\['d'\], but no such image"),
        (HEADER + "../a,1 1,14,10,x\n", "but no such image"),
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
    """Two images; a polygon, both kinds of RLE and a crowd on the second."""
    square = np.zeros((10, 14), np.uint8, order="F")
    square[2:5, 3:9] = 1
    compressed = pycocotools.mask.encode(square)
    compressed["counts"] = compressed["counts"].decode()
    plain = {"size": [10, 14], "counts": [0, 2, 138]}
    shapes = [[[3, 2, 9, 2, 9, 5, 3, 5]], plain, compressed, plain]
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


def test_a_coco_file(tmp_path):
    dataset = open_dataset(make_coco(tmp_path, coco_content()), CONFIG)
    assert (dataset.layout, dataset.names) == ("coco", ["a.png", "deep/b.png"])
    assert list(dataset.categories.items()) == [(3, "round"), (7, "long")]
    assert dataset.test_images == [(tmp_path / "test" / "c.png", 1, 10, 14)]
    assert len(dataset.read("a.png").labels) == 0
    sample = dataset.read("deep/b.png")
    assert (sample.name, sample.labels.tolist()) == ("deep/b.png", [2, 2, 1, -1])
    assert [int((sample.layers == i).sum()) for i in (1, 2, 3, 4)] == [18, 18, 2, 2]
    assert torch.equal((sample.layers == 1).any(0), (sample.layers == 2).any(0))
    # Without overlaps the crowd, though listed first, gets no pixel that an instance has.
    alone = open_dataset(tmp_path, make_config("demo", overlaps=False)).read("deep/b.png")
    assert alone.labels.tolist() == [2, 1]
    entry = dict(file_name="c.png", id=77, height=10, width=14)
    (tmp_path / "test.json").write_text(json.dumps({"images": [entry]}))
    assert open_dataset(tmp_path, CONFIG).test_images[0].image_id == 77


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
        (dict(annotations={}), "expected a COCO file with lists of images, annotations and cat"),
        (dict(annotations=[5]), "cannot be read"),
        (dict(annotations=[dict(ROW, image_id=8)]), "annotation 5: image_id 8.*expected listed"),
        (dict(annotations=[dict(ROW, image_id=[9])]), r"annotation 5: image_id \[9\]"),
        (dict(annotations=[dict(ROW, category_id=1)]), "category_id 1.*expected listed ones"),
        (dict(annotations=[dict(ROW, iscrowd="0")]), "iscrowd '0'; expected .* iscrowd 0 or 1"),
        (dict(annotations=[{k: ROW[k] for k in ("image_id", "category_id")}]), "a segmentation"),
        (dict(annotations=[dict(ROW, segmentation="1 5")]), "expected .* a segmentation"),
        (polygon_row(1, 2, 3, 4, 1e9, 5), "annotation 5: polygon"),
        (polygon_row(1, 2, 3, 4), "annotation 5: polygon"),
        (polygon_row(1, 2, 3, 4, 5, 6, 7), "annotation 5: polygon"),
        (polygon_row(1, 2, 3, 4, "x", 5), "annotation 5: polygon"),
        (polygon_row(1, 2, 3, 4, math.nan, 5), "annotation 5: polygon"),
        (dict(annotations=[dict(ROW, segmentation=[])]), "annotation 5: polygon"),
        (dict(annotations=[dict(ROW, segmentation={})]), "annotation 5: cannot be read"),
        (rle_row(counts=[math.inf]), "annotation 5"),
        (rle_row(counts=[10**20]), "annotation 5"),
        (rle_row(size=[9, 9], counts=[81]), r"RLE of size \[9, 9\] in an image of \[10, 14\]"),
        (rle_row(counts=[7]), "add up to 7"),
        (dict(categories=[dict(name="x")]), "cannot be read"),
        (dict(categories=[dict(id="3", name="x")]), "expected whole numbers, each once"),
        (dict(categories=[dict(id=3, name=n) for n in "ab"]), "whole numbers, each once"),
        (dict(images=[dict(file_name="../x.png", id=1, height=1, width=1)]), "a plain file_name"),
        (dict(images=[dict(file_name="x.png", id=9, height=1, width=1)]), "x.png is not there"),
        (dict(images=[dict(file_name="a.png", id=9, height=1, width=1)]), "but stated as"),
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


def test_polygons_beside_the_image_are_cut_at_its_border():
    assert segmentation_pixels([[-9, -9, 2, -9, 2, 2, -9, 2]], 4, 5).tolist() == [0, 1, 5, 6]
    # A triangle that leaves the image on the left: no side of it is bent.
    inside = segmentation_pixels([[-100, 0, 50, 50, -100, 100]], 100, 100)
    assert 800 < len(inside) < 870
    assert segmentation_pixels(dict(size=[4, 5], counts=[20]), 4, 5).tolist() == []
    two = [[0, 0, 1, 0, 1, 1, 0, 1], [4, 0, 5, 0, 5, 1, 4, 1]]  # one instance in two pieces
    assert segmentation_pixels(two, 4, 5).tolist() == [0, 4]


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


# Images alone, real data


def test_label_images_beside_images_are_left_out(tmp_path, capsys):
    for name in ("a.png", "a_cp_masks.png", "b.png", "b_masks.tif", "c_masks.png"):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / name)
    dataset = open_dataset(tmp_path, CONFIG)
    assert (dataset.layout, dataset.names) == ("images", [])
    assert dataset.test_images[1:] == [
        (tmp_path / "b.png", 2, 8, 9),
        (tmp_path / "c_masks.png", 3, 8, 9),
    ]
    out = capsys.readouterr().out
    assert "read 3 of 5 images, left out 2: label images of Cellpose" in out


def test_the_real_mapping_without_its_images_is_refused():
    root = real_data("hw3-real")
    with refused("is not there", root / MAPPING_NAME):
        open_dataset(root, CONFIG)
