"""Pins, ranges, imports, the wheel, the conda file and the README must tell the same story."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import __main__ as command_line

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file; every line must be an exact pin.

    A pin may be for some systems only; on others it is left out here too.
    """
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", "-")):
            continue
        pin, _, marker = line.partition("; ")
        package, exact = re.fullmatch(r"([\w.-]+)==([\w.]+)", pin).groups()
        if not marker or Marker(marker).evaluate():
            found[canonicalize_name(package)] = exact
    return found


COURSE, TEST, REST = (
    pins(name) for name in ("requirements.txt", "requirements-test.txt", "constraints.txt")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LAPTOP = PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["wandb"] + EXTRAS["serve"]


def names(ranges: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in ranges}


# -- pins and ranges -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pinned", "ranges"), [(COURSE, LAPTOP), (TEST, EXTRAS["test"])], ids=["course", "test tools"]
)
def test_every_pin_lies_in_its_range(pinned: dict[str, str], ranges: list[str]) -> None:
    requirements = {canonicalize_name(r.name): r for r in map(Requirement, ranges)}
    requirements = {
        name: r for name, r in requirements.items() if not r.marker or r.marker.evaluate()
    }
    assert requirements.keys() == pinned.keys()
    outside = {name for name, exact in pinned.items() if exact not in requirements[name].specifier}
    assert not outside


@pytest.mark.parametrize("text", LAPTOP + EXTRAS["test"])
def test_every_range_has_both_ends(text: str) -> None:
    operators = {specifier.operator for specifier in Requirement(text).specifier}
    assert operators == {">=", "<"}


def test_no_package_is_pinned_twice() -> None:
    assert not COURSE.keys() & TEST.keys()
    assert not (COURSE | TEST).keys() & REST.keys()


def test_the_pins_are_what_is_installed() -> None:
    installed = {name: Version(version(name)).public for name in COURSE | TEST}
    assert installed == COURSE | TEST


def test_torch_may_come_in_any_build() -> None:
    """The pin takes a CPU build, which pip prefers where both are at hand."""
    pin = SpecifierSet(f"=={COURSE['torch']}")
    builds = [COURSE["torch"], f"{COURSE['torch']}+cpu"]
    assert list(pin.filter(builds)) == builds
    assert max(map(Version, builds)).local == "cpu"
    assert version("torch") in pin


# -- imports -------------------------------------------------------------------------------------


DISTRIBUTIONS = packages_distributions()


def code_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.MULTILINE)


def imported(path: Path) -> set[str]:
    """The distributions that a module or notebook imports, at its top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(code_of(path))):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    modules -= sys.stdlib_module_names | {"helpers"}
    return {canonicalize_name(DISTRIBUTIONS.get(module, [module])[0]) for module in modules}


# helpers/notebooks.py runs notebooks: a tool, whose libraries are with the test tools.
TOOLS = {"helpers/notebooks.py": {"nbformat", "nbclient"}}


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "helpers").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_every_import_is_declared(path: Path) -> None:
    tools = TOOLS.get(path.relative_to(ROOT).as_posix(), set())
    assert tools <= names(EXTRAS["test"])
    declared = (
        names(PROJECT["dependencies"])
        | names(EXTRAS["wandb"] + EXTRAS["record"] + EXTRAS["serve"])
        | tools
    )
    assert imported(path) <= declared


def test_every_dependency_is_imported() -> None:
    paths = [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    needed = set().union(*map(imported, paths))
    needed |= {"gguf"}  # transformers reads the model's file with it
    assert names(PROJECT["dependencies"] + EXTRAS["wandb"]) <= needed


def test_the_set_up_needs_the_standard_library_alone() -> None:
    assert not imported(ROOT / "helpers" / "__main__.py")
    assert not imported(ROOT / "helpers" / "__init__.py")


# -- the wheel -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_holds_the_course_and_its_data(tmp_path: Path) -> None:
    """Every module, every row and the datasheet, and they work without the repository."""
    source = tmp_path / "source"
    for name in ("helpers", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([*pip, source], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("helpers/")}
        archive.extractall(tmp_path / "site")
    modules = (source / "helpers").rglob("*.py")
    expected = {path.relative_to(source).as_posix() for path in modules}
    data = [path for path in (source / "data").rglob("*") if path.suffix in (".jsonl", ".md")]
    expected |= {f"helpers/course_data/{p.relative_to(source / 'data').as_posix()}" for p in data}
    assert "helpers/course_data/README.md" in expected
    assert expected <= held

    check = "import helpers; from helpers.data import load_triage; from helpers import memory\n"
    check += "print(helpers.__file__); print(sum(map(len, load_triage().values())))"
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{check}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    file, rows = shown.stdout.splitlines()
    assert file.startswith(str(tmp_path / "site")) and int(rows) == 684


# -- the other files -----------------------------------------------------------------------------


def test_conda_installs_the_same_pins_and_an_allowed_python() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, from_pip = environment["dependencies"]
    assert pip == "pip" and from_pip == {"pip": ["-r requirements.txt"]}
    assert python.removeprefix("python=") in Requirement("p" + PROJECT["requires-python"]).specifier


def test_the_command_line_allows_the_same_pythons_as_the_package() -> None:
    allowed = Requirement("p" + PROJECT["requires-python"]).specifier
    for minor in range(9, 16):
        inside = command_line.OLDEST <= (3, minor) <= command_line.NEWEST
        assert (f"3.{minor}" in allowed) == inside
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in allowed


def test_the_readme_gives_the_commands_and_sizes_that_hold() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("start", "test"):
        assert f"\npython -m helpers {command}\n" in readme
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for command in ("test", "test --quick"):
        assert f"\npython -m helpers {command}\n" in contributing
    for download, disk in command_line.BUILDS.values():
        assert f" | {download} GB | {disk} GB | " in readme
    assert "@" not in re.sub(r"`[^`]*`", "", readme), "a figure is still to be filled in"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_code_is_clean_and_formatted(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
