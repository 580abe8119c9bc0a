"""Evaluation: COCO average precision at 100 detections and uncapped, by class, and PQ."""

# %% [markdown]
# ## How good is it?
# AP50 is the area under precision over recall, a cell counting as found when the mask's IoU is at
# least 0.5; AP averages over IoU 0.50 to 0.95. Scorers often keep 100 detections an image and
# class, so both numbers are given. Panoptic quality (PQ) scores the drawn picture instead.

# %%
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
import importlib
from importlib.util import find_spec
import io
from typing import NamedTuple

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


# %% [markdown]
# The same AP50 from a table of hits, cheap enough to repeat: with other images (how far would the
# number move?) and with other thresholds.


# %%
class Hits(NamedTuple):
    """What became of the detections of one image, and the cells it has.

    Attributes:
        labels: (N,) int64, 1..C; scores: (N,) float32.
        found: (N,) int64, the true cell that each finds, counted from 0; -1 for none.
        cells: (C + 1,) int64, true cells by class; 0 is not used.
    """

    labels: np.ndarray
    scores: np.ndarray
    found: np.ndarray
    cells: np.ndarray


def find_hits(found: Instances, truth: Instances, num_classes: int, least: float = 0.5) -> Hits:
    """Which true cell each detection finds, as COCOeval decides.

    The better ones choose first: the free cell of their class of the highest mask IoU, if that is
    at least `least`. Detections in a crowd (a label below 0 in the truth) are left out.
    """
    found = found.select(np.argsort(-found.scores, kind="stable"))
    hits, ignored = np.full(len(found), -1), np.zeros(len(found), bool)
    for label in np.unique(found.labels):
        own = np.flatnonzero(found.labels == label)
        cells = np.flatnonzero(np.abs(truth.labels) == label)
        crowds = truth.labels[cells] < 0
        rles = [truth.rles[i] for i in cells]
        masks = [found.rles[i] for i in own]
        table = np.reshape(pycocotools.mask.iou(masks, rles, crowds.tolist()), (len(own), -1))
        free = ~crowds
        for row, overlaps in zip(own, table, strict=True):
            left = np.where(free, overlaps, -1)
            if left.max(initial=-1) >= least:
                hits[row] = cells[left.argmax()]
                free[left.argmax()] = False
            else:
                ignored[row] = overlaps[crowds].max(initial=0) >= least
    kept = ~ignored
    cells = np.bincount(truth.labels[truth.labels > 0], minlength=num_classes + 1)
    return Hits(found.labels[kept], found.scores[kept], hits[kept], cells)


# %%
def hits_of(answers: Sequence[Instances], truths, num_classes: int) -> list[Hits]:
    """`find_hits` of several images."""
    return [find_hits(*pair, num_classes) for pair in zip(answers, truths, strict=True)]


def class_ap(hits: Sequence[Hits], label: int, weights: np.ndarray | None = None) -> float | None:
    """AP of one class at the IoU of the hits, 0..1, as COCOeval computes it; None without cells.

    Args:
        hits: one an image; weights: (B,) how often each image counts, by default once.
    """
    weights = np.ones(len(hits)) if weights is None else weights
    cells = sum(w * h.cells[label] for h, w in zip(hits, weights, strict=True))
    if not cells:
        return None
    own = [h.labels == label for h in hits]
    scores = np.concatenate([h.scores[o] for h, o in zip(hits, own, strict=True)])
    order = np.argsort(-scores, kind="stable")
    right = np.concatenate([h.found[o] >= 0 for h, o in zip(hits, own, strict=True)])[order]
    count = np.repeat(weights, [o.sum() for o in own])[order]
    good, every = np.cumsum(count * right), np.cumsum(count)
    precision = good / np.maximum(every, 1e-12)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(good / cells, np.linspace(0, 1, 101))
    return float(np.r_[precision, 0.0][place].mean())


def ap_of_hits(hits: Sequence[Hits], weights: np.ndarray | None = None) -> float:
    """Mean of `class_ap` over the classes that have cells; 0 where none has."""
    classes = range(1, len(hits[0].cells) if hits else 1)
    values = [class_ap(hits, label, weights) for label in classes]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else 0.0


# %%
def ap_interval(hits: Sequence[Hits], rounds: int = 500, seed: int = 0):
    """Between which values AP lies in 95 of 100 draws of as many images, with repetition.

    It tells how far the number may move with other images of the same kind (percentile bootstrap,
    Efron 1979), not with another training.

    Returns:
        (low, high), 0..1; None with fewer than two images that have cells. Draws without any cell
        do not count.
    """
    filled = np.array([hit.cells.any() for hit in hits], bool)
    if filled.sum() < 2:
        return None
    draws = np.random.default_rng(seed).multinomial(len(hits), [1 / len(hits)] * len(hits), rounds)
    values = [ap_of_hits(hits, weights) for weights in draws if weights[filled].any()]
    return tuple(np.quantile(values, [0.025, 0.975]).tolist())


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
def panoptic_quality(pairs, num_classes: int) -> dict[int, float | None]:
    """Panoptic quality (arXiv:1801.00868) of label images, by class.

    Background is scored as a class of its own while counting, so that a cell predicted on it is a
    false positive, and then left out.

    Args:
        pairs: (truth, answer) `Instances`, image by image.
        num_classes: C.

    Returns:
        PQ by class, 0..1; None for a class that is in neither truth nor answers.
    """
    # Each of several processes has all pairs: there is nothing to put together.
    options = dict(return_per_class=True, sync_on_compute=False)
    metric = PanopticQuality(set(range(1, num_classes + 1)), {0}, **options)
    seen = set()
    for truth, found in pairs:
        seen |= {*truth.labels.tolist(), *found.labels.tolist()}
        metric.update(*(torch.from_numpy(label_image(side))[None] for side in (found, truth)))
    values = metric.compute().flatten().tolist() if seen else [0.0] * num_classes
    return {k: values[k - 1] if k in seen else None for k in range(1, num_classes + 1)}


# %%
def score_rows(
    scores: dict, quality: dict[int, float | None] | None = None, names: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """The scores as rows of text, the first their header; `-` where there is no cell.

    Args:
        scores: as from `average_precision`; quality: PQ by class; names: of classes 1..C.
    """
    quality, called = quality or {}, dict(enumerate(names, start=1))

    def texts(row, keys=("AP", "AP50", "AP75")):
        return tuple("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)

    known = [value for value in quality.values() if value is not None]
    pq = {"PQ": sum(known) / len(known) if known else None}
    cells = sum(row["cells"] for row in scores["classes"].values())
    rows = [("", "AP", "AP50", "AP75", "PQ", "cells")]
    rows.append(("all", *texts(scores), *texts(pq, ["PQ"]), str(cells)))
    rows.append(("best 100", *texts(scores, ("AP_100", "AP50_100", "AP75_100")), "", ""))
    for key, row in scores["classes"].items():
        pq = {"PQ": quality.get(key)}
        name = called.get(key, f"class{key}")
        rows.append((name, *texts(row), *texts(pq, ["PQ"]), str(row["cells"])))
    return rows


def format_scores(rows: Sequence[Sequence[str]]) -> str:
    """`score_rows` as a table to print."""
    width = max(10, *(len(row[0]) for row in rows))
    return "\n".join(
        f"{row[0]:<{width}}" + "".join(f"{text:>7}" for text in row[1:]) for row in rows
    )
