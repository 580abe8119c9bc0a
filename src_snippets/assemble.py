"""Builds `hw3.ipynb` from `notebook.py`, and the README's table of settings from `config.py`.

`python -m src_snippets.assemble [--check] [--run]`. With `--run` the notebook is executed on the
synthetic dataset and keeps its outputs; later builds keep them while no cell changes, and drop
them all when one does.
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

from src_snippets.setup.config import Config

PACKAGE = "src_snippets"
FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
TABLE_BEGIN, TABLE_END = "<!-- settings: built from config.py -->\n", "<!-- end of settings -->\n"
COMMAND = f"python -m {PACKAGE}.assemble"
METADATA = {
    # A GPU is chosen by itself where the notebook is uploaded.
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    # nbconvert takes the suffix of a script from it.
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
# Definitions are folded in JupyterLab, Kaggle and Colab; their first line, a title, stays visible.
FOLDED = {"_kg_hide-input": True, "cellView": "form", "jupyter": {"source_hidden": True}}


@dataclass(frozen=True)
class Cell:
    """A cell of a percent-format file: `kind` is `code` or `markdown`."""

    kind: str
    source: str
    section: str  # data/rle for src_snippets/data/rle.py
    tags: tuple[str, ...] = ()


def read_cells(path: Path) -> list[Cell]:
    """Splits a percent-format file into cells; what stands before the first marker is left out."""
    pieces = re.split(r"^# %%(.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    section = path.stem if path.parent == FOLDER else f"{path.parent.name}/{path.stem}"
    cells = []
    for marker, body in zip(pieces[::2], pieces[1::2], strict=True):
        known = re.fullmatch(r' (\[markdown\])| tags=\["(\w+)"\]|', marker)
        if known is None:
            raise ValueError(f"{path}: cell marker '# %%{marker}'; expected '# %%' or '[markdown]'")
        if known[1]:
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        if body.strip():
            tags = (known[2],) if known[2] else ()
            kind = "markdown" if known[1] else "code"
            cells.append(Cell(kind, body.strip("\n").rstrip(), section, tags))
    return cells


def split_imports(source: str) -> tuple[list[ast.stmt], str]:
    """The top-level import statements of a code cell, and its source without them."""
    nodes = [n for n in ast.parse(source).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    lines = source.splitlines()
    for node in nodes:
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    rest = "\n".join(line for line in lines if line is not None).strip()
    return nodes, re.sub(r"\n{3,}", "\n\n\n", re.sub(r"\A(# @title.*)\n+", r"\1\n", rest))


def imported_section(nodes: list[ast.stmt], rest: str) -> str | None:
    """The section that an import cell of the story stands for, or None."""
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {m.removeprefix(f"{PACKAGE}.") for m in modules if m and m.startswith(f"{PACKAGE}.")}
    return names.pop().replace(".", "/") if len(names) == len(nodes) == 1 and not rest else None


def foreign_imports(nodes: list[ast.stmt]) -> set[tuple[str, str]]:
    """(module, name) of imports from outside the package; name is empty for `import module`."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(a.name, f"as {a.asname}" if a.asname else "") for a in node.names}
        elif not node.module.startswith(PACKAGE):
            if renamed := [alias.name for alias in node.names if alias.asname]:
                raise ValueError(f"from {node.module} import {renamed}: import by name, unaliased")
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def format_imports(found: set[tuple[str, str]]) -> str:
    """One statement per module, sorted as ruff does: standard library, blank line, the rest."""
    groups = {True: [], False: []}
    for module in sorted({m for m, _ in found}, key=str.lower):
        lines = groups[module.split(".")[0] in sys.stdlib_module_names]
        names = sorted((n for m, n in found if m == module), key=lambda n: (n.lower(), n))
        lines += [f"import {module} {n}".rstrip() for n in names if not n or n.startswith("as ")]
        if members := [n for n in names if n and not n.startswith("as ")]:
            line = f"from {module} import {', '.join(members)}"
            if len(line) > 100:
                line = "\n".join([f"from {module} import (", *(f"    {n}," for n in members), ")"])
            lines.append(line)
    return "\n\n".join("\n".join(group) for group in groups.values() if group)


