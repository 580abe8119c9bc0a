"""Each recipe, with its real modules on small images, from folders to a checked submission."""

import json

import pytest
from torch.utils.data import Subset

from src_snippets.config import recipe, RECIPES
from src_snippets.datasets import read_test_mapping
from src_snippets.predict import predict_images
from src_snippets.train import fit, load_trained
from src_snippets.writers import write_results

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
    batch_size=2,
    epochs=2,
)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_resumes_predicts_and_submits(name, demo_root, demo_samples, tmp_path):
    config = recipe(name, **SMALL)
    train, val = Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4, 5])
    history = fit(config, train, val, tmp_path)
    assert len(history) == 2
    assert fit(config, train, val, tmp_path) == history
    images = read_test_mapping(demo_root)
    answers = predict_images([load_trained(tmp_path / "best.pt", config)], images, config)
    results, archive = write_results(answers, images, tmp_path, range(1, 5))
    assert archive.is_file()
    assert {row["image_id"] for row in json.loads(results.read_text())} <= {1, 2, 3}


def test_any_part_goes_with_any_other(demo_samples, tmp_path):
    mixed = dict(
        backbone="timm:convnextv2_atto",
        attention="se",
        norm="group",
        trained_stages=3,
        pyramid=(4, 8, 16, 32),
        anchor_sizes=(8, 16, 32, 64),
        optimizer="sgd",
        accumulate=2,
        schedule="plateau",
        best_by="loss",
        mask_nms=0.5,
        overlaps=False,
    )
    config = recipe("baseline", **SMALL | mixed)
    history = fit(config, Subset(demo_samples, [0, 1, 2, 3]), Subset(demo_samples, [4]), tmp_path)
    assert all(row["val_loss"] > 0 for row in history)
