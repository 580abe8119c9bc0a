import pytest
from safetensors.torch import save_file
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnext50_32x4d

from src_snippets.backbones import (
    build_backbone,
    build_timm_trunk,
    ConvBlockAttention,
    published_weights,
    SqueezeExcitation,
    stage_groups,
    STAGES,
)
from src_snippets.config import recipe, TRUNKS
from src_snippets.model import build_model, count_parameters
from src_snippets.transforms import training_target
from src_snippets.weights import read_weights, WeightsNotFound
from tests.conftest import empty_sample, real_data

# Every family once, with the smallest of timm's; the others differ in depth and width alone.
NAMES = (
    "resnet10",
    "resnet18",
    "resnext50_32x4d",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
    "timm:convnextv2_atto",
    "timm:swin_tiny_patch4_window7_224",
    "timm:resnet18",
)


def small(name="resnet10", **changes):
    return recipe("demo", backbone=name, fpn_channels=16, **changes)


def shapes(model, height=64, width=128):
    with torch.inference_mode():
        levels = model.eval()(torch.zeros(1, 3, height, width))
    return {key: tuple(value.shape) for key, value in levels.items()}


@pytest.mark.parametrize("name", NAMES)
def test_levels_have_the_stated_strides_and_width(name):
    assert shapes(build_backbone(small(name), None)) == {
        "0": (1, 16, 16, 32),
        "1": (1, 16, 8, 16),
        "2": (1, 16, 4, 8),
        "3": (1, 16, 2, 4),
        "pool": (1, 16, 1, 2),
    }


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2", "efficientnet_b0", "timm:resnet18"])
def test_a_pyramid_may_begin_at_stride_2(name):
    config = small(name, pyramid=(2, 4, 8, 16), anchor_sizes=(4, 8, 16, 32))
    found = shapes(build_backbone(config, None), 64, 64)
    assert {key: shape[-1] for key, shape in found.items()} == {"0": 32, "1": 16, "2": 8, "3": 4}
    model = build_model(config)
    losses = model.train()([empty_sample(64, 64).image], [training_target(empty_sample(64, 64), 1)])
    assert torch.isfinite(sum(losses.values()))


def test_strides_that_a_trunk_cannot_give_are_refused():
    changes = dict(pyramid=(2, 4, 8, 16), anchor_sizes=(4, 8, 16, 32))
    for name in ("convnext_tiny", "timm:convnextv2_atto"):
        with pytest.raises(ValueError, match=r"pyramid=\(2, 4, 8, 16\): convnext.* no features"):
            build_backbone(small(name, **changes), None)


def test_unknown_trunks_are_refused():
    with pytest.raises(ValueError, match="timm gives no features"):
        build_backbone(small("timm:resnet51x"), None)
    with pytest.raises(ValueError, match="timm gives no features"):
        build_backbone(small("timm:mlp_mixer_base"), None)


def test_every_name_of_torchvision_has_stages_and_weights():
    without = [name for name in TRUNKS if published_weights(name) is None]
    assert without == ["resnet10", "resnet50_v1"]
    for name in TRUNKS:
        assert name in without or published_weights(name).url.endswith(".pth")
        assert any(name.startswith(prefix) for prefix in STAGES)
    assert published_weights("resnet50_v2") != published_weights("resnet50")


def save_classifier(model, path):
    torch.save(model.state_dict(), path)
    return path


