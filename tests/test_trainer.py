import csv
from dataclasses import replace
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torchvision.models import detection

from src_snippets.data import transforms
from src_snippets.data.structures import coco_ground_truth
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import make_config
from src_snippets.setup.devices import gather, launch, rank
from src_snippets.training import checkpoints, trainer
from src_snippets.training.checkpoints import load_checkpoint, load_trained, PREDICTION_SETTINGS
from src_snippets.training.metrics import average_precision
from src_snippets.training.trainer import (
    build_optimizer,
    evaluate,
    evaluation_scores,
    launch_training,
    lr_factor,
    Session,
    stop_reason,
    train,
    Trainer,
    training_loader,
    try_step,
    validation_loss,
)
from tests.benchmarks.cases import counted_subset
from tests.conftest import empty_sample, field_of_cells


@pytest.fixture(scope="module")
def parts(demo_samples):
    samples = list(demo_samples)
    return samples[:6], samples[6:]


@pytest.fixture(scope="module")
def finished(parts, tiny_config, tmp_path_factory):
    """A run of two epochs, evaluated after the second."""
    folder = tmp_path_factory.mktemp("run")
    return train(tiny_config, *parts, folder), folder


@pytest.fixture(scope="module")
def tiny_model(tiny_config):
    return build_model(tiny_config)


@pytest.fixture
def saved_each_epoch(monkeypatch):
    """`last.pt` is written in each epoch, as where epochs take minutes."""
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)


def same_files(one, other, names=("best.pt", "history.csv")):
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# Optimizer and learning rate


def rates_by_name(model, config):
    """Learning rate and weight decay of each trained parameter by its name."""
    groups = build_optimizer(model, config).param_groups
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def test_each_part_has_its_learning_rate(tiny_model, tiny_config):
    options = dict(lr=1.0, lr_factors=(0.1, 0.2, 0.3, 0.4), layer_decay=0.5, weight_decay=0.1)
    config = replace(tiny_config, **options)
    rates = rates_by_name(tiny_model, config)
    assert rates.keys() == dict(tiny_model.named_parameters()).keys()
    for name, wanted in {
        "backbone.body.conv1.weight": 0.1 / 16,
        "backbone.body.layer1.0.conv1.weight": 0.2 / 8,
        "backbone.body.layer4.0.conv1.weight": 0.2,
        "backbone.fpn.inner_blocks.0.0.weight": 0.3,
        "rpn.head.cls_logits.weight": 0.4,
        "roi_heads.mask_predictor.conv5_mask.bias": 0.4,
    }.items():
        assert rates[name][0] == pytest.approx(wanted)
    sizes = dict(tiny_model.named_parameters())
    assert all((decay == 0) == (sizes[name].ndim <= 1) for name, (_, decay) in rates.items())


def test_a_backbone_without_named_stages_is_no_stem(tiny_model, tiny_config, monkeypatch):
    monkeypatch.setattr(trainer, "backbone_stages", lambda body: [list(body.children())])
    config = replace(tiny_config, lr=1.0, lr_factors=(0.1, 0.2, 0.3, 0.4))
    assert rates_by_name(tiny_model, config)["backbone.body.conv1.weight"][0] == 0.2


def test_optimizers(tiny_model, tiny_config):
    kinds = [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
    for name, kind in kinds:
        optimizer = build_optimizer(tiny_model, replace(tiny_config, optimizer=name))
        assert type(optimizer) is kind
        assert optimizer.defaults.get("momentum", 0.9) == 0.9


def test_learning_rates_by_hand():
    config = make_config("demo", warmup_steps=4, schedule="cosine")
    factors = [lr_factor(step, 24, config, []) for step in (0, 3, 4, 14, 24)]
    assert factors == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    assert lr_factor(1000, 24, replace(config, schedule="constant"), []) == 1.0
    assert lr_factor(0, 10, replace(config, warmup_steps=500), []) == 0.5  # at most a fifth
    assert lr_factor(0, 1, replace(config, warmup_steps=0), []) == 1.0


def losses_history(*losses):
    return [{"val_loss": loss, "AP50": None} for loss in losses]


def test_a_plateau_lowers_the_learning_rate():
    config = make_config("demo", warmup_steps=0, schedule="plateau")

    def factor(*losses):
        return lr_factor(9, 24, config, [{"loss": 1.0}, *losses_history(*losses)])

    assert factor() == factor(3, 2, 2, 2) == 1.0
    assert factor(3, 2, 2, 4, 2) == factor(3, 2, 2, 4, 2, 1, 1) == pytest.approx(0.1)
    assert factor(3, 2, 2, 4, 2, 6, 7, 8) == pytest.approx(0.01)
    constant = replace(config, schedule="constant")
    assert lr_factor(9, 24, constant, losses_history(1, 2, 2, 2, 2)) == 1.0


def test_training_stops_after_its_patience():
    config = make_config("demo", patience=2, best_by="AP", epochs=99)
    history = [{"AP": value} for value in (0.1, 0.4, 0.3, 0.35)]
    assert stop_reason(history, 0, config) == "no better AP in 2 evaluations"
    for other in (history[:3], [*history[:3], {"loss": 1.0}], [{"AP": 0.4}] * 9, []):
        assert stop_reason(other, 0, config) == ""
    assert stop_reason(history, 0, replace(config, patience=0)) == ""
    assert stop_reason(history, 0, replace(config, patience=0, epochs=4))
    limited = replace(config, train_hours=1.0)
    assert [bool(stop_reason([], seconds, limited)) for seconds in (3599, 3600)] == [False, True]
    assert evaluation_scores(losses_history(3, 2), "loss") == [-3, -2]
    assert evaluation_scores(losses_history(math.nan, 2), "loss") == [-math.inf, -2]
    assert evaluation_scores(losses_history(3, 2), "AP50") == [0.0, 0.0]
    history = [dict(epoch=1, AP50=0.9), dict(epoch=2), dict(epoch=3, AP50=0.1)]
    assert evaluation_scores(history, "last") == []  # so that each epoch is the best
    history = [dict(epoch=k, AP50=score) for k, score in enumerate((0.2, 0.5, 0.4, 0.3), start=1)]
    config = make_config("demo", patience=2, best_by="last", epochs=99)
    assert stop_reason(history, 0, config) == "no better AP50 in 2 evaluations"
    assert stop_reason(history[:3], 0, config) == ""


# A whole run


def test_history_and_files(finished, tiny_config):
    history, folder = finished
    assert [row["epoch"] for row in history] == [1, 2]
    assert "AP50" not in history[0]
    assert 0 <= history[1]["AP50"] <= 1
    losses = [{k: v for k, v in row.items() if k.startswith("loss_")} for row in history]
    assert [len(row) for row in losses] == [5, 5]
    assert [sum(row.values()) for row in losses] == pytest.approx([r["loss"] for r in history])
    names = ["best.pt", "history.csv", "last.pt"]  # one evaluation
    assert sorted(path.name for path in folder.iterdir()) == names
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert rows[0]["AP50"] == ""
    assert float(rows[1]["loss"]) == history[1]["loss"]
    best = load_checkpoint(folder / "best.pt")
    assert set(best) == {"model", "config", "history"}
    assert best["config"] == tiny_config


def test_a_finished_run_is_used_again_until_it_is_not_resumed(
    finished, parts, tiny_config, tmp_path, capsys
):
    history, folder = finished
    before, calls = (folder / "last.pt").stat().st_mtime_ns, []
    assert train(tiny_config, *parts, folder, None, lambda *call: calls.append(call)) == history
    assert (folder / "last.pt").stat().st_mtime_ns == before
    assert calls == [(history, None, True)]
    out = capsys.readouterr().out
    assert f"ALREADY TRAINED (all epochs are done): {folder} is used." in out
    assert "RESUME = False" in out
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "best.pt").write_bytes(b"another")
    assert train(tiny_config, *parts, tmp_path, None, None, False) == history
    assert "ALREADY" not in capsys.readouterr().out
    same_files(folder, tmp_path)  # and two runs are equal to the byte


