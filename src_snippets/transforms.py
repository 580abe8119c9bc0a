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
from torchvision.transforms.v2.functional import gaussian_blur, resize

from src_snippets.config import Config
from src_snippets.forms import CellSample, instance_boxes
from src_snippets.stains import jitter_matrix, normal_matrix, restain


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
        holds: row and column of a pixel that the window must hold.
    """

    def __init__(self, room, zoom, turns: bool = False, short_sides=(0,), holds=None):
        super().__init__()
        self.room, self.zoom, self.turns, self.short_sides = room, zoom, turns, short_sides
        self.holds = holds

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
        least, most = [0, 0], [f - w for f, w in zip(field, window, strict=True)]
        if self.holds:
            least = [max(p - w + 1, 0) for p, w in zip(self.holds, window, strict=True)]
            most = [min(p, end) for p, end in zip(self.holds, most, strict=True)]
        corner = [int(torch.randint(a, b + 1, ())) for a, b in zip(least, most, strict=True)]
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
class StainTwist(v2.Transform):
    """Random amounts of hematoxylin and eosin: each times 1 - strength to 1 + strength.

    Args:
        strength: 0..1.
        before: (3, 3) float32, applied to the optical density first; see `normal_matrix`.
    """

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, strength: float, before: Tensor | None = None):
        super().__init__()
        self.strength, self.before = strength, torch.eye(3) if before is None else before

    def make_params(self, flat_inputs):
        if not self.strength:
            return {"matrix": self.before}
        factors = torch.ones(3)
        factors[:2] += (torch.rand(2) * 2 - 1) * self.strength
        return {"matrix": jitter_matrix(factors) @ self.before}

    def transform(self, inpt, params):
        return tv_tensors.wrap(restain(inpt.as_subclass(Tensor), params["matrix"]), like=inpt)


# %%
def augmentation(
    config: Config, room: tuple[int, int] | None = None, holds=None, stains: Tensor | None = None
) -> v2.Compose:
    """The chain applied to (`tv_tensors.Image`, `tv_tensors.Mask`) of each training sample.

    Args:
        room: most rows and columns of the result; by default `config.crop` each.
        holds: row and column of a pixel of the field that the crop must hold.
        stains: (3, 3) float32, what normalises the field's optical density.
    """
    room = room or (config.crop, config.crop)
    steps = [ZoomCrop(room, config.zoom, config.quarter_turns, config.short_sides, holds)]
    if config.stain_jitter or stains is not None:
        steps.append(StainTwist(config.stain_jitter, stains))
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


def filled_crop(samples, index: int, config: Config, holds=None) -> CellSample:
    """A random crop of the field at `index`, with pieces of random other fields where it ends.

    Args:
        samples: a sequence of `CellSample`.
        config: `crop` and the augmentation are read.
        holds: row and column of a pixel of the field that the crop must hold.

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
        field = samples[chosen]
        stains = normal_matrix(field.image) if config.stain_norm else None
        rules = (filling, tuple(room), None) if pieces else (config, tuple(room), holds)
        piece = augment_sample(field, augmentation(*rules, stains))
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
# Rare classes and cells at the border of large fields can be shown more often: by crops that are
# laid around a chosen cell, and by cells of one field laid onto free places of another.


