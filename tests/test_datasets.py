from collections import Counter
from dataclasses import replace
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image
import pycocotools.mask
import pytest
import torch

from src_snippets import datasets
from src_snippets.config import recipe
from src_snippets.datasets import (
    CellDataset,
    CellSamples,
    channel_statistics,
    choose_splits,
    coco_pixels,
    describe_groups,
    fold_images,
    free_memory_bytes,
    open_dataset,
    open_folders,
    pick,
    read_test_mapping,
    split_images,
    training_folders,
    unevenness,
    write_json,
)
from src_snippets.demo import save_lzw
from src_snippets.forms import coco_truth, truth_instances
from src_snippets.places import MAPPING_NAME
from src_snippets.rle import kaggle_text
from src_snippets.writers import write_cell_folder
from tests.conftest import make_sample, real_data, refused, save, write_folder

CONFIG = recipe("demo")
RGB = np.random.default_rng(1).integers(0, 256, (10, 14, 3), dtype=np.uint8)


def folders_dataset(root: Path) -> CellDataset:
    """A dataset of the folders in `root/train`, with a test image if it has none."""
    if not (root / MAPPING_NAME).exists():
        make_root(root, [ENTRY])
        save(root / "test_release" / "a.tif", RGB, photometric="rgb")
    return open_folders(root, CONFIG)


def test_the_budget_bounds_what_is_kept(tmp_path):
    for name in "abc":
        write_folder(tmp_path / "train" / name, {1: np.eye(12, 16)})
    one = 12 * 16 * (3 + 2)
    samples = CellSamples(folders_dataset(tmp_path), cache_gb=2 * one / 1e9)
    assert len(samples) == 3
    assert samples[0] is samples[0]
    assert samples[2] is not samples[2]
    assert samples[2].labels.tolist() == [1]
    assert samples.counts.tolist() == [[0, 1, 0, 0, 0]] * 3
    assert [s.name for s in samples] == ["a/image.tif", "b/image.tif", "c/image.tif"]


def test_half_of_the_free_memory_bounds_it_too(tmp_path, monkeypatch, capsys):
    for name in "abc":
        write_folder(tmp_path / "train" / name, {1: np.eye(12, 16)})
    dataset = folders_dataset(tmp_path)
    sample = dataset.read(dataset.names[0])
    one = sample.image.nbytes + sample.layers.nbytes
    monkeypatch.setattr(datasets, "free_memory_bytes", lambda: 4 * one)
    assert len(CellSamples(dataset, cache_gb=1.0)._kept) == 2
    assert "2 of 3 images stay in memory (0.0 GB)" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as many processes share the machine
    assert len(CellSamples(dataset, cache_gb=1.0)._kept) == 1
    monkeypatch.undo()
    assert 1e8 < free_memory_bytes() < 1e13
    assert len(CellSamples(dataset, cache_gb=1.0)._kept) == 3


def test_the_digest_changes_with_any_id(tmp_path):
    ids = np.eye(12, 16)
    maps = {"a": {1: ids}, "b": {1: ids}, "c": {1: ids.copy()}, "d": {2: ids}}
    maps["c"][1][0, 5] = 1
    for name, own in maps.items():
        write_folder(tmp_path / name / "train" / "x", own)
    one, same, *others = (CellSamples(folders_dataset(tmp_path / n), 1.0).digest for n in maps)
    assert one == same
    assert len({one, *others}) == 3


def test_data_without_cells_or_folders_is_refused(tmp_path):
    write_folder(tmp_path / "train" / "bare", {})
    with refused("no cells in any training image", tmp_path):
        CellSamples(folders_dataset(tmp_path), 1.0)
    (tmp_path / "none" / "train").mkdir(parents=True)
    with refused("no folders", tmp_path / "none" / "train"):
        training_folders(tmp_path / "none")


# Test mapping


def make_root(tmp_path, entries) -> Path:
    (tmp_path / "test_release").mkdir(exist_ok=True)
    (tmp_path / MAPPING_NAME).write_text(
        entries if isinstance(entries, str) else json.dumps(entries)
    )
    return tmp_path