def test_a_trunks_weights_arrive_and_wrong_ones_are_refused(tmp_path):
    source = resnet18(num_classes=7)  # the last layer may have another size
    path = save_classifier(source, tmp_path / "resnet18.pth")
    model = build_backbone(small("resnet18"), path)
    assert torch.equal(model.body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    save_file(state, tmp_path / "resnet18.safetensors")
    again = build_backbone(small("resnet18"), tmp_path / "resnet18.safetensors")
    assert torch.equal(again.body.conv1.weight, source.conv1.weight)
    torch.save({"fc.weight": torch.zeros(1000, 512)}, path)
    with pytest.raises(ValueError, match=r"do not fit resnet18: missing .'bn1.bias'"):
        build_backbone(small("resnet18"), path)
    with pytest.raises(ValueError, match=r"another shape .'layer1.0.bn1"):
        build_backbone(small("resnet18"), save_classifier(resnext50_32x4d(), path))


def test_timms_weights_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    source = timm.create_model("resnet18", pretrained=False)
    (tmp_path / "deep").mkdir()
    path = save_classifier(source, tmp_path / "deep" / "resnet18.pth")
    config = small("timm:resnet18", weights="imagenet")
    model = build_timm_trunk(config, None, [str(tmp_path)])
    assert torch.equal(model.model.layer2[0].conv1.weight, source.layer2[0].conv1.weight)
    model = build_model(small("timm:resnet18", weights=str(path)))
    found = model.backbone.body.model.layer2[0].conv1.weight
    assert torch.equal(found, source.layer2[0].conv1.weight)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFound, match=r"attach resnet18.safetensors"):
        build_timm_trunk(config, None, [str(tmp_path / "nothing")])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"])
def test_a_fine_stem_doubles_every_map_and_keeps_the_names(name):
    coarse = build_backbone(small(name), None)
    fine = build_backbone(small(name, fine_stem=True, pyramid=(2, 4, 8, 16, 32)), None)
    image = torch.zeros(1, 3, 64, 128)
    sizes = [[m.shape[-2:] for m in model.eval()(image).values()] for model in (coarse, fine)]
    assert sizes[1] == [(2 * h, 2 * w) for h, w in sizes[0]]
    assert sizes[1][0] == (32, 64)
    shapes = [{k: v.shape for k, v in m.body.state_dict().items()} for m in (coarse, fine)]
    assert shapes[0] == shapes[1]


def test_the_first_resnet_has_its_strides_in_the_first_convolution():
    first, later = (build_backbone(small(name), None).body for name in ("resnet50_v1", "resnet50"))
    assert first.state_dict().keys() == later.state_dict().keys()
    strides = [[b.layer3[0].conv1.stride, b.layer3[0].conv2.stride] for b in (first, later)]
    assert strides == [[(2, 2), (1, 1)], [(1, 1), (2, 2)]]
    assert first.layer1[0].conv1.stride == (1, 1)


def test_pyramid_without_norms():
    model = build_backbone(small("resnet18", head_norm="none"), None)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.fpn.modules())
    assert model.fpn.inner_blocks[0][0].bias is not None


# Attention, norms, frozen stages


@pytest.mark.parametrize("kind", ["se", "cbam"])
@pytest.mark.parametrize("name", ["resnet10", "timm:convnextv2_atto"])
def test_attention_is_the_identity_at_the_start_and_keeps_names(kind, name):
    torch.manual_seed(0)
    plain = build_backbone(small(name), None).eval()
    attended = build_backbone(small(name, attention=kind), None).eval()
    missing, unexpected = attended.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} == {"attention"}
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        for key, level in plain(image).items():
            assert torch.equal(attended(image)[key], level)


def test_squeeze_and_excitation_by_hand():
    block = SqueezeExcitation(2)
    with torch.no_grad():
        block.mlp[-1].bias[:] = torch.tensor([100.0, -100.0])
    x = torch.full((1, 2, 3, 3), 4.0)
    assert block(x)[0, :, 0, 0].tolist() == pytest.approx([8.0, 0.0])


def test_block_attention_by_hand():
    block = ConvBlockAttention(1)
    with torch.no_grad():
        block.places.weight[0, 0, 3, 3] = 1.0  # of the mean over channels, at the place itself
    x = torch.tensor([[[[0.0, 100.0], [-100.0, 0.0]]]])
    assert block(x)[0, 0].flatten().tolist() == pytest.approx([0.0, 200.0, 0.0, 0.0])


