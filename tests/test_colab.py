"""Every notebook opens on Colab by one link and one cell, and Colab's own packages stay.

No network reaches Colab here. Instead pip is asked what the cell would install on a machine with
the packages of Colab's runtime (tests/colab.txt): each is there by its metadata alone.
"""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import notebooks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Of what Colab has, only these may be replaced: the course needs newer ones.
NEWER = {"transformers", "peft", "accelerate", "tokenizers", "safetensors"}
NEWER |= {"huggingface-hub", "hf-xet", "click"}  # which transformers needs newer in turn
NEWER |= {"datasets", "pyarrow"}  # which trl needs newer


# -- the link and the cell -----------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_link_and_set_up_cell_follow_the_address(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    notebooks.set_up(fresh, path.stem)
    assert stored.cells[0].source == fresh.cells[0].source
    assert stored.cells[1].source == fresh.cells[1].source
    assert stored.cells[1].metadata == fresh.cells[1].metadata
    assert stored.cells[1].id == "set-up"
    assert len(stored.cells) == len(fresh.cells)
    assert f"/blob/{notebooks.REF}/notebooks/{path.name})" in stored.cells[0].source


BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://a/b)"


@pytest.mark.parametrize("first", ["", f"\n\n{BADGE}", "\n\n[Open in Colab](https://old/address)"])
def test_old_links_are_replaced(first: str) -> None:
    for source in (f"# Title\n\nText.{first}", f"# Title{first}\n\nText."):
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell(source), nbformat.v4.new_code_cell("1")]
        )
        for _ in range(2):  # a second time changes nothing
            notebooks.set_up(notebook, "07_name")
            title, link, text = notebook.cells[0].source.split("\n\n")
            assert (title, text) == ("# Title", "Text.")
            assert link.startswith("[Open in Colab](https://colab.research.google.com/github/")
            assert link.endswith("/notebooks/07_name.ipynb)")
            assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code"]
            assert notebook.cells[1].metadata["jupyter"] == {"source_hidden": True}


def test_a_fork_changes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = "https://github.com/someone/their-fork"
    monkeypatch.setattr(notebooks, "address", lambda: fork)
    path = tmp_path / NOTEBOOKS[0].name
    shutil.copy(NOTEBOOKS[0], path)
    notebooks.relink(path)
    notebook = nbformat.read(path, as_version=4)
    assert f"/github/someone/their-fork/blob/{notebooks.REF}/" in notebook.cells[0].source
    source = notebook.cells[1].source
    assert f'address = "{fork}"' in source and f"@{notebooks.REF}" in source


def commands(cell: str) -> list[str]:
    """The shell commands that a cell would run."""
    shell, seen = InteractiveShell(), []
    shell.system = seen.append
    shell.run_cell(cell).raise_error()
    return seen


def test_elsewhere_the_set_up_cell_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert "google.colab" not in sys.modules
    assert commands(notebooks.SET_UP.format(address="https://a/b", ref="main")) == []
    assert not any(capfd.readouterr())


# -- Colab's packages ----------------------------------------------------------------------------


def colab_packages() -> dict[str, tuple[Version, list[Requirement]]]:
    """{package: (version, what it requires)} of Colab's runtime."""
    found = {}
    for line in (ROOT / "tests" / "colab.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pin, _, needs = line.partition(": ")
            name, version = pin.split("==")
            needs = [Requirement(need) for need in needs.split(", ") if need]
            found[canonicalize_name(name)] = (Version(version), needs)
    return found


def install_by_metadata(folder: Path) -> None:
    """Make pip see Colab's packages in a folder. None of them can be imported."""
    for name, (version, needs) in colab_packages().items():
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (about / "METADATA").write_text("\n".join(lines) + "\n")
        (about / "INSTALLER").write_text("pip\n")
        (about / "RECORD").write_text("")


@pytest.mark.slow
def test_the_cell_leaves_what_colab_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell's own pip command, in a dry run; only the address is that of a local clone."""
    clone, folder = tmp_path / "clone", tmp_path / "colab"
    copy_of_the_tree(clone)
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = "import site; print(site.getsitepackages()[-1])"
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", "setuptools"], check=True)
    own = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    install_by_metadata(own)
    assert not broken(colab_packages())

    monkeypatch.setitem(sys.modules, "google.colab", object())
    [command] = commands(notebooks.SET_UP.format(address=clone.as_uri(), ref="main"))
    assert "-m pip install" in command
    report = tmp_path / "report.json"
    command = command.replace(sys.executable, str(python), 1)
    done = subprocess.run(
        f"{command} --dry-run --report '{report}'", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    before, after = colab_packages(), colab_packages()
    for item in json.loads(report.read_text())["install"]:
        about = item["metadata"]
        needs = [Requirement(text) for text in about.get("requires_dist", [])]
        after[canonicalize_name(about["name"])] = (Version(about["version"]), needs)
    assert "fine-tuning-course" in after and "bitsandbytes" in after
    changed = {name for name, (version, _) in before.items() if after[name][0] != version}
    assert changed <= NEWER
    assert not {"torch", "numpy", "jupyterlab", "wandb"} & (after.keys() - before.keys())
    assert not broken(after)


def broken(installed: dict[str, tuple[Version, list[Requirement]]]) -> list[str]:
    """What `pip check` would say of versions; a package that is not there is not looked at."""
    return [
        f"{name} requires {need}, and {installed[canonicalize_name(need.name)][0]} is there"
        for name, (_, needs) in installed.items()
        for need in needs
        if (need.marker is None or need.marker.evaluate({"extra": ""}))
        and canonicalize_name(need.name) in installed
        and not need.specifier.contains(
            installed[canonicalize_name(need.name)][0], prereleases=True
        )
    ]


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
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(target)], check=True)
    subprocess.run([*git, "add", "--all"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "tree"], check=True)
