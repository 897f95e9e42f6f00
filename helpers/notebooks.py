"""Run notebooks top to bottom and store their outputs: python -m helpers notebooks [NAME ...]."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 600  # seconds


def execute(path: Path) -> None:
    """Run one notebook in a fresh kernel and write it back with its outputs.

    Raises:
        ValueError: an output holds a warning, a path of this machine, or progress-bar debris.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name}: a cell writes to stderr: {text[:300]}")
            if str(Path.home()) in text or str(ROOT) in text:
                raise ValueError(f"{path.name}: an output names a path: {text[:300]}")
    version = notebook.metadata["language_info"]["version"]
    # The patch version of Python changes from machine to machine, and with it the file.
    notebook.metadata["language_info"]["version"] = ".".join(version.split(".")[:2])
    nbformat.write(notebook, path)


def main(names: list[str]) -> int:
    """Execute the named notebooks, or all of them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    every = sorted((ROOT / "notebooks").glob("*.ipynb"))
    chosen = [path for path in every if not names or any(name in path.stem for name in names)]
    for path in chosen:
        start = time.perf_counter()
        execute(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if chosen else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
