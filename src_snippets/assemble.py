"""Builds `hw3.ipynb` from the story, and the README's table of settings from `config.py`.

`python -m src_snippets.assemble [--check]`
"""

import argparse
import ast
from dataclasses import dataclass, fields
import difflib
from pathlib import Path
import re
import sys

import nbformat

from src_snippets.config import Config

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


def build_notebook(story: Path = FOLDER / "notebook.py") -> str:
    """The notebook as text; the same sources give the same bytes.

    Raises:
        ValueError: a marker or import that cannot be placed, or the package's name in a cell.
    """
    cells, place, gathered = inline_sections(read_cells(story))
    imports = [Cell("code", text, "imports") for text in format_imports(gathered)]
    cells[place : place + 1] = imports
    numbers, out = {}, []
    for cell in cells:
        if PACKAGE in cell.source:
            raise ValueError(f"{cell.section}: {PACKAGE} in a cell: {cell.source[:80]!r}")
        numbers[cell.section] = numbers.get(cell.section, 0) + 1
        make = nbformat.v4.new_code_cell if cell.kind == "code" else nbformat.v4.new_markdown_cell
        out.append(make(cell.source, id=f"{cell.section}-{numbers[cell.section]:02d}"))
    notebook = nbformat.v4.new_notebook(cells=out, metadata=METADATA)
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


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
    """The README with its table of settings made anew.

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
    parser.add_argument("--folder", type=Path, default=ROOT, help="of hw3.ipynb and README.md")
    options = parser.parse_args(arguments)
    notebook, readme = options.folder / "hw3.ipynb", options.folder / "README.md"
    status = 0
    for path, built in ((notebook, build_notebook()), (readme, build_readme(readme.read_text()))):
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
