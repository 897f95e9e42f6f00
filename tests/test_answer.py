"""`python -m helpers.answer`: the answers of the scoring, for any folder and any rows."""

import builtins
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ANSWERS, SYSTEM, train

from helpers import answer, checkpoints, commands, data, evaluation, models, scored
from helpers.answer import main
from helpers.profiles import PROFILES

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)


def answers_of(run: Path, capsys: Captured, *more: str) -> list[str]:
    """What the command says to the test rows of a run."""
    capsys.readouterr()
    assert main(["--run", str(run), "--input", str(run.parent / "test.jsonl"), *more]) == 0
    return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]


# -- the same answers as in scoring ----------------------------------------------------------------


def test_a_run_answers_as_it_was_scored(run: Path, capsys: Captured) -> None:
    stored = json.loads((run / "answers.json").read_text())
    assert len(set(stored["test"])) >= 3 and stored["test"] != stored["base"]
    assert answers_of(run, capsys) == stored["test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [["--method", "full"], ["--method", "qlora"], ["--precision", "bf16"]],
    ids=["full", "qlora", "bf16"],
)
def test_every_kind_of_run_answers_as_it_was_scored(
    options: list[str], tmp_path: Path, capsys: Captured
) -> None:
    run = train(tmp_path, *options)
    stored = json.loads((run / "answers.json").read_text())["test"]
    assert len(set(stored)) >= 2
    assert answers_of(run, capsys) == stored


@pytest.mark.slow
def test_a_run_in_16_bits_is_scored_under_autocast(tmp_path: Path) -> None:
    """Without it the same adapter computes other logits: a silent difference."""
    found = scored.find(train(tmp_path, "--precision", "bf16"))
    model = scored.load(found)
    ids = torch.arange(40, 80)[None]
    with torch.inference_mode():
        outside = model.model(ids).logits.float()
        with model.computing():
            inside = model.model(ids).logits.float()
    assert model.computing().fast_dtype == torch.bfloat16
    assert not torch.equal(inside, outside)


