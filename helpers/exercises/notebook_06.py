"""The exercises of notebook 06, monitoring with W&B."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from helpers.exercises import Exercise, close, holds, says

NAN = float("nan")

# Each trial: curves, and the name of the run that is best by its last loss.
PLAIN = {"a": [[1, 3.0], [2, 0.9]], "b": [[1, 2.0], [2, 0.5]], "c": [[1, 2.5], [2, 0.7]]}
ROSE_AGAIN = {"a": [[1, 0.2], [2, 0.8]], "b": [[1, 0.9], [2, 0.6]]}
DIVERGED_FIRST = {"a": [[1, 3.0], [2, NAN]], "b": [[1, 2.0], [2, 0.5]], "c": [[1, 2.0], [2, 0.7]]}
DIVERGED_LAST = {"b": [[1, 2.0], [2, 0.5]], "c": [[1, 2.0], [2, 0.7]], "a": [[1, 3.0], [2, NAN]]}
OTHER_LENGTHS = {"a": [[1, 0.7]], "b": [[1, 3.0], [2, 2.0], [3, 0.4]]}
BEST_RUN = (
    (PLAIN, "b"),
    (ROSE_AGAIN, "b"),
    (DIVERGED_FIRST, "b"),
    (DIVERGED_LAST, "b"),
    (OTHER_LENGTHS, "b"),
)

SETTINGS = {
    "learning_rate": 0.002,
    "tokenizer": "smollm2",
    "max_new_tokens": 48,
    "target": "query_key_value",
    "query_key_value": True,
    "keyboard": "qwerty",
    "monkey": 1,
}
SECRETS = {
    "wandb_api_key": "w",
    "HF_TOKEN": "h",
    "password": "p",
    "Client_Secret": "c",
    "key": "k",
}


def _picks(curves: dict[str, list[list[float]]], expected: str) -> Callable[[Any], bool]:
    return lambda function: str(function(copy.deepcopy(curves))) == expected


def _is_best_run(function: Callable[..., Any]) -> bool:
    return all(holds(_picks(curves, expected), function) for curves, expected in BEST_RUN)


def _filtered(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(function({**SETTINGS, **SECRETS}))


def _is_safe(function: Callable[..., Any]) -> bool:
    config = {**SETTINGS, **SECRETS}
    result = function(config)
    return result == SETTINGS and config == {**SETTINGS, **SECRETS}


def _changes_its_input(function: Callable[..., Any]) -> bool:
    config = {**SETTINGS, **SECRETS}
    function(config)
    return config != {**SETTINGS, **SECRETS}


EXERCISES = {
    "06.1": Exercise(
        task="How many history records does a run of 100 steps hold, with logging_steps=5 and "
        "eval_steps=20? Give a number.",
        right=lambda answer: close(answer, 26, relative=0, absolute=0.01),
        praise="Training losses, validation losses, and one record when Trainer ends.",
        hints=[
            (
                lambda answer: close(answer, 25, relative=0, absolute=0.01),
                "Try your rule on the notebook's own run: 12 steps, a training loss after each, a "
                "validation loss after every fourth. It held one record more than your rule says.",
            ),
            (
                lambda answer: any(close(answer, n, 0, 0.01) for n in (20, 21)),
                "You counted the training losses. What else is logged in this notebook?",
            ),
            (
                lambda answer: any(close(answer, n, 0, 0.01) for n in (100, 105, 106, 120)),
                "Not every step logs something: logging_steps=5 means every fifth.",
            ),
            (
                lambda answer: any(close(answer, n, 0, 0.01) for n in (5, 6)),
                "You counted the validation losses. The training loss is logged as well.",
            ),
        ],
        otherwise="Count three things: training losses, validation losses, and what comes at the "
        "very end.",
    ),
    "06.2": Exercise(
        task='Only the folder offline-run-... is copied and synced. What is missing: "config", '
        '"curves", "artifact" or "nothing"?',
        right=lambda answer: says(answer, "artifact", "the artifact", "an artifact", "artifacts"),
        praise="The run's file has only a list of the artifact's files and where the copies lie.",
        hints=[
            (
                lambda answer: says(answer, "nothing"),
                "Section 6 compared the size of a run's folder with that of the adapter. Can "
                "everything be in there?",
            ),
            (
                lambda answer: says(answer, "curves", "the curves", "history"),
                "Which kinds of records did the .wandb file hold? Look at the counts in section 4.",
            ),
            (
                lambda answer: says(answer, "config", "the config", "settings"),
                "Section 5 read the settings back. From which file, and is it in the folder?",
            ),
        ],
        otherwise="Choose one of the four words. Sections 4 and 6 show what lies where.",
    ),
    "06.3": Exercise(
        task="Write best_run(curves): the name of the run whose last validation loss is lowest.",
        right=_is_best_run,
        praise="Last values compared, and a run that diverged never wins.",
        hints=[
            (
                lambda f: holds(lambda g: not isinstance(g(PLAIN), str), f),
                "Return the name of the run, not its loss or its curve.",
            ),
            (
                lambda f: holds(_picks(PLAIN, "a"), f),
                "Your function picks the run with the highest loss. Is a high loss good?",
            ),
            (
                lambda f: holds(_picks(ROSE_AGAIN, "a"), f),
                "A run that was low once and rose again was chosen. Which point of a curve says "
                "where the run ended?",
            ),
            (
                lambda f: (
                    holds(_picks(PLAIN, "b"), f)
                    and not all(
                        holds(_picks(curves, "b"), f) for curves in (DIVERGED_FIRST, DIVERGED_LAST)
                    )
                ),
                "Right as long as every loss is a number. What does Python say to "
                'float("nan") < 1, and to 1 < float("nan")? math.isfinite tells them apart.',
            ),
            (
                lambda f: holds(_picks(PLAIN, "b"), f) and not holds(_picks(OTHER_LENGTHS, "b"), f),
                "Runs may differ in length: the last point is curve[-1], wherever that is.",
            ),
        ],
        otherwise="Take the last pair of each curve, then its second number, and find the name "
        "with the smallest.",
        trial=lambda f: f(copy.deepcopy(PLAIN)),
    ),
    "06.4": Exercise(
        task="Write safe(config): a copy without the entries whose name is, or ends with, key, "
        "token, secret or password as a word of its own.",
        right=_is_safe,
        praise="No secret is left, and no setting is lost.",
        hints=[
            (
                _changes_its_input,
                "The config that was handed in is changed. The training still needs it: make a "
                "new dictionary.",
            ),
            (
                lambda f: set(_filtered(f)) == {*SETTINGS, *SECRETS} and _filtered(f) != {},
                "Every entry is still there. With its value hidden, even its name may tell; the "
                "task is to drop it.",
            ),
            (
                lambda f: (
                    bool(set(_filtered(f)) & {"HF_TOKEN", "Client_Secret"})
                    and "wandb_api_key" not in _filtered(f)
                ),
                "Some secrets whose names have capital letters are still there.",
            ),
            (
                lambda f: bool(set(SETTINGS) - set(_filtered(f))),
                "Settings are gone that hold no secret, such as one of tokenizer, max_new_tokens, "
                "query_key_value or monkey. Compare whole words: split the name at its "
                "underscores. Which of the words has to match?",
            ),
            (
                lambda f: bool(set(_filtered(f)) & {"password", "key"}),
                "A name can also be the bare word, with no underscore before it.",
            ),
        ],
        otherwise="Split each name at its underscores, and compare the last word in lower case.",
        trial=lambda f: f({**SETTINGS, **SECRETS}),
    ),
}
