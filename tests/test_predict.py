from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pycocotools.mask
import pytest
import torch

from src_snippets import predict
from src_snippets.config import recipe
from src_snippets.datasets import read_test_mapping
from src_snippets.forms import truth_instances
from src_snippets.fusion import fuse
from src_snippets.model import build_model
from src_snippets.predict import (
    answer_samples,
    answering_seconds,
    detect_together,
    detect_view,
    from_line,
    predict_images,
    tile_corners,
    to_line,
    View,
    views_of,
)
from src_snippets.readers import BadInput, read_image
from src_snippets.stains import normal_matrix, restain
from tests.conftest import detect, field_of_cells


def test_every_test_image_gets_an_answer(demo_root, tiny_config):
    images = read_test_mapping(demo_root)
    model = build_model(tiny_config)
    answers = predict_images([(model, tiny_config)], images, tiny_config)
    assert list(answers) == [1, 2, 3]
    assert [a.size for a in answers.values()] == [(i.height, i.width) for i in images]
    alone = detect(model, [torch.from_numpy(read_image(images[1].path))], tiny_config)[0]
    assert np.array_equal(answers[2].boxes, alone.boxes)
    assert answers[2].rles == alone.rles
    assert predict_images([(model, tiny_config)], [], tiny_config) == {}


def test_a_broken_image_is_named(demo_root, tiny_config, tmp_path):
    image = read_test_mapping(demo_root)[0]
    broken = image._replace(path=tmp_path / "broken.tif")
    broken.path.write_bytes(image.path.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"broken\.tif: (cut short|cannot be read)"):
        predict_images([(build_model(tiny_config), tiny_config)], [broken], tiny_config)


def test_several_models_answer_together(demo_root, tiny_config):
    image = torch.from_numpy(read_image(read_test_mapping(demo_root)[0].path))
    other = replace(tiny_config, seed=1, backbone="mobilenet_v2", score_floor=0.0)
    members = [(build_model(own), own) for own in (tiny_config, other)]
    alone = [detect(model, [image], own)[0] for model, own in members]
    together = detect_together(members, image, tiny_config)
    assert together.rles == fuse(alone, tiny_config).rles
    assert detect_together(members[:1], image, tiny_config).rles == alone[0].rles


def test_stains_are_normalised_before_the_model_sees_them(tiny_config):
    image = field_of_cells(0, 96).image
    own = replace(tiny_config, stain_norm=True)
    model = build_model(tiny_config)
    found = detect_together([(model, own)], image, tiny_config)
    expected = detect(model, [restain(image, normal_matrix(image))], tiny_config)[0]
    assert found.rles == expected.rles != detect(model, [image], tiny_config)[0].rles


# Views


class Squares:
    """A model that finds the squares of one brightness, with the probabilities of their pixels.

    It answers exactly for every symmetry and tile: each white square of the picture is a detection
    whose class is told by the brightness of its upper left quarter as it lies in the image.
    """

    def __init__(self):
        self.transform = SimpleNamespace(fixed=None)
        self.seen = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    def __call__(self, images):
        self.seen += [(tuple(image.shape[-2:]), self.transform.fixed) for image in images]
        return [self.find(image[0].numpy()) for image in images]

    def find(self, picture):
        boxes, scores, masks = [], [], []
        for level in np.unique(picture[picture > 0]):
            rows, columns = np.nonzero(picture == level)
            top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            boxes.append([left, top, right, bottom])
            scores.append(len(rows) / 1000 + 0.1)
            # One bin a pixel where the cell is 28 px wide; exact for full squares else.
            crop = (picture[top:bottom, left:right] == level).astype(np.float32)
            grid = [((np.arange(28) + 0.5) * n / 28).astype(int) for n in crop.shape]
            masks.append(crop[np.ix_(*grid)])
        count = len(boxes)
        return dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor(scores, dtype=torch.float32),
            labels=torch.ones(count, dtype=torch.int64),
            masks=torch.from_numpy(np.array(masks, np.float32).reshape(-1, 1, 28, 28)),
        )


def picture_of(cells, height, width):
    """(3, H, W) uint8 with a brightness of its own for each (top, left, bottom, right)."""
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, (top, left, bottom, right) in enumerate(cells, start=1):
        picture[:, top:bottom, left:right] = number
    return picture


@pytest.mark.parametrize(("turns", "mirrored"), list(product(range(4), (False, True))))
def test_every_view_is_carried_back_exactly(turns, mirrored):
    # An L of 28 x 28 px, so that each bin is a pixel, off the middle of an oblong picture.
    picture = torch.zeros(3, 60, 90, dtype=torch.uint8)
    picture[:, 10:38, 50:60] = 1
    picture[:, 31:38, 50:78] = 1
    found = detect_view(Squares(), picture, View(1.0, turns, mirrored), recipe("demo"))
    assert found.boxes.tolist() == [[50, 10, 78, 38]]
    mask = pycocotools.mask.decode(found.rles[0])
    assert np.array_equal(mask, (picture[0] == 1).numpy())


def test_views_of_the_settings():
    assert views_of(recipe("demo")) == [View(1.0, 0, False)]
    assert len(set(views_of(recipe("demo", test_views="all", test_scales=[1.0, 1.5])))) == 16
    image = torch.arange(6).view(1, 2, 3)
    flips = views_of(recipe("demo", test_views="flips"))
    shown = [view.show(image)[0].tolist() for view in flips]
    assert shown == [[[0, 1, 2], [3, 4, 5]], [[2, 1, 0], [5, 4, 3]], [[3, 4, 5], [0, 1, 2]]]


