"""Draw a training while it goes on."""

# %% [markdown]
# ### Watch the training
# One figure says how a training goes: losses, validation scores, and a validation image with its
# ground truth beside the prediction. In: the history, a dict for each epoch; out: a PNG that is
# drawn anew in place. A script has no display, so it prints a line for each epoch.

# %%
# @title plot_history, LiveHistory
from pathlib import Path
import time

import IPython
from matplotlib.figure import Figure
import pandas as pd
from tqdm.auto import tqdm

from src_snippets.data.drawing import add_class_legend, draw_outlines, show_figure, show_image_row
from src_snippets.data.structures import ground_truth


def plot_history(history: list[dict], names: tuple[str, ...], example=None) -> Figure:
    """Plot losses and scores over epochs; below them `example`, a sample and its `Instances`."""
    heights = [3.4, min(5.1 * example[0].size[0] / example[0].size[1], 7)] if example else [3.4]
    figure = Figure(figsize=(10.5, sum(heights) + 0.6), layout="constrained")
    rows = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    table = pd.DataFrame.from_dict({row["epoch"]: row for row in history}, "index", dtype=float)
    for axis, pattern in zip(rows[0], ("loss", "^AP"), strict=True):
        for key, values in table.dropna(axis=1, how="all").filter(regex=pattern).items():
            axis.plot(values.dropna(), marker=".", label=key.replace("_", " "))
            axis.legend(fontsize=8, frameon=False, ncols=2)
        axis.set(xlabel="epoch", xlim=(0.5, max(len(history), 2) + 0.5), ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    rows[0, 0].set(ylabel="mean loss", title="Losses")
    rows[0, 1].set(ylabel="score (0 to 1)", title="Validation", ylim=(0, 1))
    if example:
        image, both = example[0].image.numpy(), (ground_truth(example[0]), example[1])
        titles = [f"ground truth: {len(both[0])} cells", f"prediction: {len(both[1])} cells"]
        show_image_row(rows[1], [draw_outlines(image, each) for each in both], titles)
        add_class_legend(figure, names)
    return figure


class LiveHistory:
    """Draw `plot_history` into a PNG and one display, anew after epochs, 5% of the time."""

    def __init__(self, path: Path, names: tuple[str, ...]):
        self.path, self.names, self.next = path, names, 0.0

    def __call__(self, history: list[dict], example=None, is_last: bool = False) -> None:
        row = history[-1]
        if IPython.get_ipython() is None and not is_last:
            known = [k for k in ("loss", "AP50", "val_loss") if row.get(k) is not None]
            tqdm.write(f"epoch {row['epoch']}: {', '.join(f'{k} {row[k]:.3f}' for k in known)}")
        if (start := time.time()) < self.next and not is_last:
            return
        show_figure(plot_history(history, self.names, example), self.path, update=self.next > 0)
        self.next = time.time() + 20 * (time.time() - start)  # a GPU waits meanwhile
