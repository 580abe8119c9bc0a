import ast
import base64
from collections import Counter
from dataclasses import fields
import io
import re
import shutil
from urllib.parse import unquote

import nbformat
from PIL import Image
import pytest

from src_snippets import assemble
from src_snippets.assemble import (
    as_text,
    badges,
    build_notebook,
    build_readme,
    foreign_imports,
    format_imports,
    imports_only,
    inline_sections,
    keep_outputs,
    main,
    read_cells,
    ROOT,
    settings_table,
    smaller_output,
)
from src_snippets.config import Config


@pytest.fixture(scope="module")
def notebook():
    return build_notebook()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_notebook_is_fresh():
    assert main(["--check"]) == 0


def test_two_builds_are_byte_equal():
    assert as_text(build_notebook()) == as_text(build_notebook())


def test_ids_are_unique_and_name_their_section(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert {"rle-01", "model-01", "imports-01", "notebook-01"} <= set(ids)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)


def test_the_notebook_stands_alone(notebook):
    assert not [cell.id for cell in notebook.cells if "src_snippets" in cell.source]
    assert not [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count]


def test_imports_stand_in_two_places_at_the_top(notebook):
    def has_import(cell):
        kinds = (ast.Import, ast.ImportFrom)
        return any(isinstance(node, kinds) for node in ast.parse(cell.source).body)

    cells = [cell.id for cell in code_cells(notebook) if has_import(cell)]
    assert cells == ["install-02", "imports-01", "imports-02"]


def test_titles_are_numbered_and_the_contents_lead_to_them(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [re.search(r"^## (.*)$", source, re.MULTILINE) for source in prose]
    titles = [title[1] for title in titles if title]
    assert [title.split(". ")[0] for title in titles] == [str(k + 1) for k in range(len(titles))]
    contents = next(cell.source for cell in notebook.cells if cell.id == "contents-01")
    links = re.findall(r"\[(\d+\. .*?)\]\(#(.*?)\)  $", contents, re.MULTILINE)
    assert [text for text, _ in links] == titles
    for text, target in links:
        name = text.replace(" ", "-")
        assert unquote(target) == name
        assert f'<a name="{name}"></a>' in "".join(prose)


def test_definitions_are_folded_and_the_story_is_open(notebook):
    folded = {cell.id for cell in notebook.cells if cell.metadata.get("_kg_hide-input")}
    assert {"config-02", "train-03", "imports-01"} <= folded
    assert not [name for name in folded if name.startswith("notebook")]
    for cell in notebook.cells:
        if cell.id in folded:
            assert cell.metadata == {"_kg_hide-input": True, "cellView": "form"}


def test_badges(monkeypatch):
    assert "(https://colab.research.google.com/)" in badges()
    monkeypatch.setattr(assemble, "REPOSITORY", "owner/cells")
    assert "(https://colab.research.google.com/github/owner/cells/blob/main/hw3.ipynb)" in badges()
    assert "welcome?src=https://github.com/owner/cells/blob/main/hw3.ipynb)" in badges()
    readme = build_readme((ROOT / "README.md").read_text())
    assert badges() in readme.splitlines()


def test_outputs_stay_while_no_cell_changes(tmp_path):
    path, built = tmp_path / "hw3.ipynb", build_notebook()
    cell = code_cells(built)[3]
    cell.outputs = [nbformat.v4.new_output("stream", text="said")]
    cell.execution_count = 4
    path.write_text(as_text(built))
    again = code_cells(keep_outputs(build_notebook(), path))[3]
    assert (again.outputs[0].text, again.execution_count) == ("said", 4)
    built.cells[-1].source += " "
    path.write_text(as_text(built))
    assert not code_cells(keep_outputs(build_notebook(), path))[3].outputs
    assert not code_cells(keep_outputs(build_notebook(), tmp_path / "absent"))[3].outputs


def test_pictures_are_kept_as_jpeg():
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 30), "red").save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    output = nbformat.v4.new_output("display_data", data={"image/png": png, "text/plain": "a"})
    data = smaller_output(output)["data"]
    assert set(data) == {"image/jpeg", "text/plain"}
    with Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))) as picture:
        assert picture.size == (40, 30)
    plain = nbformat.v4.new_output("stream", text="said")
    assert smaller_output(plain) == plain


