"""Find a dataset on disk and open its layout: folders, CSV, COCO, or images alone."""

# %% [markdown]
# ### Find the dataset
# Four layouts are known by where their ground truth is: `class1.tif ..` beside each
# `train/<name>/image.tif`; `train.csv` with an RLE per row; `train.json`, COCO polygons or RLEs;
# nowhere, images alone for `CHECKPOINTS` to predict. Each becomes a `CellDataset`.
# The trap: results carry the dataset's own ids of images and categories, labels are always 1..C.

# %%
# @title Find a dataset; read tables and lists of images
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from csv import field_size_limit
from dataclasses import dataclass, field
from functools import partial
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pycocotools.mask
import torch

from src_snippets.data.images import name_file, read_cell_folder, read_image, require
from src_snippets.data.rle import csv_to_pixels, pixel_indices
from src_snippets.data.structures import CellSample, pack_layers
from src_snippets.setup.config import Config

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
MAPPING_NAME = "test_image_name_to_ids.json"
SEARCHED_FOLDERS = ("/kaggle/input", "/content", "data")
NO_UPLOADS = ("sample_data", "drive", "results", "hw3.ipynb")  # what else is there on Colab


class ImageRecord(NamedTuple):
    """Where an image is, its id in results, its size in pixels."""

    path: Path
    image_id: int
    height: int
    width: int


@dataclass(frozen=True)
class CellDataset:
    """What is on disk, whatever its layout."""

    root: Path
    layout: str  # "folders", "csv", "coco" or "images"
    names: list[str]  # training images, unique; none in "images"
    read: Callable[[str], CellSample]  # of a name; raises BadInput
    categories: dict[int, str]  # names of the classes 1..C by their ids in results, ascending
    test_images: list[ImageRecord]  # those to predict
    groups: Mapping[str, str]  # by name; a group is never split, a name without one is alone
    validation: Sequence[str] = ()  # names that the dataset itself keeps for validation
    left_out: Mapping[str, Sequence] = field(default_factory=dict)  # files not read, by reason


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]


def coco_file(root: Path, part: str) -> Path | None:
    """The COCO file of `train` or `test`, None where there is none."""
    names = (f"{part}.json", f"{part}_gt.json", f"annotations/{part}.json")
    names += (f"annotations/instances_{part}.json", f"{part}/_annotations.coco.json")
    return next((path for name in names if (path := root / name).is_file()), None)


def has_ground_truth(root: Path) -> bool:
    """Whether a folder holds a dataset to learn from."""
    marked = (root / MAPPING_NAME).is_file() or (root / "train.csv").is_file()
    marked = marked or coco_file(root, "train") or any((root / "train").glob("*/class*.tif"))
    return bool(marked) and (root / "train").is_dir()


def dataset_roots(folder: Path, depth: int = 6) -> list[Path]:
    """The folders, at most six levels down, with a dataset, or test images and their mapping."""
    has_mapping = (folder / MAPPING_NAME).is_file() and (folder / "test_release").is_dir()
    if has_mapping or has_ground_truth(folder):
        return [folder]
    paths = sorted(folder.iterdir()) if folder.is_dir() and depth else []
    below = [path for path in paths if path.is_dir() and path.name[0] != "."]
    return [root for path in below for root in dataset_roots(path, depth - 1)]


