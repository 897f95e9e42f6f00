"""helpers/statistics.py: held against published values, by counting, and against scipy."""

from itertools import product

import pytest
import scipy.stats

from helpers import statistics


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (8, 10, 0.490, 0.943),
        (0, 10, 0.000, 0.278),
        (10, 10, 0.722, 1.000),
        (50, 100, 0.404, 0.596),
        (1, 1, 0.207, 1.000),
    ],
)
def test_wilson_interval(hits: int, count: int, low: float, high: float) -> None:
    interval = statistics.wilson_interval(hits / count, count)
    assert interval == pytest.approx((low, high), abs=5e-4)
    assert 0 <= interval[0] <= hits / count <= interval[1] <= 1


def test_an_interval_needs_trials_and_a_fraction() -> None:
    for fraction, count in [(0.5, 0), (1.2, 10), (-0.1, 10)]:
        with pytest.raises(ValueError, match="no interval"):
            statistics.wilson_interval(fraction, count)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (3, 7), (57, 114), (114, 114)])
def test_wilson_interval_is_scipys(hits: int, count: int) -> None:
    interval = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    ours = statistics.wilson_interval(hits / count, count)
    assert ours == pytest.approx((interval.low, interval.high), abs=1e-4)  # z = 1.96 is rounded


@pytest.mark.parametrize(("first", "second"), [(1, 7), (12, 5), (30, 20), (50, 44)])
def test_mcnemar_is_scipys_binomial_test(first: int, second: int) -> None:
    expected = scipy.stats.binomtest(first, first + second).pvalue
    assert statistics.mcnemar(first, second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        # The worked example of Fagerland, Lydersen and Laake, BMC Medical Research Methodology
        # 13:91 (2013): twice the binomial tail P(X <= 1) of 8 fair coins.
        (1, 7, 18 / 256),
        (0, 0, 1),
        (3, 3, 1),
        (0, 5, 2 / 2**5),
        (0, 114, 2 / 2**114),
    ],
)
def test_mcnemar(only_first: int, only_second: int, p: float) -> None:
    assert statistics.mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-3)
    assert statistics.mcnemar(only_second, only_first) == statistics.mcnemar(
        only_first, only_second
    )


@pytest.mark.parametrize(("only_first", "only_second"), [(2, 7), (4, 5), (0, 8), (6, 1)])
def test_mcnemar_counts_coin_flips(only_first: int, only_second: int) -> None:
    coins, gap = only_first + only_second, abs(only_first - only_second)
    flips = list(product((0, 1), repeat=coins))
    uneven = sum(abs(2 * sum(flip) - coins) >= gap for flip in flips)
    assert statistics.mcnemar(only_first, only_second) == pytest.approx(uneven / len(flips))


def test_counts_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        statistics.mcnemar(-1, 3)
