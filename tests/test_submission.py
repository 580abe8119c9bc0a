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

from src_snippets.data.layouts import ImageRecord
from src_snippets.data.rle import encode_masks
from src_snippets.data.structures import coco_annotations, Instances
from src_snippets.inference.submission import (
    check_entry,
    check_results,
    offer_download,
    write_csv_submissions,
    write_results,
)
from src_snippets.model.detect import visible_instances
from src_snippets.setup.config import BadInput
from tests.test_detect import make_instances

IMAGES = [ImageRecord(Path("a.tif"), 5, 20, 30), ImageRecord(Path("b.tif"), 9, 40, 50)]


def one_cell(label=2) -> Instances:
    masks = np.zeros((1, 20, 30))
    masks[0, 3:9, 5:25] = 1
    return make_instances(masks, [0.5], [label])


@pytest.fixture
def predictions():
    return {9: make_instances(np.zeros((0, 40, 50)), []), 5: one_cell()}


def test_the_written_files_are_a_valid_submission(predictions, tmp_path, capsys):
    results, archive = write_results(predictions, IMAGES, tmp_path, [1, 2])
    assert (results.name, archive.name) == ("test-results.json", "test-results.zip")
    (entry,) = json.loads(results.read_text())
    assert (entry["image_id"], entry["category_id"], entry["score"]) == (5, 2, 0.5)
    assert entry["bbox"] == [5.0, 3.0, 20.0, 6.0]
    assert entry["segmentation"]["size"] == [20, 30]
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["test-results.json"]
        assert file.read("test-results.json") == results.read_bytes()
    assert "checked, 1 detections, 1 of 2 images empty" in capsys.readouterr().out
    assert check_results(results, IMAGES, [1, 2]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test-results.json", "test-results.zip"]


def test_equal_predictions_are_equal_bytes(predictions, tmp_path, monkeypatch):
    before = [path.read_bytes() for path in write_results(predictions, IMAGES, tmp_path, [1, 2])]
    monkeypatch.setattr("time.time", lambda: 10**9)
    monkeypatch.setattr("time.localtime", lambda *_: (2020, 1, 1, 0, 0, 0, 0, 0, 0))
    after = write_results(dict(reversed(predictions.items())), IMAGES, tmp_path, [1, 2])
    assert [path.read_bytes() for path in after] == before


def test_results_carry_the_category_ids_of_the_dataset(tmp_path):
    for label, category in ((1, 3), (2, 7), (3, 12)):
        path, _ = write_results(
            {5: one_cell(label)}, IMAGES[:1], tmp_path, {3: "x", 7: "y", 12: "z"}
        )
        assert json.loads(path.read_text())[0]["category_id"] == category
    with pytest.raises(BadInput, match=r"category_id None; expected one of \[3, 7, 12\]"):
        write_results({5: one_cell(7)}, IMAGES[:1], tmp_path, [3, 7, 12])  # a label, not an id


def test_no_detections_at_all_is_a_valid_file(predictions, tmp_path):
    results, _ = write_results({9: predictions[9]}, IMAGES[1:], tmp_path, [1])
    assert json.loads(results.read_text()) == []


def test_wrong_predictions_leave_the_earlier_file(predictions, tmp_path):
    results, archive = write_results(predictions, IMAGES, tmp_path, [1, 2])
    before = results.read_bytes(), archive.read_bytes()
    with pytest.raises(BadInput, match=r"No prediction for 1 images, such as ids \[9\]"):
        write_results({5: predictions[5]}, IMAGES, tmp_path, [1, 2])
    with pytest.raises(BadInput, match="entry 0: category_id None; expected one of"):
        write_results(predictions, IMAGES, tmp_path, [1])
    assert (results.read_bytes(), archive.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


ENTRY, SIZES = coco_annotations({5: one_cell()}, range(1, 5))[0], {5: (20, 30)}


def segmentation(**changes):
    return dict(segmentation=ENTRY["segmentation"] | changes)


def test_a_right_entry_passes():
    check_entry(ENTRY, SIZES, [1, 2])
    check_entry(ENTRY | dict(score=0, bbox=[0, 0, 30.0005, 20]), SIZES, [1, 2])
    check_entry(ENTRY | dict(score=1), SIZES, [1, 2])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(image_id=[5]), "image_id [5]; expected"),
        (dict(image_id=6), "image_id 6; expected that of a test image"),
        (dict(category_id=5), "category_id 5; expected one of [1, 2]"),
        (dict(category_id=0), "category_id 0"),
        (dict(category_id=True), "category_id True"),
        (dict(score=float("nan")), "score nan"),
        (dict(score=1.5), "score 1.5"),
        (dict(score="1"), "score '1'"),
        (dict(bbox=[5, 3, 20]), "expected x, y, width, height"),
        (dict(bbox=[5, 3, 20, "6"]), "expected x, y, width, height"),
        (dict(bbox=[5, 3, 0, 6]), "empty or leaves the image"),
        (dict(bbox=[5, 3, 20, 0]), "empty or leaves the image"),
        (dict(bbox=[-1, 3, 4, 6]), "leaves the image"),
        (dict(bbox=[5, -1, 4, 6]), "leaves the image"),
        (dict(bbox=[5, 3, 26, 6]), "leaves the image"),
        (dict(bbox=[5, 3, 20, 18]), "leaves the image"),
        (dict(bbox=[float("nan"), 3, 20, 6]), "empty or leaves the image"),
        (dict(bbox=[5, 3, 20, float("nan")]), "empty or leaves the image"),
        (dict(segmentation=None), "segmentation None; expected size [20, 30]"),
        (segmentation(size=[30, 20]), "expected size [20, 30]"),
        (segmentation(counts=[1, 2]), "counts as text"),
        (segmentation(counts="~~~~"), "RLE counts"),
        (segmentation(counts="hb0"), "segmentation of 0 pixels"),  # 600 of background
    ],
)
def test_each_rule_catches_its_breach(change, problem):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_entry(ENTRY | change, SIZES, [1, 2])
    assert problem in str(caught.value)


