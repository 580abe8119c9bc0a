"""Builds `hw3.ipynb` from the story, and the README's table of settings from `config.py`.

`python -m src_snippets.assemble [--check] [--run]`. With `--run` the notebook is executed on the
drawn demo and keeps what it printed and drew; later builds keep that while no cell changes, and
drop it all when one does.
"""

import argparse
import ast
import base64
import copy
from dataclasses import dataclass, fields, replace
import difflib
import io
import os
from pathlib import Path
import re
import sys
import tempfile
from urllib.parse import quote

import nbclient
import nbformat
from PIL import Image

from src_snippets.config import Config

PACKAGE = "src_snippets"
FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
TABLE_BEGIN, TABLE_END = "<!-- settings: built from config.py -->\n", "<!-- end of settings -->\n"
COMMAND = f"python -m {PACKAGE}.assemble"
# Owner and name on GitHub: badges then open the notebook itself. Empty: pages to upload it to.
REPOSITORY = ""
METADATA = {
    # A GPU is chosen by itself where the notebook is uploaded.
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


@dataclass(frozen=True)
class Cell:
    """A cell of a percent-format file: `kind` is `code` or `markdown`."""

    kind: str
    source: str
    section: str


def read_cells(path: Path) -> list[Cell]:
    """Splits a percent-format file into cells; what stands before the first marker is left out."""
    pieces = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    cells = []
    for title, body in zip(pieces[::2], pieces[1::2], strict=True):
        if title.strip() not in ("", "[markdown]"):
            raise ValueError(f"{path}: cell marker '# %%{title}'; expected '# %%' or '[markdown]'")
        if title.strip():
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        kind = "markdown" if title.strip() else "code"
        if body.strip():
            cells.append(Cell(kind, body.strip("\n").rstrip(), path.stem))
    return cells


def imports_only(cell: Cell) -> list[ast.stmt] | None:
    """The import statements of a cell that holds nothing else, or None."""
    if cell.kind != "code":
        return None
    body = ast.parse(cell.source).body
    whole = body and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)
    return body if whole else None


def marked_section(nodes: list[ast.stmt]) -> str | None:
    """The section that an import cell of the story stands for, or None."""
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {m.removeprefix(f"{PACKAGE}.") for m in modules if m and m.startswith(f"{PACKAGE}.")}
    return names.pop() if len(names) == 1 and len(nodes) == 1 else None


def foreign_imports(nodes: list[ast.stmt]) -> set[tuple[str, str]]:
    """(module, name) of imports from outside the package; name is empty for `import module`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {
                (alias.name, f"as {alias.asname}" if alias.asname else "") for alias in node.names
            }
        elif not node.module.startswith(PACKAGE):
            if renamed := [alias.name for alias in node.names if alias.asname]:
                raise ValueError(f"from {node.module} import {renamed}: import by name, unaliased")
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def order_key(module: str) -> tuple:
    """Standard library before the rest, then by module, as ruff sorts."""
    return (module.split(".")[0] not in sys.stdlib_module_names, module.lower())


def format_imports(found: set[tuple[str, str]]) -> list[str]:
    """One statement a module, sorted: a text for the standard library, and one for the rest."""
    groups = {True: [], False: []}
    for module in sorted({m for m, _ in found}, key=order_key):
        lines = groups[order_key(module)[0]]
        names = sorted((n for m, n in found if m == module), key=lambda n: (n.lower(), n))
        lines += [f"import {module} {n}".rstrip() for n in names if not n or n.startswith("as ")]
        if members := [n for n in names if n and not n.startswith("as ")]:
            line = f"from {module} import {', '.join(members)}"
            if len(line) > 100:
                line = "\n".join([f"from {module} import (", *(f"    {n}," for n in members), ")"])
            lines.append(line)
    return ["\n".join(group) for group in (groups[False], groups[True]) if group]


def inline_sections(story: list[Cell]) -> tuple[list[Cell], int, set[tuple[str, str]]]:
    """Puts sections where they are marked and takes the imports out.

    Returns:
        The cells; the index of the cell that is to hold the gathered imports; those imports.
        Imports of cells above that index stay where they are.
    """
    cells, place, gathered, early = [], None, set(), set()
    for cell in story:
        nodes = imports_only(cell)
        if nodes is None:
            cells.append(cell)
        elif section := marked_section(nodes):
            for part in read_cells(FOLDER / f"{section}.py"):
                inner = imports_only(part)
                if inner is None:
                    cells.append(part)
                elif place is None:
                    early |= foreign_imports(inner)
                    cells.append(part)
                else:
                    gathered |= foreign_imports(inner)
        elif place is None:
            place = len(cells)
            gathered |= foreign_imports(nodes)
            cells.append(cell)
        else:
            raise ValueError(f"The story has a second import cell: {cell.source!r}")
    if place is None:
        raise ValueError("The story has no import cell of its own.")
    return cells, place, gathered - early


def number_titles(cells: list[Cell]) -> list[Cell]:
    """Numbers the titles, and puts badges and a table of contents behind the first cell."""
    numbered, titles = [], []
    for cell in cells:
        title = re.match(r"## (.*)", cell.source) if cell.kind == "markdown" else None
        if title:
            titles.append(f"{len(titles) + 1}. {title[1]}")
            # Jupyter links to titles, Colab to names.
            name = f'<a name="{titles[-1].replace(" ", "-")}"></a>'
            source = f"{name}\n\n## {titles[-1]}{cell.source[title.end() :]}"
            cell = replace(cell, source=source)
        numbered.append(cell)
    links = [f"[{title}](#{quote(title.replace(' ', '-'), safe='?,:')})  " for title in titles]
    numbered.insert(1, Cell("markdown", "\n".join([badges(), "", *links]), "contents"))
    return numbered


def badges() -> str:
    """Two pictures with links: to the notebook in Colab and in Kaggle, or to where to upload it."""
    colab, kaggle = "https://colab.research.google.com/", "https://www.kaggle.com/code/new"
    if REPOSITORY:
        colab += f"github/{REPOSITORY}/blob/main/hw3.ipynb"
        raw = f"https://github.com/{REPOSITORY}/blob/main/hw3.ipynb"
        kaggle = f"https://kaggle.com/kernels/welcome?src={raw}"
    pictures = (
        "https://colab.research.google.com/assets/colab-badge.svg",
        ("https://kaggle.com/static/images/open-in-kaggle.svg"),
    )
    return f"[![Colab]({pictures[0]})]({colab}) [![Kaggle]({pictures[1]})]({kaggle})"


# Definitions are folded on Kaggle and Colab; what the story does is open. Not in JupyterLab, whose
# links to titles miss by some screens where cells are folded (seen in 4.6).
FOLDED = {"_kg_hide-input": True, "cellView": "form"}
OPEN = ("notebook", "contents")


def build_notebook(story: Path = FOLDER / "notebook.py") -> nbformat.NotebookNode:
    """The notebook without outputs; the same sources give the same one.

    Raises:
        ValueError: a marker or import that cannot be placed, or the package's name in a cell.
    """
    cells, place, gathered = inline_sections(read_cells(story))
    imports = [Cell("code", text, "imports") for text in format_imports(gathered)]
    cells[place : place + 1] = imports
    numbers, out = {}, []
    for cell in number_titles(cells):
        if PACKAGE in cell.source:
            raise ValueError(f"{cell.section}: {PACKAGE} in a cell: {cell.source[:80]!r}")
        numbers[cell.section] = numbers.get(cell.section, 0) + 1
        make = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        folded = cell.kind == "code" and cell.section not in OPEN
        metadata = copy.deepcopy(FOLDED) if folded else {}
        name = f"{cell.section}-{numbers[cell.section]:02d}"
        out.append(make(cell.source, id=name, metadata=metadata))
    notebook = nbformat.v4.new_notebook(cells=out, metadata=METADATA)
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    return notebook


def as_text(notebook: nbformat.NotebookNode) -> str:
    """A notebook as the text of its file."""
    return nbformat.writes(notebook) + "\n"


def keep_outputs(notebook: nbformat.NotebookNode, path: Path) -> nbformat.NotebookNode:
    """Takes over the outputs of the file that is there, if it has the very same cells."""
    if not path.exists():
        return notebook
    there = nbformat.read(path, as_version=4)
    same = [(c.id, c.source) for c in there.cells] == [(c.id, c.source) for c in notebook.cells]
    for cell, old in zip(notebook.cells, there.cells, strict=True) if same else ():
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def smaller_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output with its picture as JPEG, a fraction of the PNG's size."""
    if png := output.get("data", {}).pop("image/png", None):
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
            picture.convert("RGB").save(buffer, "JPEG", quality=75, optimize=True)
        output["data"]["image/jpeg"] = base64.b64encode(buffer.getvalue()).decode()
    return output


