from dataclasses import replace
from itertools import combinations
from pathlib import Path
import re

from hypothesis import given, settings, strategies
import numpy as np
import pandas as pd
from PIL import Image
import pytest

from src_snippets.data import samples as module
from src_snippets.data.layouts import CellDataset, open_dataset, OUTSIDE
from src_snippets.data.samples import (
    available_memory,
    CellSamples,
    dataset_table,
    dataset_warnings,
    image_stem,
    make_splits,
    subset,
)
from src_snippets.setup.config import make_config
from tests.conftest import empty_sample, make_sample, real_data, refused, save_rgba, write_folder

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
        own, self.pixels = dict(groups), self.names
        self.dataset = CellDataset(Path(), "csv", self.names, None, {1: "a"}, [], own)
        index = pd.MultiIndex.from_tuples([("images", "read"), ("instances", "read")])
        self.summary = pd.DataFrame(dict(count=[len(self.names), self.counts.sum()]), index)


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
    assert len(samples.cache) == 2
    text = capsys.readouterr().out
    assert re.search(r"images +read +3 *\ninstances +read +3 *\n$", text)
    monkeypatch.setattr(module, "available_memory", lambda: 4 * one)  # half of it counts
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 2
    monkeypatch.setattr(module, "world_size", lambda: 2)  # as many processes share the machine
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 1
    monkeypatch.undo()
    assert len(CellSamples(dataset, cache_gb=1.0).cache) == 3
    assert 1e8 < available_memory() < 1e13


def test_an_image_above_the_budget_leaves_it_to_the_others(tmp_path):
    write_folder(tmp_path / "train" / "a", {1: np.eye(50, 60)}, (50, 60))
    dataset = open_folders(tmp_path, {"b": {1: np.eye(12, 16)}})
    assert list(CellSamples(dataset, cache_gb=2000 / 1e9).cache) == [1]


def drawn(names, read, **files) -> CellSamples:
    """Samples that `read` draws by name."""
    return CellSamples(
        CellDataset(Path(), "coco", names, read, {3: "a", 7: "b"}, [], {}, **files), 0
    )


def test_what_is_left_out_is_counted_with_an_example(capsys):
    """Four instances and a crowd on each of three images; of two files more is left out."""
    sample = make_sample([np.arange(4).reshape(4, 1) + np.ones((4, 4), int), np.eye(4)], [1, -2])
    others = {"y": {"box only": 2, "outside": 1}, "z": {"box only": 5}}
    files = {"images not listed": [Path("p.png"), Path("q.png")], "none of these": []}
    samples = drawn(
        [*"xyz"], lambda name: replace(sample, left_out=others.get(name, {})), left_out=files
    )
    assert samples.counts.tolist() == [[0, 4, 0]] * 3
    assert [*samples.summary.itertuples(name=None)] == [
        (("images", "read"), 3, ""),
        (("instances", "read"), 12, ""),
        (("instances", "crowd: ignored"), 3, "x"),
        (("instances", "box only"), 7, "y"),
        (("instances", "outside"), 1, "y"),
        (("images", "images not listed"), 2, "p.png"),
    ]
    assert re.search(r"box only +7 +y\n", capsys.readouterr().out)
    told = dataset_warnings(samples, {}, replace(CONFIG, class_names=("a", "b")))
    assert told.splitlines() == [
        "WARNING: 2 of 5 images are left out: see the table above.",
        "WARNING: 11 of 23 instances are left out: see the table above.",
    ]


@pytest.mark.parametrize(("lost", "warned"), [(1, False), (2, True)])
def test_more_than_one_in_twenty_left_out_is_a_warning(lost, warned):
    sample = make_sample([np.arange(1, 20).reshape(1, 19)], [1])
    samples = drawn(["x"], lambda name: replace(sample, left_out={"outside": lost}))
    told = dataset_warnings(samples, {}, CONFIG)
    assert ("WARNING" in told) is warned
    assert told.startswith(
        "WARNING: 2 of 21 instances" if warned else "Every class has training instances;"
    )


def test_outlines_of_another_resolution_are_refused():
    sample = make_sample([np.arange(1, 5).reshape(1, 4)], [1])
    samples = drawn([*"xy"], lambda name: replace(sample, left_out={OUTSIDE: 2}))
    assert len(samples) == 2
    with refused(r"10 annotations without a pixel in the image \(coordinates of another size"):
        drawn([*"xy"], lambda name: replace(sample, left_out={OUTSIDE: 5}))


def test_all_left_out_is_an_error_that_counts():
    sample = replace(empty_sample(), left_out={"box only": 1234})
    with refused(r"no instances in any training image; expected some.\n(.|\n)*box only +2468 +x"):
        drawn(["x", "y"], lambda name: sample)


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
    with pytest.raises(ValueError, match=r"of 1 groups .*, but 2 parts.*correct groups.csv"):
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
    with pytest.raises(ValueError, match=r"of 6 groups .*, but 7 parts: lower folds \(7\)"):
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


