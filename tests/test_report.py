"""The report: all of it in one file, names never taken for code."""

from html.parser import HTMLParser
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
from PIL import Image
import pytest

from src_snippets.data.drawing import CAPTIONS
from src_snippets.export.report import environment_table, write_report
from src_snippets.setup.config import config_table, make_config


class Page(HTMLParser):
    """Collects what a page shows and asks for."""

    def __init__(self, text):
        super().__init__()
        self.links, self.texts, self.tags, self.alts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        self.alts += [value for key, value in attrs if key == "alt"]

    def handle_data(self, data):
        self.texts.append(data)


def save_figure(folder, name):
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{name}.png")


def write(path, notes=(), scores=None, facts=(), counts=None, since=0.0, **changes):
    config = make_config("demo", **changes)
    tables = {"Scores": scores, "Data": pd.Series(dict(facts), dtype=object).to_frame("value")}
    tables |= {"Environment": environment_table(""), "Settings": config_table(config).astype(str)}
    write_report(path, "Cells in <data>", notes, tables | {"Exported cells": counts}, since)
    return Page(path.read_text())


@pytest.fixture
def page(tmp_path):
    for name in ("samples", "history1", "history2", "predictions", "unknown"):
        save_figure(tmp_path / "figures", name)
    names = ["as submitted", "<script>alert(1)</script>"]
    scores = pd.DataFrame({"AP50": [0.51234, np.nan]}, names)
    counts = pd.DataFrame({"image": ["one"], "all": [42]})
    facts = {"fingerprint": "abc & def"}
    notes = ["AP50 from 0.250 to 0.750"]
    return write(tmp_path / "report.html", notes, scores, facts, counts, epochs=17)


def test_everything_is_inside_and_in_order(page):
    text = " ".join(page.texts)
    for part in ("abc & def", "Cells in <data>", "0.512", "AP50 from 0.250 to 0.750"):
        assert part in text
    cells = [texts.strip() for texts in page.texts]
    assert {"-", "42", "epochs", "17", "lr", "0.0001", "none", "torch"} <= set(
        cells
    )  # a score is not defined
    assert "script" not in page.tags  # names are text, never code
    assert "<script>alert(1)</script>" in text


def test_it_links_to_the_exports_beside_it(tmp_path):
    for name in ("a b", "labels"):
        (tmp_path / "exports" / name).mkdir(parents=True)
    assert write(tmp_path / "report.html").links == ["exports/a%20b", "exports/labels"]
    os.utime(tmp_path / "exports" / "a b", (1e9, 1e9))  # of an earlier run
    assert write(tmp_path / "report.html", since=1e9 + 1).links == ["exports/labels"]


def test_figures_have_headings_captions_and_alt_texts(page):
    assert page.tags.count("img") == 4  # what has no caption is not shown
    assert page.tags.count("h2") == 4 + 5  # before each of them and each table
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    order = [CAPTIONS[name] for name in ("predictions", "history", "history", "samples")]
    assert page.alts == order
    for alt in page.alts:
        heading, caption = alt.split(": ", 1)
        assert heading in page.texts
        assert caption in page.texts
        assert caption.endswith(".")


def test_figures_of_an_earlier_run_stay_out(tmp_path):
    for name in ("samples", "history1"):
        save_figure(tmp_path / "figures", name)
    os.utime(tmp_path / "figures" / "history1.png", (1e9, 1e9))
    assert write(tmp_path / "report.html", since=1e9 + 1).alts == [CAPTIONS["samples"]]
    assert write(tmp_path / "report.html", since=1e9).tags.count("img") == 2


def test_nothing_to_show_is_a_report_too(tmp_path):
    page = write(tmp_path / "report.html")
    assert "img" not in page.tags
    assert not {"None", "nan"} & set(page.texts)
    assert page.tags.count("h2") == 3  # no scores, no exported cells


def test_the_environment_names_versions():
    values = environment_table("Tesla T4").value
    assert values["GPU"] == "Tesla T4"
    assert values["torch"][0].isdigit()
    assert environment_table("").value["GPU"] == "none"


def test_a_browser_opens_it_without_errors(page, tmp_path):
    """In headless Chromium; `tests.client` watches its requests too."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not there; on Debian: apt-get install chromium")
    image = tmp_path / "report.png"
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    command = [chromium, *options.split(), f"--screenshot={image}"]
    url = (tmp_path / "report.html").as_uri()
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert image.stat().st_size > 5000
