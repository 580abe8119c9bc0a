"""Augment training samples, and derive the targets that the model learns from."""

# %% [markdown]
# ### Augment
# The model never sees a crop twice: each is cut, scaled, flipped and recoloured at random. In: a
# `CellSample`; out: an image (3, h, w) and a dict of boxes, labels and instance map. Image and map
# pass through one chain as `tv_tensors.Image` and `tv_tensors.Mask`, so that they move together.
# Boxes are derived from the map afterwards, so that a transform need not know of them.

# %%
# @title Augmentation (add your own); TrainingSet: mosaics, class crops, copy-paste
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from src_snippets.data.structures import CellSample, instance_boxes
from src_snippets.setup.config import Config

BLUR_PROBABILITY = 0.1


def random_scaled_crop(image, layers, size, scale, contains: int | None = None):
    """Cut a random window and resize it by a random factor: image (3, h, w), layers (L, h, w).

    size: maximum h and w; a smaller image is taken whole; scale: minimum and maximum factor, drawn
    evenly on a log scale; contains: id of an instance whose middle pixel the window must hold.
    """
    sides, limits = torch.tensor(image.shape[-2:]), torch.tensor(size)
    factor = scale[0] * (scale[1] / scale[0]) ** float(torch.rand(()))
    window = torch.minimum(sides, (limits / factor - 1e-6).ceil().long())
    corner = (torch.rand(2) * (sides - window + 1)).long()
    pixels = torch.nonzero(layers == contains)[:, -2:] if contains else ()
    if len(pixels):
        corner = pixels[len(pixels) // 2] - (torch.rand(2) * window).long()
    corner = torch.minimum(corner.clamp(min=0), sides - window)
    size = torch.minimum((window * factor).round().long().clamp(min=3), limits)  # blur needs 3 px
    where = (*corner.tolist(), *window.tolist(), size.tolist())
    cut, nearest = v2.functional.resized_crop, v2.InterpolationMode.NEAREST_EXACT
    layers = tv_tensors.Mask(cut(layers.as_subclass(Tensor), *where, nearest))
    return cut(image, *where, antialias=True), layers


def build_augmentation(config: Config, size=None, contains: int | None = None) -> v2.Compose:
    """Build the chain that each (image, mask) of the training part goes through.

    size: maximum height and width in pixels, `crop` each by default; contains: id of an instance.
    """
    size, strength = size or (config.crop, config.crop), config.color_jitter
    crop = partial(random_scaled_crop, size=size, scale=config.scale_jitter, contains=contains)
    transpose = v2.Lambda(lambda pixels: tv_tensors.wrap(pixels.mT, like=pixels))
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]  # with transpose: quarter turns
    steps = [v2.RandomApply([transpose], p=0.5), crop, *flips] if config.flips else [crop]
    steps += [
        v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength),
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.3, 1.5))], p=BLUR_PROBABILITY),
        # Add your own transforms here: any torchvision v2 transform of (image, mask)
    ]
    return v2.Compose(steps)


MIN_AREA = 4  # px; instances with fewer visible pixels are no targets


def paste_instances(sample: CellSample, donor: CellSample, probabilities: Tensor) -> CellSample:
    """Lay instances of a donor over a sample, where few instances are; labels follow the sample's.

    probabilities: (C + 1,) float32, of each class, [0] is not used. Source: arXiv:2012.07177.
    """
    labels = F.pad(donor.labels.clamp(min=0), (1, 0))  # by id; 0 for background and crowds
    pixels = donor.image, donor.layers.long()
    image, front = (v2.functional.crop_image(p, 0, 0, *sample.size) for p in pixels)
    areas = torch.bincount(front.flatten(), minlength=len(labels))
    hidden = front[:, (sample.layers > 0).any(0)]
    covered = torch.bincount(hidden.flatten(), minlength=len(labels)) > 0.2 * areas  # by others
    chosen = (torch.rand(len(labels)) < probabilities[labels]) & (labels > 0) & ~covered
    front = torch.where(chosen[front], front + len(sample.labels), 0).int()
    visible = (front > 0).any(0)
    image = torch.where(visible, image, sample.image)
    layers = torch.cat([sample.layers * ~visible, front])
    return CellSample(image, layers, torch.cat([sample.labels, donor.labels]), sample.name)


