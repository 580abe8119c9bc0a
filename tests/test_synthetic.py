import hashlib
import json

import numpy as np
from PIL import Image
import tifffile

from src_snippets.data.layouts import open_dataset
from src_snippets.data.samples import CellSamples
from src_snippets.data.synthetic import (
    draw_field,
    make_synthetic,
    SYNTHETIC_CELLS,
    SYNTHETIC_NAMES,
)
from src_snippets.setup.config import make_config


def test_the_files_are_as_the_real_ones(demo_root):
    folders = sorted((demo_root / "train").iterdir())
    assert len(folders) == 8
    classes = sorted((demo_root / "train").glob("*/class*.tif"))
    assert {path.stem for path in classes} == {f"class{label}" for label in SYNTHETIC_CELLS}
    assert {tifffile.imread(path).dtype for path in classes} == {np.dtype("float64")}
    with tifffile.TiffFile(folders[0] / "image.tif") as tif:
        page = tif.pages[0]
        assert (page.compression.name, page.shape[2], str(page.dtype)) == ("LZW", 4, "uint8")
    assert (np.asarray(Image.open(folders[0] / "image.tif"))[..., 3] == 255).all()
    entries = json.loads((demo_root / "test_image_name_to_ids.json").read_text())
    assert [entry["id"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        with Image.open(demo_root / "test_release" / entry["file_name"]) as image:
            assert image.size == (entry["width"], entry["height"])


def test_cells_are_as_promised(tmp_path):
    config = make_config("demo", class_names=SYNTHETIC_NAMES)
    samples = CellSamples(open_dataset(make_synthetic(tmp_path / "demo"), config), 1.0)
    assert (samples.counts.sum(0)[1:] > 40).all()  # four classes, all common enough to learn
    assert (samples.counts.sum(1) == 0).sum() == 1
    assert max(sample.layers.shape[0] for sample in samples) >= 2  # some cells overlap


def test_same_seed_same_bytes_and_no_second_drawing(tmp_path):
    def digest(root):
        files = sorted(p for p in root.rglob("*") if p.is_file())
        return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()

    one, two = (make_synthetic(tmp_path / name, train=2, test=1) for name in "ab")
    assert digest(one) == digest(two)
    assert digest(make_synthetic(tmp_path / "c", train=2, test=1, seed=8)) != digest(one)
    mapping = one / "test_image_name_to_ids.json"
    before = mapping.stat().st_mtime_ns
    make_synthetic(one, train=2, test=1)
    assert mapping.stat().st_mtime_ns == before
    mapping.unlink()  # as after a stop on the way: all of it is drawn anew
    (one / "train" / "left over").mkdir()
    assert digest(make_synthetic(one, train=2, test=1)) == digest(two)
    assert not (one / "train" / "left over").exists()


def test_an_image_without_cells():
    image, maps = draw_field(np.random.default_rng(0), 40, 50, 0)
    assert (image.shape, image.dtype, maps) == ((40, 50, 3), np.uint8, {})


def test_ids_are_unique_over_classes():
    _, maps = draw_field(np.random.default_rng(0), 160, 160, 20)
    ids = [set(np.unique(m)) - {0.0} for m in maps.values()]
    assert set(maps) <= set(SYNTHETIC_CELLS)
    assert sorted(i for part in ids for i in part) == sorted(set().union(*ids))
    assert len(set().union(*ids)) == 20
