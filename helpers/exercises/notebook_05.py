"""Exercises of notebook 05: training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from helpers.exercises import Exercise, number

STEPS, WARMUP, PEAK = 100, 10, 2e-3
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
FIRST = (2.3643, 2.5352, 2.5583, 2.7310)  # losses of the recorded run; bf16 is off by up to 0.07
CLOSE = 0.1  # nats, within which two losses are of the same rows


def _losses(answer: dict[float, Any], rate: float) -> list[float]:
    """The losses at a rate, or the last of them alone."""
    given = next(value for key, value in answer.items() if math.isclose(number(key), rate))
    return [number(loss) for loss in (given if isinstance(given, Sequence) else [given])]


def _last(answer: dict[float, Any]) -> list[float]:
    return [_losses(answer, rate)[-1] for rate in RATES]


def _begin_apart(answer: dict[float, Any]) -> bool:
    every = [_losses(answer, rate) for rate in RATES]
    firsts = [losses[0] for losses in every if len(losses) > 1]
    return bool(firsts) and max(firsts) - min(firsts) > CLOSE


def _range_is_seen(answer: dict[float, Any]) -> bool:
    low, best, high, highest = _last(answer)
    return not _begin_apart(answer) and best < 1.5 < low < 3 < highest and best < high


def _cosine(step: int, steps: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _rates(schedule: Callable[..., float]) -> list[float]:
    return [float(schedule(step, STEPS, WARMUP, PEAK)) for step in range(STEPS)]


def _same(schedule: Callable[..., float]) -> bool:
    expected = _rates(_cosine)
    return all(
        math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-12)
        for got, want in zip(_rates(schedule), expected, strict=True)
    )


def _apart(some: Sequence[Any], others: Sequence[Any]) -> float:
    pairs = zip(some[:4], others[:4], strict=True)
    return max(abs(number(one) - number(other)) for one, other in pairs)


EXERCISES = {
    "05.1": Exercise(
        task=(
            "Which learning rate? Run the loop of section 3 for six steps at a constant rate, "
            "without the schedule, each time from new_model(): at 1e-4, 1e-3, 1e-2 and 1e-1. Set "
            "answer_1 to {rate: [its six losses], ...}. It takes about a minute. Which rate would "
            "you choose?"
        ),
        right=_range_is_seen,
        praise=(
            "1e-3 falls fast, 1e-4 hardly moves, and the others leap up. A minute of this saves "
            "many runs of an hour."
        ),
        hints=[
            (
                lambda answer: not isinstance(answer, dict) or len(answer) < 4,
                "It takes all four rates, in a dictionary: {1e-4: [...], 1e-3: [...], ...}.",
            ),
            (
                _begin_apart,
                "The first losses differ, and they should not: each rate begins with a "
                "new_model(), and an optimizer that has its parameters.",
            ),
            (
                lambda answer: max(_last(answer)) - min(_last(answer)) < 0.3,
                "All four end alike. Does the optimizer get the rate, and does it step?",
            ),
            (
                lambda answer: _last(answer)[1] > 1.5,
                "At 1e-3 next to nothing was learned. Is the rate still warming up? Leave out the "
                "schedule.",
            ),
        ],
        otherwise=(
            "Start each rate with new_model().train(), hand its parameters and the rate to AdamW, "
            "and take batches[:6] in their order."
        ),
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
            "Make four steps, each time from new_model(), with (per_device_train_batch_size, "
            "gradient_accumulation_steps) = (4, 1), (1, 4) and (1, 1). Set answer_3 to the three "
            "lists of losses. dataclasses.replace(arguments, ...) changes settings; see section 8."
        ),
        right=lambda answer: (
            [len(losses) for losses in answer] == [4, 4, 4]
            and _apart(answer[0], FIRST) < CLOSE
            and _apart(answer[1], FIRST) < CLOSE
            and _apart(answer[2], FIRST) > CLOSE
        ),
        praise="Four rows at once or one by one: the losses are equal, and so is the run.",
        hints=[
            (
                lambda answer: len(answer) != 3,
                "It takes three lists of losses, in the order (4, 1), (1, 4), (1, 1).",
            ),
            (
                lambda answer: any(len(losses) != 4 for losses in answer),
                "Each list has the losses of four optimizer steps: end the run by FirstSteps(4).",
            ),
            (
                lambda answer: _apart(answer[0], FIRST) > CLOSE,
                "The first run does not begin as the recorded one. Has its model been trained "
                "before?",
            ),
            (
                lambda answer: _apart(answer[1], FIRST) > CLOSE,
                "The second run sees other rows than the first. Four batches of one row make a "
                "step: is gradient_accumulation_steps 4?",
            ),
            (
                lambda answer: _apart(answer[2], FIRST) < CLOSE,
                "The third run sees the rows of the first. One row a step: both settings are 1.",
            ),
        ],
        otherwise="Read the losses with training.curves(trainer)[0], which gives [step, loss].",
    ),
}
