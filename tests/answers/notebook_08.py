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


def rounding_error(dtype: torch.dtype) -> torch.Tensor:
    numbers = 0.1 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    return (numbers - numbers.to(dtype).float()).abs().mean()


RIGHT = [
    ("08.1", 400),
    ("08.1", "400 messages"),
    ("08.1", torch.tensor(400)),
    (
        "08.1",
        next(n for n in range(100, 1000, 100) if wilson_interval(0.75, n)[0] > 0.7),
    ),
    ("08.2", ["second", "cannot tell", "cannot tell"]),
    ("08.2", ("Second", "can't tell", "Cannot tell.")),
    ("08.2", "second, cannot tell, cannot tell"),
    ("08.2", {1: "second", 2: "cannot tell", 3: "cannot tell"}),
    ("08.3", ("less than half", "more than half")),
    ("08.3", ["Less than half", "More than half."]),
    ("08.3", "less than half, more than half"),
    ("08.3", {"perplexity": "less than half", "tickets": "more than half"}),
    ("08.4", 8),
    ("08.4", "8.0"),
    ("08.4", rounding_error(torch.bfloat16) / rounding_error(torch.float16)),
    ("08.5", paired),
    ("08.5", paired_in_torch),
]

WRONG = [
    ("08.1", 300, "just below"),
    ("08.1", 322, "in steps of 100"),
    ("08.1", 100, "seventeen points wide"),
    ("08.1", 0.705, "How many messages does it take"),
    ("08.1", 500, "Is a smaller number enough"),
    ("08.1", 200, "gives both ends"),
    ("08.2", ["second"] * 3, "the larger count wins every time"),
    ("08.2", ["first", "second", "second"], "less often the only right one"),
    ("08.2", ["second", "cannot tell", "second"], "five coins"),
    ("08.2", ["second", "second", "cannot tell"], "among how many messages"),
    ("08.2", ["cannot tell"] * 3, "too careful"),
    ("08.2", ["second", "cannot tell"], "three in all"),
    ("08.2", ["cannot tell", "second", "second"], "gives p"),
    ("08.3", ("more than half", "less than half"), "Which is about the perplexity"),
    ("08.3", ("half", "half"), "need not have half of the effect"),
    ("08.3", ("more than half", "more than half"), "Compare rises"),
    ("08.3", ("less than half", "less than half"), "The first is right"),
    ("08.3", ["less than half"], "Two things were asked for"),
    ("08.3", (52.8, 17), "inside the with block"),
    ("08.4", 0.125, "the other way round"),
    ("08.4", 3, "By how much does each of them"),
    ("08.4", 1, "The two errors are not equal"),
    ("08.4", 64, "squared errors"),
    ("08.4", 5, "for both formats"),
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
