"""Right forms and typical mistakes of notebook 07's exercises; test_exercises.py tries them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

Curve = Sequence[tuple[int, float]]


def by_the_library(evals: Curve, patience: int) -> int:
    """Feed the evaluations to transformers' own callback; it updates nothing else."""
    rule = EarlyStoppingCallback(early_stopping_patience=patience)
    arguments = TrainingArguments(metric_for_best_model="eval_loss", use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    for step, loss in evals:
        rule.on_evaluate(arguments, state, control, metrics={"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
        if control.should_training_stop:
            return step
    return evals[-1][0]


def by_position(evals: Curve, patience: int) -> int:
    losses = [loss for _, loss in evals]
    for index in range(len(losses)):
        if index - losses.index(min(losses[: index + 1])) >= patience:
            return evals[index][0]
    return evals[-1][0]


def rises(evals: Curve, patience: int) -> int:
    """Compares with the evaluation before, instead of the lowest."""
    waited = 0
    for (_, before), (step, loss) in pairwise(evals):
        waited = 0 if loss < before else waited + 1
        if waited >= patience:
            return step
    return evals[-1][0]


def never_forgives(evals: Curve, patience: int) -> int:
    lowest, waited = evals[0][1], 0
    for step, loss in evals[1:]:
        waited += loss >= lowest
        lowest = min(lowest, loss)
        if waited >= patience:
            return step
    return evals[-1][0]


def forgives_ties(evals: Curve, patience: int) -> int:
    lowest, waited = evals[0][1], 0
    for step, loss in evals[1:]:
        waited = 0 if loss <= lowest else waited + 1
        lowest = min(lowest, loss)
        if waited >= patience:
            return step
    return evals[-1][0]


def no_end(evals: Curve, patience: int) -> int | None:
    stop = by_position(evals, patience)
    return None if stop == evals[-1][0] else stop


def keeps(evals: Curve, patience: int) -> int:
    stop = by_position(evals, patience)
    return min((loss, step) for step, loss in evals if step <= stop)[1]


RIGHT = [
    ("07.1", ["overfitting", "healthy", "underfitting", "inconclusive"]),
    ("07.1", ("Overfit", "healthy", "underfits", "cannot tell")),
    ("07.1", "overfitting, healthy, underfitting, inconclusive."),
    ("07.1", {"A": "overfits", "B": "Healthy", "C": "underfit", "D": "can't tell"}),
    ("07.2", 5),
    ("07.2", 5.0),
    ("07.2", "5 epochs"),
    ("07.2", torch.tensor(5)),
    ("07.3", 0.004),
    ("07.3", "0.4 %"),
    ("07.3", "0.399%"),
    ("07.3", 1 - (1 - 1e-3 * 0.1) ** 40),
    ("07.3", torch.tensor(0.00399)),
    ("07.4", by_the_library),
    ("07.4", by_position),
    ("07.4", lambda evals, patience: torch.tensor(by_position(evals, patience))),
]
WRONG = [
    ("07.1", ["overfitting", "healthy"], "one verdict for each"),
    ("07.1", ["diverging", "healthy", "underfitting", "inconclusive"], "climbs back up"),
    ("07.1", ["healthy", "healthy", "underfitting", "inconclusive"], "Look at A"),
    ("07.1", ["overfitting", "healthy", "underfitting", "underfitting"], "blue points of D"),
    ("07.1", ["overfitting", "healthy", "healthy", "inconclusive"], "Look at the end of C"),
    ("07.1", ["overfitting", "underfitting", "underfitting", "inconclusive"], "last third of B"),
    ("07.1", ["overfitting", "dull", "underfitting", "inconclusive"], "Ask of each"),
    ("07.2", 10, "Those are steps"),
    ("07.2", "2", "steps one epoch has"),
    ("07.2", 40, "with repetitions"),
    ("07.2", 1.25, "a batch, not a row"),
    ("07.2", 20, "the whole run"),
    ("07.2", 2.5, "the number of steps in an epoch"),
    ("07.2", 7, "once through all rows"),
    ("07.3", 1e-4, "That is one step"),
    ("07.3", 0.996, "what is left"),
    ("07.3", "99.6 %", "what is left"),
    ("07.3", 0.4, "Check the unit"),
    ("07.3", 4, "not applied whole"),
    ("07.3", 1 - 0.9**40, "not applied whole"),
    ("07.3", 0.04, "alone does not shrink"),
    ("07.3", 0.5, "the factor of one step"),
    ("07.4", no_end, "returns nothing"),
    ("07.4", keeps, "the checkpoint to keep"),
    ("07.4", rises, "with the evaluation before"),
    ("07.4", never_forgives, "In a row"),
    ("07.4", forgives_ties, "equals the lowest"),
    ("07.4", lambda evals, patience: by_position(evals, patience + 1), "too late"),
    ("07.4", lambda evals, patience: min(loss for _, loss in evals), "That is a loss"),
    ("07.4", lambda evals, patience: evals[0][0], "keep two things"),
    ("07.4", lambda evals, patience: 1 / 0, "raised ZeroDivisionError"),
]
