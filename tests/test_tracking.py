"""Tracking: no question ever, no call to anybody offline, and runs that can be read back."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import CourseError, tracking

# In a process of its own, since wandb reads the environment once and keeps a service running.
TWO_RUNS = """
import sys
from helpers import tracking, weights
assert tracking.report_to("offline", sys.argv[1]) == "wandb"
import wandb
for rate in (0.1, 0.2):
    run = wandb.init(group="rates", name=f"rate {rate}", tags=["t"], config={"rate": rate, "n": 1})
    run.config.update({"n": 2, "model/size": 7}, allow_val_change=True)
    for step in (1, 2):
        run.log({"train/loss": rate / 3 / step, "train/global_step": step})
    run.log({"eval/loss": float("nan"), "train/global_step": 2})
    run.summary["exact_match"] = 0.5
    artifact = wandb.Artifact("adapter", type="model")
    artifact.add_file(sys.argv[2])
    run.log_artifact(artifact)
    print("a secret that a cell printed")
    run.finish()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "weights.bin").write_bytes(bytes(1000))
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, str(folder / "out"), str(folder / "weights.bin")],
        cwd=Path(__file__).parent.parent,
        env={name: value for name, value in os.environ.items() if "WANDB" not in name},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder / "out"


def test_runs_are_read_back_as_they_were_logged(folder: Path) -> None:
    runs = tracking.read_runs(folder)
    assert [run.name for run in runs] == ["rate 0.1", "rate 0.2"]
    for run, rate in zip(runs, (0.1, 0.2), strict=True):
        assert (run.group, run.project, run.tags) == ("rates", tracking.PROJECT, ("t",))
        assert run.config == {"rate": rate, "n": 2, "model/size": 7}
        assert run.curve("train/loss") == [[1, rate / 3], [2, rate / 3 / 2]]
        assert run.summary["exact_match"] == 0.5
        assert run.artifacts == {"adapter": 1000}
        assert run.finished
        assert run.folder.name.endswith(run.id)


def test_a_loss_that_is_no_number_stays_one(folder: Path) -> None:
    [[step, loss]] = tracking.read_runs(folder)[0].curve("eval/loss")
    assert step == 2 and math.isnan(loss)


def test_a_metric_that_was_never_logged_is_an_empty_curve(folder: Path) -> None:
    assert tracking.read_runs(folder)[0].curve("eval/accuracy") == []


def test_everything_of_a_run_lies_in_its_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"wandb", "artifacts"}
    copies = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in copies] == [1000, 1000]


def test_what_a_cell_prints_stays_out_of_the_run(folder: Path) -> None:
    run = tracking.read_runs(folder)[0]
    assert "secret" not in json.dumps(tracking.records(run.folder))
    assert all(
        b"a secret" not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file()
    )


def test_a_run_that_was_killed_can_be_read(folder: Path, tmp_path: Path) -> None:
    [whole, _] = tracking.read_runs(folder)
    content = next(whole.folder.glob("run-*.wandb")).read_bytes()
    cut = tmp_path / "run-cut.wandb"
    cut.write_bytes(content[: int(len(content) * 0.9)])
    run = tracking.read_run(cut)
    assert run.name == "rate 0.1" and not run.finished
    assert run.curve("train/loss") == whole.curve("train/loss")


@pytest.mark.parametrize("content", [None, b"", b"this is not a run at all"])
def test_what_is_no_run_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run-x.wandb").write_bytes(content)
    with pytest.raises(CourseError, match="run"):
        tracking.read_run(tmp_path)


def test_a_folder_without_runs_has_none(tmp_path: Path) -> None:
    assert tracking.read_runs(tmp_path) == []


def test_off_is_the_word_that_the_trainer_takes_for_off(tmp_path: Path) -> None:
    before = dict(os.environ)
    assert tracking.report_to("off", tmp_path) == "none"
    assert dict(os.environ) == before
    with pytest.raises(CourseError, match="offline"):
        tracking.report_to("of", tmp_path)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_wandb_by_itself_asks_and_with_our_settings_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tracking.asks_for_a_key() is True
    assert tracking.asks_for_a_key(**settings_of(monkeypatch, tmp_path)) is False
    assert tracking.asks_for_a_key(WANDB_SILENT="true") is False  # even when it would be online


def test_offline_calls_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tracking.hosts_called(**settings_of(monkeypatch, tmp_path)) == []
    assert tracking.hosts_called()  # the listener does hear wandb when it may call


def settings_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, str]:
    """The WANDB_ variables that `report_to("offline")` sets."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as inner:
        inner.setattr(os, "environ", dict(os.environ))
        tracking.report_to("offline", folder)
        return {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a key. Returns the path of its .netrc, which is not there."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path / ".netrc"


def test_online_without_a_key_is_refused(no_key: Path) -> None:
    assert not tracking.has_key()
    with pytest.raises(CourseError, match="wandb login"):
        tracking.report_to("online", no_key.parent)
    no_key.write_text("machine example.org login user password x\n")
    assert not tracking.has_key()
    no_key.write_text("this is no netrc file")
    assert not tracking.has_key()


def test_a_key_is_found_where_this_wandb_puts_it(no_key: Path) -> None:
    # A test of today's wandb: its login moved to another host name in 0.31.
    from wandb.sdk.lib import urls, wbauth

    wbauth.wbnetrc.write_netrc_auth(host=urls.DEFAULT_BASE_URL, api_key="x" * 40)
    assert no_key.is_file()
    assert tracking.has_key()


@pytest.mark.parametrize("host", tracking.KEY_HOSTS)
def test_a_key_is_found_under_both_names_and_in_the_environment(host: str, no_key: Path) -> None:
    no_key.write_text(f"machine {host}\n  login user\n  password {'x' * 40}\n")
    assert tracking.has_key()
    no_key.unlink()
    os.environ["WANDB_API_KEY"] = "x" * 40
    assert tracking.has_key()


def test_a_server_of_ones_own_needs_its_own_key(no_key: Path) -> None:
    no_key.write_text("machine wandb.example.org login user password x\n")
    assert not tracking.has_key()
    os.environ["WANDB_BASE_URL"] = "https://wandb.example.org"
    assert tracking.has_key()
