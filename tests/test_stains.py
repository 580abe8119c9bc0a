import numpy as np
from skimage.color import hed2rgb
import torch

from src_snippets.config import recipe
from src_snippets.datasets import CellSamples, open_dataset
from src_snippets.stains import (
    as_seen,
    field_borders,
    field_look,
    find_seams,
    jitter_matrix,
    look_alikes,
    normal_matrix,
    NORMAL_STAINS,
    NORMAL_STRENGTHS,
    optical_density,
    restain,
)
from tests.conftest import real_data


def stained(hematoxylin, eosin, vectors=NORMAL_STAINS):
    """(3, H, W) uint8 of two (H, W) amounts of stain with given unit vectors."""
    amounts = torch.stack([torch.as_tensor(a).float() for a in (hematoxylin, eosin)])
    density = torch.tensordot(torch.as_tensor(vectors).float(), amounts, 1)
    return (256 * torch.exp(-density) - 1).round().clamp(0, 255).to(torch.uint8)


def two_amounts(seed=0, side=120):
    """Amounts with pixels of nearly one stain alone, as tissue has them."""
    rng = np.random.default_rng(seed)
    share = rng.random((side, side))
    return share * rng.uniform(0.4, 1.3, share.shape), (1 - share) * rng.uniform(
        0.4, 0.9, share.shape
    )


def test_density_of_known_pixels():
    image = torch.tensor([255, 127, 0], dtype=torch.uint8)[:, None, None]
    assert np.allclose(optical_density(image)[:, 0], [0, np.log(2), np.log(256)])
    assert optical_density(torch.zeros((3, 0, 4), dtype=torch.uint8)).shape == (3, 0)


def test_restain_worked_by_hand():
    image = torch.tensor([127, 63, 255], dtype=torch.uint8)[:, None, None]
    assert restain(image, torch.eye(3)).flatten().tolist() == [127, 63, 255]
    # Twice the density: 1/2 -> 1/4 of the light, 1/4 -> 1/16.
    assert restain(image, 2 * torch.eye(3)).flatten().tolist() == [63, 15, 255]
    swapped = restain(image, torch.eye(3)[[1, 0, 2]])
    assert swapped.flatten().tolist() == [63, 127, 255]
    every = torch.arange(256, dtype=torch.uint8).expand(3, 200, 256)  # several bands
    assert torch.equal(restain(every, torch.eye(3)), every)
    assert restain(every[:, :0], torch.eye(3)).shape == (3, 0, 256)


def test_jitter_scales_one_stain_as_skimage_has_it():
    hed = np.zeros((1, 1, 3))
    hed[..., 0], hed[..., 1] = 0.05, 0.08
    before, wanted = (
        torch.from_numpy(hed2rgb(hed * [k, 1, 1]) * 255).permute(2, 0, 1) for k in (1, 1.5)
    )
    changed = restain(before.round().to(torch.uint8), jitter_matrix(torch.tensor([1.5, 1.0, 1.0])))
    assert (changed - wanted).abs().max() < 2.5  # of 255; the scales of density differ a little
    assert torch.allclose(jitter_matrix(torch.ones(3)), torch.eye(3), atol=1e-5)


def test_normalised_fields_have_the_reference_stains():
    rng = np.random.default_rng(0)
    other = torch.tensor([[0.65, 0.35], [0.70, 0.85], [0.29, 0.39]])
    other = other / other.norm(dim=0)
    amounts = two_amounts()
    image = stained(*(1.4 * a for a in amounts), other)
    normal = restain(image, normal_matrix(image))
    own = normal_matrix(normal)
    assert torch.allclose(own @ NORMAL_STAINS, NORMAL_STAINS, atol=0.05)  # nothing left to change
    density = optical_density(normal)
    strengths = torch.quantile(torch.linalg.pinv(NORMAL_STAINS) @ density, 0.99, dim=1)
    assert torch.allclose(strengths, NORMAL_STRENGTHS, atol=0.1)
    halves = stained(*(1.4 * a for a in two_amounts(1, 900)), other), stained(*two_amounts(2, 900))
    found = [normal_matrix(torch.cat(order, 1)) for order in (halves, halves[::-1])]
    assert torch.allclose(*found, atol=0.05)  # it is all of a large field that counts
    glass = torch.from_numpy(rng.integers(240, 256, (3, 50, 50), dtype=np.uint8))
    assert torch.equal(normal_matrix(glass), torch.eye(3))
    assert torch.equal(as_seen(image, recipe("demo", stain_norm=True)), normal)
    assert as_seen(image, recipe("demo")) is image


