"""Tests of helpers/diagnosis.py: 200 generated curves of known kind, real curves, bad input."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from helpers.diagnosis import diagnose

KINDS = ["underfitting", "healthy", "overfitting", "diverging", "inconclusive"]
# The thresholds of the module were chosen on seeds 10_000 and above, never on these.
TEST_SEEDS = range(200)


def decay(rng, x, speed):
    """A falling curve from 1 to 0 over x = 0..1, exponential or power law.

    speed "slow": the last third makes at least 14 % of the fall (the module's line: 7 %).
    speed "fast": the last third makes at most 3 % of it.
    """
    if rng.random() < 0.5:
        rate = rng.uniform(0.3, 1.5) if speed == "slow" else rng.uniform(5, 12)
        shape, last = np.exp(-rate * x), np.exp(-rate)
    else:
        rate = rng.uniform(0.5, 2) if speed == "slow" else rng.uniform(60, 200)
        power = rng.uniform(0.3, 1) if speed == "slow" else rng.uniform(0.7, 1)
        shape, last = (1 + rate * x) ** -power, (1 + rate) ** -power
    return (shape - last) / (1 - last)


def make_train(rng, kind, top, gain):
    """Training loss of tiny batches: 30 to 600 values, 5 to 25 % noise, drops at epoch borders."""
    n = int(rng.integers(30, 601))
    x = np.linspace(0, 1, n)
    if kind == "underfitting":
        loss = top - gain * (1 - decay(rng, x, "slow"))
    elif kind == "overfitting":  # memorises: ends below 5 % of its start
        epochs = rng.integers(3, 9)
        stairs = np.floor(x * epochs) / epochs
        loss = top * np.exp(-rng.uniform(4, 8) * (0.8 * stairs + 0.2 * x))
    else:
        loss = top - gain * (1 - decay(rng, x, "fast"))
    if kind == "diverging":
        # From 40 to 85 % of the run on it regains at least 60 % of its fall (the module's line:
        # 30 %) and at least half of its lowest level, so that it stands out of the batch noise.
        turn = rng.uniform(0.4, 0.85)
        climb = max(rng.uniform(0.6, 2) * gain, 0.5 * (top - gain))
        loss = loss + climb * np.clip((x - turn) / (0.9 - turn), 0, 1)
    return 10 * np.arange(1, n + 1), loss * np.exp(rng.normal(0, rng.uniform(0.05, 0.25), n))


def make_run(seed):
    """Train and evals of one run, and its kind by construction."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    n = round(math.exp(rng.uniform(math.log(5), math.log(100))))  # 5 to 100 evaluations
    if kind == "inconclusive" and rng.random() < 0.5:
        n = int(rng.integers(1, 4))
    noisy = rng.random() < 0.5
    x = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
    floor = rng.uniform(0.05, 1.5)
    gain = rng.uniform(0.5, 3)
    noise = gain * (rng.uniform(0.005, 0.02) if noisy else 0.001)
    if n < 8:
        noise = noise / 4  # nobody tells 2 % noise from a trend in five values

    if kind == "underfitting":
        loss = floor + gain * decay(rng, x, "slow")
    else:
        loss = floor + gain * decay(rng, x, "fast")
    if kind == "overfitting":
        # Rises from 20 to 60 % of the run on, by 15 to 80 % of the fall (at least 7 times the
        # noise) and at least 10 % of the floor (the module's line: 3 %).
        turn = rng.uniform(0.2, 0.6)
        rise = max(rng.uniform(0.15, 0.8) * gain, 0.1 * floor)
        loss = loss + rise * np.clip((x - turn) / (1 - turn), 0, 1) ** rng.uniform(1, 1.5)
    if kind == "inconclusive":
        # The noise is 15 to 40 % of the level, the trend at most half a standard deviation.
        level = floor + gain
        noise = level * rng.uniform(0.15, 0.4)
        loss = level - rng.uniform(0, 0.5) * noise * x
    loss = loss + rng.normal(0, noise, n)
    if n >= 8 and rng.random() < 0.5:  # one evaluation far off; a high first one is no outlier
        loss[rng.integers(1, n)] *= rng.choice([0.3, 2.0, 4.0])

    steps, train = make_train(rng, kind, floor + gain, gain)
    if kind == "diverging" and rng.random() < 0.4:
        broken = train if rng.random() < 0.5 else loss
        broken[rng.integers(len(broken) // 2, len(broken)) :] = rng.choice([np.nan, np.inf])
    eval_steps = np.linspace(steps[-1] / n, steps[-1], n).astype(int)
    loss = np.maximum(loss, 1e-3)
    return list(zip(steps, train, strict=True)), list(zip(eval_steps, loss, strict=True)), kind


def table(counts):
    lines = [" " * 14 + "".join(f"{verdict:>14}" for verdict in KINDS)]
    for kind in KINDS:
        lines.append(f"{kind:>14}" + "".join(f"{counts[kind, v]:14}" for v in KINDS))
    return "\n".join(lines)


def test_agrees_with_the_kind_of_200_generated_runs():
    counts, high = Counter(), Counter()
    for seed in TEST_SEEDS:
        train, evals, kind = make_run(seed)
        found = diagnose(train, evals)
        counts[kind, found.verdict] += 1
        high[found.verdict == kind] += found.confidence == "high"
    right = {kind: counts[kind, kind] for kind in KINDS}
    each = len(TEST_SEEDS) / len(KINDS)
    assert sum(right.values()) >= 0.95 * len(TEST_SEEDS), "\n" + table(counts)
    assert min(right.values()) >= 0.90 * each, "\n" + table(counts)
    # "high" has to mean something: nearly always right, and said of a fair part of all runs.
    assert high[True] >= 0.3 * len(TEST_SEEDS)
    assert high[False] <= 0.02 * high[True]


def curve(losses, every=100):
    return [(every * (i + 1), loss) for i, loss in enumerate(losses)]


def falling_to(last, first=2.0):
    return curve(np.geomspace(first, last, 60), every=20)


FLAT = [0.9, 0.4, 0.2, 0.12, 0.09, 0.08, 0.078, 0.077]
TURNED = [1.42, 1.22, 1.14, 1.17, 1.21, 1.26, 1.30]
LONG_TURNED = [0.31, 0.21, 0.15, 0.12, 0.1, 0.088, 0.08, *np.linspace(0.077, 0.09, 13)]
FALLING = [1.0, 0.7, 0.49, 0.343]


@pytest.mark.parametrize(
    ("train_end", "losses", "verdict", "best_step"),
    [
        (0.0002, LONG_TURNED, "overfitting", 800),
        (0.18, TURNED, "overfitting", 300),
        (0.05, FLAT, "healthy", 800),
        (0.35, FALLING, "underfitting", 400),
    ],
)
def test_curves_of_real_runs(train_end, losses, verdict, best_step):
    found = diagnose(falling_to(train_end), curve(losses))
    assert (found.verdict, found.best_step) == (verdict, best_step)
    assert diagnose([], curve(losses)).verdict == verdict  # the same without the training loss


def test_explanation_names_the_numbers_and_the_step():
    text = diagnose(falling_to(0.18), curve(TURNED)).explanation
    assert "from 1.42 to 1.3" in text and "1.14" in text and "step 300" in text
    assert "training loss from" in text


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_fewer_than_four_evaluations_are_inconclusive(n):
    found = diagnose(falling_to(0.2), curve(FALLING[:n]))
    assert (found.verdict, found.confidence) == ("inconclusive", "low")
    assert found.best_step == (100 * n or None)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_diverging_however_few(broken):
    found = diagnose([(10, 2.0), (20, broken)], [])
    assert (found.verdict, found.best_step, found.confidence) == ("diverging", None, "high")
    found = diagnose([], [(100, 0.9), (200, broken)])
    assert (found.verdict, found.best_step) == ("diverging", 100)
    assert "step 200" in found.explanation
    recovered = diagnose([(10, 2.0), (20, broken), (30, 1.9)], [])
    assert (recovered.verdict, recovered.confidence) == ("diverging", "medium")


def test_rising_training_loss_is_diverging():
    train = curve([*np.geomspace(3, 1, 40), *np.linspace(1, 2.5, 40)], every=10)
    assert diagnose(train, curve([2.0, 1.3, 1.6, 2.5])).verdict == "diverging"
    assert diagnose(train, []).verdict == "diverging"


@pytest.mark.parametrize("where", [1, 30, 57, 59])
def test_one_spike_of_the_training_loss_is_not_divergence(where):
    train = falling_to(0.05)
    train[where] = (train[where][0], 50.0)
    assert diagnose(train, curve(FLAT)).verdict == "healthy"


def test_stairs_at_epoch_borders_are_not_divergence():
    # Memorising: each epoch starts with a drop and then drifts up by 10 %.
    stairs = [level * (1 + 0.1 * i / 50) for level in (2, 1, 0.4, 0.1, 0.02) for i in range(50)]
    assert diagnose(curve(stairs, every=10), curve(FLAT)).verdict == "healthy"


@pytest.mark.parametrize("where", range(1, 20))
@pytest.mark.parametrize("factor", [0.2, 5])
def test_one_evaluation_far_off_changes_nothing(where, factor):
    flat = 0.3 + 0.7 * np.exp(-np.arange(20) / 2.5)
    turned = flat + 0.02 * np.maximum(np.arange(20) - 8, 0)
    for losses, verdict in ((flat, "healthy"), (turned, "overfitting")):
        losses[where] *= factor
        found = diagnose(falling_to(0.05), curve(losses))
        assert found.verdict == verdict
        if where >= 5:  # in its steep beginning a curve bends more than any neighbours tell
            assert found.best_step != 100 * (where + 1)
            assert found.explanation.endswith("Set aside as far off the others: 1.")


def test_a_single_high_last_evaluation_is_not_overfitting():
    assert diagnose([], curve([1.0, 0.5, 0.3, 0.25, 0.24, 0.9])).verdict == "inconclusive"


def test_order_does_not_matter():
    train, evals = falling_to(0.18), curve(TURNED)
    assert diagnose(train[::-1], evals[::-1]) == diagnose(train, evals)


def test_the_last_of_equal_steps_counts():
    evals, train = curve(TURNED), falling_to(0.18)
    crashed = [(200, 9.0), (300, math.nan)]
    assert diagnose([(20, math.inf), *train], crashed + evals) == diagnose(train, evals)


def test_constant_curves():
    constant = curve([2.3] * 10)
    assert diagnose(constant, constant).verdict == "inconclusive"
    assert diagnose([], constant).verdict == "inconclusive"
    assert diagnose([], curve([0, 0, 0, 0])).verdict == "inconclusive"
    # Validation at its floor from the first evaluation on, as after a long first epoch.
    found = diagnose(falling_to(0.3), curve([0.35] * 10))
    assert (found.verdict, found.confidence) == ("healthy", "low")


def test_a_run_that_blows_up_at_once_is_diverging_though_it_comes_down_again():
    # SmolLM2 at ten times its learning rate.
    losses = [3.3, 8.4, 33.8, 27.9, 21.6, 30.3, 52.0, 15.9, 15.1, 15.5, 14.7, 12.3, 10.1, 11.9]
    found = diagnose(curve([*losses, 9.2, 10.4, 9.2, 9.8, 8.4, 6.8]), curve([6.9]))
    assert found.verdict == "diverging"
    assert "began at 3.3 and ended at 6.8" in found.explanation
    recovered = curve([*losses, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0])
    assert diagnose(recovered, curve(FLAT)).verdict != "diverging"


def test_a_rise_from_exactly_zero_is_diverging():
    assert diagnose(curve([0.0] * 20 + [1.0] * 20), []).verdict == "diverging"


def test_a_hardly_moving_loss_that_falls_steadily_is_underfitting():
    tiny = curve(np.linspace(5.46, 5.45, 20))  # seen with a learning rate far too low
    assert diagnose(tiny, tiny).verdict == "underfitting"


def test_noise_larger_than_the_trend_is_inconclusive():
    losses = [1.0, 1.3, 0.8, 1.2, 0.9, 1.25, 0.8, 1.1, 0.85, 1.2]
    assert diagnose(falling_to(0.2), curve(losses)).verdict == "inconclusive"


def test_ints_and_numpy_and_torch_scalars():
    ints = [(1, 9), (2, 5), (3, 3), (4, 2)]
    expected = diagnose(ints, ints)
    arrays = np.array(ints, dtype=np.float32)
    assert diagnose(arrays, list(zip(arrays[:, 0], arrays[:, 1], strict=True))) == expected
    assert diagnose(iter(ints), tuple(ints)) == expected
    torch = pytest.importorskip("torch")
    tensors = [(torch.tensor(step), torch.tensor(float(loss))) for step, loss in ints]
    assert diagnose(tensors, tensors) == expected


def test_to_dict_is_json():
    numpy_scalars = [(np.int64(s), np.float32(v)) for s, v in curve(TURNED)]
    for evals in (numpy_scalars, []):
        found = diagnose([], evals)
        assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3.5,
        (10, 2.3),
        [1.0, 0.9],
        [(1, 2, 3)],
        [(1, None)],
        [(1, "0.5")],
        ["ab"],
        [{"step": 10, "loss": 2.3}],
        [(1, [0.5, 0.4])],
        [(1, 1j)],
    ],
)
def test_what_is_no_series_of_pairs_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=r"train must be a series of \(step, loss\) pairs"):
        diagnose(bad, [])
    with pytest.raises(ValueError, match=r"evals must be a series of \(step, loss\) pairs"):
        diagnose([], bad)


@pytest.mark.parametrize("step", [0.5, math.nan, math.inf])
def test_steps_must_be_whole(step):
    with pytest.raises(ValueError, match="whole steps"):
        diagnose([], [(step, 0.4)])
