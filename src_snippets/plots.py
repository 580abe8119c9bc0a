"""Every figure; functions return a matplotlib `Figure`."""

# %% [markdown]
# ## How are cells drawn?
# As outlines in the colour of their class. The fields are enlarged first, so that the outline of a
# small cell stays a line and does not cover the cell. Dark fields are shown brighter than they are.

# %%
from collections.abc import Mapping, Sequence
from pathlib import Path
import time

import IPython
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
import numpy as np
from scipy.ndimage import maximum_filter
from skimage.segmentation import find_boundaries
from tqdm.auto import tqdm

from src_snippets.datasets import named_image
from src_snippets.forms import CellSample, Instances, truth_instances
from src_snippets.rle import paint

# %%
# Colours that stains do not have, bright enough to be seen on pink and on purple.
CLASS_COLORS = ("#00e5ff", "#39ff14", "#ffea00", "#ff6d00", "#0047ff", "#000000", "#c6a700")


def class_color(label: int) -> str:
    """The colour of a class 1..C, as hex; repeats after seven."""
    return CLASS_COLORS[(label - 1) % len(CLASS_COLORS)]


def shown_values(image: np.ndarray) -> np.ndarray:
    """(256,) uint8, how each value of an image (3, H, W) uint8 is shown: brighter in dark ones."""
    step = max(round((image.size / 3e6) ** 0.5), 1)  # a million pixels are enough to tell
    seen = image[:, ::step, ::step]
    high = max(np.percentile(seen, 99.9), seen.max() / 2) if seen.size else 0  # few cells, too
    factor = 230 / high if 0 < high < 100 else 1
    return np.minimum(np.arange(256) * factor, 255).astype(np.uint8)


