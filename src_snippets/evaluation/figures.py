"""Two figures of the evaluation: six panels of curves and counts, and a gallery of mistakes."""

# %% [markdown]
# ### Show what goes wrong
# Matches of the validation images go in; a figure of six panels and a gallery of the worst mistakes
# come out. Precision, thresholds and scores take all detections; classes, counts, recall and the
# gallery take those with scores from `export_score_threshold` on, duplicates included.

# %%
# @title plot_evaluation: six panels
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
import numpy as np
import pandas as pd
from scipy import stats
import skimage
from sklearn.metrics import ConfusionMatrixDisplay

from src_snippets.data.drawing import add_class_legend, brighten, class_color
from src_snippets.data.rle import crop_mask
from src_snippets.data.structures import Instances
from src_snippets.evaluation.matching import ap50, mask_pairs, matches_above, precision_curve
from src_snippets.model.detect import LOW_SCORE
from src_snippets.setup.config import Config


def draw_scores(axes, table: pd.DataFrame, config: Config) -> None:
    """Draw precision over recall, F1 and AP50 over the score threshold, and scores: 3 axes."""
    labels, recall = range(1, config.num_classes + 1), np.linspace(0, 1, 101)
    curves = pd.DataFrame([precision_curve(table, label) for label in labels]).T
    casing = [withStroke(linewidth=3, foreground="#777777")]  # yellow on white
    axes[0].set_prop_cycle(color=[class_color(label) for label in labels])
    axes[0].plot(recall, curves, label=list(config.class_names), path_effects=casing)
    axes[0].plot(recall, curves.mean(axis=1), "k", label=f"mean, AP50 {ap50(table):.3f}")
    axes[0].set(xlabel="recall", ylabel="precision", title="Precision over recall, IoU 0.5")
    thresholds = np.r_[min(config.score_threshold, LOW_SCORE), np.arange(2, 20) / 20]
    parts = [matches_above(table, threshold) for threshold in thresholds]
    f1 = [2 * p.tp50.sum() / max(np.count_nonzero(p[["label", "target_label"]]), 1) for p in parts]
    best = f"F1, best {max(f1):.3f} from {thresholds[np.argmax(f1)]:g} on"
    axes[1].plot(thresholds, [ap50(part) for part in parts], "k-", label="AP50")
    axes[1].plot(thresholds, f1, "k--", label=best)
    for name, line in (("score_threshold", "-"), ("export_score_threshold", "--")):
        axes[1].axvline(getattr(config, name), color="#d62728", linestyle=line, label=name)
    axes[1].set(xlabel="minimum score", title="AP50 and F1 by score threshold", ylim=(0, 1.02))
    preds = table[table.detection >= 0]
    style = dict(color=["#d62728", "#2ca02c"], label=["false positives", "true positives"])
    groups = [preds.score[~preds.tp50], preds.score[preds.tp50]]
    axes[2].hist(groups, np.linspace(0, 1, 21), histtype="step", linewidth=2, **style)
    axes[2].set(xlabel="score", ylabel="detections", title="Scores at IoU 0.5", yscale="symlog")


