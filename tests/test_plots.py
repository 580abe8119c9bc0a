import io

import IPython
import numpy as np
from PIL import Image
import pytest

from src_snippets.forms import truth_instances
from src_snippets.plots import (
    as_picture,
    class_color,
    enlarge,
    epoch_line,
    LiveHistory,
    outline_cells,
    plot_anchors,
    plot_augmentations,
    plot_counts,
    plot_fields,
    plot_history,
    plot_predictions,
    plot_schedule,
    show_figure,
    visible_truth,
)
from tests.conftest import empty_sample, make_sample

NAMES = ["epithelial", "lymphocyte", "macrophage", "neutrophil"]


@pytest.fixture
def sample():
    ids = np.zeros((40, 60), np.int64)
    ids[10:20, 10:30], ids[25:35, 40:55] = 1, 2
    one = make_sample([np.where(ids == 1, 1, 0), np.where(ids == 2, 1, 0)], [1, 2])
    one.image[:] = 128
    return one


def rgb(label):
    return [int(class_color(label)[i : i + 2], 16) for i in (1, 3, 5)]


def test_outlines_sit_on_the_border_in_the_class_colour(sample):
    picture = outline_cells(sample.image.numpy(), truth_instances(sample), side=60)
    assert picture.shape == (40, 60, 3)
    assert picture[10, 15].tolist() == rgb(1)
    assert picture[25, 45].tolist() == rgb(2)
    assert picture[15, 20].tolist() == [128, 128, 128]  # inside
    assert picture[5, 5].tolist() == [128, 128, 128]  # outside
    assert {tuple(c) for c in picture.reshape(-1, 3).tolist()} == {
        (128, 128, 128),
        tuple(rgb(1)),
        tuple(rgb(2)),
    }
    assert (sample.image == 128).all()