def test_views_of_a_real_model_agree_on_what_they_see(tiny_config):
    config = replace(tiny_config, score_floor=0.0, test_views="all", test_scales=(1.0, 1.5))
    model, image = build_model(config), field_of_cells(0, 64).image
    found = detect_together([(model, config)], image, config)
    assert 0 < len(found) <= config.detections
    assert (np.diff(found.scores) <= 0).all()
    assert model.transform.fixed is None


def test_scales_reach_the_model():
    model, image = Squares(), picture_of([(5, 5, 15, 15)], 40, 40)
    config = recipe("demo", test_scales=[1.0, 2.0], scale=1.0)
    found = detect_together([(model, config)], image, config)
    assert model.seen == [((40, 40), 1.0), ((40, 40), 2.0)]
    assert (len(found), found.boxes.tolist()) == (1, [[5, 5, 15, 15]])
    assert model.transform.fixed is None
    detect_together([(model, recipe("demo", tile=32, short_sides=[80]))], image, config)
    assert model.seen[2:4] == [((32, 32), 2.0), ((32, 32), 2.0)]  # tiles of a field of 40 px


# Tiles


def test_tiles_cover_a_side_and_overlap_by_half():
    assert tile_corners(50, 0) == [0]
    assert tile_corners(50, 64) == tile_corners(64, 64) == [0]
    assert tile_corners(65, 64) == [0, 1]
    assert tile_corners(128, 64) == [0, 32, 64]
    for length in range(65, 400, 7):
        corners = tile_corners(length, 64)
        assert (corners[0], corners[-1]) == (0, length - 64)
        assert max(np.diff(corners)) <= 32


@pytest.mark.parametrize("views", ["one", "all"])
def test_cells_on_every_seam_are_found_once(views):
    cells = [
        (y, x, y + 12, x + 12) for y in range(2, 150, 15) for x in range(2, 190, 15)
    ]  # on and beside all seams of tiles of 64 px
    picture = picture_of(cells, 160, 200)
    config = recipe("demo", tile=64, tile_batch=3, test_views=views, detections=1000)
    model = Squares()
    found = detect_together([(model, config)], picture, config)
    corners = found.boxes[:, [1, 0, 3, 2]].round(3)
    assert sorted(map(tuple, corners.tolist())) == sorted(cells)
    assert {size for size, _ in model.seen} == {(64, 64)}
    masks = sum(pycocotools.mask.decode(rle) for rle in found.rles)
    assert np.array_equal(masks, (picture[0] > 0).numpy())


def test_a_cell_larger_than_the_overlap_stays():
    picture = picture_of([(10, 4, 40, 92)], 64, 100)
    config = recipe("demo", tile=64)
    found = detect_together([(Squares(), config)], picture, config)
    assert len(found) >= 1
    assert found.boxes[0].tolist()[1::2] == [10, 40]


def test_one_tile_is_the_whole_image(tiny_config):
    config = replace(tiny_config, score_floor=0.0)
    model, image = build_model(config), field_of_cells(0, 64).image
    whole = detect_together([(model, config)], image, config)
    for tile in (64, 100):
        tiled = detect_together([(model, config)], image, replace(config, tile=tile))
        assert (tiled.rles, tiled.boxes.tolist()) == (whole.rles, whole.boxes.tolist())


def test_tiles_of_a_real_model(tiny_config):
    config = replace(tiny_config, score_floor=0.0, tile=48, tile_batch=2)
    sample = field_of_cells(0, 96)
    (found,) = answer_samples([(build_model(config), config)], [sample], config)
    assert found.size == (96, 96)
    assert len(found) == config.detections


# Sessions that end, memory that does not suffice


def test_answers_on_disk_are_the_same(tmp_path):
    sample = field_of_cells(0, 96)
    truth = truth_instances(sample)
    third = replace(truth, scores=(np.arange(len(truth)) / 3).astype(np.float32))
    for found in (third, truth.select([])):
        image_id, read = from_line(to_line(7, found))
        assert (image_id, read.size, read.rles) == (7, found.size, list(found.rles))
        for name in ("boxes", "scores", "labels"):
            mine, own = getattr(read, name), getattr(found, name)
            assert np.array_equal(mine, own)
            assert mine.dtype == own.dtype
            assert mine.shape == own.shape


def test_full_memory_shrinks_batches_then_tiles(tiny_config, monkeypatch, capsys):
    image, model = field_of_cells(0, 600).image, build_model(tiny_config)
    seen, really = [], predict.find_raw

    def little_room(model, tiles, config):
        seen.append((len(tiles), tuple(tiles[0].shape[-2:])))
        if sum(tile[0].numel() for tile in tiles) > 150 * 150:
            raise torch.OutOfMemoryError("no room")
        return really(model, tiles, config)

    monkeypatch.setattr(predict, "find_raw", little_room)
    found = detect_view(model, image, View(1.0, 0, False), replace(tiny_config, tile=300))
    assert seen[:4] == [(4, (300, 300)), (2, (300, 300)), (1, (300, 300)), (1, (150, 150))]
    assert found.size == (600, 600)
    assert "GPU memory is full: 1 tiles of 150 px a batch now" in capsys.readouterr().out
    seen.clear()
    detect_view(model, image, View(1.0, 0, False), tiny_config)  # whole images were wanted
    assert set(seen) == {(1, (150, 150))}
    monkeypatch.setattr(predict, "find_raw", Raises(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        detect_view(build_model(tiny_config), image, View(1.0, 0, False), tiny_config)


class Raises:
    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


def test_time_to_answer_grows_with_the_pixels(tiny_config):
    sample = field_of_cells(0, 96)
    one = answering_seconds(tiny_config, sample, 96 * 96)
    assert 0 < one < 10
    assert answering_seconds(tiny_config, sample, 1000 * 96 * 96) > 50 * one
