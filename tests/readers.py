"""Reads exports with the programs of others: `python -m tests.readers results/exports IMAGES`.

IMAGES is the folder of the images that were predicted. shapely, supervision, ultralytics, napari
and roifile are asked for the cells, pixel by pixel where they give pixels; each has a line, also
where it is not installed: `pip install --target CLIENTS --no-deps shapely supervision ultralytics
opencv-python-headless defusedxml`, `pip install --target NAPARI napari`, and both folders at the
end of PYTHONPATH.
"""

import argparse
from importlib import import_module
import json
from pathlib import Path
import shutil
import sys
import tempfile

import numpy as np
import tifffile


def read_shapely(exports: Path, images: Path, labels: dict[str, np.ndarray]) -> int:
    """Outlines for QuPath are valid geometries of the cells' areas."""
    shape, count = import_module("shapely.geometry").shape, 0
    for path in (exports / "qupath").glob("*.geojson"):
        for feature in json.loads(path.read_text(encoding="utf-8"))["features"]:
            outline, number = shape(feature["geometry"]), int(feature["properties"]["name"])
            if not outline.is_valid or outline.area != (labels[path.stem] == number).sum():
                raise ValueError(f"{path}: cell {number} differs")
            count += 1
    return count


def read_supervision(exports: Path, images: Path, labels: dict[str, np.ndarray]) -> int:
    """Masks of the COCO file are the cells of the label images."""
    dataset = import_module("supervision").DetectionDataset.from_coco(
        str(images), str(exports / "cells.coco.json"), force_masks=True
    )
    count = 0
    for path, _, detections in dataset:
        ids = labels[Path(path).stem]
        for mask in detections.mask if len(detections) else ():
            if not np.array_equal(mask, ids == ids[mask][0]):
                raise ValueError(f"{path}: cell {ids[mask][0]} differs")
            count += 1
    return count


def read_ultralytics(exports: Path, images: Path, labels: dict[str, np.ndarray]) -> int:
    """The converter of ultralytics gives an outline for each cell."""
    convert_coco = import_module("ultralytics.data.converter").convert_coco
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        shutil.copy(exports / "cells.coco.json", source)
        convert_coco(str(source), str(target), use_segments=True, cls91to80=False)
        return sum(len(path.read_text().splitlines()) for path in target.rglob("*.txt"))


def read_napari(exports: Path, images: Path, labels: dict[str, np.ndarray]) -> int:
    """Label images as napari opens them."""
    reader_of, count = import_module("napari_builtins.io").napari_get_reader, 0
    for name in labels:
        path = str(exports / "labels" / f"{name}.tif")
        ((numbers, *_),) = reader_of(path)(path)
        count += int(np.asarray(numbers).max())
    return count


def read_roifile(exports: Path, images: Path, labels: dict[str, np.ndarray]) -> int:
    """ROI sets have an ROI for each cell."""
    roiread = import_module("roifile").roiread
    return sum(len(roiread(path)) for path in (exports / "rois").glob("*.zip"))


READERS = dict(shapely=read_shapely, supervision=read_supervision, ultralytics=read_ultralytics)
READERS |= dict(napari=read_napari, roifile=read_roifile)


def main(arguments: list[str]) -> int:
    """Prints a line for each program; returns how many read other cells than the label images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", type=Path)
    parser.add_argument("images", type=Path)
    options = parser.parse_args(arguments)
    labels = {path.stem: tifffile.imread(path) for path in options.exports.glob("labels/*.tif")}
    total, wrong = sum(int(ids.max()) for ids in labels.values()), 0
    for name, read in READERS.items():
        try:
            count = read(options.exports, options.images, labels)
            wrong += count != total
            print(f"{name}: {count} of {total} cells")
        except ImportError as error:
            print(f"{name}: not installed ({error})")
        except ValueError as error:
            wrong += 1
            print(f"{name}: {error}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
