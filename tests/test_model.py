from dataclasses import replace

from hypothesis import given, settings, strategies
import numpy as np
import pycocotools.mask
import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import paste_masks_in_image

from src_snippets.config import recipe
from src_snippets.forms import truth_instances
from src_snippets.heads import (
    mask_targets,
)
from src_snippets.model import (
    anchor_shapes,
    build_model,
    cells_with_anchor,
    checkpoint_bytes,
    choose_precision,
    count_parameters,
    describe_anchors,
    initial_weights,
    InputTransform,
    load_model_state,
    parameter_table,
    paste_masks,
)
from src_snippets.readers import read_cell_folder
from src_snippets.transforms import training_target
from tests.conftest import (
    dense_masks,
    detect,
    empty_sample,
    field_of_cells,
    random_boxes,
    real_data,
)

PARITY = recipe("baseline", weights="none", scale=1.0, score_floor=0.0, half_pixel=False)


@pytest.fixture(scope="module")
def stock_and_ours():
    """torchvision's v2 model and ours with the same weights and thresholds."""
    ours = build_model(PARITY)
    stock = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        rpn_nms_thresh=PARITY.rpn_nms,
        rpn_pre_nms_top_n_test=PARITY.proposals,
        rpn_post_nms_top_n_test=PARITY.proposals,
        box_score_thresh=0.0,
        box_nms_thresh=PARITY.box_nms,
        box_detections_per_img=PARITY.detections,
        min_size=128,
        max_size=4096,
        _skip_resize=True,  # its random choice of a size would shift the random state
    )
    sizes = tuple((size,) for size in PARITY.anchor_sizes)
    stock.rpn.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    stock.load_state_dict(ours.state_dict())
    # The layout in memory decides in which order convolutions add.
    return stock.to(memory_format=torch.channels_last), ours


def test_state_dict_is_that_of_torchvisions_v2(stock_and_ours):
    stock, ours = (model.state_dict() for model in stock_and_ours)
    assert {k: v.shape for k, v in stock.items()} == {k: v.shape for k, v in ours.items()}


def test_coco_weights_load_with_only_the_class_layers_new():
    source = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    model = build_model(PARITY)
    fresh = load_model_state(model, source.state_dict())
    assert fresh == [
        "roi_heads.box_predictor.bbox_pred.bias",
        "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.cls_score.weight",
        "roi_heads.mask_predictor.mask_fcn_logits.bias",
        "roi_heads.mask_predictor.mask_fcn_logits.weight",
    ]
    wanted, found = source.state_dict(), model.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted if key not in fresh)


def test_weights_of_another_model_are_refused(tiny_config):
    state = build_model(tiny_config).state_dict()
    with pytest.raises(ValueError, match=r"do not fit the model: .* another shape"):
        load_model_state(build_model(recipe("demo")), state)


def test_losses_equal_torchvisions_on_dense_masks(stock_and_ours):
    sample = field_of_cells()
    target = training_target(sample, 1)
    dense = dict(boxes=target["boxes"], labels=target["labels"], masks=dense_masks(sample))
    found = []
    for model, image, truth in zip(
        stock_and_ours, (sample.image / 255, sample.image), (dense, target), strict=True
    ):
        model.train()
        torch.manual_seed(3)
        found.append({k: v.item() for k, v in model([image] * 2, [truth] * 2).items()})
    stock, ours = found
    assert ours["loss_mask"] > 0.1
    assert stock == pytest.approx(ours, abs=1e-5)


def test_predictions_equal_torchvisions_pixel_for_pixel(stock_and_ours):
    stock, ours = stock_and_ours
    sample = field_of_cells(1)
    with torch.inference_mode():
        wanted = stock.eval()([sample.image / 255])[0]
    (found,) = detect(ours, [sample.image], PARITY)
    masks = (wanted["masks"][:, 0] >= PARITY.mask_threshold[0]).numpy()
    kept = masks.any((1, 2))
    assert kept.sum() > 50
    assert np.allclose(found.boxes, wanted["boxes"].numpy()[kept], atol=1e-3)
    assert np.allclose(found.scores, wanted["scores"].numpy()[kept], atol=1e-5)
    assert found.labels.tolist() == wanted["labels"].numpy()[kept].tolist()
    pasted = np.stack([pycocotools.mask.decode(rle) for rle in found.rles])
    assert np.array_equal(pasted, masks[kept])


# Mask targets and paste, on their own


