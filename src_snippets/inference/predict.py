"""Prediction: validation and test images, by one checkpoint or several."""

# %% [markdown]
# ### Predict
# A validation image is predicted by the one model that was not trained on it, a test image by all
# models together, each in every view that `tta` asks for. Out comes one `Instances` for each image.
# Each test prediction is written to a file when it is made: a session that ends in
# between goes on from there.

# %%
# @title Views of an image; predictions of validation and test images
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import product
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn, Tensor
from tqdm.auto import tqdm

from src_snippets.data.images import read_image
from src_snippets.data.structures import coco_ground_truth, Instances
from src_snippets.model.detect import detect, LOW_SCORE, View, visible_instances
from src_snippets.setup.config import Config
from src_snippets.setup.devices import broadcast, gather, is_main, rank_indices
from src_snippets.setup.files import FREE_SETTINGS, write_json
from src_snippets.training.checkpoints import code_digest, load_trained
from src_snippets.training.metrics import average_precision

# Of test-time augmentation; flips: as it is, left to right, upside down
VIEWS = dict(none=[View()], flips=[View(), View(0, True), View(2, True)])
VIEWS["d4"] = [View(*turn) for turn in product(range(4), (False, True))]


def predict_image(models: list[nn.Module], image: Tensor, config: Config) -> Instances:
    """Predict one image (3, H, W) uint8 by all `models` in all views of `tta`."""
    instances = detect(models, image, config, VIEWS[config.tta])
    return instances if config.overlaps else visible_instances(instances)


def predict_validation(parts: list[tuple], config: Config) -> list[Instances]:
    """Predict the samples of all parts: a checkpoint, and samples that it was not trained on."""
    threshold = min(config.score_threshold, config.export_score_threshold, LOW_SCORE)
    config, predictions = replace(config, score_threshold=threshold), []
    for path, samples in parts:
        models = [load_trained(path, config)]
        indices = tqdm(rank_indices(len(samples)), desc="validation", disable=not is_main())
        predictions += gather([predict_image(models, samples[i].image, config) for i in indices])
    return predictions


def submission_preview(samples, predictions, config: Config) -> tuple[pd.DataFrame, str]:
    """AP (0..1) of validation predictions as submitted, and the price of a threshold above 0.05."""
    truth = coco_ground_truth(samples, dict(enumerate(config.class_names, start=1)))
    rows, thresholds = {}, {"as submitted": config.score_threshold}
    if config.score_threshold > LOW_SCORE:
        thresholds["from 0.05 on"] = LOW_SCORE
    for name, threshold in thresholds.items():
        results = {k: p.above(threshold) for k, p in enumerate(predictions, start=1)}
        rows[name] = average_precision(truth, results)
    table = pd.DataFrame(rows).T[["AP", "AP50", "AP75", "AP50_100"]].astype(float)
    price = table.AP50.iloc[-1] - table.AP50.iloc[0]
    if len(table) == 1 or np.isnan(price):
        return table, "" if predictions else "No validation images: the score is unknown."
    advice = "; add score_threshold=0.05 to CHANGES: no new training" if price >= 0.0005 else ""
    return table, f"score_threshold={config.score_threshold} costs {price:.3f} AP50{advice}."


def open_predictions(checkpoints, images, folder: Path, config: Config) -> tuple[Path, list]:
    """Make a folder for predictions of these models, images, settings and code; the images left."""
    stamps = [(s.st_size, s.st_mtime_ns) for s in (image.path.stat() for image in images)]
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    digest = sha256(repr((settings, images, stamps, code_digest(predict_test))).encode())
    for path in checkpoints:
        digest.update(Path(path).read_bytes())
    folder = folder / f"predictions-{digest.hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    return folder, [image for image in images if not (folder / f"{image.image_id}.json").exists()]


def predict_test(checkpoints, extra_checkpoints, images, folder: Path, config: Config) -> dict:
    """Predict test images by all checkpoints together; return `Instances` by image id.

    checkpoints: trained with `config`; extra_checkpoints: of any recipe; images: `ImageRecord`s;
    folder: takes a file per image, from which an ended session goes on. Scores are those from
    `score_threshold` or `export_score_threshold` on, the lower one. Raises BadInput.
    """
    low = min(config.score_threshold, config.export_score_threshold)
    config = replace(config, score_threshold=low)
    paths = [*checkpoints, *extra_checkpoints]
    models = [load_trained(path, config, same=path in checkpoints) for path in paths]
    folder, remaining = broadcast(open_predictions, paths, images, folder, config)
    if count := len(images) - len(remaining):
        print(f"{folder}: {count} of {len(images)} images are predicted already.")
    remaining.sort(key=lambda image: image.height * image.width, reverse=True)  # balances GPUs
    for i in tqdm(rank_indices(len(remaining)), desc="test images", disable=not is_main()):
        pixels = torch.from_numpy(read_image(remaining[i].path, config.channels))
        fields = vars(predict_image(models, pixels, config))
        write_json(fields, folder / f"{remaining[i].image_id}.json")
    gather([])  # until all processes have written theirs
    predictions = {}
    for key in (image.image_id for image in images):
        saved = json.loads((folder / f"{key}.json").read_text())
        boxes = np.array(saved["boxes"], np.float32).reshape(-1, 4)
        scores, labels = np.array(saved["scores"], np.float32), np.array(saved["labels"], np.int64)
        predictions[key] = Instances(boxes, scores, labels, saved["rles"], tuple(saved["size"]))
    return predictions
