"""Evaluation: one table of matches between detections and ground truth, and scores from it."""

# %% [markdown]
# ### Match detections with the ground truth and score them
# AP50 is one number; the table of matches says where it comes from. Predictions and ground truth of
# the validation images go in, every score and figure below comes out of the same rows. The trap: AP
# takes all detections; PQ, AJI and the figures take those that are exported, without overlaps.

# %%
# @title match_table: one row per detection and per missed instance
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pycocotools.mask

from src_snippets.data.rle import draw_masks, mask_areas
from src_snippets.data.structures import coco_ground_truth, ground_truth, Instances
from src_snippets.model.detect import without_overlaps
from src_snippets.setup.config import Config
from src_snippets.training.metrics import average_precision

MATCH_DTYPES = dict(image=int, detection=int, label=int, target=int, target_label=int)
MATCH_DTYPES |= dict(target_area=int, score="float32", iou=float, tp50=bool, tp75=bool)


def mask_pairs(detections: Instances, truth: Instances, rows: int = 256) -> pd.DataFrame:
    """Pairs that share pixels: detection, target, iou, shared pixels; `rows` masks at once."""
    parts = []
    for begin in range(0, len(detections) or 1, rows):
        block = detections.rles[begin : begin + rows]
        ious = pycocotools.mask.iou(block, truth.rles, [0] * len(truth))
        index = np.argwhere(np.reshape(ious, (len(block), len(truth))))
        part = dict(detection=index[:, 0] + begin, target=index[:, 1])
        parts.append(pd.DataFrame(part).assign(iou=np.ravel(ious)[np.ravel(ious) > 0]))
    pairs = pd.concat(parts, ignore_index=True)
    areas = mask_areas(detections.rles)[pairs.detection] + mask_areas(truth.rles)[pairs.target]
    return pairs.assign(shared=(pairs.iou / (1 + pairs.iou) * areas).round())


def choose_pairs(pairs: pd.DataFrame, scores: np.ndarray, min_iou: float) -> dict[int, int]:
    """The target of each detection as in COCOeval: of those left the one of highest IoU.

    The best score chooses first; of equal scores the first, of equal IoUs the last one is taken.
    """
    pairs, match, used = pairs[pairs.iou >= min_iou], {}, set()
    order = np.lexsort((-pairs.target, -pairs.iou, pairs.detection, -scores[pairs.detection]))
    for detection, target in pairs[["detection", "target"]].to_numpy()[order].tolist():
        if detection not in match and target not in used:
            match[detection] = target
            used.add(target)
    return match


def match_table(predictions, ground_truths: Sequence[Instances], num_classes: int) -> pd.DataFrame:
    """Match detections with the ground truth of B images, where a label below 0 is a crowd.

    Returns:
        One row per detection and per missed instance, best score first: image 0 .. B - 1, detection
        and target (indices, -1: none), score, label and target_label (0: none), target_area (px),
        iou of this match (0.5 or more, of any classes); tp50, tp75: true positive of AP50, AP75.
        A detection that is none and lies half or more in a crowd of its class has no row.
    """
    parts = []
    for image, (found, truth) in enumerate(zip(predictions, ground_truths, strict=True)):
        if max(label := np.r_[found.labels, truth.labels, 0]) > num_classes:
            raise ValueError(f"Image {image}: label {max(label)}, expected up to {num_classes}.")
        pairs, areas = mask_pairs(found, truth), mask_areas(found.rles)
        labels, target_labels = found.labels[pairs.detection], truth.labels[pairs.target]
        right = [choose_pairs(pairs[labels == target_labels], found.scores, t) for t in (0.5, 0.75)]
        crowds = pairs[(labels == -target_labels) & (2 * pairs.shared >= areas[pairs.detection])]
        rows = pd.DataFrame(dict(score=found.scores, label=found.labels)).rename_axis("detection")
        rows = rows.drop(list({*crowds.detection} - {*right[0]})).reset_index()
        known = pairs[(target_labels > 0) & pairs.detection.isin(rows.detection)]
        rows["target"] = rows.detection.map(choose_pairs(known, found.scores, 0.5))
        instances = pd.DataFrame(
            dict(target_label=truth.labels, target_area=mask_areas(truth.rles))
        )
        instances = instances.rename_axis("target").query("target_label > 0").reset_index()
        rows = rows.merge(pairs, how="left").merge(instances, on="target", how="outer")
        tp50, tp75 = (rows.detection.isin(list(match)) for match in right)
        parts.append(rows.assign(image=image, tp50=tp50, tp75=tp75))
    table = pd.concat(parts) if parts else pd.DataFrame(columns=list(MATCH_DTYPES))
    table = table.fillna({"detection": -1, "target": -1}).fillna(0)[list(MATCH_DTYPES)]
    order = dict(by=["score", "image", "detection"], ascending=[False, True, True])
    return table.astype(MATCH_DTYPES).sort_values(**order, ignore_index=True)


def matches_above(table: pd.DataFrame, min_score: float) -> pd.DataFrame:
    """`match_table` of the detections with at least that score; better ones chose first anyway."""
    weak = (table.detection >= 0) & (table.score < min_score)
    missed = table[weak & (table.target >= 0)].assign(
        detection=-1, score=0, label=0, iou=0, tp50=0, tp75=0
    )
    return pd.concat([table[~weak], missed.astype(MATCH_DTYPES)], ignore_index=True)


