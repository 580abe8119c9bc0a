import math

import pytest
import torch

from src_snippets import costs
from src_snippets.costs import Costs, describe_costs, measure_costs, span


def test_a_training_is_measured_before_it_begins(demo_samples, tiny_config, monkeypatch):
    devices, really = [], costs.add_gradients

    def watched(model, images, targets, accelerator, parts):
        tensors = [*images, *(v for t in targets for v in t.values() if torch.is_tensor(v))]
        devices.append({(t.device, accelerator.device) for t in tensors})
        return really(model, images, targets, accelerator, parts)

    monkeypatch.setattr(costs, "add_gradients", watched)
    found = measure_costs(tiny_config, demo_samples, 0)
    assert 0 < found.step < 10
    assert (found.memory, found.room, found.processes) == (0, 0, 1)
    assert found.look > 0
    assert found.answer > 0
    assert len(devices) == 3
    assert all(own == wanted for pairs in devices for own, wanted in pairs)


class Moved(Exception):
    """A batch was sent to a device."""


def test_the_batch_goes_where_the_model_is(demo_samples, tiny_config, monkeypatch):
    """On a GPU, which is not here: another device stands for it."""
    sent = []

    def send(batch, device):
        sent.append(device)
        raise Moved

    monkeypatch.setattr(costs, "default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(costs, "send_to_device", send)
    with pytest.raises(Moved):
        measure_costs(tiny_config, demo_samples, 0)
    assert sent == [torch.device("meta")]


def test_a_step_that_does_not_fit_is_told(demo_samples, tiny_config, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(costs, "add_gradients", full)
    found = measure_costs(tiny_config, demo_samples, 0)
    assert (found.step, found.memory) == (math.inf, math.inf)
    told = describe_costs(found, tiny_config, 10, 1.0)
    assert told.startswith("10 steps, and ")
    assert "A batch does not fit into the GPU's memory" in told
    assert " inf" not in told


def test_costs_worked_by_hand(tiny_config):
    found = Costs(step=0.5, memory=7.25, room=15.8, answer=9.0, look=2.0, processes=2)
    told = describe_costs(found, tiny_config, 1200, 45.0)
    assert told.splitlines() == [
        "1,200 steps of 500 ms in 2 processes: 10 min, and 2 min for looks at the validation part",
        "a step takes 7.2 of the GPU's 15.8 GB",
    ]
    assert [span(seconds) for seconds in (5, 89, 90, 600, 7200)] == [
        "5 s",
        "89 s",
        "2 min",
        "10 min",
        "2.0 h",
    ]