ENTRY = dict(file_name="a.tif", id=3, height=10, width=14)


def test_mapping(tmp_path):
    root = make_root(tmp_path, [ENTRY])
    save(root / "test_release" / "a.tif", RGB, compression="lzw", photometric="rgb")
    (image,) = read_test_mapping(root)
    assert image == (root / "test_release" / "a.tif", 3, 10, 14)
    (root / MAPPING_NAME).write_text(json.dumps([ENTRY]), encoding="utf-8-sig")  # from Windows
    assert len(read_test_mapping(root)) == 1


@pytest.mark.parametrize(
    ("entries", "cause"),
    [
        ("{", "not JSON"),
        ([], "lists no images"),
        ([{"file_name": "a.tif", "id": 1}], "KeyError: 'height'; expected of each image"),
        ([dict(ENTRY, id="1")], "expected a name and whole numbers"),
        ([dict(ENTRY, file_name="../a.tif")], "expected a plain name"),
        ([dict(ENTRY, file_name="/etc/passwd")], "expected a plain name"),
        ([dict(ENTRY, file_name="..")], "expected a plain name"),
        ([dict(ENTRY, file_name="a\\b.tif")], "expected a plain name"),
        ([dict(ENTRY, file_name="")], "expected a plain name"),
        ([ENTRY, dict(ENTRY, file_name="b.tif")], "id 3 occurs twice"),
        ([ENTRY, dict(ENTRY, id=4)], "file_name 'a.tif' occurs twice"),
        ([dict(ENTRY, file_name="b.tif")], "is not there"),
        ([dict(ENTRY, width=15)], r"\(10, 14\) \(H, W\), but .* says \(10, 15\)"),
    ],
)
def test_mappings_that_are_refused(tmp_path, entries, cause):
    root = make_root(tmp_path, entries)
    save(root / "test_release" / "a.tif", RGB, photometric="rgb")
    with refused(cause, root):
        read_test_mapping(root)


def test_a_test_image_that_is_no_tiff_is_refused(tmp_path):
    root = make_root(tmp_path, [ENTRY])
    (root / "test_release" / "a.tif").write_bytes(b"II*\0")
    with refused("cannot be read", root / "test_release" / "a.tif"):
        read_test_mapping(root)


# Split


def test_split_is_by_image_repeatable_and_complete():
    names = [f"n{i}" for i in range(10)]
    split = split_images(names, 0.2, seed=1)
    assert (len(split["train"]), len(split["val"])) == (8, 2)
    assert sorted(split["train"] + split["val"]) == names
    assert split == split_images(names[::-1], 0.2, seed=1)
    assert split != split_images(names, 0.2, seed=2)
    assert split_images(names, 0.0, 1)["val"] == []
    assert split_images(["a", "b"], 0.01, 1)["val"] != []
    assert split_images(["a"], 0.9, 1) == {"train": ["a"], "val": []}


def test_a_split_with_groups_is_near_the_share():
    names = [f"n{i:02}" for i in range(40)]
    groups = {name: f"g{min(i // 4, 5)}" for i, name in enumerate(names)}  # five of 4, one of 20
    for seed in range(20):
        split = split_images(names, 0.2, seed, groups)
        assert 8 <= len(split["val"]) <= 10  # never the large one
    most = {name: f"g{i // 13}" for i, name in enumerate(names[:39])}  # three of 13, one image
    assert len(split_images(names, 0.2, 0, most)["val"]) >= 13  # not that image alone
    two = {name: f"g{i // 20}" for i, name in enumerate(names)}
    assert len(split_images(names, 0.2, 0, two)["val"]) == 20  # the smallest, where all are larger


