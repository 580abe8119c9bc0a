"""Datasets: three layouts on disk as one `CellDataset`; samples, splits and folds."""

# %% [markdown]
# ## What lies on disk?
# One of three layouts, told by the file that holds the truth, or pictures alone:
# - **folders**: `train/<name>/image.tif` with `class1.tif .. class4.tif` beside it (pixel = id of
#   the cell; an absent class has no file), `test_release/` and a mapping from its images to ids;
# - **table**: `train.csv` with an instance a row as run lengths, pictures in `train/` and `test/`;
# - **COCO**: `train.json` with polygons or run lengths, pictures in `train/` and `test/`.

# %%
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import csv
from dataclasses import dataclass
from functools import partial
import hashlib
import io
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pycocotools.mask
import torch
from torch.utils.data import Subset
from tqdm.auto import tqdm

from src_snippets.config import Config
from src_snippets.forms import CellSample, pack_parts
from src_snippets.places import (
    coco_file,
    has_truth,
    MAPPING_NAME,
    PICTURES,
    pictures_in,
    written_whole,
)
from src_snippets.processes import is_first
from src_snippets.readers import BadInput, read_cell_folder, read_image
from src_snippets.rle import pixels_of_kaggle_text, row_major_pixels
from src_snippets.stains import field_borders, field_look, look_alikes


# %%
class ImageRecord(NamedTuple):
    """A test image: where it lies, its id in the results and its size in pixels."""

    path: Path
    image_id: int
    height: int
    width: int


@dataclass(frozen=True)
class CellDataset:
    """What lies on disk, whatever its layout.

    Attributes:
        root: its folder.
        layout: `folders`, `table`, `coco` or `pictures`.
        names: the training images, unique; none in `pictures`.
        read: name -> `CellSample`; raises BadInput.
        categories: names of the classes 1..C by the ids that results carry, ascending.
        test_images: those to answer.
        groups: the group of each image that belongs to one; a group is never split.
    """

    root: Path
    layout: str
    names: list[str]
    read: Callable[[str], CellSample]
    categories: dict[int, str]
    test_images: list[ImageRecord]
    groups: Mapping[str, str]


# %%
def open_dataset(root: Path, config: Config) -> CellDataset:
    """Lists a dataset; classes are those of the settings but where a file tells them.

    Raises:
        BadInput: a file is missing or not what it should be.
    """
    if (root / MAPPING_NAME).is_file():
        return open_folders(root, config)
    if (root / "train.csv").is_file():
        return open_table(root, config)
    if coco_file(root, "train"):
        return open_coco(root, config)
    return open_folders(root, config) if has_truth(root) else open_pictures(root, config)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a mark at its beginning. Raises BadInput."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error}). Save it as UTF-8.") from error


# %%
def read_groups(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Reads `groups.csv`, columns `name` and `group`, if there is one: patients, slides, wells.

    A name is one of `CellDataset.names`; an image without a group stands for itself.

    Raises:
        BadInput: other columns, or an image that is not there.
    """
    path = root / "groups.csv"
    if not path.is_file():
        return {}
    rows = read_rows(path, {"name", "group"})
    groups = {row["name"]: row["group"] for row in rows if row["group"]}
    if twice := [row for row in rows if groups.get(row["name"], "") != row["group"]]:
        raise BadInput(f"{path}: {twice[0]['name']!r} is in two groups; expected one.")
    if unknown := sorted(set(groups) - set(names)):
        raise BadInput(f"{path}: {unknown[0]!r} is no training image; such as {names[0]!r} is.")
    return groups


# %%
def open_folders(root: Path, config: Config) -> CellDataset:
    """The layout of folders."""
    names = [folder.name for folder in training_folders(root)]
    read = partial(read_named_folder, root / "train", config.num_classes, config.overlaps)
    images = read_test_mapping(root) if (root / MAPPING_NAME).is_file() else []
    groups = read_groups(root, names)
    return CellDataset(root, "folders", names, read, class_ids(config), images, groups)


def class_ids(config: Config) -> dict[int, str]:
    """The names of classes by 1..C, those of the settings or class1, class2, .."""
    known = config.class_names != ("",)
    names = config.class_names if known else [f"class{k + 1}" for k in range(config.num_classes)]
    return dict(enumerate(names, start=1))


def open_pictures(root: Path, config: Config) -> CellDataset:
    """A folder of pictures without truth: there is nothing to learn, all are to be answered."""
    there = pictures_in(root)
    # Cellpose lays its label image beside the picture: a.tif, a_masks.tif or a_cp_masks.tif.
    masks = {f"{p.stem}{end}" for p in there for end in ("_masks", "_cp_masks")}
    if labels := sum(p.stem in masks for p in there):
        print(f"{labels} label images beside their pictures are left out")
    images = numbered_images([p for p in there if p.stem not in masks])
    read = partial(read_named_folder, root, config.num_classes, config.overlaps)
    return CellDataset(root, "pictures", [], read, class_ids(config), images, {})


def read_named_folder(parent: Path, num_classes: int, overlaps: bool, name: str) -> CellSample:
    """`read_cell_folder` with the name last."""
    return read_cell_folder(parent / name, num_classes, overlaps)


# %%
def training_folders(root: Path) -> list[Path]:
    """The folders in `train/`, by name.

    Raises:
        BadInput: there are none.
    """
    folders = sorted(p for p in (root / "train").iterdir() if p.is_dir() and p.name[0] != ".")
    if not folders:
        raise BadInput(f"{root / 'train'}: no folders; expected one a training image.")
    return folders


# %%
def read_test_mapping(root: Path) -> list[ImageRecord]:
    """Reads `test_image_name_to_ids.json` and checks it against the files in `test_release/`.

    Raises:
        BadInput: not such a mapping; duplicated ids or names; a name that leaves the folder; an
            image that is missing or whose size is not the stated one.
    """
    path = root / MAPPING_NAME
    images = list_images(read_json(path), path, root / "test_release")
    for image in images:
        check_image(image, path)
    return images


def read_json(path: Path):
    """Reads JSON. Raises BadInput."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}). Copy or export it again.") from error


