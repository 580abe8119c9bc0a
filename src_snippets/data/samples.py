"""The samples of a dataset, read once and checked; their split into training and validation."""

# %% [markdown]
# ### Read the dataset and split it
# Every training image is read once before training, so that a bad file shows in the first minute;
# what fits in memory stays decoded. Images are split, not instances, and images of one group (a
# patient, a slide, or those that look alike) stay on one side. The trap: images of one patient on
# both sides make validation too kind.

# %%
# @title CellSamples: read once; make_splits: groups on one side
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from psutil import virtual_memory
from torch.utils.data import Subset
from tqdm.auto import tqdm

from src_snippets.data.appearance import appearance_features, group_by_appearance, image_borders
from src_snippets.data.layouts import CellDataset, ImageRecord
from src_snippets.data.structures import CellSample
from src_snippets.setup.config import Config
from src_snippets.setup.devices import is_main, world_size
from src_snippets.setup.files import BadInput


def available_memory() -> int:
    """Free bytes of the machine, or of the container that this runs in."""
    free = virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


class CellSamples(Sequence):
    """The training images of a dataset, all read once on construction.

    Args:
        cache_gb: 1e9 bytes of decoded images kept in memory, at most half of what is free; the
            others are read again when needed.

    Attributes:
        names: those of the dataset; counts: (n, C + 1) int64, instances per image and class;
            digest: text that changes with any pixel, id or class.

    Raises:
        BadInput: an image is broken, or there are no instances in any.
    """

    def __init__(self, dataset: CellDataset, cache_gb: float):
        self.dataset, self.names, self.cache = dataset, dataset.names, {}
        self.positions = {name: index for index, name in enumerate(self.names)}
        self.counts = np.zeros((len(self.names), len(dataset.categories) + 1), np.int64)
        self.features, self.borders = [], []  # what `groups` needs, of each image
        left = min(cache_gb * 1e9, available_memory() / 2) / world_size()
        digest, crowds = sha256(), 0
        for index, name in enumerate(tqdm(self.names, "reading", disable=not is_main())):
            sample = dataset.read(name)
            labels, image = sample.labels[sample.labels > 0], sample.image.numpy()
            self.counts[index] = np.bincount(labels, minlength=self.counts.shape[1])
            crowds += len(sample.labels) - len(labels)
            for part in (sample.image, sample.layers, sample.labels):
                digest.update(part.numpy().tobytes())
            self.features.append(appearance_features(image))
            self.borders.append(image_borders(image))
            left -= sample.image.nbytes + sample.layers.nbytes
            if left >= 0:
                self.cache[index] = sample
        self.digest, total = digest.hexdigest(), self.counts.sum()
        if self.names and not total:
            raise BadInput(f"{dataset.root}: no instances in any training image; expected some.")
        print(f"read {len(self)} of {len(self)} images with {total} instances;", end=" ")
        print(f"left out: {crowds} crowds; in memory: {len(self.cache)} images (cache_gb)")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index: int) -> CellSample:
        return self.cache.get(index) or self.dataset.read(self.names[index])

    def groups(self, split_by: str) -> dict[str, str]:
        """Name -> group: those of the dataset, else by appearance if `split_by` says so."""
        if self.dataset.groups or split_by == "image":
            return dict(self.dataset.groups)
        numbers = group_by_appearance(np.array(self.features), self.borders)
        return {name: f"appearance {k}" for name, k in zip(self.names, numbers, strict=True)}


