"""The samples of a dataset, read once and checked; their split into training and validation."""

# %%
# @title CellSamples: read, check and cache the training images
from collections.abc import Mapping, Sequence
from hashlib import sha256
import json
from pathlib import Path

import numpy as np
import pandas as pd
from psutil import virtual_memory
from scipy import cluster
import torch
from tqdm.auto import tqdm

from src_snippets.data.appearance import appearance_features, group_by_appearance, image_borders
from src_snippets.data.layouts import CellDataset, OUTSIDE
from src_snippets.data.structures import CellSample
from src_snippets.setup.config import Config, require
from src_snippets.setup.devices import is_main, world_size
from src_snippets.setup.files import show_table


def available_memory() -> int:
    """Free bytes of the machine, or of the container that this runs in."""
    free = virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


class CellSamples(Sequence):
    """The training images of a dataset, all read once; BadInput: a broken one, or no instances.

    cache_gb: 1e9 bytes of decoded images kept in memory, at most half of what is free; others are
    read again. Attributes: names; counts, (n, C + 1) int64, of instances by image and class;
    summary, what was read and left out, by reason; digest, changes with any pixel, id or class.
    """

    def __init__(self, dataset: CellDataset, cache_gb: float):
        self.dataset, self.names, self.cache = dataset, dataset.names, {}
        self.positions = {name: index for index, name in enumerate(self.names)}
        self.counts = np.zeros((len(self.names), len(dataset.categories) + 1), np.int64)
        self.features, self.borders, self.pixels = [], [], []  # for `groups`, of each image
        left = min(cache_gb * 1e9, available_memory() / 2) / world_size()
        digest, lost = sha256(), []
        for index, name in enumerate(tqdm(self.names, "reading", disable=not is_main())):
            sample = dataset.read(name)
            labels, image = sample.labels[sample.labels > 0], sample.image.numpy()
            self.counts[index] = np.bincount(labels, minlength=self.counts.shape[1])
            reasons = {**sample.left_out, "crowd: ignored": len(sample.labels) - len(labels)}
            lost += [("instances", reason, n, name) for reason, n in reasons.items() if n]
            for part in (sample.image, sample.layers, sample.labels):
                digest.update(part.numpy().tobytes())
            self.pixels.append(sha256(image.tobytes()).digest())
            self.features.append(appearance_features(image))
            self.borders.append(image_borders(image))
            size = sample.image.nbytes + sample.layers.nbytes
            if size <= left:
                self.cache[index], left = sample, left - size
        lost += [(k.split()[0], k, 1, str(p)) for k, v in dataset.left_out.items() for p in v]
        self.digest, total = digest.hexdigest(), self.counts.sum()
        lost = [("images", "read", len(self), ""), ("instances", "read", total, ""), *lost]
        columns = ["item", "status", "count", "example"]
        table = pd.DataFrame(lost, columns=columns).groupby(columns[:2], sort=False)
        self.summary = table.agg({"count": "sum", "example": "first"})
        outside = sum(count for _, reason, count, _ in lost if reason == OUTSIDE)
        require(2 * outside <= total, f"{dataset.root}: {outside:,} annotations {OUTSIDE}.")
        issue = f"{dataset.root}: no instances in any training image; expected some."
        require(total or not self.names, f"{issue}\n{self.summary.to_string()}")
        show_table(self.summary)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index: int) -> CellSample:
        return self.cache.get(index) or self.dataset.read(self.names[index])

    def groups(self, split_by: str) -> dict[str, str]:
        """Name -> one name of its group: of equal pixels, of the dataset, else by appearance."""
        known, merged = self.dataset.groups, cluster.hierarchy.DisjointSet(self.names)
        # Roboflow makes several of one source
        sources = [Path(n).name.split(".rf.")[0] if ".rf." in n else (n,) for n in self.names]
        columns = [self.pixels, sources, [known.get(name, (name,)) for name in self.names]]
        if split_by == "appearance" and not known:
            columns.append(group_by_appearance(np.array(self.features), self.borders))
        for column in columns:
            first = {}
            for name, key in zip(self.names, column, strict=True):
                merged.merge(name, first.setdefault(key, name))
        return {name: merged[name] for name in self.names}


