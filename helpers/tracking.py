"""Weights & Biases, without an account unless one is wanted.

`report_to` prepares a run; `read_run` and `read_runs` read finished or running ones back from the
disk. Neither asks for anything, a key or a network. `asks_for_a_key` and `hosts_called` try out
what wandb does by itself under given settings.
"""

from __future__ import annotations

import dataclasses
import json
import netrc
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from helpers import CourseError

MODES = ("off", "offline", "online")
PROJECT = "fine-tuning-course"
# Where `wandb login` files its key: since 0.31 under the first name, before under the second.
KEY_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def report_to(mode: str, folder: str | Path) -> str:
    """Prepare wandb for a run and return the value for `TrainingArguments(report_to=...)`.

    Call it before wandb is used for the first time: wandb reads the environment once.

    Args:
        mode: "off"; "offline" writes the run into `folder`/wandb, with no account and no network;
            "online" sends it to the W&B server too.
        folder: where the run's files go, and the copies of logged artifacts.

    Raises:
        CourseError: for an unknown mode, or "online" without a key. Asked for here, before the
            training starts, since wandb's own prompt would block it.
    """
    if mode not in MODES:
        raise CourseError(f"There is no tracking mode {mode!r}. Choose one of {', '.join(MODES)}.")
    if mode == "off":
        return "none"
    if mode == "online" and not has_key():
        raise CourseError(
            "Tracking online needs a key. Run `wandb login` in a terminal once, which stores it "
            "outside the notebook, or use offline: such a run can be sent later by `wandb sync`."
        )
    os.environ["WANDB_MODE"] = mode
    os.environ["WANDB_DIR"] = str(folder)
    os.environ["WANDB_DATA_DIR"] = str(folder)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    # Silent, wandb cannot ask: with no key it raises an error where it would have prompted.
    os.environ.setdefault("WANDB_SILENT", "true")
    # What a cell prints stays out of the run: it could be a secret.
    os.environ.setdefault("WANDB_CONSOLE", "off")
    # Errors and usage of wandb itself are otherwise sent to its maker, offline runs included.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return "wandb"


def has_key() -> bool:
    """True if wandb would find a key: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = list(KEY_HOSTS)
    if own := os.environ.get("WANDB_BASE_URL"):  # a server of one's own
        hosts = [urlsplit(own).netloc]
    files = [Path.home() / ".netrc", Path.home() / "_netrc"]
    if named := os.environ.get("NETRC"):
        files = [Path(named).expanduser()]
    for file in files:
        try:
            found = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError):
            continue
        if any(host in found.hosts for host in hosts):
            return True
    return False


# -- reading runs back -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of one run's `.wandb` file.

    Attributes:
        config: the settings, as they were after the last change.
        history: one dict per call of `wandb.log`, with the step in "_step".
        summary: the last value of every metric, and what was set by hand.
        artifacts: {name: bytes of its files}.
        finished: False if the run still goes on, or its process was killed.
    """

    folder: Path
    id: str
    name: str
    group: str
    project: str
    tags: tuple[str, ...]
    started: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    artifacts: dict[str, int]
    finished: bool

    def curve(self, metric: str, step: str = "train/global_step") -> list[list[float]]:
        """A metric as [[step, value], ...], where it was logged. JSON has "NaN" as text."""
        rows = [row for row in self.history if metric in row and step in row]
        return [[row[step], float(row[metric])] for row in rows]