@settings(max_examples=25, deadline=None)
@given(strategies.integers(0, 2**31))
def test_paste_equals_torchvisions(seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(12, 70, 90, seed)
    masks = torch.nn.functional.avg_pool2d(torch.rand(12, 1, 28, 28, generator=generator), 5, 1, 2)
    stock = paste_masks_in_image(masks, boxes, (70, 90))[:, 0]
    rles = paste_masks(masks[:, 0], boxes, (70, 90), 0.5, half_pixel=False)
    for rle, wanted in zip(rles, stock, strict=True):
        found = pycocotools.mask.decode(rle) if rle else np.zeros((70, 90))
        different = (found != (wanted >= 0.5).numpy()) & (np.abs(wanted.numpy() - 0.5) > 1e-5)
        assert not different.any()


def paste_one(box, value=1.0, threshold=0.5):
    full = torch.full((1, 28, 28), value)
    return paste_masks(full, torch.tensor([box]).float(), (4, 6), threshold, half_pixel=True)[0]


def test_paste_worked_by_hand():
    assert pycocotools.mask.decode(paste_one([2, 1, 5, 3])).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    # A pixel belongs to the box when its centre lies inside.
    assert pycocotools.mask.toBbox(paste_one([1.4, 0.6, 3.4, 2.6])).tolist() == [1, 1, 2, 2]
    assert paste_one([2, 1, 5, 3], value=0.4) is None
    assert paste_one([2.1, 1.1, 2.3, 1.3]) is None
    assert pycocotools.mask.area(paste_one([-9, -9, 99, 99])) == 24
    assert pycocotools.mask.area(paste_one([2, 1, 5, 3], threshold=0.0)) == 6
    assert paste_one([7, 1, 9, 3]) is None  # beside the image
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (4, 6), 0.5, True) == []
    both = torch.full((2, 28, 28), 0.6), torch.tensor([[0.0, 0, 4, 3]] * 2)
    own = paste_masks(*both, (4, 6), torch.tensor([0.5, 0.7]), True)  # one threshold each
    assert (own[0] is not None, own[1]) == (True, None)


def round_trip(sample, half_pixel) -> np.ndarray:
    """IoU of each cell with itself after target and paste: what a perfect mask head reaches."""
    target = training_target(sample, 1)
    every = torch.arange(len(target["ids"]))
    masks = mask_targets(target, target["boxes"], every, 28, half_pixel)
    pasted = paste_masks(masks, target["boxes"], sample.size, 0.5, half_pixel)
    truth = truth_instances(sample).rles
    pairs = zip(pasted, truth, strict=True)
    return np.array([pycocotools.mask.iou([found], [own], [0])[0, 0] for found, own in pairs])


def test_half_pixel_loses_nothing_where_torchvisions_rule_does():
    sample = read_cell_folder(real_data("hw3-real") / "train" / "sample", 4)
    exact, stock = round_trip(sample, True), round_trip(sample, False)
    print(f"IoU after target and paste: {exact.mean():.3f}, torchvision's rule {stock.mean():.3f}")
    assert exact.min() == 1.0
    assert stock.mean() < 0.95


# The whole model


@pytest.fixture(scope="module")
def tiny_model(tiny_config):
    return build_model(tiny_config)


def test_images_without_cells_train(tiny_model):
    sample = empty_sample(64, 64)
    losses = tiny_model.train()([sample.image], [training_target(sample, 4)])
    assert set(losses) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
    }
    assert losses["loss_mask"].item() == 0
    assert torch.isfinite(sum(losses.values()))
    sum(losses.values()).backward()


def test_wrong_input_is_refused(tiny_model):
    sample = empty_sample(64, 64)
    with pytest.raises(TypeError, match=r"float32; expected uint8"):
        detect(tiny_model, [sample.image.float()], recipe("demo"))
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected that of training_target"):
        tiny_model.train()([sample.image], [target])


def test_detect_answers_in_image_pixels(tiny_config):
    config = replace(tiny_config, scale=2.0, score_floor=0.0)
    model = build_model(config)
    images = [field_of_cells(0, 64).image, field_of_cells(1, 80).image[:, :50]]
    answers = detect(model, images, config)
    assert [a.size for a in answers] == [(64, 64), (50, 80)]
    for found in answers:
        assert len(found) > 0
        assert (found.boxes[:, 2] <= found.size[1]).all()
        assert (found.boxes[:, 3] <= found.size[0]).all()
        assert (np.diff(found.scores) <= 0).all()
        assert {tuple(rle["size"]) for rle in found.rles} == {found.size}
    alone = detect(model, images[1:], config)[0]
    assert np.allclose(alone.scores, answers[1].scores, atol=1e-4)


def test_no_detection_above_the_floor(tiny_config):
    config = replace(tiny_config, score_floor=1.0)
    (found,) = detect(build_model(config), [field_of_cells().image], config)
    assert (len(found), found.boxes.shape) == (0, (0, 4))


def test_magnification_scales_boxes_and_leaves_maps():
    sample = field_of_cells(0, 50)
    target = training_target(sample, 1)
    images, (seen,) = InputTransform(recipe("demo", scale=2.0)).train()([sample.image], [target])
    assert images.image_sizes == [(100, 100)]
    assert images.tensors.shape == (1, 3, 128, 128)
    assert torch.equal(seen["boxes"], target["boxes"] * 2)
    assert seen["layers"] is target["layers"]


def test_a_crop_of_one_feature_pixel_trains(tiny_model):
    sample = empty_sample(20, 30)
    losses = tiny_model.train()([sample.image], [training_target(sample, 4)])
    assert torch.isfinite(sum(losses.values()))