# %%
# @title make_splits: groups stay together; table of the parts
def make_splits(samples: CellSamples, config: Config) -> dict[int, dict[str, list[str]]]:
    """Split images so that groups stay whole and each part has its fraction of images and classes.

    Groups go one by one to the part that is shortest of what they hold. Of 50 orders the best
    counts: fewest classes without a group to train on, fewest empty validation parts, most even.

    Returns `{fold: {"train": names, "val": names}}` by `config.seed`, fold 0 where `config.folds`
    is 1: then a validation part of the dataset's own is taken. ValueError: fewer groups than parts.
    """
    names, val = sorted(samples.names), sorted(samples.dataset.validation)
    if config.folds == 1 and (val or len(names) < 2 or config.val_fraction == 0):
        val = val if config.val_fraction else []
        return {0: {"train": sorted({*names} - {*val}), "val": val}}
    groups = pd.Series(samples.groups(config.split_by))
    if (count := groups.nunique()) < max(config.folds, 2) and not samples.dataset.groups:
        print(f"WARNING: similar images: {count} groups only; split by image, scores are too good.")
        groups = pd.Series(samples.groups("image"))
    codes, unique = pd.factorize(groups[names])
    single = [config.val_fraction, 1 - config.val_fraction]
    fractions = np.array(single if config.folds == 1 else [1 / config.folds] * config.folds)
    issue = f"Images of {len(unique)} groups (copies are one), but {len(fractions)} parts"
    help_text = f"lower folds ({config.folds}), correct groups.csv, or set folds=1, val_fraction=0."
    require(len(unique) >= len(fractions), f"{issue}: {help_text}")
    counts = samples.counts[[samples.positions[name] for name in names]]
    counts[:, 0] = 1  # images are balanced like one more class
    by_group = pd.DataFrame(counts / counts.sum(0).clip(1)).groupby(codes).sum().to_numpy()
    rng, best, parts = np.random.default_rng(config.seed), (np.inf,), None
    for _ in range(50):
        chosen, totals = np.zeros(len(unique), int), np.zeros((len(fractions), counts.shape[1]))
        for number, group in enumerate(rng.permutation(len(unique))):
            added, empty = by_group[group], ~totals.any(1)
            costs = (2 * totals + added) @ added / fractions  # growth of totals**2 / fractions
            costs[empty] = -1  # none stays empty
            if len(unique) - number > empty.sum():
                takes_all = (totals[: config.folds] + added)[:, added > 0] > 0.999999
                costs[: config.folds] += 1e6 * takes_all.any(1)  # nothing left to train on
            chosen[group] = costs.argmin()
            totals[chosen[group]] += added
        val, distance = totals[: config.folds], np.abs(totals - fractions[:, None]).sum()
        cost = (val > 0.999999).sum(), (~val[:, 1:].any(1)).sum(), distance
        if cost < best:
            best, parts = cost, chosen[codes]
    splits = {}
    for part in range(config.folds):
        fold = part + (config.folds > 1)
        val = [name for name, own in zip(names, parts, strict=True) if own == part]
        if config.fold in (0, fold):
            splits[fold] = {"train": sorted(set(names) - set(val)), "val": val}
    return splits


def subset(samples: CellSamples, names: Sequence[str]) -> torch.utils.data.Subset:
    """The samples of some names, in their order."""
    return torch.utils.data.Subset(samples, [samples.positions[name] for name in names])


def dataset_table(samples: CellSamples, splits: Mapping, names: Sequence[str]) -> pd.DataFrame:
    """Facts of each part: images, instances of each class, fewest and most instances per image."""
    rows = {}
    for fold, split in splits.items():
        for part, images in split.items():
            counts = samples.counts[subset(samples, images).indices, 1:]
            totals = counts.sum(1) if images else np.zeros(1, int)
            facts = len(images), *counts.sum(0), totals.min(), totals.max()
            rows[f"fold {fold}, {part}" if fold else part] = facts
    columns = ["images", *names, "fewest per image", "most per image"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def dataset_warnings(samples: CellSamples, splits: Mapping, config: Config) -> str:
    """What will cost score: what is left out, absent classes, copies, crowded images."""
    lines, own = [], sorted(samples.dataset.validation)
    for of, rows in samples.summary["count"][["images", "instances"]].groupby(level=0):
        if (lost := rows.iloc[1:].sum()) > 0.05 * rows.sum():
            lines.append(f"WARNING: {lost} of {rows.sum()} {of} are left out: see the table above.")
    for part, row in dataset_table(samples, splits, config.class_names).iterrows():
        absent = [k for k, n in zip(config.class_names, row.iloc[1:-2], strict=True) if n == 0]
        if absent and row.iloc[0] and (part.endswith("train") or len(absent) == config.num_classes):
            lines.append(f"WARNING: no {', '.join(absent)} in {part}: correct classes or groups.")
    if own:
        groups = pd.Series(samples.groups("image"))
        alone = all(split["val"] == own for split in splits.values())
        use = "validate, all others train" if alone else "are used like all others"
        lines.append(f"The dataset's own {len(own)} validation images {use}.")
        if alone and (copies := groups.drop(own).isin(groups[own]).sum()):
            lines.append(f"WARNING: {copies} training images are copies of these, or of one group.")
    has_val = any(split["val"] for split in splits.values())
    known = own or samples.dataset.groups or config.split_by == "image"
    if has_val and not known and len(samples) < 40:
        lines.append("WARNING: below 40 images and no groups.csv: slides may be on both sides.")
    earlier, is_ours = Path(config.weights).parent / "split.json", config.weights.endswith(".pt")
    trained_on = json.loads(earlier.read_text())["train"] if is_ours and earlier.is_file() else []
    if count := sum(name in trained_on for split in splits.values() for name in split["val"]):
        lines.append(f"WARNING: {count} validation images trained {config.weights}: biased scores.")
    if not has_val and config.schedule == "plateau":
        lines.append("WARNING: without validation images schedule='plateau' lowers nothing.")
    if empty := int((samples.counts[:, 1:].sum(1) == 0).sum()):
        lines.append(f"Images without instances, learned as background: {empty}")
    limit = config.detections if config.tile else min(config.detections, config.proposals)
    if crowded := int((samples.counts[:, 1:].sum(1) > limit).sum()):
        issue = f"{crowded} images have more than {limit} instances, which cannot all be found"
        lines.append(f"WARNING: {issue}: raise detections and proposals.")
    return "\n".join(lines) or "Every class has training instances; `detections` suffices for all."


def image_stem(name: str | Path) -> str:
    """The name to show for a sample: that of its file, of its folder for `image`."""
    path = Path(str(name).encode(errors="replace").decode())  # disks have names that are no text
    return path.parent.name if path.stem == "image" and path.parent.name else path.stem
