"""Augmentation and batching of `CellSample`s."""

# %% [markdown]
# ## How do image and truth move together?
# The instance map travels as one `tv_tensors.Mask`: a flip that moves the image moves it too, at
# the price of one mask however many cells there are. Boxes and labels are derived afterwards, so
# they are tight and never drift. Only the training part passes through here.

# %%
from collections.abc import Sequence
from dataclasses import replace
import math

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

from src_snippets.config import Config
from src_snippets.forms import CellSample, instance_boxes


# %%
class ZoomCrop(v2.Transform):
    """Cuts a random window, turns it and resizes it: cells are magnified by a random factor.

    Only the window is touched, never the whole field. A field smaller than the window is taken
    whole. Ids are picked at pixel centres, as the image is: no half-pixel shift between the two.

    Args:
        room: most rows and columns of the result in pixels.
        zoom: least and most magnification, drawn evenly on a log scale.
        turns: turn by 0, 90, 180 or 270 degrees, each as likely.
        short_sides: if not 0, the magnification counts from that at which the field's shorter side
            is one of these; each is as likely.
    """

    def __init__(self, room, zoom, turns: bool = False, short_sides: Sequence[int] = (0,)):
        super().__init__()
        self.room, self.zoom, self.turns, self.short_sides = room, zoom, turns, short_sides

    def make_params(self, flat_inputs):
        turns = int(torch.randint(4, ())) if self.turns else 0
        field, room = flat_inputs[0].shape[-2:], self.room[:: -1 if turns % 2 else 1]
        low, high = map(math.log, self.zoom)
        zoom = math.exp(low + float(torch.rand(())) * (high - low))
        if any(self.short_sides):
            drawn = self.short_sides[int(torch.randint(len(self.short_sides), ()))]
            zoom *= magnification(field, 1.0, drawn)
        sides = [math.ceil(most / zoom - 1e-6) for most in room]
        window = [min(side, length) for side, length in zip(sides, field, strict=True)]
        corner = [int(torch.randint(f - w + 1, ())) for f, w in zip(field, window, strict=True)]
        size = [min(max(round(w * zoom), 1), most) for w, most in zip(window, room, strict=True)]
        return {"window": (*corner, *window), "size": size, "turns": turns}

    def transform(self, inpt, params):
        top, left, height, width = params["window"]
        cut = inpt[..., top : top + height, left : left + width]
        if isinstance(inpt, tv_tensors.Mask):
            rows, columns = map(nearest_index, (height, width), params["size"])
            cut = cut[..., rows[:, None], columns]
        else:
            cut = resize(cut, params["size"], antialias=True)
        turned = torch.rot90(cut, params["turns"], (-2, -1))
        return tv_tensors.wrap(turned.contiguous(), like=inpt)


# %%
def magnification(size: Sequence[int], scale: float, short_side: int) -> float:
    """Network pixels per pixel of a whole field of (H, W) `size`.

    It is `scale`, or where `short_side` is not 0, what makes the shorter side that long, and the
    longer one at most twice as long.
    """
    if not short_side:
        return scale
    return min(short_side / min(size), 2 * short_side / max(size))


def nearest_index(old: int, new: int) -> Tensor:
    """(new,) int64: the old pixel under the centre of each new one."""
    return ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)


# %%
class ColorTwist(v2.Transform):
    """Random brightness, contrast, saturation and hue as one product with a 3 x 3 matrix.

    The first three are those of `v2.ColorJitter` without its rounding in between. Hue turns colours
    about the grey axis of RGB; the HSV way takes ten times as long as all of this.

    Args:
        strength: the first three are multiplied by 1 - strength to 1 + strength; hue turns by at
            most a quarter of strength, 1 being the full circle.
    """

    _transformed_types = (tv_tensors.Image,)
    luma = torch.tensor([0.2989, 0.587, 0.114])  # as torchvision's rgb_to_grayscale

    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs):
        draws = (torch.rand(4) * 2 - 1) * self.strength
        bright, contrast, saturation = (1 + draws[:3]).tolist()
        angle = float(draws[3]) / 4 * 2 * math.pi
        axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        turn = torch.eye(3) + math.sin(angle) * axis + (1 - math.cos(angle)) * (axis @ axis)
        fade = saturation * torch.eye(3) + (1 - saturation) * self.luma.expand(3, 3)
        return {"matrix": bright * contrast * turn @ fade, "lift": bright * (1 - contrast)}

    def transform(self, inpt, params):
        pixels = inpt.flatten(1)
        changed, bands = torch.empty_like(pixels), pixels.split(2**15, 1)
        mean = sum(band.float().sum(1) for band in bands) / pixels.shape[1]
        grey = (self.luma @ mean) * params["lift"]  # contrast leaves the mean grey alone
        for band, new in zip(bands, changed.split(2**15, 1), strict=True):
            new.copy_(torch.addmm(grey, params["matrix"], band.float()).round_().clamp_(0, 255))
        return tv_tensors.wrap(changed.view(inpt.shape), like=inpt)


# %%
class Blur(v2.GaussianBlur):
    """`v2.GaussianBlur` that leaves fields alone that are too thin for its mirrored border."""

    def transform(self, inpt, params):
        thin = min(inpt.shape[-2:]) <= max(self.kernel_size) // 2
        return inpt if thin else super().transform(inpt, params)


