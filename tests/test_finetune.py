"""The command of the contract: what it writes, what it refuses, and that it can be resumed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import training
from helpers.finetune import main

ADAPTER = Path("adapter") / "adapter_model.safetensors"
METRICS = {
    "base_exact_match",
    "test_exact_match",
    "test_loss",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
}


def rows_file(path: Path, texts: list[str]) -> str:
    rows = [{"prompt": f"Say {text}", "completion": text} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def own_data(tmp_path: Path) -> list[str]:
    train = rows_file(tmp_path / "train.jsonl", [f"word {n}" for n in range(24)])
    validation = rows_file(tmp_path / "validation.jsonl", ["apple", "pear"])
    return ["--profile", "tiny", "--train", train, "--validation", validation]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_every_method_writes_every_file(method: str, own_data: list[str], tmp_path: Path) -> None:
    test = rows_file(tmp_path / "test.jsonl", ["plum", "fig"])
    output = tmp_path / "run"
    assert main([*own_data, "--test", test, "--method", method, "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    history = json.loads((output / "history.json").read_text())
    assert metrics.keys() >= METRICS
    assert all(metrics[name] is not None for name in METRICS)
    assert all(len(pair) == 2 for curve in ("train", "eval") for pair in history[curve])
    assert history["train"] and history["eval"]
    assert "verdict" in json.loads((output / "diagnosis.json").read_text())
    weights = "model/model.safetensors" if method == "full" else ADAPTER
    assert (output / weights).is_file()
    assert training.last_checkpoint(output)


def test_without_a_test_split_the_scores_are_empty(own_data: list[str], tmp_path: Path) -> None:
    assert main([*own_data, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test_exact_match"] is None and metrics["validation_loss"] is not None


def test_a_bad_row_is_one_line_with_file_line_and_cause_and_exit_2(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    arguments = [*own_data, "--test", str(bad), "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bad.jsonl:2" in error and "'completion' is missing" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--validation", "v.jsonl"], "--validation and --test need --train"),
        (["--train", "t.jsonl"], "--train needs --validation"),
        (["--resume"], "no complete checkpoint"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--profile", "tiny", "--output", str(tmp_path / "run"), *arguments]) == 2
    assert cause in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    assert main([*own_data, "--output", str(tmp_path)]) == 2
    assert "finished run" in capsys.readouterr().err


def test_a_prompt_in_two_splits_is_refused(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = rows_file(tmp_path / "leak.jsonl", ["apple"])
    assert main([*own_data, "--test", leak, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "leak.jsonl:1" in error and "validation.jsonl:1" in error


def test_killed_and_resumed_equals_an_uninterrupted_run(
    own_data: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "helpers.finetune", *own_data, "--epochs", "6", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    cut = tmp_path / "cut"
    victim = subprocess.Popen([*command, str(cut)], stdout=subprocess.DEVNULL)
    while training.last_checkpoint(cut) is None:
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not (cut / "metrics.json").exists()
    refused = subprocess.run([*command, str(cut)], capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    subprocess.run([*command, str(cut), "--resume"], check=True, capture_output=True)

    whole, resumed = load_file(tmp_path / "whole" / ADAPTER), load_file(cut / ADAPTER)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    histories = [
        json.loads((run / "history.json").read_text()) for run in (tmp_path / "whole", cut)
    ]
    assert histories[0] == histories[1]


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tmp_path: Path) -> None:
    for step, complete in ((5, True), (10, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(tmp_path).endswith("checkpoint-5")
    assert training.last_checkpoint(tmp_path / "nowhere") is None


def test_online_tracking_without_a_key_is_refused_before_training(
    own_data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    arguments = [*own_data, "--tracking", "online", "--output", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "wandb login" in capsys.readouterr().err


def test_offline_tracking_writes_a_run_without_an_account(
    own_data: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "helpers.finetune", *own_data, "--tracking", "offline"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
