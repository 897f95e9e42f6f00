"""Read training and validation loss the way a practitioner does, and say how sure one can be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

# Three points fit any story; from the fourth on, a curve can contradict its own trend.
MIN_EVALS = 4
# A change below this fraction of the loss is not worth acting on.
WORTH = 0.04
# Standard errors that make a change real.
SURE = 3.0
# Evaluations during training wander by about this fraction of the loss, however smooth five of
# them look. Counts as two values beside the curve's own noise.
WANDER = 0.02
# "Diverging": training loss gave back this fraction of its fall. Not less, because a memorizing run
# drifts up within each epoch, before its next step-like drop.
LOST = 0.3
# ... or ended this many times above its first value: a run that blew up before it had learned.
BLOWN_UP = 1.5
# "Healthy" says that nothing changes; not if noise could hide a change of this fraction.
BLUR = 0.15
# A loss above both its neighbours by this factor is one bad evaluation or batch, and set aside.
SPIKE = 2.0


@dataclass(frozen=True)
class Diagnosis:
    """What the curves say.

    verdict: "underfitting", "healthy", "overfitting", "diverging" or "inconclusive".
    best_step: step of the lowest finite validation loss, None without one.
    confidence: "low", "medium" or "high": by how far the rule's limits were cleared (1.4 and 2
        times, whatever the number of evaluations); always "low" for "inconclusive".
    explanation: what was seen, in numbers, and what to do next.
    """

    verdict: str
    best_step: int | None
    confidence: str
    explanation: str

    def to_dict(self) -> dict[str, str | int | None]:
        """The four fields as plain Python values, ready for `json.dumps`."""
        return asdict(self)


def diagnose(train: Iterable[tuple[int, float]], evals: Iterable[tuple[int, float]]) -> Diagnosis:
    """Judge one training run by its losses.

    train: (step, loss) pairs in any order; may be empty. Of a step logged twice, as by a resumed
        run, the later pair counts.
    evals: the same for the validation loss. Both losses in one unit, usually nats per token.

    Raises ValueError if an argument is no series of pairs of numbers, or a step is not whole.

    Four questions, in this order; each change must be worth acting on and exceed three standard
    errors. Did training loss climb back up ("diverging")? Did validation loss end above its lowest
    level although training loss fell ("overfitting")? Is the last third of the evaluations below
    the third before, so that going on would pay ("underfitting")? Could noise hide such a change
    ("inconclusive"), or not ("healthy")? Noise is what is left around the best curve that falls and
    then rises (isotonic regression: Barlow et al., "Statistical Inference under Order
    Restrictions", 1972). Evaluations are taken as evenly spaced. The rule reads the curves of one
    run; it does not know how many rows are behind them.
    """
    train_steps, train_loss = _series(train, "train")
    eval_steps, eval_loss = _series(evals, "evals")
    finite = np.isfinite(eval_loss)
    steps, loss = eval_steps[finite], eval_loss[finite]
    best_step = int(steps[np.argmin(loss)]) if len(loss) else None

    def found(verdict: str, text: str, margin: float = 0.0) -> Diagnosis:
        confidence = "high" if margin >= 2 else "medium" if margin >= 1.4 else "low"
        return Diagnosis(verdict, best_step, confidence, text)

    curves = (("training", train_steps, train_loss), ("validation", eval_steps, eval_loss))
    for name, at, values in curves:
        bad = ~np.isfinite(values)
        if bad.any():
            text = (
                f"The {name} loss is not finite at step {at[bad][0]:.0f}. Lower the learning rate, "
                "clip gradients, and look for examples in which no token is trained on."
            )
            return found("diverging", text, 2.0 if bad[-1] else 1.4)

    trn = None
    if len(train_loss) >= MIN_EVALS:
        trn = _Curve.of(train_loss)
        limits = (
            (trn.end - trn.low, max(LOST * trn.fall, WORTH * trn.low, trn.blur)),
            (trn.end, BLOWN_UP * train_loss[0]),
        )
        margin = max(_ratio(*limit) for limit in limits)
        if margin > 1:
            text = (
                f"Training loss began at {train_loss[0]:.3g}, was as low as {trn.low:.3g} and "
                f"ended at {trn.end:.3g}. Lower the learning rate or lengthen the warm-up."
            )
            return found("diverging", text, margin)

    if len(loss) < MIN_EVALS:
        text = f"Usable validation losses: {len(loss)}; a trend needs {MIN_EVALS}. Evaluate more."
        return found("inconclusive", text)
    return found(*_judge(steps, loss, trn))


def _judge(steps: np.ndarray, loss: np.ndarray, trn: _Curve | None) -> tuple[str, str, float]:
    """Verdict, explanation and margin from n >= 4 validation losses; training did not diverge."""
    val, best = _Curve.of(loss), int(np.argmin(loss))
    seen = f"Validation loss went from {loss[0]:.3g} to {loss[-1]:.3g}"
    if val.spikes:
        seen += f" ({val.spikes} far above its neighbours set aside)"
    if trn:
        seen += f", training loss from {trn.start:.3g} to {trn.end:.3g}"

    worth = WORTH * val.low
    risen = _ratio(val.end - val.low, max(worth, val.blur))
    if risen > 1 and len(loss) - best > 2:  # one value after the lowest proves little
        low = f"validation was lowest ({loss[best]:.3g}) at step {steps[best]:.0f}"
        if trn and not trn.learned:
            text = (
                f"{seen}; {low}, but training loss did not fall either. Check the learning rate "
                "and what is trained."
            )
            return "inconclusive", text, 0.0
        text = (
            f"{seen}; {low} and has risen since. Go back to that checkpoint; train for fewer "
            "epochs or on more examples."
        )
        return "overfitting", text, risen

    falling = min(_ratio(val.drop, val.drop_blur), _ratio(val.gain, worth))
    if falling > 1:
        text = (
            f"{seen}. Validation was still falling: at this pace, a third more steps would bring "
            f"it down by about {val.gain:.2g}. Train longer, or raise the learning rate."
        )
        return "underfitting", text, falling

    if not val.learned and not (trn and trn.learned):
        text = f"{seen}; no loss has clearly moved. Check the learning rate and what is trained."
        return "inconclusive", text, 0.0
    if loss[-1] - val.low > max(worth, SURE * val.noise):
        text = (
            f"{seen}. Validation ends on a rise too short to judge: evaluate more often, or go on "
            "a bit."
        )
        return "inconclusive", text, 0.0
    blurred = _ratio(val.blur, BLUR * val.low)
    if blurred > 1:
        text = (
            f"{seen}; noise hides any change of validation below {val.blur:.2g}. Use a larger "
            "validation set, evaluate more often or train longer."
        )
        return "inconclusive", text, 0.0
    text = (
        f"{seen}. Validation has levelled off near its lowest ({loss[best]:.3g}, step "
        f"{steps[best]:.0f}). Keep that checkpoint."
    )
    margin = _ratio(1.0, max(risen, falling, blurred)) if val.learned else 0.0
    return "healthy", text, margin


@dataclass(frozen=True)
class _Curve:
    """What the rule reads off one curve, in units of its loss.

    start, low, end: its first, lowest and last level. noise: standard deviation of one value.
    blur: the largest difference of two levels that may be noise.
    drop: the fall from the second to the last third of the values. drop_blur: as blur, for drop.
    gain: the fall that another third would bring, if falls go on shrinking as they did.
    learned: the last third is clearly below the first. spikes: how many values were set aside.
    """

    start: float
    low: float
    end: float
    noise: float
    blur: float
    drop: float
    drop_blur: float
    gain: float
    learned: bool
    spikes: int

    @property
    def fall(self) -> float:
        return self.start - self.low

    @classmethod
    def of(cls, loss: np.ndarray) -> _Curve:
        """Read a curve of n >= 4 values."""
        inner = loss[1:-1]
        spike = np.r_[False, inner > SPIKE * np.maximum(loss[:-2], loss[2:]), False]
        spike &= np.count_nonzero(~spike) >= MIN_EVALS
        loss = loss[~spike]
        n, noise = len(loss), _noise(loss)
        # A level is the median of some values in a row; of two the lower one, so that a single
        # high value at the end is no rise.
        width = max(2, n // 8)
        windows = np.lib.stride_tricks.sliding_window_view(loss, width)
        levels = np.quantile(windows, 0.5, axis=1, method="lower")
        start = float(np.quantile(windows[0], 0.5, method="higher"))
        third = round(n / 3)
        parts = loss[: n - 2 * third], loss[n - 2 * third : n - third], loss[n - third :]
        first, second, last = (float(part.mean()) for part in parts)
        drop, drop_blur = second - last, SURE * noise * np.sqrt(2 / third)
        shrink = min(1.0, max(0.0, _ratio(drop, first - second)))
        gain = drop * shrink
        if third > 1:  # a fall that ended before the last third began will not go on
            gain = min(gain, -third * _slope(parts[2]) * np.sqrt(shrink))
        learned = first - last > max(drop_blur, WORTH * first)
        return cls(
            start,
            float(levels.min()),
            float(levels[-1]),
            noise,
            SURE * noise * float(np.sqrt(2 / width)),
            drop,
            float(drop_blur),
            float(gain),
            bool(learned),
            int(np.count_nonzero(spike)),
        )


def _slope(values: np.ndarray) -> float:
    """Least-squares slope, per value, of two values or more."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    return float(x @ values / (x @ x))


def _noise(loss: np.ndarray) -> float:
    """Standard deviation of n >= 4 values around the best curve that falls and then rises."""
    n, centered = len(loss), loss - loss.mean()
    falling, rising = _monotone(centered), _monotone(centered[::-1])
    # Before the turn k values fall, after it n - k rise.
    squares, blocks = min(
        (falling[k][0] + rising[n - k][0], falling[k][1] + rising[n - k][1]) for k in range(n + 1)
    )
    wander = WANDER * abs(float(np.median(loss)))
    return float(np.sqrt((squares + 2 * wander**2) / (n - min(blocks, n) + 2)))


def _monotone(values: np.ndarray) -> list[tuple[float, int]]:
    """For every k from 0 to n: the least squares that a curve which never rises leaves of the
    first k values, and its number of levels (pool adjacent violators)."""
    means: list[float] = []
    counts: list[int] = []
    found, total, explained = [(0.0, 0)], 0.0, 0.0
    for value in values.tolist():
        mean, count = value, 1
        total += value * value
        while means and means[-1] <= mean:
            other, size = means.pop(), counts.pop()
            explained -= size * other * other
            mean = (mean * count + other * size) / (count + size)
            count += size
        means.append(mean)
        counts.append(count)
        explained += count * mean * mean
        found.append((max(0.0, total - explained), len(means)))
    return found


def _series(pairs: Iterable[tuple[int, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses, both (n,) float64, sorted by step; the last pair of each step is kept."""
    by_step: dict[float, float] = {}
    try:
        for step, loss in pairs:
            if isinstance(step, str | bytes) or isinstance(loss, str | bytes):
                raise TypeError("text is no number")
            by_step[float(step)] = float(loss)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: torch
        raise ValueError(
            f"{name} must be a series of (step, loss) pairs of numbers, such as [(10, 2.3)]"
        ) from error
    if not all(step.is_integer() for step in by_step):
        raise ValueError(f"{name} needs whole steps: pass the 'step' of each log entry")
    in_order = np.array(sorted(by_step.items()), dtype=float).reshape(-1, 2)
    return in_order[:, 0], in_order[:, 1]


def _ratio(change: float, limit: float) -> float:
    """Change in units of its limit; a limit of zero is exceeded by any change."""
    if limit > 0:
        return float(change / limit)
    return float("inf") if change > 0 else 0.0
