from dataclasses import replace
import inspect
import random

from hypothesis import given, settings, strategies
import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from src_snippets.data import transforms
from src_snippets.data.structures import CellSample
from src_snippets.data.transforms import (
    build_augmentation,
    collate,
    paste_instances,
    random_scaled_crop,
    training_target,
    TrainingSet,
)
from src_snippets.setup.config import make_config
from tests.benchmarks.cases import counted_subset
from tests.conftest import empty_sample, make_sample

PLAIN = make_config("baseline", crop=48, color_jitter=0.0, flips=False, scale_jitter=(1.0, 1.0))
GEOMETRY = replace(PLAIN, flips=True, scale_jitter=(0.8, 1.25))
MARKER = "# Add your own transforms here: any torchvision v2 transform of (image, mask)"


@pytest.fixture(autouse=True)
def no_blur(monkeypatch):
    monkeypatch.setattr(transforms, "BLUR_PROBABILITY", 0.0)


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


def augment(sample, chain):
    """A sample that went through a chain of (image, mask)."""
    image, layers = chain(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.layers))
    assert type(image) is tv_tensors.Image
    assert type(layers) is tv_tensors.Mask
    image, layers = image.as_subclass(torch.Tensor), layers.as_subclass(torch.Tensor)
    return CellSample(image, layers, sample.labels, sample.name)


def scaled_crop(sample, size, scale, contains=None):
    return augment(sample, lambda *pair: random_scaled_crop(*pair, size, scale, contains))


# Geometry


@settings(max_examples=30, deadline=None)
@given(strategies.integers(0, 2**31))
def test_image_map_and_boxes_move_together(seed):
    torch.manual_seed(seed)
    moved = augment(striped_sample(), build_augmentation(GEOMETRY))
    assert moved.image.shape[-2:] == moved.layers.shape[-2:]
    assert max(moved.size) <= 48
    grey, expected = moved.image[0].float(), moved.layers[0] * 10.0
    # Apart from pixels that mix two values on an edge, the image shows the id in the map
    inner = torch.nn.functional.max_pool2d(expected[None], 5, 1, 2)[0] == expected
    inner &= -torch.nn.functional.max_pool2d(-expected[None], 5, 1, 2)[0] == expected
    assert inner.float().mean() > 0.1
    assert (grey[inner] - expected[inner]).abs().max() <= 1
    target = training_target(moved)
    for box, i, k in zip(target["boxes"], target["ids"], target["layer_index"], strict=True):
        y, x = torch.nonzero(target["layers"][k] == i, as_tuple=True)
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert len(y) >= 4


@pytest.mark.parametrize("vertical", [False, True])
def test_scaled_edges_do_not_shift(vertical):
    ids = np.zeros((40, 40), np.int64)
    ids[10:20] = 1
    sample = make_sample([ids.T if vertical else ids], [1])
    sample.image[:] = sample.layers[0] * 200
    for side, scale in ((120, 3.0), (20, 0.5)):
        moved = scaled_crop(sample, (side, side), (scale, scale))
        assert moved.size == (side, side)
        assert torch.equal(moved.layers[0] > 0, moved.image[0] > 100)


def test_ids_are_picked_at_pixel_centres():
    ids = np.arange(1, 65).reshape(8, 8)
    half = scaled_crop(make_sample([ids], [1]), (4, 4), (0.5, 0.5))
    assert half.layers[0].tolist() == ids[1::2, 1::2].tolist()


def test_ids_stay_exact_up_to_int32():
    ids = torch.arange(32_700, 33_100, dtype=torch.int32).reshape(1, 20, 20)
    sample = CellSample(torch.zeros(3, 20, 20, dtype=torch.uint8), ids, torch.zeros(33_100).long())
    moved = scaled_crop(sample, (40, 40), (2.0, 2.0))
    assert moved.layers.dtype == torch.int32
    assert torch.equal(moved.layers[:, ::2, ::2], ids)


