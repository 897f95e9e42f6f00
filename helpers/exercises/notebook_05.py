"""Exercises of notebook 05: training."""

from __future__ import annotations

import math
from collections.abc import Callable

from helpers.exercises import Exercise, close, number

STEPS, WARMUP, PEAK = 100, 10, 2e-3
LOSSES, TOKENS = [0.5, 0.1, 0.4], [10, 80, 20]


def _cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _rates(schedule: Callable[..., float]) -> list[float]:
    return [float(schedule(step, STEPS, WARMUP, PEAK)) for step in range(STEPS)]


def _same(schedule: Callable[..., float]) -> bool:
    wanted = _rates(_cosine)
    return all(
        math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-12)
        for got, want in zip(_rates(schedule), wanted, strict=True)
    )


def _loss(mean: Callable[..., float]) -> float:
    return number(mean(list(LOSSES), list(TOKENS)))


EXERCISES = {
    "05.1": Exercise(
        task=(
            "456 rows, batches of 4, gradients accumulated over 2 batches, 3 epochs: how many "
            "optimizer steps is that? Set answer to the number."
        ),
        right=lambda answer: close(answer, 171, 0),
        praise="114 batches an epoch, two to a step, three times: 57 x 3.",
        hints=[
            (
                lambda answer: close(answer, 342, 0),
                "That counts batches. How many batches go into one optimizer step?",
            ),
            (
                lambda answer: close(answer, 57, 0),
                "That is one epoch. How often are the rows read?",
            ),
            (
                lambda answer: close(answer, 1368, 0),
                "That is how often a row is read. How many rows go into one step?",
            ),
            (
                lambda answer: close(answer, 684, 0),
                "Accumulation makes fewer steps of more rows each: divide by it once more.",
            ),
        ],
        otherwise="Count the batches of one epoch first, then the steps, then all epochs.",
    ),
    "05.2": Exercise(
        task=(
            "Write cosine(step, steps, warmup, peak): the learning rate rises in a straight line "
            "from 0 to peak over the first warmup steps, then falls along half a cosine wave that "
            "would reach 0 one step after the last (at step = steps), as "
            "lr_scheduler_type='cosine' does."
        ),
        right=_same,
        praise="Your schedule is the library's, at every step.",
        hints=[
            (
                lambda f: min(_rates(f)) < -1e-12,
                "Your rate gets below zero. A cosine goes from 1 to -1; the rate from 1 to 0.",
            ),
            (
                lambda f: _rates(f)[0] > 0.5 * PEAK,
                "At step 0 your rate is near its highest already. What does the warm-up do?",
            ),
            (
                lambda f: _rates(f)[-1] > 0.5 * PEAK,
                "Your rate is high again at the end. Half a wave is pi, not 2 pi.",
            ),
            (
                lambda f: not math.isclose(max(_rates(f)), PEAK, rel_tol=1e-3),
                "Your highest rate is not peak. Count the cosine from the end of the warm-up.",
            ),
            (
                lambda f: (
                    math.isclose(_rates(f)[55], PEAK / 2, rel_tol=1e-6)
                    and not math.isclose(
                        _rates(f)[30], _cosine(30, STEPS, WARMUP, PEAK), rel_tol=1e-3
                    )
                ),
                "Half-way down it is right, before and after it is not: yours falls straight.",
            ),
        ],
        otherwise="Print your rate at steps 0, warmup and steps - 1: expect 0, peak, almost 0.",
        trial=lambda f: f(1, STEPS, WARMUP, PEAK),
    ),
    "05.3": Exercise(
        task=(
            "A batch was done in three parts. You know the mean loss of each part and how many "
            "answer tokens it has. Write mean_loss(losses, tokens): the loss of the whole batch."
        ),
        right=lambda f: math.isclose(_loss(f), 21 / 110, rel_tol=1e-6),
        praise="Every token counts the same, wherever it stood. That is num_items_in_batch.",
        hints=[
            (
                lambda f: math.isclose(_loss(f), sum(LOSSES) / 3, rel_tol=1e-6),
                "That gives a part of 10 tokens the same say as one of 80.",
            ),
            (
                lambda f: math.isclose(_loss(f), sum(LOSSES), rel_tol=1e-6),
                "A sum grows with the number of parts. The loss is a mean over tokens.",
            ),
            (
                lambda f: math.isclose(_loss(f), 21.0, rel_tol=1e-6),
                "That is the sum over all tokens. What remains to make it a mean?",
            ),
            (
                lambda f: math.isclose(_loss(f), 7.0, rel_tol=1e-6),
                "You divided the sum over all tokens by the number of parts, not of tokens.",
            ),
        ],
        otherwise="Undo each mean first: loss times tokens is the sum over the tokens of a part.",
        trial=lambda f: f(list(LOSSES), list(TOKENS)),
    ),
}