def find_dataset(data: str, searched: Sequence[str] = SEARCHED_FOLDERS) -> Path | None:
    """The root of the dataset, the first of several; None for the demo, or without any upload.

    Args:
        data: the root, a folder above it, or a folder of images; "demo"; "" to search.

    Raises:
        FileNotFoundError: no dataset is in `data` or in what was uploaded.
    """
    folders = [Path(folder) for folder in ([data] if data else searched) if data != "demo"]
    roots = [root for folder in folders for root in dataset_roots(folder)]
    roots = roots or [folder for folder in folders if data and image_files(folder)]
    if others := ", ".join(map(str, roots[1:])):
        print(f"Several datasets found, {roots[0]} is used; set DATA for another: {others}")
    for folder in [] if roots else folders:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        names = [p.name for p in paths if p.name[0] != "." and p.name not in NO_UPLOADS]
        if data or names:
            kind = "nothing" if folder.is_dir() else "a file" if folder.is_file() else "no folder"
            raise FileNotFoundError(
                f"No dataset in {folder}, but {', '.join(names[:5]) or kind}. Expected train/ and "
                "its ground truth (class1.tif in its folders, train.csv or train.json), at most "
                f"six levels down; or DATA naming a folder of images ({', '.join(IMAGE_SUFFIXES)})."
                " Unpack archives, correct DATA, or set it to 'demo'."
            )
    return roots[0] if roots else None


def read_table(path: Path, columns: set[str]) -> pd.DataFrame:
    """Read a CSV file with at least these columns as text. Raises BadInput."""
    field_size_limit(2**31 - 1)  # a large cell has a long RLE
    with name_file(path):
        options = dict(dtype=str, keep_default_na=False, engine="python", encoding="utf-8-sig")
        table = pd.read_csv(path, **options)
        require(columns <= set(table), f"columns {list(table)}; expected {sorted(columns)}.")
        full = isinstance(table.index, pd.RangeIndex) and not table.isna().any(axis=None)
        require(full and len(table), "no rows, or some without a value for each column.")
        return table


