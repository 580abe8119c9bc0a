from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import box_iou

from src_snippets.data.transforms import training_target
from src_snippets.model.heads import sample_mask_targets
from src_snippets.model.mask_rcnn import (
    build_model,
    CLASS_LAYERS,
    count_parameters,
    InputTransform,
    load_model_state,
    plot_anchors,
    with_model_settings,
)
from src_snippets.setup.config import make_config
from tests.conftest import dense_masks, detect, empty_sample, field_of_cells

PARITY = make_config(
    "baseline", weights="none", scale=1.0, score_threshold=0.0, proposals=200, roi_batch_size=128
)
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


@pytest.fixture(scope="module")
def both():
    """torchvision's v2 model and ours with the same weights and thresholds."""
    ours = build_model(PARITY)
    theirs = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        rpn_pre_nms_top_n_test=PARITY.proposals,
        rpn_post_nms_top_n_test=PARITY.proposals,
        rpn_pre_nms_top_n_train=PARITY.proposals,
        rpn_post_nms_top_n_train=PARITY.proposals,
        box_batch_size_per_image=PARITY.roi_batch_size,
        box_score_thresh=0.0,
        box_nms_thresh=PARITY.box_nms,
        box_detections_per_img=PARITY.detections,
        min_size=128,
        max_size=4096,
        _skip_resize=True,  # its random choice of a size would shift the random state
    )
    sizes = tuple((size,) for size in PARITY.anchor_sizes)
    theirs.rpn.anchor_generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    theirs.load_state_dict(ours.state_dict())
    # The layout in memory decides in which order convolutions add.
    return theirs.to(memory_format=torch.channels_last), ours


@pytest.fixture(scope="module")
def tiny_model(tiny_config):
    return build_model(tiny_config)


# Equal to torchvision


def test_state_dict_is_that_of_torchvisions_v2(both):
    theirs, ours = ({k: v.shape for k, v in model.state_dict().items()} for model in both)
    assert theirs == ours
    assert sum(key.startswith("backbone.body.") for key in ours) == 318


def test_losses_equal_torchvisions_on_dense_masks(both, monkeypatch):
    sample = field_of_cells()
    target = training_target(sample)
    masks = dense_masks(sample)[target["ids"] - 1]
    dense = dict(boxes=target["boxes"], labels=target["labels"], masks=masks)
    monkeypatch.setattr(  # torchvision's mask targets, in the test alone
        "src_snippets.model.heads.sample_mask_targets",
        lambda target, *arguments: project_masks_on_boxes(masks, *arguments),
    )
    losses = []
    pairs = (sample.image / 255, dense), (sample.image, target)
    for model, (image, own) in zip(both, pairs, strict=True):
        model.train()
        torch.manual_seed(3)
        losses.append({k: v.item() for k, v in model([image] * 2, [own] * 2).items()})
    theirs, ours = losses
    assert set(ours) == LOSSES
    assert ours["loss_mask"] > 0.1
    assert theirs == pytest.approx(ours, abs=1e-5)


@torch.inference_mode()
def test_the_strides_that_anchors_take_from_the_features_are_those_of_the_features():
    """torchvision divides the sides; 96 px would give the top level a stride of 48, not 64."""
    model = build_model(make_config("demo")).eval()
    for size in ((96, 200), (33, 64), (1, 700)):
        images, _ = model.transform([torch.zeros(3, *size, dtype=torch.uint8)])
        height, width = images.tensors.shape[-2:]
        levels = model.backbone(images.tensors).values()
        grids = [(height / level.shape[-2], width / level.shape[-1]) for level in levels]
        assert grids == [(2**k, 2**k) for k in range(2, 7)]


