"""What goes wrong on validation images: precision, classes, scores, floors, counts, worst cases."""

# %% [markdown]
# ## What goes wrong?
# AP50 says how good the answers are, not what to change. Here answers and truth of validation
# images go in; each question gets numbers and a figure of them. What the scorer counts is judged
# with all detections kept, what a reader sees with those from `show_floor` on.

# %%
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
import numpy as np
import pycocotools.mask
from skimage.measure import find_contours

from src_snippets.config import Config
from src_snippets.evaluate import class_ap, Hits, precision_table
from src_snippets.forms import by_class, Instances
from src_snippets.plots import class_color, shown_values
from src_snippets.rle import mask_areas, paint
from src_snippets.thresholds import class_f1

# %% [markdown]
# Precision over recall: where a curve ends, the other cells were not found at all; where it sinks
# early, wrong detections have high scores. The area below it is AP.


# %%
def precision_curves(truth: dict, answers: Mapping[int, Instances]) -> np.ndarray:
    """Precision over recall with all detections, as COCOeval defines it.

    Args:
        truth: a COCO dictionary; answers: `Instances` by its image ids.

    Returns:
        (10, 101, C) float64, 0..1: IoU 0.50, 0.55 .. 0.95, recall 0, 0.01 .. 1; -1 where a class
        has no cells.
    """
    most = max([1, *(len(found) for found in answers.values())])
    return precision_table(truth, answers, [most])[..., 0]


def mean_curves(table: np.ndarray) -> dict[float, np.ndarray]:
    """Precision over recall (101,) at IoU 0.5, 0.75 and 0.9, the mean of the classes with cells.

    Args:
        table: see `precision_curves`.

    Returns:
        By IoU; empty where no class has cells.
    """
    known = table[0, 0] >= 0  # (C,)
    rows = {0.5: 0, 0.75: 5, 0.9: 8} if known.any() else {}
    return {iou: table[row][:, known].mean(axis=1) for iou, row in rows.items()}


# %%
CASING = (withStroke(linewidth=3.2, foreground="#666666"),)  # yellow is seen on white, too


def set_units(axis, xlabel: str, ylabel: str, title: str) -> None:
    """Labels an axis whose values run from 0 to 1 both ways."""
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)