# %%
def list_images(entries, path: Path, folder: Path) -> list[ImageRecord]:
    """The images that a JSON file lists.

    Args:
        entries: objects with file_name, id, height and width, as read; path: of that file.
        folder: where the images lie; names may lead into its folders, never out of it.

    Raises:
        BadInput: not such objects, none at all, ids or names that occur twice, such a name.
    """
    try:
        rows = [(e["file_name"], e["id"], e["height"], e["width"]) for e in entries]
    except (TypeError, KeyError) as error:
        raise BadInput(
            f"{path}: {type(error).__name__}: {error}; expected of each image file_name, id, "
            "height and width."
        ) from error
    if not rows:
        raise BadInput(f"{path}: lists no images; expected at least one.")
    for name, *numbers in rows:
        if not isinstance(name, str) or any(type(n) is not int for n in numbers):
            raise BadInput(f"{path}: entry {name!r}, {numbers}; expected a name and whole numbers.")
        parts = Path(name).parts
        if not parts or ".." in parts or Path(name).is_absolute() or "\\" in name:
            raise BadInput(f"{path}: file name {name!r}; expected a plain name below {folder}.")
    for what, column in (("id", 1), ("file_name", 0)):
        value, times = Counter(row[column] for row in rows).most_common(1)[0]
        if times > 1:
            raise BadInput(f"{path}: {what} {value!r} occurs twice; expected each once.")
    return [ImageRecord(folder / name, *numbers) for name, *numbers in rows]


# %%
def check_image(image: ImageRecord, stated_in: Path) -> np.ndarray:
    """Reads an image, (3, H, W) uint8; BadInput where it is missing or has another size."""
    if not image.path.is_file():
        raise BadInput(
            f"{image.path}: is not there, but {stated_in} lists it as {image.image_id}. Add it or "
            "correct the name."
        )
    pixels = read_image(image.path)
    if pixels.shape[1:] != (image.height, image.width):
        raise BadInput(
            f"{image.path}: {pixels.shape[1:]} (H, W), but {stated_in} says "
            f"{(image.height, image.width)}. Correct the one that is wrong."
        )
    return pixels


# %% [markdown]
# Tables are those of the Sartorius competition: `id`, `annotation` (pairs of start and length, row
# by row, the first pixel being 1), `width`, `height`, `cell_type`; as many rows as cells.

# %%


def picture_of(folder: Path, name: str, listed_in: Path) -> Path:
    """The picture of a name without suffix. Raises BadInput."""
    if not name or Path(name).name != name or "\\" in name:
        raise BadInput(f"{listed_in}: id {name!r}; expected a plain name without folders.")
    path = next((p for end in PICTURES if (p := folder / f"{name}{end}").is_file()), None)
    if path is None:
        raise BadInput(
            f"{folder / name}.png: is not there, but {listed_in} lists {name!r}. Add the picture "
            f"({', '.join(PICTURES)}) or remove the row."
        )
    return path


