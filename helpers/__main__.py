"""Set-up, tests and notebooks, with Python's standard library alone.

    python -m helpers start           install the course and open it in JupyterLab
    python -m helpers test            install the test tools and run all tests
    python -m helpers test --quick    ... in under six minutes: no slow tests, no notebooks
    python -m helpers notebooks       run notebooks top to bottom and store their outputs

In an active virtual or conda environment that environment is used, but not conda's base;
otherwise one is made in .venv. Further arguments go to JupyterLab, pytest or the notebooks.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWEST, OLDEST = (3, 13), (3, 11)
VERSION = ".".join(map(str, sys.version_info[:2]))
# Two files of tests at a time, each with half of the cores (tests/conftest.py).
PYTEST = ("-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
QUICK = ("tests", "-m", "not slow and not gpu")
# Gigabytes to download for torch and what it needs, and of free disk for the whole installation:
# packages, the files they came in, pip's copies of those, the model. Measured for torch 2.13.0.
BUILDS = {"CPU": (0.2, 4), "CUDA": (2.7, 12)}
# Runs where notebooks run, so that it imports what a notebook would.
FETCH = """\
import sys
from pathlib import Path
import helpers
file = helpers.__file__ or f"A folder helpers ({list(helpers.__path__)[0]})"
if Path(file).resolve() != Path(sys.argv[1], "helpers", "__init__.py"):
    sys.exit(f"error: {file} hides the course's package of the same name. Rename or move it.")
from helpers.weights import fetch_smollm2
try:
    fetch_smollm2()
except helpers.CourseError as error:
    sys.exit(f"error: {error}")