def test_the_callback_sees_each_epoch_and_the_end(parts, tiny_config, tmp_path):
    calls, val = [], [empty_sample(64, 64), *parts[1]]
    config = replace(tiny_config, eval_every=1, score_threshold=0.0, export_score_threshold=0.3)
    train(config, parts[0], val, tmp_path, None, lambda *call: calls.append(call))
    assert [(len(history), last) for history, _, last in calls] == [
        (1, False),
        (2, False),
        (2, True),
    ]
    sample, predictions = calls[-1][1]
    assert len(sample.labels) == max(len(sample.labels) for sample in val)
    assert predictions.size == sample.size
    assert all(predictions.scores >= 0.3)


@pytest.mark.parametrize("changes", [{}, dict(ema=0.9, accumulate=2, batch_size=2)])
@pytest.mark.usefixtures("saved_each_epoch")
def test_a_resumed_run_equals_one_without_stop(parts, tiny_config, tmp_path, monkeypatch, changes):
    config, saved = replace(tiny_config, epochs=3, **changes), Trainer.save

    def save_and_stop(self, is_last):
        saved(self, is_last)
        raise KeyboardInterrupt

    train(config, *parts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, *parts, tmp_path / "cut")
    assert len(load_checkpoint(tmp_path / "cut" / "last.pt")["history"]) == 1
    train(config, *parts, tmp_path / "cut")
    same_files(tmp_path / "whole", tmp_path / "cut")


def test_epochs_and_processes_have_draws_of_their_own(parts, tiny_config, tmp_path, monkeypatch):
    seeds, orders, seed = [], [], torch.manual_seed
    run = Trainer(replace(tiny_config, epochs=3, batch_size=1), parts[0], [], tmp_path)
    step = run.step
    run.step = lambda images, targets: orders.append(targets[0]["name"]) or step(images, targets)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda s: seeds.append(s) or seed(s))
        run.fit()
    assert [1_000_003 * epoch in seeds for epoch in (1, 2, 3)] == [True] * 3
    epochs = [orders[k : k + 6] for k in (0, 6, 12)]
    assert epochs[0] != epochs[1] != epochs[2]
    images = [next(iter(training_loader(parts[0], tiny_config, 2)))[0][0] for _ in range(2)]
    assert not torch.equal(*images)


def test_best_weights_are_those_of_the_last_best_epoch(parts, tiny_config, tmp_path, monkeypatch):
    values, example = iter([0.2, 0.5, 0.5, 0.3]), (parts[1][0], None)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: ({"AP50": next(values)}, example))
    config = replace(tiny_config, epochs=4, eval_every=1, batch_size=6)
    history = train(config, *parts, tmp_path)
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
    assert (len(best["history"]), len(last["history"])) == (3, 4)
    rates = [config.lr * lr_factor(step, 4, config, []) for step in range(4)]
    assert [row["lr"] for row in history] == pytest.approx(rates)


def test_the_last_epoch_is_kept_where_a_session_ends_between_evaluations(
    parts, tiny_config, tmp_path
):
    config = replace(tiny_config, epochs=9, eval_every=2, batch_size=6, best_by="last")
    session = Short(1.0)
    session.left = 8  # after three epochs of a step
    train(config, *parts, tmp_path, session)
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
    assert len(best["history"]) == len(last["history"]) == 3
    assert sum("AP50" in row for row in best["history"]) == 1


def test_the_best_by_loss_and_early_stop(parts, tiny_config, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.6, 9.0])
    monkeypatch.setattr(trainer, "validation_loss", lambda *_: next(values))
    config = replace(tiny_config, epochs=9, eval_every=1, batch_size=6, best_by="loss", patience=2)
    history = train(config, *parts, tmp_path)
    assert [row["val_loss"] for row in history] == [3.0, 2.0, 2.5, 2.6]
    assert len(load_checkpoint(tmp_path / "best.pt")["history"]) == 2
    assert train(config, *parts, tmp_path) == history  # it stays stopped


