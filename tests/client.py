"""The committed notebook in a real JupyterLab, clicked in headless Chromium.

`python -m tests.client`

Needs Chromium (on Debian `apt-get install chromium`); JupyterLab and Playwright are installed into
`.environments/client`, the notebook's kernel is this Python. In an empty folder the notebook is
opened, links of its contents followed, a folded cell opened and folded again, Run All clicked; the
bar and the live figure are watched. At the end screens to the settings, to the first picture and to
the score are counted, the download link gives the submission, and the report opens without errors
or requests. Screenshots go to `--out`.
"""

import argparse
import io
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".environments" / "client"
PACKAGES = ("jupyterlab>=4.4", "playwright>=1.50")
TOKEN = "client"
SETTINGS, TRAINING = "Settings: change them here", "Training"  # titles of the notebook
HEIGHT = 950  # px of the window


def build() -> Path:
    """Makes the environment; its Python."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    kernel = [sys.executable, "-m", "ipykernel", "install", "--name", "python3"]
    subprocess.run([*kernel, "--prefix", ENVIRONMENT], check=True, capture_output=True)
    return python


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """Starts JupyterLab in a folder; the process, and its address."""
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HW3_")}
    server = subprocess.Popen(command, cwd=folder, env=kept, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            return server, found[0]
    raise RuntimeError("JupyterLab did not start")


class Client:
    """A page of JupyterLab with the notebook open.

    Args:
        page: of Playwright; address: of the server; out: folder of the screenshots.
    """

    def __init__(self, page, address: str, out: Path):
        self.page, self.out, self.errors = page, out, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{address}lab/tree/hw3.ipynb?token={TOKEN}")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_timeout(10_000)  # titles can be jumped to once they are drawn
        for name in ("No", "Dismiss"):  # news, build proposals
            if page.get_by_role("button", name=name, exact=True).count():
                page.get_by_role("button", name=name, exact=True).first.click()

    def shoot(self, name: str) -> None:
        """Writes a screenshot."""
        self.page.screenshot(path=self.out / f"{name}.png")

    def scroll(self, top: float) -> None:
        """Scrolls the notebook to `top` px."""
        outer = self.page.locator(".jp-WindowedPanel-outer").first
        outer.evaluate("(e, top) => { e.scrollTop = top }", top)
        self.page.wait_for_timeout(1500)

    def read_through(self) -> None:
        """Scrolls to the end once; until then JupyterLab takes folded cells for as high as open."""
        outer, top = self.page.locator(".jp-WindowedPanel-outer").first, 0
        while top < outer.evaluate("e => e.scrollHeight"):
            self.scroll(top)
            top += HEIGHT

    def follow_contents(self) -> None:
        """Links of the contents bring their titles into view."""
        self.read_through()
        for title in (TRAINING, SETTINGS):
            self.scroll(0)
            self.page.locator(".jp-MarkdownOutput a", has_text=title).first.click()
            self.page.wait_for_timeout(2500)
            box = self.page.locator("h2, h3", has_text=title).first.bounding_box()
            assert box, f"{title}: the title that the contents lead to is not there"
            assert 0 <= box["y"] < HEIGHT, box
        self.shoot("1-contents")

    def fold(self) -> None:
        """A folded cell of definitions shows its title, opens by a click and folds by another."""
        self.scroll(0)
        bars = self.page.locator(".jp-CodeCell .jp-Placeholder")
        assert "# @title" in bars.first.inner_text(), "a folded cell does not show its title"
        before = bars.count()
        cell = self.page.locator(".jp-CodeCell").filter(has=self.page.locator(".jp-Placeholder"))
        number = cell.first.get_attribute("data-windowed-list-index")
        cell = self.page.locator(f".jp-CodeCell[data-windowed-list-index='{number}']")
        self.shoot("2-folded")
        cell.locator(".jp-Placeholder").first.click()
        cell.locator(".jp-Editor").first.wait_for(timeout=5000)
        assert cell.locator(".jp-Placeholder").count() == 0
        cell.locator(".jp-InputCollapser .jp-Collapser-child").first.click()
        cell.locator(".jp-Placeholder").first.wait_for(timeout=5000)
        assert bars.count() == before
        title = self.page.locator("h2, h3", has_text=SETTINGS).first
        title.scroll_into_view_if_needed()
        self.page.wait_for_timeout(1500)
        self.shoot("3-settings")

    def count_screens(self) -> dict[str, float]:
        """Screens from the top to the settings cell, to the first picture and to the score."""
        targets = {
            "settings": ".jp-CodeCell .cm-content:has-text('RECIPE =')",
            "first picture": ".jp-CodeCell .jp-OutputArea-output img",
            "score": ".jp-CodeCell .jp-OutputArea-output:has-text('as submitted')",
        }
        outer = self.page.locator(".jp-WindowedPanel-outer").first
        screen, last = outer.evaluate("e => [e.clientHeight, e.scrollHeight]")
        screens, top = {}, 0.0
        while top < last and len(screens) < len(targets):
            self.scroll(top)
            start = outer.bounding_box()["y"]
            for name, selector in targets.items():
                found = self.page.locator(selector)
                box = found.first.bounding_box() if found.count() else None
                if name not in screens and box and box["y"] < start + screen:
                    screens[name] = round((top + box["y"] - start) / screen, 1)
            top, last = top + screen, outer.evaluate("e => e.scrollHeight")
        assert len(screens) == len(targets), (
            f"not seen while scrolling: {set(targets) - {*screens}}"
        )
        return screens

    def run_all(self) -> None:
        """Clicks Run All."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()

    def watch(self, folder: Path, minutes: float) -> dict[str, int]:
        """Watches the run to its end; returns how many states of bar and figure there were.

        Raises:
            RuntimeError: a cell failed, or it took too long.
        """
        bars, pictures, end = set(), set(), time.monotonic() + 60 * minutes
        results = folder / "results"
        while time.monotonic() < end:
            self.page.wait_for_timeout(700)
            bar = self.page.locator(".jp-OutputArea-output", has_text="training:")
            if bar.count():
                training = bar.first
                training.scroll_into_view_if_needed()
                bars.add("".join(bar.all_inner_texts()))
                cell = training.locator("xpath=ancestor::div[contains(@class, 'jp-CodeCell')]")
                image = cell.locator("img")
                if image.count():
                    pictures.add(image.first.get_attribute("src")[-3000:])
                    if len(pictures) == 3:
                        self.shoot("4-training")
            failed = self.page.locator(".jp-RenderedText[data-mime-type*='error']")
            skipped = self.page.locator(".jp-RenderedText", has_text="the rest goes on")
            if failed.count() or skipped.count():
                first = (failed if failed.count() else skipped).first
                first.scroll_into_view_if_needed()
                self.shoot("failed")
                raise RuntimeError(f"a cell failed, see failed.png:\n{first.inner_text()}")
            busy = self.page.locator(".jp-InputPrompt", has_text="[*]").count()
            if (results / "report.html").exists() and not busy:
                return dict(bars=len(bars), pictures=len(pictures))
        self.shoot("late")
        raise RuntimeError("it did not come to its end in time: see late.png")

    def download(self) -> bytes:
        """Clicks the link of the last cell; returns the file that the browser then saves."""
        link = self.page.locator(".jp-OutputArea-output a", has_text="test-results.zip").last
        link.scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)
        self.shoot("5-link")
        saved = []

        def keep(download) -> None:
            saved.append(download)

        self.page.on("download", keep)
        self.page.context.on("page", lambda page: page.on("download", keep))
        link.click()
        for _ in range(40):
            self.page.wait_for_timeout(500)
            if saved:
                return Path(saved[0].path()).read_bytes()
        raise RuntimeError("the link gave no file")