def test_images_that_look_alike_stay_together(tmp_path, capsys):
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
    assert set(samples.groups("image").values()) == set(samples.names)
    split = make_splits(samples, make_config("demo"))[0]
    assert split["val"]
    assert {groups[n] for n in split["val"]}.isdisjoint(groups[n] for n in split["train"])
    samples.dataset = replace(samples.dataset, groups={"n00": "patient"})
    assert samples.groups("appearance") == samples.groups("image")  # the dataset knows better
    assert len(set(samples.groups("image").values())) == 42
    samples.features[:] = samples.features[:1] * 42
    samples.dataset = replace(samples.dataset, groups={})
    capsys.readouterr()
    assert len(make_splits(samples, make_config("demo"))[0]["val"]) == 8  # all look alike: by image
    assert "WARNING: similar images: 1 groups only; split by image" in capsys.readouterr().out


def test_copies_are_one_group_whatever_else_groups_images(monkeypatch):
    """Equal pixels, Roboflow's names and groups join each other, directly or by way of others."""
    names = ["a", "train/b_png.rf.0a1b.png", "b_png.rf.77.jpg", "d", "e", "b_png", "e.png"]
    samples = counted(names, {names[2]: "p", "d": "p"})
    samples.pixels = [b"1", b"1", b"2", b"3", b"4", b"5", b"6"]
    groups = samples.groups("image")
    assert len({groups[name] for name in names[:4]}) == 1
    assert len(set(groups.values())) == 4
    assert samples.groups("appearance") == groups
    split = make_splits(samples, CONFIG)[0]
    assert len({groups[name] for name in split["val"]} & {groups[n] for n in split["train"]}) == 0
    samples = counted(names)
    samples.pixels = names
    samples.features, samples.borders = [], []
    monkeypatch.setattr(module, "group_by_appearance", lambda *_: np.array([1, 2, 1, 3, 3, 4, 5]))
    groups = samples.groups("appearance")
    assert [names.index(min(n for n in names if groups[n] == groups[m])) for m in names[:3]] == [
        0
    ] * 3
    assert groups["d"] == groups["e"] != groups["a"]


def test_equal_images_have_equal_pixels():
    images = {
        name: make_sample([np.eye(8)], [1], seed)
        for name, seed in zip("abc", (0, 1, 0), strict=True)
    }
    groups = drawn([*"abc"], images.get).groups("image")
    assert groups["a"] == groups["c"] != groups["b"]


# What the training part can teach


def missing_classes(samples, names) -> int:
    """Classes (and images) of the dataset without any in these."""
    every = samples.counts.copy()
    every[:, 0] = 1
    part = every[[samples.positions[name] for name in names]].sum(0)
    return ((part == 0) & (every.sum(0) > 0)).sum()


@settings(max_examples=100, deadline=None)
@given(strategies.integers(0, 2**31))
def test_every_class_is_learned_where_groups_allow(seed):
    """Against all ways to choose the validation part: none misses fewer classes in training."""
    rng = np.random.default_rng(seed)
    number = rng.integers(2, 7)
    names = [f"n{i}" for i in range(rng.integers(number, 2 * number))]
    groups = {name: str(i % number) for i, name in enumerate(names)}
    samples = counted(names, groups)
    samples.counts = rng.integers(0, 9, (len(names), 4)) * (rng.random((len(names), 4)) < 0.3)
    samples.counts[:, 0] = 0
    config = replace(CONFIG, seed=seed % 99, val_fraction=float(rng.choice([0.05, 0.2, 0.5, 0.9])))
    split = make_splits(samples, config)[0]
    assert split["val"]
    assert split["train"]
    options = []
    for size in range(1, number):
        for val in combinations(map(str, range(number)), size):
            options.append(missing_classes(samples, [n for n in names if groups[n] not in val]))
    assert missing_classes(samples, split["train"]) == min(options)


def test_controls_without_instances_are_no_training_part():
    names = [f"n{i}" for i in range(8)]
    groups = {name: "patient" if i < 4 else "control" for i, name in enumerate(names)}
    samples = counted(names, groups)
    samples.counts[4:] = 0
    samples.counts[:, 2:] = 0
    config = replace(CONFIG, class_names=("a", "b", "c"))
    for seed in range(5):
        splits = make_splits(samples, replace(config, seed=seed))
        assert splits == {0: {"train": names[:4], "val": names[4:]}}
        told = dataset_warnings(samples, splits, config).splitlines()
        assert told == [
            "WARNING: no b, c in train: correct classes or groups.",
            "WARNING: no a, b, c in val: correct classes or groups.",
            "Images without instances, learned as background: 4",
        ]
    # With a second patient the controls train too.
    samples = counted([*names, "o"], groups | {"o": "other"})
    samples.counts[4:8] = 0
    for seed in range(5):
        val = make_splits(samples, replace(config, seed=seed, val_fraction=0.1))[0]["val"]
        assert val == ["o"]