def plot_precision(table: np.ndarray, names: Sequence[str]) -> Figure:
    """Precision over recall: the mean of the classes at three IoUs, and by class at IoU 0.5.

    Args:
        table: see `precision_curves`; names: of classes 1..C.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    mean, single = figure.subplots(1, 2)
    recall = np.linspace(0, 1, 101)
    for (iou, curve), style in zip(mean_curves(table).items(), ("-", "--", ":"), strict=False):
        text = f"IoU {iou}: AP {curve.mean():.3f}"
        mean.plot(recall, curve, style, color="#1f6fb4", linewidth=2, label=text)
        mean.legend(fontsize=8)
    for label, (name, curve) in enumerate(zip(names, table[0].T, strict=True), start=1):
        known = curve >= 0  # all or none
        text = f"{name}: AP50 {curve.mean():.3f}" if known.all() else f"{name}: no cells"
        look = dict(color=class_color(label), linewidth=2, path_effects=CASING)
        single.plot(recall[known], curve[known], label=text, **look)
    set_units(mean, "recall", "precision", "Mean of the classes")
    set_units(single, "recall", "precision", "By class, mask IoU 0.5")
    figure.legend(handles=single.lines, loc="outside right center", fontsize=8)
    return figure


# %% [markdown]
# Which detection meets which cell, whatever their classes: the better ones choose first, by mask
# IoU, as in the scorer. Only pairs that share pixels are kept.


# %%
class CellPairs(NamedTuple):
    """The pairs of a detection and a true cell of one image that share pixels.

    Attributes:
        found, cell: (P,) int64, the detection and the true cell, counted from 0.
        iou: (P,) float64, above 0, of their masks.
        of_found, of_cell: (P,) float64, the shared pixels' part of the detection, and of the cell.
    """

    found: np.ndarray
    cell: np.ndarray
    iou: np.ndarray
    of_found: np.ndarray
    of_cell: np.ndarray

    def where(self, keep: np.ndarray) -> "CellPairs":
        """The pairs at `keep`, (P,) bool."""
        return CellPairs(*(column[keep] for column in self))


def overlapping_pairs(found: Instances, truth: Instances, rows: int = 256) -> CellPairs:
    """Pairs that share pixels, by detection.

    Args:
        rows: so many detections are compared with all M true cells at a time, 8 * rows * M bytes.
    """
    parts = [CellPairs(*np.zeros((2, 0), np.int64), *np.zeros((3, 0)))]
    areas, cell_areas = mask_areas(found.rles), mask_areas(truth.rles)
    for begin in range(0, len(found) if len(truth) else 0, rows):
        table = pycocotools.mask.iou(found.rles[begin : begin + rows], truth.rles, [0] * len(truth))
        row, cell = np.nonzero(table)
        iou, row = table[row, cell], row + begin
        shared = iou * (areas[row] + cell_areas[cell]) / (1 + iou)
        parts.append(CellPairs(row, cell, iou, shared / areas[row], shared / cell_areas[cell]))
    return CellPairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


# %%
FOUND_IOU = 0.5  # from which mask IoU on a cell is found, as in AP50


class Matching(NamedTuple):
    """Which detection meets which true cell in one image, crowds left out.

    Attributes:
        found: N detections that count; truth: M true cells.
        pairs: those of them that share pixels.
        cell: (N,) int64, the true cell, of any class, that each detection finds; -1 for none.
        right: (N,) bool, it finds one of its own class, as AP50 counts it.
    """

    found: Instances
    truth: Instances
    pairs: CellPairs
    cell: np.ndarray
    right: np.ndarray

    @property
    def missed(self) -> np.ndarray:
        """(M,) bool, the true cells that no detection of any class finds."""
        return ~np.isin(np.arange(len(self.truth)), self.cell)


def assign_cells(pairs: CellPairs, scores: np.ndarray) -> np.ndarray:
    """(N,) int64, the free cell of highest IoU for each detection, best score first; -1 for none.

    Args:
        scores: (N,) float32, of the detections.
    """
    good = pairs.where(pairs.iou >= FOUND_IOU)
    order = np.lexsort((-good.iou, good.found, -scores[good.found]))
    cells, taken = np.full(len(scores), -1), set()
    for row, cell in zip(good.found[order].tolist(), good.cell[order].tolist(), strict=True):
        if cells[row] < 0 and cell not in taken:
            cells[row] = cell
            taken.add(cell)
    return cells


def match_cells(found: Instances, truth: Instances) -> Matching:
    """Matches the detections of an image, from the score on that is judged, with its true cells.

    A label below 0 in the truth is a crowd: a detection with half of its pixels in one that finds
    no cell is left out.
    """
    cells, crowds = truth.select(truth.labels > 0), truth.select(truth.labels < 0)
    pairs = overlapping_pairs(found, cells)
    taken = assign_cells(pairs, found.scores)
    if len(found) and len(crowds):
        inside = pycocotools.mask.iou(found.rles, crowds.rles, [1] * len(crowds)).max(axis=1)
        return match_cells(found.select((taken >= 0) | (inside < FOUND_IOU)), cells)
    alike = pairs.where(found.labels[pairs.found] == cells.labels[pairs.cell])
    return Matching(found, cells, pairs, taken, assign_cells(alike, found.scores) >= 0)


# %% [markdown]
# Which classes are taken for one another? Rows are what is there, columns what was found.


# %%
def count_confusions(matchings: Sequence[Matching], num_classes: int) -> np.ndarray:
    """True against found classes.

    Args:
        matchings: one an image; num_classes: C.

    Returns:
        (C + 1, C + 1) int64. Row k - 1: the true cells of class k by the class found, the missed
        ones last. Last row: the detections that find no cell, by their class.
    """
    table = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for match in matchings:
        hit, true, said = match.cell >= 0, match.truth.labels - 1, match.found.labels - 1
        np.add.at(table, (true[match.cell[hit]], said[hit]), 1)
        np.add.at(table[-1], said[~hit], 1)
        np.add.at(table[:, -1], true[match.missed], 1)
    return table


def plot_confusions(table: np.ndarray, names: Sequence[str]) -> Figure:
    """The counts of `count_confusions`; the colour is their part of the true cells of the row."""
    side = 1.9 + 0.62 * len(table)
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axis = figure.subplots()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    shares[-1] = 0  # no true cells to be a part of
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in list(np.ndenumerate(table))[:-1]:  # the last has no meaning
        color = "white" if shares[row, column] > 0.6 else "black"
        text = f"{count:,}\n{shares[row, column]:.0%}" if shares[row, column] else f"{count:,}"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    place = range(len(table))
    axis.set_xticks(place, [*names, "missed"], rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(place, [*names, "nothing there"])
    axis.set(xlabel="found", ylabel="true", title=f"Cells by class, mask IoU {FOUND_IOU}")
    return figure


# %% [markdown]
# Can a score be read as a probability? Then of the detections with scores near 0.8, 80 % are right.


# %%
def calibrate(hits: Sequence[Hits], bins: int = 10) -> tuple:
    """Compares scores with the part of the detections that is right: own class, IoU of the hits.

    Returns:
        By bin of equal width from 0 to 1: detections (K,) int64, their mean score (K,) float64 and
        the part that is right (K,) float64, both 0 in an empty bin; and the expected calibration
        error, 0..1, None without detections.

    Source: expected calibration error of Naeini et al., AAAI 2015, and Guo et al.,
    arXiv:1706.04599: the mean distance of score and part, each bin weighed by its count.
    """
    scores = np.concatenate([np.zeros(0, np.float32), *(hit.scores for hit in hits)])
    right = np.concatenate([np.zeros(0, bool), *(hit.found >= 0 for hit in hits)])
    home = np.minimum((scores * bins).astype(np.int64), bins - 1)
    counts = np.bincount(home, minlength=bins)
    sums = [np.bincount(home, values, minlength=bins) for values in (scores, right)]
    mean, part = (total / np.maximum(counts, 1) for total in sums)
    error = float(np.average(np.abs(mean - part), weights=counts)) if len(scores) else None
    return counts, mean, part, error


# %%
def plot_calibration(counts, scores, right, error: float | None) -> Figure:
    """The part of detections that is right, by score; above, how many there are.

    Args:
        counts, scores, right, error: see `calibrate`.
    """
    figure = Figure(figsize=(5.4, 4), layout="constrained")
    axis = figure.subplots()
    known, width = counts > 0, 1 / len(counts)
    left = np.arange(len(counts))[known] * width
    axis.bar(left, right[known], width, align="edge", color="#9ecae1", edgecolor="white")
    axis.plot([0, 1], [0, 1], "--", color="#555555", label="as many right as the score says")
    axis.plot(scores[known], right[known], "o", color="#1f6fb4", label="at the mean score")
    for place, count in zip(left, counts[known], strict=True):
        axis.text(place + width / 2, 1.04, f"{count:,}", ha="center", fontsize=8)
    said = "no detections" if error is None else f"expected calibration error {error:.3f}"
    set_units(axis, "score (above: detections)", "part of the detections that is right", said)
    axis.set_ylim(0, 1.12)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92))
    return figure


# %% [markdown]
# From which score on should a detection count? AP never falls when weaker ones are added, F1 does.


# %%
def floor_curves(hits: Sequence[Hits], config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AP50 and F1 of each class when detections below a floor are left out.

    Args:
        hits: one an image, of the answers with all detections kept.
        config: `num_classes`, `score_floor` and `show_floor` are read.

    Returns:
        Floors (K,) float64, ascending from `score_floor` on; AP and F1 (K, C) float64, 0..1, NaN
        for a class without cells.
    """
    marks = (*np.arange(20) / 20, *config.show_floor)
    floors = np.unique(np.maximum(marks, config.score_floor))
    ap, f1 = np.full((2, len(floors), config.num_classes), np.nan)
    cells = sum((hit.cells for hit in hits), np.zeros(config.num_classes + 1, np.int64))
    for row, floor in enumerate(floors):
        strong = [Hits(*(v[h.scores >= floor] for v in h[:3]), h.cells) for h in hits]
        for label in np.flatnonzero(cells):
            ap[row, label - 1] = class_ap(strong, label)
            f1[row, label - 1] = class_f1(hits, label, floor)
    return floors, ap, f1


