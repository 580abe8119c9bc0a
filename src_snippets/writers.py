"""Writers: `Instances` -> `test-results.json` and its zip, and the validator of both."""

# %% [markdown]
# ## Is the submission right?
# A COCO results file named `test-results.json`, and a zip with just that file. It is checked before
# it gets its name: a file that lies in the results folder is a valid one.

# %%
from collections.abc import Mapping, Sequence
import csv
import json
import math
from pathlib import Path
import sys
from urllib.parse import quote
import zipfile

import IPython
import numpy as np
import pycocotools.mask
import tifffile

from src_snippets.datasets import ImageRecord
from src_snippets.demo import save_lzw
from src_snippets.evaluate import coco_results
from src_snippets.forms import CellSample, Instances
from src_snippets.fusion import without_overlaps
from src_snippets.places import written_whole
from src_snippets.rle import decode_runs, kaggle_text

# %%
RESULTS_NAME = "test-results.json"


class BadResults(ValueError):
    """A results file breaks a rule; the message names the file, the entry and the rule."""


def check_entry(entry, sizes: Mapping[int, tuple[int, int]], known: Sequence[int]) -> str | None:
    """What is wrong with one entry of a results file, or None.

    Args:
        entry: one JSON object; sizes: H, W by image id; known: ids of the classes.
    """
    wanted = {"image_id", "category_id", "segmentation", "score", "bbox"}
    if not isinstance(entry, dict) or not wanted <= set(entry):
        return f"expected an object with {', '.join(sorted(wanted))}"
    category, score = entry["category_id"], entry["score"]
    size = sizes.get(entry["image_id"]) if type(entry["image_id"]) is int else None
    if size is None:
        return f"image_id {entry['image_id']!r} is not in the mapping"
    if type(category) is not int or category not in known:
        return f"category_id {category!r}; expected one of {', '.join(map(str, known))}"
    if type(score) not in (int, float) or not math.isfinite(score) or not 0 <= score <= 1:
        return f"score {score!r}; expected 0..1"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        return f"bbox {box!r}; expected x, y, width, height"
    x, y, width, height = box
    room = 1e-3  # float32 edges
    fits = x >= -room and y >= -room and width > 0 and height > 0
    if not (fits and x + width <= size[1] + room and y + height <= size[0] + room):
        return f"bbox {box} is empty or leaves the image of {size} (H, W)"
    return check_rle(entry["segmentation"], size)


# %%
def check_rle(rle, size: tuple[int, int]) -> str | None:
    """What is wrong with a run-length encoded mask, or None."""
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
        return "segmentation: expected an object with size and counts as text"
    if rle.get("size") != list(size):
        return f"segmentation size {rle.get('size')}; the mapping says {list(size)}"
    try:
        starts, ends = decode_runs(rle)  # pycocotools would read past the end of a broken one
    except ValueError as error:
        return f"segmentation: {error}"
    area = int((ends - starts).sum())
    if area == 0 or area != int(pycocotools.mask.area(rle)):
        return f"segmentation: {area} pixels, {pycocotools.mask.area(rle)} as pycocotools reads it"
    return None


