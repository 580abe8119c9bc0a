"""Find a dataset on disk and open its layout: folders, CSV, COCO, pairs, or images alone."""

# %% [markdown]
# ### Find the dataset
# Five layouts are known by where their ground truth is: `class1.tif ..` beside each
# `train/<name>/image.tif`; `train.csv` with an RLE per row; `train.json`, COCO polygons or RLEs;
# label images as Cellpose and StarDist keep them, `train/a_masks.tif` beside `train/a.tif` or
# `masks/a.tif` for `images/a.tif`; nowhere, images alone for `CHECKPOINTS` to predict. Each becomes
# a `CellDataset`. The trap: results carry the dataset's own ids, labels are always 1..C.

# %%
# @title Find a dataset and the files of its parts
from ast import literal_eval
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from csv import field_size_limit
from dataclasses import dataclass, field
from functools import partial
import json
from pathlib import Path
import re
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pycocotools.mask
from scipy import ndimage
import torch

from src_snippets.data.images import (
    name_file,
    read_cell_folder,
    read_image,
    read_instance_map,
    require,
)
from src_snippets.data.rle import crop_mask, csv_to_pixels, decode_runs, mask_areas, pixel_indices
from src_snippets.data.structures import CellSample, pack_layers
from src_snippets.setup.config import Config

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
TEXT_SUFFIXES = (".csv", ".json", ".txt", ".md", ".xml", ".html")
MAPPING_NAME = "test_image_name_to_ids.json"
SEARCHED_FOLDERS = ("/kaggle/input", "/content", "data")
NO_UPLOADS = ("sample_data", "drive", "results", "hw3.ipynb")  # what else is there on Colab
# What a part of a dataset is called, by Roboflow and CVAT too, and where its files are
PARTS = dict(train=("train", "default"), val=("val", "valid"), test=("test",))
IMAGE_FOLDERS = ("{}", "{}2017", "images/{}", "images/{}2017")
COCO_FOLDERS = (*IMAGE_FOLDERS, "images")
COCO_FILES = ("{}.json", "{}_gt.json", "annotations/{}.json", "annotations/instances_{}.json")
COCO_FILES += ("annotations/instances_{}2017.json", "{}/_annotations.coco.json")
# How the names of label images end, and of what else Cellpose writes beside an image
LABEL_END = re.compile(r"(?<!_outlines)(_cp)?_(masks?|labels?)$", re.IGNORECASE)
OUTPUT_END = re.compile(r"(_outlines)?(_cp)?_(masks?|labels?|flows|output)$", re.IGNORECASE)


class ImageRecord(NamedTuple):
    """Where an image is, its id in results, its size in pixels (0 where a table tells none)."""

    path: Path
    image_id: int
    height: int
    width: int


@dataclass(frozen=True)
class CellDataset:
    """What is on disk, whatever its layout."""

    root: Path
    layout: str  # "folders", "csv", "coco", "pairs" or "images"
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


def find_part(root: Path, part: str, patterns: Sequence[str]) -> Path | None:
    """The first path below `root` that is named after a part of the dataset, None without one."""
    paths = (root / pattern.format(name) for pattern in patterns for name in PARTS[part])
    return next((path for path in paths if path.exists()), None)


def find_pairs(folder: Path) -> dict[Path, Path]:
    """The label image of each image that has one, as Cellpose and StarDist keep them."""
    images = image_files(folder / "images") or image_files(folder)
    apart = image_files(folder / "masks") or image_files(folder / "labels")
    beside = [path for path in images if LABEL_END.search(path.stem)]
    labels = {LABEL_END.sub("", path.stem): path for path in apart or beside}
    images = [path for path in images if path not in beside]
    named = {name: p for p in images for name in (p.stem, p.stem.removesuffix("_img"))}
    return {path: labels[name] for name, path in named.items() if name in labels}


def find_layout(root: Path) -> str:
    """The layout of a folder, by its ground truth or test mapping; "images" without both."""
    train, is_mapped = root / "train", (root / MAPPING_NAME).is_file()
    if is_mapped and (train.is_dir() or (root / "test_release").is_dir()):
        return "folders"
    if not find_part(root, "train", COCO_FOLDERS):
        return "images"
    if (root / "train.csv").is_file() and train.is_dir():
        return "csv"
    if find_part(root, "train", COCO_FILES):
        return "coco"
    if any(train.glob("*/class*.tif")):
        return "folders"
    apart = (root / "images").is_dir() and find_pairs(root)
    return "pairs" if find_pairs(train) or apart else "images"


