"""`python -m helpers`, for real where that takes seconds; nothing here installs the packages.

The real runs happen in a copy of the course in a folder whose name has spaces, with a Python
outside any virtual environment. What would install for minutes is looked at by its command.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from helpers import __main__ as command_line

ROOT = Path(__file__).parent.parent
# The Python that made this environment: outside it, as a learner's is.
PYTHON = getattr(sys, "_base_executable", sys.executable)
BIN = "Scripts" if os.name == "nt" else "bin"
posix = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a POSIX signal")


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A copy of the course, of which only the first notebook matters here."""
    target = tmp_path / "a folder" / "the course"
    shutil.copytree(ROOT / "helpers", target / "helpers", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(ROOT / "data", target / "data")
    for name in ("requirements.txt", "requirements-test.txt", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)
    (target / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "00_start_here.ipynb", target / "notebooks")
    return target


def clean(**more: str) -> dict[str, str]:
    """The environment variables without those of an active environment, and without an index."""
    kept = {name: value for name, value in os.environ.items() if "CONDA" not in name}
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PIP_FIND_LINKS"):
        kept.pop(name, None)
    return kept | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull} | more


def helpers(
    course: Path, *arguments: str, python: str | Path = PYTHON, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "helpers", *arguments],
        cwd=course,
        env=clean(**more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def make_environment(course: Path, *options: str) -> Path:
    """A real virtual environment in .venv. Returns its Python."""
    subprocess.run([PYTHON, "-m", "venv", *options, course / ".venv"], check=True)
    return course / ".venv" / BIN / "python"


def pretend_installed(course: Path, python: Path) -> None:
    """Lend .venv this environment's packages, and note down that the pins are installed."""
    ask = "import site; print(site.getsitepackages()[-1])"
    own = Path(subprocess.check_output([python, "-c", ask], text=True).strip())
    lent = Path(pytest.__file__).parent.parent
    (own / "lent.pth").write_text(f"{course}\n{lent}\n")
    digest = hashlib.sha256()
    for name in ("constraints.txt", "requirements.txt", "requirements.txt", "pyproject.toml"):
        digest.update((course / name).read_bytes())
    (course / ".venv" / ".installed-requirements.txt").write_text(digest.hexdigest())


# -- the environment -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no pip", "no python"])
def test_a_half_made_environment_is_made_again(course: Path, damage: str) -> None:
    """What Ctrl-C or a missing ensurepip leaves; the installation itself then has no index."""
    python = make_environment(course, "--without-pip")
    if damage == "no python":
        python.unlink()
    done = helpers(course, "start")
    assert "Making a virtual environment in .venv, again" in done.stdout
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("The installation failed: pip says why above.")
    assert "Traceback" not in done.stderr
    pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True)
    assert pip.returncode == 0


WITHOUT_ENSUREPIP = """\
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "ensurepip" else find_spec(name)
from helpers.__main__ import main
sys.exit(main(["start"]))
"""


def test_python_without_ensurepip_names_the_package(course: Path) -> None:
    """Debian's python3 without python3-venv, which leaves an environment without pip behind."""
    make_environment(course, "--without-pip")
    done = subprocess.run(
        [PYTHON, "-c", WITHOUT_ENSUREPIP], cwd=course, env=clean(), capture_output=True, text=True
    )
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in line


def test_an_active_environment_without_pip_is_left_alone(course: Path) -> None:
    python = make_environment(course, "--without-pip")
    done = helpers(course, "start", python=python)
    assert done.returncode == 1
    assert done.stderr == "The active environment has no pip. Deactivate it and run this again.\n"


ENVIRONMENT = "from helpers import __main__ as m; print(m.environment_python())"