# %%
def drawn_cell(sample: CellSample, label: int | None = None) -> tuple[int, int] | None:
    """Row and column of a pixel in the middle of a random cell, of a class if one is given.

    None where there is none.
    """
    wanted = sample.labels > 0 if label is None else sample.labels == label
    ids = torch.nonzero(wanted).flatten() + 1
    if not len(ids):
        return None
    chosen = ids[int(torch.randint(len(ids), ()))]
    pixels = torch.nonzero(sample.layers == chosen)
    return tuple(pixels[len(pixels) // 2, 1:].tolist()) if len(pixels) else None


def class_members(samples: Sequence[CellSample]) -> dict[int, Tensor]:
    """How many cells of each class that occurs every sample has, (len(samples),) float32."""
    labels = [sample.labels for sample in samples]
    classes = sorted({int(k) for some in labels for k in some.unique() if k > 0})
    return {k: torch.tensor([float((some == k).sum()) for some in labels]) for k in classes}


# %%
MOST_COVERED = 0.2  # of a pasted cell that may lie on cells that are there


def paste_cells(sample: CellSample, donor: CellSample, chances: Tensor) -> CellSample:
    """Lays some cells of a donor over a sample, where few cells are.

    Source: copy-paste, arXiv:2012.07177, with soft edges.

    Args:
        sample, donor: crops; the upper left of both, as far as they go, is used.
        chances: (C + 1,) float32, how likely a cell of each class is taken; 0 is not used.

    Returns:
        The sample with the donor's cells in front, of which it only sees what they leave. Labels
        of the donor follow those of the sample.
    """
    height, width = (min(pair) for pair in zip(sample.size, donor.size, strict=True))
    place = (..., slice(height), slice(width))
    count, front = len(sample.labels), donor.layers[place].long()
    cells = torch.bincount(front.flatten(), minlength=len(donor.labels) + 1)
    taken = (sample.layers[place] > 0).any(0)
    covered = torch.bincount(front[:, taken].flatten(), minlength=len(cells))
    labels = torch.cat([cells[:1] * 0, donor.labels.clamp(min=0)])  # background and crowds: 0
    chosen = (torch.rand(len(cells)) < chances[labels]) & (labels > 0)
    chosen &= covered <= MOST_COVERED * cells
    front = torch.where(chosen[front], front + count, 0)
    shown = (front > 0).any(0)
    image, depth = sample.image.clone(), max(len(front), len(sample.layers))
    soft = gaussian_blur(shown[None].float(), 3) * shown
    mixed = torch.lerp(image[place].float(), donor.image[place].float(), soft)
    image[place] = mixed.round().to(torch.uint8)
    layers = torch.zeros((depth, *sample.size), dtype=torch.int32)
    layers[: len(sample.layers)] = sample.layers
    layers[place][:, shown] = 0
    layers[: len(front)][place] += front.int()
    return CellSample(image, layers, torch.cat([sample.labels, donor.labels]), sample.name)


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


# %%
class TrainingSet(Dataset):
    """Augmented (image, target) pairs of a sequence of `CellSample`s.

    `image`: (3, h, w) uint8, see `filled_crop`; `target`: see `training_target`,
    with `name` added, so that a bad batch can be traced.
    """

    def __init__(self, samples, config: Config):
        self.samples, self.config = samples, config
        self.members = class_members(samples) if config.rare_crops or config.copy_paste else {}
        # Cells are pasted by halves, of a rare class more: by the root of how rare it is.
        counts = torch.zeros(max(self.members, default=0) + 1)
        for label, cells in self.members.items():
            counts[label] = cells.sum()
        common = counts.sum() / max(len(self.members), 1)
        self.chances = (0.5 * (common / counts.clamp(min=1)).sqrt()).clamp(0.1, 1.0)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        sample = self.variant(index)
        target = training_target(sample, self.config.min_area)
        return sample.image, target | {"name": sample.name}

    def variant(self, index: int) -> CellSample:
        """A random variant of a sample, as the model sees it; see `rare_crops` and `copy_paste`."""
        config, sample = self.config, self.crop(index)
        if config.copy_paste and torch.rand(()) < config.copy_paste and self.members:
            donor = self.crop(int(torch.randint(len(self.samples), ())))
            sample = paste_cells(sample, donor, self.chances)
        return sample

    def crop(self, index: int) -> CellSample:
        """A crop of a sample; a share of them is laid around cells: see `rare_crops`."""
        config, label = self.config, None
        drawn = float(torch.rand(())) if config.rare_crops or config.cell_crops else 1.0
        if self.members and drawn < config.rare_crops:
            label = list(self.members)[int(torch.randint(len(self.members), ()))]
            index = int(torch.multinomial(self.members[label], 1))
        around = drawn < config.rare_crops + config.cell_crops
        holds = drawn_cell(self.samples[index], label) if around else None
        return filled_crop(self.samples, index, config, holds)


# %%
def collate(pairs):
    """A batch of pairs as a list of images and a list of targets; sizes may differ."""
    return tuple(map(list, zip(*pairs, strict=True)))
