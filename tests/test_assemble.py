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

from src_snippets.assemble import (
    as_text,
    build_notebook,
    build_readme,
    foreign_imports,
    format_imports,
    inline_sections,
    keep_outputs,
    main,
    read_cells,
    ROOT,
    settings_table,
    smaller_output,
    split_imports,
)
from src_snippets.setup.config import Config

PARTS = ["setup", "data", "model", "training", "inference", "evaluation", "export"]
# Budgets of the notebook; lines may only fall, to 3,000
MAX_CELLS, MAX_LINES, MAX_SETTINGS, MAX_README = 120, 3806, 63, 298
MAX_LIVE_LINES, MAX_BAR_LINES = 15, 150
SETTINGS_BY, PICTURE_BY = 10, 30


@pytest.fixture(scope="module")
def notebook():
    return build_notebook()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def count_lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def is_bar(cell):
    return cell.source.startswith("# @title ")


def test_the_committed_notebook_is_fresh():
    assert main(["--check"]) == 0


def test_two_builds_are_byte_equal():
    assert as_text(build_notebook()) == as_text(build_notebook())


def test_budgets_of_the_whole(notebook):
    lines = sum(map(count_lines, code_cells(notebook)))
    print(f"{len(notebook.cells)} cells, {lines} lines of code, {len(fields(Config)) - 1} settings")
    assert len(notebook.cells) <= MAX_CELLS
    assert lines <= MAX_LINES
    assert len(fields(Config)) - 1 <= MAX_SETTINGS
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README


def test_budgets_of_cells(notebook):
    long_bars = {c.id: len(c.source.splitlines()) for c in code_cells(notebook) if is_bar(c)}
    assert {name: n for name, n in long_bars.items() if n > MAX_BAR_LINES} == {}
    live = {
        cell.id: count_lines(cell)
        for cell in code_cells(notebook)
        if not is_bar(cell) and "tags" not in cell.metadata
    }
    assert {name: n for name, n in live.items() if n > MAX_LIVE_LINES} == {}
    lengths = [len(line) for c in code_cells(notebook) for line in c.source.splitlines()]
    assert sum(length > 100 for length in lengths) <= 1  # the choices of RECIPE


def test_settings_and_the_first_picture_come_early(notebook):
    tagged = [
        k for k, c in enumerate(notebook.cells, 1) if "parameters" in c.metadata.get("tags", [])
    ]
    assert len(tagged) == 1
    assert tagged[0] <= SETTINGS_BY
    pictures = [k for k, c in enumerate(notebook.cells, 1) if "show_figure(plot" in c.source]
    assert pictures[0] <= PICTURE_BY


def test_ids_are_unique_and_name_their_section(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert {"setup-config-01", "data-rle-01", "training-trainer-02"} <= set(ids)
    assert all(re.fullmatch(r"[a-z0-9-]+-\d\d", name) for name in ids)


def test_the_builder_makes_no_outputs(notebook):
    assert not [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count]


def test_imports_stand_in_two_places_at_the_top(notebook):
    def has_import(cell):
        kinds = (ast.Import, ast.ImportFrom)
        return any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source)))

    cells = [cell.id for cell in code_cells(notebook) if has_import(cell)]
    assert cells == ["setup-install-01", "setup-imports-01"]


def test_parts_are_numbered_in_order_and_the_contents_lead_to_them(notebook):
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    titles = [re.search(r"^##+ (.*)$", source, re.MULTILINE) for source in prose]
    titles = [title[1] for title in titles if title]
    parts = [title for title in titles if re.match(r"\d", title)]
    assert [part.lower() for part in parts] == [f"{k}. {name}" for k, name in enumerate(PARTS, 1)]
    links = re.findall(r"\[([^\]]+)\]\(#(.*?)\)", prose[0])
    assert [text for text, _ in links] == titles
    for text, target in links:
        assert unquote(target) == text.replace(" ", "-")
        assert f'<a name="{text.replace(" ", "-")}"></a>' in "".join(prose)


def test_bars_are_folded_with_a_title_and_live_cells_are_open(notebook):
    for cell in code_cells(notebook):
        folded = cell.metadata.get("_kg_hide-input", False)
        assert folded == is_bar(cell), cell.id
        if folded:
            assert cell.metadata["jupyter"] == {"source_hidden": True}
            assert cell.metadata["cellView"] == "form"
            assert len(cell.source.splitlines()[0]) <= 90
        defines = any(
            isinstance(node, (ast.FunctionDef, ast.ClassDef))
            for node in ast.parse(cell.source).body
        )
        assert not (defines and not folded), cell.id
    titles = [c.source.splitlines()[0] for c in code_cells(notebook) if is_bar(c)]
    assert len(set(titles)) == len(titles)


