"""Each recipe, with its real modules on small images, from files to a checked submission."""

import json

import pytest
from torch.utils.data import Subset

from src_snippets.data.layouts import MAPPING_NAME, open_dataset
from src_snippets.data.samples import CellSamples, make_splits, subset
from src_snippets.data.structures import coco_ground_truth
from src_snippets.inference.predict import predict_test, predict_validation
from src_snippets.inference.submission import write_csv_submissions, write_results
from src_snippets.setup.config import make_config, RECIPES
from src_snippets.training import trainer
from src_snippets.training.checkpoints import (
    load_checkpoint,
    load_trained,
    run_folder,
    save_checkpoint,
)
from src_snippets.training.metrics import average_precision
from src_snippets.training.trainer import Trainer
from tests.conftest import SHARED_DATA

# What makes a recipe small enough for a test; its modules and its way of training stay.
SMALL = dict(
    weights="none",
    crop=64,
    scale=1.0,
    fpn_channels=32,
    box_features=64,
    roi_batch_size=16,
    proposals=50,
    detections=20,
    tta="none",
    tile=0,
    score_threshold=0.0,
    epochs=2,
)


@pytest.fixture(scope="session")
def small_folders(demo_root, tmp_path_factory):
    """Five real training folders and two test images; the synthetic ones where there are none."""
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
def small_csv(tmp_path_factory):
    """Five real images of a CSV dataset and two test images."""
    real, root = SHARED_DATA / "dsb2018-csv", tmp_path_factory.mktemp("csv")
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
    """Trains one epoch, is stopped in the second, and continues."""

    def stop_later(run, epoch, *others):
        if epoch == 2:
            raise SessionEnds
        run_epoch(run, epoch, *others)

    run_epoch = Trainer.run_epoch
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "SAVE_SECONDS", -1)  # in each epoch
        patch.setattr(Trainer, "run_epoch", stop_later)
        with pytest.raises(SessionEnds):
            Trainer(config, *parts, folder).fit()
    return Trainer(config, *parts, folder).fit()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_resumes_predicts_and_submits(
    name, small_folders, request, tmp_path, monkeypatch, capsys
):
    root = request.getfixturevalue("small_csv") if name == "convnext" else small_folders
    small = SMALL | (dict(folds=2) if RECIPES[name].get("folds") else {})
    if name == "best_large":  # the same family with 3 in place of 88 million parameters
        small = small | dict(backbone="timm:convnextv2_atto")
    dataset = open_dataset(root, make_config(name, **small))
    config = make_config(name, **small, class_names=tuple(dataset.categories.values()))
    samples = CellSamples(dataset, config.cache_gb)
    runs, validation = [], []
    splits = make_splits(samples, config)
    assert len(splits) == config.folds
    for split in splits.values():
        parts = [subset(samples, split[part]) for part in ("train", "val")]
        runs.append(run_folder(tmp_path, config, split, "code"))
        history = fit_with_a_break(config, parts, runs[-1], monkeypatch)
        assert [row["epoch"] for row in history] == [1, 2]
        assert "1 of 2 epochs are done" in capsys.readouterr().out
        assert Trainer(config, *parts, runs[-1]).fit() == history  # nothing is left to do
        validation.append((runs[-1] / "best.pt", parts[1]))
    predictions = predict_validation(validation, config)
    assert config.folds == 1 or len(predictions) == len(samples)
    truth = coco_ground_truth([s for _, part in validation for s in part], dataset.categories)
    scores = average_precision(truth, dict(enumerate(predictions, start=1)))
    assert scores["AP50"] is not None
    checkpoints, images = [run / "best.pt" for run in runs], dataset.test_images
    predictions = predict_test(checkpoints, [], images, tmp_path, config)
    results, archive = write_results(predictions, images, tmp_path, list(dataset.categories))
    assert archive.is_file()
    assert {row["image_id"] for row in json.loads(results.read_text())} <= set(predictions)
    if dataset.layout == "csv":
        write_csv_submissions(predictions, images, tmp_path, dataset.test_ids)
        plain = tmp_path / "submission.csv"
        names = {line.split(",")[0] for line in plain.read_text().splitlines()[1:]}
        assert names == {image.path.stem for image in images}


def test_any_part_goes_with_any_other(demo_samples, tmp_path):
    mixed = dict(
        backbone="timm:convnextv2_atto",
        attention="se",
        norm="frozen",
        head_norm="none",
        anchor_sizes=(4, 8, 16, 32, 64),
        optimizer="sgd",
        accumulate=2,
        schedule="plateau",
        best_by="loss",
        ema=0.9,
        layer_decay=0.7,
        overlaps=False,
        grey=True,
    )
    config = make_config("baseline", **SMALL | mixed)
    parts = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4])
    history = Trainer(config, *parts, tmp_path).fit()
    assert all(row["val_loss"] > 0 for row in history)


def test_checkpoints_of_other_recipes_predict_together(demo_samples, tmp_path):
    parts = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4])
    small = SMALL | dict(epochs=1)
    one = make_config("demo", **small)
    two = make_config(
        "demo", **small | dict(backbone="timm:mobilenetv2_100", scale=0.5, head_norm="none")
    )
    for number, config in enumerate((one, two)):
        Trainer(config, *parts, tmp_path / str(number)).fit()
    paths = [tmp_path / str(number) / "best.pt" for number in (0, 1)]
    state = load_checkpoint(paths[1])
    config = vars(state["config"]) | dict(precision="fp16")  # made on a GPU
    save_checkpoint(state | dict(config=config), paths[1])
    assert load_trained(paths[1], one, same=False).transform.scale == 0.5
    images = demo_samples.dataset.test_images
    predictions = predict_test(paths[:1], paths[1:], images, tmp_path, one)
    assert list(predictions) == [image.image_id for image in images]
    with pytest.raises(ValueError, match=r"num_classes=4 .now 2"):
        load_trained(paths[0], make_config("demo", class_names=("a", "b")), same=False)


def test_two_runs_give_equal_losses_and_equal_files(demo_samples, tmp_path):
    config, images = make_config("demo", **SMALL), demo_samples.dataset.test_images
    histories, files = [], []
    for name in "ab":
        parts = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4, 5])
        histories.append(Trainer(config, *parts, tmp_path / name).fit())
        predictions = predict_test(
            [tmp_path / name / "best.pt"], [], images, tmp_path / name, config
        )
        written = write_results(predictions, images, tmp_path / name, range(1, 5))
        files.append([path.read_bytes() for path in written])
    assert histories[0] == histories[1]
    assert files[0] == files[1]
    assert len(json.loads(files[0][0])) > 0
