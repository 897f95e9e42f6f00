"""The exercises of notebook 11: what IA3 trains and merges, fair rates, choosing a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from helpers.exercises import Exercise, close, number, says

# -- 11.2: merging IA3 -------------------------------------------------------------------------

Merge = Callable[[torch.Tensor, torch.Tensor, bool], Any]
WEIGHT = torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 4.0], [2.0, 1.0, 1.5]])
SCALE = torch.tensor([2.0, 0.5, -1.0])


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return WEIGHT.clone(), SCALE.clone()


def _merges(function: Merge, outputs: torch.Tensor, inputs: torch.Tensor) -> bool:
    """True if it gives these matrices for a scaled output and for a scaled input."""
    return all(
        torch.allclose(function(*_inputs(), scales_input), expected)
        for scales_input, expected in ((False, outputs), (True, inputs))
    )


def _changes_its_input(function: Merge) -> bool:
    weight, scale = _inputs()
    function(weight, scale, False)
    function(weight, scale, True)
    return not (torch.equal(weight, WEIGHT) and torch.equal(scale, SCALE))


ROWS, COLUMNS = SCALE[:, None] * WEIGHT, WEIGHT * SCALE

# -- 11.3: one loss against another ------------------------------------------------------------

CLOSE_ENOUGH = 0.1  # nats; at the same rate they are about one apart
UNTRAINED = 2.3  # nats; the base model's loss on the first batches is above


def _losses(answer: Any) -> tuple[float, float]:
    """The losses of rsLoRA and of LoRA."""
    if isinstance(answer, Mapping):
        answer = [answer["rsLoRA"], answer["LoRA"]]
    if isinstance(answer, str):
        answer = answer.split(",")
    first, second = answer
    return number(first), number(second)


def _plausible(answer: Any) -> bool:
    return all(0.02 < loss < UNTRAINED for loss in _losses(answer))


# -- 11.4: choices -----------------------------------------------------------------------------

CHOICES = {
    "a": ("lora",),
    "b": ("full", "full fine-tuning"),
    "c": ("ia3",),
    "d": ("rslora",),
    "e": ("prompt tuning", "prompt"),
}


def _wrong(answer: Mapping[str, Any]) -> set[str]:
    """The letters whose choice is another one."""
    if not isinstance(answer, Mapping):
        raise TypeError("not a dict")
    return {letter for letter, names in CHOICES.items() if not says(answer[letter], *names)}


# -- 11.5: the next rate -----------------------------------------------------------------------

Losses = dict[float, float]
NAN = float("nan")
CASES: tuple[Losses, ...] = (
    {3e-4: 0.40, 1e-3: 0.22, 3e-3: 0.31},  # between
    {1e-2: 0.50, 3e-2: 0.35, 1e-1: 0.24},  # the highest
    {1e-4: 0.21, 3e-4: 0.26, 1e-3: 0.80},  # the lowest
    {3e-3: NAN, 1e-3: 0.30, 1e-4: 0.60, 3e-4: 0.45},  # between, and one that diverged
)


def _gives(function: Callable[[Losses], Any], rule: Callable[[Losses], float | None]) -> bool:
    return all(_alike(function, rule, case) for case in CASES)


def _alike(
    function: Callable[[Losses], Any], rule: Callable[[Losses], float | None], losses: Losses
) -> bool:
    answer, expected = function(dict(losses)), rule(dict(losses))
    if answer is None or expected is None:
        return answer is expected
    return math.isclose(number(answer), expected, rel_tol=0.15)


def _best(losses: Losses) -> float:
    """The rate with the lowest loss; one that diverged is not the best."""
    return min((rate for rate in losses if not math.isnan(losses[rate])), key=losses.__getitem__)


def _next(losses: Losses) -> float | None:
    rate = _best(losses)
    return {min(losses): rate / 3, max(losses): rate * 3}.get(rate)


EXERCISES = {
    "11.1": Exercise(
        task=(
            "Let IA3 multiply the queries too: add q_proj (576 outputs) to its target_modules. How "
            "many parameters does it train then? Predict it, count it with PEFT, and set answer_1 "
            "to the number."
        ),
        right=lambda answer: close(answer, 74_880, 0),
        praise="57,600 and 30 x 576 more: one number for each output of each of the layers.",
        hints=[
            (
                lambda answer: close(answer, 17_280, 0),
                "That is what the queries add. How many are there with keys, values and the MLP?",
            ),
            (
                lambda answer: close(answer, 57_600, 0),
                "That is IA3 as it was. Is q_proj in target_modules?",
            ),
            (
                lambda answer: close(answer, 2_496, 0),
                "That is one layer. How many has the model?",
            ),
            (
                lambda answer: close(answer, 58_176, 0),
                "You added the queries of one layer. Every layer has its own vector.",
            ),
            (
                lambda answer: close(answer, 610_560, 0) or close(answer, 552_960, 0),
                "That would be thin matrices of rank 16. IA3 has a vector: one number per output.",
            ),
        ],
        otherwise="One number per output of q_proj, in each of 30 layers, on top of 57,600.",
    ),
    "11.2": Exercise(
        task=(
            "Write merged_ia3(weight, scale, scales_input): one matrix (d_out, d_in) with the "
            "same outputs as the layer with its vector. The vector multiplies the layer's input if "
            "scales_input, otherwise its output. Do not change the arguments."
        ),
        right=lambda f: _merges(f, ROWS, COLUMNS) and not _changes_its_input(f),
        praise="Rows for outputs, columns for inputs: a merged IA3 costs nothing when serving.",
        hints=[
            (
                lambda f: _merges(f, ROWS, COLUMNS) and _changes_its_input(f),
                "The result is right, but the given matrix has changed: *= works in place.",
            ),
            (
                lambda f: _merges(f, COLUMNS, ROWS),
                "The two cases are the other way round. Does an output belong to a row or to a "
                "column?",
            ),
            (
                lambda f: _merges(f, COLUMNS, COLUMNS),
                "For an input that is right. Broadcasting multiplies columns; an output is a row.",
            ),
            (
                lambda f: _merges(f, ROWS, ROWS),
                "For an output that is right. What does scales_input change?",
            ),
            (
                lambda f: _merges(f, ROWS - WEIGHT, COLUMNS - WEIGHT),
                "That is the change of the matrix. The merged one is asked for.",
            ),
            (
                lambda f: _merges(f, ROWS + WEIGHT, COLUMNS + WEIGHT),
                "You add it to the matrix, as LoRA does. IA3 multiplies, and that is all.",
            ),
        ],
        otherwise="Output i is row i of the matrix times x; input j meets column j alone.",
        trial=lambda f: f(*_inputs(), False),
    ),
    "11.3": Exercise(
        task=(
            "Take twelve steps of rsLoRA at 3e-4, and of LoRA at a rate that brings its loss as "
            "low. Set answer_3 to both results of last_loss: (rsLoRA's, LoRA's)."
        ),
        right=lambda answer: (
            _plausible(answer) and _losses(answer)[1] <= _losses(answer)[0] + CLOSE_ENOUGH
        ),
        praise=(
            "With a higher rate LoRA learns as fast: after twelve steps, the lead at one rate was "
            "the size of its steps."
        ),
        hints=[
            (
                lambda answer: any(math.isnan(loss) for loss in _losses(answer)),
                "One of them diverged: its loss is no number. A lower rate?",
            ),
            (
                lambda answer: all(0 < loss <= 0.02 for loss in _losses(answer)),
                "Those look like learning rates. The losses are asked for.",
            ),
            (
                lambda answer: _losses(answer)[1] >= UNTRAINED > _losses(answer)[0] > 0.02,
                "LoRA is where it began: its rate is far too low, or so high that it diverges.",
            ),
            (
                lambda answer: (
                    _plausible(answer) and _losses(answer)[1] > _losses(answer)[0] + CLOSE_ENOUGH
                ),
                "LoRA is still above rsLoRA. rsLoRA's update is multiplied by 8, LoRA's by 2: how "
                "much higher may LoRA's rate be?",
            ),
            (
                lambda answer: 0.02 < number(answer) < UNTRAINED,
                "That is one loss. Give both, rsLoRA's first.",
            ),
        ],
        otherwise="Two losses below 2.3: last_loss('rsLoRA', 3e-4), and LoRA's at your rate.",
    ),
    "11.4": Exercise(
        task=(
            "Which method do you try first? Set answer_4 to a dict such as {'a': 'LoRA', ...}, "
            "with values from LoRA, rsLoRA, IA3, prompt tuning, full; each of them once.\n"
            "(a) Fifty customers, one base model in memory, and a server that picks the adapter "
            "with each request.\n"
            "(b) A new language, a million rows, eight large GPUs. Adapters were tried and fall "
            "short.\n"
            "(c) A thousand devices with little memory. Each gets at most 300 kB by radio, and "
            "must answer no slower than before.\n"
            "(d) Rank 256 learns no faster than rank 16, with the same alpha.\n"
            "(e) The model runs behind a program that takes embeddings and lets nobody touch a "
            "parameter or an activation."
        ),
        right=lambda answer: not _wrong(answer),
        praise="Each time a constraint decided, not a point of score.",
        hints=[
            (
                lambda answer: _wrong(answer) == {"c", "e"},
                "Those two are small. Which of them stays in front of every text, and which can be "
                "merged?",
            ),
            (
                lambda answer: _wrong(answer) == {"a", "d"},
                "Both add B A. What changes when the scale is alpha over the root of the rank?",
            ),
            (
                lambda answer: "b" in _wrong(answer),
                "(b) Where adapters fall short and memory does not, what is left?",
            ),
            (
                lambda answer: "d" in _wrong(answer),
                "(d) alpha over r shrinks as r grows. Which method divides by less?",
            ),
            (
                lambda answer: "e" in _wrong(answer),
                "(e) Only one of the five adds nothing but inputs.",
            ),
            (
                lambda answer: "c" in _wrong(answer),
                "(c) Section 2 counts parameters, four bytes each. Which one fits and merges?",
            ),
        ],
        otherwise="A dict with the letters a to e, and one of the five names for each.",
    ),
    "11.5": Exercise(
        task=(
            "Write next_rate(losses): {rate: loss after a short run} for one method. Return the "
            "rate to try next, three times beyond the best one, if that is the lowest or the "
            "highest of those tried. Return None if it lies between others. A run that diverged "
            "has the loss nan."
        ),
        right=lambda f: _gives(f, _next),
        praise="A sweep whose best rate is its last one has not found it yet.",
        hints=[
            (
                lambda f: _gives(f, _best) or _gives(f, lambda x: _next(x) or _best(x)),
                "You return the best rate. If there are others on both sides, return None.",
            ),
            (
                lambda f: _gives(
                    f, lambda losses: 3 * max(losses) if _best(losses) == max(losses) else None
                ),
                "The highest rate is looked after. What if the lowest one is the best?",
            ),
            (
                lambda f: _gives(
                    f, lambda losses: min(losses) / 3 if _best(losses) == min(losses) else None
                ),
                "The lowest rate is looked after. What if the highest one is the best?",
            ),
            (
                lambda f: _gives(
                    f,
                    lambda losses: {
                        min(losses): max(losses) * 3,
                        max(losses): min(losses) / 3,
                    }.get(_best(losses)),
                ),
                "You look beyond the wrong end.",
            ),
            (
                lambda f: all(_alike(f, _next, case) for case in CASES[:3]),
                "Without nan it is right. A comparison with nan is never true: leave such rates "
                "out before you look for the lowest loss.",
            ),
        ],
        otherwise=(
            "First the rate with the lowest loss. Is it min(losses), max(losses) or neither? "
            "min(losses) gives the lowest rate, for the rates are the keys."
        ),
        trial=lambda f: next((x for case in CASES if (x := f(dict(case))) is not None), None),
    ),
}
