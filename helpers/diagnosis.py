"""Read training and validation loss the way a practitioner does, and say how sure one can be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# Three points fit any story; from the fourth on, a curve can contradict its own trend.
MIN_EVALS = 4
# Standard errors that make a change real. More than the usual two or three, because the lowest of
# many levels is low partly by luck.
SIGNIFICANT = 4.0
# A level is the median over this share of a curve: short enough to show when a run turned.
LEVEL_SHARE = 1 / 8
# An outlier: the gap to its neighbours is this share of the range of all seven. Dixon's table has
# 0.68 (99 %); somewhat more, because the neighbours are compared with a line of their own.
GAP = 0.75
# A change below this share of the loss is not worth acting on.
WORTH = 0.03
# "Still falling": a further third of the run would gain this share of all that was gained. The
# last third of an exponential gains 15 % after two time constants, 3 % after five.
FALL_OF_GAIN = 0.07
# "Diverging": training lost this share of what it had gained. Not less, because a memorising run
# drifts up within each epoch, before its next step-like drop.
LOST_OF_GAIN = 0.3
# ... or ended this many times above its first value: a run that blew up before it gained anything.
BLOWN_UP = 1.5
# "Flat" is a finding only if any change that noise could hide is below this share of the gain ...
BLUR_OF_GAIN = 0.5
# ... or, where validation was flat from its first evaluation on, below this share of its level.
BLUR_OF_LEVEL = 0.1


@dataclass(frozen=True)
class Diagnosis:
    """What the curves say.

    verdict: "underfitting", "healthy", "overfitting", "diverging" or "inconclusive".
    best_step: step of the lowest validation loss that is finite and no outlier, None without one.
    confidence: "low", "medium" or "high"; always "low" for "inconclusive".
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

    Method: outliers are found with Dixon's gap-to-range ratio (Rorabacher, Analytical Chemistry
    63, 1991), taken around a line through the neighbours; noise is estimated from second
    differences (Gasser, Sroka and Jennen-Steinmetz, Biometrika 73, 1986). A rise is the last level
    against the lowest one, a fall the Theil-Sen slope (Sen, JASA 63, 1968) of the last third;
    either must exceed the noise and be worth acting on (Prechelt, "Early Stopping - But When?",
    1998).
    """
    train_steps, train_loss = _series(train, "train")
    eval_steps, eval_loss = _series(evals, "evals")
    steps, loss = _usable(eval_steps, eval_loss)
    best_step = int(steps[np.argmin(loss)]) if len(loss) else None

    curves = (("training", train_steps, train_loss), ("validation", eval_steps, eval_loss))
    for name, at, values in curves:
        bad = ~np.isfinite(values)
        if bad.any():
            text = (
                f"The {name} loss is not finite at step {at[bad][0]:.0f}. Lower the learning rate, "
                "clip gradients, and look for examples in which no token is trained on."
            )
            return Diagnosis("diverging", best_step, "high" if bad[-1] else "medium", text)

    first_loss = train_loss[0] if len(train_loss) else 0.0
    train_steps, train_loss = _usable(train_steps, train_loss)
    trn = _levels(train_steps, train_loss) if len(train_loss) >= MIN_EVALS else None
    if trn:
        limit = max(trn.blur, LOST_OF_GAIN * trn.gain, WORTH * trn.low)
        if trn.rise > limit:
            text = (
                f"Training loss was as low as {trn.low:.3g} and ended at {trn.end:.3g}, a rise "
                "beyond its noise. Lower the learning rate or lengthen the warm-up."
            )
            sure = _confidence(_ratio(trn.rise, limit), len(train_loss))
            return Diagnosis("diverging", best_step, sure, text)
        if 0 < BLOWN_UP * first_loss < trn.end:
            text = (
                f"Training loss began at {first_loss:.3g} and ended at {trn.end:.3g}. "
                "Lower the learning rate or lengthen the warm-up."
            )
            sure = _confidence(_ratio(trn.end, BLOWN_UP * first_loss), len(train_loss))
            return Diagnosis("diverging", best_step, sure, text)

    if len(loss) < MIN_EVALS:
        text = f"Usable validation losses: {len(loss)}; a trend needs {MIN_EVALS}. Evaluate more."
        return Diagnosis("inconclusive", best_step, "low", text)
    verdict, sure, text = _judge(steps, loss, trn)
    if len(loss) < len(eval_loss):
        text += f" Set aside as far off the others: {len(eval_loss) - len(loss)}."
    return Diagnosis(verdict, best_step, sure, text)


@dataclass(frozen=True)
class _Levels:
    """Levels of one curve in units of its loss; blur is the largest change that may be noise."""

    start: float
    low: float
    end: float
    blur: float

    @property
    def gain(self) -> float:
        return self.start - self.low

    @property
    def rise(self) -> float:
        return self.end - self.low

    @property
    def learned(self) -> bool:
        return self.gain > max(self.blur, WORTH * self.start)


def _judge(steps: np.ndarray, loss: np.ndarray, trn: _Levels | None) -> tuple[str, str, str]:
    """Verdict, confidence and explanation from n >= 4 validation losses; training did not rise."""
    n, val = len(loss), _levels(steps, loss)
    trained = trn is not None and trn.learned
    agrees = trained and trn.rise <= trn.blur  # training fell and ended at its lowest level
    seen = f"Validation loss went from {loss[0]:.3g} to {loss[-1]:.3g}"
    if trn:
        seen += f", training loss from {trn.start:.3g} to {trn.end:.3g}"

    limit = max(val.blur, WORTH * val.low)
    risen = _ratio(val.rise, limit)
    best = np.argmin(loss)
    after = slice(best + 1, None)
    # One value after the lowest proves little; several that do not rise show the lowest was luck.
    if risen > 1 and n - best > 2 and _slope(steps[after], loss[after]) > 0:
        text = (
            f"{seen}; validation was lowest ({loss[best]:.3g}) at step {steps[best]:.0f} and has "
            "risen since. Go back to that checkpoint; train for fewer epochs or on more examples."
        )
        return "overfitting", _confidence(risen, n, agrees), text

    # The fall that a third more steps would bring, and the one that noise alone could show.
    third = (steps[-1] - steps[0]) / 3
    last = max(3, np.sum(steps >= steps[-1] - third))
    x = steps[-last:]
    fall = -third * _slope(x, loss[-last:])
    blur = SIGNIFICANT * third * _noise(steps, loss) / np.sqrt(np.sum((x - x.mean()) ** 2))
    # Where next to nothing was learned, even a tiny pace is a reason to go on, or go faster.
    learned = trained or val.learned
    limit = max(blur, FALL_OF_GAIN * val.gain, WORTH * val.end if learned else 0.0)
    falling = _ratio(fall, limit)
    if falling > 1:
        text = (
            f"{seen} and was still falling: at the last pace, a third more steps would bring "
            f"validation down by {fall:.2g}. Train longer, or raise the learning rate."
        )
        return "underfitting", _confidence(falling, n, agrees), text

    if not learned:
        text = f"{seen}; no loss has clearly moved. Check the learning rate and what is trained."
        return "inconclusive", "low", text
    if -fall > limit:
        text = f"{seen} and ends on a rise too short to judge. Evaluate more often, or go on a bit."
        return "inconclusive", "low", text
    limit = max(BLUR_OF_GAIN * val.gain, BLUR_OF_LEVEL * val.low if trained else 0.0)
    blurred = _ratio(val.blur, limit)
    if blurred > 1:
        text = (
            f"{seen}; noise hides any change of validation below {val.blur:.2g}. Use a larger "
            "validation set, evaluate more often or train longer."
        )
        return "inconclusive", "low", text

    text = (
        f"{seen} and has levelled off near its lowest ({loss[best]:.3g}, step {steps[best]:.0f}): "
        f"a third more steps would change it by {-fall:+.2g} at the last pace. "
        f"Keep that checkpoint."
    )
    nearest = max(risen, falling, blurred)
    return "healthy", _confidence(_ratio(1.0, nearest), n, val.learned), text


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


def _usable(steps: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses without those not finite or far off the line through their neighbours."""
    finite = np.isfinite(loss)
    steps, loss = steps[finite], loss[finite]
    n = len(loss)
    keep = np.ones(n, dtype=bool)
    for i in range(n if n >= MIN_EVALS else 0):
        begin = max(min(i - 3, n - 7), 0)  # the six nearest neighbours, fewer in a short curve
        window = np.arange(begin, min(begin + 7, n))
        others = window[window != i]
        x = steps[others] - steps[others].mean()
        slope = x @ loss[others] / (x @ x)
        own, rest = loss[i] - slope * steps[i], loss[others] - slope * steps[others]
        low, high = rest.min(), rest.max()
        gap = max(low - own, own - high)
        # A first loss far above the rest is no outlier: there learning began.
        keep[i] = gap <= GAP * (gap + high - low) or (i == 0 and own > high)
    return steps[keep], loss[keep]


