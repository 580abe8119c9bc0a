"""COCO average precision, with 100 detections per image and class and with all of them."""

# %% [markdown]
# ### Score with COCO average precision
# AP50 is the area under the precision-recall curve where a detection is correct from a mask IoU of
# 0.5 on, the mean over classes; AP is the mean over IoU 0.50 to 0.95. faster-coco-eval computes
# both, or pycocotools. COCO keeps the best 100 detections per image and class, fewer than many
# images have instances, so the scores are given with that cap (`_100`) and without.

# %%
# @title Average precision
from contextlib import redirect_stdout, suppress
import importlib

import numpy as np

from src_snippets.data.structures import coco_annotations, Instances


def coco_classes() -> tuple[type, type]:
    """COCO and COCOeval of faster-coco-eval (the same values, sooner), else of pycocotools."""
    load = importlib.import_module
    with suppress(ImportError, ValueError):  # missing, or made for another numpy
        faster = load("faster_coco_eval")
        return faster.COCO, faster.COCOeval_faster
    return load("pycocotools.coco").COCO, load("pycocotools.cocoeval").COCOeval


def precision_table(ground_truth: dict, predictions, caps: list[int]) -> np.ndarray:
    """(10, 101, C, len(caps)) precision by IoU 0.50 .. 0.95, recall 0 .. 1, class, cap.

    -1 for a class without ground truth. caps: ascending maximum detections per image and class.
    """
    (coco, coco_eval), sides = coco_classes(), []
    results = coco_annotations(predictions, [c["id"] for c in ground_truth["categories"]])
    with redirect_stdout(None):  # both libraries print their progress
        for annotations in (ground_truth["annotations"], results):
            rows = [{**row, "id": k} for k, row in enumerate(annotations, 1)]  # 0 is "unmatched"
            sides.append(coco())
            sides[-1].dataset = {**ground_truth, "annotations": rows}
            sides[-1].createIndex()
        evaluator = coco_eval(*sides, "segm")
        evaluator.extra_calc = False  # of faster-coco-eval: a list of matches, not used here
        evaluator.params.maxDets = caps
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[:, :, :, 0]


def average_precision(ground_truth: dict, predictions: dict[int, Instances]) -> dict:
    """AP, AP50 and AP75 of predictions by the image ids of a COCO `ground_truth`.

    Returns `AP`, `AP50`, `AP75`, `instances`; `AP_100`, .. of the best 100 per image and class;
    `classes`: these four by category id. 0..1; None where there is no ground truth.
    """
    largest = max([101, *(len(instances) for instances in predictions.values())])
    table = np.ma.masked_less(precision_table(ground_truth, predictions, [100, largest]), 0)

    def means(part: np.ma.MaskedArray, suffix="") -> dict:
        rows = {"AP": part, "AP50": part[0], "AP75": part[5]}
        return {name + suffix: values.mean().tolist() for name, values in rows.items()}

    owners = [a["category_id"] for a in ground_truth["annotations"] if not a["iscrowd"]]
    scores = dict(instances=len(owners), classes={})
    scores |= means(table[..., 1]) | means(table[..., 0], "_100")
    for column, key in enumerate(sorted(c["id"] for c in ground_truth["categories"])):
        scores["classes"][key] = means(table[:, :, column, 1]) | dict(instances=owners.count(key))
    return scores