def read_rows(path: Path, columns: set[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with at least these columns. Raises BadInput."""
    csv.field_size_limit(2**31 - 1)  # a large cell has long run lengths
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise BadInput(f"{path}: not CSV ({error}). Copy or export it again.") from error
    found = set(rows[0]) if rows else set()
    if not columns <= found:
        there = ", ".join(sorted(map(str, found))) or "no rows"
        raise BadInput(f"{path}: {there}; expected the columns {', '.join(sorted(columns))}.")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise BadInput(f"{path}: row {number}: not as many values as columns.")
    return rows


# %%
def open_table(root: Path, config: Config) -> CellDataset:
    """The layout of tables."""
    path, by_name, groups = root / "train.csv", {}, {}
    for row in read_rows(path, {"id", "annotation"}):
        by_name.setdefault(row["id"], []).append(row)
        if row.get("sample_id"):  # Sartorius: the well that an image was taken of
            groups[row["id"]] = row["sample_id"]
    there = {p.stem for p in (root / "train").iterdir() if p.suffix.lower() in PICTURES}
    if unlisted := len(there - set(by_name)):
        print(f"{unlisted} pictures without a row are left out; an empty annotation is no cells")
    kinds = sorted({row.get("cell_type", "cell") for rows in by_name.values() for row in rows})
    categories = dict(enumerate(kinds, start=1))
    read = partial(read_table_sample, root, by_name, kinds, config.overlaps)
    names = sorted(by_name)
    groups |= read_groups(root, names)
    return CellDataset(root, "table", names, read, categories, table_test_images(root), groups)


def table_test_images(root: Path) -> list[ImageRecord]:
    """The images of `sample_submission.csv`, else all pictures in `test/`, numbered from 1."""
    path, folder = root / "sample_submission.csv", root / "test"
    if path.is_file():
        names = dict.fromkeys(row["id"] for row in read_rows(path, {"id"}))
        paths = [picture_of(folder, name, path) for name in names]
    else:
        paths = pictures_in(folder)
    return numbered_images(paths)


def numbered_images(paths: Sequence[Path]) -> list[ImageRecord]:
    """Pictures with ids from 1 on. Raises BadInput where one cannot be read."""
    sizes = [read_image(p).shape[1:] for p in paths]
    rows = enumerate(zip(paths, sizes, strict=True), start=1)
    return [ImageRecord(p, number, *size) for number, (p, size) in rows]


# %%
def read_table_sample(
    root: Path, by_name: Mapping[str, Sequence[dict]], kinds: Sequence[str], overlaps: bool, name
) -> CellSample:
    """One image of a table. Raises BadInput."""
    table = root / "train.csv"
    path = picture_of(root / "train", name, table)
    image = read_image(path)
    size, parts = image.shape[1:], []
    for row in by_name[name]:
        stated = row.get("height") or str(size[0]), row.get("width") or str(size[1])
        if stated != tuple(map(str, size)):
            raise BadInput(
                f"{path}: {size} (H, W), but {table} says {stated}. Correct the one that is wrong."
            )
        try:
            text = "" if row["annotation"] == "-1" else row["annotation"]
            places = pixels_of_kaggle_text(text, size[0] * size[1])
        except ValueError as error:
            raise BadInput(f"{table}: an annotation of {name!r}: {error}. Correct it.") from error
        label = kinds.index(row.get("cell_type", "cell")) + 1
        parts.append((places, np.ones(len(places), np.int64), label))
    return CellSample(torch.from_numpy(image), *pack_parts(parts, size, overlaps), path.name)


# %% [markdown]
# COCO files give each cell as polygons or as run lengths, plain or compressed. A crowd is an area
# of cells that nobody told apart: nothing is learned from it, what is found in it is not scored.


# %%
def is_polygon(values) -> bool:
    """Whether it is a list of x, y, x, y, .. of three points or more, none absurdly far away."""
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        return False
    return len(values) >= 6 and len(values) % 2 == 0 and all(abs(v) < 1e5 for v in values)


def coco_pixels(segmentation, height: int, width: int) -> np.ndarray:
    """(A,) int64, the row-major pixel offsets of a COCO segmentation.

    Args:
        segmentation: polygons (lists of x, y, ..), or an RLE with counts as text or numbers.

    Raises:
        ValueError: it is neither, or does not fit the image.
    """
    rle = segmentation
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("no polygon")
        if wrong := [polygon for polygon in segmentation if not is_polygon(polygon)]:
            raise ValueError(f"polygon {str(wrong[0])[:60]}; expected x, y of 3 points or more")
        rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(segmentation, height, width))
    if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
        raise ValueError(f"segmentation {str(rle)[:60]}; expected polygons or size and counts")
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"segmentation size {rle['size']}, image size {[height, width]}")
    return row_major_pixels(rle)


# %%
def read_coco(path: Path, keys: Sequence[str]) -> dict:
    """The content of a COCO file that has some lists of objects. Raises BadInput."""
    content = read_json(path)
    for key in keys:
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise BadInput(
                f"{path}: no list of objects under {key!r}; expected a COCO file with "
                f"{', '.join(keys)}."
            )
    return content


def coco_categories(path: Path, rows: Sequence[dict]) -> dict[int, str]:
    """The names of categories by id, ascending. Raises BadInput."""
    if wrong := [row for row in rows if type(row.get("id")) is not int or "name" not in row]:
        raise BadInput(f"{path}: category {wrong[0]}; expected a whole number as id, and a name.")
    found = {row["id"]: str(row["name"]) for row in rows}
    if len(found) < len(rows):
        raise BadInput(f"{path}: two categories with one id; expected each once.")
    return dict(sorted(found.items()))


def check_annotation(row: dict, images: Mapping[int, list], categories: Mapping[int, str]) -> str:
    """What is wrong with an annotation, empty where nothing is."""
    if type(row.get("image_id")) is not int or row["image_id"] not in images:
        return f"image_id {row.get('image_id')!r} is of no image"
    if type(row.get("category_id")) is not int or row["category_id"] not in categories:
        return f"category_id {row.get('category_id')!r} is of no category"
    if row.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd {row['iscrowd']!r}; expected 0 or 1"
    return "" if "segmentation" in row else "no segmentation"


# %%
def open_coco(root: Path, config: Config) -> CellDataset:
    """The layout of COCO files."""
    path, folder = coco_file(root, "train")
    content = read_coco(path, ("images", "annotations", "categories"))
    records = list_images(content["images"], path, folder)
    categories = coco_categories(path, content["categories"])
    by_image = {record.image_id: [] for record in records}
    for row in content["annotations"]:
        if problem := check_annotation(row, by_image, categories):
            raise BadInput(f"{path}: annotation {row.get('id')}: {problem}. Correct it.")
        by_image[row["image_id"]].append(row)
    known = {str(record.path.relative_to(folder)): record for record in records}
    read = partial(read_coco_sample, known, by_image, list(categories), path, config.overlaps)
    names = sorted(known)
    if tested := coco_file(root, "test"):
        images = list_images(read_coco(tested[0], ("images",))["images"], *tested)
        for image in images:
            check_image(image, tested[0])
    else:
        images = table_test_images(root)
    groups = read_groups(root, names)
    return CellDataset(root, "coco", names, read, categories, images, groups)


# %%
def read_coco_sample(
    known: Mapping[str, ImageRecord],
    by_image: Mapping[int, Sequence[dict]],
    order: Sequence[int],
    path: Path,
    overlaps: bool,
    name: str,
) -> CellSample:
    """One image of a COCO file. Raises BadInput."""
    record, parts = known[name], []
    image = check_image(record, path)
    for row in by_image[record.image_id]:
        try:
            places = coco_pixels(row["segmentation"], record.height, record.width)
        except (ValueError, TypeError, OverflowError) as error:  # 1e400 is read as infinity
            raise BadInput(f"{path}: annotation {row.get('id')}: {error}. Correct it.") from error
        label = order.index(row["category_id"]) + 1
        label = -label if row.get("iscrowd") else label
        parts.append((places, np.ones(len(places), np.int64), label))
    parts.sort(key=lambda part: part[2] < 0)  # where pixels are given away, crowds come last
    packed = pack_parts(parts, image.shape[1:], overlaps)
    return CellSample(torch.from_numpy(image), *packed, name)


# %% [markdown]
# Every training image is read once before training, so that a bad file shows in the first minute
# and not in the third epoch. What fits the memory budget stays decoded.


# %%
def free_memory_bytes() -> int:
    """Memory of the machine, or of the container that this runs in, that is not used."""
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def cache_bytes(cache_gb: float) -> float:
    """What images may take in this process: the budget, at most half of the free memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(cache_gb * 1e9, free_memory_bytes() / 2) / processes


# %%
class CellSamples(Sequence):
    """The training images of a dataset, decoded ones kept up to a budget.

    Args:
        dataset: where they come from.
        cache_gb: 1e9 bytes of decoded images that stay in memory; the rest is read on demand.

    Raises:
        BadInput: on construction, which reads all of them: the first bad one, or no cells in any.
    """

    def __init__(self, dataset: CellDataset, cache_gb: float):
        self.dataset, self.names = dataset, dataset.names
        self.places = {name: index for index, name in enumerate(self.names)}
        self.counts = np.zeros((len(self.names), len(dataset.categories) + 1), np.int64)
        self.looks, self.borders = [], []  # what `groups` needs, of each image
        self._kept, left, digest = {}, cache_bytes(cache_gb), hashlib.sha256()
        bar = tqdm(self.names, desc="reading", unit="image", disable=not is_first())
        for index, name in enumerate(bar):
            sample = dataset.read(name)
            cells = sample.labels[sample.labels > 0]
            self.counts[index] = np.bincount(cells, minlength=len(dataset.categories) + 1)
            for part in (sample.image, sample.layers, sample.labels):
                digest.update(part.numpy().tobytes())
            self.looks.append(field_look(sample.image.numpy()))
            self.borders.append(field_borders(sample.image.numpy()))
            left -= sample.image.nbytes + sample.layers.nbytes
            if left >= 0:
                self._kept[index] = sample
        self.digest = digest.hexdigest()  # changes with any pixel, id or class
        if len(self._kept) < len(self.names):
            size = sum(s.image.nbytes + s.layers.nbytes for s in self._kept.values()) / 1e9
            print(f"{len(self._kept)} of {len(self.names)} images stay in memory ({size:.1f} GB),")
            print("the others are read again when needed: see cache_gb.")
        if self.names and not self.counts.any():
            raise BadInput(f"{dataset.root}: no cells in any training image; expected some.")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index: int) -> CellSample:
        if index not in self._kept:
            return self.dataset.read(self.names[index])
        return self._kept[index]

    def groups(self, split_by: str) -> dict[str, str]:
        """The group of each image: the dataset's own, else by `split_by` of the settings."""
        if self.dataset.groups or split_by == "image":
            return dict(self.dataset.groups)
        numbers = look_alikes(np.stack(self.looks), self.borders)
        return {name: f"look {number}" for name, number in zip(self.names, numbers, strict=True)}


# %% [markdown]
# Images are split, not cells; images of one group (a patient, a slide) stay on one side, or what is
# measured is how well the model remembers. Where `groups.csv` does not tell, fields that look alike
# are a group. Folds measure every training image once, by a model that never saw it.


# %%
def shuffled_groups(names: Sequence[str], groups: Mapping[str, str], seed: int) -> list[list[str]]:
    """The names by group in random order; a name without a group is one of its own."""
    members = {}
    for name in sorted(names):
        key = ("group", groups[name]) if name in groups else ("image", name)
        members.setdefault(key, []).append(name)
    order = np.random.default_rng(seed).permutation(len(members))
    listed = list(members.values())
    return [listed[i] for i in order]


# %%
def split_images(
    names: Sequence[str], val_fraction: float, seed: int, groups: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Splits images, not cells, into a training and a validation part.

    Args:
        names: unique image names; their order does not matter.
        val_fraction: share for validation, rounded; at least one image where it is over 0, and
            at least one image is left for training. With groups it is at most a quarter more, or
            what the group makes it that brings it nearest.
        seed: the same seed and names give the same parts.
        groups: the group of each name that has one; a group is never split.

    Returns:
        `{"train": [...], "val": [...]}`, each sorted.

    Raises:
        ValueError: all images are of one group.
    """
    wanted = max(round(len(names) * val_fraction), 1) if val_fraction > 0 else 0
    val = []
    parts = shuffled_groups(names, groups or {}, seed)
    if len(parts) == 1 < len(names) and wanted:
        raise ValueError(
            "All images are of one group: none can be held out. Correct groups.csv, or where there "
            "is none, set split_by='image'."
        )
    most = min(max(1.25 * wanted, 1), len(names) - 1)
    for part in parts:
        if len(val) < wanted and len(val) + len(part) <= most:
            val += part
    others = [part for part in parts if part[0] not in val and len(val) + len(part) < len(names)]
    if wanted and others:  # a large group may be nearer than what there is, and none is too few
        nearest = min(others, key=lambda part: abs(len(val) + len(part) - wanted))
        if not val or abs(len(val) + len(nearest) - wanted) < wanted - len(val):
            val = val + nearest
    return {"train": sorted(set(names) - set(val)), "val": sorted(val)}


# %%
def fold_images(
    names: Sequence[str], folds: int, seed: int, groups: Mapping[str, str] | None = None
) -> list[dict[str, list[str]]]:
    """Splits as from `split_images`, one a fold; each name is in the validation part of one.

    Raises:
        ValueError: fewer groups than folds.
    """
    parts = shuffled_groups(names, groups or {}, seed)
    if len(parts) < folds:
        raise ValueError(f"folds={folds}: there are {len(parts)} images or groups; lower it.")
    held = [[] for _ in range(folds)]
    for part in sorted(parts, key=len, reverse=True):  # stable: equal ones stay shuffled
        min(held, key=len).extend(part)
    return [{"train": sorted(set(names) - set(val)), "val": sorted(val)} for val in held]


# %%
def channel_statistics(samples: Sequence[CellSample]) -> dict[str, list[float]]:
    """`pixel_mean` and `pixel_std` of some images as settings: R, G, B, 0..1, over all pixels."""
    sums = torch.zeros(3, 3, dtype=torch.float64)
    for sample in samples:
        pixels = sample.image.flatten(1).double() / 255
        sums += torch.stack([pixels.sum(1), pixels.square().sum(1), torch.ones_like(pixels).sum(1)])
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    std = (square - mean.square()).clamp(min=0.001**2).sqrt()
    values = {"pixel_mean": mean, "pixel_std": std}
    return {name: [round(v, 3) for v in value.tolist()] for name, value in values.items()}


# %%
def describe_groups(groups: Mapping[str, str], names: Sequence[str]) -> str:
    """What keeps images together in a split, in words."""
    sizes = Counter(groups.values())
    if not sizes or max(sizes.values()) == 1:
        return "each image by itself"
    free = f", {len(names) - len(groups)} images by themselves" * (len(groups) < len(names))
    return f"{len(sizes)} groups of {min(sizes.values())} to {max(sizes.values())} images{free}"


SPLIT_TRIES = 50


def unevenness(splits: Sequence[dict], samples: CellSamples) -> float:
    """How far the shares of classes in the validation parts are from the shares of images."""
    counts = samples.counts[:, samples.counts.any(0)]
    total = 0.0
    for split in splits:
        own = counts[[samples.places[name] for name in split["val"]]].sum(0)
        total += np.abs(own / counts.sum(0) - len(split["val"]) / len(samples)).sum()
    return float(total)


def choose_splits(samples: CellSamples, config: Config) -> dict[int, dict[str, list[str]]]:
    """The splits to train on, by the number of the fold; 0 where there are no folds.

    Out of `SPLIT_TRIES` random ones that which spreads the cells of each class most evenly.
    """
    names, groups = samples.names, samples.groups(config.split_by)
    candidates = []
    for seed in range(config.seed, config.seed + 1_000_003 * SPLIT_TRIES, 1_000_003):
        if config.folds == 1:
            candidates.append([split_images(names, config.val_fraction, seed, groups)])
        else:
            candidates.append(fold_images(names, config.folds, seed, groups))
    best = min(candidates, key=lambda splits: unevenness(splits, samples))
    numbered = enumerate(best, start=int(config.folds > 1))
    return {fold: split for fold, split in numbered if config.fold in (0, fold)}


# %%
def sample_records(samples: Sequence[CellSample]) -> list[ImageRecord]:
    """Samples as images with ids from 1 on, as `coco_truth` numbers them."""
    numbered = enumerate(samples, start=1)
    return [ImageRecord(Path(named_image(s.name)), k, *s.size) for k, s in numbered]


def named_image(name: str) -> str:
    """The file name of a sample; that of its folder where all files are called image."""
    path = Path(name)
    return f"{path.parent.name}{path.suffix}" if path.stem == "image" else path.name


def pick(samples: CellSamples, names: Sequence[str]) -> Subset:
    """The samples of some names, in the order of the names."""
    return Subset(samples, [samples.places[name] for name in names])


def write_json(content, path: Path) -> None:
    """Writes JSON, whole or not at all."""
    with written_whole(path) as partial_file:
        partial_file.write_text(json.dumps(content))
