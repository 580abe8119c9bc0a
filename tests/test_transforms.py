from hypothesis import given, settings, strategies
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
)

from src_snippets.config import recipe
from src_snippets.stains import as_seen
from src_snippets.transforms import (
    augment_sample,
    augmentation,
    Blur,
    class_members,
    collate,
    ColorTwist,
    drawn_cell,
    filled_crop,
    join_pieces,
    magnification,
    nearest_index,
    paste_cells,
    StainTwist,
    training_target,
    TrainingSet,
    ZoomCrop,
)
from tests.conftest import empty_sample, make_sample

GEOMETRY = recipe("baseline", crop=48, color_jitter=0.0, blur=0.0)


def striped_sample(height=60, width=90):
    """A sample whose image shows its instance map: each cell is a block of one grey value."""
    ids = np.zeros((height, width), np.int64)
    numbers = np.arange(1, 1 + (height // 15) * (width // 15)).reshape(height // 15, width // 15)
    blocks = numbers.repeat(15, 0).repeat(15, 1)
    ids[: blocks.shape[0], : blocks.shape[1]] = blocks
    ids[np.arange(height) % 15 >= 11] = 0
    ids[:, np.arange(width) % 15 >= 11] = 0
    sample = make_sample([ids], [2])
    sample.image[:] = sample.layers[0] * 10
    return sample


@pytest.mark.parametrize("seed", range(40))
def test_image_and_layers_move_together(seed):
    torch.manual_seed(seed)
    moved = augment_sample(striped_sample(), augmentation(GEOMETRY))
    assert moved.image.shape[-2:] == moved.layers.shape[-2:]
    assert max(moved.size) <= 48
    shown, wanted = moved.image[0].float(), moved.layers[0] * 10.0
    # Apart from pixels that mix two values on an edge, the image shows the id in the map.
    inner = torch.nn.functional.max_pool2d(wanted[None], 5, 1, 2)[0] == wanted
    inner &= -torch.nn.functional.max_pool2d(-wanted[None], 5, 1, 2)[0] == wanted
    assert inner.float().mean() > 0.1
    assert (shown[inner] - wanted[inner]).abs().max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_magnified_edges_do_not_shift(turned):
    ids = np.zeros((40, 40), np.int64)
    ids[10:20] = 1
    sample = make_sample([ids.T if turned else ids], [1])
    sample.image[:] = sample.layers[0] * 200
    moved = augment_sample(sample, ZoomCrop((120, 120), (3.0, 3.0)))
    assert moved.size == (120, 120)
    assert torch.equal(moved.layers[0] > 0, moved.image[0] > 100)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(flips=True), "RandomHorizontalFlip"),
        (dict(flips=True), "RandomVerticalFlip"),
        (dict(color_jitter=0.3), "ColorTwist"),
        (dict(blur=0.5), "RandomApply"),
    ],
)
def test_each_switch_adds_its_step(changes, name):
    off = dict(flips=False, quarter_turns=False, color_jitter=0.0, blur=0.0)
    bare = [type(step).__name__ for step in augmentation(recipe("baseline", **off)).transforms]
    assert bare == ["ZoomCrop"]
    chain = augmentation(recipe("baseline", **off | changes))
    assert name in [type(step).__name__ for step in chain.transforms]


def test_training_draws_differ_and_take_all_magnifications():
    config = recipe("baseline", crop=32, zoom=(0.5, 2.0))
    dataset = TrainingSet([striped_sample()], config)
    torch.manual_seed(0)
    assert not torch.equal(dataset[0][0], dataset[0][0])
    step = ZoomCrop((30, 30), (0.5, 2.0))
    windows = [step.make_params([torch.zeros(3, 60, 90)])["window"][2] for _ in range(200)]
    assert (min(windows), max(windows)) == (16, 60)


def test_quarter_turns_take_all_four_positions():
    layers = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.int32)
    torch.manual_seed(0)
    step = ZoomCrop((2, 2), (1.0, 1.0), turns=True)
    seen = {str(step(tv_tensors.Mask(layers)).tolist()) for _ in range(60)}
    assert len(seen) == 4


