"""The exercises of notebook 12: faults by their traces, sizes, orders of rows, near-ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from helpers.exercises import Exercise, close, holds, number, says

# -- 12.1: faults ------------------------------------------------------------------------------

FAULTS = ("template", "adapter", "end token")


def _faults(answer: Any) -> tuple[str, ...]:
    names = {
        "template": ("template", "the template", "chat template", "another template"),
        "adapter": ("adapter", "the adapter", "no adapter", "adapter not applied"),
        "end token": ("end token", "the end token", "end", "eos", "missing end token"),
    }
    values = answer.split(",") if isinstance(answer, str) else answer
    return tuple(
        next(name for name, forms in names.items() if says(value, *forms)) for value in values
    )


WHICH = Exercise(
    task=(
        "Three servers, twenty messages each. A: all 20 prompts are other tokens, 18 answers "
        "differ. B: the prompts are the same, all 20 answers differ from their first token on. "
        "C: the prompts are the same, 20 answers differ, each at <|im_end|>. What is wrong? Give "
        'three of "adapter", "template", "end token".'
    ),
    right=lambda answer: _faults(answer) == FAULTS,
    praise=(
        "Whether the prompts agree, and where the answers part, names the fault before anybody "
        "opens the server's settings."
    ),
    hints=(
        (
            lambda answer: _faults(answer)[0] != "template" and len(_faults(answer)) == 3,
            "What writes a prompt? In A the prompts differ already.",
        ),
        (
            lambda answer: _faults(answer) == ("template", "end token", "adapter"),
            "A is right. In C the answers are right up to their end. Would those of a model "
            "without its adapter be?",
        ),
        (
            lambda answer: _faults(answer)[1:] == ("template", "end token"),
            "B and the template do not go together: its prompts are the same.",
        ),
        (
            lambda answer: len(set(_faults(answer))) < len(_faults(answer)),
            "Each of the three faults happened once.",
        ),
        (
            lambda answer: len(_faults(answer)) != 3,
            "Give one fault for each server: three in all.",
        ),
    ),
    otherwise='Name each with one of the words "adapter", "template", "end token".',
)

# -- 12.2: the size of a file ------------------------------------------------------------------

SIZE = Exercise(
    task=(
        "Q8_0 stores 32 parameters in 34 bytes: one byte for each, and a scale in fp16 for the "
        "block. How many MB (a million bytes) do the matrices of a model with 320 million "
        "parameters take?"
    ),
    right=lambda answer: close(answer, 340, relative=0.002),
    praise="8.5 bits for a parameter, and a little more than half of the file in 16 bits.",
    hints=(
        (
            lambda answer: close(answer, 320, relative=0.002),
            "That is a byte for each parameter. What stands beside each block of 32?",
        ),
        (
            lambda answer: close(answer, 640, relative=0.002),
            "That is the size in 16 bits. How many bytes does Q8_0 take for 32 parameters?",
        ),
        (
            lambda answer: close(answer, 2720, relative=0.002),
            "Those are megabits. Eight bits are a byte.",
        ),
        (
            lambda answer: close(answer, 340e6, relative=0.002),
            "Those are bytes. How many MB are they?",
        ),
        (
            lambda answer: close(answer, 960, relative=0.002),
            "You gave each parameter a scale of its own. A block of 32 shares one.",
        ),
    ),
    otherwise="How many blocks of 32 are there, and how many bytes does each take?",
)

# -- 12.3: the order of rows -------------------------------------------------------------------

ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def _numbers(answer: Any) -> list[float]:
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    return [number(value) for value in values]


ROWS = Exercise(
    task=(
        "A head of q has 8 rows, numbered 0 to 7 as transformers stores them. It rotates row 0 "
        "with row 4, 1 with 5, and so on; llama.cpp rotates neighbours. In which order do the "
        "rows stand in the GGUF file? Give a list of eight numbers."
    ),
    right=lambda answer: _numbers(answer) == ORDER,
    praise="Both rotate the same pairs of rows, so both compute the same attention.",
    hints=(
        (
            lambda answer: _numbers(answer) == list(range(8)),
            "Then llama.cpp would rotate row 0 with row 1. Which row does transformers rotate row "
            "0 with?",
        ),
        (
            lambda answer: _numbers(answer) == [0, 2, 4, 6, 1, 3, 5, 7],
            "That is the way back, from the file to transformers. Which row has to be the "
            "neighbour of row 0?",
        ),
        (
            lambda answer: _numbers(answer) == [4, 0, 5, 1, 6, 2, 7, 3],
            "The pairs are right. Within a pair the row of the first half comes first.",
        ),
        (
            lambda answer: sorted(_numbers(answer)) != list(range(8)),
            "Each row from 0 to 7 occurs once: eight numbers.",
        ),
    ),
    otherwise="Write the halves 0 1 2 3 and 4 5 6 7 below each other, and read column by column.",
)

# -- 12.4: where two answers part --------------------------------------------------------------

Difference = Callable[[Sequence[int], Sequence[int]], Any]
CASES = (
    (([5, 6, 7], [5, 6, 8]), 2),
    (([1, 2], [1, 2]), None),
    (([4, 9, 9], [3, 9, 9]), 0),
    (([1, 2, 3], [1, 2]), 2),
    (([1, 2], [1, 2, 3, 4]), 2),
    (([], []), None),
)


def _results(function: Difference) -> list[Any]:
    return [function(list(first), list(second)) for (first, second), _ in CASES]


def _wrong_only(function: Difference, *cases: int) -> bool:
    """True if exactly these cases come out wrong."""
    expected = [place for _, place in CASES]
    pairs = enumerate(zip(_results(function), expected, strict=True))
    return {case for case, (got, place) in pairs if got != place} == set(cases)


PART = Exercise(
    task=(
        "Write first_difference(scored, served). Both are lists of token ids. Return the number "
        "of the first place where they differ, from 0, and None where they do not differ. Where "
        "one is the beginning of the other, that is the place after its end."
    ),
    right=lambda function: _wrong_only(function),
    praise="With this and one question to the scored model, any server can be checked.",
    hints=(
        (
            lambda function: _wrong_only(function, 3, 4),
            "Try [1, 2, 3] and [1, 2]. zip stops with the shorter list: what comes after it?",
        ),
        (
            lambda function: _wrong_only(function, 1, 5),
            "For two equal lists there is no such place. What should come back?",
        ),
        (
            lambda function: _results(function)[:3] == [3, None, 1],
            "Places are counted from 0 here.",
        ),
        (
            lambda function: _results(function)[0] == 8,
            "That is the token. Where in the list is it?",
        ),
    ),
    otherwise="Go through both lists together, and return the number of the first unequal pair.",
    trial=lambda function: function([5, 6, 7], [5, 6, 8]),
)

# -- 12.5: near-ties ---------------------------------------------------------------------------

TIES = [2, 4]

NEAR = Exercise(
    task=(
        "A model scored in fp32 is served in F16, and four answers differ. At the places where "
        "they part the scored model gives its own token and the served one these logits. Row 1: "
        "21.9 and 14.2. Row 2: 18.304 and 18.300. Row 3: 17.2 and 15.9. Row 4: 20.11 and 20.08. "
        "Which rows may be rounding? Give the list of their numbers."
    ),
    right=lambda answer: sorted(_numbers(answer)) == TIES,
    praise="Gaps of 0.004 and 0.03. The other two are another model, even if it is nearly right.",
    hints=(
        (
            lambda answer: sorted(_numbers(answer)) == [1, 2, 3, 4],
            "In row 1 the scored model finds its own token two thousand times as likely. Does "
            "rounding to 16 bits turn that round?",
        ),
        (
            lambda answer: sorted(_numbers(answer)) == [1, 3],
            "Those are the two largest gaps. Which ones can rounding close?",
        ),
        (
            lambda answer: sorted(_numbers(answer)) == [2, 3, 4],
            "Row 3 has a gap of 1.3: its token is 3.7 times as likely. Section 4 printed how much "
            "rounding may close.",
        ),
        (
            lambda answer: sorted(_numbers(answer)) in ([2], [4]),
            "That is one of them. Section 4 printed how large a gap may be.",
        ),
        (
            lambda answer: holds(number, answer),
            "Give a list, even if it had only one number.",
        ),
    ),
    otherwise="Take the difference of the two logits in each row. Which are under 0.1?",
)

EXERCISES = {"12.1": WHICH, "12.2": SIZE, "12.3": ROWS, "12.4": PART, "12.5": NEAR}
