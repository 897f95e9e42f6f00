"""The command under what users do to it: every report of a fault, and its neighbours.

Each test names the public report whose kind it covers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import checkpoints, commands, models, pipeline, training
from helpers.config import RunConfig, UsageError, parser
from helpers.finetune import main
from helpers.profiles import PROFILES

OneLine = pytest.CaptureFixture[str]


def rows_file(path: Path, answers: list[str]) -> str:
    rows = [
        {"prompt": f"Question {n} of {path.stem}", "completion": a} for n, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    train = rows_file(tmp_path / "train.jsonl", [f"answer {n}" for n in range(16)])
    validation = rows_file(tmp_path / "validation.jsonl", ["answer a", "answer b"])
    return ["--train", train, "--validation", validation]


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a model is loaded: what is tested has to be found before that."""

    def load_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)


def refused(arguments: list[str], capsys: OneLine, code: int = 2) -> str:
    """Run the command, see that it refuses in one line, and return the line."""
    try:
        assert main(["--profile", "tiny", *arguments]) == code
    except SystemExit as exited:  # how argparse ends
        assert exited.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# -- options, before anything is loaded (SimpleTuner#97 and our own) ------------------------------


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, not -1"),
        (["--seed", "4294967296"], "--seed must be from 0"),
        (["--seed", "1.5"], "invalid int value: '1.5'"),
        (["--epochs", "0"], "--epochs must be above zero"),
        (["--epochs", "nan"], "--epochs must be above zero"),
        (["--learning-rate", "-1e-3"], "learning-rate"),
        (["--learning-rate", "inf"], "--learning-rate must be above zero"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--accumulation", "0"], "--accumulation must be at least 1"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--alpha", "-2"], "alpha"),
        (["--max-length", "0"], "--max-length must be at least 1"),
        (["--max-length", "100000"], "more than the context length of tiny-llama, 512"),
        (["--method", "full", "--rank", "4"], "--rank is a setting of LoRA"),
        (["--method", "full", "--target-modules", "q_proj"], "--target-modules is a setting"),
        (["--rank", "65"], "--rank 65 is more than the layer model.layers.0.self_attn.q_proj"),
        (["--target-modules", "query"], "no linear layer named 'query'. --target-modules takes"),
        (["--target-modules", "lm_head"], "no linear layer named 'lm_head'"),
        (["--model", "nobody/nothing"], "nobody/nothing could not be loaded"),
        (["--resume"], "no run to resume"),
        (["--profile", "huge"], "invalid choice"),
        (["--learning-rte", "1"], "unrecognized arguments"),
    ],
)
def test_an_option_that_cannot_be_used(
    options: list[str],
    cause: str,
    files: list[str],
    tmp_path: Path,
    capsys: OneLine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = tmp_path / "run"
    assert cause in refused([*files, "--output", str(output), *options], capsys)
    assert not (output / "run.json").exists()


def test_every_setting_is_an_option_with_a_help_text() -> None:
    text = parser("").format_help()
    for option in RunConfig.__dataclass_fields__:
        assert "--" + option.replace("_", "-") in text


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(
    "command",
    [
        ["finetune", "--output", "out"],
        ["answer", "--run", "data/adapters/tickets", "hello"],
        ["export", "--run", "data/adapters/tickets", "--format", "merged", "--output", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_python_without_the_packages_is_told_where_they_are(
    command: list[str], made: bool, tmp_path: Path
) -> None:
    root = Path(commands.__file__).parents[1]
    shutil.copytree(root / "helpers", tmp_path / "helpers")
    script = tmp_path / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "activate"
    if made:
        script.parent.mkdir(parents=True)
        script.touch()
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"helpers.{command[0]}", *command[1:]],  # no site-packages
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert (str(script) if made else "python -m helpers start") in done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from helpers import finetune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


# -- the environment and the output folder --------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("value", ["fp8", "bf16", "nonsense"])
def test_a_precision_in_the_environment_that_is_not_the_runs(
    value: str, files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    error = refused([*files, "--output", str(tmp_path / "run")], capsys)
    assert f"ACCELERATE_MIXED_PRECISION is '{value}'" in error


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_cache_that_cannot_be_written(
    files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    error = refused([*files, "--output", str(tmp_path / "run")], capsys)
    assert "could not be stored" in error and "COURSE_CACHE" in error


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/null", "folder.jsonl", "-"])
def test_rows_that_are_not_a_file(
    name: str, files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    path = str(tmp_path / name) if name == "folder.jsonl" else name
    options = ["--train", path, *files[2:], "--output", str(tmp_path / "run")]
    assert refused(options, capsys).startswith(f"error: {path}: ")


@pytest.mark.usefixtures("nothing_is_loaded")
def test_an_output_that_is_a_file(files: list[str], tmp_path: Path, capsys: OneLine) -> None:
    output = tmp_path / "notes.md"
    output.write_text("mine")
    assert "is a file" in refused([*files, "--output", str(output)], capsys)
    assert output.read_text() == "mine"


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("output", ["notes.md/run", "/proc/run", "long" * 100])
def test_an_output_that_cannot_be_made(
    output: str, files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    (tmp_path / "notes.md").write_text("mine")
    assert "cannot be written" in refused([*files, "--output", str(tmp_path / output)], capsys)


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    "name", ["run.json", "metrics.json", "README.md", "adapter/notes.txt", "checkpoint-7/x.bin"]
)
def test_a_folder_with_other_peoples_files_is_left_alone(
    name: str, files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    error = refused([*files, "--output", str(tmp_path / "run")], capsys)
    assert "this command did not write it" in error
    assert file.read_text() == "mine"


def test_files_beside_the_run_survive_it(files: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "run" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(["--profile", "tiny", *files, "--output", str(tmp_path / "run")]) == 0
    assert mine.read_text() == "mine"


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_disk_too_small_for_the_checkpoints(
    files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=300_000))
    error = refused([*files, "--output", str(tmp_path / "run")], capsys)
    assert "0 MB free" in error and "take up to 1 MB" in error


# -- rows: file, line and cause, whatever reads them (rows have tests of their own) ---------------


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_bad_row_leaves_no_folder(files: list[str], tmp_path: Path, capsys: OneLine) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    output = tmp_path / "deep" / "run"
    assert "bad.jsonl:2: " in refused([*files, "--test", str(bad), "--output", str(output)], capsys)
    assert not output.parent.exists()


def test_the_command_says_how_many_tokens_are_trained(
    files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    assert main(["--profile", "tiny", *files, "--output", str(tmp_path / "run")]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("train: "))
    assert "16 rows" in line and "are trained (the answers)" in line


# -- resume compares (transformers#9099, qlora#50, sd-scripts#789) --------------------------------


class Killed(BaseException):
    """In place of a signal: nothing in the command may catch it."""


def interrupt_after(saves: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the command die right after so many checkpoints."""
    original, count = checkpoints.ResumableTrainer._save_checkpoint, 0

    def save(self: Any, *args: Any) -> None:
        nonlocal count
        original(self, *args)
        count += 1
        if count == saves:
            raise error

    monkeypatch.setattr(checkpoints.ResumableTrainer, "_save_checkpoint", save)


@pytest.fixture
def interrupted(files: list[str], tmp_path: Path) -> tuple[list[str], Path]:
    """The options of a run, and its folder with two checkpoints."""
    output = tmp_path / "run"
    options = [*files, "--epochs", "6", "--learning-rate", "4e-3", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        interrupt_after(2, patch, Killed())
        main(["--profile", "tiny", *options])
    assert len(list(output.glob("checkpoint-*"))) == 2
    return options, output


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        (["--learning-rate", "1e-3"], "--learning-rate 0.001 (the run has 0.004)"),
        (["--epochs", "7"], "--epochs 7.0 (the run has 6.0)"),
        (["--method", "full"], "--method full (the run has lora)"),
        (["--method", "qlora"], "--method qlora (the run has lora)"),
        (["--profile", "laptop"], "--profile laptop (the run has tiny)"),
        (["--rank", "4"], "--rank 4 (the run has 8)"),
        (["--alpha", "4"], "--alpha 4 (the run has 16)"),
        (["--batch-size", "2"], "--batch-size 2 (the run has 8)"),
        (["--accumulation", "2"], "--accumulation 2 (the run has 1)"),
        (["--seed", "7"], "--seed 7 (the run has 42)"),
        (["--max-length", "99"], "--max-length 99 (the run has None)"),
        (["--target-modules", "q_proj", "v_proj"], "--target-modules q_proj v_proj (the run has"),
        (["--model", "tiny-falcon"], "--model tiny-falcon (the run has tiny-llama)"),
        (["--seed", "7", "--rank", "4"], "--rank 4 (the run has 8), --seed 7 (the run has 42)"),
    ],
)
def test_resume_refuses_what_differs(
    changed: list[str],
    shown: str,
    interrupted: tuple[list[str], Path],
    nothing_is_loaded: None,
    capsys: OneLine,
) -> None:
    options, _ = interrupted
    capsys.readouterr()
    error = refused([*options, "--resume", *changed], capsys)
    assert shown in error


@pytest.mark.parametrize("split", ["train", "validation"])
def test_resume_refuses_other_rows(
    split: str,
    interrupted: tuple[list[str], Path],
    nothing_is_loaded: None,
    tmp_path: Path,
    capsys: OneLine,
) -> None:
    options, _ = interrupted
    with open(tmp_path / f"{split}.jsonl", "a") as file:
        file.write('{"prompt": "one more", "completion": "row"}\n')
    capsys.readouterr()
    assert f"The {split} rows are not those" in refused([*options, "--resume"], capsys)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_resume_compares_the_rows_that_are_named_again(
    split: str,
    interrupted: tuple[list[str], Path],
    nothing_is_loaded: None,
    tmp_path: Path,
    capsys: OneLine,
) -> None:
    _, output = interrupted
    other = rows_file(tmp_path / "other.jsonl", ["something else"])
    capsys.readouterr()
    error = refused(["--output", str(output), "--resume", f"--{split}", other], capsys)
    assert f"The {split} rows are not those" in error and other in error


@pytest.mark.parametrize("option", [["--seed", "42"], ["--accumulation", "1"]])
def test_resume_compares_a_setting_that_is_named_with_its_default(
    option: list[str], files: list[str], nothing_is_loaded: None, tmp_path: Path, capsys: OneLine
) -> None:
    output = tmp_path / "run"
    options = [*files, "--output", str(output), "--seed", "7", "--accumulation", "2"]
    with pytest.raises(AssertionError, match="a model was loaded"):
        main(["--profile", "tiny", *options])
    error = refused(["--output", str(output), "--resume", *option], capsys)
    assert f"{' '.join(option)} (the run has " in error


def test_resume_from_another_folder_and_with_files_that_have_moved(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    relative = ["--train", "train.jsonl", "--validation", "validation.jsonl", "--epochs", "6"]
    shutil.copytree(models.model_path(PROFILES["tiny"]), "my-model")
    relative += ["--model", "my-model"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_after(1, patch, Killed())
        main(["--profile", "tiny", *relative, "--output", "run"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_after(1, patch, Killed())
        main(["--output", "../run", "--resume"])
    (tmp_path / "train.jsonl").rename("moved.jsonl")
    moved = ["--train", "moved.jsonl", "--validation", "../validation.jsonl"]
    assert main(["--output", "../run", "--resume", *moved, "--model", "../my-model"]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my-model"


@pytest.mark.parametrize("name", ["README.md", "adapter/notes.txt", "answers.json"])
def test_files_that_appear_beside_an_interrupted_run_are_left_alone(
    name: str, interrupted: tuple[list[str], Path], nothing_is_loaded: None, capsys: OneLine
) -> None:
    options, output = interrupted
    file = output / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    capsys.readouterr()
    assert "which this run has not written" in refused([*options, "--resume"], capsys)
    assert file.read_text() == "mine"


def test_a_file_put_into_a_checkpoint_outlives_it(interrupted: tuple[list[str], Path]) -> None:
    options, output = interrupted
    mine = [folder / "notes.txt" for folder in checkpoints.all_checkpoints(output)]
    for file in mine:
        file.write_text("mine")
    assert main([*options, "--resume"]) == 0
    assert [file.read_text() for file in mine] == ["mine", "mine"]


def test_a_resumed_run_needs_no_room_for_the_checkpoints_it_has(
    interrupted: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, _ = interrupted
    needed = 5 * 12 * 16384  # of tiny-llama's adapter; about 2 of the 5 checkpoints are there
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.7 * needed))
    assert main([*options, "--resume"]) == 0


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_run_json_of_another_version(tmp_path: Path, capsys: OneLine) -> None:
    (tmp_path / "run.json").write_text('{"format": 1, "run_id": "x", "profile": {"name": "y"}}')
    assert "another version" in refused(["--output", str(tmp_path), "--resume"], capsys)


@pytest.mark.parametrize("named", ["all", "nothing"])
def test_resume_takes_the_settings_from_the_run(
    named: str, interrupted: tuple[list[str], Path], capsys: OneLine
) -> None:
    options, output = interrupted
    arguments = options if named == "all" else ["--output", str(output)]
    assert main([*arguments, "--resume"]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["profile"]["learning_rate"] == 4e-3 and metrics["steps"] == 12
    assert "continuing from checkpoint-" in capsys.readouterr().out


def test_an_interrupted_run_is_not_started_over_by_mistake(
    interrupted: tuple[list[str], Path], nothing_is_loaded: None, capsys: OneLine
) -> None:
    options, _ = interrupted
    capsys.readouterr()
    assert "Add --resume" in refused(options, capsys)


# -- checkpoints (SimpleTuner#2613) ---------------------------------------------------------------


DAMAGE = {
    "an empty state": lambda folder: (folder / "trainer_state.json").write_text(""),
    "a torn adapter": lambda folder: os.truncate(folder / "adapter_model.safetensors", 1000),
    "a torn optimizer": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "a flipped byte": lambda folder: flip_a_byte(folder / "optimizer.pt"),
    "a missing file": lambda folder: (folder / "scheduler.pt").unlink(),
    "no seal": lambda folder: (folder / "sealed.json").unlink(),
    "half a seal": lambda folder: os.truncate(folder / "sealed.json", 40),
}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_good_one(
    damage: str, interrupted: tuple[list[str], Path], capsys: OneLine
) -> None:
    options, output = interrupted
    newest, older = checkpoints.all_checkpoints(output)
    DAMAGE[damage](newest)
    assert main([*options, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"{newest.name} is not whole" in printed
    assert f"continuing from {older.name}" in printed


def test_with_no_good_checkpoint_the_run_starts_over(
    interrupted: tuple[list[str], Path], capsys: OneLine
) -> None:
    options, output = interrupted
    for folder in checkpoints.all_checkpoints(output):
        (folder / "sealed.json").unlink()
    assert main([*options, "--resume"]) == 0
    assert "starts from its beginning" in capsys.readouterr().out


def test_checkpoints_of_others_are_never_used_deleted_or_overwritten(
    interrupted: tuple[list[str], Path], tmp_path: Path, capsys: OneLine
) -> None:
    options, output = interrupted
    newest = checkpoints.all_checkpoints(output)[0]
    copies = [output / "checkpoint-1", output / "checkpoint-99", output / "checkpoint-old"]
    for copy in copies:
        shutil.copytree(newest, copy)
        (copy / "run_id").write_text("another")
    before = [sorted(p.read_bytes() for p in copy.iterdir()) for copy in copies]
    assert main([*options, "--resume"]) == 0
    assert f"continuing from {newest.name}" in capsys.readouterr().out
    assert [sorted(p.read_bytes() for p in copy.iterdir()) for copy in copies] == before


def test_a_foreign_folder_where_a_checkpoint_should_go(
    interrupted: tuple[list[str], Path], capsys: OneLine
) -> None:
    options, output = interrupted
    (output / "checkpoint-12").mkdir()
    (output / "checkpoint-12" / "thesis.tex").write_text("mine")
    capsys.readouterr()
    assert "checkpoint-12 was not written by this run" in refused([*options, "--resume"], capsys, 1)
    assert (output / "checkpoint-12" / "thesis.tex").read_text() == "mine"


def test_the_best_checkpoint_is_kept_and_its_adapter_can_be_had(
    tmp_path: Path, capsys: OneLine
) -> None:
    """MedicalGPT#368: random answers, many epochs; the step that is advised still exists."""
    answers = [f"{(7919 * n) % 101} {(104729 * n) % 97}" for n in range(16)]
    train = rows_file(tmp_path / "train.jsonl", answers)
    validation = rows_file(tmp_path / "validation.jsonl", answers[::-1])
    options = ["--train", train, "--validation", validation, "--epochs", "80"]
    options += ["--learning-rate", "2e-2", "--output", str(tmp_path / "run")]
    assert main(["--profile", "tiny", *options]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best_step"] < metrics["steps"]
    best = tmp_path / "run" / f"checkpoint-{metrics['best_step']}"
    kept = load_file(best / "adapter_model.safetensors")
    given = load_file(tmp_path / "run" / "best_adapter" / "adapter_model.safetensors")
    assert all((kept[name] == given[name]).all() for name in kept)
    assert "best_adapter/" in capsys.readouterr().out
    assert len(checkpoints.all_checkpoints(tmp_path / "run")) <= 3


# -- a disk that fills up (LLaMA-Factory#5155) ----------------------------------------------------


@pytest.mark.parametrize("written", ["_save_optimizer_and_scheduler", "save_model"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    written: str, files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    options = [*files, "--epochs", "4", "--output", str(tmp_path / "run")]
    original, calls = getattr(checkpoints.ResumableTrainer, written), 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # from now on no file gets larger than 10 kB: to a program, a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ResumableTrainer, written, full)
        try:
            error = refused(options, capsys, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            monkeypatch.undo()
    assert "The disk of" in error and "--resume" in error
    assert main([*options, "--resume"]) == 0


# -- a loss that is no number (ainode#186, ludwig#4058) -------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(
    files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    output = tmp_path / "run"
    options = [*files, "--learning-rate", "1e30", "--epochs", "5", "--output", str(output)]
    error = refused(options, capsys, code=1)
    assert "not a finite number at step" in error and "--learning-rate; 1e+29 is a tenth" in error
    assert not (output / "metrics.json").exists() and not (output / "adapter").exists()
    for path in output.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_run_of_one_step_trains(files: list[str], tmp_path: Path) -> None:
    """Its only step must not be the first of a warm-up, where the learning rate is zero."""
    options = ["--profile", "tiny", *files, "--epochs", "0.01", "--output", str(tmp_path / "run")]
    assert main(options) == 0
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_the_last_good_adapter_is_kept(
    files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    original = training.Trainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 7 else loss

    monkeypatch.setattr(training.Trainer, "training_step", step)
    options = [*files, "--epochs", "6", "--output", str(output)]
    error = refused(options, capsys, code=1)
    kept = checkpoints.all_checkpoints(output)[0]
    assert f"The adapter of step {checkpoints.step_of(kept)} is kept in {kept}" in error
    assert all(t.isfinite().all() for t in load_file(kept / "adapter_model.safetensors").values())


def test_json_never_holds_a_number_that_json_does_not_have(tmp_path: Path) -> None:
    content = {"a": [float("nan"), {"b": float("inf")}], "c": 1.5}
    checkpoints.write_json(tmp_path / "x.json", content)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": [None, {"b": None}], "c": 1.5}


# -- Ctrl-C (unsloth#6823) ------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["while rows are read", "before the first checkpoint", "after"])
def test_the_advice_after_ctrl_c_is_true(
    moment: str, files: list[str], tmp_path: Path, capsys: OneLine
) -> None:
    options = ["--profile", "tiny", *files, "--epochs", "6", "--output", str(tmp_path / "run")]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if moment == "while rows are read":
            patch.setattr(pipeline.rows, "load_examples", interrupt)
        elif moment == "after":
            interrupt_after(1, patch, KeyboardInterrupt())
        else:
            patch.setattr(training.Trainer, "training_step", interrupt)
        assert main(options) == 130
    advice = capsys.readouterr().err
    assert ("--resume continues" in advice) == (moment != "while rows are read")
    again = [*options, "--resume"] if "--resume" in advice else options
    assert main(again) == 0


def test_a_run_stopped_before_its_first_checkpoint_may_also_start_anew(
    files: list[str], tmp_path: Path
) -> None:
    options = ["--profile", "tiny", *files, "--output", str(tmp_path / "run")]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Trainer, "training_step", interrupt)
        assert main(options) == 130
    assert main([*options, "--learning-rate", "1e-3"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 1e-3


# -- what comes out -------------------------------------------------------------------------------


def test_the_adapter_is_portable(files: list[str], tmp_path: Path, capsys: OneLine) -> None:
    test = rows_file(tmp_path / "test.jsonl", ["answer x", "answer y"])
    output = tmp_path / "run"
    assert main(["--profile", "tiny", *files, "--test", test, "--output", str(output)]) == 0
    names = {path.name for path in (output / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    for path in (output / "adapter").iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and str(Path.home()) not in text, path.name
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"


def test_the_numbers_are_those_of_the_rows(files: list[str], tmp_path: Path) -> None:
    """Nine rows in batches of eight are nine rows, and tokens are counted without padding."""
    train = rows_file(tmp_path / "nine.jsonl", ["a " * (n + 1) for n in range(9)])
    options = ["--train", train, *files[2:], "--epochs", "2", "--output", str(tmp_path / "run")]
    assert main(["--profile", "tiny", *options]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    from helpers import encoding, rows

    tokenizer = models.load_tokenizer(PROFILES["tiny"])
    features = encoding.encode(rows.load_examples(train), tokenizer, 512)
    assert metrics["tokens"] == 2 * sum(features["length"])
    assert metrics["tokens_per_second"] == pytest.approx(
        metrics["tokens"] / metrics["train_seconds"], rel=0.2, abs=50
    )


def test_what_was_trained_is_saved_before_it_is_scored(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = rows_file(tmp_path / "test.jsonl", ["answer x"])
    output = tmp_path / "run"

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "evaluate", killed)
        main(["--profile", "tiny", *files, "--test", test, "--output", str(output)])
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert main(["--output", str(output), "--resume"]) == 0
    assert json.loads((output / "metrics.json").read_text())["test_rows"] == 1


def test_the_model_card_holds_the_runs_own_figures(files: list[str], tmp_path: Path) -> None:
    test = rows_file(tmp_path / "test.jsonl", ["answer x", "answer y"])
    output = tmp_path / "run"
    assert main(["--profile", "tiny", *files, "--test", test, "--output", str(output)]) == 0
    text = (output / "README.md").read_text()
    metrics = json.loads((output / "metrics.json").read_text())
    assert text == (output / "adapter" / "README.md").read_text()
    assert text.startswith("---\nbase_model: tiny-llama\n")
    assert f"{metrics['test_exact_match']:.1%}" in text and "on 2 test rows" in text
    assert f"{metrics['trainable_parameters']:,} of" in text and "| learning_rate | 0.005 |" in text


def test_ctrl_c_after_the_end_says_that_the_run_is_finished(
    files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_print_result", interrupt)
    assert main(["--profile", "tiny", *files, "--output", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.endswith("is finished.\n")


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_a_launcher_that_splits_the_model_is_refused(
    way: str, files: list[str], tmp_path: Path, capsys: OneLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    assert way in refused([*files, "--output", str(tmp_path / "run")], capsys)


def test_settings_are_checked_where_they_are_made() -> None:
    with pytest.raises(UsageError, match="--rank must be at least 1"):
        RunConfig(output=Path("x"), rank=0)
