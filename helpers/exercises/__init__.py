"""Exercises that check themselves: `exercises.check("02.1", answer)` in a notebook.

One module per notebook holds its exercises; this one reviews an answer. An answer that is still
`...` gets the task printed again, so that "Run All" goes through a notebook nobody has worked on.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from helpers import CourseError


@dataclasses.dataclass(frozen=True)
class Exercise:
    """A task and what is known about its answers.

    Attributes:
        task: what to do, as the learner reads it.
        right: says whether an answer is right. May raise: a wrong answer can be of any type.
        praise: what a right answer has shown, in a sentence.
        hints: (does this mistake apply?, what to think about), tried in this order.
        otherwise: the hint for a wrong answer that none of them knows.
        trial: for an answer that is a function: call it once. If nothing comes back, the function
            is not written yet.
    """

    task: str
    right: Callable[[Any], Any]
    praise: str
    hints: Sequence[tuple[Callable[[Any], Any], str]]
    otherwise: str
    trial: Callable[[Any], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Review:
    """`state` is "unanswered", "right" or "wrong"; `text` is what the learner reads."""

    state: str
    text: str


def find(name: str) -> Exercise:
    """The exercise of a name such as "02.1".

    Raises:
        CourseError: there is none.
    """
    number = name.split(".")[0]
    try:
        module = importlib.import_module(f"helpers.exercises.notebook_{number}")
        return module.EXERCISES[name]
    except (ModuleNotFoundError, KeyError) as error:
        raise CourseError(
            f"There is no exercise {name!r}. The heading above the cell has the number."
        ) from error


def review(name: str, answer: Any) -> Review:
    """Review an answer. Never raises because of what the answer is or does."""
    exercise = find(name)
    if answer is None or answer is ...:
        return Review("unanswered", f"Exercise {name}. {exercise.task}")
    try:
        if exercise.trial is not None and callable(answer):
            got = exercise.trial(answer)
            if got is None or got is ...:
                return Review("unanswered", f"Exercise {name}. {exercise.task}")
        if bool(exercise.right(answer)):
            return Review("right", f"Right. {exercise.praise}")
    except Exception as error:
        if callable(answer):
            return Review("wrong", f"Not yet: your function raised {_short(error)}.")
    for applies, hint in exercise.hints:
        if holds(applies, answer):
            return Review("wrong", f"Not yet. {hint}")
    return Review("wrong", f"Not yet. {exercise.otherwise}")


def check(name: str, answer: Any) -> None:
    """Print the review of an answer; the task, if there is no answer yet."""
    print(review(name, answer).text)


# -- small tools for right and hints -----------------------------------------------------------


def holds(predicate: Callable[[Any], Any], answer: Any) -> bool:
    """True if the predicate says so; an answer that it cannot even look at counts as no."""
    try:
        return bool(predicate(answer))
    except Exception:
        return False


def number(answer: Any) -> float:
    """The number in an answer: 0.5, "0,5", "50 %", tensor(0.5), "4,718,592" or "about 12 MB".

    Raises:
        ValueError: there is none, or several.
    """
    if isinstance(answer, bool):
        raise ValueError("a truth value is not a number")
    if isinstance(answer, str):
        found = re.findall(r"[-+]?\d[\d,_]*\.?\d*(?:[eE][-+]?\d+)?", answer)
        if len(found) != 1:
            raise ValueError(f"{answer!r} holds {len(found)} numbers")
        # A comma before three digits groups thousands; any other is a decimal comma: "0,5".
        text = re.sub(r"(?<=\d)[,_](?=\d{3}(?:\D|$))", "", found[0])
        value = float(text.replace(",", "."))
        return value / 100 if "%" in answer else value
    return float(answer)


def close(answer: Any, expected: float, relative: float = 0.01, absolute: float = 0.0) -> bool:
    """True if the number in an answer is the expected one, within a tolerance."""
    try:
        return math.isclose(number(answer), expected, rel_tol=relative, abs_tol=absolute)
    except (TypeError, ValueError, RuntimeError):
        return False


def says(answer: Any, *expected: str) -> bool:
    """True if an answer is one of the expected texts; case, spaces and end punctuation aside."""
    text = " ".join(str(answer).split()).strip(" .!?\"'`").casefold()
    return text in {one.casefold() for one in expected}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
