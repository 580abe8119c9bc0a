"""Find a dataset on disk and open its layout: folders, CSV, COCO, pairs, or images alone."""

# %% [markdown]
# ### Find the dataset
# The layout follows from the ground truth that is found:
#
# - folders: `class1.tif ..` beside each `train/<name>/image.tif`
# - CSV: `train.csv` with an RLE per row
# - COCO: `train.json` with polygons or RLEs
# - pairs: a label image, as of Cellpose or StarDist, or GeoJSON of QuPath for each image:
#   `train/a_masks.tif` or `train/a.geojson` beside `train/a.tif`, `masks/a.tif` for `images/a.tif`
# - none: images alone, which `CHECKPOINTS` predict
#
# Each becomes a `CellDataset`. Labels are always 1..C; results have the dataset's own category ids.

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
    read_geojson,
    read_image,
    read_instance_map,
    shape_pixels,
)
from src_snippets.data.rle import crop_mask, decode_runs
from src_snippets.data.structures import CellSample, pack_layers
from src_snippets.setup.config import BadInput, Config, require

IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
TEXT_SUFFIXES = ("", ".csv", ".json", ".txt", ".md", ".xml", ".html")  # "": as of LICENSE
MAPPING_NAME = "test_image_name_to_ids.json"
NO_UPLOADS = ("sample_data", "drive", "results", "hw3.ipynb")  # what else is there on Colab
# What a part of a dataset is called, by COCO, Roboflow and CVAT too, and where its files are
PARTS = dict(train=("train", "train2017", "default", "Train"), test=("test", "test2017", "Test"))
PARTS |= dict(val=("val", "val2017", "valid", "validation", "Validation"))
IMAGE_FOLDERS = ("{}", "images/{}")
COCO_FOLDERS = (*IMAGE_FOLDERS, "images")
COCO_FILES = ("{}.json", "{}_gt.json", "annotations/{}.json", "annotations/instances_{}.json")
COCO_FILES += ("{}/_annotations.coco.json",)
# How the names of images and label images end, and of what else Cellpose writes beside an image
IMAGE_END = re.compile(r"(_img)?(\.ome)?$")
LABEL_END = re.compile(r"(?<!_outlines)(_cp)?_(masks?|labels?)(\.ome)?$", re.IGNORECASE)
OUTPUT_END = re.compile(r"(?i)(_(outlines|flows|dP|cp))*_(masks?|labels?|flows|dP|output)(\.ome)?$")


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
    test_ids: Mapping[Path, str] = field(default_factory=dict)  # in `sample_submission.csv`


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    return [p for p in sorted(folder.glob("[!.]*")) if p.suffix.lower() in IMAGE_SUFFIXES]


def find_part(root: Path, part: str, patterns: Sequence[str]) -> Path | None:
    """The first path below `root` that is named after a part of the dataset, None without one."""
    paths = (root / pattern.format(name) for pattern in patterns for name in PARTS[part])
    return next((path for path in paths if path.exists()), None)


def find_pairs(folder: Path, deep: bool = True) -> dict[Path, Path]:
    """Map each image to its annotation, GeoJSON first; `deep`: of folders in it if it has none."""
    images = image_files(folder / "images") or image_files(folder)
    apart = image_files(folder / "masks") or image_files(folder / "labels")
    beside = dict.fromkeys(path for path in images if LABEL_END.search(path.stem))
    labels = {LABEL_END.sub("", path.stem): path for path in apart or beside}
    parts = ("geojson/", "qupath/", "images/", "")
    places = (sorted(folder.glob(f"{part}*.geojson")) for part in parts)
    outlines = next(filter(None, places), [])
    labels |= {IMAGE_END.sub("", p.stem): p for p in outlines} | {p.stem: p for p in outlines}
    by_name = {n: p for p in images for n in (IMAGE_END.sub("", p.stem), p.stem, p.name)}
    pairs = {p: labels[n] for n, p in by_name.items() if n in labels and p not in beside}
    below = [path for path in sorted(folder.glob("[!.]*")) if deep and path.is_dir()]
    return pairs or {k: v for path in below for k, v in find_pairs(path, deep=False).items()}


