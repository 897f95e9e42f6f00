"""Exercises of notebook 07: overfitting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from helpers.exercises import Exercise, close, says

# -- 07.1: reading curves ----------------------------------------------------------------------

VERDICTS = ("overfitting", "healthy", "underfitting", "inconclusive")
FORMS = {
    "overfitting": ("overfitting", "overfit", "overfits", "overfitted"),
    "healthy": ("healthy", "fine", "good"),
    "underfitting": ("underfitting", "underfit", "underfits", "underfitted"),
    "inconclusive": ("inconclusive", "cannot tell", "can't tell", "unclear"),
    "diverging": ("diverging", "diverges", "diverged", "divergence"),
}


def _verdicts(answer: Any) -> tuple[str, ...]:
    if isinstance(answer, dict):
        answer = [answer[name] for name in sorted(answer)]
    if isinstance(answer, str):
        answer = answer.replace(",", " , ").replace("\n", " , ").split(",")
    return tuple(
        next(name for name, forms in FORMS.items() if says(value, *forms)) for value in answer
    )


def _at(index: int, *names: str) -> Callable[[Any], bool]:
    return lambda answer: _verdicts(answer)[index] in names


READ = Exercise(
    task=(
        "Give a verdict on each of the four runs of the figure, in their order: answer = [A, B, "
        'C, D], each "overfitting", "healthy", "underfitting", "diverging" or "inconclusive".'
    ),
    right=lambda answer: _verdicts(answer) == VERDICTS,
    praise="And diagnose says the same of all four.",
    hints=[
        (
            lambda answer: len(_verdicts(answer)) != 4,
            "There are four runs: one verdict for each.",
        ),
        (
            lambda answer: "diverging" in _verdicts(answer),
            "Diverging means that the training loss climbs back up. Does any grey line end high?",
        ),
        (
            _at(0, "healthy", "underfitting", "inconclusive"),
            "Look at A once more: after which step does the blue line go another way than the "
            "grey one?",
        ),
        (
            _at(3, "healthy", "underfitting", "overfitting"),
            "Count the blue points of D. How many different stories fit them?",
        ),
        (
            _at(2, "healthy", "overfitting", "inconclusive"),
            "Look at the end of C. Was the blue line still going down when the run was cut off, "
            "and is there anything in it that argues against going on?",
        ),
        (
            _at(1, "overfitting", "underfitting", "inconclusive"),
            "Look at the last third of B: does the blue line still go anywhere, beyond its own "
            "zigzag?",
        ),
    ],
    otherwise="Ask of each: is it still falling, has it turned, or can it not be told?",
)

# -- 07.2: which epoch to keep -----------------------------------------------------------------

EPOCH = Exercise(
    task=(
        "The recorded run with eight rows and seed 0 has its lowest validation loss at step 10. "
        "Its batches have 4 rows. After how many epochs would you stop next time?"
    ),
    right=lambda answer: close(answer, 5, 0),
    praise="Two steps an epoch: every row was read five times.",
    hints=[
        (
            lambda answer: close(answer, 10, 0),
            "Those are steps. How many steps does it take to read all eight rows once?",
        ),
        (
            lambda answer: close(answer, 2, 0),
            "That is how many steps one epoch has.",
        ),
        (
            lambda answer: close(answer, 40, 0),
            "That is how many rows were read by then, with repetitions. How often each?",
        ),
        (
            lambda answer: close(answer, 1.25) or close(answer, 0.8),
            "One step reads a batch, not a row. How many rows are read in ten steps?",
        ),
        (
            lambda answer: close(answer, 20, 0),
            "That is the length of the whole run. Where was the validation loss lowest?",
        ),
        (
            lambda answer: close(answer, 2.5, 0),
            "You divided by the batch size. Divide by the number of steps in an epoch.",
        ),
    ],
    otherwise="An epoch is once through all rows: count how many steps that takes.",
)

# -- 07.3: what weight decay does --------------------------------------------------------------

DECAY = Exercise(
    task=(
        "At each step AdamW multiplies every trained parameter by 1 - learning_rate * "
        "weight_decay, besides its usual step. By what fraction does that shrink a parameter over "
        "the whole run of 40 steps, at learning rate 1e-3 and weight decay 0.1? Give a fraction "
        'such as 0.25 or "25 %".'
    ),
    right=lambda answer: close(answer, 1 - (1 - 1e-4) ** 40, relative=0.01),
    praise="Less than half a percent: the recorded runs gave weight decay no chance.",
    hints=[
        (
            lambda answer: close(answer, 1e-4),
            "That is one step. There are forty.",
        ),
        (
            lambda answer: close(answer, (1 - 1e-4) ** 40, relative=0.0005),
            "That is what is left of the parameter. By how much did it shrink?",
        ),
        (
            lambda answer: close(answer, 0.4, 0.01),
            "A fraction of 0.4 would be 40 percent. Check the unit.",
        ),
        (
            lambda answer: close(answer, 0.1) or close(answer, 4) or close(answer, 1 - 0.9**40),
            "The decay is not applied whole at each step. What is it multiplied by?",
        ),
        (
            lambda answer: close(answer, 0.04) or close(answer, 1 - 0.999**40),
            "The learning rate alone does not shrink a parameter. What is it multiplied by?",
        ),
    ],
    otherwise="Write down the factor of one step. What is it after forty steps?",
)

# -- 07.4: early stopping ----------------------------------------------------------------------

Curve = Sequence[tuple[int, float]]
Rule = Callable[[Curve, int], int]
# Each is (evals, patience): one dip after the turn, a tie, a fall to the end, a long plateau.
TRIALS: list[tuple[list[tuple[int, float]], int]] = [
    ([(5, 0.9), (10, 0.5), (15, 0.6), (20, 0.7), (25, 0.4), (30, 0.8), (35, 0.8)], 3),
    ([(5, 0.9), (10, 0.5), (15, 0.6), (20, 0.55), (25, 0.58), (30, 0.7)], 2),
    ([(4, 0.9), (8, 0.6), (12, 0.6), (16, 0.5), (20, 0.6), (24, 0.7), (28, 0.4)], 2),
    ([(4, 0.9), (8, 0.6), (12, 0.6), (16, 0.6), (20, 0.6)], 2),
    ([(2, 0.9), (4, 0.8), (6, 0.7)], 1),
    ([(2, 0.9), (4, 0.8), (6, 0.85), (8, 0.5)], 1),
]


def _stop(
    evals: Curve,
    patience: int,
    to_previous: bool = False,
    keep_count: bool = False,
    ties: bool = False,
) -> int:
    """The right rule, and with one of the switches on a wrong one."""
    lowest, waited, previous = float("inf"), 0, float("inf")
    for step, loss in evals:
        mark = previous if to_previous else lowest
        if loss < mark or (ties and loss == mark):
            waited = waited if keep_count else 0
        else:
            waited += 1
        if waited >= patience:
            return step
        lowest, previous = min(lowest, loss), loss
    return evals[-1][0]


def _best(evals: Curve, patience: int) -> int:
    """The lowest step up to where the right rule stops."""
    stop = _stop(evals, patience)
    return min((loss, step) for step, loss in evals if step <= stop)[1]


def _like(rule: Rule) -> Callable[[Rule], bool]:
    def same(answer: Rule) -> bool:
        got = [answer(list(evals), patience) for evals, patience in TRIALS]
        expected = [rule(evals, patience) for evals, patience in TRIALS]
        return None not in got and [float(step) for step in got] == expected

    return same


STOP = Exercise(
    task=(
        "Write stop_at(evals, patience): evals is a list of (step, loss). It returns the step at "
        "which training stops: at the patience-th evaluation in a row that is not below the "
        "lowest loss before it, or at the last evaluation if that never happens."
    ),
    right=_like(_stop),
    praise="This is the rule of transformers' EarlyStoppingCallback, evaluation for evaluation.",
    hints=[
        (
            lambda f: any(f(list(evals), patience) is None for evals, patience in TRIALS),
            "Sometimes your function returns nothing. Where does a run end that is never stopped?",
        ),
        (
            _like(_best),
            "That is the checkpoint to keep. The rule needs some evaluations more to know it.",
        ),
        (
            _like(lambda evals, patience: _stop(evals, patience, to_previous=True)),
            "You compare with the evaluation before. Take a curve that rises, dips a little and "
            "rises: what should a loss be compared with?",
        ),
        (
            _like(lambda evals, patience: _stop(evals, patience, keep_count=True)),
            "In a row: what happens to your count when a new lowest loss comes?",
        ),
        (
            _like(lambda evals, patience: _stop(evals, patience, ties=True)),
            "Is a loss that equals the lowest one below it?",
        ),
        (
            _like(lambda evals, patience: _stop(evals, patience + 1)),
            "One evaluation too late: with patience 1, the first that is not lower stops the run.",
        ),
        (
            lambda f: any(
                f(list(evals), patience) in {loss for _, loss in evals}
                for evals, patience in TRIALS
            ),
            "That is a loss. At which step?",
        ),
    ],
    otherwise=(
        "Go through the evaluations and keep two things: the lowest loss so far, and how many in "
        "a row were not below it."
    ),
    trial=lambda f: f(list(TRIALS[1][0]), TRIALS[1][1]),
)

EXERCISES = {"07.1": READ, "07.2": EPOCH, "07.3": DECAY, "07.4": STOP}
