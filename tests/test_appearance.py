import numpy as np
import pytest

from src_snippets.data.appearance import (
    appearance_features,
    find_seams,
    group_by_appearance,
    image_borders,
)
from src_snippets.data.layouts import open_dataset
from src_snippets.data.samples import CellSamples
from src_snippets.setup.config import make_config
from tests.conftest import real_data


def noise(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def test_features_are_finite_for_any_image():
    images = [
        np.zeros((3, 40, 50), np.uint8),
        np.full((3, 4, 5), 255, np.uint8),
        np.full((3, 1, 1), 7, np.uint8),
        noise(40, 50),
    ]
    features = np.array([appearance_features(image) for image in images])
    assert features.shape == (4, 12)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    groups = group_by_appearance(features, [image_borders(image) for image in images])
    assert sorted(groups) == [1, 2, 3, 4]
    assert group_by_appearance(np.zeros((0, 12)), []).tolist() == []


def test_features_worked_by_hand():
    """128 pixels with half the light in red, beside as many of glass: colour is the stain's."""
    image = np.full((3, 8, 32), 255, np.uint8)
    image[0, :, :16] = 127
    features = appearance_features(image)
    assert features[:6] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-6)
    assert features[9:11] == pytest.approx([np.log(2) / 6, np.log(2) / 6], abs=1e-6)  # darkness
    assert features[11] == pytest.approx(np.log(0.05))


def test_features_of_large_images_take_some_of_the_pixels():
    image = noise(8, 8000)
    assert appearance_features(image).tolist() == appearance_features(image[:, :, ::3]).tolist()


def test_light_that_falls_off_to_the_borders_is_no_seam():
    y, x = np.mgrid[-1:1:96j, -1:1:128j]
    light, rng = 170 * (1 - 0.2 * (x**2 + y**2)), np.random.default_rng(0)
    images = [np.repeat((light + rng.normal(0, 6, light.shape))[None], 3, 0) for _ in range(12)]
    borders = [image_borders(image.clip(0, 255).astype(np.uint8)) for image in images]
    assert find_seams(borders) == []
    assert len(find_seams(borders[:8])) > 50  # too few to know


@pytest.mark.parametrize("turned", [False, True])
def test_neighbours_of_one_picture_have_a_seam(turned):
    """Side by side or one above the other, the only pair of three images."""
    picture = noise(80, 120).repeat(2, 1).repeat(2, 2)
    images = [picture[:, :, :99], picture[:, :, 99:], noise(160, 141, 1)]
    images = [image.transpose(0, 2, 1) if turned else image for image in images]
    borders = [image_borders(image) for image in images]
    assert find_seams(borders) == [(0, 1)]
    assert find_seams(borders[2:]) == find_seams([]) == []
    groups = group_by_appearance(np.zeros((3, 12), np.float32), borders)
    assert groups[0] == groups[1] != groups[2]
    short = [image[:, :31] if not turned else image[:, :, :31] for image in images[:2]]
    assert find_seams([image_borders(image) for image in short]) == []
    long = [image[:, :32] if not turned else image[:, :, :32] for image in images[:2]]
    assert find_seams([image_borders(image) for image in long]) == [(0, 1)]


def test_plain_borders_make_no_seam():
    white = [image_borders(np.full((3, 40, 40), 255, np.uint8))] * 2
    assert find_seams(white) == []
    rng, shade = np.random.default_rng(0), np.full((3, 60, 60), 200, np.uint8)
    shade[:, ::2] += 2  # equal everywhere, but hardly there
    assert find_seams([image_borders(shade)] * 2) == []
    tint = np.reshape([225, 170, 205], (3, 1, 1))
    plain = [np.clip(tint + rng.normal(0, 5, (3, 60, 60)), 0, 255) for _ in range(45)]
    assert find_seams([image_borders(image.astype(np.uint8)) for image in plain]) == []


def test_black_corners_of_turned_images_make_no_seam():
    """Right and left border end in the same black corner; beside it they have nothing in common."""
    one, other = noise(100, 40), noise(100, 40, 1)
    for image in (one, other):
        image[:, :30] = np.arange(9)[:, None].repeat(4, 0)[:30]  # as JPEG leaves it
        image[:, 30:] //= 2
        image[:, 30:] += 100
    assert find_seams([image_borders(one), image_borders(other)]) == []
    beside = np.concatenate([one, other], 2).repeat(2, 2)
    halves = [image_borders(beside[:, :, :79]), image_borders(beside[:, :, 79:])]
    assert find_seams(halves) == [(0, 1)]  # the rest is enough where it goes on
    black = [image_borders(np.zeros((3, 100, 40), np.uint8))] * 2
    assert find_seams(black) == []


def test_one_picture_only_is_one_group():
    picture = noise(80, 120).repeat(2, 1).repeat(2, 2)
    two = [image_borders(np.roll(picture, 99 * k, 2)[:, :, :99]) for k in range(2)] * 30
    assert len(set(group_by_appearance(np.zeros((60, 12), np.float32), two))) <= 2


def test_groups_by_appearance():
    rng = np.random.default_rng(0)
    slides = np.repeat(np.arange(5), 10)
    features = rng.normal(0, 0.1, (50, 12)) + rng.normal(0, 3, (5, 12))[slides]
    borders = [image_borders(noise(8, 8, k)) for k in range(50)]
    groups = group_by_appearance(features, borders, size=10)
    assert len(set(groups)) == 5
    assert len(set(zip(slides.tolist(), groups.tolist(), strict=True))) == 5
    alone = group_by_appearance(features[:30], borders[:30], size=10)  # too few to compare
    assert len(set(alone)) == 30


def test_neighbours_in_real_images_look_alike():
    samples = CellSamples(open_dataset(real_data("consep"), make_config("demo")), 0.0)
    seams = find_seams(samples.borders)
    assert len(seams) == 61
    groups, names = samples.groups("appearance"), samples.names
    assert all(groups[names[a]] == groups[names[b]] for a, b in seams)
    alone = group_by_appearance(np.stack(samples.features), [[np.zeros(3)] * 4] * len(names))
    together = np.mean([alone[a] == alone[b] for a, b in seams])
    chance = ((np.bincount(alone) / len(alone)) ** 2).sum()
    print(f"{together:.0%} of neighbours in one group by features alone; by chance {chance:.0%}")
    assert together > 0.6 > 0.2 > chance