@pytest.mark.parametrize("val", [[], [empty_sample(64, 64)]])
def test_where_nothing_is_scored_the_last_epoch_is_the_best(parts, tiny_config, tmp_path, val):
    history = train(replace(tiny_config, eval_every=1), parts[0], val, tmp_path)
    assert history[0].get("AP50") is None
    best, last = (load_checkpoint(tmp_path / name)["model"] for name in ("best.pt", "last.pt"))
    assert all(torch.equal(best[key], last[key]) for key in last)


def test_images_without_instances_train(tiny_config, tmp_path):
    samples = [empty_sample(64, 64)] * 2
    history = train(replace(tiny_config, epochs=1, batch_size=2), samples, samples, tmp_path)
    assert history[0]["AP50"] is None
    assert math.isfinite(history[0]["loss"])


def test_other_settings_do_not_continue_a_run(finished, parts, tiny_config):
    changed = replace(tiny_config, lr=0.5, scale=2.0)
    for use in (
        lambda f: train(changed, *parts, f),
        lambda f: load_trained(f / "best.pt", changed),
    ):
        with pytest.raises(ValueError, match=r"other settings: scale=1.0 \(now 2.0\), lr=0.002"):
            use(finished[1])
    fewer = replace(tiny_config, class_names=("a", "b"))
    with pytest.raises(ValueError, match=r"other settings: num_classes=4 \(now 2\)"):
        load_trained(finished[1] / "best.pt", fewer, same=False)


def test_the_best_weights_predict(finished, parts, tiny_config, monkeypatch):
    history, folder = finished
    built, build = [], checkpoints.build_model
    spy = lambda own, **options: built.append(own) or build(own, **options)  # noqa: E731
    monkeypatch.setattr(checkpoints, "build_model", spy)
    model = load_trained(folder / "best.pt", replace(tiny_config, detections=7))
    assert (built[0].detections, built[0].lr, model.training) == (7, tiny_config.lr, False)
    other = make_config("baseline", score_threshold=0.4, precision="no")
    model = load_trained(folder / "best.pt", other, same=False)
    names = (*PREDICTION_SETTINGS, "precision")
    assert built[1] == replace(tiny_config, **{name: getattr(other, name) for name in names})
    row, _ = evaluate(model, parts[1], tiny_config)
    assert row == {name: history[1][name] for name in ("AP", "AP50", "AP75")}


def test_mixed_precision_may_change_in_one_session(parts, tiny_config, tmp_path):
    for precision in ("bf16", "no"):
        config = replace(tiny_config, epochs=1, precision=precision)
        history = train(config, parts[0], [], tmp_path / precision)
        assert math.isfinite(history[0]["loss"])
        assert "scale" not in history[0]
        state = load_checkpoint(tmp_path / precision / "best.pt")["model"]
        assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


# Evaluation


def test_validation_loss_is_repeatable_and_changes_nothing(tiny_model, parts, tiny_config):
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    torch.manual_seed(5)
    first = validation_loss(tiny_model, parts[1], tiny_config)
    torch.manual_seed(6)
    assert first == validation_loss(tiny_model, parts[1], tiny_config) > 0
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())
    assert not any(module.training for module in tiny_model.modules())
    assert math.isfinite(validation_loss(tiny_model, [empty_sample(64, 64)], tiny_config))
    seen, large = [], empty_sample(100, 3 * tiny_config.crop)  # memory suffices for a crop
    hook = tiny_model.register_forward_pre_hook(lambda _, batch: seen.append(batch[0][0].shape))
    validation_loss(tiny_model, [large], tiny_config)
    hook.remove()
    assert seen == [(3, min(100, tiny_config.crop), tiny_config.crop)]


def test_evaluation_is_of_whole_images_from_a_low_score_on(parts, tiny_config, monkeypatch):
    seen, really = [], trainer.detect

    def watched(model, image, config):
        seen.append((tuple(image.shape[1:]), config.score_threshold, config.tile))
        return really(model, image, config)

    monkeypatch.setattr(trainer, "detect", watched)
    model, sizes = build_model(tiny_config), [sample.size for sample in parts[1]]
    for threshold, used in ((0.5, 0.05), (0.01, 0.01)):
        seen.clear()
        config = replace(tiny_config, score_threshold=threshold, tile=32, best_by="loss")
        row, _ = evaluate(model, parts[1], config)
        assert seen == [(size, used, 0) for size in sizes]
        assert set(row) == {"AP", "AP50", "AP75", "val_loss"}
    truth = coco_ground_truth(parts[1], dict(enumerate(config.class_names, start=1)))
    config = replace(config, tile=0)
    predictions = {k: really([model], s.image, config) for k, s in enumerate(parts[1], start=1)}
    assert row["AP"] == average_precision(truth, predictions)["AP"]


# Steps


@pytest.fixture
def run(parts, tiny_config, tmp_path):
    """A trainer just before its first step."""
    return ready(Trainer(replace(tiny_config, batch_size=2), *parts, tmp_path))


def ready(run):
    """What `fit` and `run_epoch` do before a step."""
    run.total_steps = run.max_steps = 6
    run.good_statistics = [values.clone() for values in run.statistics()]
    run.model.train()
    return run


def batches(run, count):
    loader = training_loader(run.train_samples, run.config, 2)
    return [batch for _ in range(count) for batch in loader][:count]


def poison(run, *steps):
    """Makes the mask loss of some steps, counted from 1, not a number."""
    calls, really = [], run.network.forward

    def forward(images, targets=None):
        losses = really(images, targets)
        calls.append(1)
        bad = len(calls) in steps
        return losses | {"loss_mask": losses["loss_mask"] * math.nan} if bad else losses

    run.network.forward = forward


@pytest.mark.parametrize("norm", [1e-6, 0.0])
def test_gradients_are_clipped(run, norm):
    run.config = replace(run.config, clip_norm=norm)
    norms, weights = [], list(run.model.parameters())
    run.optimizer.step = lambda: norms.append(
        float(torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm())
    )
    run.step(*batches(run, 1)[0])
    assert norms[0] == pytest.approx(norm, rel=0.01) if norm else norms[0] > 0.01


