"""Prediction: validation and test images, by one checkpoint or several."""

# %% [markdown]
# ### Predict
# A validation image is predicted by the one model that was not trained on it, a test image by all
# models together, each in every view that `tta` and `tta_scales` ask for. Out comes one `Instances`
# for each image. Test predictions are written to a file as they are made: a session that ends in
# between goes on from there.

# %%
# @title Views of an image; predictions of validation and test images
from dataclasses import replace
from hashlib import sha256
from itertools import product
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from src_snippets.data.images import read_image
from src_snippets.data.structures import coco_ground_truth, Instances
from src_snippets.model.detect import detect, View, without_overlaps
from src_snippets.setup.config import Config
from src_snippets.setup.devices import broadcast, gather, is_main, rank_indices, world_size
from src_snippets.training.checkpoints import load_trained
from src_snippets.training.metrics import average_precision

VALIDATION_THRESHOLD = 0.05  # validation keeps scores from here on, or from a lower setting on
SYMMETRIES = {  # quarter turns, mirrored
    "none": [(0, False)],
    "flips": [(0, False), (0, True), (2, True)],  # as it is, left to right, upside down
    "d4": list(product(range(4), (False, True))),
}


def views(config: Config) -> list[View]:
    """List the views of an image in test-time augmentation."""
    return [View(scale, *turn) for scale in config.tta_scales for turn in SYMMETRIES[config.tta]]


def predict_image(members: list[tuple], image: Tensor, config: Config) -> Instances:
    """Predict one image (3, H, W) uint8 by all `members`, pairs of a model and its settings."""
    found = detect([model for model, _ in members], image, config, views(config))
    return found if config.overlaps else without_overlaps(found)


def predict_validation(parts: list[tuple], config: Config) -> list[Instances]:
    """Predict the samples of all parts, in their order.

    parts: a checkpoint and a sequence of samples that it was not trained on, each.
    """
    threshold = min(config.score_threshold, VALIDATION_THRESHOLD)
    config, predictions = replace(config, score_threshold=threshold), []
    for path, samples in parts:
        members = [load_trained(path, config)]
        indices = tqdm(rank_indices(len(samples)), desc="validation", disable=not is_main())
        predictions += gather([predict_image(members, samples[i].image, config) for i in indices])
    return predictions


def submission_preview(samples, predictions, config: Config) -> tuple[pd.DataFrame, str]:
    """AP, AP50, AP75 (0..1) of validation predictions, as submitted and from score 0.05 on.

    Also returns a line with what `score_threshold` costs, and the line that changes it.
    """
    truth = coco_ground_truth(samples, dict(enumerate(config.class_names, start=1)))
    rows, thresholds = {}, {"as submitted": config.score_threshold}
    for name, threshold in (thresholds | {"from 0.05 on": VALIDATION_THRESHOLD}).items():
        kept = {k: p.above(threshold) for k, p in enumerate(predictions, start=1)}
        scores = average_precision(truth, kept) if predictions else {}
        rows[name] = {key: scores.get(key) for key in ("AP", "AP50", "AP75", "AP50_100")}
    table = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    if not predictions:
        return table, "No validation images: nothing can be said about the score."
    price = table.AP50.iloc[1] - table.AP50.iloc[0]
    if not price >= 0.0005:
        return table, f"score_threshold={config.score_threshold} costs no AP50."
    return table, (
        f"score_threshold={config.score_threshold} costs {price:.3f} AP50: set CHANGES = "
        "dict(score_threshold=0.05) in the settings cell and run on from there; nothing is trained."
    )


def resume_predictions(checkpoints, images, folder: Path, config: Config) -> tuple[Path, dict]:
    """Return the file for predictions of these models, images and settings, and those in it.

    A last line that was cut short is taken off the file.
    """
    digest = sha256(repr(config).encode())
    for path in checkpoints:
        digest.update(Path(path).read_bytes())
    for image in images:
        stat = image.path.stat()
        digest.update(f"{image} {stat.st_size} {stat.st_mtime_ns}".encode())
    path, predictions = folder / f"predictions-{digest.hexdigest()[:8]}.jsonl", {}
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for line in whole.splitlines():
        image_id, (boxes, scores, labels, rles, size) = json.loads(line)
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        arrays = boxes, np.array(scores, np.float32), np.array(labels, np.int64)
        predictions[image_id] = Instances(*arrays, rles, tuple(size))
    return path, predictions


def predict_test(checkpoints, extra_checkpoints, images, folder: Path, config: Config) -> dict:
    """Predict test images by all checkpoints together; return `Instances` by image id.

    checkpoints: trained with `config`; extra_checkpoints: of any recipe; images: `ImageRecord`s;
    folder: takes the file with which an ended session goes on, image by image. Raises BadInput,
    which names the file, for an image that cannot be read.
    """
    members = [load_trained(path, config) for path in checkpoints]
    members += [load_trained(path, config, same=False) for path in extra_checkpoints]
    paths = [*checkpoints, *extra_checkpoints]
    path, predictions = broadcast(resume_predictions, paths, images, folder, config)
    if predictions:
        print(f"{path}: {len(predictions)} of {len(images)} images are predicted already.")
    remaining = [image for image in images if image.image_id not in predictions]
    # Batches of similar sizes for several processes, so that none waits long for the others
    remaining.sort(key=lambda image: image.height * image.width, reverse=True)
    count = 8 * world_size() if world_size() > 1 else 1
    for begin in tqdm(range(0, len(remaining), count), desc="test images", disable=not is_main()):
        batch = remaining[begin : begin + count]
        pixels = (torch.from_numpy(read_image(batch[i].path)) for i in rank_indices(len(batch)))
        results = gather([predict_image(members, image, config) for image in pixels])
        lines = []
        for image, result in zip(batch, results, strict=True):
            predictions[image.image_id] = result
            row = [image.image_id, list(vars(result).values())]
            lines.append(json.dumps(row, default=np.ndarray.tolist) + "\n")
        if is_main():
            with path.open("a") as file:
                file.writelines(lines)
    return {image.image_id: predictions[image.image_id] for image in images}