def test_fields_that_look_alike_stay_together(tmp_path):
    rng, colors = np.random.default_rng(0), [(200, 60, 60), (60, 200, 60), (60, 60, 200)]
    cells = np.zeros((40, 40), int)
    cells[10:20, 10:20] = 1
    for number in range(48):
        folder = tmp_path / "train" / f"n{number:02}"
        write_folder(folder, {1 + number % 2: cells}, (40, 40))
        noise = rng.integers(-40, 40, (40, 40, 3))
        image = np.clip(np.array(colors[number % 3]) + noise, 0, 255).astype(np.uint8)
        save_lzw(image, folder / "image.tif")
    samples = CellSamples(folders_dataset(tmp_path), 1.0)
    groups = samples.groups("look")
    assert choose_splits(samples, CONFIG)[0]["val"]
    slides = {}
    for name, group in groups.items():
        slides.setdefault(group, set()).add(int(name[1:]) % 3)
    assert all(len(slide) == 1 for slide in slides.values())
    assert samples.groups("image") == {}
    split = choose_splits(samples, CONFIG)[0]
    assert {groups[n] for n in split["val"]}.isdisjoint(groups[n] for n in split["train"])
    assert choose_splits(samples, CONFIG) == {0: split}
    folds = choose_splits(samples, recipe("demo", folds=3)).values()
    assert sorted(n for fold in folds for n in fold["val"]) == samples.names
    for fold in folds:
        assert {groups[n] for n in fold["val"]}.isdisjoint(groups[n] for n in fold["train"])
    own = replace(samples.dataset, groups={"n00": "patient"})
    samples.dataset = own
    assert samples.groups("look") == {"n00": "patient"}  # the dataset knows better


def test_groups_in_words():
    names = ["a", "b", "c", "d"]
    assert describe_groups({}, names) == "each image by itself"
    assert describe_groups(dict(a="x", b="y", c="z", d="w"), names) == "each image by itself"
    assert describe_groups(dict(a="x", b="x", c="z", d="z"), names) == "2 groups of 2 to 2 images"
    some = describe_groups(dict(a="x", b="x", c="z"), names)
    assert some == "2 groups of 1 to 2 images, 1 images by themselves"


def test_the_split_spreads_the_classes(tmp_path):
    one = np.zeros((12, 16), int)
    one[2:6, 2:6] = 1
    for number in range(20):
        write_folder(tmp_path / "train" / f"n{number:02}", {1 + (number < 5): one})
    samples = CellSamples(folders_dataset(tmp_path), 1.0)
    for seed in range(5):
        (split,) = choose_splits(samples, recipe("demo", seed=seed, split_by="image")).values()
        assert sum(name < "n05" for name in split["val"]) == 1  # a quarter, as of all
        assert unevenness([split], samples) == pytest.approx(abs(1 / 5 - 0.2) + abs(3 / 15 - 0.2))


def test_write_json(tmp_path):
    write_json({"a": [1]}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1]}


# Groups and folds


def test_groups_are_never_split():
    names = [f"n{i:02}" for i in range(12)]
    groups = {name: f"patient{i // 3}" for i, name in enumerate(names[:9])}
    split = split_images(names, 0.3, seed=0, groups=groups)
    sides = [{groups.get(name, name) for name in side} for side in split.values()]
    assert not sides[0] & sides[1]
    assert 4 <= len(split["val"]) <= 6
    folds = fold_images(names, 3, seed=0, groups=groups)
    assert [len(fold["val"]) for fold in folds] == [4, 4, 4]
    assert sorted(name for fold in folds for name in fold["val"]) == names
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == names
        assert not {groups.get(n, n) for n in fold["val"]} & {
            groups.get(n, n) for n in fold["train"]
        }
    assert folds == fold_images(names[::-1], 3, 0, groups) != fold_images(names, 3, 1, groups)
    with pytest.raises(ValueError, match="folds=7: there are 6 images or groups"):
        fold_images(names, 7, 0, groups)


def test_a_recipe_chooses_its_splits(demo_samples):
    assert list(choose_splits(demo_samples, CONFIG)) == [0]
    folds = choose_splits(demo_samples, recipe("demo", folds=4))
    assert list(folds) == [1, 2, 3, 4]
    assert choose_splits(demo_samples, recipe("demo", folds=4, fold=3)) == {3: folds[3]}
    held = pick(demo_samples, folds[2]["val"])
    assert [Path(sample.name).parent.name for sample in held] == folds[2]["val"]


