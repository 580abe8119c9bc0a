"""Stains: optical density, their normalisation and jitter; fields that look alike."""

# %% [markdown]
# ## Which stain, which slide?
# Light that passes a stain fades exponentially, so in optical density, minus the logarithm of a
# pixel, hematoxylin and eosin add up: to mix them anew is one product with a 3 x 3 matrix. The
# same statistics tell which fields look alike, as those of one slide or patient do.

# %%
from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.color import hed_from_rgb
import torch
from torch import Tensor

from src_snippets.config import Config

# %%
LEAST_DENSITY = 0.15  # paler pixels are glass. Source: Macenko et al. 2009
DENSITIES = -torch.log((torch.arange(256) + 1) / 256)  # of the values of a pixel; 0 for white


def optical_density(image: Tensor) -> Tensor:
    """(3, P) float32, 0 to 5.5, of the pixels of an image (3, H, W) uint8, row by row."""
    return DENSITIES[image.flatten(1).int()]


def restain(image: Tensor, matrix: Tensor) -> Tensor:
    """Multiplies the optical density of an image by a matrix, in bands of bounded size.

    Args:
        image: (3, H, W) uint8.
        matrix: (3, 3) float32, old densities of R, G, B to new ones.

    Returns:
        (3, H, W) uint8.
    """
    pixels = image.flatten(1)
    changed = torch.empty_like(pixels)
    for band, new in zip(pixels.split(2**15, 1), changed.split(2**15, 1), strict=True):
        density = matrix @ DENSITIES[band.int()]
        new.copy_((256 * torch.exp(-density) - 1).round_().clamp_(0, 255))
    return changed.view(image.shape)


# %%
def jitter_matrix(factors: Tensor) -> Tensor:
    """(3, 3) that multiplies hematoxylin, eosin and the rest each by one of three factors.

    Source: the stain vectors of skimage's `rgb2hed` (Ruifrok and Johnston 2001).
    """
    to_stains = torch.from_numpy(hed_from_rgb).float().T  # of densities in columns
    return torch.linalg.inv(to_stains) @ (factors[:, None] * to_stains)


# What stains are normalised to: unit vectors of hematoxylin and eosin as columns, and the 99th
# percentile of each. Source: the medians of what is found in the 189 fields of CoNSeP.
NORMAL_STAINS = torch.tensor([[0.581, 0.447], [0.739, 0.819], [0.340, 0.361]])
NORMAL_STRENGTHS = torch.tensor([1.31, 0.92])