def test_every_weight_gets_a_gradient(run):
    """As DDP wants it, with instances and without."""
    grads, weights = [], list(run.model.named_parameters())
    run.optimizer.step = lambda: grads.extend(name for name, w in weights if w.grad is None)
    empty = empty_sample(64, 64)
    run.step(*batches(run, 1)[0])
    run.train_samples = [empty, empty]
    run.step(*batches(run, 1)[0])
    assert grads == []


def test_steps_that_are_not_finite_are_skipped_and_named(run, capsys):
    poison(run, 2, 3)
    weights, norms = [], []
    losses = []
    for batch in batches(run, 4):
        losses.append(run.step(*batch))
        weights.append(run.model.rpn.head.cls_logits.weight.detach().clone())
        norms.append(run.model.backbone.body.bn1.running_mean.clone())
    assert [len(row) for row in losses] == [1, 0, 0, 1]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert torch.equal(norms[0], norms[2])
    assert not torch.equal(norms[2], norms[3])
    assert (run.steps, run.bad_steps) == (2, 0)
    out = capsys.readouterr().out
    assert out.count("this step is skipped") == 2
    assert "'loss_mask': nan" in out
    assert any(sample.name in out for sample in run.train_samples)


def test_ten_in_a_row_stop(run):
    poison(run, *range(2, 99))
    good = [run.step(*batch) for batch in batches(run, 10)]
    assert [len(row) for row in good] == [1] + [0] * 9
    with pytest.raises(FloatingPointError, match=r"loss_mask.*10 times in a row.*Lower lr"):
        run.step(*batches(run, 1)[0])
    assert (run.steps, run.bad_steps) == (1, 10)
    assert all(buffer.isfinite().all() for buffer in run.model.buffers())


def test_an_epoch_without_a_good_step_is_repeated(parts, tiny_config, tmp_path):
    run = Trainer(replace(tiny_config, epochs=1), *parts, tmp_path)
    poison(run, 1, 2, 3)
    assert [row["epoch"] for row in run.fit()] == [1]
    assert run.steps == 1


def test_epochs_without_a_good_step_stop(parts, tiny_config, tmp_path):
    run = Trainer(tiny_config, *parts, tmp_path)
    poison(run, *range(99))
    with pytest.raises(FloatingPointError, match="10 times in a row"):
        run.fit()
    assert not (tmp_path / "last.pt").exists()


def test_the_state_is_saved_at_evaluations_after_minutes_and_at_the_end(
    parts, tiny_config, tmp_path, monkeypatch
):
    """A kill loses at most the epochs since: none but the best weights are written in between."""
    saved, now, really = [], [0.0], trainer.save_checkpoint

    def watched(content, path):
        if path.name == "last.pt":
            saved.append(len(content["history"]))
        really(content, path)

    monkeypatch.setattr(trainer, "save_checkpoint", watched)
    monkeypatch.setattr(time, "time", lambda: now[0])

    def callback(*_):
        now[0] += 200.0

    config = replace(tiny_config, epochs=7, eval_every=5)
    train(config, *parts, tmp_path, None, callback)
    assert saved == [3, 5, 7]  # after 400 s, at the two evaluations


def test_a_run_on_a_drive_goes_to_the_local_disk_first(
    parts, tiny_config, tmp_path, monkeypatch, capsys
):
    """A killed kernel loses minutes, a lost machine an hour; the end is that of a whole run."""
    local, drive = tmp_path / "local-disk", tmp_path / "drive"
    now, on_drive, epochs, folder = [0.0], [], [], drive / "run"
    monkeypatch.setattr(trainer, "gettempdir", lambda: str(local))
    monkeypatch.setattr(trainer, "DRIVE", drive)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(time, "time", lambda: now[0])

    def saved_epochs():
        if not (folder / "last.pt").exists():
            return 0
        return len(load_checkpoint(folder / "last.pt")["history"])

    def callback(history, _, is_last):
        if not is_last:
            now[0] += 2000.0
            on_drive.append(saved_epochs())
            epochs.append(len(history))
            if epochs == [1, 2, 3, 4]:  # what is there at this time
                shutil.copytree(drive, tmp_path / "drive-4")
                shutil.copytree(local, tmp_path / "local-4")

    config = replace(tiny_config, epochs=7, eval_every=1)
    train(config, *parts, folder, None, callback)
    assert on_drive == [0, 0, 3, 3, 5, 5, 7]
    assert saved_epochs() == 7
    whole = drive.rename(tmp_path / "whole") / "run"
    for kept, left in ((True, [5, 6, 7]), (False, [4, 5, 6, 7])):
        shutil.rmtree(local, ignore_errors=True)
        shutil.rmtree(drive, ignore_errors=True)
        shutil.copytree(tmp_path / "drive-4", drive)
        if kept:
            shutil.copytree(tmp_path / "local-4", local)
        epochs.clear()
        train(config, *parts, folder, None, callback)
        assert epochs == left
        same_files(whole, folder)
    files = [(path.name, path.stat().st_ino) for path in sorted(folder.iterdir())]
    assert [name for name, _ in files] == ["best.pt", "history.csv", "last.pt"]
    shutil.rmtree(local)
    assert len(train(config, *parts, folder)) == 7  # of the Drive, where nothing is replaced
    assert [(path.name, path.stat().st_ino) for path in sorted(folder.iterdir())] == files

    def fails(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "copy_newer", fails)
        train(replace(config, epochs=1), *parts, folder, None, None, False)
    assert "failed; the rest goes on" in capsys.readouterr().out
    assert saved_epochs() == 0

    def interrupted(history, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(config, epochs=2), *parts, folder, None, interrupted, False)
    assert saved_epochs() == 1  # is copied


def test_samples_do_not_depend_on_workers_and_change_with_the_epoch(parts, tiny_config):
    config = replace(tiny_config, crop=64, copy_paste=0.5)

    def images(workers, epochs=(1, 2)):
        train_part = counted_subset(parts[0])
        loader, found = training_loader(train_part, replace(config, workers=workers), 2), []
        for epoch in epochs:
            loader.dataset.epoch.fill_(epoch)
            images = [image for batch in loader for image in batch[0]]
            found.append(torch.stack(sorted(images, key=lambda image: int(image.sum()))))
        return found

    (first, second), (same, other) = images(0), images(2)
    assert torch.equal(first, same)
    assert torch.equal(second, other)
    assert not torch.equal(first, second)
    assert torch.equal(images(2, (2,))[0], second)  # as after a resume


