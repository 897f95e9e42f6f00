"""Exercises of notebook 04: LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from helpers.exercises import Exercise, close, number, says

D_OUT, D_IN, RANK, ALPHA = 6, 5, 2, 8.0
# Validation losses of 04.4: to reach; about that at 2e-3; about that of the base model.
REACHED, AT_2E_3, UNTRAINED = 0.45, 0.51, 3.2


def _pair(answer: Any) -> tuple[float, float]:
    """Two numbers, in whatever way they were written down."""
    if isinstance(answer, str):
        answer = re.split(r"[,;/]|\band\b", answer.strip(" ()[]"))
    elif isinstance(answer, dict):
        answer = list(answer.values())
    first, second = answer
    return number(first), number(second)


def _pair_is(answer: Any, first: float, second: float) -> bool:
    got = _pair(answer)
    return math.isclose(got[0], first, rel_tol=0.01) and math.isclose(got[1], second, rel_tol=0.01)


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, A and B of a layer from 5 to 6 numbers, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((D_OUT, D_IN), (RANK, D_IN), (D_OUT, RANK))
    weight, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight, a, b


def _equals(function: Callable[..., Any], scale: float, keep_weight: float = 1.0) -> bool:
    """True if a function gives keep_weight * W + scale * B A."""
    weight, a, b = _inputs()
    got = torch.as_tensor(function(weight.clone(), a, b, ALPHA)).detach()
    expected = keep_weight * weight + scale * (b @ a)
    return got.shape == expected.shape and torch.allclose(got, expected, atol=1e-5)


def _changes_its_input(function: Callable[..., Any]) -> bool:
    weight, a, b = _inputs()
    given = weight.clone()
    function(given, a, b, ALPHA)
    return not torch.equal(given, weight)


EXERCISES = {
    "04.1": Exercise(
        task=(
            "How many parameters has an adapter with r = 8 on q_proj (576 -> 576) and v_proj "
            "(576 -> 192) of all 30 blocks? Set answer_1 to the number."
        ),
        right=lambda answer: close(answer, 460_800, 0),
        praise="8 x (1,152 + 768) in each block, 30 blocks: 0.3 % of the model.",
        hints=[
            (
                lambda answer: close(answer, 15_360, 0),
                "That is one block. How many has the model?",
            ),
            (
                lambda answer: close(answer, 552_960, 0),
                "You took v_proj to be as large as q_proj. How many outputs has it?",
            ),
            (
                lambda answer: close(answer, 276_480, 0) or close(answer, 184_320, 0),
                "Something is missing: there are two layers, and each has an A and a B. Which did "
                "you leave out?",
            ),
            (
                lambda answer: close(answer, 13_271_040, 0),
                "These are the layers' own parameters. An adapter is two thin matrices.",
            ),
            (
                lambda answer: close(answer, 106_168_320, 0),
                "r multiplies the sum of the two widths, not their product.",
            ),
            (
                lambda answer: close(answer, 921_600, 0),
                "That is right for r = 16. Here r is 8.",
            ),
            (
                lambda answer: close(answer, 16, 0) or close(answer, 480, 0),
                "r is a rank, not a number of parameters. What shapes have A and B?",
            ),
        ],
        otherwise="One layer first: A is r x d_in, B is d_out x r. Then both, then 30 blocks.",
    ),
    "04.2": Exercise(
        task=(
            "Somebody sets r=64 and lora_alpha=16. By what is the update multiplied, and by "
            "what with rsLoRA? Set answer_2 to the two numbers, in this order."
        ),
        right=lambda answer: _pair_is(answer, 0.25, 2),
        praise="Eight times apart: one argument changes the size of the whole update.",
        hints=[
            (
                lambda answer: _pair_is(answer, 2, 0.25),
                "The right two numbers. Which of them belongs to which?",
            ),
            (
                lambda answer: _pair_is(answer, 4, 0.5) or math.isclose(_pair(answer)[0], 4),
                "Upside down: should a larger alpha make the update larger or smaller?",
            ),
            (
                lambda answer: math.isclose(_pair(answer)[0], 16),
                "Alpha itself is not the scale. By what is it divided?",
            ),
            (
                lambda answer: _pair_is(answer, 0.25, 0.25),
                "The first is right. In the second the divisor changes: see section 6.",
            ),
            (
                lambda answer: _pair_is(answer, 0.25, 0.5),
                "The first is right. The root is taken of r alone, not of the fraction.",
            ),
            (
                lambda answer: close(answer, 0.25) or close(answer, 2),
                "That is one of the two. The answer is a pair: (first, second).",
            ),
        ],
        otherwise="lora_alpha / r is the first. For the second, r becomes its square root.",
    ),
    "04.3": Exercise(
        task=(
            "Suppose that A started at zero, as B does. Which of the two would get a gradient in "
            'the first step: "A", "B", "both" or "neither"? Set answer_3 to one of these words.'
        ),
        right=lambda answer: says(
            answer, "neither", "none", "neither of them", "no one", "nothing"
        ),
        praise="B's gradient holds A and A's holds B: with two zeros, nothing ever moves.",
        hints=[
            (
                lambda answer: says(answer, "B", "only B", "B alone", "lora_B"),
                "That holds for a random A. B's gradient is a product: is A one of the factors?",
            ),
            (
                lambda answer: says(answer, "A", "only A", "A alone", "lora_A"),
                "A's gradient reaches it through B. What does B hold at the start?",
            ),
            (
                lambda answer: says(answer, "both", "A and B", "both of them"),
                "Write the output as B A x. If you nudge one entry of B, does it change?",
            ),
        ],
        otherwise='One of the four words: "A", "B", "both" or "neither".',
    ),
    "04.4": Exercise(
        task=(
            "Find a learning rate at which q and v alone reach a validation loss below 0.45 in ten "
            "steps. Set answer_4 to q_and_v_loss of that rate."
        ),
        right=lambda answer: not callable(answer) and 0.1 < number(answer) < REACHED,
        praise=(
            "Fewer layers want larger steps: at one learning rate, a comparison of target modules "
            "is a comparison of step sizes as well."
        ),
        hints=[
            (
                lambda answer: math.isnan(number(answer)),
                "The training diverged: the loss is no number. A lower rate?",
            ),
            (
                lambda answer: 0 < number(answer) <= 0.1,
                "That looks like a learning rate. The answer is the loss: q_and_v_loss(rate).",
            ),
            (
                lambda answer: REACHED <= number(answer) < AT_2E_3,
                "Better than at 2e-3. In which direction did you go? Go further.",
            ),
            (
                lambda answer: number(answer) >= UNTRAINED,
                "No better than before training: the steps were far too large or far too small.",
            ),
            (
                lambda answer: number(answer) >= AT_2E_3,
                "No better than at 2e-3. Section 12 says what fewer layers may want.",
            ),
            (
                callable,
                "Call the function with a learning rate: q_and_v_loss(rate).",
            ),
        ],
        otherwise="The answer is a loss, a positive number: q_and_v_loss(rate).",
    ),
    "04.5": Exercise(
        task=(
            "Write merged(weight, A, B, alpha): the weight (d_out, d_in) with the update added, as "
            "merge_adapter does. A is (r, d_in), B is (d_out, r). Do not change the weight itself."
        ),
        right=lambda f: _equals(f, ALPHA / RANK) and not _changes_its_input(f),
        praise="That is all there is to merging: one product, one scale, one sum.",
        hints=[
            (
                lambda f: _equals(f, ALPHA / RANK) and _changes_its_input(f),
                "The result is right, but the given weight has changed: += works in place.",
            ),
            (
                lambda f: _equals(f, 1),
                "The scale is missing. Where do you find r?",
            ),
            (
                lambda f: _equals(f, ALPHA),
                "You scale by alpha alone: see section 6.",
            ),
            (
                lambda f: _equals(f, ALPHA / math.sqrt(RANK)),
                "That is rsLoRA's scale. The task is about the usual one.",
            ),
            (
                lambda f: any(_equals(f, ALPHA / side) for side in (D_OUT, D_IN)),
                "You divide by a width of the layer. Which dimension of A is r?",
            ),
            (
                lambda f: _equals(f, RANK / ALPHA),
                "Your scale is upside down.",
            ),
            (
                lambda f: _equals(f, ALPHA / RANK, keep_weight=0),
                "That is the update. What is it added to?",
            ),
            (
                lambda f: _equals(f, -ALPHA / RANK),
                "That takes the update away: it is unmerge.",
            ),
        ],
        otherwise="weight + scale * (B @ A), with scale = alpha / r and r the number of A's rows.",
        trial=lambda f: f(*_inputs(), ALPHA),
    ),
}
