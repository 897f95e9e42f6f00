"""Rows of text -> token ids, labels and batches.

A row says what goes in and what should come out, in the shapes the ecosystem uses:

    {"prompt": "...", "completion": "..."}                      plain text
    {"prompt": [{"role": ..., "content": ...}, ...], "completion": [{...}]}
    {"messages": [{"role": ..., "content": ...}, ...]}          the last one is the answer

Only the answer is learned: the labels of the prompt are -100, which the loss ignores.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from helpers import CourseError

# In a checkout the data lies beside helpers/; an installed package (Colab) carries it inside.
HERE = Path(__file__).parent
DATA = HERE / "course_data" if (HERE / "course_data").is_dir() else HERE.parent / "data"
SYSTEM_PROMPT = "Turn the message into a JSON ticket."
FIELDS = ("category", "urgency", "product", "order")
SPLITS = ("train", "validation", "test")
IGNORED = -100  # the label that the loss skips; PyTorch's and transformers' convention
ROLES = ("system", "user", "assistant")


class DataError(CourseError):
    """A row, or a file of rows, that cannot be used. Names the file and the line."""


# -- the course's own data ---------------------------------------------------------------------


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


# -- anybody's data ----------------------------------------------------------------------------


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


# -- text to token ids -------------------------------------------------------------------------


def split_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Put one row through the chat template: the text of the prompt, and that of the answer.

    The answer ends with the end-of-sequence token: from it a model learns when to stop.
    """
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"{row['source']}: the chat template writes the prompt differently once the answer "
            f"follows, so the two cannot be told apart."
        )
    answer = whole[len(prompt) :].rstrip()
    if not answer.endswith(tokenizer.eos_token):
        answer += tokenizer.eos_token
    return prompt, answer


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Turn rows into features.

    Returns:
        A dataset with input_ids (prompt and answer), labels (the same, with -100 for every token
        of the prompt) and length, all in tokens.

    Raises:
        DataError: a row is longer than `max_length` tokens. Cutting it would cut off its answer.
    """
    features = []
    for row in rows:
        prompt, answer = split_text(row, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        length = len(prompt_ids) + len(answer_ids)
        if length > max_length:
            raise DataError(
                f"{row['source']}: the row is {length} tokens long, and {max_length} is the limit. "
                f"Shorten it, split it, or raise max_length."
            )
        features.append(
            {
                "input_ids": prompt_ids + answer_ids,
                "labels": [IGNORED] * len(prompt_ids) + answer_ids,
                "length": length,
            }
        )
    return Dataset.from_list(features)


class CompletionCollator:
    """Make a batch: pad on the left, and keep only as many labels as the longest answer needs.

    Padding on the left puts all answers at the right edge. The model then computes logits for the
    last K positions alone (`logits_to_keep`), K being the longest answer and the one token before
    it, from which its first token is predicted. The vocabulary is 49,152 wide: this saves more
    than a tenth of the work and most of the memory of the output layer, for the same loss.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Features of `encode` -> input_ids, attention_mask (rows, longest), labels (rows, K)."""
        longest = max(len(feature["input_ids"]) for feature in features)
        answers = [sum(label != IGNORED for label in feature["labels"]) for feature in features]
        keep = min(max(answers) + 1, longest)
        input_ids, attention_mask, labels = [], [], []
        for feature in features:
            padding = longest - len(feature["input_ids"])
            input_ids.append([self.pad_token_id] * padding + list(feature["input_ids"]))
            attention_mask.append([0] * padding + [1] * len(feature["input_ids"]))
            labels.append(([IGNORED] * padding + list(feature["labels"]))[-keep:])
        return {
            "input_ids": torch.tensor(input_ids),
            "attention_mask": torch.tensor(attention_mask),
            "labels": torch.tensor(labels),
            "logits_to_keep": keep,
        }
