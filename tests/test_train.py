import csv
from dataclasses import replace
import math

import numpy as np
import pytest
import torch
from torch import nn

from src_snippets import train
from src_snippets.config import recipe
from src_snippets.evaluate import average_precision
from src_snippets.forms import coco_truth
from src_snippets.model import build_model
from src_snippets.readers import BadInput
from src_snippets.train import (
    build_optimizer,
    by_image_id,
    fit,
    load_checkpoint,
    load_trained,
    rate_factor,
    run_folder,
    save_checkpoint,
    train_epoch,
    training_loader,
    TrainingRun,
    validate,
    write_history,
)
from tests.conftest import empty_sample

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


def test_norms_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].bias.requires_grad_(False)
    decayed, free = build_optimizer(model, recipe("baseline", weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert [p.shape for p in free["params"]] == [(4,), (4,)]
    assert (decayed["weight_decay"], free["weight_decay"], decayed["lr"]) == (0.1, 0.0, 1e-4)


def test_rates_by_hand():
    config = recipe("demo", warmup_steps=4, schedule="cosine")
    found = [rate_factor(step, config, 24) for step in (0, 3, 4, 14, 24)]
    assert found == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    assert rate_factor(1000, replace(config, schedule="constant"), 24) == 1.0
    assert rate_factor(0, replace(config, warmup_steps=500), 10) == 0.5  # at most a fifth
    assert rate_factor(0, replace(config, warmup_steps=0), 1) == 1.0


def test_history_and_files(finished, tiny_config):
    history, folder = finished
    assert [row["epoch"] for row in history] == [1, 2]
    assert "AP50" not in history[0]
    assert 0 <= history[1]["AP50"] <= 1
    parts = [row[f"loss_{name}"] for row in history for name in ("mask", "classifier", "box_reg")]
    assert all(math.isfinite(value) for value in parts)
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "history.csv", "last.pt"]
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

    saved = TrainingRun.save

    def save_and_stop(self, row, is_best):
        saved(self, row, is_best)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_config, *parts, tmp_path)
    monkeypatch.undo()
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1
    fit(tiny_config, *parts, tmp_path)
    wanted, found = (load_checkpoint(f / "last.pt")["model"] for f in (whole, tmp_path))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_the_best_weights_answer(finished, parts, tiny_config):
    _, folder = finished
    model = load_trained(folder / "best.pt", tiny_config)
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


def test_a_loss_that_is_not_finite_stops_with_parts_and_images(parts, tiny_config, tmp_path):
    loader = training_loader(parts[0], tiny_config, torch.device("cpu"))
    run = TrainingRun(tiny_config, tmp_path, loader)
    with torch.no_grad():
        next(run.model.rpn.head.parameters()).fill_(math.nan)

    class Bar:
        n = 7

    arguments = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    with pytest.raises(FloatingPointError) as caught:
        train_epoch(*arguments, tiny_config, Bar())
    message = str(caught.value)
    assert "Step 7: losses" in message
    assert "'loss_objectness': nan" in message
    assert any(sample.name in message for sample in parts[0])


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
        set_postfix = update = staticmethod(lambda *args, **kwargs: None)

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
    run.restore(load_checkpoint(finished[1] / "last.pt"))
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
    save_checkpoint({"epoch": 1, "w": torch.ones(2)}, path)
    with pytest.raises(AttributeError):  # what cannot be pickled leaves the old file
        save_checkpoint({"epoch": 2, "f": lambda: None}, path)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"last\.pt: not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no epoch was validated yet"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_checkpoint_of_another_model_is_refused(finished):
    with pytest.raises(ValueError, match="other settings: fpn_channels=16"):
        load_trained(finished[1] / "best.pt", recipe("demo", crop=64, epochs=2))


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