# %%
# @title score_table: AP, PQ and AJI; the interval of AP50
def precision_curve(table: pd.DataFrame, label: int, column: str = "tp50") -> np.ndarray:
    """Precision (101,) of a class at recall 0, 0.01 .. 1, as in COCOeval; NaN: no instances."""
    hits, total = table[column][table.label == label].cumsum(), (table.target_label == label).sum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    index = np.searchsorted(hits / max(total, 1), np.linspace(0, 1, 101))
    return np.r_[precision, 0.0][index] if total else np.full(101, np.nan)


def ap50(table: pd.DataFrame) -> float:
    """Mean AP at IoU 0.5 of the classes with instances, as in COCOeval; NaN without any."""
    labels = np.unique(table.target_label[table.target_label > 0])
    return float(np.mean([precision_curve(table, k) for k in labels])) if len(labels) else np.nan


def ap_interval(table: pd.DataFrame, draws: int = 500) -> tuple[float, float] | None:
    """95% confidence interval of AP50 with other images; None for fewer than two with instances.

    Source: percentile bootstrap over images, Efron 1979. Draws without instances do not count.
    """
    if table.image[table.target >= 0].nunique() < 2:
        return None
    count = table.image.max() + 1
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    values = [ap50(table.loc[np.repeat(table.index, row[table.image])]) for row in weights]
    return tuple(np.nanquantile(values, [0.025, 0.975]).tolist())


def visible_instances(instances: Instances) -> Instances:
    """Instances without overlaps; one that is hidden by over half is a duplicate, left out."""
    order = np.argsort(-instances.scores, kind="stable")[::-1]  # the best is drawn last
    drawn = draw_masks([instances.rles[i] for i in order], order + 1, *instances.size)
    areas = np.bincount(drawn.ravel(), minlength=len(instances) + 1)[1:]
    return without_overlaps(instances.select(2 * areas >= mask_areas(instances.rles)))


def panoptic_quality(table: pd.DataFrame, num_classes: int) -> pd.DataFrame:
    """DQ, SQ and PQ of classes 1..C from matches of masks without overlaps; NaN: nothing there.

    Source: Kirillov et al., arXiv:1801.00868.
    """
    classes = range(1, num_classes + 1)
    hits = table[(table.label == table.target_label) & (table.iou > 0.5)].groupby("label").iou
    sizes = pd.concat([table.label, table.target_label]).value_counts()
    quality = pd.DataFrame(dict(DQ=2 * hits.count(), SQ=hits.mean()), classes).fillna(0.0)
    quality["DQ"] /= sizes.reindex(classes)
    return quality.assign(PQ=quality.DQ * quality.SQ)


def aji(pairs) -> float:
    """Aggregated Jaccard index of (ground truth, prediction) pairs, mean of images, no classes.

    NaN where nothing is. Source: Kumar et al., IEEE TMI 36(7), 2017.
    """
    values = []
    for truth, found in pairs:
        best = mask_pairs(found, truth).sort_values("iou").drop_duplicates("target", keep="last")
        areas, shared = mask_areas(found.rles), best.shared.sum()
        unused = np.delete(areas, best.detection).sum()
        union = mask_areas(truth.rles).sum() + areas[best.detection].sum() - shared + unused
        values.append(shared / union if union else np.nan)
    return float(pd.Series(values, dtype=float).mean())


def score_table(samples, predictions, config: Config) -> pd.DataFrame:
    """AP, AP50, AP75, PQ, AJI (0..1, NaN: not defined) and instances, of all and by class.

    predictions: one per sample. AP is of those from `score_threshold` on; PQ and AJI are of what
    is exported, see `visible_instances`.
    """
    categories = dict(enumerate(config.class_names, start=1))
    results = {k: p.above(config.score_threshold) for k, p in enumerate(predictions, start=1)}
    scores = average_precision(coco_ground_truth(samples, categories), results)
    truths = [ground_truth(sample, crowds=True) for sample in samples]
    exported = [visible_instances(p.above(config.export_score_threshold)) for p in predictions]
    table, pairs = match_table(exported, truths, len(categories)), []
    for image, (truth, instances) in enumerate(zip(truths, exported, strict=True)):
        counted = table.detection[(table.image == image) & (table.label > 0)]
        pairs.append((truth.select(truth.labels > 0), instances.select(counted)))
    quality, classes = panoptic_quality(table, len(categories)).PQ, scores["classes"]
    count = sum(row["instances"] for row in classes.values())
    capped = {name: scores[f"{name}_100"] for name in ("AP", "AP50", "AP75")}
    rows = {"all": scores | dict(PQ=quality.mean(), AJI=aji(pairs), instances=count)}
    rows["best 100 per image and class"] = capped | dict(instances=count)
    rows |= {categories[k]: row | dict(PQ=quality[k]) for k, row in classes.items()}
    columns = dict.fromkeys(("AP", "AP50", "AP75", "PQ", "AJI"), float) | dict(instances=int)
    return pd.DataFrame(list(rows.values()), list(rows), list(columns)).astype(columns)
