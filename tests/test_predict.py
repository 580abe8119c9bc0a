from contextlib import nullcontext
from dataclasses import replace

import numpy as np
from PIL import Image
import pytest
import torch

from src_snippets.data.images import read_image
from src_snippets.data.layouts import ImageRecord
from src_snippets.data.structures import ground_truth
from src_snippets.inference import predict
from src_snippets.inference.predict import (
    open_predictions,
    predict_image,
    predict_test,
    predict_validation,
)
from src_snippets.model.detect import detect, View
from src_snippets.model.mask_rcnn import build_model
from src_snippets.setup.config import BadInput, change_config, make_config
from src_snippets.training.checkpoints import load_trained, save_checkpoint
from tests.conftest import field_of_cells, make_sample
from tests.test_detect import decoded, draw, result, Scripted, Squares


def test_views_of_the_settings(monkeypatch):
    found = ground_truth(make_sample([np.eye(3, dtype=int)], [1]))
    calls, image = [], torch.arange(6).view(1, 2, 3)
    monkeypatch.setattr(predict, "detect", lambda *given: calls.append(given[3]) or found)
    for changes in ({}, dict(tta="d4"), dict(tta="flips")):
        predict_image([], image, make_config("demo", **changes))
    assert calls[0] == [View(0, False)]
    assert len(set(calls[1])) == 8
    shown = [view.apply(image)[0].tolist() for view in calls[2]]
    assert shown == [[[0, 1, 2], [3, 4, 5]], [[2, 1, 0], [5, 4, 3]], [[3, 4, 5], [0, 1, 2]]]


@pytest.mark.parametrize("tta", ["flips", "d4"])
def test_all_views_agree_on_exact_detections(tta):
    config = make_config("demo", tta=tta, tile=32)
    model, cells = Squares(), [(5, 5, 15, 15), (20, 14, 34, 28)]
    found = predict_image([model], draw(cells, 40, 40), config)
    assert sorted(found.boxes[:, [1, 0, 3, 2]].round(3).tolist()) == sorted(map(list, cells))
    assert np.allclose(np.sort(found.scores), [0.2, 0.296])


def test_several_models_predict_together():
    boxes = [[2, 2, 12, 12]], [[2, 2, 12, 11]]
    config = make_config("demo", score_threshold=0.0)
    models = [Scripted(result(boxes[0], [0.8])), Scripted(result(boxes[1], [0.4]))]
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    fused = predict_image(models, image, config)
    assert np.allclose(fused.scores, [0.6])
    alone = predict_image([Scripted(result(boxes[0], [0.8]))], image, config)
    assert np.allclose(alone.scores, [0.8])


def test_overlaps_are_separated_where_the_settings_say_so():
    image = torch.zeros(3, 20, 20, dtype=torch.uint8)
    for overlaps, areas in ((True, [100, 100]), (False, [100, 50])):
        config = make_config("demo", overlaps=overlaps)
        model = Scripted(result([[0, 0, 10, 10], [5, 0, 15, 10]], [0.9, 0.8]))
        found = predict_image([model], image, config)
        assert decoded(found).sum((1, 2)).tolist() == areas
        again = result([[0, 0, 10, 10], [1, 0, 11, 10]], [0.9, 0.8], [1, 2])  # no rim is a cell
        found = predict_image([Scripted(again)], image, config)
        assert decoded(found).sum((1, 2)).tolist() == [100, 100][: 1 + overlaps]


@pytest.fixture
def models(monkeypatch):
    """Checkpoints by path in place of those on disk; notes the settings they are loaded with."""
    known, calls = {}, []

    def load(path, config, same=True):
        calls.append((path, config.score_threshold, same))
        return known[path]

    monkeypatch.setattr(predict, "load_trained", load)
    known["calls"] = calls
    return known


def test_each_part_is_predicted_by_its_own_model_with_weak_detections(models):
    samples = [
        replace(field_of_cells(seed, 40), image=draw([(seed, 0, 9, 9)], 40, 40))
        for seed in range(3)
    ]
    models |= {"a": Squares(), "b": Squares()}
    parts = [("a", samples[:1]), ("b", samples[1:])]
    predictions = predict_validation(parts, make_config("demo", score_threshold=0.5))
    assert [p.boxes[0, 1] for p in predictions] == [0, 1, 2]
    assert [len(models[key].calls) for key in "ab"] == [1, 2]
    assert models["a"].roi_heads.score_thresh == 0.05
    predict_validation(parts, make_config("demo", score_threshold=0.01))
    assert models["a"].roi_heads.score_thresh == 0.01
    assert predict_validation([], make_config("demo")) == []