def test_outputs_stay_while_no_cell_changes(tmp_path):
    path, built = tmp_path / "hw3.ipynb", build_notebook()
    cell = code_cells(built)[3]
    cell.outputs = [nbformat.v4.new_output("stream", text="printed")]
    cell.execution_count = 4
    path.write_text(as_text(built))
    again = code_cells(keep_outputs(build_notebook(), path))[3]
    assert (again.outputs[0].text, again.execution_count) == ("printed", 4)
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
    plain = nbformat.v4.new_output("stream", text="printed")
    assert smaller_output(plain) == plain


def test_committed_outputs_are_all_of_one_run_or_none():
    committed = nbformat.read(ROOT / "hw3.ipynb", as_version=4)
    counts = [cell.execution_count for cell in code_cells(committed)]
    assert counts in ([None] * len(counts), list(range(1, len(counts) + 1)))
    assert (ROOT / "hw3.ipynb").stat().st_size < 2_000_000
    printed = "".join(o.get("text", "") for cell in code_cells(committed) for o in cell.outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", printed)  # nobody's folders


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


def test_each_name_of_a_definition_is_bound_once_in_the_notebook(notebook):
    defined, live = Counter(), set()
    for cell in code_cells(notebook):
        names = set(bound_names(ast.parse(cell.source)))
        if is_bar(cell):
            defined.update(names)
        else:
            live |= names
    assert [name for name, count in defined.items() if count > 1] == []
    assert live & set(defined) == set()
    assert defined["Trainer"] == defined["Config"] == defined["np"] == 1


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
    assert "| `schedule` | `constant` | constant, cosine, plateau |" in "\n".join(rows)
    with pytest.raises(ValueError, match=r"README\.md: expected the lines"):
        build_readme("# No table")


# The parts, on small stories


def cells_of(tmp_path, text):
    (tmp_path / "story.py").write_text(text)
    return read_cells(tmp_path / "story.py")


def test_reading_percent_format(tmp_path):
    cells = cells_of(
        tmp_path,
        '"""Doc."""\n# %% [markdown]\n# # A\n#\n# b\n\n# %% tags=["parameters"]\nx = 1\n\n',
    )
    assert [(c.kind, c.source, c.tags) for c in cells] == [
        ("markdown", "# A\n\nb", ()),
        ("code", "x = 1", ("parameters",)),
    ]
    with pytest.raises(ValueError, match="cell marker"):
        cells_of(tmp_path, "# %% a title\nx = 1\n")


def test_imports_are_taken_out_gathered_and_sorted():
    nodes, rest = split_imports(
        "# @title A bar\nimport torch\nimport numpy as np\nfrom pathlib import Path\n"
        "import torch.nn.functional as F\nfrom torch import nn, Tensor\n"
        "from src_snippets.data.rle import (\n    draw_masks,\n)\n\n\nX = 1\n"
    )
    assert rest == "# @title A bar\nX = 1"
    assert format_imports(foreign_imports(nodes)) == (
        "from pathlib import Path\n\nimport numpy as np\nimport torch\n"
        "from torch import nn, Tensor\nimport torch.nn.functional as F"
    )
    assert format_imports(set()) == ""
    with pytest.raises(ValueError, match="unaliased"):
        foreign_imports(split_imports("from torch import nn as layers\n")[0])


def test_stories_that_cannot_be_placed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no import cell"):
        inline_sections(cells_of(tmp_path, "# %%\nx = 1\n"))
    with pytest.raises(ValueError, match="second import cell"):
        inline_sections(cells_of(tmp_path, "# %%\nimport os\n\n# %%\nimport sys\n"))
    story = tmp_path / "story.py"
    story.write_text("# %% [markdown]\n# # A\n\n# %%\nimport os\n\n# %%\nprint('src_snippets')\n")
    with pytest.raises(ValueError, match="src_snippets in a cell"):
        build_notebook(story)


def section_files():
    return [path for part in PARTS for path in sorted(ROOT.glob(f"src_snippets/{part}/[a-z]*.py"))]


def test_sections_define_and_do_nothing():
    """Only definitions, constants and imports stand at the top level of a section."""
    imports = (ast.Import, ast.ImportFrom)
    allowed = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign, *imports)
    for path in section_files():
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, allowed), f"{path}:{node.lineno}"


def test_sections_import_only_sections_that_stand_above():
    order = []
    for cell in read_cells(ROOT / "src_snippets" / "notebook.py"):
        nodes, _ = split_imports(cell.source) if cell.kind == "code" else ([], "")
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("src_snippets."):
                order.append(node.module)
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in section_files()}
    assert set(order) == files
    assert len(order) == len(files)
    folders = [module.split(".")[1] for module in order]
    assert list(dict.fromkeys(folders)) == PARTS
    for place, name in enumerate(order):
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        needed = {m for m in modules if m.startswith("src_snippets.")}
        assert needed <= set(order[:place]), name