def test_scales_are_drawn_evenly_on_a_log_scale(monkeypatch):
    drawn = []
    functional = transforms.v2.functional
    crop = functional.resized_crop
    monkeypatch.setattr(
        functional, "resized_crop", lambda x, *w, **k: drawn.append(w) or crop(x, *w, **k)
    )
    sample = make_sample([np.ones((400, 400), int)], [1])
    torch.manual_seed(0)
    for _ in range(300):
        scaled_crop(sample, (64, 64), (0.25, 4.0))
    scales = np.array([window[4][0] / window[2] for window in drawn])
    assert scales.min() < 0.27
    assert scales.max() > 3.7
    assert 0.42 < (scales < 1).mean() < 0.58
    tops = np.array([window[0] / (400 - window[2]) for window in drawn])
    assert 0.4 < tops.mean() < 0.6
    assert tops.max() == 1


def test_flips_and_quarter_turns_reach_all_eight_symmetries():
    ids = torch.tensor([[[1, 1, 2], [3, 3, 4], [5, 6, 7]]], dtype=torch.int32)
    sample = CellSample(torch.zeros(3, 3, 3, dtype=torch.uint8), ids, torch.ones(7).long())
    torch.manual_seed(0)
    turned = replace(PLAIN, flips=True)
    found = {str(augment(sample, build_augmentation(turned)).layers.tolist()) for _ in range(120)}
    square = ids[0].numpy()
    expected = [np.rot90(s, k) for s in (square, square.T) for k in range(4)]
    assert found == {str([s.tolist()]) for s in expected}
    assert torch.equal(augment(sample, build_augmentation(PLAIN)).layers, ids)


@pytest.mark.parametrize("flips", [False, True])
def test_results_fit_the_size(flips):
    torch.manual_seed(0)
    chain = build_augmentation(replace(GEOMETRY, flips=flips, scale_jitter=(0.5, 2.0)), (20, 50))
    sizes = {augment(striped_sample(), chain).size for _ in range(60)}
    assert max(height for height, _ in sizes) == 20
    assert max(width for _, width in sizes) == 50


def test_small_images_are_taken_whole_and_stay_wide_enough_for_a_blur(monkeypatch):
    sample = make_sample([np.eye(20, 30, dtype=int)], [1])
    moved = scaled_crop(sample, (64, 64), (1.0, 1.0))
    assert torch.equal(moved.layers, sample.layers)
    assert torch.equal(moved.image, sample.image)
    monkeypatch.setattr(transforms, "BLUR_PROBABILITY", 1.0)
    thin = augment(sample, build_augmentation(replace(PLAIN, scale_jitter=(0.1, 0.1))))
    assert thin.size == (3, 3)


def test_a_crop_holds_the_instance_it_is_laid_around():
    ids = np.zeros((300, 400), np.int64)
    ids[200:206, 350:358], ids[:3, 397:] = 1, 2
    sample = make_sample([ids], [1])
    torch.manual_seed(0)
    chain = build_augmentation(replace(GEOMETRY, crop=64, scale_jitter=(0.5, 2.0)), contains=1)
    centers = []
    for _ in range(50):
        crop = augment(sample, chain)
        assert max(crop.size) <= 64
        centers.append(torch.nonzero(crop.layers[0] == 1).float().mean(0))
    assert (torch.stack(centers).std(0) > 8).all()  # not always in the middle
    for _ in range(20):
        corner = scaled_crop(sample, (64, 64), (1.0, 1.0), 2)
        assert corner.size == (64, 64)
        assert (corner.layers == 2).any()
    without = [(scaled_crop(sample, (64, 64), (1.0, 1.0)).layers == 1).any() for _ in range(50)]
    assert sum(without) < 25
    assert scaled_crop(sample, (64, 64), (1.0, 1.0), 3).size == (64, 64)  # not there


# The chain


def test_colours_change_the_image_alone_and_leave_the_sample():
    sample = striped_sample()
    before = sample.image.clone()
    torch.manual_seed(0)
    moved = augment(sample, build_augmentation(replace(PLAIN, crop=90, color_jitter=0.5)))
    assert torch.equal(moved.layers, sample.layers)
    assert not torch.equal(moved.image, sample.image)
    assert moved.image.dtype == torch.uint8
    assert torch.equal(sample.image, before)
    (jitter,) = (
        step
        for step in build_augmentation(replace(PLAIN, color_jitter=0.3)).transforms
        if isinstance(step, v2.ColorJitter)
    )
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3)
    assert jitter.hue is None