@pytest.mark.parametrize("base", [True, False])
def test_conda_base_stays_as_it_is(course: Path, base: bool) -> None:
    prefix = subprocess.check_output([PYTHON, "-c", "import sys; print(sys.prefix)"], text=True)
    conda = {"CONDA_PREFIX": prefix.strip(), "CONDA_DEFAULT_ENV": "base" if base else "course"}
    done = subprocess.run(
        [PYTHON, "-c", ENVIRONMENT], cwd=course, env=clean(**conda), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *told, python = done.stdout.splitlines()
    inside = Path(python).is_relative_to(course / ".venv")
    assert inside == base and bool(told) == base
    if base:
        assert told[0].startswith("conda's base environment stays as it is")


def test_it_needs_an_allowed_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line.sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11, 3\.12 or 3\.13"):
        command_line.main(["start"])


@pytest.mark.parametrize("command", ["start", "test", "notebooks"])
def test_an_installed_package_says_to_clone(course: Path, tmp_path: Path, command: str) -> None:
    """From a wheel, helpers lies in site-packages, without the repository around it."""
    shutil.copytree(course / "helpers", tmp_path / "site" / "helpers")
    done = helpers(tmp_path, command, python=sys.executable, PYTHONPATH=str(tmp_path / "site"))
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and "git clone https://" in line
    assert not (tmp_path / "site" / ".venv").exists()


# -- what is downloaded --------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A Linux machine without a GPU, with 100 GB of free disk and PyPI alone as its index."""
    about = {
        "versions": "torch (2.15.0)\nAvailable versions: 2.15.0, 2.13.0, 2.12.1",
        "torch": None,
    }
    about |= {"gpu": False, "system": "Linux", "free": 100e9}
    monkeypatch.setattr(
        command_line, "ask", lambda *c, **_: about["versions" if "index" in c else "torch"]
    )
    monkeypatch.setattr(command_line, "has_nvidia_gpu", lambda: about["gpu"])
    monkeypatch.setattr(command_line.platform, "system", lambda: about["system"])
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(
        command_line.shutil, "disk_usage", lambda _: usage._replace(free=about["free"])
    )
    return about


def told(capsys: pytest.CaptureFixture[str]) -> str:
    command_line.check_torch(Path(sys.executable), ROOT)
    return capsys.readouterr().out


def test_the_cuda_build_is_announced_with_the_way_to_the_smaller_one(
    machine: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys)
    assert "CUDA build, 2.7 GB" in text and "PIP_EXTRA_INDEX_URL" in text
    machine["gpu"] = True
    text = told(capsys)
    assert "CUDA build, 2.7 GB" in text and "PIP_EXTRA_INDEX_URL" not in text


def test_the_cpu_build_is_announced_where_pip_finds_it(
    machine: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    machine["versions"] = "Available versions: 2.14.0+cpu, 2.13.0+cpu, 2.13.0"
    text = told(capsys)
    assert "CPU build, 0.2 GB" in text and "PIP_EXTRA_INDEX_URL" not in text
    machine["versions"] = "Available versions: 2.14.0+cpu, 2.13.0, 2.13.0.1+cpu"
    assert "CUDA build" in told(capsys)


def test_nothing_is_announced_where_nothing_is_known_or_to_be_had(
    machine: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    for change in ({"versions": None}, {"system": "Darwin"}, {"torch": "2.13.0\n"}):
        machine |= {"versions": "2.13.0", "torch": None, "system": "Linux"} | change
        assert told(capsys) == ""


def test_a_disk_that_is_too_small_stops_it(machine: dict) -> None:
    machine["free"] = 6e9
    with pytest.raises(SystemExit, match=r"6\.0 GB are free.*PIP_EXTRA_INDEX_URL"):
        command_line.check_torch(Path(sys.executable), ROOT)
    machine["versions"] = "2.13.0+cpu"
    command_line.check_torch(Path(sys.executable), ROOT)
    machine["free"] = 1e9
    with pytest.raises(SystemExit, match=r"1\.0 GB are free\. Free some and run this again\.$"):
        command_line.check_torch(Path(sys.executable), ROOT)


def test_pip_finds_the_cpu_build_in_a_further_index(tmp_path: Path) -> None:
    """What README advises: pip takes +cpu for the very pin, from what the variable names."""
    page = tmp_path / "torch"
    page.mkdir()
    for name in ("2.13.0", "2.13.0%2Bcpu"):
        with (page / "index.html").open("a") as index:
            index.write(f"<a href='torch-{name}-py3-none-any.whl'>torch</a>\n")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "torch"],
        env=clean(PIP_NO_INDEX="0", PIP_INDEX_URL=tmp_path.as_uri()),
        capture_output=True,
        text=True,
    )
    assert "2.13.0+cpu, 2.13.0" in done.stdout


# -- the commands --------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that would run, after an installation that is taken for done."""
    seen: list[tuple[str, ...]] = []

    def record(*command: str | Path, **more: object) -> int:
        seen.append(tuple(map(str, command)))
        return 0

    monkeypatch.setattr(command_line, "run", record)
    monkeypatch.setattr(command_line, "prepare", lambda requirements: Path("python"))
    return seen


def test_arguments_go_where_they_belong(ran: list[tuple[str, ...]]) -> None:
    assert command_line.main(["test", "-k", "colab", "--lf"]) == 0
    assert command_line.main(["test", "--quick", "-x"]) == 0
    assert command_line.main(["notebooks", "07"]) == 0
    assert command_line.main(["start", "--no-browser", "--port", "9000"]) == 0
    everything, quick, notebooks, start = ran
    assert everything[-3:] == ("-k", "colab", "--lf") and "tests" not in everything
    assert quick[-4:] == ("tests", "-m", "not slow and not gpu", "-x")
    assert everything[3:5] == quick[3:5] == ("-n", "2")
    assert notebooks[1:] == ("-m", "helpers.notebooks", "07")
    assert start[-3:] == ("--no-browser", "--port", "9000")


def test_quick_goes_with_test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["start", "--quick"])
    assert "--quick goes with test" in capsys.readouterr().err


