from dataclasses import replace

import pytest
import torch

from src_snippets import predict
from src_snippets.answers import (
    answer_held_out,
    answer_test,
    answer_validation,
    answers_file,
    tune_on_validation,
)
from src_snippets.checkpoints import save_checkpoint
from src_snippets.datasets import read_test_mapping
from src_snippets.evaluate import hits_of
from src_snippets.forms import with_crowds
from src_snippets.model import build_model
from src_snippets.predict import answer_samples, detect_together, predict_images
from src_snippets.readers import read_image
from src_snippets.rle import mask_areas
from src_snippets.train import load_trained
from tests.conftest import field_of_cells


def test_each_part_is_answered_by_its_own_model(tiny_config):
    samples = [field_of_cells(0, 96), field_of_cells(1, 96)]
    members = [(build_model(own), own) for own in (tiny_config, replace(tiny_config, seed=1))]
    asked = [(members[0], samples[:1]), (members[1], samples[1:])]
    answers = answer_held_out(asked, tiny_config)
    for found, member, sample in zip(answers, members, samples, strict=True):
        assert found.rles == answer_samples([member], [sample], tiny_config)[0].rles
    lower = answer_held_out(asked, tiny_config, mask_threshold=(0.4,))
    for larger, found in zip(lower, answers, strict=True):
        assert mask_areas(larger.rles).sum() > mask_areas(found.rles).sum()
    assert answer_held_out([], tiny_config) == []


def test_prediction_goes_on_where_it_was(demo_root, tiny_config, tmp_path, monkeypatch, capsys):
    images, checkpoint = read_test_mapping(demo_root), tmp_path / "best.pt"
    checkpoint.write_bytes(b"weights")
    kept = answers_file(tmp_path, [checkpoint], images, tiny_config)
    assert kept.parent == tmp_path
    member = (build_model(tiny_config), tiny_config)
    wanted = predict_images([member], images, tiny_config, kept)
    whole = kept.read_bytes()
    assert whole.count(b"\n") == 3
    kept.write_bytes(whole[: whole.index(b"\n") + 50])  # killed in the second line
    asked, really = [], predict.detect_together
    monkeypatch.setattr(predict, "detect_together", lambda *a: asked.append(a) or really(*a))
    found = predict_images([member], images, tiny_config, kept)
    assert len(asked) == 2
    assert kept.read_bytes() == whole
    assert "1 of 3 images are answered" in capsys.readouterr().out
    assert [a.rles for a in found.values()] == [a.rles for a in wanted.values()]
    predict_images([member], images, tiny_config, kept)
    assert len(asked) == 2
    kept.write_bytes(whole[:-1])  # killed before the end of the last line
    predict_images([member], images, tiny_config, kept)
    assert (len(asked), kept.read_bytes()) == (3, whole)
    # Other weights, settings or images have a file of their own.
    assert (
        answers_file(tmp_path, [checkpoint], images, replace(tiny_config, score_floor=0.9)) != kept
    )
    assert answers_file(tmp_path, [checkpoint], images[:2], tiny_config) != kept
    checkpoint.write_bytes(b"others")
    assert answers_file(tmp_path, [checkpoint], images, tiny_config) != kept


@pytest.fixture
def checkpoints(tiny_config, tmp_path):
    """Two checkpoints of the same settings with other weights."""
    paths = [tmp_path / name for name in ("one.pt", "two.pt")]
    for path in paths:
        model = build_model(tiny_config)
        notes = dict(config=vars(tiny_config), history=[], best=None)
        save_checkpoint(dict(model=model.state_dict(), **notes), path)
    return paths


def test_checkpoints_answer_validation_and_test(checkpoints, demo_root, tiny_config):
    samples = [field_of_cells(0, 96), field_of_cells(1, 96)]
    asked = [(checkpoints[0], samples[:1]), (checkpoints[1], samples[1:])]
    members = [load_trained(path, tiny_config) for path in checkpoints]
    answers = answer_validation(asked, tiny_config)
    for found, member, sample in zip(answers, members, samples, strict=True):
        assert found.rles == answer_samples([member], [sample], tiny_config)[0].rles
    truths = [with_crowds(sample) for sample in samples]
    hits = hits_of(answers, truths, tiny_config.num_classes)
    tuned = tune_on_validation(asked, truths, hits, tiny_config)
    assert len(tuned.changes["mask_threshold"]) == tiny_config.num_classes
    images = read_test_mapping(demo_root)
    folder = checkpoints[0].parent
    found = answer_test(checkpoints[:1], checkpoints[1:], images, folder, tiny_config)
    image = torch.from_numpy(read_image(images[0].path))
    assert found[1].rles == detect_together(members, image, tiny_config).rles
    assert len(list(folder.glob("answers-*.jsonl"))) == 1
    assert answer_test(checkpoints, [], [], folder, tiny_config) == {}
