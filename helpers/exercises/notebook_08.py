"""The exercises of notebook 08: intervals, verdicts, perplexity, 4-bit merging."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from helpers.exercises import Exercise, close, holds, number, says

# -- 08.1: an interval -------------------------------------------------------------------------


def _as_fraction(value: Any) -> float:
    """0.596, 59.6 or "59.6 %" as a fraction from 0 to 1."""
    value = number(value)
    return value / 100 if value > 1.5 else value


def _pair(answer: Any, low: float, high: float) -> bool:
    first, second = (_as_fraction(part) for part in answer)
    return math.isclose(first, low, abs_tol=0.006) and math.isclose(second, high, abs_tol=0.006)


INTERVAL = Exercise(
    task=(
        "A model gets 9 of 10 messages right. Between which two fractions does its true score "
        "lie, with 95 % confidence? Use Wilson's formula, and give a pair such as (0.2, 0.7)."
    ),
    right=lambda answer: _pair(answer, 0.596, 0.982),
    praise="Nine of ten sounds like 90 %, and a model that is right 60 % of the time can do it.",
    hints=(
        (
            lambda answer: _pair(answer, 0.714, 1.0) or _pair(answer, 0.714, 1.086),
            "That is the fraction plus and minus 1.96 standard errors. Its upper end is above 1 "
            "before you cut it off. Does Wilson's formula ever promise more than 100 %?",
        ),
        (
            lambda answer: _pair(answer, 0.982, 0.596),
            "Those are the two numbers. Which is the lower one?",
        ),
        (
            lambda answer: _pair(answer, 0.825, 0.945) or _pair(answer, 0.826, 0.944),
            "That is what 90 of 100 would give. How many messages were there?",
        ),
        (
            lambda answer: _pair(answer, 0.018, 0.404),
            "That is the interval for the fraction of wrong answers. Which one was asked for?",
        ),
        (
            lambda answer: holds(number, answer),
            "An interval has two ends. Give both, as a pair (low, high).",
        ),
    ),
    otherwise=(
        "statistics.wilson_interval takes the fraction right and the number of messages. What "
        "are they here?"
    ),
)

# -- 08.2: verdicts ----------------------------------------------------------------------------

VERDICTS = ("second", "cannot tell", "cannot tell")


def _verdicts(answer: Any) -> tuple[str, ...]:
    names = {
        "first": ("first", "the first", "1"),
        "second": ("second", "the second", "2"),
        "cannot tell": ("cannot tell", "can't tell", "can not tell", "unclear", "neither"),
    }
    values = answer.values() if isinstance(answer, dict) else answer
    if isinstance(values, str):
        values = values.split(",")
    return tuple(
        next(name for name, forms in names.items() if says(value, *forms)) for value in values
    )


WHICH = Exercise(
    task=(
        "Three pairs of models, each on the same 114 messages. Only the first is right on "
        "3, 20 and 0 messages; only the second on 12, 30 and 5. Which is better, if p must be "
        'under 0.05? Give three of "first", "second", "cannot tell".'
    ),
    right=lambda answer: _verdicts(answer) == VERDICTS,
    praise=(
        "A lead of ten among fifty differences is weaker evidence than a lead of nine among "
        "fifteen, and five to nothing still happens to fair coins."
    ),
    hints=(
        (
            lambda answer: _verdicts(answer) == ("second", "second", "second"),
            "That way the larger count wins every time. Is its lead more than coins would give?",
        ),
        (
            lambda answer: "first" in _verdicts(answer),
            "In all three pairs the first model is less often the only right one. Is it better?",
        ),
        (
            lambda answer: _verdicts(answer) == ("second", "cannot tell", "second"),
            "Two of three are right. How often do five coins all fall on one side, out of 32 "
            "times? Both sides count.",
        ),
        (
            lambda answer: _verdicts(answer) == ("second", "second", "cannot tell"),
            "Two of three are right. The lead is ten in the second pair and nine in the first: "
            "among how many messages on which the two models differ?",
        ),
        (
            lambda answer: _verdicts(answer) == ("cannot tell",) * 3,
            "That is too careful for one of them. Compute the three p-values.",
        ),
        (
            lambda answer: len(_verdicts(answer)) != 3,
            "Give one verdict for each pair: three in all.",
        ),
    ),
    otherwise=(
        "statistics.mcnemar(only_first, only_second) gives p. Under 0.05 the one with the larger "
        'count is better; otherwise the verdict is "cannot tell".'
    ),
)

# -- 08.3: perplexity --------------------------------------------------------------------------

PERPLEXITY = Exercise(
    task=(
        "A model reads three tokens. It had given them the probabilities 1/2, 1/4 and 1/8. "
        "What is its perplexity on them?"
    ),
    right=lambda answer: close(answer, 4, relative=0.005),
    praise="The model is as surprised as if it had guessed among four equally likely tokens.",
    hints=(
        (
            lambda answer: close(answer, 14 / 3, relative=0.01),
            "That is the mean of 2, 4 and 8. Which mean do the logarithms turn into?",
        ),
        (
            lambda answer: close(answer, 24 / 7, relative=0.01),
            "You averaged the probabilities first. What is averaged in a loss?",
        ),
        (
            lambda answer: close(answer, math.log(4), relative=0.01),
            "That is the mean loss, in nats. One step is missing from there to perplexity.",
        ),
        (
            lambda answer: close(answer, 2, relative=0.01),
            "That is the mean loss in bits, or the first token alone. What does perplexity do "
            "with a mean loss?",
        ),
        (
            lambda answer: close(answer, 64, relative=0.01),
            "That is for all three tokens together. Perplexity is per token.",
        ),
        (
            lambda answer: close(answer, 0.25, relative=0.01),
            "That is a mean probability. A model that is surprised more has a higher perplexity.",
        ),
    ),
    otherwise="Take -log of each probability, then the mean, then exp of that.",
)

# -- 08.4: what a coarse grid does to a small update -------------------------------------------


def _list(answer: Any) -> list[float]:
    return [number(value) for value in (answer.tolist() if hasattr(answer, "tolist") else answer)]


def _near_list(answer: Any, *expected: float) -> bool:
    got = _list(answer)
    return len(got) == len(expected) and all(
        math.isclose(a, b, abs_tol=0.004) for a, b in zip(got, expected, strict=True)
    )


GRID = Exercise(
    task=(
        "A number format has only multiples of 0.1. Four parameters are stored in it: 0.3, 0.3, "
        "-0.1, 0.2. The adapter adds 0.04, 0.06, -0.03, 0.02. What are the four parameters after "
        "merging into that format? Give a list."
    ),
    right=lambda answer: _near_list(answer, 0.3, 0.4, -0.1, 0.2),
    praise="Three of four updates are gone, and the fourth is larger than what was learned.",
    hints=(
        (
            lambda answer: _near_list(answer, 0.34, 0.36, -0.13, 0.22),
            "Those are the sums. Are they all multiples of 0.1?",
        ),
        (
            lambda answer: _near_list(answer, 0.3, 0.3, -0.1, 0.2),
            "Those are the parameters as they were. Does every update round away? Look at each.",
        ),
        (
            lambda answer: _near_list(answer, 0.4, 0.4, -0.2, 0.3),
            "You rounded away from zero. Which multiple of 0.1 is nearest to 0.34?",
        ),
        (
            lambda answer: _near_list(answer, 0.0, 0.1, 0.0, 0.0),
            "You rounded the update and left out the parameter. What is stored after merging?",
        ),
        (
            lambda answer: len(_list(answer)) != 4,
            "Four parameters go in, and four come out.",
        ),
    ),
    otherwise="Add each update to its parameter, then round to the nearest multiple of 0.1.",
)

# -- 08.5: a paired bootstrap ------------------------------------------------------------------

Interval = Callable[[Sequence[bool], Sequence[bool]], Any]
_SAME = [True, False, False] * 20
_FIRST = [False] * 30 + [True] * 30
_SECOND = [True] * 20 + [False] * 10 + [True] * 25 + [False] * 5
# Resampled in pairs, the mean of 60 differences (20 of +1, 5 of -1) has this centre and spread.
_CENTRE = 15 / 60
_SPREAD = math.sqrt(25 / 60 - _CENTRE**2) / math.sqrt(60)


def _call(function: Interval, first: Sequence[bool], second: Sequence[bool]) -> list[float]:
    """The interval that a learner's function gives, whatever seed it forgot to set."""
    state = random.getstate()
    random.seed(0)
    try:
        low, high = function(list(first), list(second))
        return [float(low), float(high)]
    finally:
        random.setstate(state)


