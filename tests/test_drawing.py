from dataclasses import replace
import io
from pathlib import Path

import IPython
import numpy as np
from PIL import Image
import pytest

from src_snippets.data.drawing import (
    brighten,
    CAPTIONS,
    class_color,
    draw_outlines,
    plot_predictions,
    plot_samples,
    show_figure,
)
from src_snippets.data.rle import encode_masks
from src_snippets.data.structures import ground_truth
from tests.conftest import empty_sample, make_sample

NAMES = ["epithelial", "lymphocyte", "macrophage", "neutrophil"]


@pytest.fixture
def sample():
    """Grey, 40 x 60 px, with a cell of class 1 and one of class 2."""
    maps = np.zeros((2, 40, 60), np.int64)
    maps[0, 10:20, 10:30], maps[1, 25:35, 40:55] = 1, 1
    one = make_sample(maps, [1, 2])
    one.image[:] = 128
    return one


def rgb(label):
    return [int(class_color(label)[i : i + 2], 16) for i in (1, 3, 5)]


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_outlines_lie_on_the_border_in_the_class_colour(sample):
    drawn = draw_outlines(sample.image.numpy(), ground_truth(sample), side=60)
    grey = [128] * 3
    assert drawn.shape == (40, 60, 3)
    assert drawn[10, 15].tolist() == drawn[9, 15].tolist() == rgb(1)
    assert drawn[34, 45].tolist() == drawn[35, 45].tolist() == rgb(2)
    assert drawn[11, 15].tolist() == drawn[8, 15].tolist() == grey
    colors = {tuple(color) for color in drawn.reshape(-1, 3).tolist()}
    assert colors == {tuple(grey), tuple(rgb(1)), tuple(rgb(2))}
    assert (sample.image == 128).all()


def test_the_best_outline_is_on_top(sample):
    both = ground_truth(make_sample([np.ones((9, 9), int), np.pad([[1]], 4)], [1, 2]))
    for scores, label in (([0.9, 0.1], 1), ([0.1, 0.9], 2)):
        both.scores[:] = scores
        drawn = draw_outlines(np.full((3, 9, 9), 128, np.uint8), both, side=9)
        assert (drawn == rgb(2)).all(-1).any() == (label == 2)


def test_small_images_are_enlarged_and_large_ones_get_thicker_lines(sample):
    drawn = draw_outlines(sample.image.numpy(), ground_truth(sample), side=480)
    assert drawn.shape == (320, 480, 3)
    assert (drawn[:, 160] == rgb(1)).all(-1).sum() == 4  # two lines of two pixels
    ids = np.zeros((100, 1400), np.int64)
    ids[20:80, 100:200] = 1
    large = make_sample([ids], [1])
    drawn = draw_outlines(large.image.numpy(), ground_truth(large))
    assert drawn.shape == (100, 1400, 3)
    assert (drawn[:, 150] == rgb(1)).all(-1).sum() == 8


def test_nothing_to_outline():
    sample = empty_sample()
    drawn = draw_outlines(sample.image.numpy(), ground_truth(sample), side=50)
    assert np.array_equal(np.moveaxis(drawn, 2, 0), sample.image.numpy())


def test_colours_repeat():
    assert class_color(1) == class_color(8) != class_color(2)


def test_dark_images_are_drawn_brighter_and_others_as_they_are():
    dark = np.zeros((3, 20, 30), np.uint8)
    dark[:, 5:15, 5:15] = 46
    assert brighten(dark).shape == (20, 30, 3)
    assert brighten(dark).max() == 230
    light = dark + np.uint8(150)
    assert np.array_equal(brighten(light), np.moveaxis(light, 0, 2))
    assert not brighten(dark * 0).any()
    sparse = np.full((3, 520, 696), 8, np.uint8)
    sparse[2, 100:120, 100:120] = 90  # a blue nucleus on a thousandth of the image
    assert brighten(sparse).max() == 255
    assert np.median(brighten(sparse)) < 50
    sparse[:, :3] = 80  # the brightest of 0.6% of the pixels, but for a hot one
    sparse[:, 0, 0] = 99
    assert (brighten(sparse)[1] == 230).all()