# %%
def plot_floors(floors, ap, f1, config: Config, names: Sequence[str]) -> Figure:
    """AP50 and F1 by the least score; dots: `score_floor` and `show_floor` of the settings.

    Args:
        floors, ap, f1: see `floor_curves`; names: of classes 1..C.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    labels = np.arange(1, len(names) + 1)
    scores, settings = {"AP50": ap, "F1": f1}, {"AP50": "score_floor", "F1": "show_floor"}
    for axis, (title, values) in zip(figure.subplots(1, 2), scores.items(), strict=True):
        own = by_class(np.atleast_1d(getattr(config, settings[title])), labels)
        chosen = np.maximum(own, config.score_floor)
        for label, name, floor, column in zip(labels, names, chosen, values.T, strict=True):
            look = dict(color=class_color(label), path_effects=CASING)
            axis.plot(floors, column, linewidth=2, label=name, **look)
            axis.plot(floor, column[floors == floor], "o", markersize=7, **look)
        known = ~np.isnan(values[0])
        if known.any():
            mean = values[:, known].mean(axis=1)
            axis.plot(floors, mean, "--", color="black", label="mean of the classes")
        set_units(axis, "least score that counts", title, f"{title}, dots: {settings[title]}")
    lines, texts = axis.get_legend_handles_labels()
    figure.legend(lines, texts, loc="outside right center", fontsize=8)
    return figure


# %% [markdown]
# Are as many cells found as there are? Misses and wrong detections can balance within an image.


# %%
def count_by_class(sides: Sequence[Instances], num_classes: int) -> np.ndarray:
    """(B, C) int64, the instances of each class in each image, crowds left out."""
    counts = [np.bincount(s.labels[s.labels > 0], minlength=num_classes + 1)[1:] for s in sides]
    return np.array(counts, np.int64).reshape(len(sides), num_classes)


def count_errors(true: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far counts are off in an image on average.

    Args:
        true, found: (B, C) ints, see `count_by_class`.

    Returns:
        Mean absolute error and bias, found less true, (C,) float64 each; 0 without images.
    """
    off = (found - true) / max(len(true), 1)
    return np.abs(off).sum(axis=0), off.sum(axis=0)


