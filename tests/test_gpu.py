"""No tensor meets one of another device: training and prediction with a pretended GPU."""

from functools import partial
import io
import json
from pathlib import Path
import re
from unittest.mock import Mock

import pytest
import torch
from torchvision import ops

from src_snippets.inference.predict import predict_image
from src_snippets.model.mask_rcnn import build_model, to_device
from src_snippets.model.roi_align import CellRoIAlign
from src_snippets.setup.config import make_config
from src_snippets.setup.devices import is_out_of_memory
from src_snippets.training.checkpoints import load_checkpoint, load_trained
from src_snippets.training.trainer import launch_training, Session, train
from tests import gpu
from tests.benchmarks.cases import counted_subset, grid_sample
from tests.conftest import field_of_cells
from tests.pretended_gpu import pretended_gpu
from tests.test_notebook import check_outputs, QUICK, run
from tests.test_recipes import SMALL

TINY = SMALL | dict(class_names=("a", "b", "c"), batch_size=2, workers=0, score_threshold=0.05)
CHOICES = {
    "accumulation": dict(accumulate=2, grey=True, schedule="cosine", warmup_steps=1),
    "attention": dict(attention="cbam", best_by="loss", scale=2.0),
    "older heads": dict(head_norm="none", norm="frozen", optimizer="sgd", attention="se"),
    "pasting": dict(copy_paste=0.5, class_crops=0.5, ema=0.9),
    "tiles and views": dict(tile=64, tta="flips", overlaps=False, box_layers=2),
    "timm": dict(backbone="timm:test_convnext.r160_in1k", layer_decay=0.8),
}


def test_a_pretended_gpu_refuses_what_a_gpu_would():
    here = torch.ones(3)
    with pretended_gpu():
        there = torch.arange(3.0, device="cuda")
        assert there.device.type == "cuda"
        assert (there + 1).sum().item() == 6
        assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]  # a single value goes anywhere
        assert there.cpu().numpy().tolist() == [0, 1, 2]
        assert there[torch.tensor([1])].tolist() == [1]
        with pytest.raises(RuntimeError, match="on the GPU"):
            there + here
        with pytest.raises(RuntimeError, match="indices of the GPU"):
            here[there.long()]
        with pytest.raises(RuntimeError, match="on the GPU"):
            torch.cat([here, there])
        with pytest.raises(RuntimeError, match="on the GPU"):
            torch.stack([there.sum(), torch.zeros(())])
        with pytest.raises(RuntimeError, match="on the GPU"):
            torch.zeros(()).add_(there.sum())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        weights = here.to("cuda").requires_grad_()
        (weights * there).sum().backward()
        assert weights.grad.device.type == "cuda"
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(("backbone", "is_last"), [("convnext_tiny", False), ("resnet10", True)])
def test_wide_depthwise_convolutions_are_not_channels_last_on_older_gpus(backbone, is_last):
    config = make_config("demo", backbone=backbone, weights="none", fpn_channels=8)
    model = build_model(config)
    assert not torch.cuda.is_initialized()
    assert model.transform.layout is torch.channels_last
    with pretended_gpu():
        layout = to_device(model).transform.layout
        assert layout is (torch.channels_last if is_last else torch.contiguous_format)
        stem = next(p for p in model.backbone.parameters() if p.ndim == 4 and p.shape[1] > 1)
        assert stem.device.type == "cuda"
        assert stem.held.is_contiguous(memory_format=layout)


@torch.no_grad()
def test_inputs_of_wide_depthwise_convolutions_are_contiguous_on_older_gpus():
    """timm's norms leave them in channels_last, by which cuDNN is taken; the outputs are equal."""
    config = make_config("demo", backbone="timm:convnext_atto", weights="none", fpn_channels=8)
    model, seen = build_model(config), []
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (7, 7):
            part.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    image = torch.rand(1, 3, 64, 64)
    before = model.backbone(image.contiguous(memory_format=model.transform.layout))
    assert [values.is_contiguous() for values in seen] == [False] * 12
    seen.clear()
    with pretended_gpu():
        after = {k: v.cpu() for k, v in to_device(model).backbone(image.to("cuda")).items()}
    for name, features in before.items():
        assert torch.allclose(features, after[name], atol=1e-5)
    assert [values.held.is_contiguous() for values in seen] == [True] * 12


@pytest.mark.parametrize("name", CHOICES)
def test_training_and_prediction_stay_on_their_device(name, tmp_path, capsys):
    """In fp16 with its scaler, as on a T4, with a crowd among the instances."""
    config = make_config("baseline", **(TINY | dict(backbone="resnet10") | CHOICES[name]))
    samples = [field_of_cells(seed, 96) for seed in range(4)]
    samples[1].labels[1] = -1
    train_part, val_part = counted_subset(samples[:3], 3), samples[3:] * 2
    with pretended_gpu():
        session = Session(0.0)
        stop = partial(setattr, session, "terminated", True)  # after an epoch, as SIGTERM does
        first = train(config, train_part, val_part, tmp_path, session, lambda *_: stop())
        history = train(config, train_part, val_part, tmp_path)
        model = load_trained(tmp_path / "best.pt", config)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        for sample in val_part:
            assert predict_image([model], sample.image, config).size == (96, 96)
    assert (len(first), len(history)) == (1, 2)
    assert all(row["loss"] > 0 and row["scale"] > 0 for row in history)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["scaler"]["scale"] == history[-1]["scale"]
    assert "memory" not in capsys.readouterr().out  # the trial step fits