def dataset_roots(folder: Path, depth: int = 6) -> list[Path]:
    """The folders, at most six levels down, with a dataset, or test images and their mapping."""
    if find_layout(folder) != "images":
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
                "its ground truth (class1.tif in its folders, train.csv, train.json, a_masks.tif), "
                "at most six levels down; or DATA naming a folder of images, such as .tif or .png."
                " Unpack archives, correct DATA, or set it to 'demo'."
            )
    return roots[0] if roots else None


# %%
# @title Read tables and lists of images; match names with files
def require_rows(table: pd.DataFrame, valid: pd.Series, expected: str) -> None:
    """Raise BadInput with the number of rows that are not valid and the first three of them."""
    wrong = table[~valid]
    first = "; ".join(str(row)[:140] for row in wrong.head(3).to_dict("records"))
    require(wrong.empty, f"{len(wrong)} of {len(table)} rows: {first}. Expected {expected}.")


def whole(values: pd.Series) -> pd.Series:
    """Whole numbers as JSON and tables have them, 128, "128" or 128.0; NaN for anything else."""
    numbers = pd.to_numeric(values.astype(str), errors="coerce")
    return numbers.where((numbers % 1 == 0) & (numbers.abs() < 2**53))


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


def normal_name(name: str) -> str:
    """A name without its folder, whatever writes it: no %20, accents as one letter, lower case."""
    return normalize("NFC", unquote(name)).replace("\\", "/").split("/")[-1].casefold()


