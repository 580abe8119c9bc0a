from collections import OrderedDict
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from src_snippets.convert_detectron2 import (
    background_first,
    convert,
    main,
    read_checkpoint,
    required_settings,
)
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import make_config
from tests.conftest import ROOT

BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}


class Checkpoint:
    """A state dict with detectron2's names, small but for its backbone, and what it computes.

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

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def conv(self, name, out, into, kernel, norm=True):
        self.state[f"{name}.weight"] = self.random(out, into, kernel, kernel) / (into**0.5 * kernel)
        if not norm:
            self.state[f"{name}.bias"] = self.random(out)
            return
        for end in ("weight", "bias", "running_mean"):
            self.state[f"{name}.norm.{end}"] = self.random(out) / 4
        self.state[f"{name}.norm.running_var"] = self.random(out).square() + 0.5

    def linear(self, name, out, into):
        self.state[f"{name}.weight"] = self.random(out, into) / into**0.5
        self.state[f"{name}.bias"] = self.random(out)

    def run(self, name, x, stride=1):
        """A convolution with its norm if it has one."""
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        x = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)
        if f"{name}.norm.weight" not in self.state:
            return x
        ends = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.norm.{end}"] for end in ends))

    def levels(self, image) -> list:
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


@pytest.mark.parametrize("end", ["pkl", "pth"])
def test_a_converted_checkpoint_gives_the_same_layer_by_layer(checkpoint, tmp_path, end):
    path = tmp_path / f"model_final.{end}"
    if end == "pkl":
        save_pickle(checkpoint.state, path)
    else:
        torch.save({"model": checkpoint.state, "iteration": 1}, path)
    settings = main(str(path), str(tmp_path / "made.pt"))
    settings |= dict(weights=str(tmp_path / "made.pt"), class_names=tuple("abcdef"))
    model = build_model(make_config("demo", **settings)).eval()
    image = torch.randint(0, 256, (3, 64, 128), generator=torch.manual_seed(1))
    batch, _ = model.transform([image.to(torch.uint8)])
    with torch.inference_mode():
        theirs = checkpoint.levels(image.float())
        for ours, wanted in zip(model.backbone(batch.tensors).values(), theirs, strict=True):
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        head, name, x = model.rpn.head([theirs[1]]), "proposal_generator.rpn_head", theirs[1]
        for part in (".conv0", ".conv1") if checkpoint.newer else ("",):
            x = checkpoint.run(f"{name}.conv{part}", x).relu()
        for ours, part in zip(head, ("objectness_logits", "anchor_deltas"), strict=True):
            assert torch.allclose(ours[0], checkpoint.run(f"{name}.{part}", x), atol=1e-4)
        small, large = torch.randn(3, 8, 7, 7), torch.randn(3, 8, 14, 14)
        scores, offsets, masks = checkpoint.heads(small, large)
        heads = model.roi_heads
        our_scores, our_offsets = heads.box_predictor(heads.box_head(small))
        assert torch.allclose(our_scores, scores.roll(1, 1), atol=1e-4)  # background first
        assert torch.allclose(our_offsets[:, 4:], offsets, atol=1e-4)
        our_masks = heads.mask_predictor(heads.mask_head(large))
        assert torch.allclose(our_masks[:, 1:], masks, atol=1e-4)


def test_a_converted_checkpoint_starts_other_classes(tmp_path, capsys):
    source, target = tmp_path / "model_0001.pkl", tmp_path / "made.pt"
    checkpoint = Checkpoint(newer=True)
    save_pickle(checkpoint.state, source)
    command = [sys.executable, "-m", "src_snippets.convert_detectron2", source, target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"weights='{target}', backbone='resnet50', fpn_channels=8" in result.stdout
    settings = required_settings(checkpoint.state) | dict(weights=str(target))
    model = build_model(make_config("demo", **settings))
    wanted = checkpoint.state["backbone.bottom_up.res3.1.conv2.weight"]
    assert torch.equal(model.backbone.body.layer2[1].conv2.weight, wanted)
    assert "not pretrained: roi_heads.box_predictor" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Set backbone, fpn_channels and heads"):
        build_model(make_config("demo", weights=str(target)))


def test_checkpoints_of_other_models_are_refused(tmp_path):
    state = Checkpoint(newer=False).state
    with pytest.raises(ValueError, match=r"sem_seg_head.weight: no layer of detectron2's"):
        convert(state | {"sem_seg_head.weight": torch.zeros(1)})
    del state["roi_heads.mask_head.predictor.weight"]
    save_pickle(state, tmp_path / "boxes.pkl")
    with pytest.raises(ValueError, match=r"boxes.pkl: No roi_heads.mask_head.predictor: expected"):
        main(str(tmp_path / "boxes.pkl"), str(tmp_path / "made.pt"))
    assert not (tmp_path / "made.pt").exists()


def test_background_is_moved_to_the_front():
    rows = torch.tensor([[1.0], [2.0], [9.0]])
    assert background_first(rows, 0).tolist() == [[9], [1], [2]]
    assert background_first(rows, 1).tolist() == [[0], [1], [2], [9]]


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_pickles_run_nothing(tmp_path, capsys):
    path = tmp_path / "weights.pkl"
    with path.open("wb") as file:
        pickle.dump({"model": Malicious()}, file)
    with pytest.raises(ValueError, match=r"read safely: the file calls builtins.print"):
        read_checkpoint(path)
    assert "must never run" not in capsys.readouterr().out
    with path.open("wb") as file:
        pickle.dump({"a": np.arange(3.0, dtype=np.float32)}, file, protocol=0)
    older = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(older)
    assert read_checkpoint(path)["a"].tolist() == [0, 1, 2]
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        read_checkpoint(path)
