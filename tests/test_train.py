import csv
from dataclasses import replace
import math
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from src_snippets import predict, train
from src_snippets.checkpoints import load_checkpoint, run_folder, save_checkpoint
from src_snippets.config import recipe
from src_snippets.evaluate import average_precision
from src_snippets.forms import coco_truth
from src_snippets.model import build_model
from src_snippets.readers import BadInput
from src_snippets.train import (
    average_rate,
    build_optimizer,
    by_image_id,
    epoch_scores,
    fit,
    has_stalled,
    load_trained,
    LOSSES,
    plateau_factor,
    quarters,
    rate_factor,
    restore_run,
    save_epoch,
    Session,
    StepGuard,
    train_epoch,
    training_loader,
    TrainingRun,
    validate,
    validation_loss,
    write_history,
)
from src_snippets.transforms import training_target
from tests.conftest import empty_sample, field_of_cells

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(demo_samples):
    samples = list(demo_samples)
    return samples[:6], samples[6:]


@pytest.fixture(scope="module")
def finished(parts, tiny_config, tmp_path_factory):
    """A run of two epochs, validated after the second."""
    folder = tmp_path_factory.mktemp("run")
    return fit(tiny_config, *parts, folder), folder


@pytest.fixture(scope="module")
def tiny_model(tiny_config):
    return build_model(tiny_config)


def test_norms_and_biases_are_not_decayed(tiny_model, tiny_config):
    optimizer = build_optimizer(tiny_model, replace(tiny_config, weight_decay=0.1))
    decays = {(p.ndim > 1, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(True, 0.1), (False, 0.0)}
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in tiny_model.parameters())


def rates_by_name(model, config):
    """The rate of each parameter by its name."""
    groups = build_optimizer(model, config).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def test_each_part_has_its_rate(tiny_model, tiny_config):
    config = replace(tiny_config, lr=1.0, group_lr=(0.1, 0.2, 0.3, 0.4), layer_decay=0.5)
    rates = rates_by_name(tiny_model, config)
    for name, wanted in {
        "backbone.body.conv1.weight": 0.1 / 16,
        "backbone.body.layer1.0.conv1.weight": 0.2 / 8,
        "backbone.body.layer4.0.conv1.weight": 0.2,
        "backbone.fpn.inner_blocks.0.0.weight": 0.3,
        "rpn.head.cls_logits.weight": 0.4,
        "roi_heads.mask_predictor.conv5_mask.bias": 0.4,
    }.items():
        assert rates[name] == pytest.approx(wanted)
    frozen = build_model(replace(tiny_config, trained_stages=2))
    assert not any("layer2" in name for name in rates_by_name(frozen, config))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_optimisers(name, kind, tiny_model, tiny_config):
    assert type(build_optimizer(tiny_model, replace(tiny_config, optimizer=name))) is kind


def test_rates_by_hand():
    config = recipe("demo", warmup_steps=4, schedule="cosine")
    found = [rate_factor(step, config, 24) for step in (0, 3, 4, 14, 24)]
    assert found == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    assert rate_factor(1000, replace(config, schedule="constant"), 24) == 1.0
    assert rate_factor(0, replace(config, warmup_steps=500), 10) == 0.5  # at most a fifth
    assert rate_factor(0, replace(config, warmup_steps=0), 1) == 1.0
    soft = replace(config, warmup="cosine")
    assert [rate_factor(step, soft, 24) for step in (1, 3)] == pytest.approx([0.5, 1.0])


def test_one_cycle_is_torchs():
    config = recipe("demo", schedule="one_cycle")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    stock = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=50)
    for step in range(50):
        assert rate_factor(step, config, 50) == pytest.approx(stock.get_last_lr()[0], abs=1e-6)
        optimizer.step()
        if step < 49:
            stock.step()


def losses_history(*losses):
    return [{"val_loss": loss, "AP50": None} for loss in losses]


def test_a_plateau_lowers_the_rate():
    assert plateau_factor([], 2) == 1.0
    assert plateau_factor([{"loss": 1.0}], 2) == 1.0
    assert plateau_factor(losses_history(3, 2, 2), 2) == 1.0
    assert plateau_factor(losses_history(3, 2, 2, 4), 2) == pytest.approx(0.1)
    assert plateau_factor(losses_history(3, 2, 2, 4, 1, 1), 2) == pytest.approx(0.1)
    assert plateau_factor(losses_history(3, 2, 2, 4, 5, 6), 2) == pytest.approx(0.01)


