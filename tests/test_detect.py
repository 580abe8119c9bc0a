from dataclasses import replace
from itertools import product
from types import SimpleNamespace
import weakref

from hypothesis import given, settings, strategies
import numpy as np
import pycocotools.mask
import pytest
import torch
import torch.nn.functional as F

from src_snippets.data.rle import encode_masks
from src_snippets.data.structures import Instances
from src_snippets.model import detect as module
from src_snippets.model.detect import (
    detect,
    fuse_boxes,
    paste_masks,
    tile_corners,
    View,
    without_overlaps,
)
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import change_config, make_config
from tests.conftest import field_of_cells, random_boxes


def make_instances(masks, scores, labels=None) -> Instances:
    """Instances of (N, H, W) masks."""
    masks = np.asarray(masks, bool).reshape(-1, *np.shape(masks)[-2:])
    zeros = np.zeros(len(masks), np.int64)
    rles = encode_masks(masks, zeros, zeros, *masks.shape[1:])
    xywh = np.array(pycocotools.mask.toBbox(rles)).reshape(-1, 4)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32)
    labels = zeros + 1 if labels is None else np.array(labels)
    return Instances(boxes, np.array(scores, np.float32), labels, rles, masks.shape[1:])


def decoded(instances) -> np.ndarray:
    """(N, H, W) bool."""
    masks = [pycocotools.mask.decode(rle) for rle in instances.rles]
    return np.array(masks, bool).reshape(-1, *instances.size)


# Paste


def paste_one(box, mask=1.0, threshold=0.5):
    masks = torch.as_tensor(mask).float().expand(1, 28, 28)
    return paste_masks(masks, torch.tensor([box]).float(), (4, 16), threshold)[0]


def test_paste_worked_by_hand():
    rows = np.zeros((4, 16), int)
    rows[1:3, 2:5] = 1
    assert np.array_equal(pycocotools.mask.decode(paste_one([2, 1, 5, 3])), rows)
    # A pixel belongs to the box when its centre lies inside
    assert pycocotools.mask.toBbox(paste_one([1.4, 0.6, 3.4, 2.6])).tolist() == [1, 1, 2, 2]
    assert pycocotools.mask.area(paste_one([-9, -9, 99, 99])) == 64
    assert pycocotools.mask.area(paste_one([2, 1, 5, 3], threshold=0.0)) == 6
    nothing = (
        paste_one([2, 1, 5, 3], 0.4),
        paste_one([2.1, 1.1, 2.3, 1.3]),
        paste_one([17, 1, 19, 3]),
    )
    assert nothing == (None, None, None)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (4, 6), 0.5) == []


def test_a_step_in_the_mask_is_pasted_where_it_lies():
    left = torch.arange(28) < 14  # of the columns
    # 14 px for 28 bins: each pixel is the mean of two bins, the first 7 of them 1
    assert pycocotools.mask.toBbox(paste_one([1, 0, 15, 4], left)).tolist() == [1, 0, 7, 4]
    top = left[:, None].expand(28, 28)
    assert pycocotools.mask.toBbox(paste_one([1, 0, 15, 4], top)).tolist() == [1, 0, 14, 2]