def test_a_transform_of_the_users_own_goes_where_the_comment_is():
    source = inspect.getsource(transforms)
    assert source.count(MARKER) == 1
    edited = source.replace(MARKER, "v2.RandomRotation((90, 90)), v2.ElasticTransform(1.0),")
    space = {"__name__": "edited"}
    exec(edited, space)
    torch.manual_seed(0)
    moved = augment(striped_sample(45, 45), space["build_augmentation"](PLAIN))
    assert moved.layers.dtype == torch.int16
    rotated = torch.rot90(striped_sample(45, 45).layers, 1, (1, 2))
    assert (moved.layers == rotated).float().mean() > 0.8
    item = space["TrainingSet"]([striped_sample(45, 45)] * 2, PLAIN)[0]
    assert item[0].shape == (3, 48, 48)


def test_draws_follow_from_seed_epoch_and_index_alone():
    samples = [striped_sample(), striped_sample(30, 40)]
    config = replace(GEOMETRY, color_jitter=0.3, copy_paste=0.5, class_crops=0.5)
    items = []
    for seed, epoch in ((1, 0), (1, 0), (2, 0), (1, 1)):
        dataset = TrainingSet(counted_subset(samples), replace(config, seed=seed))
        dataset.epoch.fill_(epoch)
        items.append([dataset[k] for k in range(2)])
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    for (image, target), (again, same) in zip(*items[:2], strict=True):
        assert torch.equal(image, again)
        assert torch.equal(target["boxes"], same["boxes"])
    images = [[image for image, _ in item] for item in items]
    for other in images[2:]:
        assert not any(map(torch.equal, images[0], other))


# Targets


def test_target_is_tight_and_leaves_slivers_and_crowds_out():
    ids = np.zeros((10, 12), np.int64)
    ids[2:6, 3:8], ids[9, 0:3], ids[0, 0:4], ids[6:9, 9:12] = 4, 9, 10, 11
    sample = make_sample([ids, np.eye(10, 12, dtype=int)], [3, 1])
    sample.labels[3] = -3
    target = training_target(sample)
    assert target["boxes"].tolist() == [[3, 2, 8, 6], [0, 0, 4, 1], [0, 0, 10, 10]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [3, 3, 1]
    assert target["ids"].tolist() == [1, 3, 5]
    assert target["layer_index"].tolist() == [0, 0, 1]
    assert target["layers"] is sample.layers


def test_samples_without_instances():
    config = replace(GEOMETRY, class_crops=1.0, copy_paste=1.0)
    item = TrainingSet(counted_subset([empty_sample()]), config)[0]
    image, target = item
    assert image.dtype == torch.uint8
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].dtype == torch.int64
    assert target["name"].startswith("drawn")
    images, targets = collate([item, item])
    assert (len(images), len(targets)) == (2, 2)


# Mosaics


def test_pieces_of_a_mosaic_are_laid_beside_each_other():
    two = make_sample([np.pad(np.ones((4, 4), int), 20), np.ones((44, 44), int)], [3, 1], name="a")
    crop = TrainingSet([two], replace(PLAIN, crop=88)).crop(0)
    assert (crop.size, crop.name, crop.layers.shape[0]) == ((88, 88), "a+a+a+a", 2)
    assert crop.labels.tolist() == [3, 1] * 4
    target = training_target(crop)
    assert target["ids"].tolist() == list(range(1, 9))
    corners = sorted(target["boxes"][target["labels"] == 1, :2].tolist())
    assert corners == [[0, 0], [0, 44], [44, 0], [44, 44]]
    for top in (0, 44):
        assert torch.equal(crop.image[:, top : top + 44, 44:], two.image)


def test_one_layer_and_two_layers_in_a_mosaic():
    flat = make_sample([np.ones((40, 80), int)], [1])
    deep = make_sample([np.ones((40, 80), int), np.eye(40, 80, dtype=int)], [1, 2])
    for index in range(2):
        torch.manual_seed(index)
        crops = [TrainingSet([flat, deep], replace(PLAIN, crop=80)).crop(index) for _ in range(20)]
        assert {len(training_target(crop)["ids"]) for crop in crops} == {2 + index, 3 + index}