def _noise(steps: np.ndarray, loss: np.ndarray) -> float:
    """Standard deviation of one of n >= 4 values around a smooth curve, in units of the loss."""
    # How far each value lies above the line between its two neighbours, in standard deviations.
    weight = (steps[1:-1] - steps[:-2]) / (steps[2:] - steps[:-2])
    line = (1 - weight) * loss[:-2] + weight * loss[2:]
    bends = (loss[1:-1] - line) / np.sqrt(1 + weight**2 + (1 - weight) ** 2)
    # Loss curves sag between any two of their points, which makes bends negative; the upper
    # quartile (0.6745 standard deviations) tells noise from shape even if a curve is all bend.
    spread = max(np.quantile(bends, 0.75), 0.0) / 0.6745
    # Follows the 99 % quantile of Student's t with n - 2 degrees of freedom: 3 times the normal
    # one at n = 4.
    return float(spread * (1 + 2 / (len(loss) - 3)))


def _levels(steps: np.ndarray, loss: np.ndarray) -> _Levels:
    """Levels of a curve of n >= 4 values without outliers."""
    width = max(2, int(len(loss) * LEVEL_SHARE))
    windows = sliding_window_view(loss, width)[:: -max(1, width // 4)]  # from the end backwards
    # Of two values the lower one, so that a single high evaluation at the end is no rise.
    levels = np.quantile(windows, 0.5, axis=1, method="lower")
    start = np.quantile(loss[:width], 0.5, method="higher")
    blur = SIGNIFICANT * _noise(steps, loss) * np.sqrt(2 / width)  # of a difference of two levels
    return _Levels(float(start), float(min(levels)), float(levels[0]), float(blur))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Theil-Sen slope of two or more points: the median over all their pairs."""
    i, j = np.triu_indices(len(x), 1)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i])))


def _ratio(change: float, limit: float) -> float:
    """Change in units of its limit; a limit of zero is exceeded by any change."""
    if limit > 0:
        return float(change / limit)
    return float("inf") if change > 0 else 0.0


def _confidence(margin: float, n: int, agrees: bool = True) -> str:
    """By how far the limit was cleared (1: just), by how many values, and whether all agrees."""
    if n < 6 or margin < 1.5 or not agrees:
        return "low"
    return "high" if n >= 10 and margin >= 3 else "medium"
