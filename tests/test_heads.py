from dataclasses import replace

from hypothesis import given, settings, strategies
import numpy as np
import pycocotools.mask
import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from src_snippets.data.structures import ground_truth
from src_snippets.data.transforms import training_target
from src_snippets.model.detect import paste_masks
from src_snippets.model.heads import (
    BlockMatcher,
    mask_loss,
    sample_mask_targets,
)
from src_snippets.model.mask_rcnn import build_model
from tests.conftest import (
    dense_masks,
    field_of_cells,
    make_sample,
    random_boxes,
    read_cell_folder,
    real_data,
)
from tests.pretended_gpu import pretended_gpu


def matchers(high=0.7, low=0.3, every_instance=True):
    return [kind(high, low, every_instance) for kind in (Matcher, BlockMatcher)]


def grid_anchors(side):
    """Anchors of 8 and 32 px as the model lays them on an image of `side` px."""
    make = AnchorGenerator(((8,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    levels = [torch.zeros(1, 1, side // stride, side // stride) for stride in (4, 8)]
    return make(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), levels)[0]


# Mask targets


def test_target_worked_by_hand():
    ids = np.zeros((8, 8), np.int64)
    ids[2:4, 2:6] = 1  # the upper half of the box
    target = training_target(make_sample([ids], [1]))
    box = torch.tensor([[2.0, 2.0, 6.0, 6.0]])
    found = sample_mask_targets(target, box, torch.tensor([0]), 4)
    assert found[0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    # Half a pixel to the right and down: a quarter, a half or all of a bin.
    found = sample_mask_targets(target, box + 0.5, torch.tensor([0]), 4)
    assert found[0].tolist() == [[1, 1, 1, 0.5], [0.5, 0.5, 0.5, 0.25], [0] * 4, [0] * 4]
    nothing = sample_mask_targets(target, box[:0], torch.zeros(0, dtype=torch.int64), 4)
    assert nothing.shape == (0, 4, 4)


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.integers(1, 150), strategies.integers(1, 8))
def test_targets_are_means_of_dense_masks(seed, count, step):
    """Boxes on whole pixels, with one point in the middle of each pixel."""
    sample = field_of_cells(seed, 60)
    target = training_target(sample)
    torch.manual_seed(seed)
    matched = torch.randint(len(target["ids"]), (count,))
    x, y = torch.randint(0, 60 - 5 * step, (2, count))
    boxes = torch.stack([x, y, x + 5 * step, y + 5 * step], 1).float()
    found = sample_mask_targets(target, boxes, matched, 5, points=step)
    masks = dense_masks(sample)[target["ids"][matched] - 1].float()
    for mask, (left, top, right, bottom), own in zip(masks, boxes.long(), found, strict=True):
        crop = mask[None, top:bottom, left:right]
        assert torch.allclose(own, torch.nn.functional.avg_pool2d(crop, step)[0])


def test_overlapping_instances_are_distinguished_by_layer():
    one, two = np.zeros((10, 10), np.int64), np.zeros((10, 10), np.int64)
    one[0:6, 0:6], two[4:10, 4:10] = 1, 1
    target = training_target(make_sample([one, two], [1, 2]))
    assert target["layers"].shape[0] == 2
    found = sample_mask_targets(target, target["boxes"], torch.tensor([0, 1]), 6)
    assert found.min() == 1


def test_a_large_image_needs_no_large_arrays():
    """5,000 boxes of an image of 2000 px: dense masks would take 20 GB."""
    ids = np.zeros((2000, 2000), np.int64)
    ids[::40, ::40] = np.arange(1, 2501).reshape(50, 50)
    target = dict(layers=torch.from_numpy(ids)[None], ids=torch.arange(1, 2501))
    target |= dict(layer_index=torch.zeros(2500, dtype=torch.int64))
    corner = 40.0 * torch.stack([torch.arange(2500) % 50, torch.arange(2500) // 50], 1)
    boxes = torch.cat([corner, corner + 2], 1).repeat(2, 1)
    found = sample_mask_targets(target, boxes, torch.arange(5000) % 2500, 28)
    assert found.mean().item() == 0.25


def test_a_perfect_head_loses_nothing():
    """IoU of each instance with itself after target and paste, on the real image."""
    sample = read_cell_folder(real_data("hw3-real") / "train" / "sample", 4)
    target, truth = training_target(sample), ground_truth(sample).rles
    every = torch.arange(len(target["ids"]))
    masks = sample_mask_targets(target, target["boxes"], every, 28)
    pasted = paste_masks(masks, target["boxes"], sample.size, 0.5)
    pairs = zip(pasted, (truth[index - 1] for index in target["ids"]), strict=True)
    ious = [pycocotools.mask.iou([a], [b], [0])[0, 0] for a, b in pairs]
    assert len(ious) > 100
    assert min(ious) == 1.0


def test_mask_loss_by_hand():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 100.0
    targets = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert mask_loss(logits, torch.tensor([2]), targets).item() == pytest.approx(25.0)
    assert mask_loss(logits, torch.tensor([1]), targets).item() == pytest.approx(np.log(2))
    assert mask_loss(logits[:0], torch.zeros(0, dtype=torch.int64), targets[:0]).item() == 0


# Matching


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31), strategies.booleans())
def test_matches_equal_torchvisions(seed, on_grid):
    instances, anchors = random_boxes(9, 300, 300, seed), random_boxes(9000, 300, 300, seed + 1)
    anchors[:40] = anchors[40:80]  # ties
    anchors[4000:4040] = anchors[:40]  # in another block
    anchors = grid_anchors(300) if on_grid else anchors
    for theirs, ours in (matchers(), matchers(0.5, 0.5, every_instance=False)):
        for count in (9, 1):
            chosen = instances[-count:]
            assert torch.equal(ours((chosen, anchors)), theirs(box_iou(chosen, anchors)))


def test_matches_worked_by_hand():
    instances = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110], [300, 300, 310, 310]])
    anchors = torch.tensor(
        [[0.0, 0, 10, 9], [0, 0, 10, 5], [0, 0, 10, 2], [100, 100, 110, 101], [50, 50, 60, 60]]
    )
    # IoU .9 and .5 and .2 with the first; .1, but the best, with the second; none with the third.
    _, ours = matchers()
    assert ours((instances, anchors)).tolist() == [0, -2, -1, 1, -1]
    _, ours = matchers(every_instance=False)
    assert ours((instances, anchors)).tolist() == [0, -2, -1, -1, -1]
    anchors = torch.tensor([[0.0, 0, 10, 5], [0, 0, 5, 5]])  # IoU exactly .5 and .25
    for matcher in matchers(0.5, 0.25, every_instance=False):
        pair = instances[:1], anchors
        is_ours = isinstance(matcher, BlockMatcher)
        assert matcher(pair if is_ours else box_iou(*pair)).tolist() == [0, -2]


def test_an_instance_that_touches_no_anchor_matches_none():
    instances, anchors = random_boxes(9, 90, 90, 5), random_boxes(300, 90, 90, 6)
    theirs, ours = matchers()
    more = torch.cat([instances, torch.tensor([[500.0, 500.0, 510.0, 510.0]])])
    assert torch.equal(ours((more, anchors)), theirs(box_iou(instances, anchors)))
    assert (ours((more[-1:], anchors)) == -1).all()
    beside = torch.tensor([[0.0, 0.0, 10.0, 10.0]])  # the block's box touches it, no anchor does
    corners = torch.tensor([[-5.0, -5.0, 0.0, 20.0], [10.0, -5.0, 15.0, 20.0]])
    assert ours((beside, corners)).tolist() == [-1, -1]


def test_blocks_on_a_gpu_do_not_grow_with_the_instances(monkeypatch):
    """2e7 pairs at a time, with blocks of 8,192 anchors or more."""
    pairs = []

    def counted(instances, anchors):
        pairs.append(len(instances) * len(anchors))
        return torch.zeros((len(instances), len(anchors)), device="cuda")

    monkeypatch.setattr("src_snippets.model.heads.ops.box_iou", counted)
    with pretended_gpu():
        box = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).to("cuda")
        for count in (100, 1000):
            BlockMatcher(0.5, 0.5)((box.repeat(count, 1), box.repeat(70_000, 1)))
    assert pairs == [100 * 70_000, *[1000 * 20_000] * 3, 1000 * 10_000]


