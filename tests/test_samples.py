from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from src_snippets.data import samples as module
from src_snippets.data.layouts import CellDataset, open_dataset
from src_snippets.data.samples import (
    available_memory,
    CellSamples,
    dataset_table,
    image_stem,
    make_splits,
    sample_records,
    subset,
)
from src_snippets.data.synthetic import save_rgba
from src_snippets.setup.config import make_config
from tests.conftest import make_sample, real_data, refused, write_folder

CONFIG = make_config("demo", split_by="image")


def open_folders(root: Path, maps: dict[str, dict]) -> CellDataset:
    """A dataset of training folders with these class maps."""
    for name, own in maps.items():
        write_folder(root / "train" / name, own)
    (root / "test_image_name_to_ids.json").write_text(
        '[{"file_name": "t.png", "id": 1, "height": 2, "width": 3}]'
    )
    (root / "test_release").mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(root / "test_release" / "t.png")
    return open_dataset(root, CONFIG)


class Counted(CellSamples):
    """Samples that exist as counts only."""

    def __init__(self, names, counts, groups=()):
        self.names, self.counts = list(names), np.asarray(counts)
        self.positions = {name: index for index, name in enumerate(self.names)}
        own = dict(groups)
        self.dataset = CellDataset(Path(), "csv", self.names, None, {1: "a"}, [], own)


def counted(names, groups=(), classes=None) -> Counted:
    """One instance of class 1, or of the class given, on each image."""
    counts = np.zeros((len(names), 4), int)
    counts[np.arange(len(names)), classes if classes is not None else 1] = 1
    return Counted(names, counts, groups)


# Reading


def test_the_budget_bounds_the_cache(tmp_path, monkeypatch, capsys):
    dataset = open_folders(tmp_path, {name: {1: np.eye(12, 16)} for name in "abc"})
    one = 12 * 16 * (3 + 2)
    samples = CellSamples(dataset, cache_gb=(2 * one + 1) / 1e9)
    assert len(samples) == 3
    assert samples[0] is samples[0]
    assert samples[2] is not samples[2]
    assert samples[2].labels.tolist() == [1]
    assert samples.counts.tolist() == [[0, 1, 0, 0, 0]] * 3
    assert [s.name for s in samples] == ["a/image.tif", "b/image.tif", "c/image.tif"]
    assert "read 3 of 3 images with 3 instances; left out: 0 crowds; in memory: 2 images" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(module, "available_memory", lambda: 4 * one)  # half of it counts
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 2
    monkeypatch.setattr(module, "world_size", lambda: 2)  # as many processes share the machine
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 1
    monkeypatch.undo()
    assert 1e8 < available_memory() < 1e13
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 3


def test_crowds_are_counted_apart(capsys):
    sample = make_sample([np.eye(4), 2 * np.ones((4, 4))], [1, -2])
    dataset = CellDataset(Path(), "coco", ["x"], lambda name: sample, {3: "a", 7: "b"}, [], {})
    assert CellSamples(dataset, 0.0).counts.tolist() == [[0, 1, 0]]
    assert "left out: 1 crowds; in memory: 0 images" in capsys.readouterr().out


def test_the_digest_changes_with_any_id(tmp_path):
    ids, other = np.eye(12, 16), np.eye(12, 16)
    other[0, 5] = 1
    maps = {"a": {1: ids}, "b": {1: ids}, "c": {1: other}, "d": {2: ids}}
    opened = {name: open_folders(tmp_path / name, {"x": own}) for name, own in maps.items()}
    one, same, *others = (CellSamples(dataset, 1.0).digest for dataset in opened.values())
    assert one == same
    assert len({one, *others}) == 3


def test_data_without_instances_or_images(tmp_path):
    with refused("no instances in any training image", tmp_path):
        CellSamples(open_folders(tmp_path, {"bare": {}}), 1.0)
    empty = CellDataset(tmp_path, "images", [], None, {1: "a"}, [], {})
    samples = CellSamples(empty, 1.0)
    assert (len(samples), list(samples), samples.counts.shape) == (0, [], (0, 2))
    assert make_splits(samples, make_config("demo")) == {0: {"train": [], "val": []}}


# Splits


def test_split_is_by_image_repeatable_and_complete():
    names = [f"n{i}" for i in range(10)]
    (split,) = make_splits(counted(names), CONFIG).values()
    assert (len(split["train"]), len(split["val"])) == (8, 2)
    assert sorted(split["train"] + split["val"]) == names
    assert make_splits(counted(names[::-1]), CONFIG) == {0: split}
    seeds = [make_splits(counted(names), replace(CONFIG, seed=k))[0]["val"] for k in range(5)]
    assert len(set(map(tuple, seeds))) > 1
    for fraction, images in ((0.0, 0), (0.01, 1), (0.3, 3), (0.5, 5), (0.9, 9)):
        val = make_splits(counted(names), replace(CONFIG, val_fraction=fraction))[0]["val"]
        assert len(val) == images
    always = replace(CONFIG, val_fraction=0.9)
    assert make_splits(counted(["a"]), always) == {0: {"train": ["a"], "val": []}}
    two = make_splits(counted(["a", "b"]), always)[0]
    assert (len(two["train"]), len(two["val"])) == (1, 1)


def test_a_split_with_groups_is_near_the_fraction():
    names = [f"n{i:02}" for i in range(40)]
    groups = {name: f"g{min(i // 4, 5)}" for i, name in enumerate(names)}  # five of 4, one of 20
    for seed in range(10):
        split = make_splits(counted(names, groups), replace(CONFIG, seed=seed))[0]
        assert len(split["val"]) == 8
        assert {groups[n] for n in split["val"]}.isdisjoint(groups[n] for n in split["train"])
    two = {name: f"g{i // 20}" for i, name in enumerate(names)}
    assert len(make_splits(counted(names, two), CONFIG)[0]["val"]) == 20
    with pytest.raises(ValueError, match=r"of 1 groups, but 2 parts.*correct groups.csv"):
        make_splits(counted(names, dict.fromkeys(names, "p")), CONFIG)


