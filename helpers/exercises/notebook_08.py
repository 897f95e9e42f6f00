"""The exercises of notebook 08: intervals, verdicts, half an update, two formats of 16 bits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from helpers.exercises import Exercise, close, number, says

# -- 08.1: how many messages a narrower interval takes ------------------------------------------

MESSAGES = Exercise(
    task=(
        "In section 4, change the loop over numbers of messages. A model that is right on 75 % of "
        "100, 200, 300, ... messages: from how many on is the lower end of its 95 % interval "
        "above 70 %?"
    ),
    right=lambda answer: close(answer, 400, relative=0.001),
    praise=(
        "For five points below a score it takes some four hundred messages. Whoever has 114 writes "
        "a criterion that leaves more room."
    ),
    hints=(
        (
            lambda answer: close(answer, 300, relative=0.001),
            "With 300 it is just below. Plus and minus 1.96 standard errors gives 300; what does "
            "Wilson's formula say?",
        ),
        (
            lambda answer: 300 < number(answer) < 400,
            "It is between 300 and 400, but the task goes in steps of 100. Which is the first "
            "above 70 %?",
        ),
        (
            lambda answer: close(answer, 100, relative=0.001),
            "With 100 messages the whole interval is seventeen points wide. How far below 75 % is "
            "its lower end?",
        ),
        (
            lambda answer: 0 < number(answer) < 1,
            "That is a fraction, perhaps the end of an interval. How many messages does it take?",
        ),
        (
            lambda answer: number(answer) > 400,
            "That many are enough. Is a smaller number enough, too?",
        ),
    ),
    otherwise=(
        "statistics.wilson_interval(0.75, messages) gives both ends. Print the lower one for 100, "
        "200, 300 and so on."
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

# -- 08.3: half of the update ------------------------------------------------------------------

HALVES = ("less than half", "half", "more than half")


def _halves(answer: Any) -> tuple[str, ...]:
    """The two words of an answer: about the forgetting, about the tickets."""
    values = answer.values() if isinstance(answer, dict) else answer
    if isinstance(values, str):
        values = values.split(",")
    return tuple(next(name for name in HALVES if says(value, name)) for value in values)


HALF = Exercise(
    task=(
        "Import rescale_adapter_scale from peft.helpers. Under `with rescale_adapter_scale(model, "
        "0.5):` compute perplexities() again, and answer the 24 messages of section 6. How much "
        "is left of the rise of perplexity, and how much of the right tickets? Give a pair of "
        '"less than half", "half", "more than half".'
    ),
    right=lambda answer: _halves(answer) == ("less than half", "more than half"),
    praise=(
        "The forgetting shrinks faster than the skill. So the size of the update is one more "
        "setting, which costs no training."
    ),
    hints=(
        (
            lambda answer: _halves(answer) == ("more than half", "less than half"),
            "Those are the two words. Which is about the perplexity, and which about the tickets?",
        ),
        (
            lambda answer: _halves(answer) == ("half", "half"),
            "Half of an update need not have half of the effect. What did the two numbers say?",
        ),
        (
            lambda answer: _halves(answer)[0] == "more than half",
            "Compare rises, not perplexities: perplexity minus the base model's, with half of the "
            "update and with all of it.",
        ),
        (
            lambda answer: _halves(answer)[0] == "less than half" and len(_halves(answer)) == 2,
            "The first is right. For the second, divide the right tickets with half of the update "
            "by those with all of it.",
        ),
        (
            lambda answer: len(_halves(answer)) != 2,
            "Two things were asked for: one about perplexity, one about tickets.",
        ),
    ),
    otherwise=(
        "Measure both inside the with block, and divide by what you have without it. Answer with a "
        'pair such as ("half", "half").'
    ),
)

# -- 08.4: two formats of 16 bits --------------------------------------------------------------

FORMATS = Exercise(
    task=(
        "Section 8 rounded a merged layer to bf16. Round it to torch.float16 instead, and compute "
        "the mean rounding error again. How many times smaller is it than in bf16?"
    ),
    right=lambda answer: close(answer, 8, relative=0.1),
    praise=(
        "Three more bits for the digits, so 2 x 2 x 2 times finer. What fp16 pays with is its "
        "range: it ends at 65,504."
    ),
    hints=(
        (
            lambda answer: close(answer, 1 / 8, relative=0.1),
            "That is the other way round: fp16's error divided by bf16's.",
        ),
        (
            lambda answer: close(answer, 3, relative=0.05),
            "Three more bits is right. By how much does each of them shrink the error?",
        ),
        (
            lambda answer: close(answer, 1, relative=0.05),
            "The two errors are not equal. Did you round `result`, or what was rounded to bf16 "
            "before?",
        ),
        (
            lambda answer: close(answer, 64, relative=0.2),
            "That is the ratio of the squared errors. The mean of the absolute ones was asked for.",
        ),
    ),
    otherwise=(
        "Take (result - result.to(dtype).float()).abs().mean() for both formats, and divide bf16's "
        "by fp16's."
    ),
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
    "08.1": MESSAGES,
    "08.2": WHICH,
    "08.3": HALF,
    "08.4": FORMATS,
    "08.5": BOOTSTRAP,
}