def sampled(mask, box, size):
    """(H, W) probabilities of one mask at the centres of all pixels, -1 outside of its box."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x1, y1, x2, y2 = box
    grid = torch.stack([(x - x1) / (x2 - x1), (y - y1) / (y2 - y1)], -1) * 2 - 1
    options = dict(padding_mode="border", align_corners=False)
    values = F.grid_sample(mask[None, None], grid[None], **options)[0, 0]
    return torch.where((grid.abs() < 1).all(-1), values, -1.0).numpy()


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from([0.3, 0.5]))
def test_paste_equals_bilinear_sampling_of_each_mask(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(12, 70, 90, seed) + torch.rand(12, 4, generator=generator)
    masks = F.avg_pool2d(torch.rand(12, 28, 28, generator=generator), 5, 1, 2)
    for rle, mask, box in zip(
        paste_masks(masks, boxes, (70, 90), threshold), masks, boxes, strict=True
    ):
        expected = sampled(mask, box, (70, 90))
        found = pycocotools.mask.decode(rle) if rle else np.zeros((70, 90))
        differs = (found != (expected >= threshold)) & (np.abs(expected - threshold) > 1e-4)
        assert not differs.any()


def test_masks_in_chunks_are_those_pasted_alone():
    boxes = torch.cat([random_boxes(9, 500, 600, 0), random_boxes(40, 60, 50, 1)])
    masks = F.avg_pool2d(torch.rand(49, 28, 28), 5, 1, 2)
    alone = [paste_masks(masks[[k]], boxes[[k]], (500, 600), 0.5)[0] for k in range(49)]
    assert paste_masks(masks, boxes, (500, 600), 0.5) == alone


# Overlaps

ROWS = [[[1, 1, 1, 0, 0, 0]], [[0, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]], [[0, 0, 1, 1, 0, 0]]]


def test_overlaps_go_to_the_best():
    instances = without_overlaps(make_instances(ROWS, [0.5, 0.9, 0.6, 0.7]))
    assert decoded(instances)[:, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0, 0],
    ]
    assert instances.boxes.tolist() == [[0, 0, 1, 1], [1, 0, 3, 1], [4, 0, 6, 1], [3, 0, 4, 1]]
    assert without_overlaps(make_instances(ROWS[:2], [0.9, 0.5], [3, 4])).labels.tolist() == [3]
    equal = make_instances(ROWS[:2], [0.5, 0.5], [7, 8])
    assert without_overlaps(equal).labels.tolist() == [7]  # of equal ones the first
    assert len(without_overlaps(equal.select([]))) == 0


def random_instances(rng, count, size=(12, 12)) -> Instances:
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        y, x, h, w = (*rng.integers(0, 8, 2), *rng.integers(2, 6, 2))
        mask[y : y + h, x : x + w] = True
    return make_instances(masks, np.sort(rng.random(count))[::-1], rng.integers(1, 3, count))


@settings(max_examples=30, deadline=None)
@given(strategies.integers(0, 2**31))
def test_pixels_belong_to_one_instance_and_none_is_lost(seed):
    every = random_instances(np.random.default_rng(seed), 20)
    apart = decoded(without_overlaps(every))
    assert apart.sum(0).max() == 1
    assert np.array_equal(apart.any(0), decoded(every).any(0))


# Views and tiles of a model

BINS = (torch.arange(28) + 0.5) / 28


class Squares:
    """A model and its parts; detects regions of one brightness exactly in every view and tile.

    It runs out of memory where the images of a batch have over `limit` pixels.
    """

    def __init__(self, limit=np.inf):
        self.transform = self.roi_heads = self
        self.scale, self.limit = 1.0, limit
        self.calls, self.tiles, self.features, self.alive = [], [], [], []
        self.memory_limits = {}

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    def __call__(self, images):
        self.tiles = [weakref.ref(image) for image in images]
        self.calls.append((len(images), tuple(images[0].shape[1:])))
        if sum(image[0].numel() for image in images) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        sizes = [tuple(image.shape[1:]) for image in images]
        return SimpleNamespace(tensors=images, image_sizes=sizes), None

    def backbone(self, images):
        self.alive.append(sum(features() is not None for features in self.features))
        copies = {str(k): image[0].clone() for k, image in enumerate(images)}
        self.features = [weakref.ref(copy) for copy in copies.values()]
        return copies

    def rpn(self, images, features):
        return images, {}

    def predict_boxes(self, features, proposals, sizes):
        return ([image.clone() for image in features.values()],)

    def postprocess_detections(self, features, proposals, sizes):
        return tuple(zip(*(self.find(image.numpy()) for image in features), strict=True))

    def find(self, image):
        boxes, scores = [], []
        for level in np.unique(image[image > 0]):
            rows, columns = np.nonzero(image == level)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            scores.append(len(rows) / 1000 + 0.1)
        return result(boxes, scores)

    def detect_masks(self, features, boxes, labels, sizes):
        masks = []
        for image, own in zip(features.values(), boxes, strict=True):
            masks.append(torch.zeros(len(own), 1, 28, 28))
            for k, box in enumerate(own):
                masks[-1][k, 0] = brightest(image, box)
        return masks


def brightest(image, box):
    """(28, 28) bool: where a box has its most frequent brightness, at the middles of the bins."""
    x, y = ((low + (high - low) * BINS).long() for low, high in box.view(2, 2).T)
    pixels = image[y[:, None], x]
    return pixels == pixels[pixels > 0].mode().values


def result(boxes, scores, labels=None):
    """Boxes, scores and labels as torchvision's heads return them for an image."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels or [1] * len(boxes), dtype=torch.int64)
    return boxes, torch.tensor(scores, dtype=torch.float32), labels


