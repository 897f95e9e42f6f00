"""Set-up, tests and notebooks, with Python's standard library alone.

    python -m helpers start        install the course and open it in JupyterLab
    python -m helpers test         install the test tools and run all tests (arguments go to pytest)
    python -m helpers notebooks    run notebooks top to bottom and store their outputs

In an active virtual or conda environment that environment is used; otherwise one is made in .venv.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST, OLDEST = (3, 13), (3, 11)


def environment_python() -> Path:
    """The Python of the active environment, or of .venv, which is made if need be."""
    in_conda = os.environ.get("CONDA_PREFIX") == sys.prefix
    if sys.prefix != sys.base_prefix or in_conda:
        return Path(sys.executable)
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"Making a virtual environment in {folder.name} ...", flush=True)
        venv.create(folder, with_pip=True)
    return python


def run(*command: str | Path) -> int:
    """Run a command in the course's folder and return its exit code."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def install(python: Path, requirements: str) -> None:
    """Install the pinned packages and this course, unless that was done for the same pins."""
    digest = hashlib.sha256()
    for name in ("constraints.txt", "requirements.txt", requirements, "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    prefix = python.parent.parent if os.name != "nt" or python.parent.name == "Scripts" else None
    done = (prefix or python.parent) / f".installed-{requirements}"
    if done.exists() and done.read_text() == digest.hexdigest():
        return
    print(f"Installing what {requirements} lists (minutes, the first time) ...", flush=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if run(*pip, "-r", requirements) or run(*pip, "--no-deps", "--editable", "."):
        sys.exit("The installation failed; pip says why above. Mend that and run this again.")
    done.write_text(digest.hexdigest())


def prepare(requirements: str) -> Path:
    """Install the packages, bring the model, and return the Python to go on with."""
    python = environment_python()
    install(python, requirements)
    fetch = "from helpers.models import fetch_smollm2; fetch_smollm2()"
    report = "except CourseError as error: sys.exit(f'error: {error}')"
    code = f"import sys\nfrom helpers import CourseError\ntry:\n    {fetch}\n{report}"
    if code := run(python, "-c", code):
        sys.exit(code)
    return python


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("start", "test", "notebooks"))
    options, rest = parser.parse_known_args(arguments)
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"The course needs Python 3.11, 3.12 or 3.13, and this is {version}.")
    if options.command == "start":
        python = prepare("requirements.txt")
        return run(python, "-m", "jupyter", "lab", "notebooks/00_start_here.ipynb", *rest)
    python = prepare("requirements-test.txt")
    if options.command == "test":
        # Two files of tests at a time, each with half of the cores (tests/conftest.py).
        return run(
            python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *rest
        )
    return run(python, "-m", "helpers.notebooks", *rest)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
