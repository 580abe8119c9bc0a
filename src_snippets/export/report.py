"""A report of a run: one HTML file that needs nothing beside it."""

# %% [markdown]
# ### Keep a report of this run
# Scores, figures, counts, settings, data and versions in one HTML file, which opens without
# internet and can be sent by mail. Figures are those in the folder `figures` beside it, so it comes
# last.

# %%
# @title write_report: one page for all
from base64 import b64encode
from importlib import metadata
import os
from pathlib import Path
import platform

from jinja2 import Environment
import pandas as pd

from src_snippets.data.drawing import CAPTIONS
from src_snippets.setup.files import atomic_write

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>body { font: 16px/1.5 sans-serif; max-width: 64rem; margin: auto; padding: 1rem }
img { max-width: 100% } div { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .1rem .7rem; text-align: right }</style></head><body><h1>{{ title }}</h1>
{% for line in lines %}<p>{{ line }}</p>{% endfor %}
<p>{% for name in exports %}<a href="exports/{{ name | urlencode }}">{{ name }}</a> {% endfor %}</p>
{% for name, table in tables.items() %}<h2>{{ name }}</h2><div>{{ table | safe }}</div>
{% if loop.first %}{% for png, heading, caption in figures %}<h2>{{ heading }}</h2><figure>
<img alt="{{ heading }}: {{ caption }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endif %}{% endfor %}</body></html>"""


def environment_table(gpu: str) -> pd.DataFrame:
    """Python, system, cores, GPU, and the versions of packages that shape results."""
    names = ("torch", "torchvision", "timm", "accelerate", "numpy", "pycocotools", "tifffile")
    rows = {"Python": platform.python_version(), "system": platform.platform()}
    rows |= {"CPU cores": os.cpu_count(), "GPU": gpu or "none"}
    rows |= {name: metadata.version(name) for name in names}
    return pd.DataFrame({"value": rows})


def write_report(path: Path, title: str, notes: list[str], tables: dict, since=0.0) -> None:
    """Write notes, tables by heading, `figures` of `since` on, links to `exports` beside `path`."""
    options = dict(border=0, na_rep="-", float_format="{:.3f}".format)
    tables = {name: t.to_html(**options) for name, t in tables.items() if t is not None}
    figures = []
    for name, text in CAPTIONS.items():
        for file in sorted(path.parent.glob(f"figures/{name}*.png")):  # history1.png: a fold
            if file.stat().st_mtime >= since:
                figures.append((b64encode(file.read_bytes()).decode(), *text.split(": ", 1)))
    files = sorted(path.parent.glob("exports/[!.]*"))
    exports = [file.name for file in files if file.stat().st_mtime >= since]
    content = dict(title=title, lines=notes, tables=tables, figures=figures, exports=exports)
    with atomic_write(path) as partial:
        page = Environment(autoescape=True).from_string(PAGE).render(content)
        partial.write_text(page, encoding="utf-8")
    print(f"{path}: a report of this run, {path.stat().st_size / 1e6:.1f} MB")
