"""Evaluation: one table of matches between detections and ground truth, and scores from it."""

# %% [markdown]
# ### Match detections with the ground truth and score them
# AP50 is one number; the table of matches says where it comes from. Predictions and ground truth of
# the validation images go in, scores and figures below come out. AP takes what is submitted; DICE,
# AJI, PQ and F1 of the table of scores take what is exported, without overlaps and duplicates.

# %%
# @title match_table: one row per detection and per missed instance
import numpy as np
import pandas as pd
import pycocotools.mask
from scipy import ndimage, optimize, spatial

from src_snippets.data.rle import draw_masks, mask_areas
from src_snippets.data.structures import coco_ground_truth, ground_truth, Instances
from src_snippets.model.detect import visible_instances, without_overlaps
from src_snippets.setup.config import Config, require
from src_snippets.training.metrics import average_precision

MATCH_DTYPES = dict(image=int, detection=int, label=int, target=int, target_label=int)
MATCH_DTYPES |= dict(target_area=int, score="float32", iou=float, tp50=bool)


def mask_pairs(detections: Instances, truth: Instances) -> pd.DataFrame:
    """Pairs that share pixels: detection, target, iou; area, target_area and shared in px."""
    ious = pycocotools.mask.iou(detections.rles, truth.rles, [0] * len(truth))
    ious = np.reshape(ious, (len(detections), len(truth)))
    detection, target = np.nonzero(ious)
    pairs = pd.DataFrame(dict(detection=detection, target=target, iou=ious[detection, target]))
    pairs["area"] = mask_areas(detections.rles)[detection]
    pairs["target_area"] = mask_areas(truth.rles)[target]
    pairs["shared"] = pairs.iou / (1 + pairs.iou) * (pairs.area + pairs.target_area)
    return pairs.round(dict(shared=0))


def choose_pairs(pairs: pd.DataFrame) -> dict[int, int]:
    """Targets of detections as in COCOeval: IoU 0.5, best score, highest IoU, last of equals."""
    keys, ascending = ["score", "detection", "iou", "target"], [False, True, False, False]
    pairs = pairs[pairs.iou >= 0.5].sort_values(keys, ascending=ascending)
    match, used = {}, set()
    for pred, target in zip(pairs.detection, pairs.target, strict=True):
        if pred not in match and target not in used:
            match[pred] = target
            used.add(target)
    return match


def match_table(predictions, ground_truths, num_classes: int) -> pd.DataFrame:
    """Match detections with the ground truth of B images, where a label below 0 is a crowd.

    Returns one row per detection and per missed instance, best score first: image 0 .. B - 1,
    detection and target (indices, -1: none), score, label and target_label (0: none), target_area
    (px), iou of this match (0.5 or more, of any classes), tp50: true positive of AP50. A detection
    that is none and lies half or more in a crowd of its class has no row.
    """
    parts = []
    for image, (pred, truth) in enumerate(zip(predictions, ground_truths, strict=True)):
        last = np.r_[0, pred.labels, truth.labels].max()
        require(last <= num_classes, f"Image {image}: label {last}, expected up to {num_classes}.")
        detections = range(len(pred))
        rows = pd.DataFrame(dict(detection=detections, score=pred.scores, label=pred.labels))
        targets = pd.DataFrame(dict(target_label=truth.labels, target_area=mask_areas(truth.rles)))
        targets = targets.reset_index(names="target")
        pairs = mask_pairs(pred, truth).merge(rows).merge(targets)
        right = choose_pairs(pairs[pairs.label == pairs.target_label])
        crowds = pairs.query("label == -target_label and 2 * shared >= area").detection
        rows = rows[~rows.detection.isin({*crowds} - {*right})]
        valid = pairs[(pairs.target_label > 0) & pairs.detection.isin(rows.detection)]
        rows = rows.assign(target=rows.detection.map(choose_pairs(valid))).merge(pairs, how="left")
        rows = rows.merge(targets[targets.target_label > 0], how="outer")
        parts.append(rows.assign(image=image, tp50=rows.detection.isin(list(right))))
    table = pd.concat(parts) if parts else pd.DataFrame(columns=list(MATCH_DTYPES))
    table = table.fillna({"detection": -1, "target": -1}).fillna(0)[list(MATCH_DTYPES)]
    order = dict(by=["score", "image", "detection"], ascending=[False, True, True])
    return table.astype(MATCH_DTYPES).sort_values(**order, ignore_index=True)


def matches_above(table: pd.DataFrame, min_score: float) -> pd.DataFrame:
    """`match_table` of the detections with at least that score; better ones chose first anyway."""
    weak = (table.detection >= 0) & (table.score < min_score)
    missed = table[weak & (table.target >= 0)]
    missed = missed.assign(detection=-1, score=0, label=0, iou=0, tp50=False)
    return pd.concat([table[~weak], missed], ignore_index=True).astype(MATCH_DTYPES)


def wrong_instances(table: pd.DataFrame, image: int) -> tuple[list[int], list[int]]:
    """Targets of an image that are missed in AP50, and detections that are false positives."""
    own = table[(table.image == image) & ~table.tp50]
    return own.target[own.target >= 0].tolist(), own.detection[own.detection >= 0].tolist()


def image_table(table: pd.DataFrame, names: list[str], min_score: float) -> pd.DataFrame:
    """Instances, detections from `min_score` on, correct ones (IoU 0.5), F1; worst image first."""
    table = matches_above(table, min_score)
    rows = dict(instances=table.target >= 0, detections=table.detection >= 0, correct=table.tp50)
    rows = pd.DataFrame(rows).groupby(table.image).sum().reindex(range(len(names)), fill_value=0)
    name = "F1 at IoU 0.5"  # NaN: nothing there
    rows[name] = 2 * rows.correct / (rows.instances + rows.detections)
    return rows.set_index(pd.Index(names, name="image")).sort_values(name, kind="stable")