def read_image_list(path: Path, folder: Path) -> tuple[dict, list[ImageRecord]]:
    """Read a COCO file or test mapping: its content, and the images it lists. Raises BadInput."""
    keys = ("file_name", "id", "height", "width")
    with name_file(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        content = content if isinstance(content, dict) else {"images": content}
        rows = content.get("images")
        require(isinstance(rows, list) and rows, "lists no images; expected at least one.")
        for row in rows:
            name, *numbers = (row.get(key) for key in keys)
            valid = isinstance(name, str) and all(type(number) is int for number in numbers)
            valid = valid and Path(name).parts and not {"..", "/"} & set(Path(name).parts)
            expected = f"expected a plain file_name below {folder}, and whole id, height and width"
            require(valid, f"image {str(row)[:99]}; {expected}.")
        for key in keys[:2]:
            value, count = Counter(row[key] for row in rows).most_common(1)[0]
            require(count == 1, f"{key} {value!r} occurs twice; expected each once.")
    return content, [ImageRecord(folder / r["file_name"], *map(r.get, keys[1:])) for r in rows]


def read_listed(record: ImageRecord, source: Path) -> np.ndarray:
    """Read a listed image, (3, H, W) uint8. Raises BadInput, also for another size."""
    with name_file(source):
        require(record.path.is_file(), f"{record.path} is not there. Add it or correct the name.")
        image, stated = read_image(record.path), (record.height, record.width)
        same = tuple(map(str, stated)) in (tuple(map(str, image.shape[1:])), ("", ""))
        require(same, f"{record.path}: {image.shape[1:]} (H, W), but stated as {stated}.")
        return image


def match_images(folder: Path, names: Iterable[str], source: Path) -> dict[str, Path]:
    """Find the images of names without suffix, as CSV files list them. Raises BadInput."""
    paths = {path.stem: path for path in image_files(folder)}
    missing = [name for name in names if name not in paths]
    with name_file(source):
        require(not missing, f"ids {missing[:3]}, but no such image in {folder}. Add or drop it.")
    return {name: paths[name] for name in names}


def read_groups(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Read `groups.csv`, columns name and group (patient, slide), if any. Raises BadInput."""
    path = root / "groups.csv"
    table = read_table(path, {"name", "group"}) if path.is_file() else dict(name=[], group=[])
    rows = [(n, g) for n, g in zip(table["name"], table["group"], strict=True) if g]
    groups, known = dict(rows), set(names)
    wrong = [(name, g) for name, g in rows if groups[name] != g or name not in known]
    with name_file(path):
        require(not wrong, f"{wrong[:3]}; expected images such as {names[:1]}, each in one group.")
    return groups


# %%
# @title Read annotations; open a dataset of any layout
def segmentation_pixels(segmentation, height: int, width: int) -> np.ndarray:
    """Read polygons, a COCO RLE or CSV text as (A,) row-major offsets. Raises ValueError."""
    if isinstance(segmentation, str):
        return csv_to_pixels(segmentation, height * width)
    if isinstance(segmentation, list):
        for points in segmentation or [[]]:
            valid = len(points) >= 6 and len(points) % 2 == 0
            valid = valid and all(type(v) in (int, float) and abs(v) < 1e5 for v in points)
            require(valid, f"polygon {points[:6]}; expected x, y of 3 points or more.")
        polygons = pycocotools.mask.frPyObjects(segmentation, height, width)
        segmentation = pycocotools.mask.merge(polygons)
    size = list(segmentation["size"])
    require(size == [height, width], f"RLE of size {size} in an image of {[height, width]}.")
    return pixel_indices(segmentation)


def read_annotated(source: Path, records, rows, overlaps: bool, name: str) -> CellSample:
    """Read an image of a CSV or COCO file. Raises BadInput.

    records: name -> `ImageRecord`; rows: name -> (label, -k for a crowd; segmentation; number).
    """
    image, parts = read_listed(records[name], source), []
    for label, segmentation, number in rows[name]:
        with name_file(f"{source}, {name}, annotation {number}"):
            pixels = segmentation_pixels(segmentation, *image.shape[1:])
        parts.append((pixels, np.ones(len(pixels), np.int64), label))
    parts.sort(key=lambda part: part[2] < 0)  # where pixels are given away, crowds come last
    packed = pack_layers(parts, image.shape[1:], overlaps)
    file_name = Path(name).with_name(records[name].path.name).as_posix()
    return CellSample(torch.from_numpy(image), *packed, file_name)


def open_csv(root: Path) -> tuple:
    """Open `train.csv`, a row per instance: its path, records, rows, categories, groups."""
    path, defaults = root / "train.csv", dict(height="", width="", cell_type="cell", sample_id="")
    table = read_table(path, {"id", "annotation"})
    table = table.assign(**{key: text for key, text in defaults.items() if key not in table})
    sizes = table[["id", "height", "width"]].drop_duplicates().set_index("id")
    with name_file(path):
        require(sizes.index.is_unique, "rows of one id state different sizes; expected one.")
    paths = match_images(root / "train", sizes.index, path)
    records = {name: ImageRecord(paths[name], 0, *size) for name, *size in sizes.itertuples()}
    codes, kinds = pd.factorize(table["cell_type"], sort=True)
    texts = table["annotation"].replace("-1", "")  # -1: no instances, as in submissions
    rows = zip(table["id"], (codes + 1).tolist(), texts, table.index + 2, strict=True)
    wells = table[table["sample_id"] != ""]  # of Sartorius
    groups = dict(zip(wells["id"], wells["sample_id"], strict=True))
    return path, records, rows, dict(enumerate(kinds, start=1)), groups


def open_coco(root: Path) -> tuple:
    """Open a COCO file: its path, records, rows, categories, no groups."""
    path, rows = coco_file(root, "train"), []
    content, images = read_image_list(path, root / "train")
    names = {im.image_id: im.path.relative_to(root / "train").as_posix() for im in images}
    with name_file(path):
        annotations, kinds = content.get("annotations"), content.get("categories")
        valid = isinstance(annotations, list) and isinstance(kinds, list)
        require(valid, "expected a COCO file with lists of images, annotations and categories.")
        categories = dict(sorted((row["id"], str(row["name"])) for row in kinds))
        valid = len(categories) == len(kinds) and all(type(key) is int for key in categories)
        require(valid, f"category ids {list(categories)}; expected whole numbers, each once.")
        labels = {key: label for label, key in enumerate(categories, start=1)}
        for row in annotations:
            image, category, crowd = map(row.get, ("image_id", "category_id", "iscrowd"))
            valid = type(image) is type(category) is int and image in names and category in labels
            valid = valid and isinstance(row.get("segmentation"), (list, dict))
            found = f"annotation {row.get('id')}: image_id {image!r}, category_id {category!r}"
            expected = "expected listed ones, a segmentation, iscrowd 0 or 1"
            require(valid and crowd in (None, 0, 1), f"{found}, iscrowd {crowd!r}; {expected}.")
            label = -labels[category] if crowd else labels[category]
            rows.append((names[image], label, row["segmentation"], row.get("id")))
    return path, {names[im.image_id]: im for im in images}, rows, categories, {}


def print_left_out(paths: Sequence[Path], total: int, reason: str) -> None:
    """Say how many of the images found are left out, if any, and why."""
    if paths:
        print(f"read {total - len(paths)} of {total} images, left out {len(paths)}: {reason},")
        print(f"such as {paths[0]}")


def list_test_images(root: Path, folder: Path) -> list[ImageRecord]:
    """The images of the mapping, a COCO file or `sample_submission.csv`, else all in `folder`."""
    mapping, table = root / MAPPING_NAME, root / "sample_submission.csv"
    if source := mapping if mapping.is_file() else coco_file(root, "test"):
        images = read_image_list(source, root / "test_release" if source == mapping else folder)[1]
        for image in images:
            read_listed(image, source)
        return images
    paths = image_files(folder)
    if table.is_file():
        names = dict.fromkeys(read_table(table, {"id"})["id"])
        paths = list(match_images(folder, names, table).values())
    masks = {f"{path.stem}{end}" for path in paths for end in ("_masks", "_cp_masks")}
    labels = [path for path in paths if path.stem in masks]
    print_left_out(labels, len(paths), "label images of Cellpose beside their images")
    paths = [path for path in paths if path.stem not in masks]
    return [ImageRecord(p, k, *read_image(p).shape[1:]) for k, p in enumerate(paths, start=1)]


def read_named_folder(parent: Path, config: Config, name: str) -> CellSample:
    """Read one folder of `train/`; see `read_cell_folder`."""
    return read_cell_folder(parent / name, config.num_classes, config.overlaps)


def open_dataset(root: Path, config: Config) -> CellDataset:
    """List the images of a dataset, and print what is left out. Raises BadInput.

    Classes are those of `config.class_names` unless a CSV or COCO file tells them.
    """
    folder, mapped, names = root / "train", (root / MAPPING_NAME).is_file(), []
    categories, groups = dict(enumerate(config.class_names, start=1)), {}
    layout = "folders" if mapped or has_ground_truth(root) else "images"
    read, left_out = partial(read_named_folder, folder, config), image_files(folder)
    if not mapped and ((root / "train.csv").is_file() or coco_file(root, "train")):
        layout = "csv" if (root / "train.csv").is_file() else "coco"
        opened = open_csv(root) if layout == "csv" else open_coco(root)
        source, records, rows, categories, groups = opened
        by_name = {name: [] for name in sorted(records)}
        for name, *row in rows:
            by_name[name].append(row)
        names = list(by_name)
        read = partial(read_annotated, source, records, by_name, config.overlaps)
        found = {path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
        left_out = sorted(found - {record.path for record in records.values()})
    elif folder.is_dir() and layout == "folders":
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        with name_file(folder):
            require(names, "no folders; expected one per training image.")
    reason = "not listed, or not in a folder of their own"
    print_left_out(left_out, len(names) + len(left_out), reason)
    test_images = list_test_images(root, root if layout == "images" else root / "test")
    groups = groups | read_groups(root, names)
    return CellDataset(root, layout, names, read, categories, test_images, groups)
