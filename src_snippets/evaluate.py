"""Evaluation: COCO average precision at 100 detections and uncapped, by class, and PQ."""

# %% [markdown]
# ## How good is it?
# AP50 is the area under precision over recall, a cell counting as found when the mask's IoU is at
# least 0.5; AP averages over IoU 0.50 to 0.95. Scorers often keep 100 detections an image and
# class, so both numbers are given. Panoptic quality (PQ) scores the drawn picture instead.

# %%
from collections.abc import Mapping
from contextlib import redirect_stdout
import importlib
from importlib.util import find_spec
import io

import numpy as np
import pycocotools.mask
import torch
from torchmetrics.detection import PanopticQuality

from src_snippets.forms import CellSample, Instances, with_crowds
from src_snippets.rle import mask_areas, paint


# %%
def coco_api():
    """The classes COCO and COCOeval: faster-coco-eval's, or pycocotools' where that is missing."""
    if find_spec("faster_coco_eval"):
        api = importlib.import_module("faster_coco_eval")
        return api.COCO, api.COCOeval_faster
    coco = importlib.import_module("pycocotools.coco")
    return coco.COCO, importlib.import_module("pycocotools.cocoeval").COCOeval


def coco_results(answers: Mapping[int, Instances]) -> list[dict]:
    """Answers by image id as COCO results: boxes XYWH in pixels, RLEs as text, scores."""
    rows = []
    for image_id, found in sorted(answers.items()):
        for box, score, label, rle in zip(
            found.boxes, found.scores, found.labels, found.rles, strict=True
        ):
            x1, y1, x2, y2 = (float(v) for v in box)
            rows.append(
                dict(
                    image_id=image_id,
                    category_id=int(label),
                    segmentation=rle,
                    score=float(score),
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                )
            )
    return rows


# %%
def precision_table(truth: dict, answers: Mapping[int, Instances], caps: list[int]) -> np.ndarray:
    """Precision by IoU threshold, recall and class, as COCOeval defines it.

    Args:
        truth: a COCO dictionary, as from `coco_truth`.
        answers: `Instances` by image id; an image that is absent has no detections.
        caps: ascending; the detections an image and class that count.

    Returns:
        (10, 101, C, len(caps)) float64: IoU 0.50 .. 0.95, recall 0 .. 1; -1 where a class has no
        truth.
    """
    load, evaluate = coco_api()
    results = coco_results(answers)
    areas = mask_areas([row["segmentation"] for row in results])
    for row, area in zip(results, areas.tolist(), strict=True):
        row.update(area=area, iscrowd=0)
    sides = []
    with redirect_stdout(io.StringIO()):  # both libraries narrate
        for annotations in (truth["annotations"], results):
            side = load()
            # COCOeval takes an annotation with id 0 for one that nothing matched.
            rows = [{**row, "id": number} for number, row in enumerate(annotations, start=1)]
            side.dataset = {**truth, "annotations": rows}
            side.createIndex()
            sides.append(side)
        evaluator = evaluate(*sides, "segm")
        evaluator.extra_calc = False  # matches by name are not needed
        evaluator.params.maxDets = caps
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    table = np.asarray(evaluator.eval["precision"])
    return table.reshape(10, 101, len(truth["categories"]), 1, len(caps))[:, :, :, 0]


# %%
def mean_precision(table: np.ndarray) -> float | None:
    """Mean of the entries that are defined (not -1); None where none is."""
    defined = table[table > -1]
    return float(defined.mean()) if defined.size else None


