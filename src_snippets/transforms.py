"""Augmentation and batching of `CellSample`s."""

# %% [markdown]
# ## How do image and truth move together?
# The instance map travels as one `tv_tensors.Mask`: a flip that moves the image moves it too, at
# the price of one mask however many cells there are. Boxes and labels are derived afterwards, so
# they are tight and never drift. Only the training part passes through here.

# %%
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
class QuarterTurn(v2.Transform):
    """Turns image and instance map by 0, 90, 180 or 270 degrees, each as likely."""

    def make_params(self, flat_inputs):
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt, params):
        turned = torch.rot90(inpt, params["turns"], (-2, -1))
        return tv_tensors.wrap(turned.contiguous(), like=inpt)


# %%
class ZoomCrop(v2.Transform):
    """Cuts a random window and resizes it, so that cells are magnified by a random factor.

    Only the window is resized, never the whole field. A field smaller than the window is taken
    whole. Ids are picked at pixel centres, as the image is: no half-pixel shift between the two.

    Args:
        crop: longest side of the result in pixels.
        zoom: least and most magnification, drawn evenly on a log scale.
    """

    def __init__(self, crop: int, zoom: tuple[float, float]):
        super().__init__()
        self.crop, self.zoom = crop, zoom

    def make_params(self, flat_inputs):
        height, width = flat_inputs[0].shape[-2:]
        low, high = map(math.log, self.zoom)
        zoom = math.exp(low + float(torch.rand(())) * (high - low))
        side = max(round(self.crop / zoom), 1)
        window = (min(side, height), min(side, width))
        top = int(torch.randint(height - window[0] + 1, ()))
        left = int(torch.randint(width - window[1] + 1, ()))
        size = tuple(min(max(round(length * zoom), 1), self.crop) for length in window)
        return {"window": (top, left, *window), "size": size}

    def transform(self, inpt, params):
        top, left, height, width = params["window"]
        cut = inpt[..., top : top + height, left : left + width]
        if isinstance(inpt, tv_tensors.Mask):
            rows, columns = map(nearest_index, (height, width), params["size"])
            cut = cut[..., rows[:, None], columns]
        else:
            cut = resize(cut, list(params["size"]), antialias=True)
        return tv_tensors.wrap(cut.contiguous(), like=inpt)


def nearest_index(old: int, new: int) -> Tensor:
    """(new,) int64: the old pixel under the centre of each new one."""
    return ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)


# %%
def augmentation(config: Config) -> v2.Compose:
    """The chain applied to (`tv_tensors.Image`, `tv_tensors.Mask`) of each training sample."""
    steps = [ZoomCrop(config.crop, config.zoom)]
    if config.flips:
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    if config.quarter_turns:
        steps.append(QuarterTurn())
    if strength := config.color_jitter:
        steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    if config.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.5))], p=config.blur))
    return v2.Compose(steps)


def augment_sample(sample: CellSample, chain: v2.Compose) -> CellSample:
    """One random variant of a sample; ids and labels stay, ids that left the crop are just gone."""
    image, layers = chain(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.layers))
    return CellSample(
        image.as_subclass(Tensor), layers.as_subclass(Tensor), sample.labels, sample.name
    )


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
        layers (L, H, W) int32; boxes (N, 4) float32 XYXY pixels, tight; labels (N,) int64 1..C;
        ids (N,) int64, the instance's value in its layer; homes (N,) int64, its layer.
    """
    boxes, areas, homes = instance_boxes(sample.layers, len(sample.labels))
    kept = torch.nonzero(areas >= max(min_area, 1)).flatten()
    return dict(
        layers=sample.layers,
        boxes=boxes[kept],
        labels=sample.labels[kept],
        ids=kept + 1,
        homes=homes[kept],
    )


class TrainingSet(Dataset):
    """Augmented (image, target) pairs of a sequence of `CellSample`s.

    `image`: (3, h, w) uint8 with sides of at most `config.crop`; `target`: see `training_target`,
    with `name` added, so that a bad batch can be traced.
    """

    def __init__(self, samples, config: Config):
        self.samples, self.chain, self.min_area = samples, augmentation(config), config.min_area

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        sample = augment_sample(self.samples[index], self.chain)
        return sample.image, training_target(sample, self.min_area) | {"name": sample.name}


# %%
def collate(pairs):
    """A batch of pairs as a list of images and a list of targets; sizes may differ."""
    return tuple(map(list, zip(*pairs, strict=True)))