def records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a run, as `wandb leet inspect --json` prints them.

    Args:
        path: a run's folder, or its `.wandb` file.

    Raises:
        CourseError: there is no such run, it is empty, or wandb cannot read it.
    """
    path = Path(path).resolve()
    files = [path] if path.suffix == ".wandb" else sorted(path.glob("run-*.wandb"))
    if len(files) != 1 or not files[0].is_file():
        raise CourseError(
            f"{path} is not the folder of one W&B run: it needs one file run-*.wandb. "
            f"Such folders are named offline-run-DATE-ID and lie in wandb/."
        )
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(files[0])],
        env=os.environ | {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"},
        cwd=files[0].parent,  # the command leaves its log in ./wandb, if there is one
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["no reason given"]
        raise CourseError(f"wandb cannot read {files[0]}: {reason[-1]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not found:
        raise CourseError(f"{files[0]} holds no records: the run was killed as it started.")
    return found


def read_run(path: str | Path) -> Run:
    """Read a run from its folder. Takes about a second; needs no account and no network.

    Raises:
        CourseError: there is no such run, or wandb cannot read it.
    """
    path = Path(path).resolve()
    first: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    history, summary, artifacts, finished = [], {}, {}, False
    for record in records(path):
        content = record.get(record["type"], {})
        if record["type"] == "run":
            first = first or content
            settings |= content.get("config", {}).get("update", {})
        elif record["type"] == "config":
            settings |= content.get("update", {})
        elif record["type"] == "history":
            history.append(content["item"])
        elif record["type"] == "summary":
            summary |= content.get("update", {})
        elif record["type"] == "artifact":
            files = content.get("manifest", {}).get("contents", [])
            artifacts[content["name"]] = sum(int(file.get("size", 0)) for file in files)
        elif record["type"] == "exit":
            finished = True
    return Run(
        folder=path if path.is_dir() else path.parent,
        id=first.get("run_id", ""),
        name=first.get("display_name", ""),
        group=first.get("run_group", ""),
        project=first.get("project", ""),
        tags=tuple(first.get("tags", ())),
        started=first.get("start_time", ""),
        config={key: value for key, value in settings.items() if not key.startswith("_")},
        history=history,
        summary={key: value for key, value in summary.items() if not key.startswith("_")},
        artifacts=artifacts,
        finished=finished,
    )


def read_runs(folder: str | Path) -> list[Run]:
    """Read every run below a folder, the oldest first. `folder` is what `report_to` was given."""
    files = sorted(Path(folder).glob("wandb/*run-*/run-*.wandb"))
    return sorted((read_run(file) for file in files), key=lambda run: run.started)


# -- what wandb does by itself -----------------------------------------------------------------

ONE_RUN = "import wandb; run = wandb.init(project='trial'); run.log({'loss': 1}); run.finish()"


def asks_for_a_key(**settings: str) -> bool | None:
    """Start a run in a terminal of its own, with no key: does wandb stop and ask for one?

    Args:
        settings: environment variables; no other WANDB_ variable is set.

    Returns:
        None on Windows, where Python has no pseudo-terminals to try it in.
    """
    if not hasattr(os, "openpty"):
        return None
    ours, theirs = os.openpty()
    seen = b""
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-c", ONE_RUN],
            env=_clean_environment() | settings,
            cwd=folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        try:
            while b"Enter your choice" not in seen and (more := os.read(ours, 1024)):
                seen += more
        except OSError:  # Linux says so when the child has ended
            pass
        child.kill()  # it would wait for ever
        child.wait()
    os.close(ours)
    return b"Enter your choice" in seen


def hosts_called(code: str = ONE_RUN, **settings: str) -> list[str]:
    """Run code in a process of its own and note whom it tries to reach over the web.

    The process is told to go through a proxy. That proxy is ours: it writes down the request and
    hangs up, so nothing leaves the machine. Requests that ignore the proxy are not seen.

    Args:
        code: Python; as it stands, one run of one step.
        settings: environment variables; no other WANDB_ variable is set.

    Returns:
        "host:port" for every host that was called, sorted.
    """
    called = set()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        tempfile.TemporaryDirectory() as folder,
    ):

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed: we are done
                    return
                with connection:
                    if request := connection.recv(1024).split():
                        called.add(request[1].decode(errors="replace"))

        threading.Thread(target=answer, daemon=True).start()
        proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
        environment = _clean_environment() | dict.fromkeys(names, proxy) | settings
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    return sorted(called)


def _clean_environment() -> dict[str, str]:
    """This process's environment without settings of wandb and proxies, and with no stored key."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("WANDB_") and "PROXY" not in name.upper()
    }
    return kept | {"NETRC": os.devnull}