def find_layout(root: Path) -> str:
    """The layout of a folder, by its ground truth or test mapping; "images" without both."""
    train = root / "train"
    if (root / MAPPING_NAME).is_file() and (train.is_dir() or (root / "test_release").is_dir()):
        return "folders"
    if (root / "train.csv").is_file() and train.is_dir():
        return "csv"
    if find_part(root, "train", COCO_FOLDERS) and find_part(root, "train", COCO_FILES):
        return "coco"
    files = train.glob("*/class*.tif")  # those of pairs may be called so too
    if any(p.stem[5:].isdigit() or p.with_name("image.tif").exists() for p in files):
        return "folders"
    apart = (root / "images").is_dir() and find_pairs(root, deep=False)
    return "pairs" if (train.is_dir() and find_pairs(train)) or apart else "images"


def has_ground_truth(root: Path) -> bool:
    """Whether a dataset has images to train on, not only some to predict."""
    layout = find_layout(root)
    return (root / "train").is_dir() if layout == "folders" else layout != "images"


def dataset_roots(folder: Path, depth: int = 6) -> list[Path]:
    """The folders, at most six levels down, with a dataset, or test images and their mapping."""
    if find_layout(folder) != "images":
        return [folder]
    below = sorted(folder.glob("[!.]*/"), key=lambda path: (path.name == "drive", path))  # last
    roots = []
    for path in below if depth else ():
        if not roots or path.name != "drive":  # each folder of a Drive takes long to look at
            roots += dataset_roots(path, depth - 1)
    return sorted(roots, key=has_ground_truth, reverse=True)


def find_dataset(data: str, searched=("/kaggle/input", "/content", "data")) -> Path | None:
    """The root of the dataset, the first of several; None for the demo, or without any upload.

    data: the root, a folder above it, or a folder of images; "demo"; "" to search. Raises
    FileNotFoundError where no dataset is in `data` or in what was uploaded.
    """
    folders = [Path(f).expanduser() for f in ([data] if data else searched) if data != "demo"]
    roots = [root for folder in folders for root in dataset_roots(folder)]
    roots = roots or [folder for folder in folders if data and image_files(folder)]
    if others := ", ".join(map(str, roots[1:])):
        print(f"Several datasets found, {roots[0]} is used; set DATA for another: {others}")
    for folder in [] if roots else folders:
        names = [p.name for p in sorted(folder.glob("[!.]*")) if p.name not in NO_UPLOADS]
        if data or names:
            kind = "nothing" if folder.is_dir() else "a file" if folder.is_file() else "no folder"
            raise FileNotFoundError(
                f"No dataset in {folder}, but {', '.join(names[:5]) or kind}. Expected train/ and "
                "its ground truth (class1.tif in its folders, train.csv, train.json, a_masks.tif, "
                "a.geojson), at most six levels down; or DATA naming a folder of images, such as "
                ".tif or .png. Unpack archives, correct DATA, or set it to 'demo'."
            )
    return roots[0] if roots else None


def list_left_out(root: Path, folders: Iterable[Path], used: set[Path]) -> dict[str, list[Path]]:
    """List the files that are or lie below `folders`, paths in `root`, and not used, by reason."""
    left_out = defaultdict(list)
    for path in sorted({p for folder in folders for p in (folder, *folder.rglob("*.*"))} - used):
        suffix, is_hidden = path.suffix.lower(), "/." in f"/{path.relative_to(root).as_posix()}"
        reason = "images without ground truth, not listed or not readable"
        if suffix not in IMAGE_SUFFIXES:
            reason = "files of another kind"
        elif OUTPUT_END.search(path.stem):
            reason = "files of labels, outputs of Cellpose or StarDist"
        if path.is_file() and not is_hidden and suffix not in TEXT_SUFFIXES:
            left_out[reason].append(path)
    return dict(left_out)


