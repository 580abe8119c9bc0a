"""Damages files at random and reads them: `python -m tests.fuzz --cases 5000`.

Bytes of pictures, tables and JSON are flipped, overwritten, cut out, doubled and cut off; numbers
in text become huge, negative, fractional or words. Each damaged file must be read, or refused with
a `BadInput` that names it: no other error, no more than ten seconds, no more than 3 GB.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
import io
import json
from pathlib import Path
import re
import resource
import signal
import sys
import tempfile

import numpy as np
from PIL import Image
import tifffile

from src_snippets.data.images import read_image, read_instance_map
from src_snippets.data.layouts import open_dataset
from src_snippets.data.synthetic import make_synthetic
from src_snippets.setup.config import BadInput, make_config

SECONDS, GIGABYTES = 10, 3
CONFIG = make_config("demo")


class TooSlow(BaseException):
    """No `Exception`: readers take any of those for a bad file."""


def picture(seed: int = 0) -> np.ndarray:
    """(48, 64, 3) uint8 with some structure."""
    grid = np.add.outer(np.arange(48), np.arange(64))
    noise = np.random.default_rng(seed).integers(0, 40, (48, 64, 3))
    return ((grid[:, :, None] * [1, 2, 3] + noise) % 256).astype(np.uint8)


def as_bytes(write: Callable, *arguments, **options) -> bytes:
    """What a writer writes to a file object."""
    file = io.BytesIO()
    write(file, *arguments, **options)
    return file.getvalue()


def pictures() -> dict[str, tuple[str, bytes, Callable]]:
    """Whole pictures by kind: file name, content and what reads them."""
    rgb, ids = picture(), np.zeros((48, 64))
    ids[5:20, 5:20], ids[30:40, 30:60] = 1, 2
    options = dict(photometric="rgb", compression="lzw")
    rgba = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    image = Image.fromarray(rgb)
    write = tifffile.imwrite
    deep, palette = Image.fromarray(rgb[..., 0].astype(np.uint16) * 200), image.quantize(9)
    first = dict(format="mpo", save_all=True, append_images=[image.resize((32, 24))])
    stack = np.moveaxis(rgb, 2, 0).astype(np.uint16) * 200
    read_channels = partial(read_image, channels=(2, 1))
    preview = dict(format="tiff", save_all=True, append_images=[image.resize((32, 24))])
    return {
        "LZW TIFF": ("a.tif", as_bytes(write, rgba, **options, predictor=True), read_image),
        "JPEG in TIFF": (
            "a.tif",
            as_bytes(write, rgb, photometric="rgb", compression="jpeg", tile=(16, 16)),
            read_image,
        ),
        "16-bit TIFF": ("a.tif", as_bytes(write, rgb.astype(np.uint16) * 200), read_image),
        "class file": ("a.tif", as_bytes(write, ids), read_instance_map),
        "palette TIFF": ("a.tif", as_bytes(palette.save, format="tiff"), read_image),
        "TIFF with preview": ("a.tif", as_bytes(image.save, **preview), read_image),
        "16-bit PNG": ("a.png", as_bytes(deep.save, format="png"), read_image),
        "planes of a TIFF": ("a.tif", as_bytes(write, stack, imagej=True), read_channels),
        "MPO": ("a.jpg", as_bytes(image.save, **first), read_image),
        "PNG": ("a.png", as_bytes(image.save, format="png"), read_image),
        "palette PNG": ("a.png", as_bytes(image.quantize(9).save, format="png"), read_image),
        "JPEG": ("a.jpg", as_bytes(image.save, format="jpeg"), read_image),
    }


def read_all(path: Path) -> None:
    """Opens the dataset that a text file describes, and reads all of it."""
    dataset = open_dataset(path.parent, CONFIG)
    for name in dataset.names:
        dataset.read(name)


def datasets(folder: Path) -> dict[str, Path]:
    """Datasets with ground truth or a list in text: that file."""
    folders = make_synthetic(folder / "folders", train=1, test=2)
    for layout in ("csv", "coco"):
        for part in ("train", "test"):
            (folder / layout / part).mkdir(parents=True)
            for name in "ab":
                Image.fromarray(picture()).save(folder / layout / part / f"{name}.png")
    rows = ["id,annotation,width,height,cell_type", "a,1 5 70 3,64,48,one", "b,,64,48,two"]
    (folder / "csv" / "train.csv").write_text("\n".join(rows))
    (folder / "csv" / "sample_submission.csv").write_text("id,predicted\na,\nb,\n")
    (folder / "csv" / "groups.csv").write_text("name,group\na,x\nb,y\n")
    images = [dict(id=k, file_name=f"{n}.png", height=48, width=64) for k, n in enumerate("ab", 1)]
    own = dict(category_id=1, iscrowd=0)
    polygon = dict(id=1, image_id=1, segmentation=[[1, 1, 9, 1, 9, 9.5, 1, 9]], **own)
    counts = [100, 20, 48 * 64 - 120]
    crowd = dict(id=2, image_id=2, segmentation=dict(size=[48, 64], counts=counts), **own)
    truth = dict(images=images, annotations=[polygon, crowd | dict(iscrowd=1)])
    truth["categories"] = [dict(id=1, name="cell")]
    (folder / "coco" / "train.json").write_text(json.dumps(truth))
    (folder / "coco" / "test.json").write_text(json.dumps(dict(images=images)))
    return {
        "mapping": folders / "test_image_name_to_ids.json",
        "train.csv": folder / "csv" / "train.csv",
        "sample_submission.csv": folder / "csv" / "sample_submission.csv",
        "groups.csv": folder / "csv" / "groups.csv",
        "train.json": folder / "coco" / "train.json",
        "test.json": folder / "coco" / "test.json",
    }


WORDS = (b"-1", b"0", b"1e400", b"99999999999999999999", b"NaN", b"null", b"true", b'"x"', b"[]")
WORDS += (b"{}", b"1.5", b'"../../a"', b"")


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one to four faults."""
    for _ in range(rng.integers(1, 5)):
        data = bytearray(content)
        place = int(rng.integers(0, max(len(data), 1)))
        length = int(rng.choice([1, 2, 4, 16, 200]))
        kind = rng.integers(0, 6)
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[place : place + length] = rng.bytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            del data[place:]
        else:
            numbers = list(re.finditer(rb"-?\d+", content))
            if numbers:
                found = numbers[int(rng.integers(len(numbers)))]
                data[found.start() : found.end()] = WORDS[int(rng.integers(len(WORDS)))]
        content = bytes(data)
    return content