class Scripted(Squares):
    """A model whose detections for the tiles of an image are given; all its masks are `mask`."""

    def __init__(self, *results, mask=1.0):
        super().__init__()
        self.results, self.mask = list(results), torch.as_tensor(mask)

    def find(self, image):
        return self.results.pop(0)

    def detect_masks(self, features, boxes, labels, sizes):
        return [self.mask.expand(len(own), 1, 28, 28) for own in boxes]


def draw(cells, height, width):
    """(3, H, W) uint8 with a brightness of its own for each (top, left, bottom, right)."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, (top, left, bottom, right) in enumerate(cells, start=1):
        image[:, top:bottom, left:right] = number
    return image


@pytest.mark.parametrize(("turns", "mirrored"), list(product(range(4), (False, True))))
def test_every_view_is_undone_exactly(turns, mirrored):
    # An L of 28 x 28 px, so that each bin is a pixel, off the middle of an oblong image
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 10:38, 50:60] = 1
    image[:, 31:38, 50:78] = 1
    model = Squares()
    found = detect([model], image, make_config("demo"), [View(turns, mirrored)])
    assert model.calls[0][1] == ((60, 90) if turns % 2 == 0 else (90, 60))
    assert np.allclose(found.boxes, [[50, 10, 78, 38]], atol=1e-4)
    assert np.array_equal(decoded(found)[0], (image[0] == 1).numpy())


def test_views_are_turned_to_the_left_then_mirrored():
    image = torch.arange(6).view(1, 2, 3)
    box = torch.tensor([[0.2, 0.0, 0.6, 0.5]])  # the corners (.2, 0), (.6, .5): x -> 1 - x
    assert View(0, True).apply_to_boxes(box).allclose(torch.tensor([[0.4, 0.0, 0.8, 0.5]]))
    # (x, y) -> (y, 1 - x), then mirrored: (1 - y, 1 - x)
    assert View(1, False).apply_to_boxes(box).allclose(torch.tensor([[0.0, 0.4, 0.5, 0.8]]))
    assert View(1, True).apply_to_boxes(box).allclose(torch.tensor([[0.5, 0.4, 1.0, 0.8]]))
    assert View(3, False).apply_to_boxes(box[:0]).shape == (0, 4)
    assert View(0, True).apply(image)[0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert View(1, False).apply(image)[0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert View(1, True).apply(image)[0].tolist() == [[5, 2], [4, 1], [3, 0]]


def test_tiles_cover_a_side_and_overlap_by_half():
    assert tile_corners(50, 0) == tile_corners(50, 64) == tile_corners(64, 64) == [0]
    assert tile_corners(65, 64) == [0, 1]
    assert tile_corners(128, 64) == [0, 32, 64]
    for length in range(65, 400, 7):
        corners = tile_corners(length, 64)
        assert (corners[0], corners[-1]) == (0, length - 64)
        assert max(np.diff(corners)) <= 32


@pytest.mark.parametrize("view", [View(0, False), View(3, True)])
def test_instances_on_every_seam_are_detected_once(view):
    cells = [(y, x, y + 12, x + 12) for y in range(2, 150, 15) for x in range(2, 190, 15)]
    image, model = draw(cells, 160, 200), Squares()
    found = detect([model], image, make_config("demo", tile=64, detections=1000), [view])
    assert sorted(map(tuple, found.boxes[:, [1, 0, 3, 2]].round(3).tolist())) == sorted(cells)
    assert {size for _, size in model.calls} == {(64, 64)}
    assert np.array_equal(decoded(found).sum(0), (image[0] > 0).numpy())


def test_an_instance_larger_than_the_overlap_stays():
    image = draw([(10, 4, 40, 92)], 64, 100)
    found = detect([Squares()], image, make_config("demo", tile=64))
    assert len(found) >= 1
    assert found.boxes[0].tolist()[1::2] == [10, 40]


WIDE = torch.zeros(3, 64, 96, dtype=torch.uint8)  # tiles of 64 px begin at x = 0 and 32


def scores_on_wide(*tiles, **changes):
    """Rounded scores that stay of [(box, score, label), ..] in each tile of WIDE."""
    results = [result(*([row[k] for row in tile] for k in range(3))) for tile in tiles]
    found = detect([Scripted(*results)], WIDE, make_config("demo", tile=64, **changes))
    return found.scores.astype(float).round(2).tolist()


def test_a_cut_detection_counts_where_no_other_tile_is_nearer():
    """The middles of the tiles are at 32 and 64 px, so that the boundary is at 48 px."""
    whole = [12, 10, 42, 30], 0.4, 1  # in the second tile, from 44 px on in the image
    assert scores_on_wide([([44, 10, 64, 30], 0.9, 1)], [whole]) == [0.4]  # the better one is cut
    assert scores_on_wide([([44, 10, 63.4, 30], 0.9, 2)], [whole]) == [0.4]  # by less than a pixel
    assert scores_on_wide([([44, 10, 62.9, 30], 0.9, 2)], [whole]) == [0.9, 0.4]
    assert scores_on_wide([], [([0.6, 10, 16, 30], 0.9, 2)]) == []  # the left edge, middle 40 px
    assert scores_on_wide([], [([1.1, 10, 16, 30], 0.9, 2)]) == [0.9]
    assert scores_on_wide([([34, 10, 64, 30], 0.9, 2)], []) == []  # middle 49 px
    assert scores_on_wide([([30, 10, 64, 30], 0.9, 2)], []) == [0.9]  # middle 47 px, whole in none
    border = ([0, 10, 20, 30], 0.8, 1), ([44, 44, 64, 64], 0.7, 2)  # of the image: no cut
    assert scores_on_wide(border[:1], border[1:]) == [0.8, 0.7]


def test_of_duplicates_in_two_tiles_the_better_stays():
    """Boxes from 36 to 56 and from 40 to 60 px: IoU 2/3."""
    first, second = ([36, 10, 56, 30], 0.6, 1), ([8, 10, 28, 30], 0.8, 1)
    assert scores_on_wide([first], [second]) == [0.8]
    assert scores_on_wide([first], [(*second[:2], 2)]) == [0.8, 0.6]  # of another class
    assert scores_on_wide([first], [second], fusion_iou=0.7) == [0.8, 0.6]
    assert scores_on_wide([first, ([1, 1, 9, 9], 0.5, 1)], [second], detections=1) == [0.8]


def test_one_tile_is_the_whole_image(tiny_config):
    config = change_config(tiny_config, dict(score_threshold=0.0))
    model, image = build_model(config), field_of_cells(0, 64).image
    whole = detect([model], image, config)
    assert len(whole) > 0
    assert (np.diff(whole.scores) <= 0).all()
    assert (whole.size, {tuple(rle["size"]) for rle in whole.rles}) == ((64, 64), {(64, 64)})
    for tile in (64, 100):
        tiled = detect([model], image, change_config(config, dict(tile=tile)))
        assert (tiled.rles, tiled.boxes.tolist()) == (whole.rles, whole.boxes.tolist())
    tiles = detect([model], image, change_config(config, dict(tile=40, detections=7)))
    assert 0 < len(tiles) <= 7


def test_a_whole_image_in_one_view_is_what_the_model_returns(tiny_config):
    config = change_config(tiny_config, dict(score_threshold=0.0, scale=1.5))
    model, image = build_model(config).eval(), field_of_cells(0, 70).image[:, :50]
    found = detect([model], image, config)
    with torch.inference_mode():
        (wanted,) = model([image])
    rles = paste_masks(wanted["masks"][:, 0], wanted["boxes"], (50, 70), config.mask_threshold)
    stay = [k for k, rle in enumerate(rles) if rle]
    assert len(stay) > 10
    assert found.rles == [rles[k] for k in stay]
    assert np.allclose(found.boxes, wanted["boxes"][stay], atol=1e-4)
    assert (found.scores == wanted["scores"][stay].numpy()).all()
    assert (found.labels == wanted["labels"][stay].numpy()).all()


# Masks


def test_a_mask_is_the_mean_of_all_models_and_views():
    """One model says 1, the other .2 in the left half and .6 in the right one: means .6 and .8."""
    halves = torch.tensor([0.2] * 14 + [0.6] * 14)
    image, boxes = torch.zeros(3, 40, 60).byte(), ([[10, 10, 30, 20]], [0.8])
    for threshold, area in ((0.55, 200), (0.65, 100), (0.85, 0)):
        models = [Scripted(result(*boxes)), Scripted(result(*boxes), mask=halves)]
        found = detect(models, image, make_config("demo", mask_threshold=threshold))
        assert decoded(found).sum() == area
        assert len(found) == (area > 0)
    # Left to right, the halves of the second view are those of the image the other way round
    model = Scripted(result(*boxes), result([[30, 10, 50, 20]], [0.8]), mask=halves)
    views = [View(), View(0, True)]
    config = make_config("demo", mask_threshold=0.39)
    assert decoded(detect([model], image, config, views)).sum() == 200  # .4 everywhere
    model.results = [result(*boxes), result([[30, 10, 50, 20]], [0.8])]
    config = make_config("demo", mask_threshold=0.41)
    assert len(detect([model], image, config, views)) == 0


def test_features_are_kept_for_the_masks_while_there_is_room(monkeypatch):
    """25 tiles, so 7 batches in each of two views; features of 4 tiles of 32 px take 4096 bytes."""
    image = draw([(5, 5, 15, 15), (50, 60, 60, 70)], 96, 96)
    for room, calls, alive in ((0, 28, 0), (10_000, 26, 4), (10**9, 14, 4)):
        monkeypatch.setattr(module, "KEPT_FEATURES", room)
        model = Squares()
        assert len(detect([model], image, make_config("demo", tile=32), [View(), View(1)])) == 2
        assert (len(model.calls), max(model.alive)) == (calls, alive)
    monkeypatch.setattr(module, "KEPT_FEATURES", 0)
    model = Squares()
    assert len(detect([model], image, make_config("demo"))) == 2
    assert len(model.calls) == 1  # one batch is always kept


@pytest.mark.parametrize("tile", [0, 32])
def test_nothing_is_detected_in_an_empty_image(tile):
    views = [View(), View(1, True)]
    found = detect([Squares()], draw([], 40, 50), make_config("demo", tile=tile), views)
    assert (len(found), found.boxes.shape, found.size) == (0, (0, 4), (40, 50))
    assert [v.dtype for v in (found.boxes, found.scores)] == [np.float32] * 2
    assert found.labels.dtype == np.int64


def test_settings_are_those_of_the_call(tiny_config):
    model, image = build_model(tiny_config), field_of_cells(0, 64).image
    changes = dict(score_threshold=0.02, box_nms=0.33, detections=7)
    detect([model], image, change_config(tiny_config, changes))
    heads = model.roi_heads
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.02, 0.33, 7)
    assert not model.training
    assert len(detect([model], image, change_config(tiny_config, dict(score_threshold=1.0)))) == 0


# Boxes of several views and models fused

BOXES = [[0, 0, 30, 10], [10, 0, 30, 10], [40, 0, 70, 10], [20, 0, 50, 10]]  # IoU of 0 and 1: 2/3


def part(boxes, scores, labels=None):
    """Detections (n, 6) of one model and view."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor(labels or [1] * len(boxes))
    return torch.column_stack([boxes, torch.tensor(scores, dtype=torch.float32), labels])