def normal_matrix(image: Tensor) -> Tensor:
    """(3, 3) that takes a field's hematoxylin and eosin to those of a reference; see `restain`.

    Its stains are the directions between which nearly all stained pixels lie, in the plane of
    their two principal components. A field with less than 1000 stained pixels stays as it is.

    Source: Macenko et al. 2009, doi:10.1109/ISBI.2009.5193250.
    """
    density = optical_density(image[:, ::2, ::2])
    density = density[:, (density > LEAST_DENSITY).all(0)]
    density = density[:, :: density.shape[1] // 200_000 + 1]  # of the whole field, to save time
    if density.shape[1] < 250:  # of every fourth pixel
        return torch.eye(3)
    _, axes = torch.linalg.eigh(torch.cov(density))
    plane = axes[:, [2, 1]] * axes[:, [2, 1]].sum(0).sign()
    along, across = plane.T @ density
    ends = torch.quantile(torch.atan2(across, along), torch.tensor([0.01, 0.99]))
    stains = plane @ torch.stack([ends.cos(), ends.sin()])
    stains = stains[:, stains[0].argsort(descending=True)]  # hematoxylin takes more of the red
    amounts = torch.linalg.pinv(stains)
    strengths = torch.quantile(amounts @ density, 0.99, dim=1).clamp(min=1e-3)
    return NORMAL_STAINS @ ((NORMAL_STRENGTHS / strengths)[:, None] * amounts)


# %%
def as_seen(image: Tensor, config: Config) -> Tensor:
    """A whole field (3, H, W) uint8 as the model sees it: normalised where `stain_norm` says so."""
    return restain(image, normal_matrix(image)) if config.stain_norm else image


# %%
def field_look(image: np.ndarray) -> np.ndarray:
    """(12,) float32, statistics that fields of one slide share: colour of stain, darkness, grain.

    Args:
        image: (3, H, W) uint8.
    """
    density = optical_density(torch.from_numpy(image)).numpy()
    darkness = density.mean(0)
    stained = density[:, darkness > LEAST_DENSITY]
    stained = stained if stained.shape[1] >= 100 else density
    colors = stained / np.linalg.norm(stained, axis=0).clip(1e-6)
    _, axes = np.linalg.eigh(np.cov(stained, bias=True))
    main = axes[:, 2] * (np.sign(axes[:, 2].sum()) or 1)
    grey = image.mean(0)
    grain = np.log(np.median(np.abs(grey - gaussian_filter(grey, 1))) + 0.05)
    parts = (colors.mean(1), colors.std(1), main, [darkness.mean(), darkness.std(), grain])
    return np.concatenate(parts).astype(np.float32)


def field_borders(image: np.ndarray) -> tuple[np.ndarray, ...]:
    """Left, right, top and bottom line of an image (3, H, W), each (3 * its length,) uint8."""
    lines = image[:, :, 0], image[:, :, -1], image[:, 0], image[:, -1]
    return tuple(line.ravel().copy() for line in lines)


# %%
LEAST_SEAM = 32  # px; shorter borders may be alike by chance


def find_seams(borders: Sequence[tuple[np.ndarray, ...]], least: float = 0.7) -> list[tuple]:
    """Pairs of fields one of which goes on where the other ends: cut from one picture.

    Args:
        borders: `field_borders` of each.
        least: correlation of two borders of one length, without their mean colour. On CoNSeP it
            is over 0.84 for 96 pairs, and below 0.52 for all others.
    """
    seams = []
    for one, other in ((1, 0), (3, 2)):  # right and left, bottom and top
        lengths = {len(lines[one]) for lines in borders}
        for length in (n for n in lengths if n >= 3 * LEAST_SEAM):
            first, second = (
                [i for i, lines in enumerate(borders) if len(lines[side]) == length]
                for side in (one, other)
            )
            unit = []
            for chosen, side in ((first, one), (second, other)):
                lines = np.array([borders[i][side] for i in chosen], np.float32)
                lines = lines.reshape(len(chosen), 3, -1)
                lines = (lines - lines.mean(2, keepdims=True)).reshape(len(chosen), length)
                spread = lines.std(1, keepdims=True).clip(4)  # a plain line tells nothing
                unit.append(lines / spread / np.sqrt(length))
            pairs = np.argwhere(unit[0] @ unit[1].T > least)
            seams += [(first[a], second[b]) for a, b in pairs if first[a] != second[b]]
    return seams


# %%
def look_alikes(looks: np.ndarray, borders: Sequence[tuple], size: int = 8) -> np.ndarray:
    """Groups fields that look alike; those with a seam are always together.

    Args:
        looks: (N, 12), `field_look` of each; borders: `field_borders` of each.
        size: mean number of fields a group.

    Returns:
        (N,) ints from 1 on, the group of each; with fewer than 5 * `size` fields, too few to tell
        groups apart, each without a seam is one of its own.
    """
    seams = np.array(find_seams(borders), int).reshape(-1, 2)
    links = coo_array((np.ones(len(seams)), seams.T), (len(looks),) * 2)
    pictures, picture = connected_components(links, directed=False)
    if len(looks) < 5 * size or pictures == 1:
        return picture + 1
    scaled = (looks - looks.mean(0)) / looks.std(0).clip(1e-6)
    means = [scaled[picture == number].mean(0) for number in range(pictures)]
    count = min(-(-len(looks) // size), pictures)
    return fcluster(linkage(np.array(means), "ward"), count, "maxclust")[picture]
