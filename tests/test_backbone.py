from copy import deepcopy
import shutil

import pytest
from safetensors.torch import save_file
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

from src_snippets.model.backbone import (
    ALIASES,
    Attention,
    backbone_stages,
    build_backbone,
    find_weights_file,
    read_state_dict,
)
from src_snippets.model.mask_rcnn import build_model, count_parameters
from src_snippets.setup.config import make_config, RECIPES
from tests.conftest import real_data

# Every family once, with the smallest of timm's; the others differ in depth and width alone.
NAMES = (
    "resnet10",
    "resnet18",
    "timm:mobilenetv2_100",
    "timm:efficientnet_b0.ra_in1k",
    "timm:convnextv2_atto",
    "timm:regnety_002",
    "timm:hrnet_w18_small",
    "timm:swin_tiny_patch4_window7_224",
)


def small(name="resnet10", **changes):
    return make_config("demo", backbone=name, fpn_channels=16, **changes)


@pytest.fixture(autouse=True)
def no_download(monkeypatch, tmp_path):
    """The Hugging Face hub as without a network and with an empty cache."""

    def refuse(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)


@pytest.fixture
def attached(monkeypatch, tmp_path):
    """A folder that stands for /kaggle/input."""
    folder = tmp_path / "input" / "my-weights"
    folder.mkdir(parents=True)
    monkeypatch.setattr(find_weights_file, "__defaults__", ([str(tmp_path / "input")],))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_levels_have_their_strides_and_width(name):
    model = build_backbone(small(name)).eval()
    with torch.inference_mode():
        levels = model(torch.zeros(1, 3, 64, 128))
    assert {key: tuple(value.shape) for key, value in levels.items()} == {
        "0": (1, 16, 16, 32),
        "1": (1, 16, 8, 16),
        "2": (1, 16, 4, 8),
        "3": (1, 16, 2, 4),
        "pool": (1, 16, 1, 2),
    }


def test_aliases_and_recipes_name_models_of_timm():
    for alias, name in ALIASES.items():
        published = timm.models.get_pretrained_cfg(name)
        assert published is not None, name
        assert published.url
        assert not any(tag in name for tag in ("in12k", "in21k", "in22k"))
        assert "." in name or alias in ("resnet10", "resnet50_v1")
    for recipe in RECIPES:
        backbone = make_config(recipe).backbone
        name = ALIASES.get(backbone, backbone.removeprefix("timm:"))
        assert timm.models.get_pretrained_cfg(name) is not None, name