def test_figures_say_what_they_show(sample):
    known = ground_truth(sample)
    figure = plot_samples([(sample.image.numpy(), known, "0123456789abcdef/image.tif")] * 2, NAMES)
    assert titles(figure) == ["0123456789ab  60 x 40 px"] * 2 + ["2 cells"] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    hidden = replace(
        known, rles=[known.rles[0], encode_masks(np.zeros((1, 1, 1)), [0], [0], 40, 60)[0]]
    )
    figure = plot_samples([(sample.image.numpy(), hidden, "a")], NAMES)  # a crop has cells outside
    assert titles(figure)[1] == "1 cells"
    wrong = ([1], [0, 1]), ([0, 1], [])
    figure = plot_predictions([sample, sample], [known, known.select([])], wrong, NAMES)
    assert titles(figure)[1:3] == [
        "ground truth: 2 cells, 1 missed",
        "prediction: 2 cells, 2 false positives",
    ]
    assert titles(figure)[5] == "prediction: 0 cells, 0 false positives"
    crosses = [axis.lines[0].get_xydata() for axis in figure.axes if axis.lines]
    assert [len(points) for points in crosses] == [1, 2, 2, 0]
    x1, y1, x2, y2 = known.boxes[1]  # 60 px are drawn 8 times as large
    assert crosses[0].tolist() == [[4 * (x1 + x2), 4 * (y1 + y2)]]
    assert not any(axis.axison for axis in figure.axes)


def test_tall_images_make_no_endless_figure():
    tall = empty_sample(600, 6)
    figure = plot_predictions([tall] * 3, [ground_truth(tall)] * 3, [([], [])] * 3, NAMES)
    assert figure.get_figheight() < 2 * figure.get_figwidth()


def test_many_long_names_take_several_rows(sample):
    names = [f"a long name of a class {k}" for k in range(9)]
    figure = plot_samples([(sample.image.numpy(), ground_truth(sample), "a")], names)
    figure.savefig(io.BytesIO())  # the layout is known once it is drawn
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_a_script_prints_where_the_figure_is(sample, tmp_path, capsys):
    path = tmp_path / "deep" / "figure.png"
    show_figure(plot_samples([(sample.image.numpy(), ground_truth(sample), "a")], NAMES), path)
    assert capsys.readouterr().out == f"figure: {path}\n"
    assert min(Image.open(path).size) > 400


def test_names_are_no_formulas(sample, tmp_path):
    names = ["$\\frac$", "a$1$", "Zelle ä", "µm"]  # the first is no formula that can be drawn
    figure = plot_samples([(sample.image.numpy(), ground_truth(sample), "x$^$.png")], names)
    show_figure(figure, tmp_path / "figure.png")
    texts = [*figure.legends[0].get_texts(), figure.axes[0].title]
    assert [text.get_text() for text in texts[:4]] == names
    assert not any(text.get_parse_math() for text in texts if "$" in text.get_text())
    axis = figure.axes[0]
    axis.set_axis_on()
    axis.set(yscale="symlog", ylim=(0, 1000))
    show_figure(figure, tmp_path / "figure.png")
    ticks = [tick for tick in axis.get_yticklabels() if "10^{" in tick.get_text()]
    assert ticks  # numbers of axes stay formulas
    assert all(tick.get_parse_math() for tick in ticks)


def test_a_notebook_displays_the_figure_with_a_text(sample, tmp_path, monkeypatch):
    displayed = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(IPython.display, "display", displayed.append)
    figure = plot_samples([(sample.image.numpy(), ground_truth(sample), "a")], NAMES)
    for name, text in (("samples", "samples"), ("history12", "history")):  # 12: a fold
        show_figure(figure, tmp_path / f"{name}.png")
        assert displayed[-1].data == Path(tmp_path, f"{name}.png").read_bytes()
        assert displayed[-1].metadata["alt"] == CAPTIONS[text]