def _near(interval: list[float], centre: float, spread: float) -> bool:
    low, high = centre - 1.96 * spread, centre + 1.96 * spread
    return abs(interval[0] - low) < 0.035 and abs(interval[1] - high) < 0.035


def _paired(function: Interval) -> bool:
    return _call(function, _SAME, _SAME) == [0, 0] and _near(
        _call(function, _FIRST, _SECOND), _CENTRE, _SPREAD
    )


def _width(function: Interval) -> float:
    low, high = _call(function, _FIRST, _SECOND)
    return high - low


BOOTSTRAP = Exercise(
    task=(
        "Write paired_interval(first, second). Each argument is a list of True and False that "
        "says for each message whether a model was right. Return (low, high), the 95 % bootstrap "
        "interval for the second model's score minus the first one's. 1000 rounds are enough."
    ),
    right=_paired,
    praise=(
        "Compared with itself, a model differs by nothing in every round: that is the advantage "
        "of drawing messages and not scores."
    ),
    hints=(
        (lambda f: not callable(f), "Give the function itself, without calling it."),
        (
            lambda f: _width(f) == 0,
            "Every round gives the same difference. Do you draw with replacement, so that a "
            "message can come twice and another not at all?",
        ),
        (
            lambda f: _call(f, _SAME, _SAME) != [0, 0],
            "For a model compared with itself your interval is not (0, 0). Do both models see the "
            "same messages in each round?",
        ),
        (
            lambda f: _near(_call(f, _SECOND, _FIRST), _CENTRE, _SPREAD),
            "The sign is the wrong way round: second minus first was asked for.",
        ),
        (
            lambda f: _near([x / 60 for x in _call(f, _FIRST, _SECOND)], _CENTRE, _SPREAD),
            "That counts messages. The difference of two fractions was asked for.",
        ),
        (
            lambda f: _width(f) > 4.6 * _SPREAD,
            "It is too wide. Which of the sorted differences cut off 2.5 % on each side?",
        ),
        (
            lambda f: _width(f) < 3.4 * _SPREAD,
            "It is too narrow. Which of the sorted differences cut off 2.5 % on each side, and how "
            "many messages does a round draw?",
        ),
    ),
    otherwise=(
        "In each round draw as many messages as there are, with replacement, and keep the mean of "
        "second minus first over them. Then sort these means."
    ),
    trial=lambda f: f([True, False], [True, True]),
)

EXERCISES: dict[str, Exercise] = {
    "08.1": INTERVAL,
    "08.2": WHICH,
    "08.3": PERPLEXITY,
    "08.4": GRID,
    "08.5": BOOTSTRAP,
}
