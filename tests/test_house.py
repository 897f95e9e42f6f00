"""The house: one list of modules, in the README and in the package, and imports one way."""

import ast
import re
from pathlib import Path

import pytest

import helpers

ROOT = Path(__file__).parent.parent
HELPERS = ROOT / "helpers"


def listed() -> list[str]:
    """The modules in the order of the docstring of helpers/__init__.py."""
    return re.findall(r"^    (\w+) {2,}\S", helpers.__doc__ or "", re.MULTILINE)


def module_of(path: Path) -> str:
    """The room that a file belongs to: its own name, or its folder's."""
    parts = path.relative_to(HELPERS).parts
    return parts[0].removesuffix(".py")


def imported_by(path: Path) -> set[str]:
    """The modules of helpers that a file imports anywhere, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}: write imports in full, from helpers...")
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("helpers.")}
    return {name for name in found if name in listed()}


def files() -> list[Path]:
    return sorted(path for path in HELPERS.rglob("*.py") if path != HELPERS / "__init__.py")


def test_the_list_of_modules_is_whole() -> None:
    assert sorted(listed()) == sorted({module_of(path) for path in files()})


def test_the_list_in_the_readme_is_the_same() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("helpers/ ", 1)[1].split("\ndata/", 1)[0]
    names = re.findall(r"^  (\w+)(?:\.py|/) {2,}\S", block, re.MULTILINE)
    assert names == listed()


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(HELPERS)))
def test_a_module_imports_only_from_those_above_it(path: Path) -> None:
    order = listed()
    above = order[: order.index(module_of(path)) + 1]
    assert imported_by(path) <= set(above)


def test_inside_a_folder_imports_run_one_way_too() -> None:
    for folder in ("memory", "exercises"):
        imports = {}
        for path in (HELPERS / folder).glob("[!_]*.py"):
            text = path.read_text(encoding="utf-8")
            imports[path.stem] = set(re.findall(rf"from helpers\.{folder}\.(\w+) import", text))
        done: set[str] = set()
        while ready := {name for name, needs in imports.items() if needs <= done} - done:
            done |= ready
        assert done == imports.keys(), f"a circle in {folder}: {imports.keys() - done}"