@pytest.fixture
def images(tmp_path):
    """Three test images with one, two and no cells."""
    records = []
    for key, (cells, height) in enumerate(
        [([(2, 2, 9, 9)], 20), ([(0, 0, 5, 5), (8, 8, 12, 14)], 40), ([], 30)], start=7
    ):
        path = tmp_path / f"{key}.png"
        Image.fromarray(draw(cells, height, 25).permute(1, 2, 0).numpy()).save(path)
        records.append(ImageRecord(path, key, height, 25))
    return records


@pytest.fixture
def checkpoint(tmp_path, models):
    path = tmp_path / "best.pt"
    path.write_bytes(b"weights")
    models[path] = Squares()
    return path


def test_every_test_image_is_predicted(images, checkpoint, models, tmp_path):
    config = make_config("demo", score_threshold=0.11)
    predictions = predict_test([checkpoint], [], images, tmp_path, config)
    assert list(predictions) == [7, 8, 9]
    assert [len(p) for p in predictions.values()] == [1, 2, 0]
    assert [p.size for p in predictions.values()] == [(20, 25), (40, 25), (30, 25)]
    assert models["calls"] == [(checkpoint, 0.11, True)]
    low = replace(config, score_threshold=0.5, export_score_threshold=0.11)  # exports want more
    again = predict_test([checkpoint], [], images, tmp_path, low)
    assert [len(p) for p in again.values()] == [1, 2, 0]
    assert models["calls"].pop() == (checkpoint, 0.11, True)
    models[extra := str(checkpoint)] = Squares()  # as a user names it
    assert predict_test([checkpoint], [extra], [], tmp_path, config) == {}
    assert models["calls"][1:] == [(checkpoint, 0.11, True), (extra, 0.11, False)]


def test_prediction_goes_on_where_it_was(images, checkpoint, models, tmp_path, capsys):
    config, model = make_config("demo"), models[checkpoint]
    expected = predict_test([checkpoint], [], images, tmp_path, config)
    (folder,) = tmp_path.glob("predictions-*")
    paths = [folder / f"{key}.json" for key in (7, 8, 9)]
    assert sorted(folder.iterdir()) == paths
    before = [path.read_bytes() for path in paths]
    for missing in ([], [1], [0, 2], [0, 1, 2]):
        for k in missing:
            paths[k].rename(paths[k].with_name(f".{paths[k].name}.partial"))  # as if cut short
        model.calls.clear()
        found = predict_test([checkpoint], [], images, tmp_path, config)
        assert len(model.calls) == len(missing)
        assert [path.read_bytes() for path in paths] == before
        assert list(found) == [7, 8, 9]
        for one, other in zip(found.values(), expected.values(), strict=True):
            assert (one.rles, one.size) == (other.rles, other.size)
            for name in ("boxes", "scores", "labels"):
                mine, own = getattr(one, name), getattr(other, name)
                assert (mine.tolist(), mine.dtype) == (own.tolist(), own.dtype)
                assert mine.shape == own.shape
    assert "1 of 3 images are predicted already" in capsys.readouterr().out


def test_what_is_read_back_is_what_was_predicted(images, checkpoint, models, tmp_path):
    config, model = make_config("demo"), models[checkpoint]
    found = predict_test([checkpoint], [], images, tmp_path, config)
    for image in images:
        pixels = torch.from_numpy(read_image(image.path))
        direct = predict_image([model], pixels, config)
        own = found[image.image_id]
        assert (own.rles, own.size) == (direct.rles, direct.size)
        for name in ("boxes", "scores", "labels"):
            read, wanted = getattr(own, name), getattr(direct, name)
            assert (read.tolist(), read.dtype) == (wanted.tolist(), wanted.dtype)
            assert read.shape == wanted.shape