def test_training_stalls_after_its_patience():
    config = recipe("demo", patience=2, best_by="AP")
    history = [{"AP": value} for value in (0.1, 0.4, 0.3, 0.35)]
    assert has_stalled(history, config)
    assert not has_stalled(history[:3], config)
    assert not has_stalled([*history[:3], {"loss": 1.0}], config)
    assert not has_stalled([{"AP": 0.4}] * 9, config)  # as good as before
    assert not has_stalled(history, replace(config, patience=0))
    assert epoch_scores(losses_history(3, 2), "loss") == [-3, -2]
    assert epoch_scores(losses_history(3, 2), "AP50") == [0.0, 0.0]


def test_gradients_of_several_batches_are_added_up(parts, tiny_config, tmp_path):
    steps = []
    for name, accumulate in (("one", 1), ("two", 2)):
        config = replace(tiny_config, epochs=1, batch_size=2, accumulate=accumulate)
        (tmp_path / name).mkdir()
        fit(config, parts[0], [], tmp_path / name)
        schedule = load_checkpoint(tmp_path / name / "last.pt")["schedule"]
        steps.append(schedule["last_epoch"])
    assert steps == [len(parts[0]) // 2, math.ceil(len(parts[0]) // 2 / 2)]


def test_the_best_by_loss_and_early_stopping(parts, tiny_config, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.6, 9.0])
    monkeypatch.setattr(train, "validation_loss", lambda *_: next(values))
    config = replace(tiny_config, epochs=9, eval_every=1, batch_size=6, best_by="loss", patience=2)
    history = fit(config, *parts, tmp_path)
    assert [row["val_loss"] for row in history] == [3.0, 2.0, 2.5, 2.6]
    best = load_checkpoint(tmp_path / "best.pt")
    assert (len(best["history"]), best["best"]) == (2, -2.0)
    assert fit(config, *parts, tmp_path) == history  # it stays ended


def test_validation_loss_is_repeatable_and_changes_nothing(tiny_model, parts, tiny_config):
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    state = torch.get_rng_state()
    first = validation_loss(tiny_model, parts[1], tiny_config)
    assert first == validation_loss(tiny_model, parts[1], tiny_config) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())
    assert not any(module.training for module in tiny_model.modules())
    empty = validation_loss(tiny_model, [empty_sample(64, 64)], tiny_config)
    assert math.isfinite(empty)


def test_a_field_that_does_not_fit_is_judged_by_its_quarters(
    tiny_model, parts, tiny_config, monkeypatch
):
    """As on a GPU whose memory is full: the loss is the mean of the quarters' losses."""
    sample, really = field_of_cells(0, 320), tiny_model.forward
    sizes = []

    def little_room(images, targets):
        sizes.append(tuple(images[0].shape[-2:]))
        if max(sizes[-1]) > 200:
            raise torch.OutOfMemoryError("no room")
        return really(images, targets)

    monkeypatch.setattr(tiny_model, "forward", little_room)
    assert math.isfinite(validation_loss(tiny_model, [sample], tiny_config))
    assert sizes == [(320, 320), *[(160, 160)] * 4]
    assert not tiny_model.training
    counts = [len(training_target(part, 1)["labels"]) for part in quarters(sample)]
    whole = len(training_target(sample, 1)["labels"])
    assert whole <= sum(counts) < 2 * whole  # cells on the cuts are in both parts

    def no_room(images, targets):
        raise torch.OutOfMemoryError("none at all")

    monkeypatch.setattr(tiny_model, "forward", no_room)
    with pytest.raises(torch.OutOfMemoryError, match="none at all"):
        validation_loss(tiny_model, [sample], tiny_config)
    assert not tiny_model.training
    assert tiny_model.transform.fixed is None


def test_history_and_files(finished, tiny_config):
    history, folder = finished
    assert [row["epoch"] for row in history] == [1, 2]
    assert "AP50" not in history[0]
    assert 0 <= history[1]["AP50"] <= 1
    parts = [row[f"loss_{name}"] for row in history for name in ("mask", "classifier", "box_reg")]
    assert all(math.isfinite(value) for value in parts)
    assert sorted(p.name for p in folder.iterdir()) == [
        "before.pt",
        "best.pt",
        "history.csv",
        "last.pt",
    ]
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert rows[0]["AP50"] == ""
    assert float(rows[1]["loss"]) == pytest.approx(history[1]["loss"])
    best = load_checkpoint(folder / "best.pt")
    assert best["config"]["fpn_channels"] == tiny_config.fpn_channels
    assert set(best) == {"model", "config", "history", "best"}