def draw_exported(axes, table: pd.DataFrame, names: tuple[str, ...], images: int) -> None:
    """Draw the confusion matrix, counts in `images` images and recall by size: 3 axes."""
    labels, rng = [*range(1, len(names) + 1), 0], np.random.default_rng(0)
    counts = pd.crosstab(table.target_label, table.label)
    counts = counts.reindex(index=labels, columns=labels, fill_value=0).to_numpy()
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) * (np.c_[labels] > 0)
    matrix = ConfusionMatrixDisplay(fractions, display_labels=[*names, "background"])
    matrix.plot(ax=axes[0], cmap="Blues", colorbar=False, xticks_rotation=20)
    for text, count, fraction in zip(matrix.text_.flat, counts.flat, fractions.flat, strict=True):
        text.set_text(f"{count:,}\n{fraction:.0%}" if fraction else f"{count:,}")
        text.set_fontsize(min(10, 60 / len(labels)))
    matrix.text_[-1, -1].set_text("")  # background is not counted
    axes[0].set(xlabel="predicted", ylabel="true", title="Confusion matrix, % of row")
    sides = [pd.crosstab(table.image, table[name]) for name in ("target_label", "label")]
    axes_of_table = dict(index=range(images), columns=labels, fill_value=0)
    true, predicted = (side.reindex(**axes_of_table) for side in sides)
    for label, name in enumerate(names, start=1):
        error = (predicted[label] - true[label]).abs().mean()
        dots = [side[label] + rng.uniform(-0.3, 0.3, len(side)) for side in (true, predicted)]
        style = dict(color=class_color(label), markeredgecolor="#555555", alpha=0.6)
        axes[1].plot(*dots, "o", label=f"{name}, mean absolute error {error:.1f}", **style)
    axes[1].axline((0, 0), slope=1, color="#555555", linestyle="--")
    axes[1].set(xlabel="true instances", ylabel="predicted instances", title="Detections per image")
    truth = table[table.target >= 0].sort_values("target_area")
    for _, group in truth.groupby(6 * np.arange(len(truth)) // max(len(truth), 1)):
        test = stats.binomtest(int((group.label == group.target_label).sum()), len(group))
        errors = np.abs(np.array(test.proportion_ci()) - test.statistic)[:, None]
        axes[2].errorbar(np.sqrt(group.target_area).mean(), test.statistic, errors, fmt="C0o")
    axes[2].set(xlabel="√area, px", title="Recall by size, class correct, 95% CI", ylim=(0, 1.02))


def plot_evaluation(table: pd.DataFrame, config: Config, images: int) -> Figure:
    """Plot six panels from the matches of `match_table` of that many images."""
    figure = Figure(figsize=(16, 9.5), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    draw_scores(upper, table, config)
    exported = matches_above(table, config.export_score_threshold)
    draw_exported(lower, exported, config.class_names, images)
    for axis in (*upper, lower[1]):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


# %%
# @title plot_mistakes: a gallery, the worst first
MISTAKES = ("missed", "false positive", "wrong class", "merged or split", "duplicate")
PREDICTION_STYLE = dict(color="black", gapcolor="white", ls=(0, (3, 2)), lw=2, label="prediction")
WINNER_STYLE = dict(color="#ff00ff", ls=":", lw=3, label="better prediction of the same cell")


def find_mistakes(truths, predictions, table: pd.DataFrame) -> pd.DataFrame:
    """List mistakes, worst first: kind, rank, image, detections and targets (lists of indices).

    A merge has most of several instances in it, one of them missed; a split instance most of
    several detections, one without a match. After a duplicate comes the better detection.
    """
    rows = []
    for image, part in table.query("target >= 0 or not tp50").groupby("image"):
        scores, by_target = predictions[image].scores, part.set_index("target")
        extra, missed = {*part.detection[part.target < 0]}, {*part.target[part.detection < 0]}
        pairs = mask_pairs(predictions[image], truths[image])
        pairs = pairs[pairs.detection.isin(part.detection) & pairs.target.isin(part.target)]
        again = pairs[(pairs.iou >= 0.5) & pairs.detection.isin(extra)]
        for d, t in zip(again.detection, again.target, strict=True):
            rows.append(("duplicate", scores[d], image, [d, by_target.detection[t]], [t]))
        extra -= {*again.detection}
        for d, group in pairs[2 * pairs.shared > pairs.target_area].groupby("detection").target:
            if len(group) > 1 and missed & {*group}:
                rows.append(("merged or split", len(group), image, [d], list(group)))
                extra, missed = extra - {d}, missed - {*group}
        for t, group in pairs[2 * pairs.shared > pairs.area].groupby("target").detection:
            if len(group) > 1 and extra & {*group}:
                rows.append(("merged or split", len(group), image, list(group), [t]))
                extra, missed = extra - {*group}, missed - {t}
        wrong = part.query("label > 0 and target_label > 0 and label != target_label").itertuples()
        rows += [("wrong class", row.score, image, [row.detection], [row.target]) for row in wrong]
        rows += [("missed", by_target.target_area[t], image, [], [t]) for t in sorted(missed)]
        rows += [("false positive", scores[d], image, [d], []) for d in sorted(extra)]
    mistakes = pd.DataFrame(rows, columns=["kind", "rank", "image", "detections", "targets"])
    return mistakes.sort_values("rank", ascending=False, kind="stable")


def draw_outline(axis, rle: dict, **style) -> None:
    mask, top, left = crop_mask(rle)
    for line in skimage.measure.find_contours(np.pad(mask, 1), 0.5):
        axis.plot(line[:, 1] + left - 1, line[:, 0] + top - 1, **style)


def draw_mistake(axis, mistake, image: np.ndarray, truth: Instances, pred: Instances, names):
    """Draw a row of `find_mistakes` where it is in its image (3, H, W) uint8."""
    boxes = np.concatenate([pred.boxes[mistake.detections], truth.boxes[mistake.targets]])
    low, high, size = boxes[:, :2].min(0), boxes[:, 2:].max(0), np.array(truth.size[::-1])
    side = max(2 * (high - low).max(), 64)  # px
    first = ((low + high - side) / 2).clip(0, np.maximum(size - side, 0))
    last = np.minimum(first + side, size)
    (left, top), (right, bottom) = first.astype(int), np.ceil(last).astype(int)
    edges = left - 0.5, right - 0.5, bottom - 0.5, top - 0.5
    axis.imshow(brighten(image)[top:bottom, left:right], extent=edges)
    near = (truth.boxes[:, :2] < last) & (truth.boxes[:, 2:] > first)
    for index in np.flatnonzero(near.all(axis=1)):
        style = dict(color=class_color(abs(truth.labels[index])))
        draw_outline(axis, truth.rles[index], lw=3 if index in mistake.targets else 1, **style)
    for place, index in enumerate(mistake.detections):
        is_winner = mistake.kind == "duplicate" and place == 1
        draw_outline(axis, pred.rles[index], **(WINNER_STYLE if is_winner else PREDICTION_STYLE))
    axis.set(xlim=(first[0] - 0.5, last[0] - 0.5), ylim=(last[1] - 0.5, first[1] - 0.5))
    texts = [f"{pred.scores[k]:.2f} {names[pred.labels[k] - 1]}" for k in mistake.detections]
    true = {f"true: {names[truth.labels[k] - 1]}" for k in mistake.targets}
    axis.set_title("\n".join([*texts[:2], *sorted(true)[:2]]), fontsize=8)


def plot_mistakes(samples, truths, predictions, table, config: Config, columns=6) -> Figure:
    """Plot the worst mistakes, a row for each kind; table: `match_table`, crowds included."""
    exported = matches_above(table, config.export_score_threshold)
    mistakes, names = find_mistakes(truths, predictions, exported), config.class_names
    groups = {kind: mistakes[mistakes.kind == kind] for kind in MISTAKES}
    heights = [2.5 if len(group) else 0.4 for group in groups.values()]
    figure = Figure(figsize=(2 * columns + 1.2, sum(heights) + 0.4), layout="constrained")
    rows = figure.subplots(len(groups), columns, height_ratios=heights, squeeze=False)
    for row, (kind, group) in zip(rows, groups.items(), strict=True):
        text = f"{kind}:\n{len(group) or 'none'}"
        row[0].text(-0.06, 0.5, text, ha="right", va="center", transform=row[0].transAxes)
        for axis in row:
            axis.set_axis_off()
        for axis, mistake in zip(row, group.itertuples(), strict=False):
            sides = truths[mistake.image], predictions[mistake.image]
            draw_mistake(axis, mistake, samples[mistake.image].image.numpy(), *sides, names)
    handles = [Line2D([], [], **style) for style in (PREDICTION_STYLE, WINNER_STYLE)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    add_class_legend(figure, [f"true {name}" for name in names])
    return figure
