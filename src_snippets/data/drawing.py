"""Draw images with outlined instances; show and save figures."""

# %%
# @title Drawing: captions, outlines, and figures of samples and predictions
from pathlib import Path

import IPython
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
import numpy as np
from scipy import ndimage

from src_snippets.data.rle import mask_areas
from src_snippets.data.samples import image_stem
from src_snippets.data.structures import CellSample, draw_by_score, ground_truth, Instances

CAPTIONS = {  # by file name, in the order of the report: heading, what to see
    "evaluation": "Evaluation: Curves that end early miss cells; off the diagonal are confusions.",
    "mistakes": "Worst mistakes: Truth solid, predictions dashed. Either may be what is wrong.",
    "predictions": "Predictions: Look for missed, merged and split cells, and for other colours.",
    "history": "Training: A falling score: too many epochs. With a cosine schedule it should rise.",
    "samples": "Training images: If outlines and cells are apart, image and masks do not match.",
    "augmentations": "Augmentation: If colours look unlike any slide, lower color_jitter.",
    "anchors": "Anchors: Many cells without an anchor ask for other anchor_sizes or scale.",
    "test": "Test images: Predicted cells; without a test part in validation images.",
}
# Colours that stains do not have, bright enough to be seen on pink and on purple
CLASS_COLORS = ("#00e5ff", "#39ff14", "#ffea00", "#ff6d00", "#0047ff", "#000000", "#c6a700")


def class_color(label: int) -> str:
    """The colour of a class 1..C, as hex; repeats after seven."""
    return CLASS_COLORS[(label - 1) % len(CLASS_COLORS)]


def brighten(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of an image (3, H, W) uint8 for drawing: a dark one becomes brighter."""
    high = max(np.percentile(image, 99.9), image.max() / 2)  # few cells on black count too
    factor = 230 / high if 0 < high < 100 else 1
    return np.minimum(np.arange(256) * factor, 255).astype(np.uint8)[np.moveaxis(image, 0, 2)]


def draw_outlines(image: np.ndarray, instances: Instances, side: int = 480) -> np.ndarray:
    """(H * f, W * f, 3) uint8: an image (3, H, W) f times as large, about `side`, and outlines."""
    factor = max(round(side / max(image.shape[1:])), 1)
    sources = brighten(image), draw_by_score(instances)
    canvas, ids = (pixels.repeat(factor, 0).repeat(factor, 1) for pixels in sources)
    width = 1 + 2 * max(round(max(ids.shape) / 700), 1)  # a large image is displayed small
    nearby = ndimage.maximum_filter(ids, width)
    edge = nearby != ndimage.minimum_filter(ids, width)
    ids = np.where(ids > 0, ids, nearby)[edge]  # the line also lies around its instance
    colors = [list(bytes.fromhex(class_color(label)[1:])) for label in instances.labels]
    canvas[edge] = np.array(colors).reshape(-1, 3)[ids - 1]
    return canvas


def add_class_legend(figure: Figure, names: tuple[str, ...]) -> None:
    """Put the colours of classes 1..C, called `names`, under a figure."""
    handles = [Line2D([], [], color=class_color(k + 1), lw=4, label=n) for k, n in enumerate(names)]
    columns = max(int(12 * figure.get_figwidth() / max(map(len, names))), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def show_image_row(axes, images: list[np.ndarray], titles: list[str]) -> None:
    """Show images (H, W, 3) with titles in a row of axes, without ticks."""
    for axis, image, title in zip(axes, images, titles, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
        axis.set_anchor("N")


def show_figure(figure: Figure, path: Path, update: bool | None = None) -> None:
    """Save a figure as PNG; a notebook displays it, its caption as the text for screen readers.

    update: False for the first and True for later versions of a display that changes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(lambda part: hasattr(part, "set_parse_math")):
        text.set_parse_math("$" not in text.get_text())  # which is in a name, no formula
    figure.savefig(path, dpi=100, bbox_inches="tight")
    if IPython.get_ipython() is not None:
        alt_text = {"alt": CAPTIONS.get(path.stem.rstrip("0123456789"), "")}  # Colab has no alt=
        image = IPython.display.Image(filename=str(path), metadata=alt_text)
        place = {} if update is None else dict(display_id=str(path), update=update)
        IPython.display.display(image, **place)
    elif not update:
        print(f"figure: {path}")


def plot_samples(items: list[tuple], names: tuple[str, ...]) -> Figure:
    """Plot (image (3, H, W) uint8, `Instances`, name) each: the image, below it with outlines."""
    tall = min(max(image.shape[1] / image.shape[2] for image, _, _ in items), 1.2)
    figure = Figure(figsize=(3.4 * len(items), 6.6 * tall + 1.2), layout="constrained")
    axes = figure.subplots(2, len(items), squeeze=False)
    for column, (image, instances, name) in zip(axes.T, items, strict=True):
        title = f"{image_stem(name)[:12]}  {image.shape[2]} x {image.shape[1]} px"
        plots = [brighten(image), draw_outlines(image, instances)]
        count = np.count_nonzero(mask_areas(instances.rles))  # crops have others outside
        show_image_row(column, plots, [title, f"{count} cells"])
    add_class_legend(figure, names)
    return figure


def plot_predictions(samples: list[CellSample], predictions, wrong, names) -> Figure:
    """Plot image, ground truth and prediction of each sample; crosses at `wrong` ones of both."""
    heights = [min(sample.size[0] / sample.size[1], 1.5) for sample in samples]
    figure = Figure(figsize=(10.5, 3.4 * sum(heights) + 0.4 * len(samples)), layout="constrained")
    rows = figure.subplots(len(samples), 3, squeeze=False, height_ratios=heights)
    for row, sample, prediction, marks in zip(rows, samples, predictions, wrong, strict=True):
        image, sides = sample.image.numpy(), (ground_truth(sample), prediction)
        plots = [brighten(image), *(draw_outlines(image, side) for side in sides)]
        texts = "ground truth: {} cells, {} missed", "prediction: {} cells, {} false positives"
        titles = [t.format(len(s), len(m)) for t, s, m in zip(texts, sides, marks, strict=True)]
        show_image_row(row, plots, [image_stem(sample.name)[:12], *titles])
        for axis, side, index in zip(row[1:], sides, marks, strict=True):
            centers = side.boxes[index].reshape(-1, 2, 2).mean(1) * plots[1].shape[1] / side.size[1]
            axis.plot(*centers.T, "wX", markeredgecolor="black", markersize=8)
    add_class_legend(figure, names)
    return figure