def test_a_finished_run_is_not_trained_again(finished, parts, tiny_config, capsys):
    history, folder = finished
    before = (folder / "last.pt").stat().st_mtime_ns
    assert fit(tiny_config, *parts, folder) == history
    assert (folder / "last.pt").stat().st_mtime_ns == before
    assert "2 of 2 epochs are done" in capsys.readouterr().out


def test_going_on_after_an_epoch_equals_never_stopping(
    finished, parts, tiny_config, tmp_path, monkeypatch
):
    _, whole = finished

    saved = save_epoch

    def save_and_stop(run, row):
        saved(run, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_epoch", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config, *parts, tmp_path)
    monkeypatch.undo()
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1
    fit(tiny_config, *parts, tmp_path)
    wanted, found = (load_checkpoint(f / "last.pt")["model"] for f in (whole, tmp_path))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_the_best_weights_answer(finished, parts, tiny_config):
    _, folder = finished
    model, own = load_trained(folder / "best.pt", tiny_config)
    assert own == tiny_config
    answers = validate(model, parts[1], tiny_config)
    assert [a.size for a in answers] == [s.size for s in parts[1]]
    scores = average_precision(coco_truth(parts[1], 4), by_image_id(answers))
    assert scores["AP50"] == pytest.approx(load_checkpoint(folder / "best.pt")["best"])


def test_without_validation_the_last_epoch_is_best(parts, tiny_config, tmp_path):
    config = replace(tiny_config, epochs=1)
    history = fit(config, parts[0], [], tmp_path)
    assert "AP50" not in history[0]
    best, last = (load_checkpoint(tmp_path / name)["model"] for name in ("best.pt", "last.pt"))
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_mixed_precision_trains_and_may_be_changed_in_one_session(parts, tiny_config, tmp_path):
    for precision in ("bf16", "no"):
        config = replace(tiny_config, epochs=1, precision=precision)
        folder = run_folder(tmp_path, config, [])
        history = fit(config, parts[0], [], folder)
        assert math.isfinite(history[0]["loss"])
        state = load_checkpoint(folder / "best.pt")["model"]
        assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}


def test_the_full_size_recipe_trains(parts, tmp_path):
    config = recipe("baseline", weights="none", epochs=1, crop=64, batch_size=2)
    history = fit(config, parts[0][:2], parts[1][:1], tmp_path)
    assert math.isfinite(history[0]["loss"])
    assert history[0]["AP50"] is not None


def test_fields_without_cells_train(tiny_config, tmp_path):
    config = replace(tiny_config, epochs=1, batch_size=2)
    history = fit(config, [empty_sample(64, 64)] * 2, [empty_sample(64, 64)], tmp_path)
    assert history[0]["AP50"] is None
    assert math.isfinite(history[0]["loss"])


def test_losses_that_stay_not_finite_stop_with_parts_and_images(parts, tiny_config, tmp_path):
    loader = training_loader(parts[0], tiny_config, torch.device("cpu"))
    run = TrainingRun(tiny_config, tmp_path, loader)
    with torch.no_grad():
        next(run.model.rpn.head.parameters()).fill_(math.nan)
    told = []
    bar = SimpleNamespace(write=told.append, update=lambda: None)
    arguments = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    run.guard.bad = 9
    with pytest.raises(FloatingPointError, match="10 batches in a row") as caught:
        train_epoch(*arguments, tiny_config, bar, guard=run.guard)
    message = str(caught.value)
    assert "'loss_objectness': nan" in message
    assert any(sample.name in message for sample in parts[0])
    assert len(told) == 1
    for name, buffer in run.model.named_buffers():
        assert buffer.isfinite().all(), name


@pytest.mark.parametrize("norm", [1e-6, 0.0])
def test_gradients_are_clipped(parts, tiny_config, tmp_path, norm):
    config = replace(tiny_config, clip_norm=norm, batch_size=6)
    run = TrainingRun(config, tmp_path, training_loader(parts[0], config, torch.device("cpu")))
    seen = []
    run.optimizer.step = lambda: seen.append(
        np.sqrt(sum(float((p.grad**2).sum()) for p in run.model.parameters() if p.grad is not None))
    )

    class Bar:
        n = 0
        write = set_postfix = update = staticmethod(lambda *args, **kwargs: None)

    arguments = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    train_epoch(*arguments, config, Bar())
    assert len(seen) == 1
    assert seen[0] == pytest.approx(norm, rel=0.01) if norm else seen[0] > 0.01