def test_small_fields_are_enlarged(sample):
    assert outline_cells(sample.image.numpy(), truth_instances(sample), side=480).shape[0] == 320
    assert enlarge(np.array([[1, 2]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_nothing_to_outline():
    sample = empty_sample()
    picture = outline_cells(sample.image.numpy(), truth_instances(sample), side=50)
    assert np.array_equal(np.moveaxis(picture, 2, 0), sample.image.numpy())


def test_colours_repeat():
    assert class_color(1) == class_color(8) != class_color(2)


def test_cells_that_left_a_crop_are_not_counted(sample):
    sample.layers[sample.layers == 2] = 0
    assert visible_truth(sample).labels.tolist() == [1]


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_figures_say_what_they_show(sample, tmp_path):
    truth = truth_instances(sample)
    figure = plot_fields([(sample.image.numpy(), truth, "0123456789abcdef/image.tif")] * 2, NAMES)
    assert titles(figure) == ["0123456789ab  60 x 40 px"] * 2 + ["2 cells"] * 2
    assert [t.get_text() for t in figure.legends[0].get_texts()] == NAMES
    figure = plot_predictions([sample, sample], [truth, truth.select([])], NAMES)
    assert titles(figure)[1:3] == ["truth: 2 cells", "found: 2 cells"]
    assert titles(figure)[5] == "found: 0 cells"
    figure = plot_augmentations(sample, [sample] * 5, NAMES)
    assert titles(figure) == ["as it is", *(f"variant {k}" for k in range(1, 6))]
    show_figure(figure, tmp_path / "deep" / "figure.png")
    assert min(Image.open(tmp_path / "deep" / "figure.png").size) > 400


def test_dark_fields_are_shown_brighter_and_others_as_they_are():
    dark = np.zeros((3, 20, 30), np.uint8)
    dark[:, 5:15, 5:15] = 46
    assert as_picture(dark).shape == (20, 30, 3)
    assert as_picture(dark).max() == 230
    light = dark + np.uint8(150)
    assert np.array_equal(as_picture(light), np.moveaxis(light, 0, 2))
    assert not as_picture(dark * 0).any()
    sparse = np.full((3, 520, 696), 8, np.uint8)
    sparse[2, 100:120, 100:120] = 90  # a blue nucleus on a thousandth of the field
    assert as_picture(sparse).max() == 255
    assert np.median(as_picture(sparse)) < 50


def test_counts_by_class(sample):
    truth = truth_instances(sample)
    figure = plot_counts([truth, truth], [truth], NAMES[:3])
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [2, 2, 0, 1, 1, 0]
    assert [bar.get_height() for bar in plot_counts([], [], NAMES[:2]).axes[0].patches] == [0] * 4


def test_history_curves():
    losses = dict.fromkeys(
        ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"), 1.0
    )
    rows = [
        dict(epoch=1, rate=0.1, **losses),
        dict(epoch=2, rate=0.0, AP=0.1, AP50=0.3, AP75=None, **losses),
    ]
    figure = plot_history(rows, NAMES)
    assert titles(figure) == ["Training losses", "Validation", "Learning rate", ""]
    assert len(figure.axes[0].lines) == 5
    assert {line.get_label(): line.get_ydata()[0] for line in figure.axes[1].lines} == {
        "AP": 0.1,
        "AP50": 0.3,
    }


def test_many_long_names_take_several_rows(sample):
    truth, names = truth_instances(sample), [f"a long name of a class {k}" for k in range(9)]
    figure = plot_fields([(sample.image.numpy(), truth, "a")], names)
    legend, figure_box = figure.legends[0], figure.bbox
    figure.savefig(io.BytesIO())  # places are known once it is drawn
    box = legend.get_window_extent()
    assert figure_box.x0 <= box.x0
    assert box.x1 <= figure_box.x1


ROW = dict.fromkeys(
    ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"), 1.0
) | dict(rate=0.1, loss=5.0)


def test_an_epoch_in_a_line():
    assert epoch_line(dict(epoch=3, **ROW)) == "epoch 3: loss 5.000"
    told = epoch_line(dict(epoch=4, AP50=0.25, val_loss=0.5, **ROW))
    assert told == "epoch 4: loss 5.000, AP50 0.250, val_loss 0.500"
    assert epoch_line(dict(epoch=4, AP50=None, **ROW)) == "epoch 4: loss 5.000"


def test_a_script_tells_epochs_and_keeps_the_last_picture(sample, tmp_path, capsys):
    live = LiveHistory(tmp_path / "figures" / "history.png", NAMES, pause=1000)
    history = [dict(epoch=1, **ROW)]
    live(history)
    first = live.path.read_bytes()
    history.append(dict(epoch=2, AP50=0.5, AP=0.2, AP75=0.1, **ROW))
    live(history)  # too soon for another picture
    assert live.path.read_bytes() == first
    live(history, (sample, truth_instances(sample)), is_last=True)
    assert live.path.read_bytes() != first
    assert capsys.readouterr().out.count("epoch") == 2


class Handle:
    """Stands for what `display` gives."""

    def __init__(self):
        self.updated = []

    def update(self, picture):
        self.updated.append(picture)


def test_a_notebook_shows_one_picture_anew(tmp_path, monkeypatch, capsys):
    shown, handle = [], Handle()
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(
        IPython.display, "display", lambda picture, display_id: shown.append(picture) or handle
    )
    live = LiveHistory(tmp_path / "history.png", NAMES, pause=0)
    for _ in range(3):
        live([dict(epoch=1, **ROW)])
    assert (len(shown), len(handle.updated)) == (1, 2)
    assert "epoch" not in capsys.readouterr().out


def test_history_with_a_field(sample):
    rows = [dict(epoch=1, **ROW)]
    figure = plot_history(rows, NAMES[:3], (sample, truth_instances(sample)))
    assert titles(figure)[3] == "found 2, there are 2"


def test_schedule_and_anchors():
    (axis,) = plot_schedule([0.1, 0.2, 0.1]).axes
    assert axis.lines[0].get_xdata().tolist() == [1, 2, 3]
    sides, covered = np.array([[8.0, 9.0], [90.0, 90.0], [9.0, 9.0]]), np.array([True, False, True])
    (axis,) = plot_anchors(sides, covered, np.array([[8.0, 8.0]])).axes
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["cell (2)", "cell without an anchor (1)", "anchor (1)"]
    plot_anchors(sides[:0], covered[:0], np.array([[8.0, 8.0]]))
