from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2

from src_snippets import backbones
from src_snippets.backbones import (
    build_backbone,
    build_resnet10,
    find_weights,
    read_weights,
    TRUNKS,
    WeightsNotFound,
)
from src_snippets.config import recipe
from src_snippets.model import build_model
from tests.conftest import real_data

PUBLISHED = SimpleNamespace(url="https://example.invalid/models/trunk-0123abcd.pth")


@pytest.mark.parametrize("name", TRUNKS)
def test_levels_have_the_stated_strides_and_width(name):
    config = recipe("demo", backbone=name, fpn_channels=16)
    model = build_backbone(config, None).eval()
    with torch.inference_mode():
        levels = model(torch.zeros(1, 3, 64, 128))
    assert {key: tuple(value.shape) for key, value in levels.items()} == {
        "0": (1, 16, 16, 32),
        "1": (1, 16, 8, 16),
        "2": (1, 16, 4, 8),
        "3": (1, 16, 2, 4),
        "pool": (1, 16, 1, 2),
    }


def test_a_trunks_weights_arrive_and_wrong_ones_are_refused():
    source = build_resnet10()
    model = build_backbone(recipe("demo"), source.state_dict())
    assert torch.equal(model.body.layer3[0].conv1.weight, source.layer3[0].conv1.weight)
    without_classifier = {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    build_backbone(recipe("demo"), without_classifier)
    with pytest.raises(ValueError, match=r"do not fit resnet10: missing .*conv1.weight"):
        build_backbone(recipe("demo"), {"fc.weight": torch.zeros(1000, 512)})


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
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = reference.eval().features[:18](image)
        assert torch.allclose(model.eval().backbone.body(image)["3"], wanted, atol=1e-5)


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
    name = backbones.TRUNKS["mobilenet_v2"][1].url.rsplit("/", 1)[-1]
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
