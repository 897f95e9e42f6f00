"""The course's own rows: 684 customer messages, each with the ticket that it should become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

# In a checkout the data lies beside helpers/; an installed package (Colab) carries it inside.
HERE = Path(__file__).parent
DATA = HERE / "course_data" if (HERE / "course_data").is_dir() else HERE.parent / "data"
SYSTEM_PROMPT = "Turn the message into a JSON ticket."
FIELDS = ("category", "urgency", "product", "order")
SPLITS = ("train", "validation", "test")


def ticket_json(row: dict[str, Any]) -> str:
    """One ticket as compact JSON with its fields in a fixed order: the text the model learns."""
    return json.dumps(
        {field: row[field] for field in FIELDS}, ensure_ascii=False, separators=(",", ":")
    )


def triage_prompt(message: str) -> list[dict[str, str]]:
    """The chat messages that ask for the ticket of one customer message."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": message},
    ]


def load_triage() -> DatasetDict:
    """The 684 customer messages in three splits.

    Columns: message, category, urgency, product, order (strings; the last two may be None), and
    made from them prompt (system and user message), completion (the ticket as JSON) and source
    ("file:line").
    """
    splits = {}
    for name in SPLITS:
        path = DATA / "triage" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows, start=1):
            row["prompt"] = triage_prompt(row["message"])
            row["completion"] = [{"role": "assistant", "content": ticket_json(row)}]
            row["source"] = f"{path.name}:{number}"
        splits[name] = Dataset.from_list(rows)
    return DatasetDict(splits)