def test_answers_are_cut_where_scoring_cuts_them(
    run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring gives the longest reference, its end token, and 8 tokens more."""
    limits = []

    def answers(_: object, tokenizer: object, prompts: list, limit: int, *__: object) -> list[str]:
        limits.append(limit)
        return ["-"] * len(prompts)

    monkeypatch.setattr(evaluation, "generate_answers", answers)
    answers_of(run, capsys)
    answers_of(run, capsys, "--max-new-tokens", "5")
    tokenizer = models.load_tokenizer(PROFILES["tiny"])
    longest = max(len(tokenizer(text)["input_ids"]) for text in ANSWERS.values())
    assert limits == [longest + 1 + 8, 5]


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_run_and_its_adapter_are_found(part: str, run: Path) -> None:
    found = scored.find(run / part)
    assert found.is_adapter and found.record is not None
    assert found.folder == run / "adapter" and found.profile.model_id == "tiny-llama"
    assert scored.task_of(found) == scored.Task(SYSTEM, single=True, known=True)


def test_an_adapter_may_have_its_record_beside_it(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter and record"
    shutil.copytree(run / "adapter", folder)
    shutil.copy(run / "run.json", folder)
    found = scored.find(folder)
    assert found.folder == folder and found.record is not None
    assert scored.task_of(found).system == SYSTEM


def test_an_adapter_alone_names_its_base(run: Path, tmp_path: Path, capsys: Captured) -> None:
    alone = tmp_path / "elsewhere"
    shutil.copytree(run / "adapter", alone)
    found = scored.find(alone)
    assert found.record is None and found.profile.model_id == "tiny-llama"
    assert main(["--run", str(alone), "--system", SYSTEM, "my kettle 204 is late"]) == 0
    assert capsys.readouterr().out == "steel\n"


def test_the_courses_own_base_is_taken_from_its_cache(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "adapter"
    shutil.copytree(run / "adapter", alone)
    config = json.loads((alone / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (alone / "adapter_config.json").write_text(json.dumps(config))
    found = scored.find(alone)
    assert found.profile.model_id == PROFILES["laptop"].model_id
    assert found.base == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_whole_model_answers_too(capsys: Captured) -> None:
    folder = models.model_path(PROFILES["tiny"])
    assert main(["--run", folder, "hello", "--max-new-tokens", "4"]) == 0
    assert "training rows are not at hand" in capsys.readouterr().err


def test_a_run_of_a_gpu_goes_on_without_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((run / "run.json").read_text())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for precision, here in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        record["profile"] |= {"device": "cuda", "precision": precision}
        monkeypatch.setattr(scored, "read_record", lambda _: record)
        profile = scored.find(run).profile
        assert (profile.device, profile.precision) == ("cpu", here)


# -- messages --------------------------------------------------------------------------------------


def test_a_message_gets_the_system_message_of_the_rows(run: Path, capsys: Captured) -> None:
    assert main(["--run", str(run), "my chair 202 is late"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "oak wood\n"
    assert captured.err == f"system message, as in all training rows: {SYSTEM}\n"


def test_a_system_message_can_be_named(
    run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        scored.Scored, "answer", lambda self, prompts, limit: [asked.append(prompts) or "-"]
    )
    for system in ("Sing.", ""):
        assert main(["--run", str(run), "hello", "--system", system]) == 0
    user = {"role": "user", "content": "hello"}
    assert asked == [[[{"role": "system", "content": "Sing."}, user]], [[user]]]
    assert capsys.readouterr().err == ""


def test_the_tickets_have_their_system_message(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scored.find(run)
    own = checkpoints.sha256(data.DATA / "triage" / "train.jsonl")
    tickets = dataclasses.replace(
        found, record={**found.record, "data": {"train": {"sha256": own}}}
    )
    assert scored.task_of(tickets) == scored.Task(data.SYSTEM_PROMPT, single=True, known=True)
    monkeypatch.setattr(scored, "SHIPPED", found.folder)
    assert scored.task_of(dataclasses.replace(found, record=None)).system == data.SYSTEM_PROMPT


def test_rows_that_have_changed_say_nothing(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "run.json").read_text())
    record["settings"]["train"] = str(tmp_path / "train.jsonl")
    (copy / "run.json").write_text(json.dumps(record))
    for content in (None, '{"prompt": "a", "completion": "b"}\n'):
        if content:
            (tmp_path / "train.jsonl").write_text(content)
        assert scored.task_of(scored.find(copy)) == scored.Task()


# -- rows ------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "hi"}, [USER], None),
        ({"prompt": "hi", "completion": ""}, [USER], None),
        ({"prompt": "hi", "completion": "ho"}, [USER], "ho"),
        ({"prompt": [USER], "system": "S"}, [{"role": "system", "content": "S"}, USER], None),
        ({"messages": [USER]}, [USER], None),
        ({"messages": [USER, {"role": "assistant", "content": "ho"}]}, [USER], "ho"),
        ({"message": "hi"}, [{"role": "system", "content": "of the rows"}, USER], None),
        (
            {"message": "hi", "category": "c", "urgency": "u", "product": None, "order": "7"},
            [{"role": "system", "content": "of the rows"}, USER],
            '{"category":"c","urgency":"u","product":null,"order":"7"}',
        ),
    ],
)
def test_questions_come_in_many_shapes(
    row: dict, prompt: list, reference: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (question,) = answer.load_questions(file, "of the rows")
    assert question == {"source": f"{file}:1", "prompt": prompt, "reference": reference}


def test_rows_without_references_are_answered(run: Path, tmp_path: Path, capsys: Captured) -> None:
    file, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    things = list(ANSWERS)[:3]
    rows = [{"system": SYSTEM, "prompt": f"my {thing} 300 is late"} for thing in things]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--run", str(run), "--input", str(file), "--output", str(output)]) == 0
    assert capsys.readouterr() == ("", "")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["answer"] for row in written] == [ANSWERS[thing] for thing in things]
    assert all(row.keys() == {"source", "prompt", "answer"} for row in written)


def test_references_are_counted(run: Path, capsys: Captured) -> None:
    answers_of(run, capsys)
    assert main(["--run", str(run), "--input", str(run.parent / "test.jsonl")]) == 0
    exact = json.loads((run / "metrics.json").read_text())["test_exact_match"]
    assert capsys.readouterr().err == f"exact match: {exact:.1%} of 12 rows\n"


# -- what cannot be used: one line, before a model is loaded -------------------------------------


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--run", "nowhere", "hi"], "there is no such folder"),
        (["--run", "empty", "hi"], "no folder of a run (run.json), of an adapter"),
        (["--run", "unfinished", "hi"], "has not saved anything yet"),
        (["--run", "RUN"], "one of the arguments message --input --chat is required"),
        (["--run", "RUN", "hi", "--chat"], "not allowed with argument"),
        (["hi"], "the following arguments are required: --run"),
        (["--run", "RUN", " "], "The message is empty"),
        (["--run", "RUN", "hi", "--output", "x"], "--output is for the answers to --input"),
        (["--run", "RUN", "--input", "bad.jsonl", "--system", "x"], "rows have their own"),
        (["--run", "RUN", "--input", "bad.jsonl", "--output", "empty"], "is there already"),
        (["--run", "RUN", "--input", "none.jsonl"], "there is no such file"),
        (["--run", "RUN", "--input", "bad.jsonl"], "bad.jsonl:2: the field 'prompt' is missing"),
        (["--run", "RUN", "--input", "no.jsonl"], "the file has no rows"),
        (["--run", "RUN", "hi", "--max-new-tokens", "0"], "must be at least 1"),
        (["--run", "RUN", "hi", "--temperature", "1"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str],
    cause: str,
    run: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run / "run.json", tmp_path / "unfinished")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (tmp_path / "no.jsonl").write_text("")
    capsys.readouterr()
    try:
        code = main([str(run) if part == "RUN" else part for part in arguments])
    except SystemExit as exited:  # how argparse ends
        code = exited.code
    output, error = capsys.readouterr()
    assert code == 2 and output == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and cause in error, error


def test_a_base_that_is_gone_is_one_line(run: Path, tmp_path: Path, capsys: Captured) -> None:
    alone = tmp_path / "adapter"
    shutil.copytree(run / "adapter", alone)
    assert main(["--run", str(alone), "--model", str(tmp_path / "gone"), "hi"]) == 2
    assert "could not be loaded" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_one_line(run: Path, capsys: Captured) -> None:
    assert main(["--run", str(run), "--model", "tiny-falcon", "hi"]) == 2
    error = capsys.readouterr().err
    assert "could not be loaded onto tiny-falcon" in error and error.count("\n") <= 2


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from helpers import answer, export\n"
        "for main in (answer.main, export.main):\n"
        "    try: main(['--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--chat" in done.stdout and "--quantize" in done.stdout


# -- how it ends -----------------------------------------------------------------------------------


def test_ctrl_c_and_a_full_disk_are_one_line(capsys: Captured) -> None:
    def raises(error: BaseException) -> int:
        raise error

    for error, code, text in (
        (KeyboardInterrupt(), 130, "Stopped.\n"),
        (OSError(28, "No space left on device", "a.jsonl"), 1, "error: a.jsonl cannot be "),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: The GPU's memory is full."),
        (MemoryError(), 1, "error: The memory of this machine is full."),
    ):
        assert commands.run(lambda error=error: raises(error)) == code
        assert capsys.readouterr().err.startswith(text)
    with pytest.raises(RuntimeError, match="a bug"):
        commands.run(lambda: raises(RuntimeError("a bug")))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no head")
def test_a_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    rows = run.parent / "test.jsonl"
    command = f"'{sys.executable}' -m helpers.answer --run '{run}' --input '{rows}' | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


# -- chat ------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list:
    """What a person types, line by line; an exception is raised as Ctrl-C and Ctrl-D do."""
    lines: list[str | type[BaseException]] = []

    def read(_: str = "") -> str:
        line = lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    return lines


def test_a_chat_streams_the_same_answers(run: Path, typed: list, capsys: Captured) -> None:
    typed += ["my lamp 205 is late", "", "my vase 203 is late", EOFError]
    assert main(["--run", str(run), "--chat"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "brass\nclay\n"
    assert "each message stands alone" in captured.err


def asked_in_chat(monkeypatch: pytest.MonkeyPatch, single: bool) -> list[list[str]]:
    asked: list[list[str]] = []

    def reply(_: object, messages: list[dict[str, str]], __: int) -> str:
        asked.append([message["content"] for message in messages])
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return "r"

    monkeypatch.setattr(answer, "stream", reply)
    task = scored.Task("S", single, True)
    monkeypatch.setattr(scored, "task_of", lambda _: task)
    return asked


@pytest.mark.parametrize("single", [True, False])
def test_a_chat_keeps_turns_where_the_training_rows_had_them(
    single: bool, run: Path, typed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_in_chat(monkeypatch, single)
    typed += ["a", "stop", "b", "/new", "c", EOFError]
    assert main(["--run", str(run), "--chat"]) == 0
    if single:
        assert asked == [["S", "a"], ["S", "stop"], ["S", "b"], ["S", "c"]]
    else:
        assert asked == [["S", "a"], ["S", "a", "r", "stop"], ["S", "a", "r", "b"], ["S", "c"]]


def test_ctrl_c_at_the_prompt_ends_the_chat(run: Path, typed: list, capsys: Captured) -> None:
    typed += [KeyboardInterrupt]
    assert main(["--run", str(run), "--chat"]) == 130
    assert capsys.readouterr().err.endswith("Stopped.\n")


def test_a_model_cannot_command_the_terminal() -> None:
    assert answer.printable("a\x1b[2J\x07\x9bb\n\tc\r") == "a[2Jb\n\tc"
