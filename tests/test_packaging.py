"""Pins, ranges and the conda file must tell the same story."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import __main__ as command_line

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """{package: version} of a requirements file; every line must be an exact pin."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line or line.startswith(("#", "-")):
            continue
        package, exact = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
        found[canonicalize_name(package)] = exact
    return found


COURSE, TEST, REST = (
    pins(name) for name in ("requirements.txt", "requirements-test.txt", "constraints.txt")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("pinned", "ranges"),
    [(COURSE, PROJECT["dependencies"]), (TEST, PROJECT["optional-dependencies"]["test"])],
    ids=["course", "test tools"],
)
def test_every_pin_lies_in_its_range(pinned: dict[str, str], ranges: list[str]) -> None:
    requirements = {canonicalize_name(r.name): r for r in map(Requirement, ranges)}
    assert requirements.keys() == pinned.keys()
    outside = {name for name, exact in pinned.items() if exact not in requirements[name].specifier}
    assert not outside


def test_torch_is_pinned_as_the_machines_expect_it() -> None:
    assert COURSE["torch"] == "2.13.0"


def test_no_package_is_pinned_twice() -> None:
    assert not COURSE.keys() & TEST.keys()
    assert not (COURSE | TEST).keys() & REST.keys()


def test_the_pins_are_what_is_installed() -> None:
    installed = {name: version(name).split("+")[0] for name in COURSE | TEST}
    assert installed == COURSE | TEST


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


def test_the_readme_gives_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("python -m helpers start", "python -m helpers test"):
        assert f"\n{command}\n" in readme
    assert "@" not in re.sub(r"`[^`]*`", "", readme), "a figure is still to be filled in"
