from dataclasses import asdict

import pytest
import torch

from src_snippets.checkpoints import epochs_done, save_checkpoint, saved_settings
from src_snippets.config import recipe


def test_settings_of_a_checkpoint_with_those_of_prediction_changed(tmp_path):
    config, path = recipe("demo", class_names=["a", "b"], epochs=7), tmp_path / "best.pt"
    save_checkpoint(dict(model={}, config=asdict(config)), path)
    found = saved_settings(path, {"detections": 5, "show_floor": 0.25})
    assert (found.epochs, found.class_names, found.num_classes) == (7, ("a", "b"), 2)
    assert (found.detections, found.show_floor) == (5, (0.25,))
    assert saved_settings(path, {}) == config
    other = asdict(config) | {"precision": "bf16"}  # made on a GPU that has it
    save_checkpoint(dict(model={}, config=other), path)
    assert saved_settings(path, {}) == config
    with pytest.raises(ValueError, match=r"Setting epochs: .* was trained with another"):
        saved_settings(path, {"epochs": 3})
    with pytest.raises(ValueError, match="detections='many': expected int"):
        saved_settings(path, {"detections": "many"})
    with pytest.raises(FileNotFoundError, match="is not there"):
        saved_settings(tmp_path / "other.pt", {})


def test_settings_that_are_no_more_are_left_out(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(dict(model={}, config=asdict(recipe("demo")) | {"old": 3}), path)
    assert saved_settings(path, {}) == recipe("demo")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="not a checkpoint of this notebook"):
        saved_settings(path, {})


def test_epochs_are_counted_in_the_history(tmp_path):
    assert epochs_done(tmp_path) == 0
    (tmp_path / "history.csv").write_text("epoch,loss\n1,0.5\n2,0.4\n")
    assert epochs_done(tmp_path) == 2
