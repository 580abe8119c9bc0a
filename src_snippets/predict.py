"""Prediction: tiles, flips, turns and scales of an image, by one model or several."""

# %% [markdown]
# ## What is in an image?
# A large image is cut into tiles that overlap by half, and shown flipped, turned and magnified if
# the settings say so. Each answer is carried back exactly, boxes and the probabilities inside them,
# before a mask is drawn; then tiles, views and models are joined. Only answers are kept, so memory
# does not grow with the number of images.

# %%
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
import json
import os
from pathlib import Path
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import nn, Tensor
from tqdm.auto import tqdm

from src_snippets.config import Config
from src_snippets.datasets import ImageRecord
from src_snippets.forms import CellSample, Instances
from src_snippets.fusion import fuse, join_tiles, settle
from src_snippets.model import build_model, find_raw, to_instances
from src_snippets.processes import (
    default_device,
    from_first,
    gathered,
    is_first,
    own_turns,
    process_count,
)
from src_snippets.readers import read_image
from src_snippets.stains import as_seen
from src_snippets.transforms import magnification


# %%
class View(NamedTuple):
    """How an image is shown: magnified, turned by quarters to the left, then mirrored."""

    scale: float
    turns: int
    mirrored: bool

    def show(self, image: Tensor) -> Tensor:
        """Turns and mirrors (.., H, W)."""
        turned = torch.rot90(image, self.turns, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned

    def carry_back(self, boxes: Tensor, masks: Tensor, size: tuple[int, int]):
        """Boxes and masks of the shown image of (H, W) `size` as they are in the image itself.

        Args:
            boxes: (R, 4) XYXY pixels; masks: (R, .., M, M), what lies inside them.
        """
        height, width = size
        if self.mirrored:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes, masks = torch.stack([width - x2, y1, width - x1, y2], 1), masks.flip(-1)
        for _ in range(self.turns):
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([height - y2, x1, height - y1, x2], 1)
            height, width = width, height
        return boxes, torch.rot90(masks, -self.turns, (-2, -1))


# %%
SYMMETRIES = {
    "one": ((0, False),),
    "flips": ((0, False), (0, True), (2, True)),  # as it is, left to right, up and down
    "all": tuple(product(range(4), (False, True))),
}


def views_of(config: Config) -> list[View]:
    """The views of an image that `test_views` and `test_scales` ask for."""
    return [
        View(scale, *symmetry)
        for scale in config.test_scales
        for symmetry in SYMMETRIES[config.test_views]
    ]


def seen_once(config: Config) -> Config:
    """The settings for a look in training: whole images, shown once."""
    return replace(config, tile=0, test_views="one", test_scales=(1.0,))


def tile_corners(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly, overlapping by half or more."""
    if not tile or length <= tile:
        return [0]
    count = -(-2 * (length - tile) // tile) + 1
    return np.linspace(0, length - tile, count).round().astype(int).tolist()


# %%
LEAST_TILE = 128  # px; smaller ones cut too many cells


def smaller(config: Config, size: tuple[int, int]) -> Config | None:
    """The settings with half as many tiles a batch, else with half the tile; None at the end."""
    if config.tile and config.tile_batch > 1:
        return replace(config, tile_batch=config.tile_batch // 2)
    tile = min(config.tile or max(size), max(size)) // 2
    return replace(config, tile=tile, tile_batch=1) if tile >= LEAST_TILE else None


def detect_view(model: nn.Module, image: Tensor, view: View, config: Config) -> Instances:
    """`detect_tiles`, with smaller batches and tiles where the GPU's memory does not suffice.

    Raises:
        torch.OutOfMemoryError: it does not even for one tile of `LEAST_TILE` px.
    """
    config = replace(config, **getattr(model, "fitting", {}))
    while True:
        try:
            return detect_tiles(model, image, view, config)
        except torch.OutOfMemoryError:
            config = smaller(config, tuple(image.shape[-2:]))
            if config is None:
                raise
            # A module's attribute: later images begin with what this one needed.
            model.fitting = dict(tile=config.tile, tile_batch=config.tile_batch)
            print(f"GPU memory is full: {config.tile_batch} tiles of {config.tile} px a batch now")
        torch.cuda.empty_cache()  # not in the handler, which still holds what did not fit


# %%
def detect_tiles(model: nn.Module, image: Tensor, view: View, config: Config) -> Instances:
    """Finds the cells of an image (3, H, W) uint8 in one view, tile by tile."""
    size, pieces, cut = tuple(image.shape[-2:]), [], []
    corners = list(product(*(tile_corners(length, config.tile) for length in size)))
    high, wide = (min(length, config.tile or length) for length in size)
    factor = magnification(size, config.scale, config.short_sides[-1]) * view.scale
    for begin in range(0, len(corners), config.tile_batch):
        some = corners[begin : begin + config.tile_batch]
        tiles = [view.show(image[:, y : y + high, x : x + wide]) for y, x in some]
        model.transform.fixed = factor  # a tile is magnified as the image that it is of
        try:
            answers = find_raw(model, tiles, config)
        finally:
            model.transform.fixed = None
        for (y, x), found, tile in zip(some, answers, tiles, strict=True):
            back = view.carry_back(found["boxes"], found["masks"], tuple(tile.shape[-2:]))
            boxes = back[0] + back[0].new_tensor([x, y, x, y])
            piece = to_instances(found | {"boxes": boxes, "masks": back[1]}, size, config)
            edges = piece.boxes - [x, y, x + wide, y + high]  # to the tile's four sides
            inner = [x > 0, y > 0, x + wide < size[1], y + high < size[0]]
            pieces.append(piece)
            cut.append(((np.abs(edges) < 1) & inner).any(1))
    return join_tiles(pieces, cut, config) if len(pieces) > 1 else pieces[0]


# %%
Member = tuple[nn.Module, Config]  # a model and the settings it was made with


def detect_together(members: Sequence[Member], image: Tensor, config: Config) -> Instances:
    """What all models find in all views of one image (3, H, W) uint8, best first."""
    answers = []
    for model, own in members:
        seen = as_seen(image, own)
        answers += [detect_view(model, seen, view, own) for view in views_of(config)]
    return settle(fuse(answers, config) if len(answers) > 1 else answers[0], config)


def answer_samples(
    members: Sequence[Member], samples: Sequence[CellSample], config: Config
) -> list[Instances]:
    """`detect_together` on whole, unaugmented fields, one `Instances` a sample, in their order."""
    bar = tqdm(own_turns(len(samples)), desc="measuring", unit="image", disable=not is_first())
    return gathered([detect_together(members, samples[i].image, config) for i in bar])


def answering_seconds(config: Config, sample: CellSample, pixels: int) -> float:
    """About how long it takes to answer so many pixels, judged by one image and a raw model."""
    model = build_model(config, load_initial=False)
    model = model.to(default_device()).eval()
    spent = []
    for _ in range(2):  # the first is slow for other reasons
        begin = time.perf_counter()
        detect_together([(model, config)], sample.image, config)
        spent.append(time.perf_counter() - begin)
    return spent[-1] * pixels / (sample.size[0] * sample.size[1]) / process_count()


# %%
def to_line(image_id: int, found: Instances) -> str:
    """An answer as a line of JSON."""
    columns = (found.boxes, found.scores, found.labels)
    counts = [rle["counts"] for rle in found.rles]
    return json.dumps([image_id, found.size, *(c.tolist() for c in columns), counts]) + "\n"


def from_line(line: str) -> tuple[int, Instances]:
    """The image id and the answer of a line. Raises ValueError where the line is cut short."""
    image_id, size, boxes, scores, labels, counts = json.loads(line)
    rles = [{"size": list(size), "counts": text} for text in counts]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores, labels = np.array(scores, np.float32), np.array(labels, np.int64)
    return image_id, Instances(boxes, scores, labels, rles, tuple(size))


# %%
def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file."""
    with path.open("a") as file:
        file.write(text)


def read_answers(path: Path) -> dict[int, Instances]:
    """The whole lines of a file of answers; one that was cut short is taken off the file."""
    answers, good = {}, 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    image_id, found = from_line(line.decode())
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                answers[image_id] = found
                good += len(line)
        os.truncate(path, good)
    return answers


# %%
def shared_out(images: Sequence[ImageRecord]) -> list[list[ImageRecord]]:
    """Images by one; for several processes by more of about the same size, so that none waits."""
    count = process_count()
    if count == 1:
        return [[image] for image in images]
    ordered = sorted(images, key=lambda image: image.height * image.width)
    return [ordered[k : k + 8 * count] for k in range(0, len(ordered), 8 * count)]


# %%
def predict_images(
    members: Sequence[Member],
    images: Sequence[ImageRecord],
    config: Config,
    kept: Path | None = None,
) -> dict[int, Instances]:
    """Finds the cells in test images.

    Args:
        members: from `load_trained`, at least one.
        images: the test images of a dataset.
        config: see `detect_view` and `fuse`.
        kept: a file of such answers; those that are in it are not made again.

    Returns:
        `Instances` by image id, one for every image.

    Raises:
        BadInput: an image cannot be read; names it.
    """
    answers = from_first(read_answers, kept) if kept else {}
    if answers:
        print(f"{kept}: {len(answers)} of {len(images)} images are answered, going on from there.")
    left = [image for image in images if image.image_id not in answers]
    options = dict(total=len(images), initial=len(answers), unit="image", disable=not is_first())
    with tqdm(desc="predicting", **options) as bar:
        for some in shared_out(left):
            own = [some[i] for i in own_turns(len(some))]
            pixels = (torch.from_numpy(read_image(image.path)) for image in own)
            found = gathered([detect_together(members, image, config) for image in pixels])
            for image, answer in zip(some, found, strict=True):
                answers[image.image_id] = answer
                if kept and is_first():
                    append_text(kept, to_line(image.image_id, answer))
            bar.update(len(some))
    return {image.image_id: answers[image.image_id] for image in images}
