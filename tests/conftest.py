"""What the tests share: real data where it is there, small drawn samples, a folder for results."""

from functools import partial
import os
from pathlib import Path
import re
import tempfile

import numpy as np
from PIL import Image
import pytest
import tifffile
import torch
from torchvision.ops import clip_boxes_to_image

from src_snippets.data.layouts import open_dataset, open_folders, read_annotated, rows_by_path
from src_snippets.data.rle import decode_runs, encode_runs
from src_snippets.data.samples import CellSamples
from src_snippets.data.structures import CellSample, Instances, pack_layers
from src_snippets.data.synthetic import make_synthetic
from src_snippets.model.detect import detect as detect_image
from src_snippets.setup.config import BadInput, make_config

ROOT = Path(__file__).parent.parent
SHARED_DATA = Path(os.environ.get("HW3_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure(config):
    """The notebook that nbval executes takes the demo and leaves nothing in the repository."""
    folder = tempfile.TemporaryDirectory(prefix="hw3-results-")
    config.add_cleanup(folder.cleanup)
    os.environ.setdefault("HW3_DATA", "demo")
    os.environ.setdefault("HW3_OUT", folder.name)


def real_data(name: str) -> Path:
    """A folder of real data; the test is skipped where it is not there."""
    if not (SHARED_DATA / name).exists():
        pytest.skip(f"{SHARED_DATA / name} is not there; set HW3_TEST_DATA")
    return SHARED_DATA / name


def pack_maps(maps, classes, overlaps=True):
    """`pack_layers` of (H, W) id maps."""
    maps = [np.asarray(m) for m in maps]
    parts = [(np.flatnonzero(m), m[m != 0], k) for m, k in zip(maps, classes, strict=True)]
    return pack_layers(parts, maps[0].shape, overlaps)


def make_sample(maps, classes, seed=0, name="drawn") -> CellSample:
    """A sample of (H, W) id maps with a random image."""
    layers, labels = pack_maps(maps, classes)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *layers.shape[1:]), dtype=torch.uint8, generator=generator)
    return CellSample(image, layers, labels, name)


def empty_sample(height=40, width=50) -> CellSample:
    """A sample without instances."""
    return make_sample([np.zeros((height, width), np.int64)], [1])


def detect(model, images, config) -> list[Instances]:
    """The predictions of a model for some images, each whole and in one view."""
    return [detect_image([model], image, config) for image in images]


def save_rgba(image: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) uint8 as an RGBA TIFF with LZW compression, as the real images are."""
    Image.fromarray(image).convert("RGBA").save(path, compression="tiff_lzw")


def write_folder(folder: Path, maps: dict[int, np.ndarray], size=(12, 16)) -> Path:
    """A training folder as the real ones: RGBA LZW image, float64 class files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    save_rgba(rng.integers(0, 256, (*size, 3), dtype=np.uint8), folder / "image.tif")
    for label, ids in maps.items():
        tifffile.imwrite(folder / f"class{label}.tif", np.asarray(ids, np.float64))
    return folder


def cell_folder_reader(folder: Path, num_classes: int, overlaps=True):
    """A function that reads one training folder; those beside it are opened too, but not read."""
    config = make_config(
        "demo", class_names=[f"class{k + 1}" for k in range(num_classes)], overlaps=overlaps
    )
    source, images, table, *_ = open_folders(
        config.class_names, folder.parent.parent, folder.parent, None
    )
    rows = rows_by_path(source, table)
    names = {path.parent.name: path for path in images}
    records = {name: (f"{name}/image.tif", images[p], rows[p]) for name, p in names.items()}
    return partial(read_annotated, source, records, config, folder.name)


def read_cell_folder(folder: Path, num_classes: int, overlaps=True) -> CellSample:
    """The sample of one training folder."""
    return cell_folder_reader(folder, num_classes, overlaps)()


def jittered(truth: dict, seed=0) -> dict[int, Instances]:
    """Copies of the truth, moved by some pixels, with scores, wrong classes, doubles and misses."""
    rng = np.random.default_rng(seed)
    answers = {}
    for image in truth["images"]:
        height, width = image["height"], image["width"]
        rows = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        rles, labels, boxes = [], [], []
        for row in rows:
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                starts, ends = decode_runs(row["segmentation"])
                shift = int(rng.integers(-3, 4)) + height * int(rng.integers(-3, 4))
                starts, ends = np.clip([starts + shift, ends + shift], 0, height * width)
                runs = starts[ends > starts], ends[ends > starts]
                rles += encode_runs(np.zeros(len(runs[0])), *runs, 1, height, width)
                labels.append(row["category_id"] if rng.random() < 0.9 else rng.integers(1, 5))
                x, y, w, h = row["bbox"]
                boxes.append([x, y, x + w, y + h])
        scores = np.round(rng.random(len(rles)), 2).astype(np.float32)  # with ties
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        labels = np.array(labels, np.int64)
        answers[image["id"]] = Instances(boxes, scores, labels, rles, (height, width))
    return answers


def refused(cause: str, path: Path | str = ""):
    """Expects a BadInput that names the file and the cause."""
    return pytest.raises(BadInput, match=f"{re.escape(str(path))}.*{cause}")


def save(path: Path, pixels, **options) -> Path:
    tifffile.imwrite(path, pixels, **options)
    return path


def field_of_cells(seed=0, size=128):
    """A field with about 40 blobs of 6 to 16 px."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((size, size), np.int64)
    y, x = np.mgrid[:size, :size]
    for number in range(1, 41):
        row, column, radius = rng.integers(0, size), rng.integers(0, size), rng.uniform(3, 8)
        ids[(np.hypot(y - row, x - column) < radius) & (ids == 0)] = number
    return make_sample([ids], [2], seed)


def dense_masks(sample) -> torch.Tensor:
    """(N, H, W) uint8, as stock torchvision wants them."""
    ids = torch.arange(1, len(sample.labels) + 1)[:, None, None, None]
    return (sample.layers[None] == ids).any(1).to(torch.uint8)


def random_boxes(count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.9
    size = 1 + torch.rand(count, 2, generator=generator) ** 3 * torch.tensor([width, height])
    return clip_boxes_to_image(torch.cat([corner, corner + size], 1), (height, width))


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A small synthetic dataset: 8 training and 3 test images."""
    return make_synthetic(tmp_path_factory.mktemp("demo") / "data", train=8, test=3)


@pytest.fixture(scope="session")
def demo_samples(demo_root):
    """Its training images."""
    return CellSamples(open_dataset(demo_root, make_config("demo")), 1.0)


@pytest.fixture(scope="session")
def tiny_config():
    """The smallest model that has all parts."""
    return make_config(
        "demo",
        fpn_channels=16,
        box_features=32,
        mask_convs=1,
        proposals=50,
        roi_batch_size=16,
        crop=64,
        epochs=2,
    )