def test_files_that_are_no_results(tmp_path):
    path = tmp_path / "x.json"
    bad = ["{", "{}", json.dumps([ENTRY, ENTRY | {"score": 2}]), "[[]]", '[{"image_id": 5}]']
    problems = [
        "cannot be read",
        "dict; expected a list",
        "entry 1: score 2",
        "expected an object with",
    ]
    for content, problem in zip(bad, [*problems, problems[-1]], strict=True):
        path.write_text(content)
        with pytest.raises(BadInput, match=rf"x\.json: .*{problem}"):
            check_results(path, IMAGES, [1, 2])


def test_csv_submissions_in_both_forms(tmp_path):
    rles = encode_masks(np.ones((1, 2, 2), bool), [0], [0], 6, 8)
    rles += encode_masks(np.ones((1, 1, 4), bool), [1], [0], 6, 8)
    boxes = np.array([[0, 0, 2, 2], [0, 1, 4, 2]], np.float32)
    scores, labels = np.array([0.4, 0.9], np.float32), np.ones(2, np.int64)
    both = Instances(boxes, scores, labels, rles, (6, 8))
    images = [ImageRecord(Path(f"{name}.png"), k, 6, 8) for k, name in enumerate("ab", start=1)]
    predictions = {1: both, 2: both.select([])}
    write_csv_submissions(predictions, images, tmp_path, {})
    plain, indexed = tmp_path / "submission.csv", tmp_path / "submission-idx.csv"
    assert plain.read_text() == "id,predicted\na,1 2\na,9 4\nb,\n"
    assert indexed.read_text() == "idx,id,annotation\n0,a,1 2\n1,a,9 4\n2,b,-1\n"
    confident = {k: p.above(0.5) for k, p in predictions.items()}
    write_csv_submissions(confident, images, tmp_path, {})
    assert plain.read_text() == "id,predicted\na,9 4\nb,\n"
    write_csv_submissions(confident, images, tmp_path, {Path("a.png"): "test/A.PNG"})
    assert plain.read_text() == "id,predicted\ntest/A.PNG,9 4\nb,\n"
    assert indexed.read_text() == "idx,id,annotation\n0,test/A.PNG,9 4\n1,b,-1\n"
    rims = Instances(boxes * 0, scores, labels, [rles[0], rles[0]], (6, 8))  # one is a duplicate
    write_csv_submissions({1: rims, 2: rims}, images, tmp_path, {})
    assert plain.read_text() == "id,predicted\na,1 2 9 2\nb,1 2 9 2\n"


@settings(max_examples=40, deadline=None)
@given(strategies.integers(0, 2**31), strategies.integers(0, 9))
def test_predictions_are_read_back_by_others(seed, count):
    """Any masks, with holes and in pieces: by json and pycocotools, and from the CSV by hand."""
    rng = np.random.default_rng(seed)
    masks = rng.random((count, 20, 30)) < rng.uniform(0.01, 0.9)
    masks = masks[masks.any((1, 2))]
    scores, labels = np.sort(rng.random(len(masks)))[::-1], rng.integers(1, 5, len(masks))
    instances = make_instances(masks, scores, labels)
    with tempfile.TemporaryDirectory() as folder:
        results, _ = write_results({5: instances}, IMAGES[:1], Path(folder), range(1, 5))
        rows = json.loads(results.read_text())
        write_csv_submissions({5: instances}, IMAGES[:1], Path(folder), {})
        with Path(folder, "submission.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
    assert [row["category_id"] for row in rows] == labels.tolist()
    assert np.allclose([row["score"] for row in rows], scores)
    read = np.array([pycocotools.mask.decode(row["segmentation"]) for row in rows], bool)
    assert np.array_equal(read.reshape(-1, 20, 30), masks)
    drawn = np.zeros(600, int)
    for row in table:
        for start, length in np.array(row["predicted"].split(), int).reshape(-1, 2):
            drawn[start - 1 : start - 1 + length] += 1
    shown = [pycocotools.mask.decode(rle) for rle in visible_instances(instances).rles]
    assert len(table) == max(len(shown), 1)
    assert np.array_equal(drawn.reshape(20, 30), np.sum(shown, 0, int) * np.ones((20, 30)))
    assert drawn.max(initial=0) <= 1  # each pixel once
    assert not drawn.reshape(20, 30)[~masks.any(0)].any()
    assert masks[:1].sum() == masks[:1, drawn.reshape(20, 30) > 0].sum()  # the best is whole


def test_a_link_to_download_where_there_is_a_notebook(tmp_path, monkeypatch, capsys):
    path, links, downloads = tmp_path / "my results" / "test-results.zip", [], []
    path.parent.mkdir()
    path.touch()
    offer_download(path)
    assert capsys.readouterr().out == f"{path}\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IPython.display, "display", links.append)
    offer_download(path)
    html = links[0]._repr_html_()
    assert "href='my results/test-results.zip' download" in html
    colab = SimpleNamespace(files=SimpleNamespace(download=downloads.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    offer_download(path)
    assert downloads == [str(path)]