def test_statistics_of_the_channels():
    one, two = (make_sample([np.zeros((2, 3), int)], [1], seed) for seed in (1, 2))
    pixels = torch.cat([one.image.flatten(1), two.image.flatten(1)], 1) / 255
    found = channel_statistics([one, two])
    assert np.allclose(found["pixel_mean"], pixels.mean(1), atol=6e-4)
    assert np.allclose(found["pixel_std"], pixels.std(1, correction=0), atol=6e-4)
    recipe("demo", **found)


def test_groups_of_a_file(tmp_path):
    for name in "abc":
        write_folder(tmp_path / "train" / name, {1: np.eye(12, 16)})
    (tmp_path / "groups.csv").write_text("name,group\na,p1\nc,p1\n")
    assert folders_dataset(tmp_path).groups == {"a": "p1", "c": "p1"}
    (tmp_path / "groups.csv").write_text("name,group\nx,p1\n")
    with refused("'x' is no training image", tmp_path / "groups.csv"):
        folders_dataset(tmp_path)
    (tmp_path / "groups.csv").write_text("image,group\nx,p1\n")
    (tmp_path / "groups.csv").write_text("name,group\na,\nb,p\n")
    assert folders_dataset(tmp_path).groups == {"b": "p"}
    (tmp_path / "groups.csv").write_text("name,group\na,p\na,q\n")
    with refused("'a' is in two groups", tmp_path / "groups.csv"):
        folders_dataset(tmp_path)
    with pytest.raises(ValueError, match="All images are of one group"):
        split_images(["a", "b"], 0.5, 0, {"a": "p", "b": "p"})
    (tmp_path / "groups.csv").write_text("image,group\nx,p1\n")
    with refused("group, image; expected the columns group, name", tmp_path / "groups.csv"):
        folders_dataset(tmp_path)


# Tables

HEADER = "id,annotation,width,height,cell_type\n"


