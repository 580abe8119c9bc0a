import csv
import json
from pathlib import Path
import sys
import tempfile
from types import SimpleNamespace
import zipfile

from hypothesis import given, settings, strategies
import IPython
import numpy as np
import pycocotools.mask
import pytest

from src_snippets.datasets import ImageRecord
from src_snippets.evaluate import coco_results
from src_snippets.forms import Instances, truth_instances
from src_snippets.rle import encode_crop
from src_snippets.writers import (
    BadResults,
    check_entry,
    check_results,
    check_rle,
    check_zip,
    offer_download,
    write_cell_folder,
    write_results,
    write_submissions,
)
from tests.conftest import empty_sample, make_sample

IMAGES = [ImageRecord(Path("a.tif"), 5, 20, 30), ImageRecord(Path("b.tif"), 9, 40, 50)]


def found_cell():
    ids = np.zeros((20, 30), np.int64)
    ids[3:9, 5:25] = 1
    return truth_instances(make_sample([ids], [2]))


@pytest.fixture
def answers():
    return {5: found_cell(), 9: truth_instances(empty_sample(40, 50))}


def test_the_written_files_are_a_valid_submission(answers, tmp_path, capsys):
    results, archive = write_results(answers, IMAGES, tmp_path, CLASSES)
    assert (results.name, archive.name) == ("test-results.json", "test-results.zip")
    (entry,) = json.loads(results.read_text())
    assert (entry["image_id"], entry["category_id"], entry["score"]) == (5, 2, 1.0)
    assert entry["bbox"] == [5.0, 3.0, 20.0, 6.0]
    assert entry["segmentation"]["size"] == [20, 30]
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["test-results.json"]
    assert "1 detections of all scores in 2 images (1 without any)" in capsys.readouterr().out
    assert check_results(results, IMAGES, CLASSES) == [9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test-results.json", "test-results.zip"]


def test_no_detections_at_all_is_a_valid_file(tmp_path):
    answers = {
        image.image_id: truth_instances(empty_sample(image.height, image.width)) for image in IMAGES
    }
    results, _ = write_results(answers, IMAGES, tmp_path, CLASSES)
    assert json.loads(results.read_text()) == []


def test_a_missing_answer_is_refused_and_the_old_file_stays(answers, tmp_path):
    results, _ = write_results(answers, IMAGES, tmp_path, CLASSES)
    before = results.read_bytes()
    with pytest.raises(BadResults, match="No answer for 1 images, the first with id 9"):
        write_results({5: answers[5]}, IMAGES, tmp_path, CLASSES)
    with pytest.raises(BadResults, match="category_id 2; expected one of 1"):
        write_results(answers, IMAGES, tmp_path, [1])
    assert results.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


ENTRY = coco_results({5: found_cell()})[0]
CLASSES = range(1, 5)
SIZES = {5: (20, 30)}
BAD_RLE = {
    "size": dict(size=[30, 20]),
    "list": dict(counts=[1, 2]),
    "text": dict(counts="~~~~"),
    "empty": dict(counts="hb0"),  # 600 background pixels
}


def test_a_right_entry_passes():
    assert check_entry(ENTRY, SIZES, CLASSES) is None


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(image_id=[5]), "image_id [5] is"),
        (dict(image_id=6), "image_id 6 is not in the mapping"),
        (dict(category_id=5), "category_id 5; expected one of 1, 2, 3, 4"),
        (dict(category_id=0), "category_id 0"),
        (dict(category_id=True), "category_id True"),
        (dict(score=float("nan")), "score nan"),
        (dict(score=1.5), "score 1.5"),
        (dict(score="1"), "score '1'"),
        (dict(bbox=[5, 3, 20]), "expected x, y, width, height"),
        (dict(bbox=[5, 3, 0, 6]), "empty or leaves the image"),
        (dict(bbox=[-1, 3, 4, 6]), "leaves the image"),
        (dict(bbox=[5, 3, 26, 6]), "leaves the image"),
        (dict(bbox=[5, 3, 20, 18]), "leaves the image"),
        (dict(bbox=[5, 3, 20, float("nan")]), "empty or leaves the image"),
        (dict(segmentation=None), "expected an object with size and counts"),
    ],
)
def test_each_rule_catches_its_breach(change, problem):
    assert problem in check_entry(ENTRY | change, SIZES, CLASSES)


@pytest.mark.parametrize("name", BAD_RLE)
def test_wrong_run_lengths_are_caught(name):
    problem = check_rle(ENTRY["segmentation"] | BAD_RLE[name], (20, 30))
    assert problem.startswith("segmentation")


def test_entries_that_lack_a_key_are_caught():
    assert "expected an object with bbox" in check_entry({"image_id": 5}, SIZES, CLASSES)
    assert "expected an object" in check_entry([], SIZES, CLASSES)


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(BadResults, match="not JSON"):
        check_results(path, IMAGES, CLASSES)
    path.write_text("{}")
    with pytest.raises(BadResults, match="expected a list"):
        check_results(path, IMAGES, CLASSES)
    path.write_text(json.dumps([ENTRY, ENTRY | {"score": 2}]))
    with pytest.raises(BadResults, match="entry 1: score 2"):
        check_results(path, IMAGES, CLASSES)


