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
            text = shown_text(output)
            assert not re.search(r"(/home/|/root/|/tmp/|/Users/|[A-Z]:\\)|Warning|it/s\]", text)


def test_it_has_the_skeleton(notebook: nbformat.NotebookNode) -> None:
    text = prose(notebook)
    assert text.startswith("# ")
    for part in ("**You will be able to**", "**Time:**", "## What was measured", "## Where next"):
        assert part in text


def test_cells_are_small_and_explained(notebook: nbformat.NotebookNode) -> None:
    cells = code_cells(notebook)
    assert statistics.median(len(cell.source.splitlines()) for cell in cells) < 10
    shown = [cell for cell in notebook.cells if "check" not in tags(cell)]
    in_a_row = sum(a.cell_type == b.cell_type == "code" for a, b in pairwise(shown))
    assert in_a_row <= len(cells) / 4, "too many cells without a word before them"


def test_no_line_of_code_is_too_wide_for_a_laptop(notebook: nbformat.NotebookNode) -> None:
    lines = [line for cell in code_cells(notebook)[1:] for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > 76] == []


def test_text_cells_are_short(notebook: nbformat.NotebookNode) -> None:
    """12 to 40 words; on average about 25. Headings, lists, tables and solutions aside."""
    texts = [cell for cell in notebook.cells if is_text(cell) and "<details>" not in cell.source]
    words = [len(paragraphs(cell).split()) for cell in texts]
    words = [count for count in words if count]
    assert max(words) <= 40
    assert min(words) >= 12
    assert statistics.mean(words) <= 30


def is_text(cell: nbformat.NotebookNode) -> bool:
    return cell.cell_type == "markdown"


def paragraphs(cell: nbformat.NotebookNode) -> str:
    """The running text of a cell."""
    aside = r"^(#|\||[-*] |\d+\. |\*\*|\[|>|<|    ).*$"
    text = re.sub(r"^(```|\$\$).*?^(```|\$\$)$", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^([-*]|\d+\.) .*(?:\n  +\S.*)*", "", text, flags=re.MULTILINE)
    return re.sub(aside, "", text, flags=re.MULTILINE)


def test_it_prints_numbers_and_not_the_truth_of_a_comparison(
    notebook: nbformat.NotebookNode,
) -> None:
    found = [
        line
        for cell in code_cells(notebook)
        for output in cell.outputs
        for line in shown_text(output).splitlines()
        if re.search(r"\b(True|False)\b", line)
    ]
    assert len(found) <= 2, found  # a setting may be a truth value


def shown_text(output: nbformat.NotebookNode) -> str:
    return output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def test_checks_are_collapsed_and_silent(notebook: nbformat.NotebookNode) -> None:
    for cell in code_cells(notebook):
        if "check" in tags(cell):
            assert cell.metadata["jupyter"]["source_hidden"]
            assert "assert " in cell.source
            assert cell.outputs == []


def test_few_asserts_are_in_sight(notebook: nbformat.NotebookNode) -> None:
    """Those that are the lesson; the others are in the collapsed cells."""
    cells = code_cells(notebook)
    in_sight = [c for c in cells if "assert " in c.source and "check" not in tags(c)]
    assert len(in_sight) <= len(cells) / 8


def test_ignored_outputs_are_few_or_checked(notebook: nbformat.NotebookNode) -> None:
    """A cell whose words change is not compared, so a check has to look at what it made."""
    ignored = [c for c in code_cells(notebook) if "nbval-ignore-output" in tags(c)]
    checks = [c for c in code_cells(notebook) if "assert " in c.source]
    assert len(ignored) <= len(code_cells(notebook)) / 3
    assert len(checks) >= len(ignored) / 4


def test_it_opens_with_a_drawing_that_can_be_read_aloud(notebook: nbformat.NotebookNode) -> None:
    drawn = [c for c in code_cells(notebook) if re.search(r"\bdrawing\(", c.source)]
    assert drawn
    for cell in drawn:
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == 1
        alternative = pictures[0].metadata["image/png"]["alt"]
        assert len(alternative.split()) >= 12
        assert pictures[0].data["text/plain"] == alternative