def test_a_batch_that_does_not_fit_is_halved(tmp_path, capsys, monkeypatch):
    really = torch.Tensor.backward
    config = make_config("baseline", **(TINY | dict(backbone="resnet10", epochs=1, precision="no")))
    samples, calls = [field_of_cells(seed, 96) for seed in range(4)], []

    def full(loss, *arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return really(loss, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", full)
    monkeypatch.setattr("src_snippets.training.trainer.time.sleep", range)
    with pretended_gpu():
        launch_training(config, samples, [], tmp_path, None, None, True)
    assert "batch_size=1, accumulate=2" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "last.pt")["steps"] == 2
    assert len(calls) == 2 + 4


def test_an_error_that_looks_like_full_memory_is_named(tmp_path, monkeypatch):
    """cuDNN says the same of full memory and of what it cannot compute."""
    config = make_config("baseline", **(TINY | dict(backbone="resnet10", epochs=1, batch_size=1)))
    text = "GET was unable to find an engine to execute this computation"
    monkeypatch.setattr(torch.Tensor, "backward", Mock(side_effect=RuntimeError(text)))
    with pretended_gpu(), pytest.raises(RuntimeError, match=f"one crop.*{text}"):
        launch_training(config, [field_of_cells(0, 96)], [], tmp_path, None, None, True)


def test_features_that_roi_align_cannot_count_are_too_large(monkeypatch):
    """Its kernel on GPUs computes int32 indices: 2**31 values or more would be read wrongly."""
    align, boxes = CellRoIAlign(7), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
    monkeypatch.setattr(ops.MultiScaleRoIAlign, "forward", lambda *_: "pooled")
    features = Mock(is_cuda=True, numel=lambda: 2**31 - 1)
    assert align({"0": features}, boxes, [(64, 64)]) == "pooled"
    features.numel = lambda: 2**31
    with pytest.raises(torch.OutOfMemoryError) as raised:
        align({"0": features}, boxes, [(64, 64)])
    assert is_out_of_memory(raised.value)  # so tiles or batches get smaller


def report(*parts) -> dict[str, str]:
    """What `python -m tests.gpu` says, by row."""
    out = io.StringIO()
    gpu.run(parts, out)
    lines = [line.strip("| ") for line in out.getvalue().splitlines()]
    return dict(line.split(" | ", 1) for line in lines[2:])


def test_the_report_on_a_gpu_has_a_row_for_each_measurement():
    """Each part of `python -m tests.gpu` but the fork, which needs a driver."""
    samples = [grid_sample(16, 96)] * 2
    options = TINY | dict(class_names=("a",), epochs=2, backbone="resnet10")
    del options["batch_size"]
    with pretended_gpu():
        rows = report(
            gpu.versions,
            partial(gpu.depthwise, 8, 16, 1),
            partial(gpu.training_speed, samples, ("baseline",), (1, 2), 1, **options),
            partial(gpu.operators, samples, ("baseline", "best"), **options),
            partial(gpu.precisions, samples, **options),
            partial(gpu.resume, samples, **options),
            partial(gpu.prediction, samples, ("baseline",), 1, **options),
            partial(gpu.scarce_memory, samples, 4.0, **options),
        )
    assert rows["GPUs"] == "1 x pretended"
    assert rows["memory of the first"] == "16.0 GB"
    for kernel in ("3x3", "5x5", "7x7"):
        assert sum(name.startswith(f"depthwise {kernel}, float16") for name in rows) == 2
    for size in (1, 2):
        assert rows[f"baseline, batch size {size}"].endswith("1.0 GB")
    for name in ("baseline", "best"):
        text = rows[f"{name}, operators per training step"]
        print(f"{name}: {text}")
        assert float(text.split()[-1]) < 4 / 3
    assert "fp16 scale 65536" in rows["losses by epoch, precision=fp16"]
    assert rows["run resumed after epoch 1 of 2"] == "differs by 0"
    assert "images/s" in rows["baseline, prediction of 96 x 96 px in one view"]
    assert "loss" in rows["training with 4 GB"]
    assert "detections" in rows["prediction of 384 x 384 px with it"]
    assert not any("FAIL" in f"{name} {text}" for name, text in rows.items())


def test_the_report_trains_on_all_gpus_and_prints_one_table(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda _: None)
    samples = [grid_sample(16, 96)] * 4
    options = dict(class_names=("a",), crop=96, batch_size=2, workers=2)
    rows = report(partial(gpu.several_gpus, samples, "demo", 3, **options))
    for name in ("demo, training on 2 GPUs", "demo, training on 1 GPU"):
        assert re.match(r"[\d.]+ crops/s, losses by epoch [\d.]+(, [\d.]+){2}$", rows.pop(name))
    assert not rows
    assert not capsys.readouterr().out


def test_a_part_of_the_report_that_fails_is_a_row_and_the_others_follow():
    def broken():
        yield "one", 1
        raise RuntimeError("cuDNN: no kernel\nsecond line")

    def fine():
        yield "two", 2

    rows = report(broken, fine)
    assert rows["one"] == "1"
    assert rows["broken"].startswith("FAILED after 0 s: RuntimeError: cuDNN: no kernel")
    assert rows["two"] == "2"


def test_without_a_gpu_the_report_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert "No GPU" in capsys.readouterr().out


def test_the_whole_story_on_a_pretended_gpu(tmp_path, demo_root):
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_OUT=str(tmp_path))
    environ |= dict(HW3_SETTINGS=json.dumps(QUICK | dict(ema=0.9)))
    command = ["-m", "tests.pretended_gpu", "src_snippets.notebook"]
    run(command, Path(__file__).parents[1], **environ)
    check_outputs(tmp_path, demo_root)