"""


# -- commands ------------------------------------------------------------------------------------


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> int:
    """Run a command in the course's folder and return its exit code.

    Ctrl-C reaches the command too. It gets ten seconds to end in its own way.
    """
    interrupts: list[int] = []  # that come while the command starts, before it can be waited for
    usual = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=folder, env=os.environ | environment
        )
    finally:
        signal.signal(signal.SIGINT, usual)
    try:
        if interrupts:
            raise KeyboardInterrupt
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(10)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            process.terminate()
            process.wait()
        raise


def ask(*command: str | Path, timeout: float | None = None) -> str | None:
    """What a command prints, or None if it fails, takes too long or does not exist."""
    try:
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# -- the environment -----------------------------------------------------------------------------


def environment_python() -> Path:
    """The Python of the active environment, or of .venv, which is made or repaired if need be."""
    conda = os.environ.get("CONDA_PREFIX")
    in_conda = bool(conda) and Path(conda).resolve() == Path(sys.prefix).resolve()
    in_base = os.environ.get("CONDA_DEFAULT_ENV") == "base" or Path(sys.prefix, "condabin").is_dir()
    if sys.prefix != sys.base_prefix or (in_conda and not in_base):
        if not has_pip(Path(sys.executable)):
            sys.exit("The active environment has no pip. Deactivate it and run this again.")
        return Path(sys.executable)
    if in_conda:
        print("conda's base environment stays as it is: the course gets its own, in .venv.")
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if has_pip(python):
        return python
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            "This Python cannot make virtual environments: it has no ensurepip. On Debian and "
            f"Ubuntu: apt install python{VERSION}-venv. Then run this again."
        )
    half_made = ", again: the one there has no working pip" if folder.exists() else ""
    print(f"Making a virtual environment in .venv{half_made} ...", flush=True)
    if run(sys.executable, "-m", "venv", "--clear", folder) or not has_pip(python):
        sys.exit(f"No virtual environment could be made. Delete {folder} and run this again.")
    return python


def has_pip(python: Path) -> bool:
    return ask(python, "-m", "pip", "--version") is not None


def install(python: Path, requirements: str) -> None:
    """Install the pinned packages and this course, unless that was done for the same pins."""
    digest = hashlib.sha256()
    for name in ("constraints.txt", "requirements.txt", requirements, "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    nested = python.parent.name in ("bin", "Scripts")
    prefix = python.parent.parent if nested else python.parent
    done = prefix / f".installed-{requirements}"
    if done.exists() and done.read_text() == digest.hexdigest():
        return
    check_torch(python, prefix)
    print(f"Installing what {requirements} lists (minutes, the first time) ...", flush=True)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if run(*pip, "-r", requirements) or run(*pip, "--no-deps", "--editable", "."):
        sys.exit("The installation failed: pip says why above. Run this again after that is fixed.")
    done.write_text(digest.hexdigest())


def check_torch(python: Path, prefix: Path) -> None:
    """Say which build of torch pip will take and how large it is; stop if the disk is too small.

    For Linux pip finds the CUDA build by itself. Everywhere else the CPU build is what there is.
    """
    pin = re.search(r"^torch==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    metadata = "import importlib.metadata as m; print(m.version('torch').split('+')[0])"
    if (ask(python, "-c", metadata) or "").strip() == pin:
        return
    offered = ask(python, "-m", "pip", "index", "versions", "torch", timeout=60)
    build = "CPU"
    if platform.system() == "Linux" and offered is not None:
        build = "CPU" if re.search(rf"\b{re.escape(pin)}\+cpu\b", offered) else "CUDA"
        print(f"torch {pin}: pip takes the {build} build, {BUILDS[build][0]} GB to download.")
    small = ""
    if build == "CUDA" and not has_nvidia_gpu():
        small = (
            "No NVIDIA GPU was found, so the CPU build (0.2 GB) would do: pytorch.org, under Get "
            "Started, shows its index for pip; put that address into PIP_EXTRA_INDEX_URL."
        )
    free, needed = shutil.disk_usage(prefix).free / 1e9, BUILDS[build][1]
    if free < needed:
        sys.exit(
            f"The installation needs {needed} GB of free disk, and {free:.1f} GB are free. "
            f"Free some and run this again. {small}".strip()
        )
    if small:
        print(f"{small} (Ctrl-C now, then the same command.)", flush=True)


def has_nvidia_gpu() -> bool:
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def prepare(requirements: str) -> Path:
    """Install the packages, fetch the model, and return the Python to go on with."""
    python = environment_python()
    install(python, requirements)
    if code := run(python, "-c", FETCH, ROOT, folder=ROOT / "notebooks"):
        sys.exit(code)
    return python


# -- the command line ----------------------------------------------------------------------------


def open_lab(python: Path, *arguments: str) -> int:
    """Open the first notebook in JupyterLab, which does not ask whether it may fetch news."""
    root = []
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        print("You are root, which JupyterLab refuses: it gets --allow-root.", flush=True)
        root = ["--allow-root"]
    # Holds labconfig/default_setting_overrides.json. A learner's own settings come first.
    settings = [str(ROOT / "helpers"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    return run(
        python,
        *("-m", "jupyterlab", "notebooks/00_start_here.ipynb"),
        "--ServerApp.answer_yes=True",  # Ctrl-C stops it at once
        *root,
        *arguments,
        JUPYTER_CONFIG_PATH=os.pathsep.join(filter(None, settings)),
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("start", "test", "notebooks"))
    parser.add_argument("--quick", action="store_true", help="only with test")
    options, rest = parser.parse_known_args(arguments)
    if options.quick and options.command != "test":
        parser.error("--quick goes with test")
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(f"The course needs Python 3.11, 3.12 or 3.13, and this is {VERSION}.")
    if not (ROOT / "requirements.txt").is_file():
        sys.exit(
            f"This is an installed package, without notebooks and tests. "
            f"Clone the repository and run the same command in its folder: git clone {address()}"
        )
    try:
        if options.command == "start":
            return open_lab(prepare("requirements.txt"), *rest)
        python = prepare("requirements-test.txt")
        if options.command == "test":
            return run(python, *PYTEST, *(QUICK if options.quick else ()), *rest)
        return run(python, "-m", "helpers.notebooks", *rest)
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
        return 130
    except OSError as error:
        sys.exit(f"The course's folder or its environment cannot be used: {error}")


def address() -> str:
    """The repository's address, from the installed package."""
    from importlib.metadata import metadata

    urls = metadata("fine-tuning-course").get_all("Project-URL")
    return dict(url.split(", ", 1) for url in urls)["Repository"]


if __name__ == "__main__":
    sys.exit(main())
