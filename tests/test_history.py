import IPython
import numpy as np
import pytest

from src_snippets.data.structures import ground_truth
from src_snippets.training.history import LiveHistory, plot_history
from tests.conftest import make_sample

NAMES = ["epithelial", "lymphocyte"]
LOSSES = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")
ROW = {f"loss_{name}": 1.0 for name in LOSSES} | dict(lr=0.1, loss=5.0)


@pytest.fixture
def example():
    sample = make_sample([np.eye(30, 40, dtype=int)], [2])
    return sample, ground_truth(sample).select([])


def curves(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.lines}


def test_curves_of_losses_and_scores():
    rows = [
        ROW | dict(epoch=1),
        ROW | dict(epoch=2, loss=4.0, AP=0.1, AP50=0.3, AP75=None, val_loss=6.0),
        ROW | dict(epoch=3, loss=3.0, AP=0.2, AP50=0.4, AP75=None, val_loss=None),
    ]
    losses, scores = plot_history(rows, NAMES).axes
    drawn = curves(losses)
    assert drawn.pop("loss") == [[1, 5], [2, 4], [3, 3]]
    assert drawn.pop("val loss") == [[2, 6]]
    assert drawn == {f"loss {n.replace('_', ' ')}": [[1, 1], [2, 1], [3, 1]] for n in LOSSES}
    assert curves(scores) == {"AP": [[2, 0.1], [3, 0.2]], "AP50": [[2, 0.3], [3, 0.4]]}
    assert scores.get_ylim() == (0, 1)
    assert losses.get_ylim()[0] == 0


@pytest.mark.filterwarnings("error")
def test_histories_without_scores_and_without_epochs():
    for rows in ([], [ROW | dict(epoch=1)], [ROW | dict(epoch=1, AP=None, AP50=None, AP75=None)]):
        _, scores = plot_history(rows, NAMES).axes
        assert not scores.lines


def test_an_example_is_drawn_below_beside_its_ground_truth(example):
    figure = plot_history([ROW | dict(epoch=1)], NAMES, example)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Losses", "Validation", "ground truth: 1 cells", "prediction: 0 cells"]
    known, prediction = (axis.images[0].get_array() for axis in figure.axes[2:])
    assert (known != prediction).any()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES


def test_a_script_prints_a_line_per_epoch_and_draws_anew(example, tmp_path, capsys):
    live = LiveHistory(tmp_path / "figures" / "history.png", NAMES)
    history = [ROW | dict(epoch=1, AP50=None)]
    live(history)
    first = live.path.read_bytes()
    history.append(ROW | dict(epoch=2, AP50=0.0, val_loss=0.5))
    live(history, example)
    assert live.path.read_bytes() == first  # it was drawn just now
    live.next = 1  # long ago
    live(history[1:], example)
    assert live.path.read_bytes() != first
    live.path.unlink()
    live(history, example, is_last=True)  # the epoch is printed already
    assert live.path.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 1: loss 5.000",
        f"figure: {live.path}",
        *["epoch 2: loss 5.000, AP50 0.000, val_loss 0.500"] * 2,
    ]


def test_a_notebook_updates_one_display(tmp_path, monkeypatch, capsys):
    displayed = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(
        IPython.display, "display", lambda image, **where: displayed.append((image, where))
    )
    live = LiveHistory(tmp_path / "history.png", NAMES)
    for _ in range(3):
        live.next = min(live.next, 1.0)  # long ago
        live([ROW | dict(epoch=1)])
    assert [where["update"] for _, where in displayed] == [False, True, True]
    assert len({where["display_id"] for _, where in displayed}) == 1
    assert all(image.metadata["alt"] for image, _ in displayed)
    assert capsys.readouterr().out == ""