def test_groups_are_never_split_by_folds():
    names = [f"n{i:02}" for i in range(12)]
    groups = {name: f"patient{i // 3}" for i, name in enumerate(names[:9])}  # three are alone
    three = replace(CONFIG, folds=3)
    folds = make_splits(counted(names, groups), three)
    assert list(folds) == [1, 2, 3]
    assert [len(fold["val"]) for fold in folds.values()] == [4, 4, 4]
    assert sorted(name for fold in folds.values() for name in fold["val"]) == names
    for fold in folds.values():
        assert sorted(fold["train"] + fold["val"]) == names
        own = [{groups.get(name, name) for name in fold[side]} for side in ("train", "val")]
        assert own[0].isdisjoint(own[1])
    assert make_splits(counted(names[::-1], groups), three) == folds
    assert make_splits(counted(names, groups), replace(three, fold=2)) == {2: folds[2]}
    with pytest.raises(ValueError, match=r"of 6 groups, but 7 parts: lower folds \(now 7\)"):
        make_splits(counted(names, groups), replace(CONFIG, folds=7))


def test_a_group_may_be_called_like_an_image():
    split = make_splits(counted(["a", "b", "c"], {"a": "b", "c": "b"}), CONFIG)[0]
    assert split["val"] in (["b"], ["a", "c"])


def test_every_part_has_its_share_of_each_class_and_of_empty_images():
    names = [f"n{i:02}" for i in range(20)]
    classes = [2] * 5 + [1] * 10 + [3] * 5
    for seed in range(5):
        samples = counted(names, classes=classes)
        samples.counts[15:] = 0  # images without instances
        (split,) = make_splits(samples, replace(CONFIG, seed=seed)).values()
        assert len(split["val"]) == 4
        assert sum(name < "n05" for name in split["val"]) == 1  # a fifth, as of all
        assert sum("n05" <= name < "n15" for name in split["val"]) == 2
        for fold in make_splits(samples, replace(CONFIG, seed=seed, folds=5)).values():
            assert sum(name < "n05" for name in fold["val"]) == 1


def test_images_that_look_alike_stay_together(tmp_path):
    rng, colors = np.random.default_rng(0), [(200, 60, 60), (60, 200, 60), (60, 60, 200)]
    cells = np.zeros((40, 40), int)
    cells[10:20, 10:20] = 1
    for number in range(42):
        folder = write_folder(tmp_path / "train" / f"n{number:02}", {1: cells}, (40, 40))
        noise = rng.integers(-40, 40, (40, 40, 3))
        image = np.clip(np.array(colors[number % 3]) + noise, 0, 255).astype(np.uint8)
        save_rgba(image, folder / "image.tif")
    samples = CellSamples(open_dataset(tmp_path, CONFIG), 1.0)
    groups = samples.groups("appearance")
    slides = {}
    for name, group in groups.items():
        slides.setdefault(group, set()).add(int(name[1:]) % 3)
    assert all(len(slide) == 1 for slide in slides.values())
    assert samples.groups("image") == {}
    split = make_splits(samples, make_config("demo"))[0]
    assert split["val"]
    assert {groups[n] for n in split["val"]}.isdisjoint(groups[n] for n in split["train"])
    samples.dataset = replace(samples.dataset, groups={"n00": "patient"})
    assert samples.groups("appearance") == {"n00": "patient"}  # the dataset knows better


# Parts and names


def test_parts_facts_and_names(tmp_path):
    samples = Counted("ab", [[0, 2, 1], [0, 0, 4]])
    splits = {0: {"train": ["a", "b"], "val": []}, 2: {"train": ["a"], "val": ["b"]}}
    table = dataset_table(samples, splits, ["x", "y"])
    assert table.columns.tolist() == ["images", "x", "y", "min per image", "max per image"]
    assert table.loc["train"].tolist() == [2, 2, 5, 3, 4]
    assert table.loc["val"].tolist() == [0, 0, 0, 0, 0]
    assert table.loc["fold 2, val"].tolist() == [1, 0, 4, 4, 4]
    assert subset(samples, ["b", "a"]).indices == [1, 0]
    names = ("a/image.tif", "image.tif", "b.png", "deep/b.c.png")
    assert [image_stem(name) for name in names] == ["a", "image", "b", "b.c"]
    drawn = [make_sample([np.eye(3, 5)], [1], name=name) for name in names[::2]]
    assert sample_records(drawn) == [(Path("a.tif"), 1, 3, 5), (Path("b.png"), 2, 3, 5)]


def test_the_samples_of_a_part(demo_samples):
    names = demo_samples.names[3:1:-1]
    assert [Path(sample.name).parent.name for sample in subset(demo_samples, names)] == names


# Real data


def test_all_consep_folders_load():
    samples = CellSamples(open_dataset(real_data("consep"), CONFIG), 4.0)
    assert (len(samples), samples.counts.sum()) == (121, 16_333)
    assert (samples.counts.sum(1) == 0).sum() == 1
    assert all(int(s.layers.max()) == len(s.labels) for s in samples)
    assert len(samples.dataset.test_images) == 68
    for seed in range(3):
        split = make_splits(samples, make_config("demo", seed=seed))[0]
        assert 20 <= len(split["val"]) <= 28
        val = samples.counts[subset(samples, split["val"]).indices, 1:].sum(0)
        shares = val / samples.counts[:, 1:].sum(0)
        assert ((shares > 0.1) & (shares < 0.35)).all()