def inline_sections(story: list[Cell]) -> list[Cell]:
    """Puts sections where the story imports them, and all imports into the story's import cell.

    Imports of sections above that cell stay where they are.

    Raises:
        ValueError: the story has no import cell of its own, or two.
    """
    cells, place, gathered, early = [], None, set(), set()
    for cell in story:
        nodes, rest = split_imports(cell.source) if cell.kind == "code" else ([], cell.source)
        if not nodes:
            cells.append(cell)
        elif section := imported_section(nodes, rest):
            for part in read_cells(FOLDER / f"{section}.py"):
                if part.kind == "markdown":
                    cells.append(part)
                    continue
                inner, own = split_imports(part.source)
                if place is None:
                    early |= foreign_imports(inner)
                    own = part.source
                gathered |= foreign_imports(inner)
                cells += [replace(part, source=own)] if own else []
        elif place is None and not rest:
            place = len(cells)
            gathered |= foreign_imports(nodes)
            cells.append(cell)
        else:
            raise ValueError(f"The story has a second import cell: {cell.source!r}")
    if place is None:
        raise ValueError("The story has no import cell of its own.")
    text = f"# @title Imports\n{format_imports(gathered - early)}"
    cells[place] = Cell("code", text, "setup/imports")
    return cells


def number_parts(cells: list[Cell]) -> list[Cell]:
    """Numbers the parts (`## `) and lists them with their sections (`### `) in the first cell."""
    numbered, links, parts = [], [], 0
    for cell in cells:
        title = re.match(r"(###?) (.*)", cell.source) if cell.kind == "markdown" else None
        if title:
            is_part = title[1] == "##"
            parts += is_part
            text = f"{parts}. {title[2]}" if is_part else title[2]
            anchor = text.replace(" ", "-")  # Jupyter links to titles, Colab to names
            link = f"[{text}](#{quote(anchor, safe='?,:')})"
            links.append(f"\n**{link}**" if is_part else link)
            source = f'<a name="{anchor}"></a>\n\n{title[1]} {text}{cell.source[title.end() :]}'
            cell = replace(cell, source=source)
        numbered.append(cell)
    contents = " · ".join(links).replace(" · \n", "  \n").strip()
    numbered[0] = replace(numbered[0], source=f"{numbered[0].source}\n\n{contents}")
    return numbered


def build_notebook(story: Path = FOLDER / "notebook.py") -> nbformat.NotebookNode:
    """The notebook without outputs; the same sources give the same one.

    Raises:
        ValueError: a marker or import that cannot be placed, or the package's name in a cell.
    """
    numbers, out = {}, []
    for cell in number_parts(inline_sections(read_cells(story))):
        if PACKAGE in cell.source:
            raise ValueError(f"{cell.section}: {PACKAGE} in a cell: {cell.source[:80]!r}")
        numbers[cell.section] = numbers.get(cell.section, 0) + 1
        make = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        metadata = copy.deepcopy(FOLDED) if cell.source.startswith("# @title") else {}
        if cell.tags:
            metadata["tags"] = list(cell.tags)
        name = f"{cell.section.replace('/', '-').replace('_', '-')}-{numbers[cell.section]:02d}"
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
        output["metadata"]["image/jpeg"] = output["metadata"].pop("image/png", {})  # alt text
    return output


def run_demo(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Executes the notebook on the synthetic dataset in an empty folder; leaves out progress bars.

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


def settings_table(source: Path = FOLDER / "setup" / "config.py") -> str:
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
    """The README with its table of settings built anew.

    Raises:
        ValueError: the two lines that enclose the table are not there.
    """
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
    parser.add_argument("--run", action="store_true", help="execute it on the synthetic dataset")
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
