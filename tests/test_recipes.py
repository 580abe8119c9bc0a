"""Each recipe, with its real modules on small images, from files to a checked submission."""

import json

import pytest
from torch.utils.data import Subset

from src_snippets.checkpoints import load_checkpoint, run_folder, save_checkpoint
from src_snippets.config import recipe, RECIPES
from src_snippets.datasets import CellSamples, choose_splits, open_dataset, pick
from src_snippets.evaluate import average_precision
from src_snippets.forms import coco_truth
from src_snippets.places import MAPPING_NAME
from src_snippets.predict import predict_images
from src_snippets.train import by_image_id, fit, load_trained, run_epoch, validate
from src_snippets.writers import write_results, write_submissions
from tests.conftest import SHARED_DATA

# What makes a recipe small enough for a test; its modules and its way of training stay.
SMALL = dict(
    weights="none",
    crop=64,
    scale=1.0,
    fpn_channels=32,
    box_features=64,
    rois=16,
    proposals=50,
    detections=20,
    score_floor=0.0,
    epochs=2,
)


@pytest.fixture(scope="session")
def small_folders(demo_root, tmp_path_factory):
    """Five real training folders and two test images; the drawn ones where there are none."""
    real, root = SHARED_DATA / "consep", tmp_path_factory.mktemp("folders")
    if not real.exists():
        return demo_root
    (root / "train").mkdir()
    folders = sorted(p for p in (real / "train").iterdir() if (p / "class2.tif").exists())
    for folder in folders[:5]:
        (root / "train" / folder.name).symlink_to(folder)
    (root / "test_release").symlink_to(real / "test_release")
    entries = sorted(json.loads((real / MAPPING_NAME).read_text()), key=lambda e: e["height"])
    (root / MAPPING_NAME).write_text(json.dumps(entries[:2]))
    return root


@pytest.fixture(scope="session")
def small_table(tmp_path_factory):
    """Five real images of a table and two to answer."""
    real, root = SHARED_DATA / "dsb2018-csv", tmp_path_factory.mktemp("table")
    if not real.exists():
        pytest.skip(f"{real} is not there; set HW3_TEST_DATA")
    (root / "train").symlink_to(real / "train")
    (root / "test").symlink_to(real / "test")
    header, *rows = (real / "train.csv").read_text().splitlines()
    names = list(dict.fromkeys(row.split(",")[0] for row in rows if ",256,256," in row))[:5]
    kept = [row for row in rows if row.split(",")[0] in names]
    (root / "train.csv").write_text("\n".join([header, *kept]))
    listed = (real / "sample_submission.csv").read_text().splitlines()[:3]
    (root / "sample_submission.csv").write_text("\n".join(listed))
    return root


class SessionEnds(Exception):
    """What stops a run in the middle."""