def test_gradients_of_several_batches_are_added_up(run):
    """Two batches of two are as good as one of four where nothing is normed or drawn."""
    run.model.eval()
    for part in (run.model, run.model.rpn, run.model.roi_heads):
        part.training = True
    run.accelerator.gradient_accumulation_steps = 2
    grads, really = [], run.optimizer.step

    def watched():
        grads.append(run.model.roi_heads.mask_predictor.conv5_mask.weight.grad.clone())
        really()

    run.optimizer.step = watched
    poison(run, 3)
    (first, second), sizes = batches(run, 2), []
    for batch in (first, second, first, second, first, second):
        sizes.append(len(run.step(*batch)))
    assert sizes == [0, 2, 0, 0, 0, 2]  # one bad batch of two spoils the step
    assert len(grads) == run.steps == 2
    assert all(weight.isfinite().all() for weight in run.model.parameters())


def test_steps_are_counted_by_updates(parts, tiny_config, tmp_path):
    for accumulate, steps in ((1, 3), (2, 2)):
        config = replace(tiny_config, epochs=1, batch_size=2, accumulate=accumulate)
        folder = tmp_path / f"{accumulate}"
        train(config, parts[0], [], folder)
        assert load_checkpoint(folder / "last.pt")["steps"] == steps


def test_the_ema_forgets_early_weights_and_is_what_predicts(parts, tiny_config, tmp_path):
    run = Trainer(replace(tiny_config, ema=0.5), *parts, tmp_path)
    weight = run.model.rpn.head.cls_logits.bias
    averaged = run.best_model.rpn.head.cls_logits.bias
    buffer = run.model.backbone.body.bn1.running_mean
    statistics = run.best_model.backbone.body.bn1.running_mean
    for step, value in ((1, 2.0), (2, 8.0), (30, 4.0)):
        with torch.no_grad():
            weight.fill_(value)
            buffer.fill_(value)
        run.parts["ema"].update(run.model, step)
    # Step 1 copies; step 2 keeps 1 - 2 ** -0.75 of it; step 30 half.
    early = 1 - 2**-0.75
    wanted = 0.5 * (2.0 * early + 8.0 * (1 - early)) + 0.5 * 4.0
    assert torch.allclose(averaged, torch.full_like(averaged, wanted))
    assert torch.allclose(statistics, torch.full_like(statistics, wanted))
    run.fit()
    best, last = (load_checkpoint(tmp_path / name)["model"] for name in ("best.pt", "last.pt"))
    key = "rpn.head.cls_logits.weight"
    assert not torch.equal(best[key], last[key])
    assert torch.equal(best[key], run.best_model.state_dict()[key])


def test_the_loader_leaves_no_lonely_batch(tiny_config, parts):
    assert [len(training_loader(parts[0], tiny_config, size)) for size in (4, 2, 6, 9)] == [
        1,
        3,
        1,
        1,
    ]
    images, targets = next(iter(training_loader(parts[0][:1], tiny_config, 4)))
    assert (len(images), len(targets)) == (1, 1)


# Memory


def test_a_trial_step_leaves_all_as_it_was(tiny_config):
    model, sizes = build_model(tiny_config), []
    before = {key: value.clone() for key, value in model.state_dict().items()}
    really, state = model.forward, torch.get_rng_state()
    model.forward = lambda *batch: (
        sizes.append((len(batch[0]), *batch[0][0].shape)) or really(*batch)
    )
    try_step(model, tiny_config, 4, 2)
    assert sizes == [(4, 3, 64, 64)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that training waits, none of which pass."""
    seconds = []
    fake = SimpleNamespace(**vars(time) | dict(sleep=seconds.append))
    monkeypatch.setattr(trainer, "time", fake)
    return seconds


@pytest.mark.parametrize("text", ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_a_trial_step_that_does_not_fit_halves_the_batch(
    parts, tiny_config, tmp_path, monkeypatch, waits, capsys, text
):
    monkeypatch.setattr(trainer, "default_device", lambda: SimpleNamespace(type="cuda"))
    fractions, tried = [], []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)

    def try_step(model, config, batch_size, copies):
        tried.append((batch_size, copies))
        if batch_size > 1:
            raise RuntimeError(text)

    monkeypatch.setattr(trainer, "try_step", try_step)
    config = replace(tiny_config, epochs=1, batch_size=4, workers=0)
    history = launch_training(config, parts[0], [], tmp_path, None, None, True)
    assert (len(history), tried) == (1, [(4, 3), (2, 3), (1, 3)])
    assert fractions == [0.85, 0.85, 0.85, 0.95]  # the trial has less memory than training
    out = capsys.readouterr().out
    assert "batch_size=1, accumulate=4" in out
    assert load_checkpoint(tmp_path / "last.pt")["steps"] == 2


def test_a_run_that_continues_has_its_optimizers_values(parts, tiny_config, tmp_path, monkeypatch):
    config = replace(tiny_config, epochs=1, batch_size=2, workers=0)
    run = Trainer(config, parts[0], [], tmp_path)
    monkeypatch.setattr(trainer, "default_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda _: None)
    copies = []
    monkeypatch.setattr(trainer, "try_step", lambda *call: copies.append(call[-1]))
    run.fit()
    run.config = replace(config, epochs=2)
    run.fit()
    assert copies == [3, 1]


@pytest.mark.parametrize("gpus", [1, 2])
def test_training_goes_on_with_half_the_batch_where_memory_gets_full(
    parts, tiny_config, tmp_path, monkeypatch, saved_each_epoch, waits, capfd, gpus
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)  # the processes find none
    really = Trainer.step

    def step(self, images, targets):
        if len(images) > 1 and len(self.history) == 1 and rank() == gpus - 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return really(self, images, targets)

    monkeypatch.setattr(Trainer, "step", step)
    config = replace(tiny_config, epochs=3, batch_size=2, workers=0)
    (tmp_path / "last.pt").write_bytes(b"of an earlier run, which is not resumed")
    history = launch_training(config, *parts, tmp_path, None, None, False)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["config"].batch_size == 2
    assert state["steps"] == (9 if gpus == 1 else 6)  # as many updates as without the error
    out = capfd.readouterr().out
    assert waits == [10]  # until the memory of what was killed is free
    assert "batch_size=1, accumulate=2 from now on" in out
    assert f"{tmp_path}: 1 of 3 epochs are done" in out


@pytest.mark.parametrize(
    ("error", "message", "sizes"),
    [
        (torch.OutOfMemoryError(""), "not suffice for one crop: lower crop", [2, 1]),
        (ValueError("shapes differ"), "shapes differ", [2]),
    ],
)
def test_memory_for_no_crop_and_other_errors_end_training(
    parts, tiny_config, tmp_path, monkeypatch, waits, error, message, sizes
):
    found = []

    def step(self, images, targets):
        found.append(len(images))
        raise error

    monkeypatch.setattr(Trainer, "step", step)
    config = replace(tiny_config, batch_size=2)
    with pytest.raises((RuntimeError, ValueError), match=message):
        launch_training(config, *parts, tmp_path, None, None, True)
    assert found == sizes


# Time


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by a second at each look-up."""
    ticks = iter(range(10**6))
    fake = SimpleNamespace(perf_counter=lambda: float(next(ticks)), time=time.time)
    monkeypatch.setattr(trainer, "time", fake)


def test_training_ends_with_its_hours(parts, tiny_config, tmp_path, clock, capsys):
    config = replace(tiny_config, epochs=500, train_hours=20 / 3600, eval_every=500)
    history = train(config, *parts, tmp_path)
    assert 1 < len(history) < 20
    assert load_checkpoint(tmp_path / "last.pt")["seconds"] == pytest.approx(20, abs=4)
    assert history[-1]["lr"] < 0.1 * config.lr < max(row["lr"] for row in history)
    assert [("AP50" in row) for row in history] == [False] * (len(history) - 1) + [True]
    assert train(config, *parts, tmp_path) == history  # its time is over
    assert "train_hours=0.00555556 are over" in capsys.readouterr().out


@pytest.mark.usefixtures("saved_each_epoch")
def test_a_resumed_run_has_what_is_left_of_its_hours(
    parts, tiny_config, tmp_path, clock, monkeypatch
):
    config = replace(tiny_config, epochs=500, train_hours=20 / 3600, eval_every=500)
    calls, run_epoch = [], Trainer.run_epoch

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        run_epoch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config, *parts, tmp_path)
    spent = load_checkpoint(tmp_path / "last.pt")["seconds"]
    history = train(config, *parts, tmp_path)
    assert spent > 5
    assert len(history) < 4 + 20 - spent
    assert load_checkpoint(tmp_path / "last.pt")["seconds"] == pytest.approx(20, abs=4)