# %%
# @title score_table: AP with its interval; DICE, AJI, PQ and F1 of detection
def precision_curve(table: pd.DataFrame, label: int) -> np.ndarray:
    """Precision (101,) of a class at recall 0, 0.01 .. 1, as in COCOeval; NaN: no instances."""
    hits, total = table.tp50[table.label == label].cumsum(), (table.target_label == label).sum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    index = np.searchsorted(hits / max(total, 1), np.linspace(0, 1, 101))
    return np.r_[precision, 0.0][index] if total else np.full(101, np.nan)


def ap50(table: pd.DataFrame) -> float:
    """Mean AP at IoU 0.5 of the classes with instances, as in COCOeval; NaN without any."""
    labels = np.unique(table.target_label[table.target_label > 0])
    return float(np.mean([precision_curve(table, k) for k in labels])) if len(labels) else np.nan


def ap_interval(table: pd.DataFrame, count: int, draws=500) -> tuple[float, float] | None:
    """95% CI of AP50 by bootstrap over `count` images (Efron 1979); None: below two with cells."""
    if table.image[table.target >= 0].nunique() < 2:
        return None
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    values = [ap50(table.loc[np.repeat(table.index, row[table.image])]) for row in weights]
    return tuple(np.nanquantile(values, [0.025, 0.975]).tolist())


def pair_centroids(pred: Instances, truth: Instances, radius: float = 12.0) -> np.ndarray:
    """Pair centroids at most `radius` px apart: (2, K) int64, detections and their targets."""
    maps = [draw_masks(s.rles, np.arange(len(s)) + 1, *s.size) for s in (pred, truth)]
    centers = [ndimage.center_of_mass(m > 0, m, range(1, m.max() + 1)) for m in maps]
    distances = spatial.distance.cdist(*(np.reshape(places, (-1, 2)) for places in centers))
    pairs = np.array(optimize.linear_sum_assignment(distances))
    return pairs[:, distances[tuple(pairs)] <= radius]


def quality_table(predictions, ground_truths, num_classes: int) -> pd.DataFrame:
    """DICE, AJI, DQ, SQ, PQ, F1 of detection (0..1, NaN: nothing there): row 0 of all, then 1..C.

    Means over the images with instances or detections; but F1 is pooled, and a pair of two classes
    counts twice in it. predictions, ground_truths: one per image, without overlaps and crowds.
    Source: HoVer-Net, Graham et al. 2019, doi:10.1016/j.media.2019.101563, and its code.
    """
    columns, rows = ["label", "DICE", "AJI", "DQ", "SQ", "PQ", "hits", "count"], []
    for pred, truth in zip(predictions, ground_truths, strict=True):
        every, near = mask_pairs(pred, truth), pair_centroids(pred, truth)
        areas = mask_areas(pred.rles), mask_areas(truth.rles)
        for label in range(num_classes + 1):
            is_pred, is_truth = ((side.labels == label) | (label == 0) for side in (pred, truth))
            if not (count := is_pred.sum() + is_truth.sum()):
                continue
            pairs = every[is_pred[every.detection] & is_truth[every.target]]
            foreground = areas[0][is_pred].sum() + areas[1][is_truth].sum()
            best = pairs.loc[pairs.groupby("target").iou.idxmax()]  # may share a detection
            shared, again = best.shared.sum(), best.area[best.detection.duplicated()].sum()
            dice, aji = 2 * pairs.shared.sum() / foreground, shared / (foreground + again - shared)
            ious = pairs.iou[pairs.iou > 0.5]
            dq, sq = 2 * len(ious) / count, ious.sum() / max(len(ious), 1)
            first, second = is_pred[near[0]], is_truth[near[1]]
            hits, confused = 2 * (first & second).sum(), (first != second).sum()
            rows.append((label, dice, aji, dq, sq, dq * sq, hits, count + confused))
    groups = pd.DataFrame(rows, columns=columns, dtype=float).groupby("label")
    table = groups.mean().assign(F1=groups.hits.sum() / groups["count"].sum())
    return table.reindex(range(num_classes + 1))[[*columns[1:6], "F1"]]


def score_table(samples, predictions, config: Config) -> pd.DataFrame:
    """AP and the measures of `quality_table` (0..1, NaN: not defined), of all and by class.

    AP (of all: mean of the classes) is of predictions from `score_threshold` on, the others are of
    what is exported, see `visible_instances`.
    """
    categories = dict(enumerate(config.class_names, start=1))
    results = {k: p.above(config.score_threshold) for k, p in enumerate(predictions, start=1)}
    scores = average_precision(coco_ground_truth(samples, categories), results)
    truths = [ground_truth(sample, crowds=True) for sample in samples]
    exported = [visible_instances(p.above(config.export_score_threshold)) for p in predictions]
    table = match_table(exported, truths, len(categories)).query("label > 0")  # none in a crowd
    exported = [p.select(table.detection[table.image == k]) for k, p in enumerate(exported)]
    truths = [without_overlaps(truth.select(truth.labels > 0)) for truth in truths]
    quality = quality_table(exported, truths, len(categories))
    rows = {0: scores} | scores["classes"]
    columns = dict(AP=float, AP50=float, AP75=float, instances=int)
    table = pd.DataFrame(rows).T[list(columns)].astype(columns)
    return table.join(quality).rename({0: "overall"} | categories)