def as_picture(image: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 -> (H, W, 3) uint8 to be shown; dark fields are brighter than they are."""
    return np.moveaxis(shown_values(image)[image], 0, 2)


# %%
def outline_cells(image: np.ndarray, cells: Instances, side: int = 480) -> np.ndarray:
    """Draws outlines on an enlarged copy of an image.

    Args:
        image: (3, H, W) uint8; cells: what to outline.
        side: the copy is enlarged by a whole factor until its longer side is about this.

    Returns:
        (H * f, W * f, 3) uint8.
    """
    factor = max(round(side / max(image.shape[1:])), 1)
    canvas = enlarge(as_picture(image), factor).copy()
    order = np.argsort(cells.scores, kind="stable")
    rles = [cells.rles[i] for i in order]
    ids = enlarge(paint(rles, order + 1, *cells.size), factor)
    width = max(round(max(ids.shape) / 700), 1)  # a large field is shown small
    edge = maximum_filter(find_boundaries(ids, mode="thick"), 2 * width - 1)
    hexes = [class_color(int(label)) for label in cells.labels]
    colors = np.array([[int(h[i : i + 2], 16) for i in (1, 3, 5)] for h in hexes] or [[0] * 3])
    # The edge also covers pixels outside, which take the colour of the cell beside them.
    nearby = maximum_filter(ids, 2 * width + 1)
    canvas[edge] = colors[np.where(ids[edge] > 0, ids[edge], nearby[edge]) - 1]
    return canvas


def enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Repeats rows and columns: (H, W, ..) -> (H * factor, W * factor, ..)."""
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


# %%
def add_legend(figure: Figure, names: Sequence[str]) -> None:
    """Puts the class colours under a figure; `names` are those of classes 1..C."""
    handles = [
        Line2D([], [], color=class_color(k), linewidth=4, label=name)
        for k, name in enumerate(names, start=1)
    ]
    columns = min(len(names), max(int(12 * figure.get_figwidth() / max(map(len, names))), 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def short_name(name: str) -> str:
    """The first letters of what tells a picture from others, see `named_image`."""
    return Path(named_image(name)).stem[:12]


def show_row(axes, pictures: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Shows pictures (H, W, 3) in a row of axes, with titles and no ticks."""
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()


def show_figure(figure: Figure, path: Path) -> None:
    """Saves a figure as PNG; a notebook shows it too, a script says where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    if IPython.get_ipython() is None:
        print(f"figure: {path}")
    else:
        IPython.display.display(IPython.display.Image(filename=str(path)))


# %%
def plot_fields(
    fields: Sequence[tuple[np.ndarray, Instances, str]], names: Sequence[str]
) -> Figure:
    """Fields above the same fields with cells outlined, one column a field.

    Args:
        fields: image (3, H, W) uint8, the cells to outline, and a name each.
        names: of classes 1..C.
    """
    figure = Figure(figsize=(3.4 * len(fields), 7), layout="constrained")
    rows = figure.subplots(2, len(fields), squeeze=False)
    titles = [f"{short_name(name)}  {i.shape[2]} x {i.shape[1]} px" for i, _, name in fields]
    show_row(rows[0], [as_picture(image) for image, _, _ in fields], titles)
    outlined = [outline_cells(image, cells) for image, cells, _ in fields]
    show_row(rows[1], outlined, [f"{len(cells)} cells" for _, cells, _ in fields])
    add_legend(figure, names)
    return figure


def plot_augmentations(
    sample: CellSample, variants: Sequence[CellSample], names: Sequence[str]
) -> Figure:
    """A sample, and what augmentation makes of it, truth outlined on all."""
    shown = [sample, *variants]
    figure = Figure(figsize=(9.6, 7), layout="constrained")
    axes = figure.subplots(2, (len(variants) + 2) // 2).flat
    outlined = [outline_cells(s.image.numpy(), visible_truth(s)) for s in shown]
    titles = ["as it is", *(f"variant {k}" for k in range(1, len(shown)))]
    show_row(list(axes)[: len(shown)], outlined, titles)
    add_legend(figure, names)
    return figure


def visible_truth(sample: CellSample) -> Instances:
    """The truth of a crop, without the instances that left it."""
    truth = truth_instances(sample)
    return truth.select(truth.boxes[:, 2] > truth.boxes[:, 0])


# %%
LOSS_NAMES = {
    "loss_objectness": "proposal: cell or not",
    "loss_rpn_box_reg": "proposal: box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}


# %%
def plot_history(history: Sequence[dict], names: Sequence[str], shown=None) -> Figure:
    """Loss parts, validation AP and learning rate over epochs.

    Args:
        history: as `fit` returns it; names: of classes 1..C.
        shown: a validation `CellSample` and the `Instances` found in it now, drawn beside them.
    """
    figure = Figure(figsize=(10.5, 7.4), layout="constrained")
    losses, scores, rate, field = figure.subplots(2, 2).flat
    field.set_axis_off()
    if shown:
        sample, found = shown
        picture = outline_cells(sample.image.numpy(), found)
        cells = int((sample.labels > 0).sum())
        show_row([field], [picture], [f"found {len(found)}, there are {cells}"])
        add_legend(figure, names)
    epochs = [row["epoch"] for row in history]
    for key, label in LOSS_NAMES.items():
        losses.plot(epochs, [row[key] for row in history], label=label, marker=".")
    most = max(row[key] for row in history for key in LOSS_NAMES)
    losses.set(xlabel="epoch", ylabel="mean loss", title="Training losses", ylim=(0, 1.35 * most))
    losses.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    for name in ("AP", "AP50", "AP75"):
        points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
        if points:
            scores.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
            scores.legend(fontsize=8, frameon=False)
    scores.set(xlabel="epoch", ylabel="score (0 to 1)", title="Validation", ylim=(0, 1))
    rate.plot(epochs, [row["rate"] for row in history], color="#555555", marker=".")
    rate.set(xlabel="epoch", ylabel="rate after the epoch", title="Learning rate", ylim=(0, None))
    for axis in (losses, scores, rate):
        axis.set_xlim(0.5, max(len(history), 2) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


# %%
def epoch_line(row: dict) -> str:
    """An epoch of a history in a line of text."""
    scores = [f"{name} {row[name]:.3f}" for name in ("AP50", "val_loss") if row.get(name)]
    return f"epoch {row['epoch']}: " + ", ".join([f"loss {row['loss']:.3f}", *scores])


class LiveHistory:
    """Draws a training while it goes on, each picture in place of the one before.

    Args:
        path: of the PNG, written anew each time; names: of classes 1..C.
        pause: seconds between two pictures, at least; the last of a training is always drawn.

    Without a notebook each epoch is a line of text.
    """

    def __init__(self, path: Path, names: Sequence[str], pause: float = 2.0):
        self.path, self.names, self.pause = path, names, pause
        self.handle, self.drawn = None, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, history: Sequence[dict], shown=None, is_last: bool = False) -> None:
        """Takes the history up to now and what `plot_history` shows beside it."""
        in_notebook = IPython.get_ipython() is not None
        if not in_notebook and not is_last:
            tqdm.write(epoch_line(history[-1]))
        if not is_last and time.monotonic() - self.drawn < self.pause:
            return
        plot_history(history, self.names, shown).savefig(self.path, dpi=80, bbox_inches="tight")
        self.drawn = time.monotonic()
        if in_notebook:
            picture = IPython.display.Image(filename=str(self.path))
            if self.handle is None:
                self.handle = IPython.display.display(picture, display_id=True)
            else:
                self.handle.update(picture)


# %%
def plot_predictions(samples: Sequence[CellSample], answers, names: Sequence[str]) -> Figure:
    """Image, truth and prediction side by side, one row a sample.

    Args:
        samples, answers: as many samples as `Instances`.
    """
    heights = [sample.size[0] / sample.size[1] for sample in samples]
    figure = Figure(figsize=(10.5, 3.4 * sum(heights) + 0.4 * len(samples)), layout="constrained")
    rows = figure.subplots(len(samples), 3, squeeze=False, height_ratios=heights)
    for row, sample, found in zip(rows, samples, answers, strict=True):
        image, truth = sample.image.numpy(), truth_instances(sample)
        pictures = [as_picture(image)] + [outline_cells(image, c) for c in (truth, found)]
        titles = [
            short_name(sample.name),
            f"truth: {len(truth)} cells",
            f"found: {len(found)} cells",
        ]
        show_row(row, pictures, titles)
    add_legend(figure, names)
    return figure


# %%
def plot_counts(truths: Sequence[Instances], answers, names: Sequence[str]) -> Figure:
    """Instances by class, true and predicted, as numbered bars."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    place = np.arange(1, len(names) + 1)
    for shift, side, label, color in (
        (-0.2, truths, "true", "#888888"),
        (0.2, answers, "found", "#0047ff"),
    ):
        labels = [c.labels for c in side]
        counts = np.bincount(np.concatenate(labels) if labels else [], minlength=len(names) + 1)
        bars = axis.bar(place + shift, counts[1:], 0.38, label=label, color=color)
        axis.bar_label(bars, fontsize=8)
    axis.set_xticks(place, names, rotation=20 if max(map(len, names)) > 10 else 0)
    axis.set(ylabel="cells", title="Cells by class")
    axis.legend(frameon=False)
    return figure


# %%
def plot_schedule(rates: Sequence[float]) -> Figure:
    """The learning rate of each step of a run."""
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(rates) + 1), rates, color="#1f6fb4")
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axis.grid(alpha=0.3)
    return figure


def plot_thresholds(lines: Mapping[str, Sequence[tuple]], names: Sequence[str]) -> Figure:
    """A score against the values of settings, one line a class; what was chosen is a dot.

    Args:
        lines: by title, for each class values, scores (None where there is nothing to score) and
            the chosen value.
    """
    figure = Figure(figsize=(3.3 * len(lines), 3.2), layout="constrained")
    for axis, (title, classes) in zip(figure.subplots(1, len(lines)), lines.items(), strict=True):
        for label, (values, scores, chosen) in enumerate(classes, start=1):
            known = [(v, s) for v, s in zip(values, scores, strict=True) if s is not None]
            if known:
                color = class_color(label)
                axis.plot(*zip(*known, strict=True), color=color, linewidth=2)
                axis.plot(chosen, dict(known)[chosen], "o", color=color, markeredgecolor="black")
        axis.set(xlabel=title, ylim=(0, 1))
        axis.grid(alpha=0.3)
    add_legend(figure, names)
    return figure


# %%
def plot_anchors(sides: np.ndarray, covered: np.ndarray, shapes: np.ndarray) -> Figure:
    """Width and height of cells and of the anchors that should meet them, both in network pixels.

    Args:
        sides: (N, 2) float, width and height of cells; covered: (N,) bool, an anchor fits.
        shapes: (A, 2) float, width and height of anchors.
    """
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axis = figure.subplots()
    for chosen, color, label in (
        (covered, "#8c8c8c", "cell"),
        (~covered, "#d62728", "cell without an anchor"),
    ):
        axis.scatter(*sides[chosen].T, s=6, color=color, label=f"{label} ({chosen.sum():,})")
    axis.scatter(*shapes.T, s=60, marker="+", color="#1f6fb4", label=f"anchor ({len(shapes)})")
    axis.set(xscale="log", yscale="log", xlabel="width, px", ylabel="height, px")
    axis.set_title("as the network sees them", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return figure