# %%
COUNT_TICKS = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 3000, 10_000)


def plot_count_errors(true: np.ndarray, found: np.ndarray, names: Sequence[str]) -> Figure:
    """Found against true cells, a dot for an image and class, and the line of equality.

    Args:
        true, found: (B, C) ints; names: of classes 1..C.
    """
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axis = figure.subplots()
    most = 1.15 * max(true.max(initial=0), found.max(initial=0), 1)
    axis.plot([0, most], [0, most], "--", color="#555555", label="as many")
    for k, (name, mae, bias) in enumerate(zip(names, *count_errors(true, found), strict=True)):
        look = dict(color=class_color(k + 1), markeredgecolor="#333333", alpha=0.8)
        text = f"{name}: MAE {mae:.1f}, bias {bias:+.1f}"
        axis.plot(true[:, k], found[:, k], "o", label=text, **look)
    axis.set_xscale("symlog", linthresh=10)  # even up to 10, then by ratio: classes differ a lot
    axis.set_yscale("symlog", linthresh=10)
    ticks = [tick for tick in COUNT_TICKS if tick < most]
    axis.set(xticks=ticks, yticks=ticks, xticklabels=ticks, yticklabels=ticks, aspect="equal")
    axis.set(xlabel="true cells in an image (from 10 on by ratio)", ylabel="cells found in it")
    axis.set_title("Cells by image")
    axis.set(xlim=(-0.5, most), ylim=(-0.5, most))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


# %% [markdown]
# Where is it worst? A merge is a detection with most of several cells in it, one of them missed. A
# split cell has most of several detections in it, one of them too small. What is in a merge or a
# split is not shown again as a false positive or a miss.


# %%
class Mistake(NamedTuple):
    """A place where answer and truth differ.

    Attributes:
        image: counted from 0; found, cells: the detections and true cells it is about, in the
            `Matching` of that image.
        rank: what mistakes of a kind are sorted by, largest first.
    """

    image: int
    found: Sequence[int]
    cells: Sequence[int]
    rank: tuple[float, ...]