def make_splits(samples: CellSamples, config: Config) -> dict[int, dict[str, list[str]]]:
    """Split images so that groups stay whole and each part has its fraction of images and classes.

    Groups go one by one to the part that is shortest of what they hold; the most even of
    50 random orders counts.

    Returns:
        `{fold: {"train": names, "val": names}}` by `config.seed`, fold 0 where `config.folds` is 1.

    Raises:
        ValueError: fewer groups of images than parts.
    """
    names, groups = sorted(samples.names), samples.groups(config.split_by)
    if config.folds == 1 and (len(names) < 2 or config.val_fraction == 0):
        return {0: {"train": names, "val": []}}
    keys = [f"group {groups[name]}" if name in groups else f"image {name}" for name in names]
    codes, unique = pd.factorize(np.array(keys, object))
    single = [config.val_fraction, 1 - config.val_fraction]
    fractions = np.array(single if config.folds == 1 else [1 / config.folds] * config.folds)
    if len(unique) < len(fractions):
        raise ValueError(
            f"Images of {len(unique)} groups, but {len(fractions)} parts: lower folds (now "
            f"{config.folds}), correct groups.csv, or where there is none, set split_by='image'."
        )
    counts = samples.counts[[samples.positions[name] for name in names]]
    counts[:, 0] = 1  # images are shared out like the instances of a class
    shares = np.zeros((len(unique), counts.shape[1]))
    np.add.at(shares, codes, counts / counts.sum(0).clip(1))
    rng, best, parts = np.random.default_rng(config.seed), np.inf, None
    for _ in range(50):
        chosen, totals = np.zeros(len(unique), int), np.zeros((len(fractions), counts.shape[1]))
        for number, group in enumerate(rng.permutation(len(unique))):
            costs = (2 * totals + shares[group]) @ shares[group] / fractions  # squared distance
            part = number if number < len(fractions) else int(costs.argmin())  # none stays empty
            chosen[group], totals[part] = part, totals[part] + shares[group]
        if (distance := np.abs(totals - fractions[:, None]).sum()) < best:
            best, parts = distance, chosen[codes]
    splits = {}
    for part in range(config.folds):
        fold = part + (config.folds > 1)
        val = [name for name, own in zip(names, parts, strict=True) if own == part]
        if config.fold in (0, fold):
            splits[fold] = {"train": sorted(set(names) - set(val)), "val": val}
    return splits


# %%
# @title Parts of a dataset, and facts about them
def subset(samples: CellSamples, names: Sequence[str]) -> Subset:
    """The samples of some names, in their order."""
    return Subset(samples, [samples.positions[name] for name in names])


def dataset_table(
    samples: CellSamples, splits: Mapping, class_names: Sequence[str]
) -> pd.DataFrame:
    """Facts of each part: images, instances of each class, fewest and most instances per image."""
    rows = {}
    for fold, split in splits.items():
        for part, names in split.items():
            counts = samples.counts[subset(samples, names).indices, 1:]
            totals = counts.sum(1) if names else np.zeros(1, int)
            facts = len(names), *counts.sum(0), totals.min(), totals.max()
            rows[f"fold {fold}, {part}" if fold else part] = facts
    columns = ["images", *class_names, "min per image", "max per image"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def dataset_warnings(samples: CellSamples, config: Config) -> str:
    """What will cost score: classes without an instance, more instances than detections."""
    lines = [
        f"WARNING: no {name}: nothing to learn from. Name the classes that are there: class_names."
        for name, count in zip(config.class_names, samples.counts.sum(0)[1:], strict=True)
        if count == 0
    ]
    limit = config.detections if config.tile else min(config.detections, config.proposals)
    if crowded := int((samples.counts[:, 1:].sum(1) > limit).sum()):
        lines.append(
            f"WARNING: {crowded} images have more instances than can be detected ({limit}): raise "
            f"detections (now {config.detections}) and proposals (now {config.proposals})."
        )
    return "\n".join(lines) or "each class has instances, none has more than can be detected"


def image_stem(name: str) -> str:
    """The name to show for a sample: of its file, or of its folder where files are all `image`."""
    path = Path(name)
    return path.parent.name if path.stem == "image" and path.parent.name else path.stem


def sample_records(samples: Sequence[CellSample]) -> list[ImageRecord]:
    """Samples as images with ids from 1 on, as `coco_ground_truth` numbers them."""
    named = ((Path(f"{image_stem(s.name)}{Path(s.name).suffix}"), s.size) for s in samples)
    return [ImageRecord(path, k, *size) for k, (path, size) in enumerate(named, start=1)]