def test_detections_equal_torchvisions(both):
    theirs, ours = both
    image = field_of_cells(1).image
    with torch.inference_mode():
        (wanted,), (found,) = theirs.eval()([image / 255]), ours.eval()([image])
    assert len(found["boxes"]) > 50
    assert torch.allclose(found["boxes"], wanted["boxes"], atol=1e-3)
    assert torch.allclose(found["scores"], wanted["scores"], atol=1e-5)
    assert torch.equal(found["labels"], wanted["labels"])
    assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)


# Weights


def test_a_head_of_your_own_starts_anew_on_earlier_weights(capsys):
    config = make_config("demo")
    state, model = build_model(config).state_dict(), build_model(config)
    model.roi_heads.my_head = torch.nn.Linear(2, 1)
    load_model_state(model, state, new_classes=True)
    assert "not pretrained: roi_heads.my_head.bias" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"2 parameters, such as .'roi_heads.my_head.bias'"):
        load_model_state(model, state)


def test_coco_weights_load_with_new_class_layers(both, tmp_path, monkeypatch, capsys):
    source = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    name = "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"
    torch.save(source.state_dict(), tmp_path / name)
    monkeypatch.setattr(
        "src_snippets.model.mask_rcnn.find_weights_file",
        lambda names: next((tmp_path / n for n in names if (tmp_path / n).exists()), None),
    )
    changes = dict(weights="coco", attention="se")
    model = build_model(replace(PARITY, **changes))
    printed = capsys.readouterr().out
    assert "not pretrained: backbone.attention.0.gates.fc1.bias" in printed
    wanted, found = source.state_dict(), model.state_dict()
    same = [key for key in wanted if not key.startswith(CLASS_LAYERS) and key in found]
    assert len(same) > 350
    assert all(torch.equal(found[key], wanted[key]) for key in same)
    new = [key for key in wanted if key.startswith(CLASS_LAYERS)]
    assert len(new) == 6
    assert all(key in printed and found[key].shape != wanted[key].shape for key in new)
    with pytest.raises(ValueError, match="needs backbone='resnet50', not 'resnet10'"):
        build_model(make_config("demo", weights="coco"))
    (tmp_path / name).unlink()

    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(FileNotFoundError, match=rf"no {name} below /kaggle/input"):
        build_model(replace(PARITY, weights="coco"))


def test_fine_tuning_from_a_checkpoint(tiny_config, tiny_model, tmp_path, capsys):
    torch.save({"model": tiny_model.state_dict(), "history": [1]}, tmp_path / "best.pt")
    config = replace(tiny_config, weights=str(tmp_path / "best.pt"), seed=9)
    again = build_model(config).state_dict()
    assert all(torch.equal(value, again[k]) for k, value in tiny_model.state_dict().items())
    assert "not pretrained" not in capsys.readouterr().out
    other = build_model(replace(config, class_names=("a", "b"))).state_dict()
    differ = {key for key in other if other[key].shape != again[key].shape}
    assert {key.split(".")[2] for key in differ} == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert "not pretrained: roi_heads.box_predictor" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"do not fit the model: .* another shape"):
        build_model(replace(config, fpn_channels=24))


def test_fine_tuning_takes_over_the_settings_of_the_model(tmp_path, capsys):
    path = tmp_path / "best.pt"
    saved = make_config("light", scale=2.0, lr=0.5, anchor_sizes=(4, 8, 16, 32, 64))
    torch.save({"model": {}, "config": asdict(saved)}, path)
    config = with_model_settings(make_config("demo", weights=str(path)), {"scale": 1.0})
    light, demo = vars(saved), vars(make_config("demo", weights=str(path)))
    for name, value in vars(config).items():  # but what the user set, and what is no model
        own = {"backbone", "fpn_channels", "box_features", "mask_convs", "anchor_sizes"}
        assert value == (light if name in own else demo)[name]
    assert "'anchor_sizes': (4, 8, 16, 32, 64)" in capsys.readouterr().out
    for weights in ("none", "imagenet", str(tmp_path / "no.pt")):
        config = make_config("demo", weights=weights)
        assert with_model_settings(config, {}) == config
    torch.save({"a": torch.zeros(1)}, path)  # no checkpoint of ours
    config = make_config("demo", weights=str(path))
    assert with_model_settings(config, {}) == config
    for content in (b"hello", [torch.ones(2)], {"config": "yolo backbone", "a": torch.ones(1)}):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        assert with_model_settings(config, {}) == config
        with pytest.raises(ValueError, match=r"best\.pt: not a state dict that can be read safely"):
            build_model(config)