def training_target(sample: CellSample) -> dict[str, Tensor]:
    """Derive what the model learns from; crowds and slivers are left out.

    Returns: layers (L, H, W) as in `CellSample`; boxes (N, 4) float32, XYXY pixels, tight; labels,
    ids (values in the map) and layer_index (the layer of each), (N,) int64.
    """
    boxes, areas, layer_index = instance_boxes(sample.layers, len(sample.labels))
    index = torch.nonzero((areas >= MIN_AREA) & (sample.labels > 0)).flatten()
    target = dict(boxes=boxes[index], labels=sample.labels[index], ids=index + 1)
    return target | dict(layers=sample.layers, layer_index=layer_index[index])


class TrainingSet(torch.utils.data.Dataset):
    """Pairs of image (3, h, w) uint8 and `training_target` with `name`, anew in each epoch.

    samples: a `Subset` of `CellSamples`; class crops and copy-paste need its counts. What is
    drawn depends on seed, `epoch` and index, and so not on the number of workers.
    """

    def __init__(self, samples, config: Config):
        self.samples, self.config = samples, config
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by all workers
        self.counts = torch.zeros(len(samples), config.num_classes + 1)  # by image and class
        if config.class_crops or config.copy_paste:
            self.counts = torch.from_numpy(samples.dataset.counts[samples.indices]).float()
        totals = self.counts.sum(0)  # half of the instances are pasted, of a rare class more
        self.probabilities = (0.5 * (totals[totals > 0].mean() / totals).sqrt()).clamp(0.1, 1.0)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index: int):
        with torch.random.fork_rng([]):
            torch.manual_seed(hash((self.config.seed, int(self.epoch), index)))
            sample = self.augmented(index)
        return sample.image, training_target(sample) | {"name": sample.name}

    def augmented(self, index: int) -> CellSample:
        """A random crop, a fraction `copy_paste` of them with instances of another one."""
        sample = self.crop(index)
        if torch.rand(()) < self.config.copy_paste:
            donor = self.crop(int(torch.randint(len(self), ())))
            sample = paste_instances(sample, donor, self.probabilities)
        return sample

    def crop(self, index: int) -> CellSample:
        """A random crop, some around an instance of a random class, filled up with other images."""
        config, side, contains = self.config, self.config.crop, None
        if torch.rand(()) < config.class_crops and self.counts.any():
            label = int(torch.multinomial((self.counts.sum(0) > 0).float(), 1))
            index = int(torch.multinomial(self.counts[:, label], 1))
            contains = 1 + int(torch.multinomial((self.samples[index].labels == label).float(), 1))
        image = torch.full((3, side, side), 114, dtype=torch.uint8)  # grey where nothing is laid
        layers = torch.zeros((1, side, side), dtype=torch.int32)
        labels, names, spaces = torch.zeros(0).long(), [], [(0, 0, side, side)]
        while spaces:
            top, left, tall, wide = spaces.pop()
            sample, chain = self.samples[index], build_augmentation(config, (tall, wide), contains)
            piece, ids = chain(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.layers))
            h, w = piece.shape[1:]
            area = (..., slice(top, top + h), slice(left, left + w))
            layers = F.pad(layers, (0, 0, 0, 0, 0, max(len(ids) - len(layers), 0)))
            image[area], layers[: len(ids)][area] = piece, ids + len(labels) * (ids > 0)
            labels, names = torch.cat([labels, sample.labels]), [*names, sample.name]
            if config.batch_size == 1:  # crops of a batch need one size; a single one is not filled
                return CellSample(image[area].clone(), layers[area].clone(), labels, sample.name)
            spaces += [(top, left + w, h, wide - w), (top + h, left, tall - h, wide)]
            spaces = [space for space in spaces if min(space[2:]) >= 32]  # px; no strips
            index, contains = int(torch.randint(len(self), ())), None
            low, high = config.scale_jitter
            config = replace(config, scale_jitter=(max(low, min(1.0, high)), high))
        return CellSample(image, layers, labels, "+".join(names))


def collate(batch):
    """Turn (image, target) pairs into all images and all targets; sizes may differ."""
    return tuple(zip(*batch, strict=True))