def test_models_without_such_features_are_refused():
    with pytest.raises(ValueError, match=r"backbone='timm:resnet51x'.*[Uu]nknown model"):
        build_backbone(small("timm:resnet51x"))
    with pytest.raises(ValueError, match="backbone='timm:mixer_s16_224'"):
        build_backbone(small("timm:mixer_s16_224"))
    with pytest.raises(ValueError, match="no features with strides"):
        build_backbone(small("timm:vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="no features with strides"):  # it pads nothing
        build_backbone(small("timm:inception_v3"))
    with pytest.raises(ValueError, match=r"'timm:maxvit_tiny_tf_224'.*divisible by window"):
        build_backbone(small("timm:maxvit_tiny_tf_224"))


# Initial weights


def test_a_backbone_file_of_timm_or_torchvision(tmp_path, capsys):
    source = resnet18(num_classes=7)  # the last layer may have another size
    torch.save(source.state_dict(), tmp_path / "some.pth")
    save_file(source.state_dict(), tmp_path / "some.safetensors")
    for name in ("some.pth", "some.safetensors"):
        model = build_backbone(small("resnet18", weights=str(tmp_path / name)))
        own, wanted = model.body.state_dict(), source.state_dict()
        assert len(own) == 120
        assert all(torch.equal(value, wanted[key]) for key, value in own.items())
        assert f"Initial weights: {tmp_path / name}" in capsys.readouterr().out


def test_a_file_of_another_model_never_gives_random_weights(tmp_path):
    path = tmp_path / "some.pth"
    state = resnet18().state_dict()
    for wrong in (
        mobilenet_v2().state_dict(),  # not one name
        {key: value for key, value in state.items() if key != "layer3.0.conv2.weight"},
        state | {"conv1.weight": torch.zeros(64, 3, 3, 3)},
        resnet50().state_dict(),
        {"a": torch.zeros(0)},
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=r"backbone='resnet18', weights='.*some.pth'"):
            build_backbone(small("resnet18", weights=str(path)))
    torch.save(mobilenet_v2().state_dict(), path)
    with pytest.raises(ValueError, match="parameters are not in the file"):
        build_backbone(small("timm:mobilenetv2_100", weights=str(path)))


@pytest.mark.parametrize("name", ["resnet18.tv_in1k.safetensors", "resnet18-f37072fd.pth"])
def test_imagenet_weights_are_found_below_the_attached_folders(attached, name):
    source = resnet18().state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(source, attached / name)
    model = build_model(small("resnet18", weights="imagenet"))
    assert torch.equal(model.backbone.body.layer2[0].conv1.weight, source["layer2.0.conv1.weight"])
    assert find_weights_file(["nothing", name]) == attached / name
    assert find_weights_file(["nothing"]) is None


def test_a_run_never_starts_from_other_weights(attached):
    with pytest.raises(FileNotFoundError) as caught:
        build_model(make_config("baseline"))
    for part in ("resnet50.tv_in1k.safetensors", "resnet50-0676ba61.pth", "/kaggle/input"):
        assert part in str(caught.value)
    assert "weights='none' starts from random weights" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nobody publishes"):
        build_model(small("resnet10", weights="imagenet"))
    with pytest.raises(FileNotFoundError, match="nobody publishes"):
        build_model(small("resnet50_v1", weights="imagenet"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_model(small(weights="/nowhere.pth"))


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_files_that_are_no_state_dict_are_refused(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    for content in (Malicious(), {"model": Malicious()}, {"epoch": 3}, {}, [1]):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not a state dict that can be read safely"):
            read_state_dict(path)
    assert "must never run" not in capsys.readouterr().out
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a state dict"):
        read_state_dict(path)
    torch.save({"model": {"a": torch.ones(2)}, "history": [1]}, path)  # a checkpoint
    assert list(read_state_dict(path)) == ["a"]


def test_real_weights_load_with_their_mean_and_std(attached):
    path = real_data("weights") / "tf_efficientnet_lite0.in1k.safetensors"
    name = "timm:tf_efficientnet_lite0.in1k"
    shutil.copy(path, attached)
    state = read_state_dict(path)
    for weights in (str(path), "imagenet"):
        model = build_backbone(small(name, weights=weights))
        own = dict(model.body.named_parameters())
        assert len(own) > 100
        assert all(torch.equal(value, state[key]) for key, value in own.items())
        assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert build_backbone(small("resnet18")).mean == (0.485, 0.456, 0.406)


def test_the_first_resnet_has_its_strides_in_the_first_convolution():
    first, later = (build_backbone(small(name)).body for name in ("resnet50_v1", "resnet50"))
    assert first.state_dict().keys() == later.state_dict().keys()
    strides = [[b.layer3[0].conv1.stride, b.layer3[0].conv2.stride] for b in (first, later)]
    assert strides == [[(2, 2), (1, 1)], [(1, 1), (2, 2)]]
    assert first.layer1[0].conv1.stride == (1, 1)


def test_resnet10_has_one_block_per_stage():
    assert [len(stage[-1]) for stage in backbone_stages(build_backbone(small()).body)[1:]] == [
        1
    ] * 4


# Attention


@pytest.mark.parametrize("kind", ["se", "cbam"])
@pytest.mark.parametrize(
    "name",
    [
        "resnet10",
        "timm:mobilenetv2_100",
        "timm:hrnet_w18_small",
        "timm:swin_tiny_patch4_window7_224",
    ],
)
def test_attention_starts_as_the_identity_and_keeps_names(kind, name):
    torch.manual_seed(0)
    plain = build_backbone(small(name)).eval()
    attended = build_backbone(small(name, attention=kind)).eval()
    missing, unexpected = attended.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} == {"attention"}
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        for key, level in plain(image).items():
            assert torch.equal(attended(image)[key], level)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("resnet10", True), ("timm:mobilenetv2_100", True), ("timm:hrnet_w18_small", False)],
)
def test_attention_acts_between_stages_where_timm_names_them(name, inside):
    model = build_backbone(small(name, attention="se")).eval()
    with torch.inference_mode():
        before = model.body(torch.ones(1, 3, 64, 64))
        model.attention[0].gates.fc2.bias.fill_(-100.0)  # closes the first stage
        after = model.body(torch.ones(1, 3, 64, 64))
        assert torch.equal(before[-1], after[-1]) != inside
        closed = model.attention[0](before[0])
        assert closed.abs().max() < 1e-6
        assert torch.equal(after[0], closed if inside else before[0])


def test_a_copy_has_its_own_attention():
    """As the EMA of the weights is made."""
    model = build_backbone(small(attention="se")).eval()
    copy, image = deepcopy(model), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = copy(image)["3"]
        model.attention[0].gates.fc2.bias.fill_(-100.0)
        assert torch.equal(copy(image)["3"], before)
        copy.attention[0].gates.fc2.bias.fill_(-100.0)
        assert not torch.equal(copy(image)["3"], before)


def test_attention_by_hand():
    block, x = Attention("se", 2), torch.full((1, 2, 3, 3), 4.0)
    block.gates.fc2.bias.data[:] = torch.tensor([100.0, -100.0])
    assert block(x)[0, :, 0, 0].tolist() == pytest.approx([8.0, 0.0])
    block = Attention("cbam", 1).eval()
    block.gates.spatial.conv.conv.weight.data.zero_()[0, 0, 3, 3] = 1.0  # of the pixel's mean
    block.gates.spatial.conv.bn.weight.data.fill_(1.0)
    x = torch.tensor([[[[0.0, 100.0], [-100.0, 0.0]]]])
    assert block(x)[0, 0].flatten().tolist() == pytest.approx([0.0, 200.0, 0.0, 0.0])
    block = Attention("cbam", 1).eval()
    for layer in (block.gates.channel.fc1, block.gates.channel.fc2):
        layer.weight.data.fill_(0.5)
    # Mean 1 and maximum 3 go through the same MLP: one hidden unit, 0.5 * 0.5.
    x = torch.tensor([[[[3.0, -1.0]]]])
    wanted = 2 / (1 + torch.tensor(-1.0).exp()) * torch.tensor([3.0, -1.0])
    assert torch.allclose(block(x)[0, 0, 0], wanted)


@pytest.mark.parametrize("kind", ["se", "cbam"])
def test_attention_learns(kind):
    model = build_backbone(small(attention=kind))
    sum(level.square().mean() for level in model(torch.rand(2, 3, 64, 64)).values()).backward()
    for part in model.attention:
        last = part.gates.fc2 if kind == "se" else part.gates.channel.fc2
        assert last.weight.grad.abs().sum() > 0
    if kind == "cbam":
        assert all(p.gates.spatial.conv.bn.weight.grad.abs() > 0 for p in model.attention)


# Stages, norms


@pytest.mark.parametrize("name", ["resnet10", "timm:mobilenetv2_100", "timm:convnextv2_atto"])
def test_stages_hold_each_parameter_once(name):
    body = build_backbone(small(name)).body
    stages = backbone_stages(body)
    counts = [sum(count_parameters(module) for module in stage) for stage in stages]
    assert len(counts) == 5
    assert min(counts) > 0
    assert sum(counts) == sum(p.numel() for p in body.parameters())


def test_stages_that_timm_does_not_name_are_one():
    body = build_backbone(small("timm:hrnet_w18_small")).body
    (stage,) = backbone_stages(body)
    assert sum(map(count_parameters, stage)) == count_parameters(body)


@pytest.mark.parametrize("name", ["resnet10", "timm:regnety_002"])
def test_frozen_norms_keep_their_statistics_in_training(name):
    backbone = build_backbone(small(name, norm="frozen"))
    image, before = torch.rand(2, 3, 64, 64), backbone.eval().state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with torch.inference_mode():
        expected = backbone.body(image)
        for level, same in zip(backbone.train().body(image), expected, strict=True):
            assert torch.equal(level, same)
        backbone(image)
    state = backbone.state_dict()
    changed = {key.split(".")[0] for key in state if not torch.equal(state[key], before[key])}
    assert changed == {"fpn"}
    assert {module.training for module in backbone.fpn.modules()} == {True}
    norms = [module for module in backbone.body.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(weight.requires_grad for norm in norms for weight in norm.parameters())
    assert any(weight.requires_grad for weight in backbone.body.parameters())
    with torch.autocast("cpu", torch.bfloat16):  # a norm of its own class would be in float32
        assert {level.dtype for level in backbone.body(image)} == {torch.bfloat16}


def test_an_fpn_without_norms():
    model = build_backbone(small(head_norm="none"))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.fpn.modules())
    assert model.fpn.inner_blocks[0][0].bias is not None
