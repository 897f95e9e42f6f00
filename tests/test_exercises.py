"""What holds for the exercises of every notebook, and the reviewer itself."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from answers import notebook_02, notebook_03, notebook_07, notebook_08
from transformers import PreTrainedTokenizerBase

from helpers import CourseError, exercises, memory
from helpers.encoding import split_text
from helpers.exercises.notebook_07 import TRIALS
from helpers.exercises.notebook_09 import NF4_BYTES, WEIGHTS

ROOT = Path(__file__).parent.parent
NUMBERS = sorted(
    path.stem.removeprefix("notebook_")
    for path in (ROOT / "helpers" / "exercises").glob("notebook_*.py")
)
ALL = {
    name: exercise
    for number in NUMBERS
    for name, exercise in importlib.import_module(
        f"helpers.exercises.notebook_{number}"
    ).EXERCISES.items()
}
TABLES = [importlib.import_module(f"answers.notebook_{number}") for number in NUMBERS]
RIGHT = [case for table in TABLES for case in table.RIGHT]
WRONG = [case for table in TABLES for case in table.WRONG]
FUNCTIONS = [name for name, exercise in ALL.items() if exercise.trial is not None]
NONSENSE = [
    *("", "?", "no idea", "a banana", "1 2 3", b"x", True, -1, -1e300, float("nan")),
    *([], [[]], [[None]], {}, {1: {2: 3}}, object(), np.zeros(3)),
    *(torch.ones(2, 2), torch.empty(0), int, len, lambda: 0, lambda: 1, lambda: 3, lambda: 1 / 0),
]
LABELLERS = [notebook_02.by_counting, notebook_02.by_position, notebook_02.with_tensors]
TAUGHT = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem >= "01"]


def test_every_exercise_knows_three_typical_mistakes() -> None:
    assert ALL and all(len(exercise.hints) >= 3 for exercise in ALL.values())


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_a_notebook_asks_and_solves_its_exercises(path: Path) -> None:
    number = path.stem[:2]
    names = {name for name in ALL if name.startswith(number)}
    assert len(names) >= 3
    notebook = nbformat.read(path, as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert set(re.findall(r'exercises\.check\("(\d\d\.\d)"', code)) == names
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    solutions = prose.split("## Solutions")[1]
    assert set(re.findall(r"<summary>(?:Solution )?(\d\d\.\d)", solutions)) == names


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_is_right_in_every_form(name: str, answer: Any) -> None:
    found = exercises.review(name, answer)
    assert found.state == "right", found.text
    assert ALL[name].praise in found.text


@pytest.mark.parametrize(("name", "answer", "words"), WRONG)
def test_a_typical_mistake_gets_its_own_hint(name: str, answer: Any, words: str) -> None:
    found = exercises.review(name, answer)
    assert found.state == "wrong", found.text
    assert words in found.text


@pytest.mark.parametrize("name", ALL)
def test_every_exercise_is_tried(name: str) -> None:
    assert any(name == right for right, _ in RIGHT)
    assert len({words for wrong, _, words in WRONG if wrong == name}) >= 3


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("08")])
def test_every_hint_of_notebook_08_is_tried(name: str) -> None:
    tried = sum(case[0] == name for case in notebook_08.WRONG)
    assert tried >= len(ALL[name].hints) + 1  # and the one for all other answers


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answer", [..., None], ids=["dots", "nothing"])
def test_an_unanswered_exercise_prints_its_task(
    name: str, answer: object, capsys: pytest.CaptureFixture[str]
) -> None:
    exercises.check(name, answer)
    assert capsys.readouterr().out == f"Exercise {name}. {ALL[name].task}\n"


@pytest.mark.parametrize(("name", "words"), [*notebook_02.TASKS, *notebook_03.TASKS])
def test_a_task_names_what_it_is_about(name: str, words: str) -> None:
    assert words in ALL[name].task


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("nothing", [..., None], ids=["dots", "nothing"])
def test_a_function_that_is_not_written_yet_counts_as_unanswered(name: str, nothing: Any) -> None:
    found = exercises.review(name, lambda *args, **kwargs: nothing)
    assert found.state == "unanswered" and ALL[name].task in found.text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: type(answer).__name__)
def test_nonsense_is_wrong_and_raises_nothing(name: str, answer: object) -> None:
    assert exercises.review(name, answer).state == "wrong"


@pytest.mark.parametrize("name", ALL)
def test_a_function_that_gives_nothing_back_is_never_right(name: str) -> None:
    assert exercises.review(name, print).state in ("wrong", "unanswered")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_raises_is_named(name: str) -> None:
    def broken(*args: object, **kwargs: object) -> float:
        raise KeyError("tokens")

    found = exercises.review(name, broken)
    assert found.state == "wrong" and "KeyError: 'tokens'" in found.text


def test_an_unknown_exercise_is_a_clear_error() -> None:
    for name in ("99.1", "05.99", "nonsense"):
        with pytest.raises(CourseError, match=f"no exercise {name!r}"):
            exercises.check(name, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        ("0,5", 0.5),
        ("12,5 %", 0.125),
        ("1,234", 1234),
        ("50 %", 0.5),
        ("about 12 MB", 12),
        ("4,718,592", 4_718_592),
        ("4_718_592", 4_718_592),
        ("-1e-3", -0.001),
        (torch.tensor(3), 3),
    ],
)
def test_numbers_are_read_in_the_forms_people_write(text: object, value: float) -> None:
    assert exercises.number(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "none", "3 or 4", True])
def test_what_is_no_single_number_is_refused(text: object) -> None:
    with pytest.raises(ValueError):
        exercises.number(text)


# -- what single exercises rest on ---------------------------------------------------------------


@pytest.mark.parametrize(
    "labels", [notebook_02.by_counting, notebook_02.by_position, notebook_02.with_tensors]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_right_answer_learns_just_the_answer_of_a_real_row(
    labels: Callable, side: str, triage: dict, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt, answer = split_text(triage["train"][0], tiny_tokenizer)
    prompt_ids = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tiny_tokenizer(answer, add_special_tokens=False)["input_ids"]
    padding, real = [tiny_tokenizer.eos_token_id] * 5, prompt_ids + answer_ids
    ids = padding + real if side == "left" else real + padding
    mask = [0] * 5 + [1] * len(real) if side == "left" else [1] * len(real) + [0] * 5
    got = torch.as_tensor(labels(ids, mask, len(prompt_ids))).tolist()
    assert [label for label in got if label != -100] == answer_ids


def test_the_trials_tell_the_known_rules_apart() -> None:
    n = notebook_07
    rules = (n.by_position, n.rises, n.never_forgives, n.forgives_ties, n.keeps)
    outcomes = {tuple(rule(*trial) for trial in TRIALS) for rule in rules}
    assert len(outcomes) == len(rules)


def test_the_facts_that_the_exercises_of_notebook_09_rest_on() -> None:
    settings = {
        "batch_size": 4,
        "sequence_length": 512,
        "answer_length": 48,
        "precision": "fp16",
        "device": "cuda",
        "attn_implementation": "sdpa",
    }
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "rank 4": {"lora_rank": 4},
        "paged optimizer": {"optimizer": "paged_adamw_8bit"},
        "query_key_value only": {"target_modules": ["query_key_value"]},
        "gradient checkpointing": {"gradient_checkpointing": True},
    }
    card = memory.DEVICES["T4 (16 GB)"]
    fits = {
        change: memory.plan("tiiuae/falcon-7b", "qlora", **settings | more).fits(card)
        for change, more in changes.items()
    }
    assert [change for change, fit in fits.items() if fit] == ["gradient checkpointing"]
    planned = memory.plan("tiiuae/falcon-7b", "qlora", batch_size=1, sequence_length=1)
    per_weight = NF4_BYTES / WEIGHTS
    unquantized = 4 * (65024 * 4544 + 2 * 4544 * 33)
    in_4_bits = planned.components["weights"] - unquantized
    assert in_4_bits / (32 * 207_060_992) == pytest.approx(per_weight, rel=1e-4)