def test_short_sides_in_place_of_scale(tiny_config):
    images = [torch.zeros(3, 30, 40, dtype=torch.uint8), torch.zeros(3, 10, 90, dtype=torch.uint8)]
    config = replace(tiny_config, short_sides=(60, 90), scale=3.0)
    transform = InputTransform(config).eval()
    seen, _ = transform(images)
    assert seen.image_sizes == [(90, 120), (20, 180)]  # the longer side: at most 2 x 90
    seen, _ = transform.train()(images)
    assert seen.image_sizes == [(30, 40), (10, 90)]  # crops are magnified when they are cut
    target = {key: torch.tensor([[0.0, 3.0, 40.0, 30.0]]) for key in ("boxes", "crowds")}
    _, (moved,) = transform.eval()(images[:1], [target])
    assert moved["boxes"].tolist() == moved["crowds"].tolist() == [[0, 9, 120, 90]]


def test_thresholds_reach_the_model(tiny_config):
    changes = dict(box_nms=0.33, detections=7, rpn_nms=0.44, rois=24, proposals=11, score_floor=0.2)
    model = build_model(replace(tiny_config, **changes))
    heads, rpn = model.roi_heads, model.rpn
    assert (heads.nms_thresh, heads.detections_per_img, heads.score_thresh) == (0.33, 7, 0.2)
    assert (rpn.nms_thresh, rpn.post_nms_top_n(), heads.fg_bg_sampler.batch_size_per_image) == (
        0.44,
        11,
        24,
    )


def test_precision_of_a_cpu():
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        choose_precision(recipe("baseline", precision="fp16"), device)
    assert choose_precision(recipe("baseline"), device) == "no"
    assert choose_precision(recipe("baseline", precision="bf16"), device) == "bf16"


def test_initial_weights_of_a_checkpoint(tmp_path, tiny_config):
    model = build_model(tiny_config)
    torch.save({"model": model.state_dict(), "history": [1]}, tmp_path / "best.pt")
    config = replace(tiny_config, weights=str(tmp_path / "best.pt"), seed=9)
    again = build_model(config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert initial_weights(tiny_config) == (None, None)
    assert count_parameters(again) == sum(p.numel() for p in model.parameters())


def test_anchors_and_the_cells_they_fit():
    config = recipe(
        "baseline",
        scale=2.0,
        pyramid=(4, 8, 16),
        anchor_sizes=(8, 16, 32),
        anchor_ratios=(1.0, 4.0),
    )
    assert anchor_shapes(config).tolist() == [
        [8, 8],
        [4, 16],
        [16, 16],
        [8, 32],
        [32, 32],
        [16, 64],
    ]
    # IoU of 22 x 22 with 16 x 16 is 256 / 484, of 46 x 46 with 32 x 32 is 1024 / 2116.
    sides = np.array([[8, 8], [22, 22], [46, 46], [4, 16], [16, 4]])
    assert cells_with_anchor(sides, config).tolist() == [True, True, False, True, False]
    assert cells_with_anchor(sides[:0], config).tolist() == []
    assert describe_anchors(np.ones(50, bool)) == "0.0% of 50 cells have no anchor with IoU 0.5"
    assert describe_anchors(np.array([True, False])).startswith("WARNING: 50.0% of 2 cells")
    assert "0 cells" in describe_anchors(np.zeros(0, bool))


def test_parameters_are_counted_by_part(tiny_model):
    lines = parameter_table(tiny_model).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "trunk",
        "attention",
        "pyramid",
        "proposals",
        "box and mask heads",
        "all",
    ]
    assert lines[-1].split()[1] == f"{count_parameters(tiny_model) / 1e6:.1f}"
    with pytest.raises(ValueError, match=r"at most 1 M are allowed. Take a smaller backbone"):
        parameter_table(tiny_model, most=1_000_000)


def test_grey_input_and_normalisation():
    image = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    changes = dict(pixel_mean=(0.0, 0.0, 0.0), pixel_std=(1.0, 1.0, 0.5))
    seen = InputTransform(recipe("demo", **changes))([image])[0].tensors[0, :, 0, 0]
    assert seen.tolist() == [1.0, 0.0, 0.0]
    seen = InputTransform(recipe("demo", grey=True, **changes))([image])[0].tensors[0, :, 0, 0]
    assert seen.tolist() == pytest.approx([76 / 255, 76 / 255, 152 / 255])


def test_a_small_first_image_does_not_change_later_answers(tiny_config):
    config = replace(tiny_config, score_floor=0.0)
    field = field_of_cells(0, 96).image
    model, fresh = build_model(config), build_model(config)
    detect(model, [field[:, :20, :30]], config)
    (after,), (alone,) = detect(model, [field], config), detect(fresh, [field], config)
    assert np.array_equal(after.boxes, alone.boxes)
    for pooler in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pooler.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_room_for_checkpoints_is_what_they_take(tiny_model, tiny_config):
    own = sum(value.nbytes for value in tiny_model.state_dict().values())
    assert checkpoint_bytes(tiny_model, tiny_config) == (7 * own, 4 * own)
    assert checkpoint_bytes(tiny_model, replace(tiny_config, ema=0.9)) == (10 * own, 6 * own)
