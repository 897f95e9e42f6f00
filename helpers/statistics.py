"""How sure a score is, and whether two models differ: an interval and a test, written out."""

from __future__ import annotations

import math


def wilson_interval(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true fraction with 95 % confidence.

    Args:
        fraction: the fraction of successes that was seen, 0 to 1.
        count: trials, at least 1.
        z: how many standard deviations wide; 1.96 gives 95 %.

    Raises:
        ValueError: there are no trials, or the fraction is not between 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927). It equals
    `scipy.stats.binomtest(...).proportion_ci(method="wilson")`.
    """
    if count < 1 or not 0 <= fraction <= 1:
        raise ValueError(f"A fraction of {fraction} in {count} trials has no interval.")
    center = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    variance = fraction * (1 - fraction) / count + (z / (2 * count)) ** 2
    half = z / (1 + z**2 / count) * math.sqrt(variance)
    return max(0.0, center - half), min(1.0, center + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test, for two models on the same examples.

    Args:
        only_first: examples that only the first model gets right.
        only_second: examples that only the second model gets right. Examples that both get right,
            or both get wrong, say nothing about which model is better.

    Returns:
        How often fair coins, one per example on which the models differ, would come out at least
        this uneven. Small: the models differ. Large: this test set cannot tell.

    Raises:
        ValueError: a count is negative.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
    or percentages", Psychometrika 12 (1947). It equals `scipy.stats.binomtest(...).pvalue`.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"Counts cannot be negative: {only_first}, {only_second}.")
    coins = only_first + only_second
    tail = sum(math.comb(coins, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**coins)
