"""Several processes: forked here as the notebook does, two of them, on the CPU."""

from dataclasses import replace
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from src_snippets import predict, processes, train
from src_snippets.checkpoints import load_checkpoint
from src_snippets.config import recipe
from src_snippets.datasets import read_test_mapping
from src_snippets.model import build_model
from src_snippets.predict import predict_images
from src_snippets.processes import (
    from_first,
    gathered,
    gpu_count,
    highest,
    make_equal,
    on_all_gpus,
    own_turns,
    process_count,
    process_index,
    summed,
)
from src_snippets.readers import BadInput
from src_snippets.train import fit, Session, training_loader, TrainingRun, validate, validation_loss
from tests.conftest import field_of_cells

CPU = torch.device("cpu")


@pytest.fixture
def two(monkeypatch):
    """As if there were two GPUs; their processes find none and take the CPU."""
    monkeypatch.setattr(processes, "gpu_count", lambda config: 2)


def exchange():
    index, tensor = process_index(), torch.tensor([1.0, 2.0]) * (process_index() + 1)
    means = [tensor.clone(), torch.full((2, 2), float(index))]
    make_equal(means, bucket=1)
    print("said by process", index)
    return dict(
        count=process_count(),
        turns=gathered([f"{i} by {index}" for i in own_turns(5)]),
        first=from_first(lambda: f"made by {index}"),
        sum=summed(tensor).tolist(),
        highest=highest(index, -index),
        means=[mean.tolist() for mean in means],
    )


def test_what_processes_exchange(two, tiny_config, capfd):
    assert on_all_gpus(tiny_config, exchange) == dict(
        count=2,
        turns=["0 by 0", "1 by 1", "2 by 0", "3 by 1", "4 by 0"],
        first="made by 0",
        sum=[3.0, 6.0],
        highest=[1.0, 0.0],
        means=[[1.5, 3.0], [[0.5, 0.5], [0.5, 0.5]]],
    )
    out = capfd.readouterr().out
    assert "said by process 0" in out
    assert "said by process 1" not in out


def test_one_process_has_all_to_itself(tiny_config):
    found = on_all_gpus(tiny_config, exchange)
    assert (found["count"], found["first"]) == (1, "made by 0")
    assert found["turns"] == [f"{i} by 0" for i in range(5)]
    assert (found["sum"], found["highest"]) == ([1.0, 2.0], [0, 0])
    assert gathered([]) == []
    make_equal([])


def test_gpus_are_counted_up_to_the_setting(monkeypatch):
    assert gpu_count(recipe("demo")) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpu_count(recipe("demo", gpus=count)) for count in (0, 1, 2, 4)] == [2, 1, 2, 2]


def fail_in_second():
    if process_index() == 1:
        raise BadInput("field.tif: broken")
    return gathered([1])  # waits for the other


def vanish_in_second():
    if process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return gathered([1])


def test_an_error_in_one_process_ends_all_with_it(two, tiny_config):
    with pytest.raises(BadInput, match=r"field\.tif: broken") as caught:
        on_all_gpus(tiny_config, fail_in_second)
    assert "In process 1:" in caught.value.__notes__[0]
    assert "fail_in_second" in caught.value.__notes__[0]


def test_a_process_that_vanishes_ends_all(two, tiny_config):
    with pytest.raises(RuntimeError, match="A process for a GPU ended without a word"):
        on_all_gpus(tiny_config, vanish_in_second)


# The same numbers as one process


@pytest.fixture
def plain(tiny_config):
    """Settings without chance: no augmentation, and every anchor is a proposal and learned from."""
    return replace(
        tiny_config,
        norm="frozen",
        head_norm="none",
        zoom=(1.0, 1.0),
        flips=False,
        quarter_turns=False,
        color_jitter=0.0,
        blur=0.0,
        crop=64,
        fill=False,
        proposals=20_000,
        rpn_nms=1.0,
        rpn_samples=8192,
        rois=4096,
        optimizer="sgd",
        lr=1e-3,
        warmup_steps=0,
        clip_norm=0.0,
        epochs=1,
    )


def learned(config, samples, held_out, folder):
    """Gradients, losses and weights of an epoch, and what the validation part then says."""
    gradients, really = [], torch.optim.SGD.step

    def watched(self, *arguments, **options):
        parts = [p.grad.clone() for g in self.param_groups for p in g["params"]]
        gradients.append(torch.cat([part.flatten() for part in parts]))
        return really(self, *arguments, **options)

    torch.optim.SGD.step = watched
    try:
        history = fit(config, samples, held_out, folder)
    finally:
        torch.optim.SGD.step = really
    model, _ = train.load_trained(folder / "best.pt", config)
    answers = validate(model, held_out, config)
    return gradients, history, answers, validation_loss(model, held_out, config)


