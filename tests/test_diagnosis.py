"""Tests of helpers/diagnosis.py: simulated training with a known outcome, 21 recorded runs judged
by hand, shapes, bad input."""

import json
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from helpers import experiments
from helpers.diagnosis import diagnose

VERDICTS = ["underfitting", "healthy", "overfitting", "diverging", "inconclusive"]

# -- simulated training ------------------------------------------------------------------------
#
# Linear and logistic regression by minibatch SGD, with noisy labels. Here the *population* loss is
# known, exactly (linear) or from 4,000 further rows (logistic), and it alone decides what is true
# of a run. `diagnose` sees what a practitioner sees: means of batch losses, and a validation loss
# on 24 to 400 rows. The rule's limits were chosen on seeds 100_000 and above, never on these.
SEEDS = range(400)
# What is done to a task, by seed modulo eight. "frozen": a rate of zero, other rows each time.
MODES = ["many rows", "few rows", "many rows", "few rows", "many rows", "few rows", "hot", "frozen"]


class Task:
    """Regression on Gaussian features of a power-law spectrum."""

    def __init__(self, rng):
        size = int(rng.integers(20, 101))
        self.rng, self.linear = rng, rng.random() < 0.5
        self.scale = np.arange(1, size + 1.0) ** -rng.uniform(0.2, 0.8)
        truth = rng.normal(size=size)
        self.truth = truth * rng.uniform(1, 4) / np.linalg.norm(self.scale * truth)
        self.noise = rng.uniform(0.3, 1.5)
        self.further_rows = None if self.linear else self.draw(4000)

    def draw(self, rows):
        x = self.rng.normal(size=(rows, len(self.truth))) * self.scale
        score = x @ self.truth
        if self.linear:
            return x, score + self.noise * self.rng.normal(size=rows)
        return x, (score + self.noise * self.rng.logistic(size=rows) > 0).astype(float)

    def losses(self, weights, x, y):
        """The loss of each row: squared error, or nats."""
        score = x @ weights
        return (score - y) ** 2 if self.linear else np.logaddexp(0, score) - y * score

    def gradient(self, weights, x, y):
        score = x @ weights
        error = 2 * (score - y) if self.linear else 0.5 * (1 + np.tanh(0.5 * score)) - y
        return x.T @ error / len(y)

    def population_loss(self, weights):
        if self.linear:
            return np.sum((self.scale * (weights - self.truth)) ** 2) + self.noise**2
        return self.losses(weights, *self.further_rows).mean()


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