def test_checkpoints_must_fit_exactly(tiny_config, tiny_model):
    state = tiny_model.state_dict()
    load_model_state(build_model(tiny_config), state)
    for changes in (dict(class_names=("a",)), dict(attention="se"), dict(mask_convs=2)):
        with pytest.raises(ValueError, match="weights do not fit the model"):
            load_model_state(build_model(replace(tiny_config, **changes)), state)
    with pytest.raises(ValueError, match=r"1 parameters, such as \['more'\], are missing"):
        load_model_state(tiny_model, state | {"more": torch.zeros(1)})
    frozen = build_model(replace(tiny_config, norm="frozen"))  # without counts of batches
    load_model_state(frozen, state)


def test_too_many_trainable_parameters_are_refused(tiny_config, tiny_model, monkeypatch):
    assert count_parameters(tiny_model) == sum(p.numel() for p in tiny_model.parameters())
    monkeypatch.setattr("src_snippets.model.mask_rcnn.count_parameters", lambda _: 200_000_001)
    with pytest.raises(ValueError, match=r"200.0 M trainable parameters; at most 200 M. Take a"):
        build_model(tiny_config)


# Input and settings


def test_scale_moves_boxes_and_leaves_maps():
    sample = field_of_cells(0, 50)
    target = training_target(sample)
    transform = InputTransform(make_config("demo", scale=2.0), [0.5] * 3, [0.5] * 3).train()
    images, (moved,) = transform([sample.image], [target])
    assert images.image_sizes == [(100, 100)]
    assert images.tensors.shape == (1, 3, 128, 128)
    assert images.tensors.is_contiguous(memory_format=torch.channels_last)
    assert images.tensors[0, :, 100:].abs().max() == 0
    assert torch.equal(moved["boxes"], target["boxes"] * 2)
    assert moved["layers"] is target["layers"]


