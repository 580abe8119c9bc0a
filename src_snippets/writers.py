"""Writers: `Instances` -> `test-results.json` and its zip, and the validator of both."""

# %% [markdown]
# ## Is the submission right?
# A COCO results file named `test-results.json`, and a zip with just that file. It is checked before
# it gets its name: a file that lies in the results folder is a valid one.

# %%
from collections.abc import Mapping, Sequence
import json
import math
from pathlib import Path
import zipfile

import pycocotools.mask

from src_snippets.evaluate import coco_results
from src_snippets.forms import Instances
from src_snippets.places import written_whole
from src_snippets.readers import ImageRecord
from src_snippets.rle import decode_runs

# %%
RESULTS_NAME = "test-results.json"


class BadResults(ValueError):
    """A results file breaks a rule; the message names the file, the entry and the rule."""


def check_entry(entry, sizes: Mapping[int, tuple[int, int]], num_classes: int) -> str | None:
    """What is wrong with one entry of a results file, or None.

    Args:
        entry: one JSON object; sizes: H, W by image id; num_classes: C.
    """
    wanted = {"image_id", "category_id", "segmentation", "score", "bbox"}
    if not isinstance(entry, dict) or not wanted <= set(entry):
        return f"expected an object with {', '.join(sorted(wanted))}"
    category, score = entry["category_id"], entry["score"]
    size = sizes.get(entry["image_id"]) if type(entry["image_id"]) is int else None
    if size is None:
        return f"image_id {entry['image_id']!r} is not in the mapping"
    if type(category) is not int or not 1 <= category <= num_classes:
        return f"category_id {category!r}; expected 1..{num_classes}"
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
def check_results(path: Path, images: Sequence[ImageRecord], num_classes: int) -> list[int]:
    """Reads a results file back and checks every entry.

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
        if problem := check_entry(entry, sizes, num_classes):
            raise BadResults(f"{path}: entry {number}: {problem}.")
    return sorted(set(sizes) - {entry["image_id"] for entry in entries})


def check_zip(path: Path, results: Path) -> None:
    """Raises BadResults unless a zip holds exactly the results file, under its exact name."""
    with zipfile.ZipFile(path) as archive:
        if archive.namelist() != [RESULTS_NAME]:
            raise BadResults(f"{path}: holds {archive.namelist()}; expected only {RESULTS_NAME}.")
        if archive.read(RESULTS_NAME) != Path(results).read_bytes():
            raise BadResults(f"{path}: its {RESULTS_NAME} differs from {results}.")


# %%
def write_results(
    answers: Mapping[int, Instances], images: Sequence[ImageRecord], folder: Path, num_classes: int
) -> tuple[Path, Path]:
    """Writes `test-results.json` and `test-results.zip`, checked before they get their names.

    Args:
        answers: `Instances` by image id, one for every image, without detections too.
        images: the test mapping; folder: where the two files go; num_classes: C.

    Returns:
        The paths of both.

    Raises:
        BadResults: an image has no answer, or an entry breaks a rule; earlier files stay.
    """
    if missing := sorted({image.image_id for image in images} - set(answers)):
        raise BadResults(f"No answer for {len(missing)} images, the first with id {missing[0]}.")
    results, archive = folder / RESULTS_NAME, folder / "test-results.zip"
    with written_whole(results) as partial:
        partial.write_text(json.dumps(coco_results(answers), allow_nan=False))
        empty = check_results(partial, images, num_classes)
    with written_whole(archive) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(results, RESULTS_NAME)
        check_zip(partial, results)
    cells = sum(len(found) for found in answers.values())
    print(f"{results}: checked, {cells} cells in {len(images)} images ({len(empty)} without any).")
    return results, archive