def test_a_turned_window_fits_its_room():
    torch.manual_seed(0)
    step = ZoomCrop((20, 50), (0.5, 2.0), turns=True)
    sizes = {tuple(step(tv_tensors.Image(striped_sample().image)).shape[-2:]) for _ in range(60)}
    assert max(h for h, _ in sizes) == 20
    assert max(w for _, w in sizes) == 50


def test_nearest_index_takes_the_pixel_under_the_centre():
    assert nearest_index(2, 4).tolist() == [0, 0, 1, 1]
    assert nearest_index(4, 2).tolist() == [1, 3]
    assert nearest_index(1, 3).tolist() == [0, 0, 0]


def test_target_is_tight_and_drops_slivers():
    ids = np.zeros((10, 12), np.int64)
    ids[2:6, 3:8], ids[9, 0:2] = 4, 9
    sample = make_sample([ids], [3])
    target = training_target(sample, min_area=4)
    assert target["boxes"].tolist() == [[3, 2, 8, 6]]
    assert (target["labels"].tolist(), target["ids"].tolist()) == ([3], [1])
    both = training_target(sample, min_area=1)
    assert both["boxes"].tolist() == [[3, 2, 8, 6], [0, 9, 2, 10]]
    assert both["homes"].tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31))
def test_derived_boxes_fit_what_is_left(seed):
    torch.manual_seed(seed)
    target = training_target(augment_sample(striped_sample(), augmentation(GEOMETRY)), 4)
    for box, i, home in zip(target["boxes"].int(), target["ids"], target["homes"], strict=True):
        y, x = torch.nonzero(target["layers"][home] == i, as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert len(y) >= 4


def test_samples_without_cells():
    item = TrainingSet([empty_sample()], GEOMETRY)[0]
    image, target = item
    assert image.dtype == torch.uint8
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64
    assert target["name"] == "drawn"
    images, targets = collate([item, item])
    assert (len(images), len(targets)) == (2, 2)


def test_the_whole_chain_keeps_types_and_leaves_the_sample_alone():
    sample = striped_sample()
    before = sample.image.clone()
    torch.manual_seed(0)
    moved = augment_sample(sample, augmentation(recipe("baseline", crop=32, blur=1.0)))
    assert type(moved.image) is type(moved.layers) is torch.Tensor
    assert (moved.image.dtype, moved.layers.dtype) == (torch.uint8, torch.int16)
    assert torch.equal(sample.image, before)


def test_a_field_smaller_than_the_crop_is_taken_whole():
    sample = make_sample([np.eye(20, 30, dtype=int)], [1])
    moved = augment_sample(sample, ZoomCrop((64, 64), (1.0, 1.0)))
    assert torch.equal(moved.layers, sample.layers)
    assert torch.equal(moved.image, sample.image)


# Colour


def twisted(image, bright=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """What ColorTwist makes of an image with these factors drawn."""
    step = ColorTwist(0.5)
    drawn = torch.tensor([bright - 1, contrast - 1, saturation - 1, hue * 4]) / 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_: (drawn + 1) / 2)
        return step(tv_tensors.Image(image))


@pytest.mark.parametrize(
    ("change", "stock"),
    [
        (dict(bright=1.3), lambda i: adjust_brightness(i, 1.3)),
        (dict(contrast=0.6), lambda i: adjust_contrast(i, 0.6)),
        (dict(saturation=1.4), lambda i: adjust_saturation(i, 1.4)),
        (dict(saturation=0.6), lambda i: adjust_saturation(i, 0.6)),
    ],
)
def test_each_colour_change_is_torchvisions(change, stock):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    assert (twisted(image, **change).int() - stock(image).int()).abs().max() <= 1


def test_hue_turns_red_to_green_and_leaves_grey():
    image = torch.zeros(3, 1, 2, dtype=torch.uint8)
    image[0, 0, 0] = 200  # pure red
    image[:, 0, 1] = 90
    assert twisted(image, hue=0.0).tolist() == image.tolist()
    torch.manual_seed(0)
    third = ColorTwist(0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(third, "strength", 4 / 3)
        patch.setattr(torch, "rand", lambda *_: torch.tensor([0.5, 0.5, 0.5, 1.0]))
        assert third(tv_tensors.Image(image))[:, 0].T.tolist() == [[0, 200, 0], [90, 90, 90]]


def test_colour_leaves_the_instance_map_alone():
    layers = tv_tensors.Mask(torch.full((1, 2, 2), 9, dtype=torch.int16))
    assert torch.equal(ColorTwist(0.9)(layers), layers)


def test_thin_fields_are_not_blurred():
    thin = tv_tensors.Image(torch.randint(0, 256, (3, 2, 40), dtype=torch.uint8))
    assert torch.equal(Blur(5, (1.0, 1.0))(thin), thin)
    wide = tv_tensors.Image(torch.randint(0, 256, (3, 3, 40), dtype=torch.uint8))
    assert not torch.equal(Blur(5, (1.0, 1.0))(wide), wide)


# Crops of one size


def test_pieces_keep_their_cells_apart():
    one, two = (
        make_sample([np.eye(4, 6, dtype=int)], [3]),
        make_sample([np.eye(4, dtype=int) * 5], [2]),
    )
    joined = join_pieces([(0, 0, one), (2, 6, two)], 10)
    assert (joined.size, joined.labels.tolist(), joined.name) == ((10, 10), [3, 2], "drawn+drawn")
    assert torch.equal(joined.layers[0, :4, :6], one.layers[0].int())
    assert torch.equal(joined.layers[0, 2:6, 6:], two.layers[0].int() * 2)
    assert (joined.layers > 0).sum() == 8
    assert joined.image[:, 9, 0].tolist() == [124, 116, 104]


@pytest.mark.parametrize("seed", range(5))
def test_crops_are_full_whatever_the_fields(seed):
    torch.manual_seed(seed)
    sides = [(33, 86), (37, 85), (160, 700), (374, 464), (700, 160), (600, 600)]
    fields = [striped_sample(*size) for size in sides]
    for field in fields:
        field.image.clamp_(min=1)  # what stays empty shows
    config = recipe("baseline", crop=256, color_jitter=0.0, blur=0.0)
    for index in range(len(fields)):
        crop = filled_crop(fields, index, config)
        assert crop.size == (256, 256)
        target = training_target(crop, 1)
        assert len(target["ids"]) > 20
        empty = (crop.image == torch.tensor([124, 116, 104])[:, None, None]).all(0)
        assert empty.float().mean() < 1 / 3


def test_without_fill_a_small_field_stays_small():
    config = recipe("baseline", crop=256, zoom=(1.0, 1.0), fill=False, quarter_turns=False)
    crop = filled_crop([striped_sample(33, 86), striped_sample(300, 300)], 0, config)
    assert crop.size == (33, 86)


def test_many_cells_do_not_overflow_the_ids():
    many = make_sample([np.arange(1, 30_001).reshape(100, 300)], [1])
    joined = join_pieces([(0, 0, many), (100, 0, many)], 300)
    assert joined.layers.max() == 60_000


def test_short_sides_magnify_the_field_whatever_the_crop():
    assert magnification((30, 40), 2.0, 0) == 2
    assert magnification((30, 40), 2.0, 90) == 3
    assert magnification((10, 90), 2.0, 90) == 2  # 180 px long
    sample = make_sample([np.ones((30, 40), int)], [1])
    step = ZoomCrop((24, 24), (1.0, 1.0), short_sides=(60, 90))
    torch.manual_seed(0)
    windows = {step.make_params([sample.image])["window"][2:] for _ in range(30)}
    assert windows == {(12, 12), (8, 8)}  # magnified 2 and 3 times
    whole = augment_sample(sample, ZoomCrop((500, 500), (1.0, 1.0), short_sides=(60,)))
    assert whole.size == (60, 80)


def test_pieces_that_fill_are_not_made_smaller(monkeypatch):
    zooms = []

    def noted(config, room, *_):
        zooms.append(config.zoom)
        return v2.Identity()

    monkeypatch.setattr("src_snippets.transforms.augmentation", noted)
    field = make_sample([np.ones((64, 64), int)], [1])
    filled_crop([field], 0, recipe("demo", crop=128, zoom=(0.1, 2.0)))
    assert zooms == [(0.1, 2.0), *[(1.0, 2.0)] * 3]
    zooms.clear()
    filled_crop([field], 0, recipe("demo", crop=128, zoom=(0.2, 0.5)))
    assert zooms[1] == (0.5, 0.5)


# Crops around cells, copy and paste, stains


def lonely_cell(height=300, width=400, label=1):
    """A field with one cell of 6 x 8 px at row 200, column 350."""
    ids = np.zeros((height, width), np.int64)
    ids[200:206, 350:358] = 1
    return make_sample([ids], [label])


def test_a_crop_holds_the_cell_it_is_laid_around():
    sample = lonely_cell()
    config = recipe("demo", crop=64, fill=False, zoom=(0.5, 2.0))
    torch.manual_seed(0)
    row, column = drawn_cell(sample)
    assert sample.layers[0, row, column] == 1
    for _ in range(50):
        crop = filled_crop([sample], 0, config, (row, column))
        assert (crop.layers > 0).any()
        assert max(crop.size) <= 64
    without = [(filled_crop([sample], 0, config).layers > 0).any() for _ in range(50)]
    assert sum(without) < 25
    corner = filled_crop([sample], 0, config, (0, 399))  # a pixel at the border
    assert max(corner.size) <= 64


def test_cells_are_drawn_by_class():
    ids = np.arange(1, 13).reshape(3, 4).repeat(5, 0).repeat(5, 1)
    sample = make_sample([np.where(ids < 12, ids, 0), np.where(ids == 12, ids, 0)], [1, 2])
    torch.manual_seed(0)
    places = {drawn_cell(sample, 2) for _ in range(20)}
    assert [sample.layers[0, row, column] for row, column in places] == [12]
    assert len({drawn_cell(sample) for _ in range(100)}) > 8
    assert drawn_cell(sample, 3) is drawn_cell(empty_sample()) is None
    members = class_members([sample, empty_sample(), sample])
    assert {k: v.tolist() for k, v in members.items()} == {1: [11, 0, 11], 2: [1, 0, 1]}


def test_rare_classes_are_shown_more_often():
    common = [lonely_cell() for _ in range(9)]
    samples = [*common, lonely_cell(label=2)]
    shown = {}
    for share in (0.0, 1.0):
        config = recipe("demo", crop=64, fill=False, rare_crops=share)
        torch.manual_seed(1)
        dataset = TrainingSet(samples, config)
        targets = [dataset[0][1] for _ in range(60)]
        shown[share] = [sum(k in t["labels"].tolist() for t in targets) for k in (1, 2)]
    assert shown[0.0][1] == 0
    assert sum(shown[1.0]) == 60  # each crop holds a cell, of either class alike
    assert 18 <= shown[1.0][1] <= 42
    around = TrainingSet(samples, recipe("demo", crop=64, fill=False, cell_crops=1.0))
    assert all(len(around[k][1]["labels"]) == 1 for k in range(10))
    empty = TrainingSet([empty_sample()], recipe("demo", crop=64, rare_crops=1.0, cell_crops=1.0))
    assert len(empty[0][1]["labels"]) == 0


def test_pasting_worked_by_hand():
    below, above = np.zeros((40, 60), int), np.zeros((40, 60), int)
    below[5:15, 5:15], below[20:30, 40:50] = 1, 2
    above[10:20, 10:20] = 1  # covers a quarter of its pixels: over the limit
    above[25:35, 5:15], above[0:10, 40:50] = 2, 3
    above[28:33, 48:58] = 4  # 4 of 50 px on a cell
    sample, donor = make_sample([below], [1], seed=1), make_sample([above], [2], seed=2)
    donor.labels[1] = 3
    pasted = paste_cells(sample, donor, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert pasted.labels.tolist() == [1, 1, 2, 3, 2, 2]
    target = training_target(pasted, 1)
    assert target["ids"].tolist() == [1, 2, 4, 5, 6]
    assert target["labels"].tolist() == [1, 1, 3, 2, 2]
    assert target["boxes"][3].tolist() == [40, 0, 50, 10]
    kept = pasted.layers[0] == 2
    assert kept.sum() == 100 - 4  # what the pasted one hides is gone
    changed = (pasted.image != sample.image).any(0)
    assert not changed[pasted.layers[0] < 3].any()  # nothing but pasted cells
    middle = (slice(None), slice(28, 32), slice(8, 12))
    assert torch.equal(pasted.image[middle], donor.image[middle])
    edge = pasted.image[:, 25, 5:15].float()
    between = torch.stack([sample.image[:, 25, 5:15], donor.image[:, 25, 5:15]]).float()
    assert ((edge >= between.min(0)[0]) & (edge <= between.max(0)[0])).all()
    only = paste_cells(sample, donor, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert training_target(only, 1)["ids"].tolist() == [1, 2, 4]
    assert torch.equal(sample.layers, make_sample([below], [1]).layers)  # left as they were


def test_pasting_edge_cases():
    sample, donor = lonely_cell(64, 400), lonely_cell(300, 90)
    sample, donor = (make_sample([np.ones(s.size, int)], [1]) for s in (sample, donor))
    chances = torch.ones(2)
    assert torch.equal(paste_cells(sample, donor, chances).image, sample.image)  # no room
    empty = empty_sample(50, 70)
    assert torch.equal(paste_cells(sample, empty, chances).layers, sample.layers.int())
    onto = paste_cells(empty, make_sample([np.eye(50, 70, dtype=int)], [1]), chances)
    assert (onto.layers > 0).sum() == 50
    crowd = make_sample([np.ones((50, 70), int)], [-1])
    assert not (paste_cells(empty, crowd, chances).layers > 0).any()
    crowd.labels[0] = -4  # of a class that nothing else has
    assert not (paste_cells(empty, crowd, chances).layers > 0).any()
    layered = make_sample([np.eye(50, 70, dtype=int), np.ones((50, 70), int)], [1, 1])
    both = paste_cells(empty, layered, chances)
    assert both.layers.shape == (2, 50, 70)
    assert [(layer > 0).sum() for layer in both.layers] == [50, 3500]


def test_rare_classes_are_pasted_more_often():
    ids = np.arange(1, 65).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    sample = make_sample([np.where(ids < 64, ids, 0), np.where(ids == 64, ids, 0)], [1, 2])
    dataset = TrainingSet([sample, sample], recipe("demo", crop=64, copy_paste=1.0))
    # 126 and 2 cells, 64 on average: half of the root of 64/126, and the most.
    assert np.allclose(dataset.chances, [1.0, 0.5 * (64 / 126) ** 0.5, 1.0])
    torch.manual_seed(0)
    _, target = dataset[0]
    assert set(target["labels"].tolist()) <= {1, 2}


def test_stains_change_the_image_alone():
    sample = striped_sample()
    torch.manual_seed(0)
    twisted = augment_sample(sample, v2.Compose([StainTwist(0.5)]))
    assert torch.equal(twisted.layers, sample.layers)
    assert not torch.equal(twisted.image, sample.image)
    assert torch.equal(augment_sample(sample, v2.Compose([StainTwist(0.0)])).image, sample.image)
    plain = recipe("demo", crop=64, color_jitter=0.0, blur=0.0)
    kinds = [type(s).__name__ for s in augmentation(plain).transforms]
    assert "StainTwist" not in kinds
    kinds = [type(s).__name__ for s in augmentation(plain, stains=torch.eye(3)).transforms]
    assert kinds[1] == "StainTwist"


def test_training_sees_normalised_stains():
    sample = striped_sample(80, 80)
    sample.image[0] = sample.image[0] // 2 + 60
    options = dict(crop=80, color_jitter=0.0, blur=0.0, zoom=(1.0, 1.0), flips=False)
    options |= dict(quarter_turns=False)
    seen = filled_crop([sample], 0, recipe("demo", stain_norm=True, **options)).image
    assert torch.equal(seen, as_seen(sample.image, recipe("demo", stain_norm=True)))
    assert not torch.equal(seen, sample.image)