@pytest.mark.parametrize("user", [0, 1000])
def test_root_is_let_in_and_told(
    user: int, ran: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line.os, "geteuid", lambda: user, raising=False)
    command_line.main(["start"])
    assert ("--allow-root" in ran[0]) == (user == 0)
    assert ("--allow-root" in capsys.readouterr().out) == (user == 0)


def test_the_packages_are_installed_once_for_the_same_pins(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    monkeypatch.setattr(command_line, "ROOT", course)
    monkeypatch.setattr(command_line, "check_torch", lambda *_: None)
    monkeypatch.setattr(command_line, "run", lambda *c, **_: seen.append(tuple(map(str, c))) or 0)
    python = course / ".venv" / BIN / "python"
    python.parent.mkdir(parents=True)
    for expected in (2, 2):
        command_line.install(python, "requirements.txt")
        assert len(seen) == expected
    assert seen[0][-2:] == ("-r", "requirements.txt")
    assert seen[1][-3:] == ("--no-deps", "--editable", ".")
    with (course / "constraints.txt").open("a") as pins:
        pins.write("another==1.0\n")
    command_line.install(python, "requirements.txt")
    assert len(seen) == 4


def test_help_is_fast_and_imports_nothing_heavy(course: Path) -> None:
    start = time.perf_counter()
    done = helpers(course, "--help")
    assert done.returncode == 0 and "test --quick" in done.stdout
    assert time.perf_counter() - start < 2  # 0.1 s; other processes may be busy


# -- start, to the end ---------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def let_ctrl_c_through() -> None:
    """In the child: where the tests run in a shell's background, it would be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fetch(address: str) -> str | None:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return None


@posix
def test_start_opens_jupyterlab_and_ctrl_c_ends_it(course: Path, tmp_path: Path) -> None:
    pretend_installed(course, make_environment(course))
    port, home = free_port(), tmp_path / "home"
    lab = f"http://127.0.0.1:{port}"
    arguments = ["--no-browser", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token="]
    cache = os.environ.get("COURSE_CACHE", str(Path.home() / ".cache" / "fine-tuning-course"))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [PYTHON, "-m", "helpers", "start", *arguments],
            cwd=course,
            env=clean(HOME=str(home), COURSE_CACHE=cache),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=let_ctrl_c_through,
        )
        try:
            deadline = time.monotonic() + 120
            while fetch(f"{lab}/api") is None:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert "JupyterLab" in fetch(f"{lab}/lab/tree/00_start_here.ipynb")
            plugin = "@jupyterlab/apputils-extension:notification"
            settings = json.loads(fetch(f"{lab}/lab/api/settings/{plugin}"))
            properties = settings["schema"]["properties"]
            assert properties["fetchNews"]["default"] == "false"
            assert properties["checkForUpdates"]["default"] is False
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to all of them
            code = process.wait(30)
    text = (tmp_path / "log").read_text()
    assert code == 130 and "Traceback" not in text
    assert fetch(f"{lab}/api") is None
    assert ("--allow-root" in text) == (os.geteuid() == 0)


@posix
@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_ends_a_running_command_too(course: Path, whole_group: bool) -> None:
    """Also where it reaches the course's process alone, as from `kill -INT`."""
    pip = make_environment(course)
    pip.unlink()
    pip.write_text("#!/bin/sh\ncase $* in *version*) exit 0;; esac\necho busy\nexec sleep 60\n")
    pip.chmod(0o755)
    process = subprocess.Popen(
        [PYTHON, "-m", "helpers", "start"],
        cwd=course,
        env=clean(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=let_ctrl_c_through,
    )
    seen = [line for line in iter(process.stdout.readline, "busy\n")]
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in rest and seen


def test_another_helpers_is_named(course: Path) -> None:
    """A helpers.py beside the notebooks is what a notebook would import."""
    pretend_installed(course, make_environment(course))
    other = course / "notebooks" / "helpers.py"
    other.write_text("")
    done = helpers(course, "start")
    [line] = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: {other} hides the course's package")
