"""Read a file of training rows and check it: JSONL, CSV or Parquet.

A row says what goes in and what should come out, in the shapes the ecosystem uses:

    {"prompt": "...", "completion": "..."}                      plain text
    {"prompt": [{"role": ..., "content": ...}, ...], "completion": [{...}]}
    {"messages": [{"role": ..., "content": ...}, ...]}          the last one is the answer
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers import CourseError

ROLES = ("system", "user", "assistant")


class DataError(CourseError):
    """A row, or a file of rows, that cannot be used. Names the file and the line."""


def load_examples(path: str | Path) -> Dataset:
    """Read and check a JSONL, CSV or Parquet file of training rows.

    Returns:
        A dataset with the columns prompt and completion (lists of chat messages) and source
        ("file:line").

    Raises:
        DataError: the first fault found, with file, line and what to do. A file is used whole
            or not at all.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: the name must end in {', '.join(readers)}.")
    rows = [
        {**_normalize(row, f"{path}:{line}"), "source": f"{path}:{line}"}
        for line, row in reader(path)
    ]
    if not rows:
        raise DataError(f"{path}: the file has no rows. Each row is one example to learn from.")
    return Dataset.from_list(rows)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line). "
                f"Save the file as UTF-8."
            ) from error
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error.msg}, column {error.colno}). "
                f"Each line must be one JSON object."
            ) from error


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1  # both without the BOM
        raise DataError(f"{path}:{line}: not UTF-8. Save the file as UTF-8.") from error
    # strict: a quote that is never closed would otherwise swallow the rest of the file.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:  # where DictReader puts what has no column
                raise DataError(
                    f"{path}:{reader.line_num}: more cells than the header has columns. "
                    f"Put text that holds a comma in double quotes."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.reader.line_num}: not CSV ({error}). Check the double quotes."
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from error


def _normalize(row: Any, where: str) -> dict[str, list[dict[str, str]]]:
    """Bring any accepted shape into {"prompt": [chat messages], "completion": [one answer]}."""
    if not isinstance(row, dict):
        raise DataError(f'{where}: a row must be an object such as {{"prompt": "..."}}.')
    if "messages" in row:
        messages = _chat(row["messages"], f"{where}: messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f'{where}: messages must end with an answer of the role "assistant", '
                f"after at least one other message."
            )
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    for field in ("prompt", "completion"):
        if field not in row:
            raise DataError(
                f"{where}: the field {field!r} is missing. A row has prompt and completion, "
                f"or messages."
            )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    completion = _chat(completion, f"{where}: completion")
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise DataError(f'{where}: completion must be one message of the role "assistant".')
    return {"prompt": _chat(prompt, f"{where}: prompt"), "completion": completion}


def _chat(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise DataError(f"{where} must be text or a list of chat messages, not {messages!r:.40}.")
    if not messages:
        raise DataError(f"{where} is empty.")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: a chat message needs role and content, not {message!r:.60}.")
        if message["role"] not in ROLES:
            raise DataError(f"{where}: the role {message['role']!r} is none of {ROLES}.")
        if not isinstance(message["content"], str):
            raise DataError(f"{where} must be text, not {message['content']!r:.40}.")
        if not message["content"].strip():
            raise DataError(f"{where} is empty.")
        try:
            message["content"].encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write what no text may hold: "\ud83d"
            raise DataError(f"{where} holds half a character ({error.reason}).") from error
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def check_splits(**splits: Dataset) -> None:
    """Raise `DataError` if a prompt stands in two splits: the score would measure memory."""
    seen: dict[str, tuple[str, str]] = {}
    for name, rows in splits.items():
        own: dict[str, tuple[str, str]] = {}
        for prompt, source in zip(rows["prompt"], rows["source"], strict=True):
            text = json.dumps(prompt, sort_keys=True)
            if text in seen:
                other, first = seen[text]
                raise DataError(
                    f"{source}: this prompt of the {name} split stands in the {other} split too "
                    f"({first}). Keep it in one of them, or the score measures memory."
                )
            own[text] = (name, source)
        seen |= own
