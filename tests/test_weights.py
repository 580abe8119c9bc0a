from collections import OrderedDict
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F
from torchvision.models import mobilenet_v2

from src_snippets.backbones import published_weights
from src_snippets.config import recipe
from src_snippets.model import build_model
from src_snippets.weights import (
    background_first,
    detectron2_settings,
    find_weights,
    from_detectron2,
    read_weights,
    WeightsNotFound,
)

PUBLISHED = SimpleNamespace(url="https://example.invalid/models/trunk-0123abcd.pth")


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


# detectron2

BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}


class Checkpoint:
    """A state dict with detectron2's names, small but for its trunk, and what it computes.

    The forward pass is written from the published definition: `newer` is that of the large-scale
    jitter runs (norms everywhere, red first), else that of the first baselines.
    """

    def __init__(self, newer: bool, classes: int = 6):
        self.newer, self.state = newer, OrderedDict()
        self.generator = torch.Generator().manual_seed(0)
        self.conv("backbone.bottom_up.stem.conv1", 64, 3, 7)
        before = 64
        for stage, count in BLOCKS.items():
            inner = 64 * 2 ** (stage - 2)
            for block in range(count):
                name = f"backbone.bottom_up.res{stage}.{block}"
                if block == 0:
                    self.conv(f"{name}.shortcut", 4 * inner, before, 1)
                self.conv(f"{name}.conv1", inner, before, 1)
                self.conv(f"{name}.conv2", inner, inner, 3)
                self.conv(f"{name}.conv3", 4 * inner, inner, 1)
                before = 4 * inner
            self.conv(f"backbone.fpn_lateral{stage}", 8, before, 1, newer)
            self.conv(f"backbone.fpn_output{stage}", 8, 8, 3, newer)
        head = "proposal_generator.rpn_head"
        for name in (f"{head}.conv.conv0", f"{head}.conv.conv1") if newer else (f"{head}.conv",):
            self.conv(name, 8, 8, 3, False)
        self.conv(f"{head}.objectness_logits", 3, 8, 1, False)
        self.conv(f"{head}.anchor_deltas", 12, 8, 1, False)
        for number in range(1, 5):
            if newer:
                self.conv(f"roi_heads.box_head.conv{number}", 8, 8, 3)
            self.conv(f"roi_heads.mask_head.mask_fcn{number}", 8, 8, 3, newer)
        self.linear("roi_heads.box_head.fc1", 16, 8 * 49)
        if not newer:
            self.linear("roi_heads.box_head.fc2", 16, 16)
        self.linear("roi_heads.box_predictor.cls_score", classes + 1, 16)
        self.linear("roi_heads.box_predictor.bbox_pred", 4 * classes, 16)
        self.conv("roi_heads.mask_head.deconv", 8, 8, 2, False)
        self.conv("roi_heads.mask_head.predictor", classes, 8, 1, False)
        self.state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def conv(self, name, out, into, kernel, norm=True):
        self.state[f"{name}.weight"] = self.draw(out, into, kernel, kernel) / (into**0.5 * kernel)
        if not norm:
            self.state[f"{name}.bias"] = self.draw(out)
            return
        for end in ("weight", "bias", "running_mean"):
            self.state[f"{name}.norm.{end}"] = self.draw(out) / 4
        self.state[f"{name}.norm.running_var"] = self.draw(out).square() + 0.5

    def linear(self, name, out, into):
        self.state[f"{name}.weight"] = self.draw(out, into) / into**0.5
        self.state[f"{name}.bias"] = self.draw(out)

    def run(self, name, x, stride=1):
        """A convolution with its norm if it has one."""
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
        if f"{name}.norm.weight" not in self.state:
            return x
        ends = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.norm.{end}"] for end in ends))

    def pyramid(self, image) -> list:
        """Five levels from one image (3, H, W) of 0..255, red first."""
        mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
        if self.newer:
            x = ((image - mean) / torch.tensor([58.395, 57.12, 57.375])[:, None, None])[None]
        else:
            x = (image - mean).flip(0)[None]
        x = F.max_pool2d(self.run("backbone.bottom_up.stem.conv1", x, 2).relu(), 3, 2, 1)
        found = []
        for stage, count in BLOCKS.items():
            for block in range(count):
                name = f"backbone.bottom_up.res{stage}.{block}"
                stride = 2 if block == 0 and stage > 2 else 1
                first, second = (1, stride) if self.newer else (stride, 1)
                y = self.run(f"{name}.conv1", x, first).relu()
                y = self.run(f"{name}.conv2", y, second).relu()
                y = self.run(f"{name}.conv3", y)
                x = (y + (self.run(f"{name}.shortcut", x, stride) if block == 0 else x)).relu()
            found.append(x)
        levels, above = [], 0
        for stage, x in zip((5, 4, 3, 2), reversed(found), strict=True):
            above = self.run(f"backbone.fpn_lateral{stage}", x) + above
            levels.insert(0, self.run(f"backbone.fpn_output{stage}", above))
            above = F.interpolate(above, scale_factor=2, mode="nearest")
        return [*levels, F.max_pool2d(levels[-1], 1, 2)]

    def heads(self, small, large):
        """Class logits and offsets of (R, 8, 7, 7), mask logits of (R, 8, 14, 14)."""
        for number in range(1, 5):
            small = (
                self.run(f"roi_heads.box_head.conv{number}", small).relu() if self.newer else small
            )
            large = self.run(f"roi_heads.mask_head.mask_fcn{number}", large).relu()
        x = small.flatten(1)
        for name in ("fc1",) if self.newer else ("fc1", "fc2"):
            x = self.dense(f"roi_heads.box_head.{name}", x).relu()
        ends = [self.dense(f"roi_heads.box_predictor.{k}", x) for k in ("cls_score", "bbox_pred")]
        name = "roi_heads.mask_head.deconv"
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        large = F.conv_transpose2d(large, weight, bias, 2).relu()
        return *ends, self.run("roi_heads.mask_head.predictor", large)

    def dense(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])