def make_table(root: Path, text: str) -> Path:
    """A dataset in a table with the pictures a.png and b.png, and c.png to answer."""
    for part, names in (("train", "ab"), ("test", "c")):
        (root / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(RGB[..., 0]).save(root / part / f"{name}.png")
    (root / "train.csv").write_text(text)
    return root


def test_tables_with_the_line_ends_of_windows(tmp_path):
    rows = "a,1 1,14,10,long\nb,3 3,14,10,round\n"
    root = make_table(tmp_path, "")
    text = (HEADER + rows).replace("\n", "\r\n")
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (root / "groups.csv").write_bytes(b"name,group\r\na,slide 1\r\nb,slide 2\r\n")
    dataset = open_dataset(root, CONFIG)
    assert (dataset.names, dataset.categories) == (["a", "b"], {1: "long", 2: "round"})
    assert dataset.groups == {"a": "slide 1", "b": "slide 2"}
    assert dataset.read("b").labels.tolist() == [2]


def test_a_table(tmp_path):
    rows = "b,2 2 16 1,14,10,round\na,1 1,14,10,long\nb,3 3,14,10,long\nb,,14,10,long\n"
    dataset = open_dataset(make_table(tmp_path, HEADER + rows), CONFIG)
    assert (dataset.layout, dataset.names) == ("table", ["a", "b"])
    assert dataset.categories == {1: "long", 2: "round"}
    assert dataset.test_images == [(tmp_path / "test" / "c.png", 1, 10, 14)]
    sample = dataset.read("b")
    assert (sample.name, sample.size, sample.labels.tolist()) == ("b.png", (10, 14), [2, 1])
    assert sample.image[0].numpy().tolist() == RGB[..., 0].tolist()
    first, second = sample.layers[:, :2, :5].tolist()  # pixel 3 belongs to both
    assert first == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]
    assert second == [[0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]
    alone = open_dataset(tmp_path, recipe("demo", overlaps=False)).read("b")
    assert alone.layers[:, :2, :5].tolist() == [[[0, 1, 1, 2, 2], [0, 1, 0, 0, 0]]]
    assert [kaggle_text(rle) for rle in truth_instances(sample).rles] == ["2 2 16 1", "3 3"]


def test_pictures_without_rows_are_told(tmp_path, capsys):
    dataset = open_dataset(make_table(tmp_path, HEADER + "b,-1,14,10,long\n"), CONFIG)
    assert len(dataset.read("b").labels) == 0  # as our own submissions write no cells
    assert "1 pictures without a row are left out" in capsys.readouterr().out


def test_a_table_with_wells_and_a_sample_submission(tmp_path):
    rows = "id,annotation,sample_id\na,1 1,w1\nb,1 1,w1\n"
    make_table(tmp_path, rows)
    (tmp_path / "test" / "unlisted.png").write_bytes(b"")
    (tmp_path / "sample_submission.csv").write_text("id,predicted\nc,1 1\nc,\n")
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.groups == {"a": "w1", "b": "w1"}
    assert [image.path.name for image in dataset.test_images] == ["c.png"]
    assert dataset.categories == {1: "cell"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("id,mask\na,1 1\n", "id, mask; expected the columns annotation, id"),
        ("", "no rows; expected the columns"),
        (HEADER + "a,1 1\n", "row 2: not as many values as columns"),
        (HEADER + "a,1 1,14,10,x,y\n", "row 2: not as many values as columns"),
        (HEADER + 'a,"1 1,14,10,x\n', "not CSV"),
        (HEADER + "a,1,14,10,x\n", "'a': 1 numbers; expected pairs"),
        (HEADER + "a,1 0,14,10,x\n", "expected pairs of start and length from 1 on"),
        (HEADER + "a,0 1,14,10,x\n", "pixels outside of 1 to 140"),
        (HEADER + "a,139 3,14,10,x\n", "pixel 141 outside of 1 to 140"),
        (HEADER + "a,1 99999999999999,14,10,x\n", "pixels outside of 1 to 140"),
        (HEADER + f"a,{2**63 - 1} 2,14,10,x\n", "pixels outside of 1 to 140"),
        (HEADER + "a,1 3 2 1,14,10,x\n", "named twice"),
        (HEADER + "a,1 x,14,10,x\n", "no number"),
        (HEADER + "a,1 99999999999999999999,14,10,x\n", "no number"),
        (HEADER + "a,1 1,15,10,x\n", r"\(10, 14\) \(H, W\), but .* says \('10', '15'\)"),
        (HEADER + "d,1 1,14,10,x\n", "is not there, but .* lists 'd'"),
        (HEADER + "../a,1 1,14,10,x\n", "expected a plain name"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, cause):
    with refused(cause, tmp_path):
        dataset = open_dataset(make_table(tmp_path, text), CONFIG)
        dataset.read(dataset.names[0])


def test_all_of_the_real_table_round_trips():
    root = real_data("dsb2018-csv")
    dataset = open_dataset(root, CONFIG)
    rows = Counter()
    for line in (root / "train.csv").read_text().splitlines()[1:]:
        name, text, *_ = line.split(",")
        rows[name, text] += 1
    found = Counter()
    for name in dataset.names:
        sample = dataset.read(name)
        found.update((name, kaggle_text(rle)) for rle in truth_instances(sample).rles)
    assert (len(dataset.names), len(dataset.test_images), found.total()) == (200, 60, 9_827)
    assert found == rows
    assert dataset.categories == {1: "nucleus"}


# COCO


def coco_content(**changes) -> dict:
    """Two images; a polygon, both kinds of run lengths and a crowd on the second."""
    square = np.zeros((10, 14), np.uint8, order="F")
    square[2:5, 3:9] = 1
    compressed = pycocotools.mask.encode(square)
    compressed["counts"] = compressed["counts"].decode()
    plain = {"size": [10, 14], "counts": [0, 2, 138]}
    shapes = [[[3, 2, 9, 2, 9, 5, 3, 5]], compressed, plain, plain]
    rows = [
        dict(id=k, image_id=9, category_id=(7, 3)[k % 2], segmentation=shape, iscrowd=int(k == 3))
        for k, shape in enumerate(shapes)
    ]
    images = [
        dict(file_name=name, id=number, height=10, width=14)
        for name, number in (("a.png", 4), ("deep/b.png", 9))
    ]
    categories = [dict(id=7, name="long"), dict(id=3, name="round")]
    return dict(images=images, annotations=rows, categories=categories) | changes


def make_coco(root: Path, content) -> Path:
    """A COCO dataset with those two pictures, and a third to answer."""
    (root / "train" / "deep").mkdir(parents=True)
    (root / "test").mkdir()
    for place in ("train/a.png", "train/deep/b.png", "test/c.png"):
        Image.fromarray(RGB).save(root / place)
    (root / "train.json").write_text(json.dumps(content))
    return root


def test_a_coco_file(tmp_path):
    dataset = open_dataset(make_coco(tmp_path, coco_content()), CONFIG)
    assert (dataset.layout, dataset.names) == ("coco", ["a.png", "deep/b.png"])
    assert list(dataset.categories.items()) == [(3, "round"), (7, "long")]
    assert dataset.test_images == [(tmp_path / "test" / "c.png", 1, 10, 14)]
    assert len(dataset.read("a.png").labels) == 0
    sample = dataset.read("deep/b.png")
    assert sample.labels.tolist() == [2, 1, 2, -1]
    areas = [int((sample.layers == i).sum()) for i in (1, 2, 3, 4)]
    assert areas == [18, 18, 2, 2]
    assert (sample.layers == 1).any(0).nonzero().tolist() == (
        (sample.layers == 2).any(0).nonzero().tolist()
    )
    samples = CellSamples(dataset, 1.0)
    assert samples.counts.tolist() == [[0, 0, 0], [0, 1, 2]]
    entry = dict(file_name="c.png", id=77, height=10, width=14)
    (tmp_path / "test.json").write_text(json.dumps({"images": [entry]}))
    assert open_dataset(tmp_path, CONFIG).test_images[0].image_id == 77


ROW = dict(id=5, image_id=9, category_id=3, segmentation=[[1, 1, 4, 1, 4, 4]])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (dict(images=[]), "lists no images"),
        (dict(images=5), "no list of objects under 'images'"),
        (dict(annotations=[dict(ROW, image_id=8)]), "annotation 5: image_id 8 is of no image"),
        (dict(annotations=[dict(ROW, category_id=1)]), "annotation 5: category_id 1 is of no cat"),
        (dict(annotations=[dict(ROW, iscrowd="0")]), "annotation 5: iscrowd '0'; expected 0 or 1"),
        (dict(annotations=[{k: ROW[k] for k in ("image_id", "category_id")}]), "no segmentation"),
        (dict(annotations=[dict(ROW, segmentation=[[1, 2, 3, 4, 1e9, 5]])]), "annotation 5: pol"),
        (dict(annotations=[dict(ROW, segmentation=[[1, 2, 3, 4]])]), "annotation 5: polygon"),
        (
            dict(annotations=[dict(ROW, segmentation=[[1, 2, 3, 4, "x", 5]])]),
            "annotation 5: polygon",
        ),
        (
            dict(annotations=[dict(ROW, segmentation=[[1, 2, 3, 4, math.nan, 5]])]),
            "annotation 5: polygon",
        ),
        (
            dict(annotations=[dict(ROW, segmentation=dict(size=[10, 14], counts=[math.inf]))]),
            "annotation 5",
        ),
        (
            dict(annotations=[dict(ROW, segmentation=dict(size=[10, 14], counts=[10**20]))]),
            "annotation 5",
        ),
        (dict(annotations=[dict(ROW, segmentation=[])]), "annotation 5: no polygon"),
        (dict(annotations=[dict(ROW, segmentation=3)]), "expected polygons or size and counts"),
        (
            dict(annotations=[dict(ROW, segmentation={"size": [9, 9], "counts": [81]})]),
            r"segmentation size \[9, 9\], image size \[10, 14\]",
        ),
        (
            dict(annotations=[dict(ROW, segmentation={"size": [10, 14], "counts": [7]})]),
            "add up to 7",
        ),
        (dict(categories=[dict(name="x")]), "expected a whole number as id, and a name"),
        (dict(categories=[dict(id=3, name=n) for n in "ab"]), "two categories with one id"),
        (
            dict(images=[dict(file_name="../x.png", id=1, height=1, width=1)]),
            "expected a plain name",
        ),
        (dict(images=[dict(file_name="x.png", id=9, height=1, width=1)]), "is not there"),
        (dict(images=[dict(file_name="a.png", id=9, height=1, width=1)]), "Correct the one"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, changes, cause):
    make_coco(tmp_path, coco_content(**changes))
    with refused(cause, tmp_path):
        dataset = open_dataset(tmp_path, CONFIG)
        for name in dataset.names:
            dataset.read(name)


def test_what_is_no_coco_file_is_refused(tmp_path):
    make_coco(tmp_path, [])
    with refused("expected a COCO file with images, annotations, categories", tmp_path):
        open_dataset(tmp_path, CONFIG)
    (tmp_path / "train.json").write_bytes(b"\xff\xfe{")
    with refused("not UTF-8", tmp_path / "train.json"):
        open_dataset(tmp_path, CONFIG)
    (tmp_path / "train.json").write_text("{")
    with refused("not JSON", tmp_path / "train.json"):
        open_dataset(tmp_path, CONFIG)


def test_polygons_beside_the_image_are_cut_at_its_border():
    assert coco_pixels([[-9, -9, 2, -9, 2, 2, -9, 2]], 4, 5).tolist() == [0, 1, 5, 6]
    # A triangle that leaves the image on the left: no side of it is bent.
    inside = coco_pixels([[-100, 0, 50, 50, -100, 100]], 100, 100)
    assert 800 < len(inside) < 870


def partition(sample) -> set:
    """Class and pixels of every cell."""
    truth = truth_instances(sample)
    return {(int(k), rle["counts"]) for k, rle in zip(truth.labels, truth.rles, strict=True)}


def test_folders_to_coco_and_back_lose_nothing(demo_root, demo_samples, tmp_path):
    (tmp_path / "train").symlink_to(demo_root / "train")
    write_json(coco_truth(demo_samples, 4), tmp_path / "train_gt.json")
    dataset = open_dataset(tmp_path, CONFIG)
    assert dataset.categories == {k: f"class{k}" for k in range(1, 5)}
    back = CellSamples(dataset, 1.0)
    assert len(back) == len(demo_samples)
    for sample, again in zip(demo_samples, back, strict=True):
        assert torch.equal(sample.image, again.image)
        assert partition(sample) == partition(again)
    for sample in back:
        write_cell_folder(sample, tmp_path / "again" / "train" / Path(sample.name).parent)
    for sample, again in zip(
        back, CellSamples(folders_dataset(tmp_path / "again"), 1.0), strict=True
    ):
        assert torch.equal(sample.image, again.image)
        assert partition(sample) == partition(again)


# Real data


def test_all_consep_folders_load():
    root = real_data("consep")
    samples = CellSamples(open_dataset(root, CONFIG), 4.0)
    assert (len(samples), samples.counts.sum()) == (121, 16_333)
    assert (samples.counts.sum(1) == 0).sum() == 1
    assert all(int(s.layers.max()) == len(s.labels) for s in samples)
    assert len(read_test_mapping(root)) == 68


def test_the_real_mapping_without_its_images_is_refused():
    with refused("is not there, but .* lists it as 1"):
        read_test_mapping(real_data("hw3-real"))


def test_label_images_beside_pictures_are_no_pictures(tmp_path, capsys):
    for name in ("a.png", "a_cp_masks.png", "b.png", "b_masks.tif", "c_masks.png"):
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / name)
    images = open_dataset(tmp_path, recipe("demo")).test_images
    assert [image.path.name for image in images] == ["a.png", "b.png", "c_masks.png"]
    assert "2 label images beside their pictures are left out" in capsys.readouterr().out