def test_looks_are_finite_for_any_field():
    rng = np.random.default_rng(0)
    fields = [
        np.zeros((3, 40, 50), np.uint8),
        np.full((3, 4, 5), 255, np.uint8),
        np.full((3, 1, 1), 7, np.uint8),
        rng.integers(0, 256, (3, 40, 50), dtype=np.uint8),
    ]
    looks = np.array([field_look(field) for field in fields])
    assert looks.shape == (4, 12)
    assert np.isfinite(looks).all()
    assert normal_matrix(torch.from_numpy(fields[2])).isfinite().all()
    assert len(set(look_alikes(looks, [field_borders(f) for f in fields]))) == 4


def test_neighbours_of_one_picture_have_a_seam():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (3, 80, 120), dtype=np.uint8).repeat(2, 1).repeat(2, 2)
    fields = [picture[:, :, :99], picture[:, :, 99:], rng.integers(0, 256, (3, 160, 141), np.uint8)]
    borders = [field_borders(field) for field in fields]
    assert borders[0][0].tolist() == fields[0][:, :, 0].ravel().tolist()
    assert find_seams(borders) == [(0, 1)]
    assert find_seams(borders[2:]) == find_seams([]) == []
    white = [field_borders(np.full((3, 40, 40), 255, np.uint8))] * 2
    assert find_seams(white) == []  # plain borders tell nothing
    plain = [
        np.clip(np.reshape([225, 170, 205], (3, 1, 1)) + rng.normal(0, 5, (3, 60, 60)), 0, 255)
        for _ in range(45)
    ]
    borders = [field_borders(field.astype(np.uint8)) for field in plain]
    assert find_seams(borders) == []  # nor do those of one tint
    thin = [field[:, :9] for field in fields[:2]]
    assert find_seams([field_borders(field) for field in thin]) == []
    borders = [field_borders(field) for field in fields]
    groups = look_alikes(np.zeros((3, 12), np.float32), borders)
    assert groups[0] == groups[1] != groups[2]
    one = [field_borders(np.roll(picture, 99 * k, 2)[:, :, :99]) for k in range(2)] * 30
    assert len(set(look_alikes(np.zeros((60, 12), np.float32), one))) <= 2  # one picture, no crash


def test_groups_by_look():
    rng = np.random.default_rng(0)
    slides = np.repeat(np.arange(5), 10)
    looks = rng.normal(0, 0.1, (50, 12)) + rng.normal(0, 3, (5, 12))[slides]
    borders = [field_borders(rng.integers(0, 256, (3, 8, 8), np.uint8)) for _ in looks]
    groups = look_alikes(looks, borders, size=10)
    assert len(set(groups)) == 5
    assert len(set(zip(slides.tolist(), groups.tolist(), strict=True))) == 5
    alone = look_alikes(looks[:30], borders[:30], size=10)  # too few to tell groups apart
    assert len(set(alone)) == 30


def test_neighbours_in_real_fields_look_alike():
    samples = CellSamples(open_dataset(real_data("consep"), recipe("demo")), 0.0)
    seams = find_seams(samples.borders)
    assert len(seams) == 61
    groups = samples.groups("look")
    names = samples.names
    assert all(groups[names[a]] == groups[names[b]] for a, b in seams)
    rng = np.random.default_rng(0)
    lengths = range(27, 27 + 3 * len(names), 3)  # none fits another: no seams
    hidden = [(rng.integers(0, 256, length, np.uint8),) * 4 for length in lengths]
    alone = look_alikes(np.stack(samples.looks), hidden)
    together = np.mean([alone[a] == alone[b] for a, b in seams])
    chance = ((np.bincount(alone) / len(alone)) ** 2).sum()
    print(f"{together:.0%} of neighbours in one group by look alone; by chance {chance:.0%}")
    assert together > 0.6 > 0.2 > chance