@pytest.mark.parametrize("seed", range(3))
def test_crops_are_full_whatever_the_images(seed):
    torch.manual_seed(seed)
    sides = [(33, 86), (37, 85), (160, 700), (374, 464), (700, 160), (600, 600)]
    samples = [striped_sample(*size) for size in sides]
    for sample in samples:
        sample.image.clamp_(200)  # what stays empty is darker
    dataset = TrainingSet(samples, replace(GEOMETRY, crop=256))
    for index in range(len(samples)):
        crop = dataset.crop(index)
        assert crop.size == (256, 256)
        assert len(training_target(crop)["ids"]) > 20
        empty = crop.image.amax(0) == 114
        assert empty.float().mean() < 1 / 3


def test_a_batch_of_one_needs_no_mosaic():
    samples = [striped_sample(33, 86), striped_sample(300, 300)]
    crop = TrainingSet(samples, replace(PLAIN, crop=256, batch_size=1)).crop(0)
    assert (crop.size, crop.name) == ((33, 86), "drawn")
    assert torch.equal(crop.image, samples[0].image)
    assert crop.image.data_ptr() != samples[0].image.data_ptr()


def test_pieces_beside_the_first_are_not_made_smaller(monkeypatch):
    scales = []

    def identity(config, size, contains):
        scales.append(config.scale_jitter)
        return v2.Identity()

    monkeypatch.setattr(transforms, "build_augmentation", identity)
    sample = make_sample([np.ones((64, 64), int)], [1])
    for jitter, native in (((0.1, 2.0), (1.0, 2.0)), ((0.2, 0.5), (0.5, 0.5)), ((1.5, 2.0),) * 2):
        TrainingSet([sample], replace(PLAIN, crop=128, scale_jitter=jitter)).crop(0)
        assert scales == [jitter, *[native] * 3]
        scales.clear()


def test_many_instances_do_not_overflow_the_ids():
    many = make_sample([np.arange(1, 20_001).reshape(100, 200)], [1])
    crop = TrainingSet([many], replace(PLAIN, crop=200)).crop(0)
    assert crop.layers.flatten().tolist() == list(range(1, 40_001))
    assert len(crop.labels) == 40_000


# Crops by class


def one_cell(label, height=300, width=400):
    """An image with one cell of 6 x 8 px at row 200, column 350."""
    ids = np.zeros((height, width), np.int64)
    ids[200:206, 350:358] = 1
    return make_sample([ids], [label])


def test_each_class_is_as_likely_whatever_its_count():
    samples = [one_cell(1) for _ in range(9)] + [one_cell(3)]
    labels = {}
    for fraction in (0.0, 1.0):
        config = replace(PLAIN, crop=64, class_crops=fraction)
        dataset = TrainingSet(counted_subset(samples), config)
        targets = []
        for _ in range(60):
            dataset.epoch += 1
            targets.append(dataset[0][1])
        labels[fraction] = [sum(k in t["labels"].tolist() for t in targets) for k in (1, 3)]
    assert labels[0.0][1] == 0
    assert sum(labels[1.0]) == 60  # each crop holds a cell
    assert 18 <= labels[1.0][1] <= 42


def test_images_are_drawn_by_their_count_of_the_class(monkeypatch):
    ids = np.arange(1, 10).reshape(3, 3).repeat(20, 0).repeat(20, 1)
    samples = [make_sample([ids], [1], name="nine"), make_sample([ids > 8], [1], name="one")]
    samples[0].labels[:] = torch.tensor([1] * 9)
    crowd = make_sample([ids], [1], name="crowd")
    crowd.labels[:] = -1
    parts = counted_subset([*samples, crowd])
    dataset = TrainingSet(parts, replace(PLAIN, crop=32, class_crops=1.0))
    assert dataset.counts.tolist() == [[0, 9, 0, 0, 0], [0, 1, 0, 0, 0], [0] * 5]
    torch.manual_seed(0)
    names = [dataset.crop(2).name for _ in range(200)]
    assert "crowd" not in names
    assert 5 <= names.count("one") <= 40  # a tenth; by presence it would be half
    around = set()
    for _ in range(100):
        crop = dataset.crop(0)
        around.add(int(crop.layers[0, 16, 16]))
    assert len(around) > 5  # not always the same instance