# %%
def augmentation(config: Config, room: tuple[int, int] | None = None) -> v2.Compose:
    """The chain applied to (`tv_tensors.Image`, `tv_tensors.Mask`) of each training sample.

    Args:
        room: most rows and columns of the result; by default `config.crop` each.
    """
    room = room or (config.crop, config.crop)
    steps = [ZoomCrop(room, config.zoom, config.quarter_turns, config.short_sides)]
    if config.flips:
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if config.color_jitter:
        steps.append(ColorTwist(config.color_jitter))
    if config.blur:
        steps.append(v2.RandomApply([Blur(5, (0.3, 1.5))], p=config.blur))
    return v2.Compose(steps)


def augment_sample(sample: CellSample, chain: v2.Compose) -> CellSample:
    """One random variant of a sample; ids and labels stay, ids that left the crop are just gone."""
    image, layers = chain(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.layers))
    return CellSample(
        image.as_subclass(Tensor), layers.as_subclass(Tensor), sample.labels, sample.name
    )


# %% [markdown]
# Fields differ in size. A field that leaves room in its crop gets pieces of others beside it, so
# crops are of one size and full, but for thin strips: next to nothing is spent on padding.

# %%
LEAST_STRIP = 32  # px; strips that are thinner stay empty
PAD_COLOR = (124, 116, 104)  # the mean of ImageNet: zero to the model


def filled_crop(samples, index: int, config: Config) -> CellSample:
    """A random crop of the field at `index`, with pieces of random other fields where it ends.

    Args:
        samples: a sequence of `CellSample`.
        config: `crop` and the augmentation are read.

    Returns:
        A sample of `crop` x `crop` pixels; without `fill` the first piece alone, which may be
        smaller. Ids of pieces follow each other.
    """
    side, pieces = config.crop, []
    rooms = [(0, 0, side, side)]
    # Pieces that fill are not made smaller than they are, or there would be a hundred of them.
    filling = replace(config, zoom=tuple(max(min(1, config.zoom[1]), z) for z in config.zoom))
    while rooms:
        top, left, *room = rooms.pop()
        chosen = int(torch.randint(len(samples), ())) if pieces else index
        own = augmentation(filling if pieces else config, tuple(room))
        piece = augment_sample(samples[chosen], own)
        if not config.fill:
            return piece
        pieces.append((top, left, piece))
        height, width = piece.size
        free = [(top, left + width, height, room[1] - width)]
        free += [(top + height, left, room[0] - height, room[1])]
        rooms += [place for place in free if min(place[2:]) >= LEAST_STRIP]
    return pieces[0][2] if pieces[0][2].size == (side, side) else join_pieces(pieces, side)


# %%
def join_pieces(pieces: Sequence[tuple[int, int, CellSample]], side: int) -> CellSample:
    """Lays samples, each with its top and left, into one of `side` x `side` pixels."""
    image = torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    depth = max(len(piece.layers) for _, _, piece in pieces)
    layers = torch.zeros((depth, side, side), dtype=torch.int32)
    count = 0
    for top, left, piece in pieces:
        place = (..., slice(top, top + piece.size[0]), slice(left, left + piece.size[1]))
        image[place] = piece.image
        layers[: len(piece.layers)][place] = piece.layers + count * (piece.layers > 0)
        count += len(piece.labels)
    names = "+".join(piece.name for _, _, piece in pieces)
    return CellSample(image, layers, torch.cat([piece.labels for _, _, piece in pieces]), names)


# %% [markdown]
# What the model learns from: per image, `layers` and, for each of the `N` cells left in it,
# `ids` (its value in the map), `homes` (its layer), `boxes` and `labels`.


# %%
def training_target(sample: CellSample, min_area: int) -> dict[str, Tensor]:
    """Derives what the model learns from.

    Args:
        sample: a sample, cropped or whole.
        min_area: instances with fewer visible pixels are left out.

    Returns:
        layers (L, H, W) ints; boxes (N, 4) float32 XYXY pixels, tight; labels (N,) int64 1..C;
        ids (N,) int64, the instance's value in its layer; homes (N,) int64, its layer; crowds
        (K, 4) float32, the boxes of crowds.
    """
    boxes, areas, homes = instance_boxes(sample.layers, len(sample.labels))
    kept = torch.nonzero((areas >= max(min_area, 1)) & (sample.labels > 0)).flatten()
    return dict(
        layers=sample.layers,
        boxes=boxes[kept],
        labels=sample.labels[kept],
        ids=kept + 1,
        homes=homes[kept],
        crowds=boxes[(areas > 0) & (sample.labels < 0)],
    )


class TrainingSet(Dataset):
    """Augmented (image, target) pairs of a sequence of `CellSample`s.

    `image`: (3, h, w) uint8, see `filled_crop`; `target`: see `training_target`,
    with `name` added, so that a bad batch can be traced.
    """

    def __init__(self, samples, config: Config):
        self.samples, self.config = samples, config

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        sample = filled_crop(self.samples, index, self.config)
        return sample.image, training_target(sample, self.config.min_area) | {"name": sample.name}


# %%
def collate(pairs):
    """A batch of pairs as a list of images and a list of targets; sizes may differ."""
    return tuple(map(list, zip(*pairs, strict=True)))