def test_other_weights_settings_or_images_have_a_folder_of_their_own(
    images, checkpoint, tmp_path, monkeypatch
):
    config = make_config("demo")
    folders = {open_predictions([checkpoint], images, tmp_path, config)[0]}
    folders.add(open_predictions([checkpoint], images, tmp_path, config)[0])
    assert len(folders) == 1
    folders.add(open_predictions([checkpoint], images[:2], tmp_path, config)[0])
    other = change_config(config, dict(mask_threshold=0.4))
    folders.add(open_predictions([checkpoint], images, tmp_path, other)[0])
    checkpoint.write_bytes(b"others!")
    folders.add(open_predictions([checkpoint], images, tmp_path, config)[0])
    images[0].path.write_bytes(images[0].path.read_bytes() + b"0")
    folders.add(open_predictions([checkpoint], images, tmp_path, config)[0])
    assert len(folders) == 5
    same = change_config(config, dict(um_per_px=0.5, workers=1, export_score_threshold=0.9))
    assert open_predictions([checkpoint], images, tmp_path, same)[0] in folders
    monkeypatch.setattr(
        "src_snippets.model.detect.paste_masks", lambda *_: []
    )  # "Add your own" here
    assert open_predictions([checkpoint], images, tmp_path, config)[0] not in folders


def test_processes_share_the_images_evenly(images, checkpoint, models, tmp_path, monkeypatch):
    """Two processes one after the other; the first one would wait for the files of the second."""
    many = [images[k % 3]._replace(image_id=k) for k in range(20)]
    opened, heights = open_predictions([checkpoint], many, tmp_path, make_config("demo")), []
    monkeypatch.setattr(predict, "broadcast", lambda *_: (opened[0], [*opened[1]]))
    for rank in range(2):
        models[checkpoint].calls.clear()
        monkeypatch.setattr(predict, "rank_indices", lambda count, own=rank: range(own, count, 2))
        monkeypatch.setattr(predict, "gather", lambda _, own=rank: 1 // own)
        with nullcontext() if rank else pytest.raises(ZeroDivisionError):
            found = predict_test([checkpoint], [], many, tmp_path, make_config("demo"))
        heights.append([size[0] for _, size in models[checkpoint].calls])
    assert heights == [[40] * 4 + [30] * 3 + [20] * 3, [40] * 3 + [30] * 3 + [20] * 4]
    assert list(found) == list(range(20))
    assert [own.size[0] for own in found.values()] == [image.height for image in many]


def test_an_image_that_cannot_be_read_is_named_and_the_others_stay(images, checkpoint, tmp_path):
    images[0].path.write_bytes(images[0].path.read_bytes()[:40])  # the smallest, so the last
    with pytest.raises(BadInput, match=r"7\.png"):
        predict_test([checkpoint], [], images, tmp_path, make_config("demo"))
    assert len(list(tmp_path.glob("predictions-*/*"))) == 2


def test_checkpoints_on_disk_predict_together(images, tiny_config, tmp_path):
    """The models of other settings take those of prediction from this run."""
    config = change_config(tiny_config, dict(score_threshold=0.0, detections=5))
    other, paths = replace(tiny_config, seed=1, detections=9), []
    for own in (tiny_config, other):
        paths.append(tmp_path / f"{own.seed}.pt")
        notes = dict(config=vars(own), history=[], best=None)
        save_checkpoint(dict(model=build_model(own).state_dict(), **notes), paths[-1])
    found = predict_test(paths[:1], paths[1:], images, tmp_path, config)
    models = [load_trained(path, config, same=path is paths[0]) for path in paths]
    assert [model.roi_heads.detections_per_img for model in models] == [5, 5]
    for image in images:
        pixels = torch.from_numpy(read_image(image.path))
        together = detect(models, pixels, config)
        assert found[image.image_id].rles == together.rles


def test_the_preview_shows_the_price_of_the_threshold():
    """Two instances, found with scores .9 and .2: from .5 on recall ends at a half."""
    ids = np.zeros((20, 30), int)
    ids[2:8, 2:8], ids[10:16, 12:18] = 1, 2
    sample = make_sample([ids], [1])
    predictions = [replace(ground_truth(sample), scores=np.array([0.9, 0.2], np.float32))]
    config = make_config("demo", class_names=["cell"], score_threshold=0.5)
    table, advice = predict.submission_preview([sample], predictions, config)
    assert table.index.tolist() == ["as submitted", "from 0.05 on"]
    assert table.AP50.tolist() == pytest.approx([51 / 101, 1.0])
    assert "costs 0.495 AP50; add score_threshold=0.05 to CHANGES" in advice
    low = replace(config, score_threshold=0.01)
    table, advice = predict.submission_preview([sample], predictions, low)
    assert table.index.tolist() == ["as submitted"]
    assert advice == ""
    empty, advice = predict.submission_preview([], [], config)
    assert len(empty) == 2
    assert advice.startswith("No validation images")