# Copy-paste


def test_pasting_worked_by_hand():
    below, above = np.zeros((40, 60), int), np.zeros((40, 60), int)
    below[5:15, 5:15], below[20:30, 40:50] = 1, 2
    above[10:20, 10:20] = 1  # covers a quarter of its pixels: over the limit
    above[25:35, 5:15], above[0:10, 40:50] = 2, 3
    above[28:33, 48:58] = 4  # 4 of 50 px on a cell
    sample, donor = make_sample([below], [1], seed=1), make_sample([above], [2], seed=2)
    donor.labels[1] = 3
    pasted = paste_instances(sample, donor, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert pasted.labels.tolist() == [1, 1, 2, 3, 2, 2]
    target = training_target(pasted)
    assert target["ids"].tolist() == [1, 2, 4, 5, 6]
    assert target["labels"].tolist() == [1, 1, 3, 2, 2]
    assert target["boxes"][3].tolist() == [40, 0, 50, 10]
    assert (pasted.layers == 2).sum() == 100 - 4  # what the pasted one hides is gone
    front = torch.from_numpy(above >= 2)
    assert torch.equal(pasted.image[:, front], donor.image[:, front])
    assert torch.equal(pasted.image[:, ~front], sample.image[:, ~front])
    only = paste_instances(sample, donor, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert training_target(only)["ids"].tolist() == [1, 2, 4]
    assert torch.equal(sample.layers, make_sample([below], [1]).layers)  # left as they were


def test_up_to_a_fifth_of_a_pasted_instance_may_cover_others():
    below, above = np.zeros((20, 20), int), np.zeros((20, 20), int)
    above[5:15, 5:15] = 1
    for covered, count in ((20, 1), (21, 0)):
        below[5:15, 5:15].flat[:] = 0
        below[5:15, 5:15] = (np.arange(100) < covered).reshape(10, 10)
        pair = make_sample([below], [1]), make_sample([above], [1])
        pasted = paste_instances(*pair, torch.ones(2))
        assert int((pasted.layers == 2).any()) == count


def test_pasting_edge_cases():
    probabilities = torch.ones(5)
    sample, donor = (make_sample([np.ones(s, int)], [1]) for s in ((64, 40), (30, 90)))
    pasted = paste_instances(sample, donor, probabilities)
    assert torch.equal(pasted.image, sample.image)  # no free place
    empty = empty_sample(50, 70)
    assert not paste_instances(empty, empty_sample(20, 90), probabilities).layers.any()
    smaller = paste_instances(empty, donor, probabilities)
    assert (smaller.layers > 0).sum() == 30 * 70
    assert torch.equal(smaller.image[:, 30:], empty.image[:, 30:])
    crowd = make_sample([np.ones((50, 70), int)], [-4])
    assert not paste_instances(empty, crowd, probabilities).layers.any()
    layered = make_sample([np.eye(50, 70, dtype=int), np.ones((50, 70), int)], [1, 1])
    both = training_target(paste_instances(empty, layered, probabilities))
    assert both["boxes"].tolist() == [[0, 0, 50, 50], [0, 0, 70, 50]]


def test_rare_classes_are_pasted_more_often():
    ids = np.arange(1, 65).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    sample = make_sample([np.where(ids < 64, ids, 0), np.where(ids == 64, ids, 0)], [1, 2])
    dataset = TrainingSet(counted_subset([sample, sample]), replace(PLAIN, copy_paste=1.0))
    # 126 and 2 cells, 64 on average: half of the root of 64 / 126, and the most
    expected = [0.5 * (64 / 126) ** 0.5, 1.0]
    assert np.allclose(dataset.probabilities[1:3], expected)
    parts = counted_subset([empty_sample(48, 48), sample])
    empty = TrainingSet(parts, replace(PLAIN, copy_paste=1.0))
    torch.manual_seed(0)
    counts = [len(empty[0][1]["ids"]) for _ in range(20)]
    assert max(counts) > 10
    never = TrainingSet(parts, replace(PLAIN, copy_paste=0.0))
    assert not any(len(never[0][1]["ids"]) for _ in range(10))