def test_models_fused_worked_by_hand():
    first = part([BOXES[0], BOXES[2]], [0.9, 0.6], [1, 3])
    second = part([BOXES[1], BOXES[2], BOXES[2]], [0.6, 0.3, 0.2], [1, 3, 3])
    third = part([BOXES[1]], [0.8], [2])
    config = make_config("demo", fusion_iou=0.5, score_threshold=0.01)
    # Boxes 0 and 1 are one instance where the class is the same. A model has one voice: its best.
    fused = fuse_boxes([first, second, third], config)
    assert fused[:, 5].tolist() == [1, 3, 2]
    assert fused[:, 4].tolist() == pytest.approx([1.5 / 3, 0.9 / 3, 0.8 / 3])
    assert fused[0, :4].tolist() == pytest.approx([4, 0, 30, 10])  # 0 by 0.9 and 10 by 0.6
    assert fused[1:, :4].tolist() == [pytest.approx(BOXES[2]), BOXES[1]]
    strict = fuse_boxes([first, second, third], replace(config, fusion_iou=0.7))
    assert sorted(strict[:, 5].tolist()) == [1, 1, 2, 3]
    assert len(fuse_boxes([first, second, third], replace(config, detections=2))) == 2
    empty = first[:0]
    assert fuse_boxes([first, empty], config)[:, 4].tolist() == pytest.approx([0.45, 0.3])
    assert fuse_boxes([empty, empty], config).shape == (0, 6)