def run_demo(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Executes the notebook on the drawn demo in an empty folder; bars are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HW3_")}
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook, timeout=None, resources={"metadata": {"path": folder}}
        )
        client.execute(env=kept | {"HW3_DATA": "demo"})
    notebook.metadata = nbformat.from_dict(METADATA)  # the client adds which Python it was
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            shown = [o for o in cell.outputs if o.get("name") != "stderr"]
            cell.outputs = [smaller_output(output) for output in shown]
    return notebook


def settings_table(source: Path = FOLDER / "config.py") -> str:
    """The fields of `Config` as a Markdown table: name, default, range or choices, comment."""
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", source.read_text(), re.MULTILINE))
    rows = ["| setting | default | range | meaning |", "|---|---|---|---|"]
    for field in fields(Config):
        limits = field.metadata
        valid = ", ".join(limits.get("choices", ()))
        if "low" in limits:
            valid = f"{limits['low']} to {limits['high']}"
        rows.append(f"| `{field.name}` | `{field.default}` | {valid} | {comments[field.name]} |")
    return "\n".join(rows) + "\n"


def build_readme(text: str) -> str:
    """The README with its badges and its table of settings made anew.

    Raises:
        ValueError: the two lines that enclose the table are not there.
    """
    text = re.sub(r"^\[!\[Colab\].*$", lambda _: badges(), text, count=1, flags=re.MULTILINE)
    before, begin, rest = text.partition(TABLE_BEGIN)
    _, end, after = rest.partition(TABLE_END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {TABLE_BEGIN!r} and {TABLE_END!r}.")
    return f"{before}{begin}\n{settings_table()}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Writes what is built, or with `--check` says whether it is fresh; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="fail with a diff if anything is stale"
    )
    parser.add_argument("--run", action="store_true", help="execute it on the drawn demo")
    parser.add_argument("--folder", type=Path, default=ROOT, help="of hw3.ipynb and README.md")
    options = parser.parse_args(arguments)
    notebook, readme = options.folder / "hw3.ipynb", options.folder / "README.md"
    status, fresh = 0, keep_outputs(build_notebook(), notebook)
    text = as_text(run_demo(fresh) if options.run else fresh)
    for path, built in ((notebook, text), (readme, build_readme(readme.read_text()))):
        there = path.read_text() if path.exists() else ""
        if there == built:
            continue
        if not options.check:
            path.write_text(built)
            continue
        names = (str(path), "as built now")
        lines = difflib.unified_diff(there.splitlines(), built.splitlines(), *names, lineterm="")
        print("\n".join(lines))
        print(f"{path} is stale. Edit {PACKAGE}/, never what is built, and run: {COMMAND}")
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