def test_zips_with_other_content_are_refused(answers, tmp_path):
    results, archive = write_results(answers, IMAGES, tmp_path, CLASSES)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("notes.txt", "x")
    with pytest.raises(BadResults, match=r"expected only test-results\.json"):
        check_zip(archive, results)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("test-results.json", "[]")
    with pytest.raises(BadResults, match="differs"):
        check_zip(archive, results)


def test_submissions_in_both_forms(tmp_path):
    square = encode_crop(np.ones((2, 2), bool), 0, 0, 6, 8)
    wide = encode_crop(np.ones((1, 4), bool), 1, 0, 6, 8)
    boxes = np.array([[0, 0, 2, 2], [0, 1, 4, 2]], np.float32)
    scores, labels = np.array([0.4, 0.9], np.float32), np.ones(2, np.int64)
    found = Instances(boxes, scores, labels, [square, wide], (6, 8))
    images = [ImageRecord(Path(f"{name}.png"), k, 6, 8) for k, name in enumerate("ab", start=1)]
    answers = {1: found, 2: found.select(found.scores > 1)}
    plain, indexed = write_submissions(answers, images, tmp_path)
    assert plain.read_text().split() == ["id,predicted", "a,1", "2", "a,9", "4", "b,"]
    assert indexed.read_text().splitlines() == ["idx,id,annotation", "0,a,1 2", "1,a,9 4", "2,b,-1"]
    with pytest.raises(BadResults, match="No answer for 1 images"):
        write_submissions({1: found}, images, tmp_path)
    write_submissions({k: a.above([0.5]) for k, a in answers.items()}, images, tmp_path)
    assert plain.read_text().split() == ["id,predicted", "a,9", "4", "b,"]


def test_folders_cannot_hold_overlaps_of_one_class(tmp_path):
    with pytest.raises(ValueError, match="cells of class 2 overlap"):
        write_cell_folder(make_sample([[[1, 1]], [[0, 1]]], [2, 2]), tmp_path)
    crowd = make_sample([[[1, 1]]], [-2])
    with pytest.raises(ValueError, match="a crowd"):
        write_cell_folder(crowd, tmp_path)


def boxes_of(masks):
    """(N, 4) XYXY of (N, H, W) masks."""
    places = [np.argwhere(mask) for mask in masks]
    return np.array([[*p.min(0)[::-1], *(p.max(0)[::-1] + 1)] for p in places]).reshape(-1, 4)


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31), strategies.integers(0, 9))
def test_whatever_was_found_is_read_back_by_others(seed, count):
    """Any masks, with holes and in pieces: by json and pycocotools, and from the table by hand."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, 20, 30)) < rng.uniform(0.01, 0.9)
    masks = masks[masks.any((1, 2))]
    rles = [pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    rles = [{"size": [20, 30], "counts": rle["counts"].decode()} for rle in rles]
    scores = np.sort(rng.random(len(masks)))[::-1].astype(np.float32)
    labels = rng.integers(1, 5, len(masks))
    boxes = boxes_of(masks).astype(np.float32)
    found = Instances(boxes, scores, labels, rles, (20, 30))
    with tempfile.TemporaryDirectory() as folder:
        results, _ = write_results({5: found}, IMAGES[:1], Path(folder), CLASSES)
        rows = json.loads(results.read_text())
        write_submissions({5: found}, IMAGES[:1], Path(folder))
        with (Path(folder) / "submission.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
    assert [row["category_id"] for row in rows] == labels.tolist()
    assert np.allclose([row["score"] for row in rows], scores)
    read = np.array([pycocotools.mask.decode(row["segmentation"]) for row in rows], bool)
    assert np.array_equal(read.reshape(-1, 20, 30), masks)
    drawn = np.zeros(600, int)
    for row in table:
        pairs = np.array(row["predicted"].split(), int).reshape(-1, 2)
        for start, length in pairs:
            drawn[start - 1 : start - 1 + length] += 1
    assert np.array_equal(drawn.reshape(20, 30), masks.any(0).astype(int))  # each pixel once


def test_a_link_to_download_where_there_is_a_notebook(tmp_path, monkeypatch, capsys):
    path, shown = tmp_path / "my results" / "test-results.zip", []
    path.parent.mkdir()
    path.touch()
    offer_download(path)
    assert capsys.readouterr().out == f"yours: {path}\n"
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    offer_download(path)  # outside of where the notebook is: no link would lead there
    assert shown == []
    monkeypatch.chdir(tmp_path)
    offer_download(path)
    assert 'href="my%20results/test-results.zip" download="test-results.zip"' in shown[0].data
    taken = []
    colab = SimpleNamespace(files=SimpleNamespace(download=taken.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    offer_download(path)
    assert taken == [str(path)]
