"""Right forms and typical mistakes of notebook 08's exercises; test_exercises.py tries them."""

import random
from collections.abc import Sequence

import torch

from helpers.statistics import wilson_interval

Right = Sequence[bool]


def paired(first: Right, second: Right) -> tuple[float, float]:
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    means = sorted(sum(random.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(1000))
    return means[25], means[974]


def paired_in_torch(first: Right, second: Right) -> torch.Tensor:
    gaps = torch.tensor(second).float() - torch.tensor(first).float()
    generator = torch.Generator().manual_seed(1)
    draws = torch.randint(len(gaps), (2000, len(gaps)), generator=generator)
    return gaps[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))


def unpaired(first: Right, second: Right) -> tuple[float, float]:
    def mean(hits: Right) -> float:
        return sum(random.choices(hits, k=len(hits))) / len(hits)

    means = sorted(mean(second) - mean(first) for _ in range(1000))
    return means[25], means[974]


def without_replacement(first: Right, second: Right) -> tuple[float, float]:
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    means = sorted(sum(random.sample(gaps, k=len(gaps))) / len(gaps) for _ in range(1000))
    return means[25], means[974]


def extremes(first: Right, second: Right) -> tuple[float, float]:
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    means = sorted(sum(random.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(1000))
    return means[0], means[-1]


def half_of_them(first: Right, second: Right) -> tuple[float, float]:
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    means = sorted(sum(random.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(1000))
    return means[250], means[750]


def counted(first: Right, second: Right) -> tuple[float, float]:
    low, high = paired(first, second)
    return low * len(first), high * len(first)


RIGHT = [
    ("08.1", (0.596, 0.982)),
    ("08.1", [0.6, 0.98]),
    ("08.1", wilson_interval(0.9, 10)),
    ("08.1", ("59.6 %", "98.2 %")),
    ("08.1", (59.6, 98.2)),
    ("08.1", torch.tensor([0.5958, 0.9821])),
    ("08.2", ["second", "cannot tell", "cannot tell"]),
    ("08.2", ("Second", "can't tell", "Cannot tell.")),
    ("08.2", "second, cannot tell, cannot tell"),
    ("08.2", {1: "second", 2: "cannot tell", 3: "cannot tell"}),
    ("08.3", 4),
    ("08.3", "4.0"),
    ("08.3", torch.tensor([0.5, 0.25, 0.125]).log().neg().mean().exp()),
    ("08.4", [0.3, 0.4, -0.1, 0.2]),
    ("08.4", torch.tensor([3, 4, -1, 2]) / 10),
    ("08.4", ("0.3", "0.4", "-0.1", "0.2")),
    ("08.5", paired),
    ("08.5", paired_in_torch),
]

WRONG = [
    ("08.1", (0.714, 1.086), "more than 100 %"),
    ("08.1", (0.714, 1), "more than 100 %"),
    ("08.1", (0.982, 0.596), "Which is the lower one"),
    ("08.1", wilson_interval(0.9, 100), "what 90 of 100 would give"),
    ("08.1", wilson_interval(0.1, 10), "fraction of wrong answers"),
    ("08.1", 0.596, "two ends"),
    ("08.1", (0.5, 0.9), "takes the fraction right"),
    ("08.2", ["second"] * 3, "the larger count wins every time"),
    ("08.2", ["first", "second", "second"], "less often the only right one"),
    ("08.2", ["second", "cannot tell", "second"], "five coins"),
    ("08.2", ["second", "second", "cannot tell"], "among how many messages"),
    ("08.2", ["cannot tell"] * 3, "too careful"),
    ("08.2", ["second", "cannot tell"], "three in all"),
    ("08.2", ["cannot tell", "second", "second"], "gives p"),
    ("08.3", 14 / 3, "the mean of 2, 4 and 8"),
    ("08.3", 24 / 7, "averaged the probabilities first"),
    ("08.3", 1.386, "One step is missing"),
    ("08.3", 2, "mean loss in bits"),
    ("08.3", 64, "per token"),
    ("08.3", 0.25, "surprised more"),
    ("08.3", 5, "then exp of that"),
    ("08.4", [0.34, 0.36, -0.13, 0.22], "Those are the sums"),
    ("08.4", [0.3, 0.3, -0.1, 0.2], "the parameters as they were"),
    ("08.4", [0.4, 0.4, -0.2, 0.3], "away from zero"),
    ("08.4", [0, 0.1, 0, 0], "left out the parameter"),
    ("08.4", [0.3, 0.4, -0.1], "four come out"),
    ("08.4", [0.3, 0.4, 0.1, 0.2], "nearest multiple"),
    ("08.5", (0.1, 0.3), "the function itself"),
    ("08.5", without_replacement, "with replacement"),
    ("08.5", unpaired, "same messages in each round"),
    ("08.5", lambda first, second: paired(second, first), "second minus first"),
    ("08.5", counted, "difference of two fractions"),
    ("08.5", extremes, "too wide"),
    ("08.5", half_of_them, "too narrow"),
    ("08.5", lambda first, second: 1 / 0, "raised ZeroDivisionError"),
    (
        "08.5",
        lambda first, second: [
            x + 0.2 * any(x for x in first) * (first != second) for x in paired(first, second)
        ],
        "with replacement, and keep",
    ),
]