def test_grey_input_and_normalisation():
    image = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
    plain = InputTransform(make_config("demo"), (0.0, 0.0, 0.0), (1.0, 1.0, 0.5))
    assert plain([image])[0].tensors[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    grey = InputTransform(make_config("demo", grey=True), (0.0, 0.0, 0.0), (1.0, 1.0, 0.5))
    values = grey([image])[0].tensors[0, :, 0, 0].tolist()
    assert values == pytest.approx([76 / 255, 76 / 255, 152 / 255])
    with pytest.raises(ValueError, match=r"float32; expected uint8"):
        plain([image.float()])


def test_settings_reach_the_model(tiny_config):
    changes = dict(box_nms=0.33, detections=7, proposals=11, score_threshold=0.2)
    changes |= dict(roi_batch_size=24)
    model = build_model(replace(tiny_config, **changes))
    heads, rpn = model.roi_heads, model.rpn
    assert (heads.nms_thresh, heads.detections_per_img, heads.score_thresh) == (0.33, 7, 0.2)
    assert (rpn.nms_thresh, rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (0.7, 11, 11)
    assert rpn.proposal_matcher.high_threshold == 0.7
    assert (rpn.proposal_matcher.low_threshold, heads.proposal_matcher.low_threshold) == (0.3, 0.5)
    assert rpn.fg_bg_sampler.batch_size_per_image == 256
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (24, 0.25)
    assert model.transform.image_mean == (0.485, 0.456, 0.406)


# The whole model


@pytest.mark.parametrize("size", [(64, 64), (20, 30)])  # (20, 30): one pixel at the top of the FPN
def test_images_without_instances_train(tiny_model, size):
    sample = empty_sample(*size)
    losses = tiny_model.train()([sample.image], [training_target(sample)])
    assert set(losses) == LOSSES
    assert losses["loss_mask"].item() == 0
    assert torch.isfinite(sum(losses.values()))
    sum(losses.values()).backward()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_mask_targets_are_looked_up_in_pixels_of_the_map(tiny_config, monkeypatch, scale):
    sample, overlaps = field_of_cells(0, 64), []

    def record(target, boxes, matched, size):
        overlaps.append(box_iou(boxes, training_target(sample)["boxes"][matched]).diagonal())
        return sample_mask_targets(target, boxes, matched, size)

    monkeypatch.setattr("src_snippets.model.heads.sample_mask_targets", record)
    model = build_model(replace(tiny_config, scale=scale)).train()
    model([sample.image], [training_target(sample)])
    assert len(overlaps[0]) > 0
    assert overlaps[0].min() >= 0.5


def test_detections_are_in_image_pixels(tiny_config):
    config = replace(tiny_config, scale=2.0, score_threshold=0.0)
    model = build_model(config)
    images = [field_of_cells(0, 64).image, field_of_cells(1, 80).image[:, :50]]
    predictions = detect(model, images, config)
    assert [p.size for p in predictions] == [(64, 64), (50, 80)]
    for found in predictions:
        assert len(found) > 0
        assert found.boxes[:, 2].max() <= found.size[1]
        assert found.boxes[:, 3].max() <= found.size[0]
        assert found.boxes[:, 3].max() > found.size[0] / 2
    (found,) = detect(model, images[:1], replace(config, score_threshold=1.0))
    assert (len(found), found.boxes.shape) == (0, (0, 4))


# Anchors


def drawn_anchors(sides, config):
    """Boxes that an anchor fits, the others, and the anchors, as they are drawn."""
    return [dots.get_offsets().data for dots in plot_anchors(sides, config).axes[0].collections]


def test_anchors_and_the_boxes_that_they_fit():
    config = make_config(
        "baseline", anchor_sizes=(8, 16, 32, 64, 128), anchor_ratios=(1.0, 4.0), scale=2.0
    )
    # IoU of 22 x 22 with 16 x 16 is 256 / 484, of 23 x 23 is 256 / 529, with 32 x 32 529 / 1024:
    # a quarter of the stride beside the middle, the smaller one is inside still.
    sides = np.array([[8, 8], [22, 22], [23, 23], [182, 182], [4, 16], [16, 4]])
    fits, without, anchors = drawn_anchors(sides, config)
    assert anchors[:4].tolist() == [[8, 8], [4, 16], [16, 16], [8, 32]]
    assert (fits.tolist(), without.tolist()) == (
        sides[[0, 1, 2, 4]].tolist(),
        sides[[3, 5]].tolist(),
    )
    sides = np.array([[20.0, 25.5], [20.0, 25.7]])  # IoU 0.5 with 16 x 16 is at 25.6
    assert drawn_anchors(sides, config)[0].tolist() == [[20.0, 25.5]]
    beside = np.array([[16.0, 8.0]])  # IoU 0.5 with 16 x 16 were its middle the same
    assert drawn_anchors(beside, config)[1].tolist() == beside.tolist()


@pytest.mark.parametrize("count", [0, 50])
def test_anchors_are_drawn(count):
    sides = np.random.default_rng(0).uniform(2, 300, (count, 2))
    config = make_config("baseline")
    axes = plot_anchors(sides, config).axes[0]
    assert axes.get_title() == "Box sizes and anchors, network px"
    boxes, without, anchors = axes.collections
    assert len(boxes.get_offsets()) + len(without.get_offsets()) == count
    assert len(anchors.get_offsets()) == 15
    assert boxes.get_alpha() < 1