def test_attention_learns():
    model = build_backbone(small(attention="cbam"), None)
    sum(level.square().mean() for level in model(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all(part.mlp[-1].bias.grad.abs().sum() > 0 for part in model.attention)


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2", "timm:resnet18"])
def test_frozen_stages_are_counted_from_the_top(name):
    trained = []
    for count in range(6):
        model = build_backbone(small(name, trained_stages=count), None)
        groups = stage_groups(model.body)
        learns = [any(p.requires_grad for m in group for p in m.parameters()) for group in groups]
        assert learns == [False] * (5 - count) + [True] * count
        trained.append(count_parameters(model.body))
    assert trained[0] == 0
    assert trained == sorted(set(trained))


@pytest.mark.parametrize("name", ["resnet10", "timm:resnetv2_18", "timm:regnety_002"])
def test_frozen_norms_change_nothing_in_prediction_and_stay(name):
    torch.manual_seed(0)
    plain = build_backbone(small(name), None).eval()
    torch.manual_seed(0)
    frozen = build_backbone(small(name, norm="frozen"), None)
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        for key, level in plain(image).items():
            assert torch.allclose(frozen.eval()(image)[key], level, atol=1e-4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.body.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in frozen.fpn.modules())


def test_frozen_stages_keep_their_statistics():
    model = build_backbone(small(trained_stages=0), None).train()
    before = {key: value.clone() for key, value in model.body.state_dict().items()}
    model(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in model.body.state_dict().items())


def test_group_and_synchronised_norms():
    group = build_model(small(norm="group"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())
    sample = empty_sample(64, 64)
    losses = group.train()([sample.image], [training_target(sample, 1)])
    assert torch.isfinite(sum(losses.values()))
    active = build_model(small("timm:regnety_002", norm="group")).backbone.body
    plain = build_model(small("timm:regnety_002")).backbone.body
    count = [sum(isinstance(m, nn.ReLU) for m in side.modules()) for side in (active, plain)]
    assert count[0] == count[1] > 10
    several = build_model(small(norm="sync"))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in several.backbone.modules())


def test_all_stages_are_trained_by_default_whatever_the_pyramid():
    changes = dict(pyramid=(2, 4, 8, 16, 32), anchor_sizes=(4, 8, 16, 32, 64))
    model = build_backbone(small(**changes), None)
    assert all(p.requires_grad for p in model.parameters())
    changes = dict(pyramid=(8, 16, 32, 64), anchor_sizes=(8, 16, 32, 64), trained_stages=4)
    model = build_backbone(small(**changes), None)
    assert not model.body.conv1.weight.requires_grad
    assert model.body.layer1[0].conv1.weight.requires_grad


@pytest.mark.parametrize("name", ["timm:efficientnet_b0", "timm:mobilenetv3_small_050"])
def test_timms_models_that_do_not_name_their_stages(name):
    assert len(shapes(build_backbone(small(name), None))) == 5
    with pytest.raises(ValueError, match="does not say where the stages"):
        build_backbone(small(name, trained_stages=3), None)


def test_models_of_one_image_size_are_refused():
    with pytest.raises(ValueError, match="images of one size only"):
        build_backbone(small("timm:maxvit_tiny_tf_224"), None)


def test_the_real_imagenet_trunk_loads_and_knows_its_features():
    path = real_data("weights") / "mobilenet_v2_imagenet.pth"
    state = read_weights(path)
    model = build_model(recipe("demo", backbone="mobilenet_v2", weights=str(path)))
    own = model.backbone.body.state_dict()
    assert len(own) > 250
    assert all(torch.equal(value, state[f"features.{key}"]) for key, value in own.items())
    # The same features as torchvision's own classifier with those weights.
    reference = mobilenet_v2(weights=None)
    reference.load_state_dict(state)
    reference.to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = reference.eval().features[:18](image)
        backbone = model.eval().backbone
        assert torch.allclose(backbone.body(image, backbone.attention)[3], wanted, atol=1e-5)