def outcome(read: Callable, path: Path) -> str:
    """`read`, `refused`, or what went wrong."""
    signal.alarm(SECONDS)
    try:
        read(path)
    except BadInput as error:
        return "refused" if str(path.parent) in str(error) else f"names no file: {error}"
    except TooSlow:
        return f"over {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return "read"


def fuzz(cases: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Counts by kind of file and outcome, and what went wrong, with the case's number."""
    kinds = []
    for name, (file, content, read) in pictures().items():
        path = folder / name.replace(" ", "-") / file
        path.parent.mkdir(parents=True)
        kinds.append((name, path, content, read))
    for name, path in datasets(folder).items():
        kinds.append((name, path, path.read_bytes(), read_all))
    counts, wrong = Counter(), []
    for name, path, content, read in kinds:
        path.write_bytes(content)
        assert outcome(read, path) == "read", name
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        name, path, content, read = kinds[case % len(kinds)]
        path.write_bytes(damaged(content, rng))
        found = outcome(read, path)
        path.write_bytes(content)
        counts[name, found if found in ("read", "refused") else "wrong"] += 1
        if found not in ("read", "refused"):
            wrong.append(f"case {case}, {name}: {found}")
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES * 10**9,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = fuzz(options.cases, options.seed, Path(folder))
    for (name, found), count in sorted(counts.items()):
        print(f"{name:<24} {found:<8} {count}")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