def test_run_folders_tell_settings_and_data_apart(tmp_path, tiny_config):
    def name(config, data):
        return run_folder(tmp_path, config, data).name

    first = name(tiny_config, ["a"])
    assert first.startswith("demo-")
    assert first == name(replace(tiny_config, score_floor=0.3, workers=2), ["a"])
    assert first != name(replace(tiny_config, lr=1e-5), ["a"])
    assert first != name(tiny_config, ["b"])


def test_best_weights_are_those_of_the_best_epoch(parts, tiny_config, tmp_path, monkeypatch):
    values = iter([0.2, 0.5, 0.3])

    def scripted(truth, answers):
        return dict.fromkeys(("AP", "AP50", "AP75"), next(values))

    monkeypatch.setattr(train, "average_precision", scripted)
    config = replace(tiny_config, epochs=3, eval_every=1, batch_size=6)
    history = fit(config, *parts, tmp_path)
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
    assert (len(best["history"]), best["best"], len(last["history"])) == (2, 0.5, 3)
    assert [row["rate"] for row in history] == pytest.approx(
        [config.lr * rate_factor(step, config, 3) for step in (1, 2, 3)]
    )


def test_where_nothing_can_be_scored_the_last_epoch_is_best(parts, tiny_config, tmp_path):
    config = replace(tiny_config, eval_every=1)
    fit(config, parts[0], [empty_sample(64, 64)], tmp_path)
    assert len(load_checkpoint(tmp_path / "best.pt")["history"]) == 2


def test_other_settings_do_not_take_up_a_run(finished, parts, tiny_config):
    changed = replace(tiny_config, lr=0.5, scale=2.0)
    for use in (lambda f: fit(changed, *parts, f), lambda f: load_trained(f / "best.pt", changed)):
        with pytest.raises(ValueError, match=r"other settings: scale=1.0 \(now 2.0\), lr=0.002"):
            use(finished[1])


def test_a_run_begun_without_a_scaler_goes_on_with_one(finished, parts, tiny_config):
    run = TrainingRun(tiny_config, finished[1], training_loader(parts[0], tiny_config, CPU))
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    restore_run(run, load_checkpoint(finished[1] / "last.pt"))
    assert len(run.history) == 2


