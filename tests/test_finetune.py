"""The command of the contract: what it writes, what it refuses, and that it can be resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.finetune import main
from helpers.pipeline import _evaluation_batches

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
    assert list(output.glob("checkpoint-*/sealed.json"))
    record = json.loads((output / "run.json").read_text())
    assert record["settings"]["method"] == method and record["data"]["test"]["rows"] == 2


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
        (["--resume"], "no run to resume"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--profile", "tiny", "--output", str(tmp_path / "run"), *arguments]) == 2
    assert cause in capsys.readouterr().err


@pytest.mark.parametrize("again", [[], ["--resume"]])
def test_a_finished_run_is_not_overwritten(
    again: list[str], own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*own_data, "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main([*arguments, *again]) == 2
    assert "finished run" in capsys.readouterr().err


def test_a_prompt_in_two_splits_is_refused(
    own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leak = rows_file(tmp_path / "leak.jsonl", ["apple"])
    assert main([*own_data, "--test", leak, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "leak.jsonl:1" in error and "validation.jsonl:1" in error


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
    assert not (tmp_path / "run").exists()  # before anything is loaded


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


def test_two_processes_give_the_run_of_one(own_data: list[str], tmp_path: Path) -> None:
    test = rows_file(tmp_path / "test.jsonl", ["plum", "fig", "quince"])  # not the same for both
    arguments = ["-m", "helpers.finetune", *own_data, "--test", test, "--epochs", "2"]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    runs = []
    for name, command in (
        ("one", [*arguments, "--batch-size", "8"]),
        ("two", [*launch, *arguments, "--batch-size", "4"]),
    ):
        output = tmp_path / name
        done = subprocess.run(
            [sys.executable, *command, "--output", str(output)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("diagnosis:") == 1  # one process speaks for all
        runs.append(output)
    one, two = (json.loads((run / "metrics.json").read_text()) for run in runs)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-3)
    histories = [json.loads((run / "history.json").read_text()) for run in runs]
    for curve in ("train", "eval"):
        (steps, losses), (other_steps, others) = (
            zip(*history[curve], strict=True) for history in histories
        )
        assert steps == other_steps
        assert others == pytest.approx(losses, abs=1e-3)
    answers = [json.loads((run / "answers.json").read_text()) for run in runs]
    assert answers[0]["base"] == answers[1]["base"]
    assert len(answers[1]["test"]) == 3


def test_bad_input_is_told_by_the_first_process_alone(own_data: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"RANK": "1"}  # as accelerate launch tells the second process
    command = [sys.executable, "-m", "helpers.finetune", "--profile", "tiny", "--resume"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "" and "error" not in done.stderr


@pytest.mark.parametrize(
    ("rows", "batch_size", "processes", "wanted"),
    [
        (48, 32, 1, (48, 32)),
        (48, 32, 2, (48, 24)),
        (24, 32, 2, (24, 12)),
        (49, 32, 2, (48, 24)),
        (48, 16, 2, (48, 12)),
        (46, 16, 2, (46, 1)),
        (1, 32, 2, (1, 1)),
    ],
)
def test_every_process_evaluates_as_many_rows(
    rows: int, batch_size: int, processes: int, wanted: tuple[int, int]
) -> None:
    assert _evaluation_batches(rows, batch_size, processes) == wanted
