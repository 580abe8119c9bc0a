import hashlib

import numpy as np
from PIL import Image
import tifffile

from src_snippets.config import recipe
from src_snippets.datasets import (
    CellSamples,
    open_dataset,
    read_test_mapping,
    training_folders,
)
from src_snippets.demo import clip_window, DEMO_CELLS, draw_field, make_demo


def test_the_files_are_as_the_real_ones(demo_root):
    folder = training_folders(demo_root)[1]
    with tifffile.TiffFile(folder / "image.tif") as tif:
        page = tif.pages[0]
        assert (page.compression.name, page.shape[2], str(page.dtype)) == ("LZW", 4, "uint8")
    classes = sorted(folder.glob("class*.tif"))
    assert classes
    assert {tifffile.imread(path).dtype for path in classes} == {np.dtype("float64")}
    assert len(read_test_mapping(demo_root)) == 3
    assert np.asarray(Image.open(folder / "image.tif"))[..., 3].min() == 255


def test_cells_are_as_promised(tmp_path):
    samples = CellSamples(open_dataset(make_demo(tmp_path / "demo"), recipe("demo")), 1.0)
    assert (samples.counts.sum(0)[1:] > 40).all()  # four classes, all common enough to learn
    assert (samples.counts.sum(1) == 0).sum() == 1
    assert max(sample.layers.shape[0] for sample in samples) >= 2  # some cells overlap


def test_same_seed_same_bytes_and_no_second_drawing(tmp_path):
    def digest(root):
        files = sorted(p for p in root.rglob("*") if p.is_file())
        return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()

    one, two = (make_demo(tmp_path / name, train=2, test=1) for name in "ab")
    assert digest(one) == digest(two)
    assert digest(make_demo(tmp_path / "c", train=2, test=1, seed=8)) != digest(one)
    before = (one / "test_image_name_to_ids.json").stat().st_mtime_ns
    make_demo(one, train=2, test=1)
    assert (one / "test_image_name_to_ids.json").stat().st_mtime_ns == before


def test_a_field_without_cells():
    image, maps = draw_field(np.random.default_rng(0), 40, 50, 0)
    assert (image.shape, image.dtype, maps) == ((40, 50, 3), np.uint8, {})


def test_ids_are_unique_over_classes():
    _, maps = draw_field(np.random.default_rng(0), 160, 160, 20)
    ids = [set(np.unique(m)) - {0.0} for m in maps.values()]
    assert set(maps) <= set(DEMO_CELLS)
    assert sum(map(len, ids)) == len(set().union(*ids)) > 10


def test_windows_are_clipped():
    inside, window = clip_window(-2, 3, 5, 10, 6)
    assert inside == (slice(0, 3), slice(3, 6))
    assert window == (slice(2, 5), slice(0, 3))