def test_a_limit_beyond_the_epochs_changes_nothing(finished, parts, tiny_config, tmp_path):
    assert train(replace(tiny_config, train_hours=100.0), *parts, tmp_path) == finished[0]


class Short(Session):
    """Is over after a number of look-ups."""

    left = 3

    def is_over(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.usefixtures("saved_each_epoch")
def test_a_session_that_ends_is_continued_exactly(parts, tiny_config, tmp_path, capsys):
    config = replace(tiny_config, epochs=3)
    train(config, *parts, tmp_path / "whole")
    for _ in range(2):
        assert len(train(config, *parts, tmp_path / "cut", Short(1.0))) < 3
        assert (tmp_path / "cut" / "best.pt").exists()
    out = capsys.readouterr().out
    assert "epoch 1: the session ends (its max_hours, or SIGTERM); restart to" in out
    train(config, *parts, tmp_path / "cut")
    assert "2 of 3 epochs are done, training continues" in capsys.readouterr().out
    same_files(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("saved", [True, False])
def test_a_cut_epoch_is_made_again_and_counted_once(
    parts, tiny_config, tmp_path, monkeypatch, saved
):
    """Its half trained weights are not saved: the run continues from an epoch's end."""
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0 if saved else 300)
    config = replace(tiny_config, epochs=2, batch_size=2, eval_every=2)  # three steps an epoch
    session, folder = Short(1.0), tmp_path / "cut"
    session.left = 6  # until the second step of the second epoch
    assert len(train(config, *parts, folder, session)) == 1
    assert (folder / "best.pt").exists()
    assert (folder / "last.pt").exists() == saved
    assert not saved or load_checkpoint(folder / "last.pt")["steps"] == 3
    assert len(train(config, *parts, folder)) == 2
    assert load_checkpoint(folder / "last.pt")["steps"] == 6
    train(config, *parts, tmp_path / "whole")
    same_files(tmp_path / "whole", folder)


def test_with_other_gpus_the_schedule_goes_on_where_it_was(parts, tiny_config, tmp_path):
    """Twice the batches per epoch are what one GPU makes of a run that two began."""
    config = replace(tiny_config, epochs=4, batch_size=2, eval_every=4, schedule="cosine")
    session = Short(1.0)
    session.left = 9  # after two epochs of three steps
    train(config, *parts, tmp_path, session)
    run = Trainer(config, parts[0] * 2, parts[1], tmp_path)
    assert (len(run.history), run.steps, run.max_steps) == (2, 6, 12)
    run.history = run.history * 2  # nothing left to train
    run.fit()
    assert (run.steps, run.max_steps) == (12, 24)


def test_a_later_session_may_have_another_layout_of_memory(parts, tiny_config, tmp_path):
    """As where a T4 began and an A100 goes on with depthwise convolutions."""
    train(replace(tiny_config, epochs=1), *parts, tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    for kept in state["optimizer"]["state"].values():
        kept |= {name: value.contiguous() for name, value in kept.items()}
    torch.save(state, tmp_path / "last.pt")
    run = Trainer(replace(tiny_config, epochs=1), *parts, tmp_path)
    strides = {
        (weight.stride(), value.stride())
        for weight, kept in run.optimizer.state.items()
        for name, value in kept.items()
        if name != "step"
    }
    assert len(strides) > 5
    assert all(own == other for own, other in strides)


def test_train_hours_count_figures_and_files_too(parts, tiny_config, tmp_path):
    config = replace(tiny_config, epochs=1000, train_hours=3 / 3600, eval_every=1000)
    history = train(config, *parts, tmp_path, None, lambda *_: time.sleep(1.0))
    assert len(history) <= 4  # without the second in each of the calls many more


def test_the_first_step_of_a_later_session_has_its_learning_rate(parts, tiny_config, tmp_path):
    config = replace(tiny_config, epochs=1000, train_hours=1.0, schedule="cosine", batch_size=2)
    config = replace(config, warmup_steps=0)
    session = Short(1.0)
    session.left = 4  # after an epoch of three steps
    train(config, *parts, tmp_path, session)
    run = Trainer(config, *parts, tmp_path, Short(1.0))
    run.seconds, run.session.left = 3600 * 0.9, 0  # nine tenths of the time are over; one step
    run.fit()
    factor = run.optimizer.param_groups[0]["lr"] / run.peak_lrs[0]
    assert 0.0 < factor < 0.1


def test_a_session_over_in_its_first_epoch_leaves_a_model(parts, tiny_config, tmp_path):
    session = Session(1e-9)
    assert session.is_over()
    assert train(tiny_config, *parts, tmp_path, session) == []
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
    load_trained(tmp_path / "best.pt", tiny_config)
    assert len(train(tiny_config, *parts, tmp_path)) == 2  # and it is trained anew


def test_a_session_leaves_time_to_predict(monkeypatch):
    now = time.time()
    session, free = Session(1.0), Session(0.0)
    assert 0 < now - (session.end - 0.85 * 3600) < 36_000  # counted from the start of this process
    session.end = now + 10
    for seconds, is_over in ((9, False), (11, True)):
        monkeypatch.setattr(time, "time", lambda late=now + seconds: late)
        assert (session.is_over(), free.is_over()) == (is_over, False)


def test_a_session_ends_by_itself_on_kaggle_alone(tmp_path, monkeypatch):
    def hours(hours):
        return 1 + (Session(hours).end - Session(1.0).end) / 3600 / 0.85

    monkeypatch.setattr(trainer, "KAGGLE_WORKING", tmp_path / "none")
    assert [hours(each) for each in (-1.0, 0.0, 3.0)] == [math.inf, math.inf, pytest.approx(3)]
    monkeypatch.setattr(trainer, "KAGGLE_WORKING", tmp_path)
    assert [hours(each) for each in (-1.0, 0.0)] == [pytest.approx(8.8), math.inf]


def test_sigterm_ends_training_alone(parts, tiny_config, tmp_path, capsys):
    def callback(history, example, is_last):
        if not is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    config = replace(tiny_config, epochs=5)
    assert len(train(config, *parts, tmp_path, Session(0.0), callback)) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Training ends after epoch 1: the session ends" in capsys.readouterr().out


def test_sigterm_to_all_processes_leaves_the_loaders(parts, tiny_config):
    loader = training_loader(parts[0], replace(tiny_config, workers=1), 2)
    batches = iter(loader)
    next(batches)
    for process in batches._workers:
        process.terminate()
    assert len([*batches]) == len(loader) - 1


@pytest.mark.usefixtures("saved_each_epoch")
def test_a_damaged_checkpoint_stops_and_one_that_is_gone_trains_anew(parts, tiny_config, tmp_path):
    whole = train(tiny_config, *parts, tmp_path)
    last, best = tmp_path / "last.pt", (tmp_path / "best.pt").read_bytes()
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"last\.pt: expected .*in OUT set RESUME = False"):
        train(tiny_config, *parts, tmp_path)
    last.unlink()
    assert train(tiny_config, *parts, tmp_path) == whole
    assert (tmp_path / "best.pt").read_bytes() == best


@pytest.fixture
def scaled(monkeypatch):
    """Lets trainers have a scaler, as in fp16; sets the scale that it begins with."""
    really, options = accelerate.Accelerator, dict(growth_interval=1000)

    def with_scaler(**arguments):
        accelerator = really(**arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu", **options)
        return accelerator

    monkeypatch.setattr(accelerate, "Accelerator", with_scaler)
    return lambda scale: options.update(init_scale=scale)


def test_a_scale_that_is_too_high_is_halved(scaled, parts, tiny_config, tmp_path, capsys):
    scaled(8.0)
    run = ready(Trainer(replace(tiny_config, batch_size=2), *parts, tmp_path))
    weight, (first, second) = run.model.rpn.head.cls_logits.weight, batches(run, 2)
    handle = weight.register_hook(lambda grad: grad * math.inf)  # more than fp16 can hold
    before = weight.detach().clone()
    assert run.step(*first) == []
    assert (run.accelerator.scaler.get_scale(), capsys.readouterr().out) == (4.0, "")
    assert torch.equal(before, weight)
    handle.remove()
    assert len(run.step(*second)) == 1
    assert (run.accelerator.scaler.get_scale(), run.steps) == (4.0, 1)
    assert not torch.equal(before, weight)


def test_steps_while_the_scale_is_searched_are_no_failure(scaled, parts, tiny_config, tmp_path):
    """Gradients that fit fp16 at 16 in place of 65,536 take twelve halvings, not ten."""
    scaled(2.0**16)
    run = ready(Trainer(tiny_config, *parts, tmp_path))
    scaler = run.accelerator.scaler
    run.model.rpn.head.cls_logits.weight.register_hook(
        lambda grad: grad * (math.inf if scaler.get_scale() > 16 else 1)
    )
    taken = [run.step(*batch) for batch in batches(run, 13)]
    assert [len(row) for row in taken] == [0] * 12 + [1]
    assert (scaler.get_scale(), run.steps, run.bad_steps) == (16.0, 1, 0)


def test_losses_that_are_not_finite_are_failures_at_any_scale(scaled, parts, tiny_config, tmp_path):
    scaled(2.0**16)
    run = ready(Trainer(tiny_config, *parts, tmp_path))
    poison(run, *range(1, 13))
    with pytest.raises(FloatingPointError, match="10 times in a row"):
        [run.step(*batch) for batch in batches(run, 10)]


def test_the_scaler_is_resumed_and_its_scale_is_watched(
    scaled, parts, tiny_config, tmp_path, capsys
):
    scaled(0.25)
    history = train(tiny_config, *parts, tmp_path)
    assert [row["scale"] for row in history] == [0.25, 0.25]
    assert "WARNING: fp16 scale 0.25, below 1" in capsys.readouterr().out
    scaled(8.0)
    assert Trainer(tiny_config, *parts, tmp_path).parts["scaler"].get_scale() == 0.25


def test_a_run_begun_without_a_scaler_continues_with_one(scaled, finished, parts, tiny_config):
    scaled(8.0)
    run = Trainer(tiny_config, *parts, finished[1])
    assert (len(run.history), run.parts["scaler"].get_scale()) == (2, 8.0)


# Two processes on the CPU


@pytest.fixture
def two(monkeypatch):
    """As if there were two GPUs; their processes find none and take the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def plain(tiny_config, monkeypatch):
    """Settings without chance: no augmentation, and every anchor is a proposal and learned from."""
    options = dict(norm="frozen", head_norm="none", scale_jitter=(1.0, 1.0), flips=False)
    options |= dict(color_jitter=0.0, proposals=20_000, roi_batch_size=4096)
    options |= dict(optimizer="sgd", lr=1e-3, warmup_steps=0, clip_norm=0.0, epochs=1)
    really = detection.rpn.RegionProposalNetwork

    def without_nms(*parts, nms_thresh):
        return really(*parts, nms_thresh=1.0)

    monkeypatch.setattr(detection.rpn, "RegionProposalNetwork", without_nms)
    return replace(tiny_config, **options)


def learned(config, samples, val, folder):
    """The gradients of each step of a run, its history and what its model predicts."""
    run, gradients = Trainer(config, samples, val, folder), []
    run.model.rpn.fg_bg_sampler.batch_size_per_image = 8192
    run.train_samples, run.session = samples, Session(0.0)
    really = run.optimizer.step

    def watched():
        grads = [weight.grad.flatten() for weight in run.model.parameters() if weight.requires_grad]
        gradients.append(torch.cat(grads))
        really()

    run.optimizer.step = watched
    history = run.fit()
    _, (_, predictions) = evaluate(run.best_model, val, config)
    return gradients, history, predictions, validation_loss(run.best_model, val, config)


def test_two_processes_learn_as_one_from_two_batches(two, plain, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(transforms, "BLUR_PROBABILITY", 0.0)
    samples = [field_of_cells(seed, 64) for seed in range(4)]
    val = [field_of_cells(seed, 64) for seed in range(4, 7)]
    one = learned(replace(plain, batch_size=2, accumulate=2), samples, val, tmp_path / "one")
    config, folder = replace(plain, batch_size=2, lr=plain.lr / 2**0.5), tmp_path / "two"
    both = launch(config, learned, config, samples, val, folder)
    said = [line for line in capfd.readouterr().out.splitlines() if "crops, lr" in line]
    assert [line.endswith(" times the root of 2") for line in said] == [False, True]
    ((gradient,), (of_both,)) = one[0], both[0]
    assert float((gradient - of_both).norm() / gradient.norm()) < 1e-5
    for mine, other in zip(one[1], both[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert len(one[2]) == len(both[2])
    assert one[3] == pytest.approx(both[3], rel=1e-4)  # after an update of the weights
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "history.csv", "last.pt"]


def first_state(config, folder):
    """Weights and buffers of each process before its first step."""
    run = Trainer(config, [], [], folder)
    return gather([torch.cat([v.flatten().float() for v in run.model.state_dict().values()])])


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_two_processes_start_from_the_same_pretrained_norms(two, tiny_config, tmp_path, norm):
    model = build_model(replace(tiny_config, norm=norm))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(20.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    config = replace(tiny_config, norm=norm, weights=str(tmp_path / "weights.pt"))
    first, second = launch(config, first_state, config, tmp_path / "run")
    assert (first == 20.0).sum() > 100
    assert torch.equal(first, second)


@pytest.mark.parametrize(("scale_lr", "lr"), [(True, 2e-3), (False, 1e-3)])
def test_the_learning_rate_grows_with_the_root_of_the_processes(
    tiny_config, tiny_model, monkeypatch, scale_lr, lr
):
    monkeypatch.setattr(trainer, "world_size", lambda: 4)
    optimizer = build_optimizer(tiny_model, replace(tiny_config, lr=1e-3, scale_lr=scale_lr))
    assert max(group["lr"] for group in optimizer.param_groups) == lr


def bad_in_second(config, samples, folder):
    """Trains an epoch with norms, whose first batch is bad in process 1 alone."""
    run = Trainer(config, samples, [], folder)
    poison(run, *[1] * rank())
    run.fit()
    state = torch.cat([v.flatten().float() for v in run.model.state_dict().values()])
    return gather([(run.steps, state, torch.initial_seed())])


def test_a_bad_batch_in_one_process_is_skipped_by_all(two, tiny_config, tmp_path, capfd):
    config = replace(tiny_config, batch_size=1, epochs=1)
    samples = [field_of_cells(seed, 64) for seed in range(4)]
    first, second = launch(config, bad_in_second, config, samples, tmp_path)
    assert first[0] == second[0] == 1
    assert first[1].isfinite().all()
    assert torch.equal(first[1], second[1])  # norms too
    assert second[2] - first[2] == 7919  # augmentation differs
    assert capfd.readouterr().out.count("this step is skipped") == 1


class EndsInSecond(Session):
    """Is over in process 1 from its third look-up on."""

    calls = 0

    def is_over(self):
        self.calls += 1
        return rank() == 1 and self.calls > 2


def test_the_end_of_one_session_is_that_of_all(two, tiny_config, parts, tmp_path):
    config = replace(tiny_config, epochs=3, batch_size=1)
    assert len(launch(config, train, config, *parts, tmp_path, EndsInSecond(0.0))) < 3
    history = launch(config, train, config, *parts, tmp_path)  # both continue
    assert [row["epoch"] for row in history] == [1, 2, 3]
