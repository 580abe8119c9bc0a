"""Submission: predictions -> `test-results.json`, its zip and CSV files; the validator of them."""

# %% [markdown]
# ### Write and check the submission
# Predictions by image id go out as COCO results in `test-results.json`, in a zip with just that
# file, and for CSV datasets as Kaggle's tables. Every COCO entry is checked before a file gets its
# name; a table is written as it is. Category ids are the dataset's own.

# %%
# @title Checked results, CSV submissions, download
from contextlib import suppress
import json
import os
from pathlib import Path
import sys
import zipfile

import IPython
import pandas as pd
import pycocotools.mask

from src_snippets.data.images import name_file
from src_snippets.data.layouts import ImageRecord
from src_snippets.data.rle import decode_runs, rle_to_csv
from src_snippets.data.structures import coco_annotations
from src_snippets.model.detect import visible_instances
from src_snippets.setup.config import require
from src_snippets.setup.files import atomic_write

ENTRY_KEYS = ("image_id", "category_id", "score", "bbox", "segmentation")


def check_entry(entry, sizes: dict[int, tuple], category_ids: list[int]) -> None:
    """Raise ValueError, with what is wrong with an entry of results; sizes: (H, W) by image id."""
    valid = isinstance(entry, dict) and entry.keys() >= set(ENTRY_KEYS)
    require(valid, f"expected an object with {', '.join(ENTRY_KEYS)}")
    image_id, category, score, box, rle = (entry[key] for key in ENTRY_KEYS)
    valid = type(image_id) is int and image_id in sizes
    require(valid, f"image_id {image_id!r}; expected that of a test image")
    valid = type(category) is int and category in category_ids
    require(valid, f"category_id {category!r}; expected one of {category_ids}")
    require(type(score) in (int, float) and 0 <= score <= 1, f"score {score!r}; expected 0..1")
    valid = isinstance(box, list) and [type(v) in (int, float) for v in box] == [True] * 4
    require(valid, f"bbox {box!r}; expected x, y, width, height")
    (x, y, width, height), size, edge = box, list(sizes[image_id]), 1e-3  # px, float32 edges
    inside = min(x, y) >= -edge and x + width <= size[1] + edge and y + height <= size[0] + edge
    valid = inside and min(width, height) > 0
    require(valid, f"bbox {box} is empty or leaves the image of {size} (H, W)")
    valid = isinstance(rle, dict) and type(rle.get("counts")) is str and rle.get("size") == size
    require(valid, f"segmentation {str(rle)[:80]}; expected size {size}, counts as text")
    starts, ends = decode_runs(rle)  # first: pycocotools reads past the end of a broken RLE
    area, other = int((ends - starts).sum()), int(pycocotools.mask.area(rle))
    require(area == other > 0, f"segmentation of {area} pixels, for pycocotools {other}")


def check_results(path: Path, images: list[ImageRecord], category_ids: list[int]) -> int:
    """Check every entry of a results file and return their number; raises BadInput."""
    sizes = {image.image_id: (image.height, image.width) for image in images}
    with name_file(path):
        entries = json.loads(Path(path).read_text())
        require(isinstance(entries, list), f"{type(entries).__name__}; expected a list")
        for number, entry in enumerate(entries):
            with name_file(f"entry {number}"):
                check_entry(entry, sizes, category_ids)
    return len(entries)


def write_results(predictions, images, folder: Path, category_ids) -> tuple[Path, Path]:
    """Write `test-results.json` and `test-results.zip`, equal bytes for equal predictions.

    predictions: `Instances` by id of every image; category_ids: ids of classes 1..C. Raises
    BadInput where an image has no prediction or an entry breaks a rule; earlier files stay.
    """
    missing = sorted({image.image_id for image in images} - set(predictions))
    require(not missing, f"No prediction for {len(missing)} images, such as ids {missing[:3]}.")
    results, archive = folder / "test-results.json", folder / "test-results.zip"
    rows = [{k: row[k] for k in ENTRY_KEYS} for row in coco_annotations(predictions, category_ids)]
    with atomic_write(results) as partial:
        partial.write_text(json.dumps(rows, allow_nan=False))
        check_results(partial, images, category_ids)
    with atomic_write(archive) as partial, zipfile.ZipFile(partial, "w") as file:
        member = zipfile.ZipInfo(results.name)  # without the time of day
        member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
        file.writestr(member, results.read_bytes())
    empty = sum(not len(predictions[image.image_id]) for image in images)
    print(f"{results}: checked, {len(rows)} detections, {empty} of {len(images)} images empty.")
    return results, archive


def write_csv_submissions(predictions, images: list[ImageRecord], folder: Path, ids) -> None:
    """Write `submission.csv` (id, predicted) and `submission-idx.csv` (idx, id, annotation).

    predictions: `Instances` by image id, of which `visible_instances` count, "" or -1 where there
    are none; ids: of `sample_submission.csv` by path, for other images names without suffix.
    """
    rows = []
    for image in images:
        texts = [rle_to_csv(rle) for rle in visible_instances(predictions[image.image_id]).rles]
        rows += [(ids.get(image.path, image.path.stem), text) for text in texts or [""]]
    table = pd.DataFrame(rows, columns=["id", "predicted"])
    with atomic_write(folder / "submission.csv") as partial:
        table.to_csv(partial, index=False)
    table = table.replace("", "-1").rename(columns={"predicted": "annotation"})
    with atomic_write(folder / "submission-idx.csv") as partial:
        table.to_csv(partial, index_label="idx")
    print(f"{folder / 'submission.csv'}: {len(table)} rows for {len(images)} images, no overlaps.")


def offer_download(path: Path) -> None:
    """Download a file on Colab; show a link in Jupyter, the path in a script."""
    if "google.colab" in sys.modules:
        sys.modules["google.colab"].files.download(str(path))
        return
    with suppress(ValueError):  # on Windows, of another drive
        link = IPython.display.FileLink(os.path.relpath(path))
        link.html_link_str = "<a href='%s' download>%s</a>"  # else JupyterLab would open it
        IPython.display.display(link)