def average_precision(truth: dict, answers: Mapping[int, Instances]) -> dict:
    """AP, AP50 and AP75, over classes and by class.

    Args:
        truth: a COCO dictionary; answers: `Instances` by its image ids.

    Returns:
        `AP`, `AP50`, `AP75` with all detections; `AP_100`, `AP50_100`, `AP75_100` with the best 100
        an image and class; `classes`: `{class id: {AP, AP50, AP75, cells}}`, uncapped. All 0..1,
        None where there is no truth to score.
    """
    most = max([101, *(len(found) for found in answers.values())])
    table = precision_table(truth, answers, [100, most])
    cuts = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    scores = {name: mean_precision(table[cut, :, :, 1]) for name, cut in cuts.items()}
    scores |= {f"{name}_100": mean_precision(table[cut, :, :, 0]) for name, cut in cuts.items()}
    scores["classes"] = {}
    for column, category in enumerate(sorted(c["id"] for c in truth["categories"])):
        row = {name: mean_precision(table[cut, :, column, 1]) for name, cut in cuts.items()}
        own = (a for a in truth["annotations"] if a["category_id"] == category)
        row["cells"] = sum(not a["iscrowd"] for a in own)
        scores["classes"][category] = row
    return scores


# %%
def label_image(found: Instances) -> np.ndarray:
    """(H, W, 2) int32, class and instance number of each pixel, 0 = background.

    Where instances overlap, the one with the higher score shows.
    """
    order = np.argsort(-found.scores, kind="stable")[::-1]  # the best is painted last
    rles = [found.rles[i] for i in order]
    classes = paint(rles, found.labels[order], *found.size)
    return np.stack([classes, paint(rles, order + 1, *found.size)], axis=-1)


def outside_crowds(found: Instances, sample: CellSample) -> Instances:
    """The detections that do not lie in a crowd of the truth by over half of their pixels."""
    truth = with_crowds(sample)
    crowds = truth.select(truth.labels < 0).rles
    if not crowds or not len(found):
        return found
    inside = pycocotools.mask.iou(
        found.rles, crowds, [1] * len(crowds)
    )  # over the detection's area
    return found.select(inside.max(1) <= 0.5)


# %%
def panoptic_quality(pairs, num_classes: int, least_score: float) -> dict[int, float | None]:
    """Panoptic quality (arXiv:1801.00868) of label images, by class.

    Background is scored as a class of its own while counting, so that a cell predicted on it is a
    false positive, and then left out.

    Args:
        pairs: (truth, answer) `Instances`, image by image.
        num_classes: C; least_score: weaker detections are not drawn.

    Returns:
        PQ by class, 0..1; None for a class that is in neither truth nor answers.
    """
    metric = PanopticQuality(set(range(1, num_classes + 1)), {0}, return_per_class=True)
    seen = set()
    for truth, found in pairs:
        found = found.select(found.scores >= least_score)
        seen |= {*truth.labels.tolist(), *found.labels.tolist()}
        metric.update(*(torch.from_numpy(label_image(side))[None] for side in (found, truth)))
    values = metric.compute().flatten().tolist() if seen else [0.0] * num_classes
    return {k: values[k - 1] if k in seen else None for k in range(1, num_classes + 1)}


# %%
def format_scores(scores: dict, quality: dict[int, float | None] | None = None) -> str:
    """The scores as a table to print; `-` where there was no cell to score."""
    quality = quality or {}

    def text(value):
        return "     -" if value is None else f"{value:6.3f}"

    lines = ["               AP   AP50   AP75     PQ   cells"]
    known = [value for value in quality.values() if value is not None]
    mean = sum(known) / len(known) if known else None
    cells = sum(row["cells"] for row in scores["classes"].values())
    rows = [("all", scores, mean, cells)]
    for key, row in scores["classes"].items():
        rows.append((f"class{key}", row, quality.get(key), row["cells"]))
    for name, row, pq, cells in rows:
        numbers = " ".join(text(v) for v in (row["AP"], row["AP50"], row["AP75"], pq))
        lines.append(f"{name:<10} {numbers} {cells:7d}")
    capped = " ".join(text(scores[key]) for key in ("AP_100", "AP50_100", "AP75_100"))
    lines.insert(2, f"{'best 100':<10} {capped}")
    return "\n".join(lines)
