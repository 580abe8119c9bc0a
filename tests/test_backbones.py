from types import SimpleNamespace

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
    find_weights,
    published_weights,
    read_weights,
    SqueezeExcitation,
    stage_groups,
    STAGES,
    WeightsNotFound,
)
from src_snippets.config import recipe, TRUNKS
from src_snippets.model import build_model, count_parameters
from src_snippets.transforms import training_target
from tests.conftest import empty_sample, real_data

PUBLISHED = SimpleNamespace(url="https://example.invalid/models/trunk-0123abcd.pth")


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
    for name in TRUNKS[1:]:
        assert published_weights(name).url.endswith(".pth")
        assert any(name.startswith(prefix) for prefix in STAGES)
    assert published_weights("resnet50_v2") != published_weights("resnet50")
    assert published_weights("resnet10") is None


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


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty hub cache, and downloads that fail as without a network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path


def test_weights_are_found_in_cache_and_attached_folders(offline):
    attached = offline / "input" / "my-weights"
    attached.mkdir(parents=True)
    with pytest.raises(WeightsNotFound) as caught:
        find_weights(PUBLISHED, [str(offline / "input")])
    for place in (offline / "hub/checkpoints/trunk-0123abcd.pth", f"{offline}/input/**/trunk-0123"):
        assert str(place) in str(caught.value)
    (attached / "trunk-0123abcd.pth").write_bytes(b"x")
    assert find_weights(PUBLISHED, [str(offline / "input")]) == attached / "trunk-0123abcd.pth"
    cached = offline / "hub" / "checkpoints" / "trunk-0123abcd.pth"
    cached.write_bytes(b"x")
    assert find_weights(PUBLISHED, [str(offline / "input")]) == cached


def test_asked_for_weights_are_downloaded_with_their_checksum(offline, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = find_weights(PUBLISHED, [])
    assert path == offline / "hub" / "checkpoints" / "trunk-0123abcd.pth"
    assert asked == [(PUBLISHED.url, "0123abcd")]


@pytest.mark.parametrize("weights", ["imagenet", "coco"])
def test_a_run_never_starts_from_other_weights(offline, weights):
    with pytest.raises(WeightsNotFound, match='weights="none" starts from random'):
        build_model(recipe("baseline", weights=weights))


def test_published_weights_on_disk_are_used(offline, monkeypatch):
    source = mobilenet_v2(weights=None)
    name = published_weights("mobilenet_v2").url.rsplit("/", 1)[-1]
    (offline / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(source.state_dict(), offline / "hub" / "checkpoints" / name)
    model = build_model(recipe("demo", backbone="mobilenet_v2", weights="imagenet"))
    found = model.backbone.body.state_dict()["17.conv.2.weight"]
    assert torch.equal(found, source.state_dict()["features.17.conv.2.weight"])


class Malicious(nn.Module):
    def __reduce__(self):
        return (print, ("this must never run",))


def test_files_that_are_no_state_dict_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    with pytest.raises(WeightsNotFound, match="no such file"):
        read_weights(path)
    torch.save(Malicious(), path)
    with pytest.raises(ValueError, match="not a state dict that can be loaded safely"):
        read_weights(path)
    assert "must never run" not in capsys.readouterr().out
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="expected a state dict"):
        read_weights(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a state dict"):
        read_weights(path)


def test_there_are_no_imagenet_weights_for_the_small_trunk():
    with pytest.raises(ValueError, match="no published ImageNet weights for 'resnet10'"):
        build_model(recipe("demo", weights="imagenet"))
    with pytest.raises(ValueError, match="backbone='resnet50', not 'resnet10'"):
        build_model(recipe("demo", weights="coco"))
