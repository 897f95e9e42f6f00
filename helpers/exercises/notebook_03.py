"""Exercises of notebook 03: quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from helpers.exercises import Exercise, close, number

BLOCK, LEVELS = 32, 16

Rounding = Callable[[torch.Tensor], torch.Tensor]


def _byte(answer: Any) -> float:
    """The number in an answer; 0x93 and 0b10010011 are numbers too."""
    if isinstance(answer, str) and answer.strip().lower().startswith(("0x", "0b")):
        return int(answer.strip(), 0)
    return number(answer)


def _times(answer: Any, reference: float) -> bool:
    return close(answer, reference, 0.01)


def _on_the_grid() -> torch.Tensor:
    """Weights (8, 64) as Q4_1 leaves them: each block has 16 values, both ends are used."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, LEVELS, (16, BLOCK), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, LEVELS - 1
    step = torch.randint(1, 64, (16, 1), generator=generator) / 1024
    least = -torch.randint(100, 900, (16, 1), generator=generator) / 1024
    return (least + codes * step).reshape(8, 64)


def _off_the_grid() -> torch.Tensor:
    """Ordinary weights (8, 64); the blocks differ in size."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(16, BLOCK, generator=generator)
    return (weights * torch.linspace(0.1, 2, 16)[:, None] + 0.2).reshape(8, 64)


def _grid(matrix: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    blocks = matrix.reshape(-1, block)
    least = blocks.amin(dim=1, keepdim=True)
    step = (blocks.amax(dim=1, keepdim=True) - least) / (LEVELS - 1)
    return (least + torch.round((blocks - least) / step) * step).reshape(matrix.shape)


def _absmax(matrix: torch.Tensor) -> torch.Tensor:
    blocks = matrix.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return (torch.round(blocks / scale) * scale).reshape(matrix.shape)


def _distance(got: Any, expected: torch.Tensor) -> float:
    """The largest difference, or infinity if the number of weights is another."""
    got = torch.as_tensor(got)
    if got.numel() != expected.numel():
        return float("inf")
    return (got.reshape(expected.shape).double() - expected.double()).abs().max().item()


def _gives(rounding: Rounding, expected: torch.Tensor, given: torch.Tensor) -> bool:
    return _distance(rounding(given.clone()), expected) < 1e-4


def _right_grid(rounding: Rounding) -> bool:
    for given in (_on_the_grid(), _off_the_grid()):
        got = rounding(given.clone())
        if tuple(got.shape) != tuple(given.shape) or _distance(got, _grid(given)) > 1e-4:
            return False
    return True


def _codes(rounding: Rounding) -> bool:
    got = torch.as_tensor(rounding(_off_the_grid())).float()
    return bool((got == got.round()).all()) and got.max() <= LEVELS


def _offset_is_lost(rounding: Rounding) -> bool:
    given = _off_the_grid()
    least = given.reshape(-1, BLOCK).amin(dim=1, keepdim=True).expand(-1, BLOCK)
    return _gives(rounding, _grid(given) - least.reshape(given.shape), given)


def _sixteen_steps(rounding: Rounding) -> bool:
    blocks = _off_the_grid().reshape(-1, BLOCK)
    least = blocks.amin(dim=1, keepdim=True)
    step = (blocks.amax(dim=1, keepdim=True) - least) / LEVELS
    got = rounding(_off_the_grid()).reshape(-1, BLOCK)
    counts = (got - least) / step
    return (counts - counts.round()).abs().max() < 1e-3


def _always_down(rounding: Rounding) -> bool:
    given = _off_the_grid()
    got = rounding(given.clone()).reshape(given.shape)
    blocks = given.reshape(-1, BLOCK)
    steps = (blocks.amax(dim=1) - blocks.amin(dim=1)) / (LEVELS - 1)
    low = (given - got).reshape(-1, BLOCK)
    return low.min() > -1e-4 and (low.amax(dim=1) / steps).max() > 0.6


EXERCISES = {
    "03.1": Exercise(
        task=(
            "Two codes, 9 and 3, are neighbours in a matrix, in this order. Set byte to the "
            "number from 0 to 255 that stores both, packed as in section 6."
        ),
        right=lambda answer: _byte(answer) == 147,
        praise="9 in the upper four bits counts 16 times: 9 x 16 + 3.",
        hints=[
            (
                lambda answer: _byte(answer) == 57,
                "Those are the right bits in the wrong order. Which neighbour goes on top?",
            ),
            (
                lambda answer: _byte(answer) == 93,
                "Those are its digits in base 16. Which number is that in base 10?",
            ),
            (
                lambda answer: _byte(answer) == 12,
                "From a sum nobody can tell which two codes went in: 6 and 6 give it too.",
            ),
            (
                lambda answer: _byte(answer) == 75,
                "You moved the first code up by three bits. How many bits does the second need?",
            ),
            (
                lambda answer: _byte(answer) == 2307,
                "That moves it up by eight bits, and does not fit a byte any more.",
            ),
        ],
        otherwise="Write 9 and 3 with four binary digits each, side by side, and read all eight.",
    ),
    "03.2": Exercise(
        task=(
            "Q4_1 stores, for each block of 32 weights, 32 codes of 4 bits and two numbers of "
            "16 bits. Set bits_per_weight to the bits that each weight takes."
        ),
        right=lambda answer: close(answer, 5, 0),
        praise="4 for the code, and 32 bits shared by 32 weights: one more.",
        hints=[
            (
                lambda answer: close(answer, 4, 0),
                "That is the code alone. Which part of the two numbers of the block comes on top?",
            ),
            (
                lambda answer: close(answer, 4.5, 0),
                "Half of it: the block stores two numbers of 16 bits.",
            ),
            (
                lambda answer: close(answer, 36, 0),
                "That charges each weight for the whole block. How many share those 32 bits?",
            ),
            (
                lambda answer: close(answer, 160, 0),
                "That is the whole block. How many weights are in it?",
            ),
            (
                lambda answer: close(answer, 6, 0),
                "Right for 32-bit numbers, such as the scales of bitsandbytes. Here they have 16.",
            ),
            (lambda answer: close(answer, 0.625, 0), "That is bytes. How many bits are in one?"),
        ],
        otherwise="Count all bits of one block, then divide by its weights.",
    ),
    "03.3": Exercise(
        task=(
            "10 billion parameters, 5 % of them stay in bf16, the others become NF4 with double "
            "quantization. Set times_less to the memory with all in bf16, divided by the memory "
            "now."
        ),
        right=lambda answer: _times(answer, 16 / (0.05 * 16 + 0.95 * 4.127)),
        praise="4.72 bits per parameter on average, against 16.",
        hints=[
            (
                lambda answer: _times(answer, 4),
                "That is 16 / 4. Two things besides the codes take memory here.",
            ),
            (
                lambda answer: _times(answer, 16 / 4.127),
                "Right for the quantized part. What about the 5 % that are not quantized?",
            ),
            (
                lambda answer: _times(answer, 16 / (0.05 * 16 + 0.95 * 4)),
                "Nearly. The codes take 4 bits; what do their scales take?",
            ),
            (
                lambda answer: _times(answer, 16 / (0.05 * 16 + 0.95 * 4.5)),
                "Nearly. That is without double quantization.",
            ),
            (
                lambda answer: _times(answer, 16 / (0.05 * 32 + 0.95 * 4.127)),
                "The embedding stays in bf16. How many bits is that?",
            ),
            (
                lambda answer: _times(answer, 32 / (0.05 * 16 + 0.95 * 4.127)),
                "That compares with fp32. The question is against bf16.",
            ),
            (
                lambda answer: _times(answer, (0.05 * 16 + 0.95 * 4.127) / 16),
                "Turn it round: how many times does the new model fit into the old one?",
            ),
            (
                lambda answer: _times(answer, 0.05 + 0.95 * 16 / 4.127),
                "Bits may be averaged, ratios may not. Average the bits, then divide.",
            ),
        ],
        otherwise=(
            "How many bits does a parameter take on average? 5 % have 16, the others 4.127."
        ),
    ),
    "03.4": Exercise(
        task=(
            "Write sixteen_values(matrix): in each block of 32 weights, round to 16 evenly spaced "
            "values. The lowest is the block's smallest weight, the highest its largest. Return "
            "the rounded weights in the shape of matrix."
        ),
        right=_right_grid,
        praise="On weights that lie on this grid already it loses nothing. Try the real ones.",
        hints=[
            (
                lambda f: _distance(f(_off_the_grid()), _off_the_grid()) < 1e-6,
                "The weights come back unchanged. On other weights that cannot be right.",
            ),
            (_codes, "You return the codes. What turns a code back into a weight?"),
            (
                _offset_is_lost,
                "Your blocks all start at zero. You subtracted the smallest weight: add it again.",
            ),
            (
                lambda f: _gives(f, _absmax(_off_the_grid()), _off_the_grid()),
                "That is absmax: even around zero. This grid goes from the smallest to the "
                "largest weight, wherever those are.",
            ),
            (
                lambda f: _gives(f, _grid(_off_the_grid(), 512), _off_the_grid()),
                "One grid for the whole matrix. Which harm did blocks prevent in section 3?",
            ),
            (
                lambda f: _gives(f, _grid(_off_the_grid(), 64), _off_the_grid()),
                "You have one grid per row of this matrix. A block is 32 weights.",
            ),
            (
                _sixteen_steps,
                "The largest weight is not hit. How many gaps are between 16 values?",
            ),
            (
                _always_down,
                "Every weight is rounded down. The nearest value may be the one above.",
            ),
            (
                lambda f: _gives(
                    lambda m: f(m).reshape(m.shape), _grid(_off_the_grid()), _off_the_grid()
                ),
                "The values are right. The shape must be the one that came in.",
            ),
        ],
        otherwise=(
            "Take one block on paper: subtract its smallest weight, divide by the width of a "
            "step, round, and go back."
        ),
        trial=lambda f: f(_off_the_grid()),
    ),
}
