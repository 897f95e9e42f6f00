"""Run notebooks top to bottom and store their outputs: python -m helpers notebooks [NAME ...].

Under its title each notebook gets a link that opens it on Colab, and then a cell that installs the
course there. Both follow the repository's address in pyproject.toml: a fork changes that line and
runs `python -m helpers notebooks --relink`, which runs nothing.
"""

from __future__ import annotations

import os
import re
import sys
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 1800  # seconds; generous, for slow machines
WIDGET = "application/vnd.jupyter.widget-view+json"
# The link opens the notebook of this branch or tag, and the cell installs the course of the same
# one: the two always fit each other. A release sets it to its tag.
REF = "main"
LINK = (
    "[Open in Colab](https://colab.research.google.com/github/{path}/blob/{ref}/notebooks/{name})"
)
OLD_LINK = re.compile(r"\n*\[(?:!\[Open in Colab\]\([^)]*\)|Open in Colab)\]\([^)]*\)")
# Colab keeps its own torch, numpy and Jupyter. Its gradio and diffusers need huggingface_hub < 2.
SET_UP = """\
# @title On Colab this installs the course; elsewhere it does nothing
import sys

if "google.colab" in sys.modules:
    address = "{address}"
    %pip install --quiet git+{{address}}@{ref} "huggingface_hub<2"
"""
SET_UP_METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["set-up"]}
DEBRIS = re.compile(r"it/s\]|s/it\]|\d%\|")  # of a progress bar


def address() -> str:
    """The repository's address, from the one place that holds it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"]


def set_up(notebook: nbformat.NotebookNode, name: str) -> None:
    """Put the link to Colab and the set-up cell into a notebook, or bring them up to date."""
    path = address().removeprefix("https://").removesuffix(".git").split("/", 1)[1]
    link = LINK.format(path=path, ref=REF, name=f"{name}.ipynb")
    title, _, text = OLD_LINK.sub("", notebook.cells[0].source).partition("\n")
    notebook.cells[0].source = f"{title}\n\n{link}\n\n{text.strip()}".rstrip()
    cell = notebook.cells[1]
    if "google.colab" not in cell.source:
        cell = nbformat.v4.new_code_cell(id="set-up", execution_count=0)
        notebook.cells.insert(1, cell)
    cell.source = SET_UP.format(address=address(), ref=REF).rstrip()
    cell.metadata = nbformat.from_dict(SET_UP_METADATA)


def relink(path: Path) -> None:
    """Bring a notebook's link and set-up cell up to date without running it."""
    notebook = nbformat.read(path, as_version=4)
    set_up(notebook, path.stem)
    nbformat.write(notebook, path)


def execute(path: Path) -> None:
    """Run one notebook in a fresh kernel and write it back with its outputs.

    Raises:
        ValueError: an output holds a warning, a path of this machine, or progress-bar debris.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    set_up(notebook, path.stem)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
        on_cell_executed=lambda cell, **_: _require_clean(cell, path.name),
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("data", {}).keys() & {"image/png", "text/html"}:
                output["data"].pop(WIDGET, None)  # a stored page shows the still, not the widget
    version = notebook.metadata["language_info"]["version"]
    # The patch version of Python changes from machine to machine, and with it the file.
    notebook.metadata["language_info"]["version"] = ".".join(version.split(".")[:2])
    nbformat.write(notebook, path)


def _require_clean(cell: nbformat.NotebookNode, name: str) -> None:
    for output in cell.get("outputs", []):
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        if output.get("name") == "stderr":
            raise ValueError(f"{name}: a cell writes to stderr: {text[:300]}")
        if DEBRIS.search(text):
            raise ValueError(f"{name}: an output holds a progress bar: {text[:300]}")
        if str(Path.home()) in text or str(ROOT) in text:
            raise ValueError(f"{name}: an output names a path: {text[:300]}")


def main(names: list[str]) -> int:
    """Execute the named notebooks, or all of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    only_links = "--relink" in names
    names = [name for name in names if name != "--relink"]
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = [
        path for path in every if not names or any(Path(name).stem in path.stem for name in names)
    ]
    for path in chosen:
        start = time.perf_counter()
        if only_links:
            relink(path)
            continue
        execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    if not chosen:
        print(f"There is no notebook named {' or '.join(names)} in {ROOT / 'notebooks'}.")
    return 0 if chosen else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
