"""What every notebook must keep. That it runs and shows what is stored, nbval checks."""

import re
import statistics
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_it_was_run_top_to_bottom(notebook: nbformat.NotebookNode) -> None:
    # nbval does not compare a cell without a count, so a notebook that never ran would pass.
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_output_holds_an_error_a_warning_or_a_path(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert not re.search(r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\)|Warning|it/s\]", text)


def test_it_has_the_skeleton(notebook: nbformat.NotebookNode) -> None:
    text = prose(notebook)
    assert text.startswith("# ")
    for part in ("**You will be able to**", "**Time:**", "## What was measured", "## Where next"):
        assert part in text


def test_cells_are_small_and_explained(notebook: nbformat.NotebookNode) -> None:
    cells = code_cells(notebook)
    assert statistics.median(len(cell.source.splitlines()) for cell in cells) < 10
    in_a_row = sum(a.cell_type == b.cell_type == "code" for a, b in pairwise(notebook.cells))
    assert in_a_row <= len(cells) / 4, "too many cells without a word before them"


def test_ignored_output_is_asserted_instead(notebook: nbformat.NotebookNode) -> None:
    ignored = [
        c for c in code_cells(notebook) if "nbval-ignore-output" in c.metadata.get("tags", [])
    ]
    asserting = [cell for cell in ignored if "assert " in cell.source]
    assert len(asserting) >= len(ignored) / 3


def test_no_line_is_a_wall(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert len(re.sub(r"^\|.*$", "", cell.source, flags=re.MULTILINE).split()) <= 130