def test_two_processes_learn_as_one_with_their_whole_batch(two, plain, tmp_path):
    samples = [field_of_cells(seed, 64) for seed in range(4)]
    held_out = [field_of_cells(seed, 64) for seed in range(4, 7)]
    one = learned(replace(plain, batch_size=4), samples, held_out, tmp_path / "one")
    folder = tmp_path / "two"
    config = replace(plain, batch_size=2)
    both = on_all_gpus(config, learned, config, samples, held_out, folder)
    ((gradient,), (of_both,)) = one[0], both[0]
    assert float((gradient - of_both).norm() / gradient.norm()) < 1e-5
    for mine, other in zip(one[1], both[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert [len(a.labels) for a in one[2]] == [len(a.labels) for a in both[2]]
    assert one[3] == pytest.approx(both[3], rel=1e-4)  # after an update of the weights
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "history.csv", "last.pt"]


def short_of_memory(config, samples, folder):
    """Trains an epoch in which process 1 has room for one crop only; what each of them tells."""
    run = TrainingRun(config, folder, training_loader(samples, config, CPU))
    told, model = [], run.model
    really = model.forward

    def forward(images, targets=None):
        if process_index() == 1 and len(images) > 1:
            raise torch.OutOfMemoryError("no room")
        return really(images, targets)

    model.forward = forward
    bar = SimpleNamespace(write=told.append, update=lambda: None, set_postfix=lambda *a, **k: None)
    parts = (model, run.loader, run.optimizer, run.schedule, run.accelerator)
    losses = train.train_epoch(*parts, config, bar, run.after_step, run.guard)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return gathered([(told, run.guard.parts, losses, weights)])


def test_full_memory_in_one_process_is_met_by_all(two, plain, tmp_path):
    config, samples = replace(plain, batch_size=2), [field_of_cells(seed, 64) for seed in range(8)]
    first, second = on_all_gpus(config, short_of_memory, config, samples, tmp_path)
    assert (
        first[0] == second[0] == ["The GPU's memory is full: batches are computed in 2 parts now."]
    )
    assert first[1] == second[1] == 2
    assert first[2] == second[2]
    assert torch.equal(first[3], second[3])


def not_finite(config, samples, folder):
    """Trains an epoch whose first batch is bad in process 1 alone."""
    run = TrainingRun(config, folder, training_loader(samples, config, CPU))
    told, calls, really = [], [], run.model.forward

    def forward(images, targets=None):
        losses = really(images, targets)
        calls.append(losses)
        bad = process_index() == 1 and len(calls) == 1
        return losses | {"loss_mask": losses["loss_mask"] * float("nan")} if bad else losses

    run.model.forward = forward
    bar = SimpleNamespace(write=told.append, update=lambda: None, set_postfix=lambda *a, **k: None)
    parts = (run.model, run.loader, run.optimizer, run.schedule, run.accelerator)
    train.train_epoch(*parts, config, bar, run.after_step, run.guard)
    weights = torch.cat([weight.detach().flatten() for weight in run.model.parameters()])
    return gathered([(len(told), weights)])


def test_a_bad_batch_in_one_process_is_skipped_by_all(two, plain, tmp_path):
    config, samples = replace(plain, batch_size=1), [field_of_cells(seed, 64) for seed in range(4)]
    first, second = on_all_gpus(config, not_finite, config, samples, tmp_path)
    assert first[0] == second[0] == 1
    assert first[1].isfinite().all()
    assert torch.equal(first[1], second[1])


def until_told(session):
    """Works until one of the processes is told to end."""
    while not highest(session.is_over())[0]:
        time.sleep(0.01)
    return process_count()


def test_sigterm_reaches_the_processes_and_this_one(two, tiny_config):
    session, before = Session(0.0), signal.getsignal(signal.SIGTERM)
    try:
        session.listen()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert on_all_gpus(tiny_config, until_told, session) == 2
        assert session.told
        assert signal.getsignal(signal.SIGTERM) not in (before, None)  # still listens
    finally:
        signal.signal(signal.SIGTERM, before)


class EndsInSecond(Session):
    """Is over in process 1 from its third look at the clock on."""

    looks = 0

    def is_over(self):
        self.looks += 1
        return process_index() == 1 and self.looks > 2


def test_the_end_of_one_session_is_that_of_all(two, tiny_config, demo_samples, tmp_path):
    samples, config = list(demo_samples), replace(tiny_config, epochs=3, batch_size=1)
    arguments = (config, samples[:6], samples[6:], tmp_path)
    assert len(on_all_gpus(config, fit, *arguments, EndsInSecond(0.0))) < 3
    history = on_all_gpus(config, fit, *arguments)  # goes on where both were
    assert [row["epoch"] for row in history] == [1, 2, 3]
    state = load_checkpoint(tmp_path / "last.pt")
    assert len(state["history"]) == 3


def other_settings(config, samples, folder):
    """Starts a run whose folder has another name in each process."""
    TrainingRun(config, folder / f"{process_index()}", training_loader(samples, config, CPU))


def test_processes_with_other_data_are_refused(two, tiny_config, demo_samples, tmp_path):
    with pytest.raises(ValueError, match="other processes have other settings or images"):
        on_all_gpus(tiny_config, other_settings, tiny_config, list(demo_samples), tmp_path)


def answered(config, images, kept):
    """Answers of test images, and how many this process was asked for."""
    asked, really = [], predict.detect_together
    predict.detect_together = lambda *a: asked.append(1) or really(*a)
    try:
        answers = predict_images([(build_model(config), config)], images, config, kept)
    finally:
        predict.detect_together = really
    return answers, gathered([len(asked)])


def test_every_image_is_answered_once(two, tiny_config, demo_root, tmp_path):
    images, kept = read_test_mapping(demo_root), tmp_path / "answers.jsonl"
    answers, counts = on_all_gpus(tiny_config, answered, tiny_config, images, kept)
    assert counts == [2, 1]
    alone, _ = answered(tiny_config, images, None)
    assert list(answers) == list(alone)
    assert [a.rles for a in answers.values()] == [a.rles for a in alone.values()]
    assert kept.read_text().count("\n") == 3
    kept.write_text(kept.read_text().splitlines(keepends=True)[0])
    _, counts = on_all_gpus(tiny_config, answered, tiny_config, images, kept)
    assert counts == [1, 1]  # what was kept is not asked again