# %%
# @title Read tables and lists of images; open a CSV dataset
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
        issue = f"columns {list(table)}; expected {sorted(columns)}"
        require(columns <= set(table), f"{issue}. Rename the file if it is another table.")
        full = isinstance(table.index, pd.RangeIndex) and not table.isna().any(axis=None)
        require(full and len(table), "no rows, or some without a value for each column.")
        return table


def normal_name(name: str) -> str:
    """A name without its folder, whatever writes it: no %20, accents as one letter, lower case."""
    return normalize("NFC", unquote(name)).replace("\\", "/").split("/")[-1].casefold()


def match_images(folders: Sequence[Path], names: Iterable[str], source: Path) -> dict[str, Path]:
    """Find the images below `folders` that `source` lists, with suffix or without. Raises BadInput.

    A name is that of the first folder with such a path, else of the one image with `normal_name`.
    """
    by_name, matches, changed = defaultdict(set), {}, []
    for path in (path for folder in folders for path in folder.rglob("*.*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            by_name[normal_name(path.name)].add(path)
            by_name[normal_name(path.stem)].add(path)
    for name in dict.fromkeys(names):
        paths = by_name[normal_name(name)]
        places = [folder / name for folder in (*folders, folders[0].parent)]
        exact = [[p for p in paths if place in (p, p.with_suffix(""))] for place in places]
        matches[name] = next(filter(None, exact), paths)
        changed += [] if any(exact) else [name]
    wrong = [name for name, paths in matches.items() if len(paths) != 1]
    issue = f"{source}: {wrong[:3]}, {len(wrong)} of {len(matches)} names: not there, or several"
    require(not wrong, f"{issue} files in {folders[0]}. Add the image or correct the name.")
    found = {name: path for name, (path,) in matches.items()}
    for name in changed[:1]:
        print(f"{source}: {len(changed)} names differ on disk: {name!r} is {found[name]}")
    return found


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
    paths = match_images([folder], table["file_name"], path)
    rows = zip(table["file_name"], numbers.astype(int).to_numpy().tolist(), strict=True)
    return content, [ImageRecord(paths[name], *row) for name, row in rows]


def read_listed(record: ImageRecord, source: Path, channels: Sequence[int]) -> np.ndarray:
    """Read a listed image, (3, H, W) uint8. Raises BadInput, also for another size."""
    image, stated = read_image(record.path, channels), (record.height, record.width)
    issue = f"{source}: {record.path}: {image.shape[1:]} (H, W), but stated as {stated}."
    require(stated in (image.shape[1:], (0, 0)), issue)
    return image


def read_groups(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Read `groups.csv`, columns name and group (patient, slide), if any. Raises BadInput."""
    path, by_nfc = root / "groups.csv", {normalize("NFC", n): n for n in names}
    table = read_table(path, {"name", "group"}) if path.is_file() else dict(name=[], group=[])
    listed = [by_nfc.get(normalize("NFC", n), n) for n in table["name"]]  # macOS: another form
    rows = [(n, g) for n, g in zip(listed, table["group"], strict=True) if g]
    groups, known = dict(rows), set(names)
    wrong = [(name, g) for name, g in rows if groups[name] != g or name not in known]
    expected = f"expected images such as {names[:1]}, each in one group"
    require(not wrong, f"{path}: {wrong[:3]}; {expected}.")
    return groups


def number_classes(table: pd.DataFrame) -> dict[int, str]:
    """Number the kinds of a table of annotations that have a shape; its labels, 0 for others."""
    kinds = sorted({*table["kind"][table["shape"] != ""]}) or ["cell"]
    table["label"] = pd.Index(kinds).get_indexer(table["kind"]) + 1
    return dict(enumerate(kinds, start=1))


def rows_by_path(source: Path, table: pd.DataFrame) -> dict[Path, list]:
    """Rows (label, shape, number, reason) by image; BadInput where over a third cannot be used."""
    has_shape = table["shape"].astype(bool)
    meant = table["reason"].str.startswith(("annotations around", "regions"))  # to be left out
    lost = table["reason"][~has_shape & ~meant & (table["reason"] != "")].value_counts()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    issue = f"{source}: {lost.sum():,} of {len(table):,} annotations cannot be used: {reasons}."
    expected = "Expected polygons or RLEs in pixels of the images: export them so."
    require(3 * lost.sum() <= len(table), f"{issue} {expected}")
    keys = table[["path", "label"]].assign(shape=table["shape"].astype(str))
    table.loc[keys.duplicated() & has_shape, ["shape", "reason"]] = "", "annotated twice"
    rows = defaultdict(list)
    for path, *row in table[["path", "label", "shape", "number", "reason"]].itertuples(index=False):
        rows[path].append(row)
    return rows


def open_csv(root: Path, train: Path, val: Path | None) -> tuple:
    """Open `train.csv`, a row per instance. Raises BadInput.

    Returns its path; `ImageRecord` by path; a table of annotations: path, label (-k for a crowd),
    shape (see `shape_pixels`), number, reason it is left out; categories; groups, validation paths.
    """
    path, texts = root / "train.csv", ("height", "width", "cell_type")
    table = read_table(path, {"id", "annotation"})
    table = table.assign(**{key: "" for key in (*texts, "sample_id") if key not in table})
    paths = match_images([train, val] if val else [train], table["id"], path)
    empty = table["annotation"].str.strip().isin(["", "-1"])  # -1: as in submissions
    unnamed = table["cell_type"] == ""
    table = table.assign(number=table.index + 2, reason="", path=table["id"].map(paths))
    table["shape"] = table["annotation"].mask(empty, "")
    table["kind"] = table["cell_type"].mask(unnamed, "cell")
    sizes = table[["height", "width"]].apply(whole).assign(path=table["path"])
    sizes = sizes.dropna().drop_duplicates()
    with name_file(path):
        require_rows(sizes, ~sizes["path"].duplicated(keep=False), "one size for each image")
        valid = ~unnamed | empty | unnamed[~empty].all()
        require_rows(table[["id", *texts]], valid, "a cell_type in each row or in none")
    sizes = {image: (int(height), int(width)) for height, width, image in sizes.to_numpy()}
    records = {im: ImageRecord(im, 0, *sizes.get(im, (0, 0))) for im in paths.values()}
    wells = table[table["sample_id"] != ""]  # of Sartorius
    groups = dict(zip(wells["path"], wells["sample_id"], strict=True))
    return path, records, table, number_classes(table), groups, set()


# %%
# @title Read annotations: COCO, pairs and folders
OUTSIDE = "without a pixel in the image (coordinates of another size?)"


def encode_outline(segmentation, height: int, width: int) -> tuple[dict | None, str]:
    """An RLE of polygons or a COCO RLE, None without a pixel; why some is left out. ValueError."""
    if segmentation != segmentation or not segmentation:  # NaN: no such key
        return None, "without an outline (boxes only)"
    if isinstance(segmentation, dict):
        counts, size = segmentation["counts"], [height, width]
        same = list(map(float, segmentation["size"])) == size
        require(same, f"RLE of size {segmentation['size']} in an image of {size}.")
        if isinstance(counts, str):  # or bytes that were written with str()
            counts = literal_eval(counts) if counts[:2] in ("b'", 'b"') else counts.encode()
        rle = dict(size=size, counts=counts)
        rle = pycocotools.mask.frPyObjects(rle, *size) if isinstance(counts, list) else rle
        return (rle, "") if len(decode_runs(rle)[0]) else (None, OUTSIDE)
    if isinstance(segmentation[0], dict) and len(segmentation) == 1:  # an RLE in a list
        return encode_outline(segmentation[0], height, width)
    if not any(isinstance(piece, list) and len(piece) != 2 for piece in segmentation):
        segmentation = [segmentation]  # one polygon, as VIA writes it: flat or a list of points
    pieces = [np.asarray(piece, float).ravel() for piece in segmentation]
    polygons = [piece for piece in pieces if len(piece) >= 6]
    valid = all(np.isfinite(polygon).all() and len(polygon) % 2 == 0 for polygon in polygons)
    require(valid, f"polygon {str(segmentation)[:60]}; expected pairs of numbers x, y.")
    reason = "polygons of fewer than 3 points" if len(polygons) < len(pieces) else ""
    if not polygons:
        return None, reason
    points = np.concatenate(polygons)
    if points.max() <= 1 or np.abs(points).max() >= 1e5:  # fractions of the image, or far away
        return None, OUTSIDE
    rle = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))
    return (rle, reason) if pycocotools.mask.area(rle) else (None, OUTSIDE)


def open_coco(root: Path, train: Path, val: Path | None) -> tuple:
    """Open the COCO files of the training and the validation part; results as of `open_csv`."""
    records, validation, rows, kinds, listed = {}, set(), [], [], 0
    source = find_part(root, "train", COCO_FILES)
    for part in ("train", "val"):
        if path := find_part(root, part, COCO_FILES):
            folder = find_part(root, part, COCO_FOLDERS) or train  # one for all parts
            content, images = read_image_list(path, folder)
            paths = {image.image_id: image.path for image in images}
            found = len(records.keys() & {*paths.values()})
            records |= {image.path: image for image in images}
            validation |= {*paths.values()} if part == "val" else set()
            own, categories = content.get("annotations"), content.get("categories")
            own = list(own.values()) if isinstance(own, dict) else own  # by id: LIVECell
            with name_file(path):
                require(not found, f"{found} images of the training part; expected others.")
                valid = isinstance(own, list) and isinstance(categories, list)
                require(valid, "expected lists of images, annotations and categories.")
                ids = whole(pd.Series([row.get("image_id") for row in own], dtype=object))
                rows += [row | dict(path=p) for row, p in zip(own, ids.map(paths), strict=True)]
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
        columns = ["id", "image_id", "category_id", "iscrowd", "path", "segmentation"]
        table = pd.DataFrame(rows, columns=columns).rename(columns={"id": "number"})
        table["kind"], table["crowd"] = whole(table["category_id"]), table["iscrowd"].isin([1, "1"])
        valid = table["path"].notna() & table["kind"].isin(kinds["id"])
        valid &= table["crowd"] | table["iscrowd"].isna() | table["iscrowd"].isin([0, "0"])
        require_rows(table, valid, "annotations of listed images and categories, iscrowd 0 or 1")
        outlines, wrong = [], []
        for row in table.itertuples():
            try:
                outlines.append(encode_outline(row.segmentation, *records[row.path][2:]))
            except Exception as error:  # pycocotools raises many types
                wrong.append(f"annotation {row.number}: {error}")
        require(not wrong, f"{len(wrong)} of {len(table)} annotations: {'; '.join(wrong[:3])}")
    table[["shape", "reason"]] = pd.DataFrame(outlines, table.index, ["shape", "reason"], object)
    areas = table["shape"].map(lambda rle: pycocotools.mask.area(rle) if rle else np.nan)
    small = areas <= 4 * areas.groupby(table["kind"]).transform("median")
    is_rle = table["segmentation"].map(lambda shape: isinstance(shape, dict))
    crowds = table["crowd"].sum()
    for index, rle in table["shape"][table["crowd"] & is_rle & small].items():
        sizes = np.bincount(ndimage.label(crop_mask(rle)[0])[0].flat)[1:]
        table.loc[index, "crowd"] = sizes.max() <= 0.97 * sizes.sum()  # more than a cell, specks
    if cells := crowds - table["crowd"].sum():
        print(f"{source}: {cells} crowds of a cell's size (brush masks of CVAT) are cells")
    rles = [rle for rle in table["shape"] if rle]
    sides = np.reshape(pycocotools.mask.toBbox(rles), (-1, 4))[:, 2:]
    boxes = int((areas.dropna() == sides.prod(axis=1)).sum())
    if boxes >= 10 and 2 * boxes > len(rles):
        print(f"WARNING: {source}: {boxes} of {len(rles)} outlines are upright boxes, not cells?")
    groups = kinds["supercategory"][kinds["id"].isin(table["kind"])]
    kinds = kinds[kinds["id"].isin(table["kind"]) | ~kinds["name"].isin(groups)]  # of Roboflow
    again = kinds["name"].duplicated(keep=False)
    names = kinds["name"].where(~again, kinds["name"] + " " + kinds["id"].astype(str))
    categories = dict(zip(kinds["id"].tolist(), names, strict=True))
    labels = pd.Index(kinds["id"]).get_indexer(table["kind"]) + 1
    table["label"] = labels * (1 - 2 * table["crowd"])
    return source, records, table, categories, {}, validation


def open_pairs(root: Path, train: Path, val: Path | None) -> tuple:
    """Open images with a label image, its class that of its folder, or GeoJSON; see `open_csv`."""
    pairs, rows = find_pairs(train) | (find_pairs(val) if val else {}), []
    folders = [im.parent.parent if im.parent.name == "images" else im.parent for im in pairs]
    by_image = len({*folders}) > max(5, 0.9 * len(folders))  # a folder per image, none per class
    for (image, path), folder in zip(pairs.items(), folders, strict=True):
        kind = "cell" if by_image or folder in (train, val) else folder.name
        shapes = read_geojson(path) if path.suffix == ".geojson" else [(kind, path, 1, "")]
        rows += [(image, *row) for row in shapes]
    table = pd.DataFrame(rows, columns=["path", "kind", "shape", "number", "reason"])
    records = {image: ImageRecord(image, 0, 0, 0) for image in pairs}
    return train, records, table, number_classes(table), {}, set()


def open_folders(class_names: Sequence[str], root: Path, train: Path, val: Path | None) -> tuple:
    """Open folders with `image.tif`, `class1.tif` ..; ids may restart in each. See `open_csv`."""
    parts = [train, val] if val and any(val.glob("*/class*.tif")) else [train]
    folders = [path for part in parts for path in sorted(part.glob("[!.]*")) if path.is_dir()]
    expected = f"expected one per training image. For others remove {MAPPING_NAME}."
    require(folders and train in folders[0].parents, f"{train}: no folders; {expected}")
    rows, known = [], {f"class{k}.tif": k for k in range(1, len(class_names) + 1)}
    for folder in folders:
        with name_file(folder):
            names = sorted(path.name for path in folder.iterdir())
            require("image.tif" in names, f"no image.tif, but {', '.join(names[:5]) or 'nothing'}.")
            classes = {name for name in names if re.match(r"(?i)class|[^.].*\.tiff?$", name)}
            unknown = ", ".join(sorted(classes - {"image.tif", *known}))
            expected = f"expected class1.tif .. class{len(known)}.tif: rename it or set class_names"
            require(not unknown, f"{unknown} is no known class; {expected}.")
        image, there = folder / "image.tif", [name for name in known if name in names]
        rows += [(image, known[name], folder / name, 1, "") for name in there]
    table = pd.DataFrame(rows, columns=["path", "label", "shape", "number", "reason"])
    records = {path / "image.tif": ImageRecord(path / "image.tif", 0, 0, 0) for path in folders}
    return train, records, table, dict(enumerate(class_names, start=1)), {}, set()


# %%
# @title Open a dataset of any layout
def check_outlines(image: np.ndarray, parts: Sequence[np.ndarray], is_down: bool | None) -> None:
    """Raise BadInput for many cells in one instance, or where rows and columns are exchanged.

    They are stripes then, with runs as far apart as the image's other side is long; or, in the
    square that both sides share, they fit the brightness better if mirrored at its diagonal.
    image: (3, H, W); parts: row-major offsets; is_down: RLEs go down the columns, None: no RLEs.
    """
    height, width = image.shape[1:]
    if is_down:
        parts = [np.sort(pixels % width * height + pixels // width) for pixels in parts]
        image, height, width = image.transpose(0, 2, 1), width, height
    pixels = np.concatenate(parts)
    steps = np.diff(pixels[np.diff(pixels, prepend=-2) != 1])  # between starts of runs
    near = abs(steps[steps > 0] - height) < min(height, abs(width - height)) / 4
    stripes = is_down is not None and len(steps) >= 20 and 2 * near.sum() > len(near)
    issue = f"cells are stripes, with runs {height} px apart; expected {width} as of the image"
    help_text = "CSV counts row by row, COCO down columns, points are x, y: transpose the masks."
    require(not stripes, f"{issue}. {help_text}")
    inside = np.zeros((height, width), bool)
    inside.flat[pixels] = True
    sizes = np.bincount(ndimage.label(inside, np.ones((3, 3)))[0].flat)[1:]
    pieces = np.count_nonzero(10 * sizes >= sizes.max(initial=0))
    issue = f"{len(parts)} annotations in {pieces} pieces; expected one per cell. Split them."
    require(pieces <= 5 * len(parts) + 5, issue)
    side = min(height, width)
    inside, image = inside[:side, :side], image[:, :side, :side]
    if side >= 32 and len(parts) * inside.sum() >= 10 * len(pixels):  # about 10 cells in it
        grey = image.sum(axis=0, dtype=np.float32)
        grey -= ndimage.uniform_filter(grey, 1 + side // 4)  # light that falls off to one side
        grey = grey.clip(*np.percentile(grey, [5, 95]))  # one bright thing decides nothing
        fit, mirrored = (abs((g[inside] - grey.mean()).sum()) for g in (grey, grey.T))
        limit = grey.std() * inside.sum() * (1 - inside.mean())  # one SD brighter than the rest
        issue = "cells fit the image only if mirrored at its diagonal"
        require(mirrored <= max(3 * fit, limit), f"{issue}. {help_text}")


def read_annotated(source: Path, records: Mapping, config: Config, name: str) -> CellSample:
    """Read an image and its annotations. Raises BadInput.

    records: (path below the dataset, `ImageRecord`, its rows of `rows_by_path`) by name. Without
    `config.overlaps` a pixel that two instances claim belongs to the first.
    """
    file_name, record, rows = records[name]
    image, parts, outlines = read_listed(record, source, config.channels), [], []
    left_out = Counter(reason for *_, reason in rows if reason)
    for label, shape, number, _ in [row for row in rows if row[1]]:
        if isinstance(shape, Path):
            pixels, ids, strays = read_instance_map(shape, image.shape[1:])
            left_out["stray pieces"] += strays
        else:
            with name_file(f"{source}, {name}, annotation {number}"):
                pixels = shape_pixels(shape, *image.shape[1:])
            ids = np.ones(len(pixels), np.int64)
            left_out[OUTSIDE] += not len(pixels)
            outlines += [pixels] if label > 0 else []
        parts.append((pixels, ids, label))
    if outlines:
        with name_file(f"{source}, {name}"):
            check_outlines(image, outlines, {".csv": False, ".json": True}.get(source.suffix))
    parts.sort(key=lambda part: part[2] < 0)  # where pixels are given away, crowds come last
    packed = pack_layers(parts, image.shape[1:], config.overlaps)
    left_out["covered by others"] = sum(len(np.unique(ids)) for _, ids, _ in parts) - len(packed[1])
    return CellSample(torch.from_numpy(image), *packed, file_name, +left_out, record.path)


def list_test_images(root: Path, folder: Path, channels: Sequence[int]) -> tuple[list, dict]:
    """Those of the mapping, COCO or `sample_submission.csv`, else all in `folder`; ids by path."""
    mapping, listing = root / MAPPING_NAME, root / "sample_submission.csv"
    source = mapping if mapping.is_file() else find_part(root, "test", COCO_FILES)
    paths, ids, images, errors = image_files(folder), {}, [], []
    names = {n for p in paths for n in (p.stem, IMAGE_END.sub("", p.stem))}  # outputs are left out
    paths = [p for p in paths if OUTPUT_END.sub("", p.stem) not in names - {p.stem}]
    if not source and listing.is_file():
        table = read_table(listing, set())
        found = match_images([folder], table.get("id", table.iloc[:, 0]), listing)
        ids = {path: name for name, path in found.items()}
    records = [ImageRecord(path, 0, 0, 0) for path in ids or paths]
    records = read_image_list(source, folder)[1] if source else records
    for record in records:
        try:
            size = read_listed(record, source, channels).shape[1:]
            image_id = record.image_id if source else len(images) + 1
            images.append(ImageRecord(record.path, image_id, *size))
        except (BadInput, FileNotFoundError) as error:
            errors.append(str(error))
    issue = f"{len(errors)} of {len(records)} images: {'; '.join(errors[:3])}"
    require(not errors or (images and not source and not ids), issue)
    if errors:
        print(f"WARNING: left out, {issue}")
    return images, ids


def open_dataset(root: Path, config: Config) -> CellDataset:
    """List a dataset's images and what is left out; folders have `config.class_names`. BadInput."""
    layout, is_mapped = find_layout(root), (root / MAPPING_NAME).is_file()
    train = find_part(root, "train", COCO_FOLDERS) if layout == "coco" else root / "train"
    nested = any(train.glob("train/*/image.tif")) and not any(train.glob("*/image.tif"))
    train = train / "train" if nested else train  # as archives named after their folder unpack
    train = root if layout == "pairs" and not find_pairs(train) else train
    val, records = find_part(root, "val", IMAGE_FOLDERS), {}
    source, images, used, own = root, {}, set(), set()
    categories, groups = dict(enumerate(config.class_names, start=1)), {}
    if has_ground_truth(root):
        openers = dict(csv=open_csv, coco=open_coco, pairs=open_pairs)
        opener = openers.get(layout, partial(open_folders, config.class_names))
        source, images, table, categories, groups, own = opener(root, train, val)
        rows = rows_by_path(source, table)
        pairs = (find_pairs(part) for part in (train, val) if part and layout == "pairs")
        used = {label for pair in pairs for label in pair.values()}
        used |= {shape for shape in table["shape"] if isinstance(shape, Path)}
    for path in sorted(images):
        file_name = path.relative_to(train if train in path.parents else root).as_posix()
        end = dict(folders="/image.tif", csv=path.suffix).get(layout, "")
        short = file_name.removesuffix(end)
        records[file_name if short in records else short] = file_name, images[path], rows[path]
    names = {record.path: name for name, (_, record, _) in records.items()}
    places = COCO_FOLDERS if find_part(root, "test", COCO_FILES) else IMAGE_FOLDERS
    test = find_part(root, "test", ("{}/images", *places)) or root / "test"
    test = root if layout == "images" else root / "test_release" if is_mapped else test
    lone = layout == "folders" and not is_mapped and image_files(root / "test_release")
    require(not lone, f"{root}: test_release/ without {MAPPING_NAME}. Add it, or call it test/.")
    test_images, test_ids = list_test_images(root, test, config.channels)
    used |= {*images, *(image.path for image in test_images)}
    unread = {root / "train", train, test, val, root / "images", root / "test_release"}
    if root in unread:  # all that lies in it, but no Drive and no earlier results
        entries = (path for path in root.glob("[!.]*") if path.name not in NO_UPLOADS)
        unread |= {path for path in entries if path.is_file() or not path.is_symlink()}
    left_out = list_left_out(root, unread - {None, root}, used)
    groups = {names[path]: group for path, group in groups.items()} | read_groups(root, [*records])
    validation = [name for path, name in names.items() if path in own or val in path.parents]
    read = partial(read_annotated, source, records, config)
    facts = ([*records], read, categories, test_images, groups, validation, left_out, test_ids)
    return CellDataset(root, layout, *facts)