# %%
def check_results(path: Path, images: Sequence[ImageRecord], known: Sequence[int]) -> list[int]:
    """Reads a results file back and checks every entry.

    Args:
        images: the test images; known: ids of the classes.

    Returns:
        The ids of images without a detection.

    Raises:
        BadResults: the first broken rule.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except ValueError as error:
        raise BadResults(f"{path}: not JSON ({error}).") from error
    if not isinstance(entries, list):
        raise BadResults(f"{path}: expected a list of detections, found {type(entries).__name__}.")
    sizes = {image.image_id: (image.height, image.width) for image in images}
    for number, entry in enumerate(entries):
        if problem := check_entry(entry, sizes, known):
            raise BadResults(f"{path}: entry {number}: {problem}.")
    return sorted(set(sizes) - {entry["image_id"] for entry in entries})


def check_zip(path: Path, results: Path) -> None:
    """Raises BadResults unless a zip holds exactly the results file, under its exact name."""
    with zipfile.ZipFile(path) as archive:
        if archive.namelist() != [RESULTS_NAME]:
            raise BadResults(f"{path}: holds {archive.namelist()}; expected only {RESULTS_NAME}.")
        if archive.read(RESULTS_NAME) != Path(results).read_bytes():
            raise BadResults(f"{path}: its {RESULTS_NAME} differs from {results}.")


def check_complete(answers: Mapping[int, Instances], images: Sequence[ImageRecord]) -> None:
    """Raises BadResults where an image has no answer."""
    if missing := sorted({image.image_id for image in images} - set(answers)):
        raise BadResults(f"No answer for {len(missing)} images, the first with id {missing[0]}.")


# %%
def write_results(
    answers: Mapping[int, Instances],
    images: Sequence[ImageRecord],
    folder: Path,
    known: Sequence[int],
) -> tuple[Path, Path]:
    """Writes `test-results.json` and `test-results.zip`, checked before they get their names.

    Args:
        answers: `Instances` by image id, one for every image, without detections too.
        images: the test images; folder: where the two files go.
        known: the ids that results carry for the classes 1..C, as `CellDataset.categories`.

    Returns:
        The paths of both.

    Raises:
        BadResults: an image has no answer, or an entry breaks a rule; earlier files stay.
    """
    check_complete(answers, images)
    known = list(known)
    results, archive = folder / RESULTS_NAME, folder / "test-results.zip"
    ids = dict(enumerate(known, start=1))
    rows = coco_results(answers)
    for row in rows:
        row["category_id"] = ids.get(row["category_id"], row["category_id"])
    with written_whole(results) as partial:
        partial.write_text(json.dumps(rows, allow_nan=False))
        empty = check_results(partial, images, known)
    with written_whole(archive) as partial:
        member = zipfile.ZipInfo(RESULTS_NAME)  # without the time: equal results, equal files
        member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
        with zipfile.ZipFile(partial, "w") as file:
            file.writestr(member, results.read_bytes())
        check_zip(partial, results)
    count = sum(len(found) for found in answers.values())
    told = f"{count} detections of all scores in {len(images)} images ({len(empty)} without any)"
    print(f"{results}: checked, {told}.")
    return results, archive


# %%
def offer_download(path: Path) -> None:
    """Shows a link to a file, or where it lies; on Colab the browser takes it at once."""
    inside = path.resolve().is_relative_to(Path.cwd())
    if "google.colab" in sys.modules:
        sys.modules["google.colab"].files.download(str(path))
    elif IPython.get_ipython() is not None and inside:
        relative = quote(path.resolve().relative_to(Path.cwd()).as_posix())
        # Without `download` JupyterLab would try to open it.
        link = f'<a href="{relative}" download="{path.name}">download {path.name}</a>'
        IPython.display.display(IPython.display.HTML(link))
    else:
        print(f"yours: {path}")


# %% [markdown]
# Datasets in tables are answered in tables: `submission.csv` with `id` and `predicted`, as
# Sartorius wants it, and `submission-idx.csv` with `idx,id,annotation` and `-1` for an image
# without cells. There no pixel may belong to two cells: the better one has it.


# %%
def write_submissions(
    answers: Mapping[int, Instances],
    images: Sequence[ImageRecord],
    folder: Path,
) -> list[Path]:
    """Writes both forms of a Kaggle submission.

    Args:
        answers: `Instances` by image id, one for every image; images: the test images, whose names
            without suffix are the ids. Tables have no scores, so all in them counts in full: weak
            ones should have been left out.
        folder: where the two files go.

    Returns:
        Their paths.

    Raises:
        BadResults: an image has no answer; earlier files stay.
    """
    check_complete(answers, images)
    plain, indexed = [], []
    for image in images:
        found = without_overlaps(answers[image.image_id])
        texts = [kaggle_text(rle) for rle in found.rles]
        plain += [(image.path.stem, text) for text in texts or [""]]
        indexed += [(image.path.stem, text) for text in texts or ["-1"]]
    tables = {
        "submission.csv": [("id", "predicted"), *plain],
        "submission-idx.csv": [
            ("idx", "id", "annotation"),
            *((i, *r) for i, r in enumerate(indexed)),
        ],
    }
    for name, rows in tables.items():
        with written_whole(folder / name) as partial, partial.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    print(f"{folder / 'submission.csv'}: {len(plain)} rows for {len(images)} images, no overlaps.")
    return [folder / name for name in tables]


# %% [markdown]
# Any dataset can be turned into training folders, and folders into COCO files: see `train_gt.json`
# beside the checkpoints.


# %%
def write_cell_folder(sample: CellSample, folder: Path) -> None:
    """Writes a sample as a training folder: `image.tif`, and `classK.tif` for each class in it.

    Raises:
        ValueError: two cells of one class overlap, or a crowd; these files cannot tell them apart.
    """
    if (sample.labels < 0).any():
        raise ValueError(f"{sample.name}: a crowd; training folders have no place for it.")
    maps = {}
    for layer in sample.layers.numpy():
        classes = np.r_[0, sample.labels.numpy()][layer]
        for label in np.unique(classes[classes > 0]).tolist():
            drawn = maps.setdefault(label, np.zeros(sample.size))
            own = classes == label
            if drawn[own].any():
                raise ValueError(
                    f"{sample.name}: cells of class {label} overlap; one file holds one."
                )
            drawn[own] = layer[own]
    folder.mkdir(parents=True, exist_ok=True)
    save_lzw(np.moveaxis(sample.image.numpy(), 0, 2), folder / "image.tif")
    for label, drawn in maps.items():
        tifffile.imwrite(folder / f"class{label}.tif", drawn)
