"""A report of a run: one HTML file that needs nothing beside it."""

# %% [markdown]
# ## What is to be kept of this run?
# One HTML file with numbers, figures, settings, versions and the fingerprint of the data. It opens
# without internet, can be sent by mail, and says how the numbers came about.

# %%
import base64
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
import io
import os
from pathlib import Path
import platform

from jinja2 import Environment
from PIL import Image

from src_snippets.places import written_whole

# %%
# Figures by file name, in the order of the report, with what to see in them.
CAPTIONS = {
    "history": "Losses, validation scores and rate by epoch.",
    "predictions": "Validation fields: as they are, their truth, and what was found.",
    "precision": "Precision over recall on the validation part: area is AP.",
    "confusions": "True against found classes; the last column is missed, the last row invented.",
    "mistakes": "The worst mistakes: true cells in their colours, what was found dashed.",
    "calibration": "Whether scores can be read as probabilities.",
    "floors": "Scores when detections below a floor are left out.",
    "counts": "Cells by class, true and found.",
    "count_errors": "Found against true cells, a dot an image and class.",
    "thresholds": "What was chosen for each class on the validation part.",
    "samples": "Training fields and their truth.",
    "augmentations": "A field as training sees it.",
    "anchors": "Sizes of cells and anchors, as the network sees them.",
    "schedule": "The rate of each step, as planned.",
    "test": "Images to answer, and the cells found in them.",
}

# %%
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 13px; }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>{% endfor %}
{% if rows %}<h2>Scores on the validation part</h2>
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
<h2>Figures</h2>
{% for name, picture, caption in figures %}<figure><img alt="{{ name }}" src="{{ picture }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
{% for heading, facts in parts.items() %}<h2>{{ heading }}</h2>
<dl>{% for name, value in facts.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endfor %}<h2>Settings</h2><pre>{{ settings }}</pre>
</body></html>
"""


# %%
def environment(gpu: str) -> dict[str, str]:
    """What this ran on: Python, system, cores, GPU, and the versions that shape results."""
    packages = ("torch", "torchvision", "timm", "accelerate", "numpy", "pycocotools", "tifffile")
    found = {"Python": platform.python_version(), "system": platform.platform()}
    found |= {"CPU cores": str(os.cpu_count()), "GPU": gpu or "none"}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def inlined(path: Path) -> str:
    """A picture as the text of a data URI, as WebP."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def find_figures(folder: Path) -> list[tuple[str, str, str]]:
    """Name, data URI and caption of each figure in a folder, in the order of `CAPTIONS`.

    Those of folds have a number behind their names.
    """
    found = []
    for name, caption in CAPTIONS.items():
        numbered = sorted(folder.glob(f"{name}[0-9]*.png"))
        for path in [folder / f"{name}.png", *numbered]:
            if path.is_file():
                found.append((path.stem, inlined(path), caption))
    return found


# %%
def write_report(
    path: Path,
    title: str,
    summary: Sequence[str],
    rows: Sequence[Sequence[str]],
    parts: Mapping[str, Mapping[str, str]],
    settings: str,
) -> None:
    """Writes the report; figures are those in `figures` beside it.

    Args:
        path: of the HTML file.
        summary: lines at the top; rows: a table with its header, or nothing.
        parts: facts by heading; settings: text.
    """
    page = Environment(autoescape=True).from_string(PAGE)
    figures = find_figures(path.parent / "figures")
    told = dict(title=title, summary=summary, rows=rows, parts=parts, settings=settings)
    with written_whole(path) as partial:
        partial.write_text(page.render(figures=figures, **told), encoding="utf-8")
    print(f"{path}: a report of this run, {path.stat().st_size / 1e6:.1f} MB")