def companions(keys: np.ndarray, values: np.ndarray) -> dict[int, list[int]]:
    """The values (P,) of each key (P,) that has two or more."""
    groups = {}
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        groups.setdefault(key, []).append(value)
    return {key: group for key, group in groups.items() if len(group) > 1}


def merges_and_splits(match: Matching) -> tuple[dict, dict]:
    """The true cells of each detection that merges some, and the detections of each split cell."""
    held = match.pairs.where(match.pairs.of_cell > 0.5)
    merges = companions(held.found, held.cell)
    parts = match.pairs.where(match.pairs.of_found > 0.5)
    splits = companions(parts.cell, parts.found)
    small = {*parts.cell[(match.cell[parts.found] < 0) & (parts.iou < FOUND_IOU)].tolist()}
    merges = {row: cells for row, cells in merges.items() if match.missed[cells].any()}
    return merges, {cell: rows for cell, rows in splits.items() if cell in small}


def closest(pairs: CellPairs) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The cell that each detection overlaps most, by IoU, and the detection of each cell."""
    pairs = pairs.where(np.maximum(pairs.of_found, pairs.of_cell) > 0.2)  # others just touch
    order = np.argsort(pairs.iou, kind="stable")  # the last one stays in a dictionary
    both = list(zip(pairs.found[order].tolist(), pairs.cell[order].tolist(), strict=True))
    return {row: [cell] for row, cell in both}, {cell: [row] for row, cell in both}


# %%
def find_mistakes(matchings: Sequence[Matching]) -> dict[str, list[Mistake]]:
    """Mistakes by kind, the worst first.

    Returns:
        `false positives`, which find no cell of their own class, by score; `misses` by area;
        `merges` by the number of cells; `splits` by the number of detections.
    """
    kinds = {"false positives": [], "misses": [], "merges": [], "splits": []}
    for image, match in enumerate(matchings):
        scores, areas = match.found.scores, mask_areas(match.truth.rles)
        merges, splits = merges_and_splits(match)
        cell_of, found_of = closest(match.pairs)
        for row, cells in merges.items():
            kinds["merges"].append(Mistake(image, [row], cells, (len(cells), scores[row])))
        for cell, rows in splits.items():
            kinds["splits"].append(Mistake(image, rows, [cell], (len(rows), areas[cell])))
        told = {*merges, *(row for rows in splits.values() for row in rows)}
        for row in {*np.flatnonzero(~match.right).tolist()} - told:
            place = Mistake(image, [row], cell_of.get(row, []), (scores[row],))
            kinds["false positives"].append(place)
        told = {*splits, *(cell for cells in merges.values() for cell in cells)}
        for cell in {*np.flatnonzero(match.missed).tolist()} - told:
            place = Mistake(image, found_of.get(cell, []), [cell], (areas[cell],))
            kinds["misses"].append(place)
    return {kind: sorted(k, key=lambda m: m.rank, reverse=True) for kind, k in kinds.items()}


# %%
def list_classes(cells: Instances, names: Sequence[str]) -> str:
    """The names of the classes of some instances, each once."""
    return ", ".join(dict.fromkeys(names[label - 1] for label in cells.labels)) or "nothing"


def mistake_title(mistake: Mistake, match: Matching, names: Sequence[str]) -> str:
    """What was found, with scores, and what is there, in lines of at most 30 letters."""
    found, truth = match.found.select(mistake.found), match.truth.select(mistake.cells)
    more, said = f" {len(truth)} cells" if len(truth) > 1 else "", "found"
    if len(found) == len(truth) == 1:
        iou = pycocotools.mask.iou(found.rles, truth.rles, [0])[0, 0]
        more, alike = f" IoU {iou:.2f}", found.labels[0] == truth.labels[0]
        if alike and iou >= FOUND_IOU and not match.right[mistake.found[0]]:
            said = "found again"  # the cell is a better one's
    said = " ".join([said, *(f"{score:.2f}" for score in found.scores[:3])])
    lines = f"{said}: {list_classes(found, names)}", f"true{more}: {list_classes(truth, names)}"
    return "\n".join(fill(line, 30) for line in lines)


def view_window(boxes: np.ndarray, size: tuple[int, int], least: int = 64) -> tuple[slice, slice]:
    """Rows and columns of a square around boxes, with context, inside the image.

    Args:
        boxes: (N, 4) float32, XYXY pixels, N >= 1; size: H, W; least: side in pixels.
    """
    low, high = boxes[:, 1::-1].min(axis=0), boxes[:, :1:-1].max(axis=0)  # row, column
    side = int(max(2 * (high - low).max(), least))
    first = np.clip((low + high - side) / 2, 0, np.maximum(np.array(size) - side, 0)).astype(int)
    rows, columns = (slice(k, min(k + side, end)) for k, end in zip(first, size, strict=True))
    return rows, columns


# %%
# Black and white is seen on every stain, and no class is drawn so.
FOUND_LOOK = dict(color="black", gapcolor="white", linestyle=(0, (3, 2)), linewidth=2)


def draw_outline(axis, rle: dict, window: tuple[slice, slice], **look) -> None:
    """Draws the outline of a mask in the pixels of a window."""
    mask = paint([rle], [1], *rle["size"])[window]
    for line in find_contours(np.pad(mask, 1), 0.5):
        axis.plot(line[:, 1] - 1, line[:, 0] - 1, **look)


def show_mistake(axis, image: np.ndarray, mistake: Mistake, match: Matching) -> None:
    """Shows the place of a mistake: true cells in their colours, its detections dashed.

    Args:
        image: (3, H, W) uint8.
    """
    found, truth = match.found.select(mistake.found), match.truth
    boxes = np.concatenate([found.boxes, truth.boxes[mistake.cells]])
    rows, columns = window = view_window(boxes, truth.size)
    axis.imshow(np.moveaxis(shown_values(image)[image[:, rows, columns]], 0, 2))
    limits = axis.axis()
    near = (truth.boxes[:, :2] < (columns.stop, rows.stop)).all(axis=1)
    near &= (truth.boxes[:, 2:] > (columns.start, rows.start)).all(axis=1)
    for cell in np.flatnonzero(near).tolist():
        width = 3 if cell in mistake.cells else 1
        color = class_color(truth.labels[cell])
        draw_outline(axis, truth.rles[cell], window, color=color, linewidth=width)
    for rle in found.rles:
        draw_outline(axis, rle, window, **FOUND_LOOK)
    axis.axis(limits)
    axis.set_axis_off()


# %%
def plot_mistakes(
    mistakes, matchings: Sequence[Matching], images, names: Sequence[str], most: int = 6
) -> Figure:
    """The worst mistakes, a row a kind.

    Args:
        mistakes: see `find_mistakes`; matchings, images: (3, H, W) uint8, one an image.
        names: of classes 1..C; most: so many of a kind are shown.
    """
    heights = [2.65 if every else 0.4 for every in mistakes.values()]
    figure = Figure(figsize=(2 * most, sum(heights) + 0.4), layout="constrained")
    parts = figure.subfigures(len(mistakes), 1, height_ratios=heights)
    for part, (kind, every) in zip(parts, mistakes.items(), strict=True):
        rest = kind in ("false positives", "misses") and bool(every)
        told = f"{kind}{' without those of merges and splits' * rest}: {len(every) or 'none'}"
        heading = part.suptitle(told, ha="left", fontweight="bold")
        heading.set_x(0.01)  # given at once, no room is kept for it
        axes = part.subplots(1, most, squeeze=False)[0] if every else ()
        for axis, mistake in zip(axes, every, strict=False):
            match = matchings[mistake.image]
            show_mistake(axis, images[mistake.image], mistake, match)
            axis.set_title(mistake_title(mistake, match, names), fontsize=8)
        for axis in axes[len(every) :]:
            axis.remove()
    looks = {f"true {name}": dict(color=class_color(k)) for k, name in enumerate(names, start=1)}
    looks["found"] = FOUND_LOOK
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    columns = min(len(handles), 5)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.draw_without_rendering()  # from the second drawing on headings and titles are apart
    return figure
