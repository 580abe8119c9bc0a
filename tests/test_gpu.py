"""Nothing meets a tensor of another device: training and answering with a pretended GPU."""

from functools import partial
import json
from pathlib import Path

import pytest
import torch

from src_snippets.answers import answer_held_out
from src_snippets.config import recipe
from src_snippets.costs import measure_costs
from src_snippets.evaluate import hits_of
from src_snippets.forms import with_crowds
from src_snippets.model import choose_precision
from src_snippets.predict import answer_samples
from src_snippets.thresholds import tune_thresholds
from src_snippets.train import fit, load_checkpoint, load_trained, Session
from tests.conftest import field_of_cells
from tests.pretended_gpu import pretended_gpu
from tests.test_notebook import check_outputs, QUICK, run
from tests.test_recipes import SMALL

TINY = SMALL | dict(num_classes=3, batch_size=2, workers=0, score_floor=0.05)
CHOICES = {
    "cascade": dict(cascade=True, accumulate=2, grey=True),
    "attention": dict(attention="cbam", norm="group", best_by="loss", scale=2.0),
    "older heads": dict(head_norm="none", norm="frozen", half_pixel=False, optimizer="sgd"),
    "stains and pasting": dict(stain_norm=True, copy_paste=0.5, rare_crops=0.5, ema=0.9),
    "short sides": dict(short_sides=(48, 64), fine_stem=True, pyramid=(2, 4, 8, 16, 32)),
    "tiles and views": dict(tile=64, test_views="flips", rescore=True, overlaps=False, tune=True),
    "timm": dict(backbone="timm:test_convnext.r160_in1k", layer_decay=0.8, norm="sync"),
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


def test_a_precision_that_the_gpu_has_not_is_refused():
    with pretended_gpu():
        device = torch.device("cuda")
        with pytest.raises(ValueError, match="this GPU has none"):
            choose_precision(recipe("baseline", precision="bf16"), device)
        wanted = ("auto", "fp16", "no")
        chosen = [choose_precision(recipe("baseline", precision=p), device) for p in wanted]
        assert chosen == ["fp16", "fp16", "no"]


@pytest.mark.parametrize("name", CHOICES)
def test_training_and_answering_stay_on_their_device(name, tmp_path):
    """In fp16 with its scaler, as on a T4, with a crowd among the cells."""
    config = recipe("baseline", **(TINY | dict(backbone="resnet10") | CHOICES[name]))
    samples = [field_of_cells(seed, 96) for seed in range(4)]
    samples[1].labels[1] = -1
    train, val = samples[:3], samples[3:] * 2
    with pretended_gpu():
        assert measure_costs(config, train, 0).room == 16
        session = Session(0.0)
        stop = partial(setattr, session, "told", True)  # after an epoch, as SIGTERM does
        first = fit(config, train, val, tmp_path, session, lambda *_, **__: stop())
        history = fit(config, train, val, tmp_path)
        model, own = load_trained(tmp_path / "best.pt", config)
        assert {p.device.type for p in model.parameters()} == {"cuda"}
        answers = answer_samples([(model, own)], val, config)
        if config.tune:
            truths = [with_crowds(sample) for sample in val]
            ask = partial(answer_held_out, [((model, own), val)], config)
            tune_thresholds(ask, truths, hits_of(answers, truths, 3), config)
    assert (len(first), len(history)) == (1, 2)
    assert all(row["loss"] > 0 for row in history)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["scaler"]["scale"] > 0


def test_the_whole_story_on_a_pretended_gpu(tmp_path, demo_root):
    environ = dict(HW3_DATA=str(demo_root), HW3_RECIPE="demo", HW3_OUT=str(tmp_path))
    environ |= dict(HW3_SETTINGS=json.dumps(QUICK | dict(ema=0.9)))
    command = ["-m", "tests.pretended_gpu", "src_snippets.notebook"]
    said, _ = run(command, Path(__file__).parents[1], **environ)
    check_outputs(tmp_path, demo_root)
    assert "of the GPU's 16.0 GB" in said
