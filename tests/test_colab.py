"""Every notebook opens on Colab with one set-up cell, from one address, and leaves torch alone."""

import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import nbformat
import pytest

from helpers import notebooks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_and_set_up_cell_follow_the_address(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    notebooks.set_up(fresh, path.stem)
    assert stored.cells[0].source == fresh.cells[0].source
    assert stored.cells[1].source == fresh.cells[1].source
    assert len(stored.cells) == len(fresh.cells)
    assert f"/blob/main/notebooks/{path.name})" in stored.cells[0].source


def test_a_fork_changes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = "https://github.com/someone/their-fork"
    monkeypatch.setattr(notebooks, "address", lambda: fork)
    path = tmp_path / NOTEBOOKS[0].name
    shutil.copy(NOTEBOOKS[0], path)
    notebooks.relink(path)
    notebook = nbformat.read(path, as_version=4)
    assert "/github/someone/their-fork/blob/main/" in notebook.cells[0].source
    assert f"git+{fork}" in notebook.cells[1].source


def test_elsewhere_the_set_up_cell_does_nothing() -> None:
    cell = notebooks.SET_UP.format(address=notebooks.address())
    done = run_cell(Path(sys.executable), cell, colab=False)
    assert done.returncode == 0 and not done.stdout and not done.stderr


def run_cell(python: Path, cell: str, colab: bool) -> subprocess.CompletedProcess[str]:
    """Run a notebook cell in IPython, with or without the module by which Colab is known."""
    pretend = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"
    code = f"""
        import json, sys
        from IPython.core.interactiveshell import InteractiveShell
        {pretend if colab else ""}
        InteractiveShell().run_cell(json.loads({json.dumps(cell)!r})).raise_error()
    """
    return subprocess.run(
        [python, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )


def test_on_colab_the_cell_installs_the_course_and_leaves_torch_alone(tmp_path: Path) -> None:
    """The cell as stored, in a clean environment; only the address is that of a local clone.

    As on Colab, torch and its friends are there before. They come from this environment by a
    .pth file, which pip sees but cannot write to, and any new version of one would be installed
    over it in the clean environment, where the test would find it.
    """
    clone = tmp_path / "clone"
    copy_of_the_tree(clone)
    folder = tmp_path / "colab"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = "import site; print(site.getsitepackages()[-1])"
    own = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    # An old setuptools that venv brings would hide the newer one of the environment.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    borrowed = torch_folder()
    (own / "preinstalled.pth").write_text(f"{borrowed}\n")
    before = sorted(path.name for path in own.iterdir())

    cell = notebooks.SET_UP.format(address=clone.as_uri())
    done = run_cell(python, cell, colab=True)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stdout.lower(), done.stdout

    new = sorted(path.name for path in own.iterdir() if path.name not in before)
    assert [name for name in new if not name.startswith(("fine_tuning_course", "helpers"))] == []
    check = (
        "import helpers, torch; from helpers.data import load_triage;"
        "print(helpers.__file__); print(torch.__file__); print(len(load_triage()['train']))"
    )
    shown = subprocess.run([python, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].startswith(str(own)) and lines[1].startswith(str(borrowed))
    assert int(lines[2]) >= 400


def torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent.parent


def copy_of_the_tree(target: Path) -> None:
    """A git repository of the working tree as it is, so that uncommitted changes count too."""
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    git = ["git", "-C", str(target), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", "init", "--quiet", str(target)], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "tree"], check=True)