def test_a_box_counts_for_the_instance_that_it_overlaps_most():
    """Two instances of IoU 1/3, and a second view with one box between: IoU 2/3 and 3/5."""
    first = part([[0, 0, 20, 10], [10, 0, 30, 10]], [0.9, 0.8])
    second = part([[4, 0, 24, 10]], [0.7])
    fused = fuse_boxes([first, second], make_config("demo", fusion_iou=0.5))
    assert fused[:, 4].tolist() == pytest.approx([0.8, 0.4])
    assert fused[1, :4].tolist() == pytest.approx([10, 0, 30, 10])


def test_the_threshold_holds_for_fused_scores_and_includes_its_value():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    for threshold, count in ((0.5, 1), (0.51, 0)):
        models = [Scripted(result(BOXES[:1], [score])) for score in (0.75, 0.25)]
        config = make_config("demo", score_threshold=threshold)
        assert len(detect(models, image, config)) == count


@pytest.mark.parametrize("views", [[View()], [View(), View(1), View(2, True)]])
def test_a_threshold_leaves_out_what_it_says_and_nothing_else(tiny_config, views):
    """Of several views too: one that scores lower is not taken for one that sees nothing."""
    model, image = build_model(tiny_config), field_of_cells(0, 64).image
    every = detect([model], image, replace(tiny_config, score_threshold=0.05), views)
    threshold = float(np.median(every.scores))
    above, direct = (
        every.above(threshold),
        detect([model], image, replace(tiny_config, score_threshold=threshold), views),
    )
    assert 0 < len(above) < len(every)
    assert direct.scores.tolist() == above.scores.tolist()
    assert direct.rles == above.rles