def test_only_touching_instances_are_compared(monkeypatch):
    """1,000 instances and 54,000 anchors: a table of all pairs would have 54 million."""
    pairs = []

    def count_pairs(instances, anchors):
        pairs.append(len(instances) * len(anchors))
        return box_iou(instances, anchors)

    monkeypatch.setattr("src_snippets.model.heads.ops.box_iou", count_pairs)
    corner = torch.stack([torch.arange(1000) % 32, torch.arange(1000) // 32], 1) * 15.0
    instances, anchors = torch.cat([corner, corner + 12], 1), grid_anchors(480)
    _, ours = matchers()
    assert set(ours((instances, anchors)).tolist()) >= set(range(1000))
    assert sum(pairs) < 0.25 * len(instances) * len(anchors)


# Mixed precision


def test_under_mixed_precision_anchors_and_boxes_are_float32(tiny_config):
    model = build_model(tiny_config).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        images, _ = model.transform([torch.zeros(3, 1024, 1024, dtype=torch.uint8)])
        features = model.backbone(images.tensors)
        assert features["0"].dtype == torch.bfloat16
        logits, offsets = model.rpn.head(list(features.values()))
        assert {v.dtype for v in logits + offsets} == {torch.float32}
        anchors = model.rpn.anchor_generator(images, list(features.values()))
        box = [torch.tensor([[0.0, 0.0, 9.0, 9.0]])]
        found = model.roi_heads.predict_boxes(features, box, images.image_sizes)
        assert {v.dtype for v in found} == {torch.float32}
    full = AnchorGenerator(
        model.rpn.anchor_generator.sizes, model.rpn.anchor_generator.aspect_ratios
    )
    wanted = full(images, [features[key].float() for key in features])
    assert anchors[0].dtype == torch.float32
    assert torch.equal(anchors[0], wanted[0])


def test_masks_in_chunks_equal_masks_at_once(tiny_config):
    """Chunks of 200: with 450 and 3 detections in a batch."""
    heads = build_model(replace(tiny_config, score_threshold=0.0)).eval().roi_heads
    torch.manual_seed(0)
    features = {str(k): torch.randn(2, 16, 64 >> k, 64 >> k) for k in range(4)}
    boxes = [random_boxes(450, 256, 256, 0), random_boxes(3, 256, 256, 1)]
    labels = [torch.randint(1, 5, (len(own),)) for own in boxes]
    with torch.inference_mode():
        found = heads.detect_masks(features, boxes, labels, [(256, 256)] * 2)
        logits = heads.predict_masks(features, boxes, [(256, 256)] * 2)
        own = logits[torch.arange(453), torch.cat(labels)].sigmoid()[:, None]
    assert torch.allclose(torch.cat(found), own, atol=1e-5)
    assert [len(masks) for masks in found] == [450, 3]


def test_targets_without_maps_are_refused(tiny_config):
    model, image = build_model(tiny_config).train(), field_of_cells(0, 64).image
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected those of training_target"):
        model([image], [target])
