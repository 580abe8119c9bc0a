from html.parser import HTMLParser
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest

from src_snippets.report import CAPTIONS, environment, find_figures, write_report


class Page(HTMLParser):
    """Collects what a page shows and asks for."""

    def __init__(self, text):
        super().__init__()
        self.links, self.texts, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


def save_figure(folder, name):
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{name}.png")


@pytest.fixture
def report(tmp_path):
    for name in ("samples", "history1", "history2", "predictions", "unknown"):
        save_figure(tmp_path / "figures", name)
    path = tmp_path / "report.html"
    rows = [("", "AP50"), ("all", "0.5"), ("<script>alert(1)</script>", "0.25")]
    parts = {"Data": {"fingerprint": "abc & def"}, "Environment": environment("")}
    write_report(path, "Cells in <data>", ["AP50 0.5"], rows, parts, "  * epochs 3")
    return path


def test_everything_is_inside_and_in_order(report, capsys):
    page = Page(report.read_text())
    assert page.tags.count("img") == 4  # what has no caption is not shown
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    text = " ".join(page.texts)
    assert text.index("Losses, validation scores") < text.index("Validation fields")
    assert "abc & def" in text
    assert "Cells in <data>" in text
    assert "script" not in page.tags  # names are text, never code
    assert "<script>alert(1)</script>" in text


def test_nothing_to_show_is_a_report_too(tmp_path):
    write_report(tmp_path / "report.html", "Title", [], [], {}, "")
    page = Page((tmp_path / "report.html").read_text())
    assert "img" not in page.tags
    assert "table" not in page.tags
    assert find_figures(tmp_path / "absent") == []


def test_the_environment_names_versions():
    found = environment("Tesla T4")
    assert found["GPU"] == "Tesla T4"
    assert found["torch"][0].isdigit()
    assert environment("")["GPU"] == "none"


def test_every_caption_is_a_sentence():
    assert all(caption.endswith(".") for caption in CAPTIONS.values())


def test_a_browser_opens_it_without_errors(report, tmp_path):
    """In headless Chromium; `tests.client` watches its requests too."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not there; on Debian: apt-get install chromium")
    picture = tmp_path / "report.png"
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    command = [chromium, *options.split(), f"--screenshot={picture}"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", report.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert picture.stat().st_size > 5000
