"""What holds for the exercises of every notebook, and the reviewer itself."""

import importlib
import re
from pathlib import Path

import nbformat
import pytest
import torch

from helpers import CourseError, exercises

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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("answer", [..., None], ids=["dots", "nothing"])
def test_an_unanswered_exercise_prints_its_task(
    name: str, answer: object, capsys: pytest.CaptureFixture[str]
) -> None:
    exercises.check(name, answer)
    assert capsys.readouterr().out == f"Exercise {name}. {ALL[name].task}\n"


@pytest.mark.parametrize("name", ALL)
def test_a_function_that_is_not_written_yet_counts_as_unanswered(name: str) -> None:
    if ALL[name].trial is None:
        pytest.skip("the answer is no function")
    assert exercises.review(name, lambda *args, **kwargs: ...).state == "unanswered"
    assert exercises.review(name, lambda *args, **kwargs: None).state == "unanswered"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "answer",
    ["", "no idea", -1e300, float("nan"), [], {}, object(), print, lambda: 1 / 0, torch.ones(2, 2)],
    ids=repr,
)
def test_no_answer_raises_and_nonsense_is_wrong(name: str, answer: object) -> None:
    assert exercises.review(name, answer).state in ("wrong", "unanswered")


def test_a_function_that_raises_is_named() -> None:
    def broken(*args: object, **kwargs: object) -> float:
        raise KeyError("tokens")

    name = next(name for name, exercise in ALL.items() if exercise.trial is not None)
    review = exercises.review(name, broken)
    assert review.state == "wrong" and "KeyError: 'tokens'" in review.text


def test_an_unknown_exercise_is_a_clear_error() -> None:
    for name in ("99.1", "05.99", "nonsense"):
        with pytest.raises(CourseError, match=f"no exercise {name!r}"):
            exercises.check(name, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
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
