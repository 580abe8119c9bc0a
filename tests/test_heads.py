from dataclasses import replace
from functools import partial

from hypothesis import given, settings, strategies
import numpy as np
import pycocotools.mask
import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_iou, MultiScaleRoIAlign, roi_align

from src_snippets.config import recipe
from src_snippets.heads import (
    BlockMatcher,
    build_pooler,
    CASCADE,
    CascadeRoIHeads,
    Float32Anchors,
    mask_loss,
    mask_targets,
    MatrixRoIAlign,
    paired_iou,
    similar_chunks,
    touching_blocks,
    within_crowds,
)
from src_snippets.model import (
    build_model,
    InputTransform,
    paste_masks,
)
from src_snippets.transforms import training_target
from tests.conftest import dense_masks, detect, field_of_cells, make_sample, random_boxes


def matchers(high=0.7, low=0.3, every_cell=True):
    return [kind(high, low, every_cell) for kind in (Matcher, BlockMatcher)]


def grid_anchors(side):
    """Anchors of 8 and 32 px as the model lays them on a field of `side` px."""
    make = AnchorGenerator(((8,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    levels = [torch.zeros(1, 1, side // stride, side // stride) for stride in (4, 8)]
    return make(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), levels)[0]


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.booleans())
def test_targets_equal_roi_align_on_dense_masks(seed, half_pixel):
    sample = field_of_cells(seed, 96)
    target = training_target(sample, 1)
    boxes = random_boxes(20, 96, 96, seed)
    matched = torch.randint(
        len(target["ids"]), (20,), generator=torch.Generator().manual_seed(seed)
    )
    rois = torch.cat([matched[:, None].float(), boxes], 1)
    wanted = roi_align(dense_masks(sample)[:, None].float(), rois, 28, 1.0, -1, half_pixel)[:, 0]
    found = mask_targets(target, boxes, matched, 28, half_pixel)
    assert torch.allclose(found, wanted, atol=1e-5)
    if not half_pixel:
        stock = project_masks_on_boxes(dense_masks(sample), boxes, matched, 28)
        assert torch.allclose(found, stock, atol=1e-5)


def gradients(align, features, rois, weights, *options):
    """The gradients of the features for a weighted sum of what is pooled."""
    pooled = align(features, rois, *options)
    return torch.autograd.grad((pooled * weights).sum(), features)[0]


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31), strategies.sampled_from((1, 7, 14)), strategies.booleans())
def test_roi_align_and_its_way_back_are_torchvisions(seed, bins, channels_last):
    """Boxes of less than a pixel, of the whole field, and partly or wholly outside, too."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(2, 3, 20, 31).to(memory_format=layout).requires_grad_()
    low, side = torch.rand(40, 2) * 200 - 40, torch.rand(40, 2) ** 3 * 130
    rois = torch.cat([torch.randint(2, (40, 1)).float(), low, low + side], 1)
    known = features, rois, torch.randn(40, 3, bins, bins), bins, 0.25, 2
    pooled = [align(*known[:2], *known[3:]) for align in (MatrixRoIAlign.apply, roi_align)]
    assert torch.allclose(*pooled, atol=1e-5)
    ours, stock = gradients(MatrixRoIAlign.apply, *known), gradients(roi_align, *known)
    assert torch.allclose(ours, stock, atol=1e-4)
    nothing = gradients(MatrixRoIAlign.apply, features, rois[:0], torch.zeros(()), bins, 0.25, 2)
    assert not nothing.any()


def test_a_pooler_gives_what_torchvisions_does():
    torch.manual_seed(0)
    config = recipe("baseline")
    sides = [(256 >> k, 256 >> k) for k in range(4)]
    maps = {str(k): torch.randn(2, 4, *side, requires_grad=True) for k, side in enumerate(sides)}
    low = torch.rand(2, 30, 2) * 300
    boxes = [*torch.cat([low, low + 8 + torch.rand(2, 30, 2) ** 2 * 700], 2)]
    ours, stock = build_pooler(config, 7), MultiScaleRoIAlign(list(maps), 7, 2)
    assert (ours.map_levels(boxes).bincount(minlength=4) > 0).all()
    pooled = [pooler(maps, boxes, [(1024, 1024)] * 2) for pooler in (ours, stock)]
    assert torch.allclose(*pooled, atol=1e-5)
    weights = torch.randn_like(pooled[0])
    found, wanted = (torch.autograd.grad((p * weights).sum(), [*maps.values()]) for p in pooled)
    assert all(map(partial(torch.allclose, atol=1e-4), found, wanted))
    with torch.autocast("cpu", torch.bfloat16):
        half = {name: values.bfloat16() for name, values in maps.items()}
        pooled, wanted = (pooler(half, boxes, [(1024, 1024)] * 2) for pooler in (ours, stock))
    assert pooled.dtype == torch.bfloat16
    assert torch.allclose(pooled.float(), wanted.float(), atol=0.01, rtol=0.01)  # one rounding
    pooled.float().sum().backward()
    assert all(values.grad.isfinite().all() for values in maps.values())


def test_target_worked_by_hand():
    ids = np.zeros((8, 8), np.int64)
    ids[2:4, 2:6] = 1  # the upper half of the box
    target = training_target(make_sample([ids], [1]), 1)
    box = torch.tensor([[2.0, 2.0, 6.0, 6.0]])
    found = mask_targets(target, box, torch.tensor([0]), 4, half_pixel=True)
    assert found[0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    nothing = mask_targets(target, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 4, True)
    assert nothing.shape == (0, 4, 4)


def test_overlapping_cells_are_told_apart_by_layer():
    one, two = np.zeros((10, 10), np.int64), np.zeros((10, 10), np.int64)
    one[0:6, 0:6], two[4:10, 4:10] = 1, 1
    target = training_target(make_sample([one, two], [1, 2]), 1)
    assert target["layers"].shape[0] == 2
    found = mask_targets(target, target["boxes"], torch.tensor([0, 1]), 6, half_pixel=True)
    assert found.min() == 1


def test_mask_loss_by_hand():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 100.0
    wanted = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    assert mask_loss(logits, torch.tensor([2]), wanted).item() == pytest.approx(25.0)
    assert mask_loss(logits, torch.tensor([1]), wanted).item() == pytest.approx(np.log(2))
    empty = mask_loss(logits[:0], torch.zeros(0, dtype=torch.int64), wanted[:0])
    assert empty.item() == 0


def test_mixed_precision_keeps_anchors_exact(tiny_config):
    anchors = Float32Anchors(((8,),), ((1.0,),))
    images = InputTransform(recipe("demo"))([torch.zeros(3, 1024, 1024, dtype=torch.uint8)])[0]
    (half,) = anchors(images, [torch.zeros(1, 4, 256, 256, dtype=torch.bfloat16)])
    (full,) = anchors(images, [torch.zeros(1, 4, 256, 256)])
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
    config = replace(tiny_config, precision="bf16", score_floor=0.0)
    model, image = build_model(config), field_of_cells().image
    (found,) = detect(model, [image], config)
    assert found.boxes.dtype == np.float32
    assert len(np.unique(found.boxes)) > len(np.unique(np.round(found.boxes)))


def test_under_mixed_precision_boxes_are_decoded_in_float32(tiny_config):
    model = build_model(tiny_config).eval()
    images = InputTransform(recipe("demo"))([torch.zeros(3, 64, 64, dtype=torch.uint8)])[0]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        features = model.backbone(images.tensors)
        assert features["0"].dtype == torch.bfloat16
        logits, offsets = model.rpn.head(list(features.values()))
        assert {v.dtype for v in logits + offsets} == {torch.float32}
        anchors = model.rpn.anchor_generator(images, list(features.values()))
        assert anchors[0].dtype == torch.float32
        box = [torch.tensor([[0.0, 0.0, 9.0, 9.0]])]
        found = model.roi_heads.predict_boxes(features, box, images.image_sizes)
        assert {v.dtype for v in found} == {torch.float32}


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31), strategies.booleans())
def test_matches_by_block_equal_torchvisions(seed, on_grid):
    cells, anchors = random_boxes(9, 300, 300, seed), random_boxes(9000, 300, 300, seed + 1)
    anchors[:40] = anchors[40:80]  # ties
    anchors = grid_anchors(300) if on_grid else anchors
    for stock, ours in (matchers(), matchers(0.5, 0.5, every_cell=False)):
        for count in (9, 1):
            chosen = cells[-count:]
            assert torch.equal(ours((chosen, anchors)), stock(box_iou(chosen, anchors)))


def test_a_cell_that_touches_no_anchor_gets_none():
    cells, anchors = random_boxes(9, 90, 90, 5), random_boxes(300, 90, 90, 6)
    stock, ours = matchers()
    with_it = torch.cat([cells, torch.tensor([[500.0, 500.0, 510.0, 510.0]])])
    assert torch.equal(ours((with_it, anchors)), stock(box_iou(cells, anchors)))
    assert (ours((with_it[-1:], anchors)) == -1).all()


def test_paired_iou_is_torchvisions_to_the_bit():
    cells, anchors = random_boxes(20, 90, 90, 5), random_boxes(300, 90, 90, 6)
    assert torch.equal(paired_iou(cells, anchors), box_iou(cells, anchors))


def test_blocks_hold_a_limited_number_of_pairs():
    cells, anchors = random_boxes(50, 90, 90, 5), random_boxes(300, 90, 90, 6)
    blocks = list(touching_blocks(cells, anchors, size=128, limit=1000))
    assert max((part.stop - part.start) * len(near) for part, near in blocks) <= 1000
    covered = torch.cat([torch.arange(300)[part] for part, _ in blocks])
    assert covered.tolist() == list(range(300))
    pairs = {(c, a) for part, near in blocks for a in range(300)[part] for c in near.tolist()}
    assert set(map(tuple, (box_iou(cells, anchors) > 0).nonzero().tolist())) <= pairs


def test_a_long_thin_box_costs_its_own_area():
    spans = torch.tensor([[6, 4000], [5, 7], [4000, 6], [6, 5]])
    chunks = [(part.tolist(), rows, columns) for part, rows, columns in similar_chunks(spans, 100)]
    assert chunks == [([3, 1], 6, 7), ([0], 6, 4000), ([2], 4000, 6)]
    masks = torch.ones(1, 28, 28)
    (rle,) = paste_masks(masks, torch.tensor([[0.0, 2.0, 4000.0, 5.0]]), (10, 4096), 0.5, True)
    assert pycocotools.mask.area(rle) == 12_000


# Shared masks, counts and thresholds, the cascade


def test_classes_may_share_their_masks(tiny_config):
    logits = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1))
    same = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], wanted)
    assert mask_loss(logits, torch.tensor([1, 3, 2]), wanted) == same
    config = replace(tiny_config, shared_masks=True, score_floor=0.0)
    model = build_model(config)
    assert model.roi_heads.mask_predictor.mask_fcn_logits.weight.shape[0] == 1
    (found,) = detect(model, [field_of_cells().image], config)
    assert len(set(found.labels)) > 1


def test_counts_and_thresholds_reach_proposals_and_heads(tiny_config):
    changes = dict(rpn_iou=(0.2, 0.6), rpn_samples=32, roi_iou=0.4, roi_cells=0.5, rois=20)
    model = build_model(replace(tiny_config, **changes))
    rpn, heads = model.rpn, model.roi_heads
    assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.2, 0.6)
    assert rpn.fg_bg_sampler.batch_size_per_image == 32
    assert heads.proposal_matcher.high_threshold == 0.4
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (20, 0.5)


class FixedStages(CascadeRoIHeads):
    """A cascade whose heads always say the same."""

    def __init__(self, stages):
        torch.nn.Module.__init__(self)
        self.stages, self.crowds = stages, [torch.zeros(0, 4)]

    def run_heads(self, features, boxes, image_shapes):
        yield from self.stages


def test_a_cascades_losses_worked_by_hand():
    cell = torch.tensor([[10.0, 10.0, 30.0, 30.0]])
    away = torch.tensor([[50.0, 50.0, 60.0, 60.0]])
    near = torch.tensor([[10.0, 10.0, 30.0, 23.0]])  # IoU 13 / 20
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))
    still = torch.zeros(2, 4)
    stages = [(torch.cat([cell, away]), still), (torch.cat([near, away]), still)]
    stages.append(stages[-1])
    heads = FixedStages([([boxes], logits, offsets) for boxes, offsets in stages])
    target = dict(boxes=cell, labels=torch.tensor([2]))
    loss_class, loss_box = heads.box_losses(None, [None], None, [target])
    # The near box is the cell's from IoU 0.6 on, and background for the third head.
    found, missed = -np.log([0.5, 0.6]).mean(), -np.log([0.2, 0.6]).mean()
    assert np.isclose(float(loss_class), found + 0.5 * found + 0.25 * missed)
    # Centre 20 in place of 16.5, height 20 in place of 13, weights of the second head: 20 and 10.
    distance = abs(3.5 / 13 * 20) + abs(np.log(20 / 13) * 10) - 2 * 0.5 / 9
    assert np.isclose(float(loss_box), 0.5 * distance / 2)


def test_a_cascade_answers_with_mean_chances_and_last_boxes():
    boxes = torch.tensor([[1.0, 2.0, 9.0, 8.0], [3.0, 3.0, 5.0, 7.0]])
    chances = torch.tensor([[[0.2, 0.8], [0.5, 0.5]], [[0.4, 0.6], [0.7, 0.3]], [[0.3, 0.7]] * 2])
    stages = [([boxes * k], chances[k].log(), torch.zeros(2, 4)) for k in range(3)]
    heads = FixedStages([*stages, ([boxes], None, None)])
    logits, offsets, last = heads.find_boxes(None, None, None)
    assert torch.allclose(logits.softmax(-1), torch.tensor([[0.3, 0.7], [0.5, 0.5]]))
    assert (offsets.shape, offsets.any().item(), last[0] is boxes) == ((2, 8), False, True)


def test_each_head_of_a_cascade_begins_where_the_last_one_ended(tiny_config):
    config = replace(tiny_config, cascade=True, score_floor=0.0)
    model = build_model(config)
    heads = model.roi_heads
    with torch.no_grad():
        for predictor in (
            heads.box_predictor,
            *(later["predictor"] for later in heads.later_heads),
        ):
            predictor.bbox_pred.weight.zero_()
            predictor.bbox_pred.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # to the right
    features = {str(k): torch.randn(1, 16, 64 // 2**k, 64 // 2**k) for k in range(4)}
    boxes = torch.tensor([[10.0, 10.0, 50.0, 30.0], [240.0, 0.0, 256.0, 16.0]])
    stages = list(heads.run_heads(features, [boxes], [(256, 256)]))
    lefts = [own[0][:, 0].tolist() for own, _, _ in stages]
    steps = [1 / weights[0] for _, weights, _ in CASCADE]
    assert heads.least_iou == 0.5
    assert np.allclose([left[0] for left in lefts], 10 + 40 * np.cumsum([0, *steps]))
    assert all(own[0][1, 2] == 256 for own, _, _ in stages)  # cut at the border
    assert [len(logits[0]) for _, logits, _ in stages[:-1]] == [5, 5, 5]
    sample = field_of_cells()
    losses = model.train()([sample.image], [training_target(sample, 1)])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in heads.later_heads.parameters())
    (found,) = detect(model, [sample.image], config)
    assert len(found)


# Crowds


def test_boxes_within_crowds():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [6, 0, 16, 10], [40, 40, 50, 50]])
    crowds = torch.tensor([[-5.0, -5, 11, 20]])
    assert within_crowds(boxes, crowds).tolist() == [True, True, False, False]
    assert within_crowds(boxes, crowds[:0]).tolist() == [False] * 4


def test_nothing_is_learned_from_a_crowd(tiny_config):
    model = build_model(tiny_config)
    ids = np.zeros((128, 128), int)
    ids[:64], ids[100:112, 20:32] = 1, 2
    sample = replace(make_sample([ids], [3]), labels=torch.tensor([-2, 3]))
    target = training_target(sample, 1)
    assert (target["boxes"].tolist(), target["labels"].tolist()) == ([[20, 100, 32, 112]], [3])
    assert target["crowds"].tolist() == [[0, 0, 128, 64]]
    anchors = torch.tensor(
        [[0.0, 0, 32, 32], [96, 30, 128, 62], [20, 100, 32, 112], [60, 80, 92, 112]]
    )
    labels, _ = model.rpn.assign_targets_to_anchors([anchors], [target])
    assert labels[0].tolist() == [-1, -1, 1, 0]
    heads = model.roi_heads
    heads.crowds = [target["crowds"]]
    _, found = heads.assign_targets_to_proposals([anchors], [target["boxes"]], [target["labels"]])
    assert found[0].tolist() == [-1, -1, 3, 0]
    losses = model.train()([sample.image], [target])
    assert all(value.isfinite() for value in losses.values())
    cascade = build_model(replace(tiny_config, cascade=True)).train()
    assert all(value.isfinite() for value in cascade([sample.image], [target]).values())


@pytest.mark.parametrize("cascade", [False, True])
def test_a_field_of_nothing_but_a_crowd_trains(tiny_config, cascade):
    model = build_model(replace(tiny_config, cascade=cascade)).train()
    sample = make_sample([np.ones((64, 64), int)], [2])
    sample = replace(sample, labels=torch.tensor([-2]))
    losses = model([sample.image], [training_target(sample, 1)])
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