@pytest.fixture(scope="module", params=[True, False], ids=["newer", "older"])
def checkpoint(request):
    return Checkpoint(request.param)


def save_pickle(state, path):
    """As detectron2's model zoo has them."""
    arrays = {name: value.numpy() for name, value in state.items()}
    with path.open("wb") as file:
        pickle.dump({"model": arrays, "__author__": "made here"}, file)
    return path


def test_a_checkpoint_of_detectron2_gives_the_same_layer_by_layer(checkpoint, tmp_path):
    path = save_pickle(checkpoint.state, tmp_path / "model_final.pkl")
    fitting = detectron2_settings(checkpoint.state)
    model = build_model(recipe("demo", num_classes=6, weights=str(path), **fitting)).eval()
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(1))
    seen, _ = model.transform([image.to(torch.uint8)])
    with torch.inference_mode():
        ours, theirs = (
            list(model.backbone(seen.tensors).values()),
            checkpoint.pyramid(image.float()),
        )
        for mine, wanted in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        head, name = model.rpn.head([theirs[1]]), "proposal_generator.rpn_head"
        x = theirs[1]
        for part in (".conv0", ".conv1") if checkpoint.newer else ("",):
            x = checkpoint.run(f"{name}.conv{part}", x).relu()
        for mine, part in zip(head, ("objectness_logits", "anchor_deltas"), strict=True):
            assert torch.allclose(mine[0], checkpoint.run(f"{name}.{part}", x), atol=1e-4)
        small, large = torch.randn(3, 8, 7, 7), torch.randn(3, 8, 14, 14)
        scores, offsets, masks = checkpoint.heads(small, large)
        heads = model.roi_heads
        my_scores, my_offsets = heads.box_predictor(heads.box_head(small))
        assert torch.allclose(my_scores, scores.roll(1, 1), atol=1e-4)  # background first
        assert torch.allclose(my_offsets[:, 4:], offsets, atol=1e-4)
        assert torch.allclose(heads.mask_predictor(heads.mask_head(large))[:, 1:], masks, atol=1e-4)


def test_a_checkpoint_of_detectron2_starts_other_classes_and_says_what_it_needs(tmp_path):
    checkpoint = Checkpoint(newer=True)
    path = tmp_path / "model_0001.pth"
    torch.save({"model": checkpoint.state, "iteration": 1}, path)
    fitting = detectron2_settings(checkpoint.state)
    model = build_model(recipe("demo", weights=str(path), **fitting))
    wanted = checkpoint.state["backbone.bottom_up.res3.1.conv2.weight"]
    assert torch.equal(model.backbone.body.layer2[1].conv2.weight, wanted)
    with pytest.raises(ValueError, match=r"of detectron2; to load it, set .'backbone': 'resnet50'"):
        build_model(recipe("demo", weights=str(path)))
    del checkpoint.state["roi_heads.mask_head.predictor.weight"]
    with pytest.raises(ValueError, match=r"No roi_heads.mask_head.predictor: expected"):
        detectron2_settings(checkpoint.state)
    other = Checkpoint(newer=False).state | {"sem_seg_head.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"sem_seg_head.weight: no layer of detectron2's"):
        from_detectron2(other)


def test_background_is_moved_to_the_front():
    rows = torch.tensor([[1.0], [2.0], [9.0]])
    assert background_first(rows, 0).tolist() == [[9], [1], [2]]
    assert background_first(rows, 1).tolist() == [[0], [1], [2], [9]]


def test_pickles_run_nothing(tmp_path, capsys):
    path = tmp_path / "weights.pkl"
    with path.open("wb") as file:
        pickle.dump({"model": Malicious()}, file)
    with pytest.raises(ValueError, match=r"loaded safely \(it asks for builtins.print\)"):
        read_weights(path)
    assert "must never run" not in capsys.readouterr().out
    old = b"numpy.core.multiarray"  # the name that pickles of older NumPy have
    with path.open("wb") as file:
        pickle.dump({"a": np.arange(3.0, dtype=np.float32)}, file, protocol=0)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", old))
    assert read_weights(path)["a"].tolist() == [0, 1, 2]