def match_images(folder: Path, names: Iterable[str], source: Path) -> dict[str, Path]:
    """Find the images below `folder` that `source` lists, with suffix or without. Raises BadInput.

    A name that is not there as it is written is that of the one image with its `normal_name`.
    """
    by_name, matches, changed = defaultdict(list), {}, []
    for path in sorted(folder.rglob("*.*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            for name in {normal_name(path.name), normal_name(path.stem)}:
                by_name[name].append(path)
    for name in dict.fromkeys(names):
        paths = by_name[normal_name(name)]
        written = [p for p in paths if p in (folder / name, folder / f"{name}{p.suffix}")]
        matches[name] = written or paths
        changed += [] if written else [name]
    with name_file(source):
        wrong = [name for name, paths in matches.items() if len(paths) != 1]
        found = f"{wrong[:3]}, {len(wrong)} of {len(matches)} names: not there, or several files"
        require(not wrong, f"{found} in {folder}. Add the image or correct the name.")
    for name in changed[:1]:
        print(f"{source}: {len(changed)} names differ on disk: {name!r} is {matches[name][0]}")
    return {name: path for name, (path,) in matches.items()}


def read_image_list(path: Path, folder: Path) -> tuple[dict, list[ImageRecord]]:
    """Read a COCO file or test mapping: its content, and the images it lists. Raises BadInput."""
    with name_file(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        content = content if isinstance(content, dict) else {"images": content}
        rows = content.get("images")
        require(isinstance(rows, list) and rows, "lists no images; expected at least one.")
        table = pd.DataFrame(rows, columns=["file_name", "id", "height", "width"])
        numbers = table[["id", "height", "width"]].apply(whole)
        valid = numbers.notna().all(axis=1) & (numbers[["height", "width"]] > 0).all(axis=1)
        valid &= table["file_name"].map(lambda name: isinstance(name, str) and name != "")
        require_rows(table, valid, "a file_name and whole id, height and width")
        require_rows(table, ~numbers["id"].duplicated(keep=False), "each id once")
    paths = match_images(folder, table["file_name"], path)
    rows = zip(table["file_name"], numbers.astype(int).to_numpy().tolist(), strict=True)
    return content, [ImageRecord(paths[name], *row) for name, row in rows]


def read_listed(record: ImageRecord, source: Path) -> np.ndarray:
    """Read a listed image, (3, H, W) uint8. Raises BadInput, also for another size."""
    image, stated = read_image(record.path), (record.height, record.width)
    with name_file(source):
        found = f"{record.path}: {image.shape[1:]} (H, W), but stated as {stated}."
        require(stated in (image.shape[1:], (0, 0)), found)
    return image


def read_groups(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Read `groups.csv`, columns name and group (patient, slide), if any. Raises BadInput."""
    path = root / "groups.csv"
    table = read_table(path, {"name", "group"}) if path.is_file() else dict(name=[], group=[])
    known = {normalize("NFC", name): name for name in names}  # macOS has another form on disk
    table["name"] = [known.get(normalize("NFC", name), name) for name in table["name"]]
    rows = [(n, g) for n, g in zip(table["name"], table["group"], strict=True) if g]
    groups, known = dict(rows), set(names)
    wrong = [(name, g) for name, g in rows if groups[name] != g or name not in known]
    with name_file(path):
        require(not wrong, f"{wrong[:3]}; expected images such as {names[:1]}, each in one group.")
    return groups


# %%
# @title Read annotations: COCO and CSV
NO_OUTLINE = "without an outline (boxes only)"
SHORT = "polygons of fewer than 3 points"
OUTSIDE = "without a pixel in the image (coordinates of another size?)"


def encode_outline(segmentation, height: int, width: int) -> tuple[dict | None, str]:
    """Encode polygons or a COCO RLE as RLE, None without a pixel. Raises ValueError.

    The second value says why all or some of it is left out, "" where nothing is.
    """
    if segmentation != segmentation or not segmentation:  # NaN: no such key
        return None, NO_OUTLINE
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], [height, width]
        same = list(map(float, segmentation["size"])) == size
        require(same, f"RLE of size {segmentation['size']} in an image of {size}.")
        if isinstance(counts, str):  # or bytes that were written with str()
            counts = literal_eval(counts) if counts[:2] in ("b'", 'b"') else counts.encode()
        rle = dict(size=size, counts=counts)
        rle = pycocotools.mask.frPyObjects(rle, *size) if isinstance(counts, list) else rle
        return (rle, "") if len(decode_runs(rle)[0]) else (None, OUTSIDE)
    if not any(isinstance(piece, list) and len(piece) != 2 for piece in segmentation):
        segmentation = [segmentation]  # one polygon, as VIA writes it: flat or a list of points
    pieces = [np.asarray(piece, float).ravel() for piece in segmentation]
    polygons = [piece for piece in pieces if len(piece) >= 6]
    valid = all(np.isfinite(polygon).all() and len(polygon) % 2 == 0 for polygon in polygons)
    require(valid, f"polygon {str(segmentation)[:60]}; expected pairs of numbers x, y.")
    if not polygons:
        return None, SHORT
    points = np.concatenate(polygons)
    if points.max() <= 1 or np.abs(points).max() >= 1e5:  # fractions of the image, or far away
        return None, OUTSIDE
    rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))
    reason = SHORT if len(polygons) < len(pieces) else ""
    return (rle, reason) if pycocotools.mask.area(rle) else (None, OUTSIDE)


def find_brush_masks(table: pd.DataFrame) -> pd.Index:
    """Rows of crowds that are one cell: an RLE in one piece, up to 4 times the median area."""
    areas = table["shape"].map(lambda rle: pycocotools.mask.area(rle) if rle else np.nan)
    typical = areas.groupby(table["kind"]).transform("median")
    found = (table["crowd"] == 1) & (areas <= 4 * typical)
    found &= table["segmentation"].map(lambda shape: isinstance(shape, dict))
    pieces = table["shape"][found].map(lambda rle: ndimage.label(crop_mask(rle)[0])[1])
    return pieces.index[pieces == 1]


def open_coco(root: Path) -> tuple:
    """Open the COCO files of the training and, below its folder, the validation part.

    Raises BadInput; see `open_csv` for what comes out.
    """
    records, validation, rows, kinds, listed = {}, [], [], [], 0
    source = find_part(root, "train", COCO_FILES)
    for part in ("train", "val"):
        path, folder = (find_part(root, part, names) for names in (COCO_FILES, COCO_FOLDERS))
        if path and folder:
            content, images = read_image_list(path, folder)
            above = folder if part == "train" else folder.parent
            names = {str(im.image_id): im.path.relative_to(above).as_posix() for im in images}
            records |= dict(zip(names.values(), images, strict=True))
            validation += sorted({*names.values()}) if part == "val" else []
            own, categories = content.get("annotations"), content.get("categories")
            own = list(own.values()) if isinstance(own, dict) else own  # by id: LIVECell
            with name_file(path):
                valid = isinstance(own, list) and isinstance(categories, list)
                require(valid, "expected lists of images, annotations and categories.")
                rows += [row | dict(name=names.get(str(row.get("image_id")))) for row in own]
            kinds, listed = kinds + categories, listed + len(images)
    if again := listed - len(records):
        print(f"{source}: {again} images are listed again; their annotations are joined")
    with name_file(source):
        kinds = pd.DataFrame(kinds, columns=["id", "name", "supercategory"])
        kinds["id"] = whole(kinds["id"])
        kinds = kinds.drop_duplicates(["id", "name"]).sort_values("id")
        valid = kinds[["id", "name"]].notna().all(axis=1) & ~kinds["id"].duplicated(keep=False)
        require_rows(kinds, valid, "categories with a name and a whole id, each once")
        kinds = kinds.astype({"id": int, "name": str})
        columns = ["id", "image_id", "category_id", "iscrowd", "name", "segmentation"]
        table = pd.DataFrame(rows, columns=columns).rename(columns={"id": "number"})
        table["kind"], table["crowd"] = whole(table["category_id"]), table["iscrowd"].isin([1, "1"])
        valid = table["name"].notna() & table["kind"].isin(kinds["id"])
        valid &= table["crowd"] | table["iscrowd"].isna() | table["iscrowd"].isin([0, "0"])
        require_rows(table, valid, "annotations of listed images and categories, iscrowd 0 or 1")
        outlines, wrong = [], []
        for row in table.itertuples():
            try:
                outlines.append(encode_outline(row.segmentation, *records[row.name][2:]))
            except Exception as error:  # pycocotools raises many types
                wrong.append(f"annotation {row.number}: {error}")
        require(not wrong, f"{len(wrong)} of {len(table)} annotations: {'; '.join(wrong[:3])}")
    table[["shape", "reason"]] = pd.DataFrame(outlines, table.index, ["shape", "reason"], object)
    if len(cells := find_brush_masks(table)):
        table.loc[cells, "crowd"] = False
        print(f"{source}: {len(cells)} of {len(table)} annotations have iscrowd 1 but are in one")
        print("piece of a cell's size, as CVAT writes brush masks: they are read as cells")
    rles = [rle for rle in table["shape"] if rle]
    sides = pycocotools.mask.toBbox(rles)[:, 2:] if rles else np.zeros((0, 2))
    boxes = int((mask_areas(rles) == sides.prod(axis=1)).sum())
    if boxes >= 10 and 2 * boxes > len(rles):
        print(f"WARNING: {source}: {boxes} of {len(rles)} outlines are upright boxes, not cells?")
    groups = kinds["supercategory"][kinds["supercategory"] != kinds["name"]]
    kinds = kinds[kinds["id"].isin(table["kind"]) | ~kinds["name"].isin(groups)]  # of Roboflow
    again = kinds["name"].duplicated(keep=False)
    names = kinds["name"].where(~again, kinds["name"] + " " + kinds["id"].astype(str))
    categories = dict(zip(kinds["id"].tolist(), names, strict=True))
    labels = {key: label for label, key in enumerate(categories, start=1)}
    table["label"] = table["kind"].map(labels) * (1 - 2 * table["crowd"])
    return source, records, table, categories, {}, validation


def open_csv(root: Path) -> tuple:
    """Open `train.csv`, a row per instance. Raises BadInput.

    Returns:
        its path; `ImageRecord` by name; a table of annotations: name, label (-k for a crowd), shape
        (CSV text or RLE), number, reason to leave it out; categories; groups; validation names.
    """
    path, folder, texts = root / "train.csv", root / "train", ("height", "width", "cell_type")
    table = read_table(path, {"id", "annotation"})
    table = table.assign(**{key: "" for key in (*texts, "sample_id") if key not in table})
    paths = match_images(folder, table["id"], path)
    names = {p: p.relative_to(folder).with_suffix("").as_posix() for p in paths.values()}
    table = table.assign(number=table.index + 2, reason="")
    table["path"], unnamed = table["id"].map(paths), table["cell_type"] == ""
    empty = table["annotation"].str.strip().isin(["", "-1"])  # -1: as in submissions
    table["name"], table["shape"] = table["path"].map(names), table["annotation"].mask(empty, "")
    sizes = table[["height", "width"]].apply(whole).assign(path=table["path"])
    sizes = sizes.dropna().drop_duplicates()
    with name_file(path):
        require_rows(sizes, ~sizes["path"].duplicated(keep=False), "one size for each image")
        valid = ~unnamed | empty | unnamed[~empty].all()
        require_rows(table[["id", *texts]], valid, "a cell_type in each row or in none")
    sizes = {path: (int(height), int(width)) for height, width, path in sizes.to_numpy()}
    records = {name: ImageRecord(p, 0, *sizes.get(p, (0, 0))) for p, name in names.items()}
    kinds = table["cell_type"].mask(unnamed, "cell")
    categories = dict(enumerate(sorted({*kinds[~empty]}) or ["cell"], start=1))
    labels = kinds.map({name: label for label, name in categories.items()})
    table["label"] = labels.fillna(0).astype(int)  # 0: no annotation
    wells = table[table["sample_id"] != ""]  # of Sartorius
    groups = dict(zip(wells["name"], wells["sample_id"], strict=True))
    return path, records, table, categories, groups, []


# %%
# @title Open a dataset of any layout
def rows_by_name(source: Path, names: Iterable[str], table: pd.DataFrame) -> dict[str, list]:
    """Rows (label, shape, number, reason) of a table of annotations by name. Raises BadInput.

    Where more than a third cannot be used, the rest is not what was meant either.
    """
    has_shape = table["shape"].astype(bool)
    lost = table["reason"][~has_shape & (table["reason"] != "")].value_counts()
    found = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    with name_file(source):
        found = f"{lost.sum():,} of {len(table):,} annotations cannot be used: {found}."
        expected = "Expected polygons or RLEs in pixels of the images: export them so."
        require(3 * lost.sum() <= len(table), f"{found} {expected}")
    keys = table[["name", "label"]].assign(shape=table["shape"].astype(str))
    table.loc[keys.duplicated() & has_shape, ["shape", "reason"]] = "", "annotated twice"
    rows = {name: [] for name in sorted(names)}
    for name, *row in table[["name", "label", "shape", "number", "reason"]].itertuples(index=False):
        rows[name].append(row)
    return rows


def check_run_order(pixels: np.ndarray, height: int, width: int) -> None:
    """Raise BadInput where the runs of cells, row-major offsets, go down the columns instead."""
    steps = np.diff(pixels[np.flatnonzero(np.diff(pixels, prepend=-2) != 1)])  # between starts
    step = np.median(steps[steps > 0]) if len(steps) >= 20 else width
    found = f"cells are stripes, with runs {step:.0f} px apart, the height of the image"
    wrong = abs(step - height) < abs(step - width) / 4
    require(not wrong, f"{found}; expected {width}, row by row. Transpose the masks.")


def read_annotated(source: Path, records, rows, overlaps: bool, name: str) -> CellSample:
    """Read an image of a CSV or COCO file, see `rows_by_name`. Raises BadInput."""
    image, parts, wrong = read_listed(records[name], source), [], []
    for label, shape, number, _ in [row for row in rows[name] if row[1]]:
        try:
            is_csv = isinstance(shape, str)
            pixels = csv_to_pixels(shape, image[0].size) if is_csv else pixel_indices(shape)
            parts.append((pixels, np.ones(len(pixels), np.int64), label))
        except ValueError as error:
            wrong.append(f"annotation {number}: {error}")
    with name_file(f"{source}, {name}"):
        require(not wrong, f"{len(wrong)} of {len(rows[name])} rows: {'; '.join(wrong[:3])}")
        if parts and source.suffix == ".csv":
            check_run_order(np.concatenate([pixels for pixels, *_ in parts]), *image.shape[1:])
    parts.sort(key=lambda part: part[2] < 0)  # where pixels are given away, crowds come last
    packed = pack_layers(parts, image.shape[1:], overlaps)
    file_name = Path(name).with_name(records[name].path.name).as_posix()
    left_out = Counter(reason for *_, reason in rows[name] if reason)
    image = torch.from_numpy(image)
    return CellSample(image, *packed, file_name, left_out, records[name].path)


def read_pair(pairs: Mapping[str, tuple], name: str) -> CellSample:
    """Read an image and its label image, all of class 1. Raises BadInput, also for other sizes."""
    path, labels = pairs[name]
    image, found = read_image(path), read_instance_map(labels)
    with name_file(labels):
        expected = f"expected {image.shape[1:]} as of {path.name}"
        require(found.size == image.shape[1:], f"{found.size} (H, W); {expected}.")
    packed = pack_layers([(found.pixels, found.ids, 1)], found.size)
    strays = {"stray pieces": found.strays}
    return CellSample(torch.from_numpy(image), *packed, name, strays, path)


def read_named_folder(parent: Path, config: Config, name: str) -> CellSample:
    """Read one folder of `train/`; see `read_cell_folder`."""
    return read_cell_folder(parent / name, config.num_classes, config.overlaps)


def list_test_images(root: Path, folder: Path) -> list[ImageRecord]:
    """The images of the mapping, a COCO file or `sample_submission.csv`, else all in `folder`."""
    mapping, table = root / MAPPING_NAME, root / "sample_submission.csv"
    if source := mapping if mapping.is_file() else find_part(root, "test", COCO_FILES):
        images = read_image_list(source, folder)[1]
        for image in images:
            read_listed(image, source)
        return images
    paths = image_files(folder)
    if table.is_file():
        paths = list(match_images(folder, read_table(table, {"id"})["id"], table).values())
    names = {p.stem.removesuffix("_img") for p in paths if not OUTPUT_END.search(p.stem)}
    outputs = {p for p in paths if OUTPUT_END.search(p.stem)}
    outputs = {p for p in outputs if OUTPUT_END.sub("", p.stem) in names}
    paths = [path for path in paths if path not in outputs]
    return [ImageRecord(p, k, *read_image(p).shape[1:]) for k, p in enumerate(paths, start=1)]


def list_left_out(root: Path, folders: Iterable[Path], used: set[Path]) -> dict[str, list[Path]]:
    """List the files below `folders`, folders of `root`, that are not used, by reason."""
    left_out = defaultdict(list)
    for path in sorted({path for folder in folders for path in folder.rglob("*.*")} - used):
        suffix, is_hidden = path.suffix.lower(), "/." in f"/{path.relative_to(root).as_posix()}"
        reason = "images without ground truth, or not listed"
        if suffix not in IMAGE_SUFFIXES:
            reason = "files of another kind"
        elif OUTPUT_END.search(path.stem):
            reason = "label images and outputs of Cellpose or StarDist"
        if path.is_file() and not is_hidden and suffix not in TEXT_SUFFIXES:
            left_out[reason].append(path)
    return dict(left_out)


def open_dataset(root: Path, config: Config) -> CellDataset:
    """List the images of a dataset, and what is left out. Raises BadInput.

    Classes are those of `config.class_names` unless a CSV or COCO file tells them; pairs have one.
    """
    layout, train, is_mapped = find_layout(root), root / "train", (root / MAPPING_NAME).is_file()
    categories, groups, validation = dict(enumerate(config.class_names, start=1)), {}, []
    names, read, used = [], partial(read_named_folder, train, config), set()
    if layout in ("csv", "coco"):
        opened = open_csv(root) if layout == "csv" else open_coco(root)
        source, records, table, categories, groups, validation = opened
        rows = rows_by_name(source, records, table)
        names, train = list(rows), find_part(root, "train", COCO_FOLDERS)
        read = partial(read_annotated, source, records, rows, config.overlaps)
        used = {record.path for record in records.values()}
    elif layout == "pairs":
        train, categories = train if find_pairs(train) else root, {1: "cell"}
        pairs = {p.relative_to(train).as_posix(): (p, q) for p, q in find_pairs(train).items()}
        names, read = list(pairs), partial(read_pair, pairs)
        used = {path for pair in pairs.values() for path in pair}
    elif layout == "folders" and train.is_dir():
        names = sorted(p.name for p in train.iterdir() if p.is_dir() and p.name[0] != ".")
        used = {*train.glob("*/*.tif")}
        with name_file(train):
            require(names, "no folders; expected one per training image.")
    test = find_part(root, "test", ("{}/images", *IMAGE_FOLDERS)) or root / "test"
    test = root if layout == "images" else root / "test_release" if is_mapped else test
    test_images, val = list_test_images(root, test), find_part(root, "val", IMAGE_FOLDERS)
    used |= {image.path for image in test_images}
    left_out = list_left_out(root, filter(None, {train, test, val}), used)
    groups |= read_groups(root, names)
    facts = (names, read, categories, test_images, groups, validation, left_out)
    return CellDataset(root, layout, *facts)
