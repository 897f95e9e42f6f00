"""Recorded runs: claims about quality rest on them, with three seeds and everything to repeat them.

    python -m helpers.experiments list
    python -m helpers.experiments run NAME ... [--only LABEL] [--jobs N] [--minutes M]
    python -m helpers.experiments verify NAME [--only LABEL] [--steps N]

A record is a line of data/runs/NAME.jsonl:

    experiment, label, seed   which run; settings: what it was told, and every default decided
    data_sha256               of the rows it learned from
    versions, machine         of the libraries, and of what computed it
    losses                    of every optimizer step, in nats per answer token
    train, eval               [[step, loss], ...]: means of some steps, and of some validation rows
    epochs                    scores on the whole validation split while training, where asked for:
                              of answers, or (`cures`) of `evaluation.scores_after_references`
    validation, test          scores, losses and answers at the end; test only where it was scored.
                              `methods` has the scores after the reference's beginnings instead
    seconds, tokens           of the training steps; runs beside it make them slower
    peak_memory_bytes, trainable_parameters, saved_bytes
    prose_perplexity          on text of another kind: what the model has forgotten

In `answers` null stands for an answer that is the reference, character by character.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from helpers.data import DATA, load_triage, ticket_json

if TYPE_CHECKING:
    import pandas

RUNS = DATA / "runs"


def read(name: str) -> list[dict[str, Any]]:
    """The records of an experiment, one dictionary a run; none where nothing is recorded."""
    path = RUNS / f"{name}.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(name: str) -> pandas.DataFrame:
    """The records of an experiment as a table, a row a run.

    Returns:
        The columns of a record, and besides them `exact_match` and `test_exact_match` (fractions
        at the end, on the validation and the test split) and each of the `settings`.

    Raises:
        FileNotFoundError: there are no records of this name.
    """
    import pandas

    if not (records := read(name)):
        raise FileNotFoundError(f"There are no recorded runs in {RUNS / f'{name}.jsonl'}.")
    rows = [
        {
            **record["settings"],
            **record,
            "exact_match": record["validation"]["exact_match"],
            "test_exact_match": (record["test"] or {}).get("exact_match"),
        }
        for record in records
    ]
    return pandas.DataFrame(rows)


def answers(record: Any, split: str = "test") -> list[str]:
    """The answers of a record to the rows of a split, in the order of the rows."""
    references = [ticket_json(row) for row in load_triage()[split]]
    given = record[split]["answers"]
    return [ref if got is None else got for got, ref in zip(given, references, strict=True)]