def fit_with_a_break(config, parts, folder, monkeypatch) -> list[dict]:
    """Trains one epoch, is stopped in the second, and goes on."""

    def stop_later(run, epoch, *others):
        if epoch == 2:
            raise SessionEnds
        run_epoch(run, epoch, *others)

    with monkeypatch.context() as patch:
        patch.setattr("src_snippets.train.run_epoch", stop_later)
        with pytest.raises(SessionEnds):
            fit(config, *parts, folder)
    return fit(config, *parts, folder)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_resumes_predicts_and_submits(
    name, small_folders, request, tmp_path, monkeypatch, capsys
):
    root = request.getfixturevalue("small_table") if name == "convnext" else small_folders
    folds = dict(folds=2) if RECIPES[name].get("folds") else {}
    small = {key: value for key, value in SMALL.items() if recipe(name).__dict__[key] != value}
    wanted = recipe(name, **small, **folds)
    dataset = open_dataset(root, wanted)
    config = recipe(name, **small, **folds, num_classes=len(dataset.categories))
    samples = CellSamples(dataset, config.cache_gb)
    members, answers, held_out = [], [], []
    splits = choose_splits(samples, config)
    assert len(splits) == (2 if folds else 1)
    for split in splits.values():
        parts = [pick(samples, split[part]) for part in ("train", "val")]
        run = run_folder(tmp_path, config, split)
        history = fit_with_a_break(config, parts, run, monkeypatch)
        assert [row["epoch"] for row in history] == [1, 2]
        assert "1 of 2 epochs are done, going on from there" in capsys.readouterr().out
        assert fit(config, *parts, run) == history  # nothing is left to do
        members.append(load_trained(run / "best.pt", config))
        answers += validate(members[-1][0], parts[1], config)
        held_out += split["val"]
    assert sorted(held_out) == dataset.names or not folds
    truth = coco_truth(pick(samples, held_out), config.num_classes)
    assert average_precision(truth, by_image_id(answers))["AP50"] is not None
    found = predict_images(members, dataset.test_images, config)
    results, archive = write_results(found, dataset.test_images, tmp_path, dataset.categories)
    assert archive.is_file()
    assert {row["image_id"] for row in json.loads(results.read_text())} <= set(found)
    if dataset.layout == "table":
        plain, _ = write_submissions(found, dataset.test_images, tmp_path)
        assert {line.split(",")[0] for line in plain.read_text().splitlines()[1:]} == {
            image.path.stem for image in dataset.test_images
        }


def test_any_part_goes_with_any_other(demo_samples, tmp_path):
    mixed = dict(
        backbone="timm:convnextv2_atto",
        attention="se",
        norm="group",
        head_norm="none",
        trained_stages=3,
        pyramid=(4, 8, 16, 32),
        anchor_sizes=(8, 16, 32, 64),
        cascade=True,
        shared_masks=True,
        short_sides=(48, 64),
        optimizer="sgd",
        accumulate=2,
        schedule="plateau",
        best_by="loss",
        mask_nms=0.5,
        overlaps=False,
    )
    small = {key: value for key, value in SMALL.items() if key != "scale"}
    config = recipe("baseline", **small | mixed)
    history = fit(config, Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4]), tmp_path)
    assert all(row["val_loss"] > 0 for row in history)


def test_checkpoints_of_other_recipes_answer_together(demo_samples, tmp_path):
    parts = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4])
    small = SMALL | dict(epochs=1)
    other = dict(backbone="mobilenet_v2", cascade=True, scale=0.5)
    one, two = recipe("demo", **small), recipe("demo", **small | other)
    for number, config in enumerate((one, two)):
        fit(config, *parts, tmp_path / str(number))
    state = load_checkpoint(tmp_path / "1" / "best.pt")
    state["config"]["precision"] = "fp16"  # made on a GPU
    save_checkpoint(state, tmp_path / "1" / "best.pt")
    members = [load_trained(tmp_path / str(k) / "best.pt", one, same=False) for k in (0, 1)]
    assert [own.backbone for _, own in members] == ["resnet10", "mobilenet_v2"]
    images = demo_samples.dataset.test_images
    assert list(predict_images(members, images, one)) == [image.image_id for image in images]
    with pytest.raises(ValueError, match="4 classes; the dataset has 2"):
        load_trained(tmp_path / "0" / "best.pt", recipe("demo", num_classes=2), same=False)


def test_two_runs_give_equal_losses_and_equal_files(demo_samples, tmp_path):
    config, images = recipe("demo", **SMALL), demo_samples.dataset.test_images
    rows, files = [], []
    for name in "ab":
        parts = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4, 5])
        history = fit(config, *parts, tmp_path / name)
        rows.append(history)
        found = predict_images([load_trained(tmp_path / name / "best.pt", config)], images, config)
        written = write_results(found, images, tmp_path / name, range(1, 5))
        files.append([path.read_bytes() for path in written])
    assert rows[0] == rows[1]
    assert files[0] == files[1]
    assert len(json.loads(files[0][0])) > 0