def open_report(browser, path: Path, out: Path) -> None:
    """Opens the report in a browser without any connection."""
    context = browser.new_context(offline=True, viewport={"width": 1100, "height": 900})
    page, requests, errors = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(path.as_uri())
    others = [url for url in requests if not url.startswith(("data:", path.as_uri()))]
    assert not others, others
    assert not errors, errors
    widths = page.eval_on_selector_all("img", "all => all.map(i => i.naturalWidth)")
    assert len(widths) > 5
    assert min(widths) > 0
    page.screenshot(path=out / "6-report.png", full_page=True)


def drive(folder: Path, out: Path, minutes: float) -> None:
    """Everything, in the environment that has JupyterLab and Playwright."""
    from playwright.sync_api import sync_playwright

    out.mkdir(parents=True, exist_ok=True)
    server, address = serve(folder)
    try:
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("chromium-browser")
            options = dict(executable_path=chromium, args=["--no-sandbox"])
            browser = playwright.chromium.launch(**options)
            page = browser.new_page(viewport={"width": 1400, "height": HEIGHT})
            client = Client(page, address, out)
            client.follow_contents()
            client.fold()
            client.run_all()
            states = client.watch(folder, minutes)
            screens = client.count_screens()
            archive = client.download()
            with zipfile.ZipFile(io.BytesIO(archive)) as file:
                results = json.loads(file.read("test-results.json"))
            assert states["bars"] > 5, states
            assert states["pictures"] > 3, states
            assert not client.errors, client.errors
            open_report(browser, folder / "results" / "report.html", out)
            print(f"run to its end; states: {states}; {len(results)} detections downloaded")
            print(f"screens of {HEIGHT} px from the top: {screens}")
    finally:
        server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "client")
    parser.add_argument("--minutes", type=float, default=10.0, help="for the notebook, at most")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.out.resolve(), options.minutes)
        return
    python = build()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "hw3.ipynb", folder)
        command = [python, __file__, "--drive", folder, "--out", options.out.resolve()]
        subprocess.run([*command, "--minutes", str(options.minutes)], check=True)


if __name__ == "__main__":
    main()