def test_a_class_of_two_groups_is_in_every_fold_for_training():
    names = [f"n{i}" for i in range(6)]
    samples = counted(names, classes=[1, 1, 1, 1, 2, 2])
    for seed in range(20):
        folds = make_splits(samples, replace(CONFIG, folds=2, seed=seed))
        assert all(missing_classes(samples, fold["train"]) == 0 for fold in folds.values())
    alone = counted(names, classes=[1, 1, 1, 1, 1, 2])
    folds = make_splits(alone, replace(CONFIG, folds=2))
    told = dataset_warnings(alone, folds, replace(CONFIG, class_names=("a", "b", "c")))
    assert [len(fold["val"]) for fold in folds.values()] == [3, 3]
    assert sum("no b, c in fold" in line for line in told.splitlines()) == 1
    assert sum("no c in fold" in line for line in told.splitlines()) == 1


def test_a_plateau_without_validation_images_is_told():
    samples = drawn(["x"], lambda name: make_sample([np.arange(1, 5).reshape(1, 4)], [1]))
    config = replace(CONFIG, class_names=("a", "b"), schedule="plateau")
    splits = {0: dict(train=["x"], val=[])}
    assert "without validation images schedule='plateau'" in dataset_warnings(
        samples, splits, config
    )
    config = replace(config, schedule="cosine")
    assert "plateau" not in dataset_warnings(samples, splits, config)


def test_validation_images_that_trained_the_initial_weights_are_told(tmp_path):
    samples = counted(["a", "b", "c"])
    splits = {1: dict(train=["b", "c"], val=["a"]), 2: dict(train=["a"], val=["b", "c"])}
    config = replace(CONFIG, class_names=("a", "b", "c"), weights=str(tmp_path / "best.pt"))
    assert "trained" not in dataset_warnings(samples, splits, config)
    (tmp_path / "split.json").write_text('{"train": ["a", "c", "x"], "val": ["b"]}')
    told = f"WARNING: 2 validation images trained {tmp_path}/best.pt: biased scores."
    assert told in dataset_warnings(samples, splits, config)


# A validation part of the dataset's own


def test_the_datasets_own_validation_part():
    names = ["a", "b", "e", "valid/c", "valid/d"]
    samples = counted(names)
    samples.dataset = replace(samples.dataset, validation=["valid/d", "valid/c"])
    config = replace(CONFIG, class_names=("a",))
    samples.counts = samples.counts[:, :2]
    splits = make_splits(samples, config)
    assert splits == {0: {"train": ["a", "b", "e"], "val": ["valid/c", "valid/d"]}}
    told = dataset_warnings(samples, splits, config)
    assert told == "The dataset's own 2 validation images validate, all others train."
    samples.pixels = ["1", "2", "1", "1", "4"]
    told = dataset_warnings(samples, splits, config).splitlines()
    assert told[1:] == ["WARNING: 2 training images are copies of these, or of one group."]
    for changed in (replace(config, val_fraction=0), replace(config, folds=2)):
        splits = make_splits(samples, changed)
        told = dataset_warnings(samples, splits, changed)
        assert told == "The dataset's own 2 validation images are used like all others."
    assert sorted(splits[1]["val"] + splits[2]["val"]) == names
    assert {"a", "valid/c", "e"} in ({*splits[1]["val"]}, {*splits[1]["train"]})
    assert make_splits(samples, replace(config, val_fraction=0))[0]["train"] == names


# Parts and names


def test_parts_facts_and_names(tmp_path):
    samples = Counted("ab", [[0, 2, 1], [0, 0, 4]])
    splits = {0: {"train": ["a", "b"], "val": []}, 2: {"train": ["a"], "val": ["b"]}}
    table = dataset_table(samples, splits, ["x", "y"])
    assert table.columns.tolist() == ["images", "x", "y", "fewest per image", "most per image"]
    assert table.loc["train"].tolist() == [2, 2, 5, 3, 4]
    assert table.loc["val"].tolist() == [0, 0, 0, 0, 0]
    assert table.loc["fold 2, val"].tolist() == [1, 0, 4, 4, 4]
    assert subset(samples, ["b", "a"]).indices == [1, 0]
    names = ("a/image.tif", "image.tif", "b.png", "deep/b.c.png", "a/b/image.png", "caf\udce9.png")
    assert [image_stem(name) for name in names] == ["a", "image", "b", "b.c", "b", "caf?"]


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