def test_boxes_end_with_the_image():
    """Where boxes are averaged they may be rounded to outside of a large image."""
    image = torch.zeros(3, 10, 40, dtype=torch.uint8)
    found = detect([Scripted(result([[30, 0, 40.004, 10.004]], [0.9]))], image, make_config("demo"))
    assert found.boxes.tolist() == [[30, 0, 40, 10]]


def test_equal_scores_keep_their_order_and_may_be_zero():
    config = make_config("demo", score_threshold=0.0)
    for score in (0.5, 0.0):
        parts = [part([BOXES[0], BOXES[2]], [score] * 2, [2, 1]), part(BOXES[3:], [score])]
        assert fuse_boxes(parts, config)[:, :4].tolist() == [
            pytest.approx(box) for box in (BOXES[0], BOXES[2], BOXES[3])
        ]


def random_parts(rng, count):
    """Three models' detections of an image: some of the same boxes, other scores."""
    corners, sides = rng.integers(0, 60, (count, 2)), rng.integers(5, 25, (count, 2))
    boxes, labels = np.concatenate([corners, corners + sides], 1), rng.integers(1, 4, count)
    chosen = [rng.permutation(count)[: rng.integers(0, count + 1)] for _ in range(3)]
    return [part(boxes[c], rng.random(len(c)), labels[c].tolist()) for c in chosen]


