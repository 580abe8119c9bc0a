import json
from pathlib import Path

import IPython
import numpy as np
import pandas as pd
import pytest

from src_snippets.setup import files
from src_snippets.setup.files import (
    atomic_write,
    keep_going,
    output_folder,
    show_table,
    write_json,
)


def test_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "KAGGLE_WORKING", tmp_path / "absent")
    assert list(output_folder(str(tmp_path / "deep" / "out")).iterdir()) == []
    assert output_folder("") == Path("results")
    monkeypatch.setattr(files, "KAGGLE_WORKING", tmp_path)
    assert output_folder("") == tmp_path


def fail_halfway(path):
    with atomic_write(path) as partial:
        partial.write_text("half")
        assert partial.parent == path.parent
        raise RuntimeError("full disk")


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(RuntimeError, match="full disk"):
        fail_halfway(path)
    assert list(tmp_path.iterdir()) == []
    with atomic_write(path) as partial:
        partial.write_text("old")
        assert not path.exists()
    before = path.stat().st_ino
    with pytest.raises(RuntimeError, match="full disk"):
        fail_halfway(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    write_json([1, {"a": None}], path)
    assert json.loads(path.read_text()) == [1, {"a": None}]
    assert path.stat().st_ino != before  # renamed, not copied into the old file
    with pytest.raises(ValueError, match="JSON"):
        write_json([float("nan")], path)
    assert json.loads(path.read_text()) == [1, {"a": None}]


def test_an_optional_part_that_fails_is_shown_and_the_rest_goes_on(capsys):
    with keep_going("the figure"):
        raise ZeroDivisionError("no cells")
    out = capsys.readouterr().out
    assert out.startswith("the figure failed")
    assert "ZeroDivisionError: no cells" in out
    with pytest.raises(KeyboardInterrupt), keep_going("the figure"):
        raise KeyboardInterrupt


def test_tables_are_printed_or_displayed_as_they_are(monkeypatch, capsys):
    table = pd.DataFrame({"$a_1$": [0.12345, np.nan]})
    show_table(table)
    assert capsys.readouterr().out.split() == ["$a_1$", "0", "0.123", "1", "-"]
    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    show_table(table)
    html = shown[0].to_html()
    assert "$a_1$" in html
    assert "0.123<" in html
    assert 'class="tex2jax_ignore' in html  # a name with dollars is no formula
    show_table(pd.DataFrame({"<b>c": ["<b>v"]}, index=["<b>i"]))
    assert "<b>" not in shown[1].to_html()
    assert shown[1].to_html().count("&lt;b&gt;") == 3