class RunsCode:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_checkpoints_run_no_code(tmp_path, capsys):
    torch.save({"model": RunsCode()}, tmp_path / "last.pt")
    with pytest.raises(BadInput, match="not a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert "must never run" not in capsys.readouterr().out


def test_checkpoints_are_whole_and_safe(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint({"model": {"w": torch.ones(2)}, "config": {}, "epoch": 1}, path)
    with pytest.raises(AttributeError):  # what cannot be pickled leaves the old file
        save_checkpoint({"epoch": 2, "f": lambda: None}, path)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(BadInput, match=r"other\.pt: not a checkpoint of this notebook"):
        load_checkpoint(tmp_path / "other.pt")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"expected a best\.pt of this notebook. Correct"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_checkpoint_of_another_model_is_refused(finished):
    with pytest.raises(ValueError, match="other settings: fpn_channels=16"):
        load_trained(finished[1] / "best.pt", recipe("demo", crop=64, epochs=2))


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by a second whenever it is asked for."""
    ticks = iter(range(10**6))
    fake = SimpleNamespace(perf_counter=lambda: float(next(ticks)), time=time.time)
    monkeypatch.setattr(train, "time", fake)


def test_training_ends_with_its_hours(parts, tiny_config, tmp_path, clock, capsys):
    config = replace(tiny_config, epochs=500, train_hours=60 / 3600, eval_every=500)
    history = fit(config, *parts, tmp_path)
    assert 1 < len(history) < 40
    assert load_checkpoint(tmp_path / "last.pt")["spent"] == pytest.approx(60, abs=8)
    assert history[-1]["rate"] < 0.05 * config.lr < max(row["rate"] for row in history)
    assert [("AP50" in row) for row in history] == [False] * (len(history) - 1) + [True]
    assert fit(config, *parts, tmp_path) == history  # its time is spent
    assert "train_hours=0.0166667 are spent" in capsys.readouterr().out


def test_a_limit_beyond_the_epochs_changes_nothing(parts, tiny_config, tmp_path):
    free = fit(tiny_config, *parts, tmp_path / "a")
    limited = fit(replace(tiny_config, train_hours=100.0), *parts, tmp_path / "b")
    assert free == limited


def test_a_stopped_run_goes_on_with_what_is_left_of_its_hours(
    parts, tiny_config, tmp_path, clock, monkeypatch
):
    config = replace(tiny_config, epochs=500, train_hours=60 / 3600, eval_every=500)
    calls, run_epoch = [], train.run_epoch

    def stopped(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(run_epoch(*arguments))

    monkeypatch.setattr(train, "run_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(config, *parts, tmp_path)
    monkeypatch.setattr(train, "run_epoch", run_epoch)
    history = fit(config, *parts, tmp_path)
    assert len(history) > 2
    assert load_checkpoint(tmp_path / "last.pt")["spent"] == pytest.approx(60, abs=8)


def test_empty_history(tmp_path):
    write_history([], tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().strip() == ""


def test_the_loader_leaves_no_lonely_batch(tiny_config, parts):
    device = CPU
    assert len(training_loader(parts[0], tiny_config, device)) == 1  # 6 fields, 4 a batch
    assert len(training_loader(parts[0][:2], tiny_config, device)) == 1
    images, targets = next(iter(training_loader(parts[0], tiny_config, device)))
    assert (len(images), len(targets)) == (4, 4)
    same = build_model(tiny_config).train()(images, targets)
    assert math.isfinite(sum(same.values()).item())


# The running mean of the weights


def test_the_share_of_new_weights_falls():
    assert [round(average_rate(step, 0.9), 3) for step in (1, 2, 90)] == [0.818, 0.75, 0.1]
    assert average_rate(10**6, 0.999) == pytest.approx(0.001)


def test_the_running_mean_worked_by_hand(parts, tiny_config, tmp_path):
    config = replace(tiny_config, ema=0.5)
    run = TrainingRun(config, tmp_path, training_loader(parts[0], config, torch.device("cpu")))
    weight = run.parts["model"].rpn.head.cls_logits.bias
    mean = run.answering().rpn.head.cls_logits.bias
    schedule = run.parts["schedule"]
    for step, value in ((1, 2.0), (2, 8.0), (30, 4.0)):
        schedule.last_epoch = step
        with torch.no_grad():
            weight.fill_(value)
        run.after_step()
    # The first step copies; then shares of 1 - 3 / 12 and 1 - 0.5.
    assert torch.allclose(mean, torch.full_like(mean, (2 * 0.25 + 8 * 0.75) * 0.5 + 4 * 0.5))
    assert torch.equal(weight, torch.full_like(weight, 4.0))


def test_the_running_mean_is_kept_measured_and_resumed(parts, tiny_config, tmp_path, monkeypatch):
    config = replace(tiny_config, ema=0.9)
    fit(config, *parts, tmp_path / "whole")
    saved = save_epoch

    def save_and_stop(run, row):
        saved(run, row)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_epoch", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config, *parts, tmp_path / "parts")
    fit(config, *parts, tmp_path / "parts")
    wanted, found = (load_checkpoint(tmp_path / n / "best.pt") for n in ("whole", "parts"))
    for name in ("model", "raw"):
        assert all(torch.equal(wanted[name][k], found[name][k]) for k in wanted[name])
    key = "rpn.head.cls_logits.weight"
    assert not torch.equal(found["model"][key], found["raw"][key])
    model, _ = load_trained(tmp_path / "parts" / "best.pt", config)
    assert torch.equal(model.state_dict()[key], found["model"][key])


# What may go wrong


class Losses(nn.Module):
    """Stands for a model: a loss for each image, a norm's mean, and faults on demand."""

    def __init__(self, most=99, bad=()):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mean", torch.tensor(0.0))
        self.most, self.bad, self.calls = most, bad, []

    def forward(self, images, targets):
        self.calls.append(len(images))
        self.mean += 1
        if len(images) > self.most:
            raise torch.OutOfMemoryError("no room")
        factor = math.nan if len(self.calls) in self.bad else 1.0
        mean = torch.stack([i.mean() for i in images]).mean() * self.weight * factor
        return dict.fromkeys(LOSSES, self.weight * 0) | {"loss_mask": mean}


class Plain:
    """Stands for accelerate."""

    device = CPU

    scaler = None

    @staticmethod
    def backward(loss):
        loss.backward()


def batch(count=4):
    images = [torch.full((3, 2, 2), float(k)) for k in range(count)]
    return images, [{"name": f"image {k}"} for k in range(count)]


def test_full_memory_cuts_batches_and_remembers():
    model, told = Losses(most=1), []
    guard = StepGuard(model)
    values = guard.tried(model, *batch(), Plain, told.append)
    assert model.calls == [4, 2, 1, 1, 1, 1]
    assert values == dict.fromkeys(LOSSES, 0.0) | {"loss_mask": pytest.approx(1.5)}
    assert float(model.weight.grad) == pytest.approx(1.5)  # as of the whole batch, and only once
    assert float(model.mean) == 4  # what the failed tries did is undone
    assert [line.split(": ")[1] for line in told] == [
        "batches are computed in 2 parts now.",
        "batches are computed in 4 parts now.",
    ]
    model.calls.clear()
    guard.tried(model, *batch(), Plain, told.append)
    assert model.calls == [1, 1, 1, 1]
    guard.tried(model, *batch(2), Plain, told.append)  # fewer images than parts
    with pytest.raises(torch.OutOfMemoryError, match="a batch of 2 in 2 parts"):
        StepGuard(model).tried(Losses(most=0), *batch(2), Plain, told.append)


def test_losses_that_are_not_finite_are_skipped_and_named():
    model, told = Losses(bad=(2, 3)), []
    guard = StepGuard(model)
    accelerator = Plain()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    accelerator.scaler.scale(torch.ones(1))
    found = [guard.tried(model, *batch(2), accelerator, told.append) for _ in range(4)]
    assert [values is None for values in found] == [False, True, True, False]
    assert float(model.mean) == 2  # the norms did not learn from what was skipped
    assert accelerator.scaler.get_scale() == 2.0
    assert len(told) == 2
    assert "'loss_mask': nan" in told[0]
    assert "on images image 0, image 1: this batch is skipped" in told[0]
    assert guard.bad == 0


def test_a_session_that_ends_is_taken_up_exactly(parts, tiny_config, tmp_path, capsys):
    config = replace(tiny_config, epochs=3)
    fit(config, *parts, tmp_path / "whole")

    class Short(Session):
        """Ends after a number of looks at the clock."""

        left = 3

        def is_over(self):
            self.left -= 1
            return self.left < 0

    for _ in range(2):
        fit(config, *parts, tmp_path / "cut", Short(1.0))
        assert (tmp_path / "cut" / "best.pt").exists()
    fit(config, *parts, tmp_path / "cut")
    assert "max_hours=1: training stops after epoch 1" in capsys.readouterr().out
    wanted, found = (load_checkpoint(tmp_path / n / "best.pt") for n in ("whole", "cut"))
    assert wanted["history"] == found["history"]
    assert all(torch.equal(wanted["model"][key], found["model"][key]) for key in wanted["model"])
    csvs = [(tmp_path / name / "history.csv").read_bytes() for name in ("whole", "cut")]
    assert csvs[0] == csvs[1]


def test_a_session_over_in_its_first_epoch_leaves_an_answer(parts, tiny_config, tmp_path):
    session = Session(1e-9)
    assert session.is_over()
    assert fit(tiny_config, *parts, tmp_path, session) == []
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    load_trained(tmp_path / "best.pt", tiny_config)
    assert len(fit(tiny_config, *parts, tmp_path)) == 2  # and is trained anew


def test_sessions_share_their_time(monkeypatch):
    begun = Session(1.0).end - 3600
    assert 0 < time.time() - begun < 36_000  # that of the process
    session = Session(1.0, reserve=600.0)
    monkeypatch.setattr(session, "end", time.time() + 1000)
    session.share(4)
    assert session.until - time.time() == pytest.approx(250, abs=5)
    assert not session.is_over()
    free = Session(0.0)
    free.share(3)
    assert not free.is_over()


def test_sigterm_ends_training_alone(parts, tiny_config, tmp_path, capsys):
    session, before = Session(0.0), signal.getsignal(signal.SIGTERM)
    try:
        session.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        fit(tiny_config, *parts, tmp_path, session)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert session.told
    assert "SIGTERM: training stops after epoch 0" in capsys.readouterr().out
    assert (tmp_path / "best.pt").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    parts, tiny_config, tmp_path, capsys
):
    config = replace(tiny_config, epochs=3)
    whole = fit(config, *parts, tmp_path)
    before = load_checkpoint(tmp_path / "before.pt")
    assert len(before["history"]) == 2
    last = tmp_path / "last.pt"
    wanted = load_checkpoint(last)["model"]
    last.write_bytes(last.read_bytes()[:-1000])
    assert fit(config, *parts, tmp_path) == whole
    out = capsys.readouterr().out
    assert f"damaged, the checkpoint before it is taken: {last}" in out
    assert "2 of 3 epochs are done" in out
    found = load_checkpoint(last)["model"]
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    last.unlink()  # killed between the two renames
    assert fit(config, *parts, tmp_path) == whole
    for path in (last, tmp_path / "before.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"before\.pt: not a checkpoint"):
        fit(config, *parts, tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint({"a": 1}, path)
    kept = path.read_bytes()

    def fails(content, target):
        target.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match=r"last\.pt: cannot be written .* GB are free"):
        save_checkpoint({"a": 2}, path, tmp_path / "before.pt")
    assert path.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_gradients_of_earlier_batches_survive_a_bad_one():
    images, targets = batch(2)
    for model in (Losses(bad=(2,)), Losses(most=1)):
        guard = StepGuard(model)
        if model.most == 99:
            guard.tried(model, images, targets, Plain, print)
        else:
            model.weight.grad = torch.tensor(0.5)  # of a batch before, to be added to
        before = float(model.weight.grad)
        values = guard.tried(model, images, targets, Plain, print)
        assert float(model.weight.grad) == pytest.approx(before + (0.5 if values else 0.0))


def test_a_bad_batch_among_accumulated_ones_leaves_the_weights_finite(parts, tiny_config, tmp_path):
    config = replace(tiny_config, accumulate=2, batch_size=2)
    run = TrainingRun(config, tmp_path, training_loader(parts[0], config, CPU))
    calls, really = [], train.add_gradients

    def bad_first(model, images, targets, accelerator, count):
        calls.append(len(images))
        values = really(model, images, targets, accelerator, count)
        if len(calls) == 1:
            next(model.parameters()).grad.fill_(math.nan)
            return values | {"loss_mask": math.nan}
        return values

    told = []
    bar = SimpleNamespace(write=told.append, update=lambda: None, set_postfix=lambda *a, **k: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "add_gradients", bad_first)
        before = next(run.model.parameters()).detach().clone()
        arguments = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
        train_epoch(*arguments, config, bar, guard=run.guard)
    assert len(told) == 1
    assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert not torch.equal(before, next(run.model.parameters()))  # the others were learned from


def test_a_bad_batch_right_after_going_on_keeps_the_norms(parts, tiny_config, tmp_path):
    fit(tiny_config, *parts, tmp_path)
    longer = TrainingRun(tiny_config, tmp_path, training_loader(parts[0], tiny_config, CPU))
    wanted = {k: v.clone() for k, v in longer.model.named_buffers() if v.is_floating_point()}
    for buffer in longer.guard.buffers:
        buffer.fill_(7.0)
    longer.guard.put_back([None] * len(longer.guard.weights))
    found = dict(longer.model.named_buffers())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_an_epoch_without_a_good_batch_stops(parts, tiny_config, tmp_path):
    run = TrainingRun(tiny_config, tmp_path, training_loader(parts[0], tiny_config, CPU))
    with torch.no_grad():
        next(run.model.rpn.head.parameters()).fill_(math.nan)
    bar = SimpleNamespace(write=print, update=lambda: None)
    arguments = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    with pytest.raises(FloatingPointError, match="Every batch of the epoch was skipped"):
        train_epoch(*arguments, tiny_config, bar, guard=run.guard)


def test_looks_at_the_validation_part_fit_into_memory(parts, tiny_config, tmp_path, monkeypatch):
    model, really = build_model(tiny_config).eval(), predict.find_raw
    whole = validate(model, parts[1], tiny_config)

    def little_room(model, tiles, config):
        if max(tiles[0].shape) > 200:
            raise torch.OutOfMemoryError("no room")
        return really(model, tiles, config)

    monkeypatch.setattr(predict, "find_raw", little_room)
    assert [found.size for found in validate(model, parts[1], tiny_config)] == [
        found.size for found in whole
    ]