def test_committed_outputs_are_all_of_one_run_or_none():
    committed = nbformat.read(ROOT / "hw3.ipynb", as_version=4)
    counts = [cell.execution_count for cell in code_cells(committed)]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    assert (ROOT / "hw3.ipynb").stat().st_size < 2_000_000
    said = "".join(o.get("text", "") for cell in code_cells(committed) for o in cell.outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", said)  # nobody's folders


def bound_names(tree):
    """Top-level names that a cell binds, imports included."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.If, ast.With, ast.For)):
            yield from bound_names(node)


def test_each_public_name_is_bound_once(notebook):
    counts = Counter()
    for cell in code_cells(notebook):
        counts.update(set(bound_names(ast.parse(cell.source))))
    assert [name for name, count in counts.items() if count > 1 and name[0] != "_"] == []
    assert counts["fit"] == counts["Config"] == counts["np"] == 1


def code_lines(source):
    """Lines that are not blank, comment or docstring."""
    text = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and isinstance(body[0], ast.Expr):
            text |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and n not in text for n, line in lines)


def test_cells_are_short_and_the_notebook_within_its_budget(notebook):
    def limit(cell):
        is_class = any(isinstance(node, ast.ClassDef) for node in ast.parse(cell.source).body)
        return 60 if is_class or cell.id.startswith("imports") else 40

    lines = {c.id: (len(c.source.splitlines()), limit(c)) for c in code_cells(notebook)}
    assert {name: n for name, (n, most) in lines.items() if n > most} == {}
    assert sum(code_lines(cell.source) for cell in code_cells(notebook)) < 5500
    prose = [c for c in notebook.cells if c.cell_type == "markdown"]
    assert prose[0].source.startswith("# ")


def test_check_shows_the_difference_and_the_command(tmp_path, capsys):
    stale = tmp_path / "hw3.ipynb"
    shutil.copy(ROOT / "README.md", tmp_path)
    folder = ["--folder", str(tmp_path)]
    assert main(["--check", *folder]) == 1
    main(folder)
    assert main(["--check", *folder]) == 0
    assert stale.read_text() == as_text(build_notebook())
    stale.write_text(stale.read_text().replace("# Cell instance segmentation", "# Edited"))
    capsys.readouterr()
    assert main(["--check", *folder]) == 1
    out = capsys.readouterr().out
    assert "# Edited" in out
    assert "run: python -m src_snippets.assemble" in out


def test_the_table_of_settings_has_every_field():
    rows = settings_table().splitlines()[2:]
    assert len(rows) == len(fields(Config))
    assert rows[1].startswith("| `seed` | `0` | 0 to 2147483647 | split, initial weights")
    assert "| `schedule` | `constant` | constant, cosine, one_cycle, plateau |" in "\n".join(rows)
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        build_readme("# No table")


# The parts, on small stories


def cells_of(tmp_path, text):
    (tmp_path / "story.py").write_text(text)
    return read_cells(tmp_path / "story.py")


def test_reading_percent_format(tmp_path):
    cells = cells_of(
        tmp_path, '"""Doc."""\n# %% [markdown]\n# # A\n#\n# b\n\n# %%\nx = 1\n\n\n# %%\n\n'
    )
    assert [(c.kind, c.source, c.section) for c in cells] == [
        ("markdown", "# A\n\nb", "story"),
        ("code", "x = 1", "story"),
    ]
    with pytest.raises(ValueError, match="cell marker"):
        cells_of(tmp_path, "# %% a title\nx = 1\n")


def test_imports_are_gathered_and_sorted(tmp_path):
    (cell,) = cells_of(
        tmp_path,
        "# %%\nimport torch\nimport numpy as np\nfrom pathlib import Path\n"
        "import torch.nn.functional as F\nfrom torch import nn, Tensor\n"
        "from src_snippets.rle import paint\n",
    )
    assert format_imports(foreign_imports(imports_only(cell))) == [
        "from pathlib import Path",
        "import numpy as np\nimport torch\n"
        "from torch import nn, Tensor\nimport torch.nn.functional as F",
    ]
    assert format_imports(set()) == []
    (aliased,) = cells_of(tmp_path, "# %%\nfrom torch import nn as layers\n")
    with pytest.raises(ValueError, match="unaliased"):
        foreign_imports(imports_only(aliased))


def test_stories_that_cannot_be_placed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no import cell"):
        inline_sections(cells_of(tmp_path, "# %%\nx = 1\n"))
    with pytest.raises(ValueError, match="second import cell"):
        inline_sections(cells_of(tmp_path, "# %%\nimport os\n\n# %%\nimport sys\n"))
    story = tmp_path / "story.py"
    story.write_text("# %%\nimport os\n\n# %%\nprint('src_snippets')\n")
    with pytest.raises(ValueError, match="src_snippets in a cell"):
        build_notebook(story)


def test_sections_define_and_do_nothing():
    """Only definitions, constants and imports stand at the top level of a section."""
    allowed = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    for path in sorted(ROOT.glob("src_snippets/*.py")):
        if path.stem in ("notebook", "assemble"):
            continue
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path.name}:{node.lineno}"


def test_sections_import_only_sections_that_stand_above():
    order = []
    for cell in read_cells(ROOT / "src_snippets" / "notebook.py"):
        for node in imports_only(cell) or []:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("src_snippets."):
                order.append(node.module.split(".")[1])
    assert len(set(order)) == len(order) == 28
    for place, name in enumerate(order):
        tree = ast.parse((ROOT / "src_snippets" / f"{name}.py").read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        needed = {m.split(".")[1] for m in modules if m.startswith("src_snippets.")}
        assert needed <= set(order[:place]), name