@settings(max_examples=60, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from([0.3, 0.7, 1.0]))
def test_fused_detections_keep_what_all_outputs_rely_on(seed, iou):
    parts = random_parts(np.random.default_rng(seed), 12)
    config = make_config("demo", fusion_iou=iou, score_threshold=0.0, detections=40)
    fused, rows = fuse_boxes(parts, config), torch.cat(parts)
    assert fused.isfinite().all()
    assert (fused[:, 4].diff() <= 0).all()
    assert (fused[:, 2:4] > fused[:, :2]).all()
    assert {*fused[:, 5].tolist()} == {*rows[:, 5].tolist()}
    for label in rows[:, 5].unique():
        of_rows, of_fused = rows[rows[:, 5] == label, :5], fused[fused[:, 5] == label, :5]
        assert of_fused[:, 4].sum() <= of_rows[:, 4].sum() / 3 + 1e-5  # no score counts twice
        assert (of_fused[:, :4] >= of_rows[:, :4].amin(0) - 1e-3).all()
        assert (of_fused[:, :4] <= of_rows[:, :4].amax(0) + 1e-3).all()
    again = fuse_boxes(parts[::-1], config)
    assert torch.allclose(again[:, 4].sort()[0], fused[:, 4].sort()[0])


def test_blocks_of_boxes_change_nothing():
    """700 distinct boxes, over two blocks of 256, by two models: each is one instance."""
    x, y = torch.meshgrid(torch.arange(28) * 20, torch.arange(25) * 20, indexing="ij")
    corner = torch.stack([x.flatten(), y.flatten()], 1)
    boxes, scores = torch.cat([corner, corner + 15], 1), torch.linspace(0.99, 0.1, 700)
    rows = torch.column_stack([boxes, scores, torch.ones(700)])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    config = make_config("demo", score_threshold=0.0, detections=1000)
    assert torch.allclose(fuse_boxes([rows, rows[order]], config), rows, atol=1e-3)


# Memory


def test_full_memory_shrinks_batches_then_tiles(monkeypatch, capsys):
    model, image = Squares(150 * 150), draw([(5, 5, 33, 33)], 600, 600)
    alive = []  # for each time that memory is freed: how many of the failed tiles still exist

    def free():
        alive.append(sum(tile() is not None for tile in model.tiles))

    monkeypatch.setattr(module, "free_memory", free)
    found = detect([model], image, make_config("demo", tile=300))
    assert model.calls[:5] == [
        (4, (300, 300)),
        (2, (300, 300)),
        (1, (300, 300)),
        (1, (150, 150)),
        (1, (150, 150)),
    ]
    assert alive == [0, 0, 0]
    assert np.allclose(found.boxes, [[5, 5, 33, 33]], atol=1e-4)
    assert "1 tile(s) of 150 px at a time" in capsys.readouterr().out
    model.calls.clear()
    detect([model], image, make_config("demo", tile=300))
    assert {call[:2] for call in model.calls} == {(1, (150, 150))}  # remembered
    model.calls.clear()
    detect([model], image, make_config("demo"))  # whole images
    assert [call[1] for call in model.calls[:4]] == [(600, 600), (300, 300), (150, 150), (150, 150)]


def test_memory_for_not_one_small_tile_is_an_error():
    model, image = Squares(limit=0), draw([], 200, 300)
    with pytest.raises(torch.OutOfMemoryError):
        detect([model], image, make_config("demo"))
    assert [call[1] for call in model.calls] == [(200, 300), (150, 150), (128, 128)]
    with pytest.raises(RuntimeError, match="another"):
        detect([Raises(RuntimeError("another"))], image, make_config("demo"))


class Raises(Squares):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __call__(self, images):
        raise self.error