@cache
def simulate(seed):
    """Train one run. Returns the two curves and what is true of it, None between two kinds."""
    rng = np.random.default_rng(seed)
    mode, task = MODES[seed % len(MODES)], Task(rng)
    rows = round(log_uniform(rng, 16, 80 if mode == "few rows" else 800))
    x, y = task.draw(rows)
    watched = task.draw(round(log_uniform(rng, 24, 400)))
    evaluations, batch = round(log_uniform(rng, 5, 25)), min(rows, int(rng.choice([4, 8, 16])))
    every = max(4, round(log_uniform(rng, 40, 500) / evaluations))
    steps, log_every = evaluations * every, max(1, evaluations * every // int(rng.integers(20, 61)))
    # Gradient descent diverges above 2 / curvature.
    curvature = np.linalg.norm(x, 2) ** 2 / rows * (2 if task.linear else 0.25)
    rate = log_uniform(rng, 0.002, 0.2) * 2 / curvature
    too_high, cosine = rng.uniform(1.2, 4) * 2 / curvature, rng.random() < 0.3
    learns = mode in ("many rows", "few rows")
    total = steps * 4 // 3 if learns else steps  # a third more, to know what it would have brought

    weights, order = np.zeros(len(task.truth)), []
    train, evals, batches, population, whole = [], [], [], [], []
    for step in range(1, total + 1):
        if len(order) < batch:
            order = list(rng.permutation(rows))
        ids, order = order[:batch], order[batch:]
        batches.append(task.losses(weights, x[ids], y[ids]).mean())
        now = rate * (0.5 * (1 + math.cos(math.pi * step / total)) if cosine else 1)
        if mode == "hot":  # a warm-up that does not end
            now = too_high * step / steps
        if mode != "frozen":
            weights = weights - now * task.gradient(weights, x[ids], y[ids])
        if step % max(1, steps // 30) == 0:
            population.append((step, task.population_loss(weights)))
            whole.append(task.losses(weights, x, y).mean())
        if step <= steps and step % log_every == 0:
            train.append((step, np.mean(batches)))
            batches = []
        if step <= steps and step % every == 0:
            losses = task.losses(weights, *watched)
            evals.append(
                (step, np.mean(rng.choice(losses, len(losses)) if mode == "frozen" else losses))
            )

    if mode == "frozen":
        return train, evals, "inconclusive"
    if mode == "hot":
        return train, evals, "diverging" if np.mean(whole[-3:]) > 2 * min(whole) else None
    first = task.population_loss(np.zeros(len(task.truth)))
    return train, evals, outcome(first, population, steps)


def outcome(first, population, steps):
    """What the population loss says: a tenth above its lowest; still to fall by a twentieth; or
    within two percent of its lowest and of what follows. None in between."""
    loss = np.convolve([value for _, value in population], np.ones(3) / 3, "valid")
    end = sum(step <= steps for step, _ in population) - 3
    low = loss[: end + 1].min()
    if loss[end] > 1.10 * low and np.argmin(loss[: end + 1]) < 0.8 * end:
        return "overfitting"
    if loss[end] > 1.02 * low:
        return None
    if loss[-1] < 0.95 * loss[end]:
        return "underfitting"
    return "healthy" if abs(loss[-1] / loss[end] - 1) < 0.02 and low < 0.8 * first else None


def table(counts):
    lines = [" " * 14 + "".join(f"{verdict:>14}" for verdict in VERDICTS)]
    for kind in VERDICTS:
        lines.append(f"{kind:>14}" + "".join(f"{counts[kind, v]:14}" for v in VERDICTS))
    return "\n".join(lines)


@cache
def judged():
    """(truth, diagnosis) of every simulated run of which something is true."""
    runs = [simulate(seed) for seed in SEEDS]
    return [(truth, diagnose(train, evals)) for train, evals, truth in runs if truth]


def test_simulated_runs_are_judged_by_what_is_true_of_them():
    counts = Counter((truth, found.verdict) for truth, found in judged())
    for kind in VERDICTS:
        total = sum(counts[kind, verdict] for verdict in VERDICTS)
        assert total >= 15, "\n" + table(counts)
        assert counts[kind, kind] >= 0.75 * total, "\n" + table(counts)
        # Worse than a hit or "inconclusive": a verdict that sends the reader the wrong way.
        wrong = total - counts[kind, kind] - counts[kind, "inconclusive"] * (kind != "inconclusive")
        assert wrong <= 0.2 * total, "\n" + table(counts)
    assert counts["overfitting", "underfitting"] == counts["underfitting", "overfitting"] == 0
    assert sum(counts[kind, kind] for kind in VERDICTS) >= 0.85 * sum(counts.values())


def test_confidence_means_something():
    said = [found for _, found in judged() if found.verdict != "inconclusive"]
    right = {
        level: [
            truth == found.verdict
            for truth, found in judged()
            if found.confidence == level and found.verdict != "inconclusive"
        ]
        for level in ("low", "medium", "high")
    }
    assert np.mean(right["high"]) >= 0.92
    assert np.mean(right["high"]) > np.mean(right["medium"] + right["low"])
    assert len(right["high"]) >= 0.5 * len(said)


def test_high_confidence_is_within_reach_of_six_evaluations():
    """As many as the command makes."""
    assert diagnose(falling_to(0.01), curve([1.2, 0.6, 0.4, 0.55, 0.7, 0.85])).confidence == "high"
    assert diagnose(falling_to(0.3), curve([2.0, 1.7, 1.45, 1.23, 1.05, 0.9])).confidence == "high"
    assert diagnose(falling_to(0.05), curve([1.2, 0.6, 0.5, 0.5, 0.5, 0.5])).confidence == "high"


# -- recorded runs -----------------------------------------------------------------------------
#
# The runs of the experiment `cures`, judged by hand from the curves and from the bootstrap of the
# rows' losses (as notebook 07 does it): what a practitioner would say, what else can be defended,
# and why. The rule was revised with other such runs in sight; the simulated ones are the fair test.
# "rise" is from the lowest evaluation to the last, with a 95 % interval over rows; "thirds" the
# change from evaluations 3 to 5 to evaluations 6 to 8.
EIGHT_ROWS = "eight rows, training loss below 0.002; validation turns and stays up"
RECORDED = [
    *[
        (label, seed, "overfitting", (), EIGHT_ROWS)
        for label in ("8 rows", "weight decay 0.1", "dropout 0.2", "learning rate 3e-4")
        for seed in (0, 1, 2)
        if (label, seed) != ("8 rows", 1)
    ],
    ("8 rows", 1, "overfitting", ("inconclusive",), "rise -0.01 to 0.11; by 114 rows 0.08 to 0.15"),
    ("rank 2", 0, "overfitting", ("inconclusive",), "0.54 to 0.62, steady from step 20 on"),
    ("rank 2", 1, "overfitting", (), "0.42 to 0.54, rise 0.06 to 0.20"),
    ("rank 2", 2, "overfitting", ("healthy", "inconclusive"), "0.38 to 0.43, rise 0.02 to 0.08"),
    ("32 rows", 0, "healthy", ("inconclusive",), "level from step 20 on; rise -0.03 to 0.05"),
    ("32 rows", 1, "healthy", ("inconclusive",), "level from step 20 on; rise -0.03 to 0.07"),
    ("32 rows", 2, "healthy", ("inconclusive", "overfitting"), "rise -0.02 to 0.08; 114 rows rise"),
    ("155 rows", 0, "underfitting", ("inconclusive",), "thirds -0.11 to -0.03, lowest at the end"),
    ("155 rows", 1, "healthy", ("underfitting",), "the last three evaluations are level"),
    ("155 rows", 2, "underfitting", ("inconclusive",), "thirds -0.09 to -0.04, lowest at the end"),
]


@cache
def recorded():
    return {(run["label"], run["seed"]): run for run in experiments.read("cures")}


def test_all_recorded_runs_are_judged_by_hand():
    assert {(label, seed) for label, seed, *_ in RECORDED} == set(recorded())


@pytest.mark.parametrize(("label", "seed", "verdict", "defensible", "why"), RECORDED)
def test_recorded_runs_get_a_verdict_that_can_be_defended(label, seed, verdict, defensible, why):
    run = recorded()[label, seed]
    found = diagnose(run["train"], run["eval"])
    assert found.verdict in (verdict, *defensible), why
    assert found.best_step == min(run["eval"], key=lambda pair: pair[1])[0]


def test_nearly_all_recorded_runs_get_the_verdict_given_by_hand():
    runs = [(recorded()[label, seed], verdict) for label, seed, verdict, _, _ in RECORDED]
    hits = sum(diagnose(run["train"], run["eval"]).verdict == verdict for run, verdict in runs)
    assert hits >= 18  # of 21: the three with 32 rows are read otherwise


# -- shapes ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("where", range(1, 19))
def test_one_evaluation_far_above_its_neighbours_changes_nothing(where):
    flat = 0.3 + 0.7 * np.exp(-np.arange(20) / 2.5)
    turned = flat + 0.02 * np.maximum(np.arange(20) - 8, 0)
    for losses, verdict in ((flat, "healthy"), (turned, "overfitting")):
        without = diagnose(falling_to(0.05), curve(losses))
        losses[where] *= 5
        found = diagnose(falling_to(0.05), curve(losses))
        assert found.verdict == without.verdict == verdict
        assert "1 far above its neighbours set aside" in found.explanation
        assert "set aside" not in without.explanation


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
    assert "began at 3.3" in found.explanation and "ended at 6.8" in found.explanation
    recovered = curve([*losses, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0])
    assert diagnose(recovered, curve(FLAT)).verdict != "diverging"


def test_a_rise_from_exactly_zero_is_diverging():
    assert diagnose(curve([0.0] * 20 + [1.0] * 20), []).verdict == "diverging"


def test_losses_that_hardly_move_are_inconclusive_and_say_what_to_check():
    tiny = curve(np.linspace(5.46, 5.45, 20))  # seen with a learning rate far too low
    found = diagnose(tiny, tiny)
    assert found.verdict == "inconclusive"
    assert "Check the learning rate" in found.explanation


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
