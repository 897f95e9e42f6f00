"""Check the rows of a training file and give all of them one shape.

A row says what goes in and what should come out, in the shapes the ecosystem uses:

    {"prompt": "...", "completion": "..."}                      plain text
    {"prompt": [{"role": ..., "content": ...}, ...], "completion": [{...}]}
    {"messages": [{"role": ..., "content": ...}, ...]}          every answer in it is trained

Each of them may have a "system" message beside it. A key with any other name is an error: what
it says would be lost.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers.readers import DataError, read_rows, show

__all__ = ["DataError", "check_splits", "load_examples"]

ROLES = ("system", "user", "assistant")
KEYS = ("prompt", "completion", "system", "messages")
NO_TOOLS = "tool calls are not supported. Remove the row, or write the call as text"
# Names that others use, and what to do about them.
RENAMES = {
    **dict.fromkeys(("instruction", "question", "query"), "prompt"),
    **dict.fromkeys(("output", "response", "answer", "label", "target", "chosen"), "completion"),
    **dict.fromkeys(("conversations", "conversation", "chat", "dialog"), "messages"),
    **dict.fromkeys(("system_prompt", "system_message"), "system"),
}
INTO_PROMPT = ("input", "context", "document", "history")
TOOLS = ("tools", "tool_calls", "tool_call_id", "functions", "function_call")
# Letters and signs that show nothing, beside spaces and format characters.
INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(
    chr(code) for code in (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10))
)


def load_examples(path: str | Path) -> Dataset:
    """Read and check a JSONL, CSV or Parquet file of training rows.

    Returns:
        A dataset with the columns prompt and completion (lists of chat messages), every_answer
        (true for a row of messages: all answers in it are trained, not the completion alone) and
        source ("file:line").

    Raises:
        DataError: the first fault found, with file, line and what to do. A file is used whole
            or not at all.
    """
    path = Path(path)
    lines = [(f"{path}:{line}", row) for line, row in read_rows(path)]
    for where, row in lines:
        if not isinstance(row, dict):
            raise DataError(f'{where}: a row must be an object such as {{"prompt": "..."}}.')
    if not lines:
        raise DataError(f"{path}: the file has no rows. Each row is one example to learn from.")
    for where, row in lines:
        require_fields(row, where)
    _refuse_unknown_keys(lines)
    return Dataset.from_list([{**normalize(row, at), "source": at} for at, row in lines])


# -- keys --------------------------------------------------------------------------------------


def _given(row: dict[str, Any]) -> list[str]:
    """The keys of a row that say something: Parquet gives each row every key, often as null."""
    return [key for key, value in row.items() if value is not None]


def require_fields(row: dict[str, Any], where: str) -> None:
    if row.get("messages") is not None:
        both = [key for key in ("prompt", "completion") if row.get(key) is not None]
        if both:
            raise DataError(
                f"{where}: has messages and {both[0]} too. A row has prompt and completion, or "
                f"messages: remove one of them."
            )
        return
    for field in ("prompt", "completion"):
        if field not in row and "messages" not in row:
            raise DataError(
                f"{where}: the field {field!r} is missing. A row has prompt and completion, "
                f"or messages. {_what_to_do(_given(row))}".rstrip()
            )


def _refuse_unknown_keys(lines: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Raise `DataError` that names all unknown keys of the file, at the first row with one."""
    unknown: dict[str, None] = {}
    first, rows = "", 0
    for where, row in lines:
        own = [key for key in _given(row) if key not in KEYS]
        first = first or (where if own else "")
        rows += bool(own)
        unknown |= dict.fromkeys(own)
    if unknown:
        raise DataError(
            f"{first}: {_named(unknown)} would be lost: a row has prompt and completion, or "
            f"messages, and perhaps system ({rows} {'row' if rows == 1 else 'rows'}). "
            f"{_what_to_do(unknown) or 'Remove it, or put what it says into the prompt.'}"
        )


def _named(keys: Iterable[str]) -> str:
    names = [show(key) for key in keys]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"the {'key' if len(names) == 1 else 'keys'} {', '.join(names[:10])}{more}"


def _what_to_do(keys: Iterable[str]) -> str:
    """Advice for keys with other names than the course's; empty if there is none."""
    advice = []
    rest = []
    for key in keys:
        name = key.strip().lower()
        if name in TOOLS:
            return f"{key!r}: {NO_TOOLS}."
        if key in KEYS:
            continue
        if name in KEYS or name in RENAMES:
            advice.append(f"Rename {show(key)} to {RENAMES.get(name, name)!r}.")
        elif name in INTO_PROMPT:
            advice.append(f"Put the text of {key!r} into the prompt.")
        else:
            rest.append(show(key))
    if advice and rest:
        advice.append(f"Remove {', '.join(rest[:10])}.")
    return " ".join(advice[:10])


# -- one row -----------------------------------------------------------------------------------


def normalize(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Give any accepted shape that of {"prompt": messages, "completion": [one answer], ...}."""
    if row.get("messages") is not None or "prompt" not in row:
        messages = _chat(row["messages"], f"{where}: messages", text_allowed=False)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(
                f'{where}: messages must end with an answer of the role "assistant", '
                f"after at least one other message."
            )
        prompt, completion, every_answer = messages[:-1], messages[-1:], True
    else:
        if "completion" not in row:
            raise DataError(f"{where}: the field 'completion' is missing. Add it.")
        prompt = _chat(_as_chat(row["prompt"], "user"), f"{where}: prompt")
        completion = _chat(_as_chat(row["completion"], "assistant"), f"{where}: completion")
        every_answer = False
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise DataError(
                f'{where}: completion must be one message of the role "assistant". '
                f"Put earlier messages into the prompt."
            )
    prompt = _system(row.get("system"), prompt, where) + prompt
    return {"prompt": prompt, "completion": completion, "every_answer": every_answer}


def _as_chat(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _system(value: Any, prompt: list[dict[str, str]], where: str) -> list[dict[str, str]]:
    """The system message beside a prompt; none where it is null or blank, as in an empty cell."""
    if value is None or (isinstance(value, str) and _is_blank(value)):
        return []
    if not isinstance(value, str):
        raise DataError(f"{where}: system must be text, not {show(value)}.")
    if any(message["role"] == "system" for message in prompt):
        raise DataError(
            f"{where}: has the key system, and a system message among the others too. Remove one."
        )
    return _chat([{"role": "system", "content": value}], f"{where}: system")


def _chat(messages: Any, where: str, text_allowed: bool = True) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        shapes = "text or a list of chat messages" if text_allowed else "a list of chat messages"
        raise DataError(f"{where} must be {shapes}, not {show(messages)}.")
    if not messages:
        raise DataError(f"{where} is empty.")
    return [_message(message, where) for message in messages]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a chat message needs role and content, not {show(message)}.")
    given = _given(message)
    if any(key in TOOLS for key in given) or message.get("role") in ("tool", "function"):
        raise DataError(f"{where}: {NO_TOOLS}.")
    if "role" not in message or "content" not in message:
        advice = ""
        if "from" in message and "value" in message:
            advice = " Rename from to role, and value to content."
        raise DataError(f"{where}: a chat message needs role and content.{advice}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: the role {show(role)} is none of {', '.join(ROLES)}.")
    if unknown := [key for key in given if key not in ("role", "content")]:
        raise DataError(
            f"{where}: {_named(unknown)} of a chat message would be lost. A message has role and "
            f"content: remove what else it has."
        )
    if not isinstance(content, str):
        raise DataError(f"{where} must be text, not {show(content)}.")
    if _is_blank(content):
        raise DataError(f"{where} is empty.")
    if "\0" in content:
        raise DataError(f"{where} holds a character of value 0. Remove it.")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write what no text may hold: "\ud83d"
        raise DataError(f"{where} holds half a character ({error.reason}).") from error
    return {"role": role, "content": content}


def _is_blank(text: str) -> bool:
    """True if nothing of a text can be seen: spaces, zero-width and format characters."""
    return all(
        char.isspace() or char in INVISIBLE or unicodedata.category(char) in ("Cc", "Cf")
        for char in text
    )


# -- splits ------------------------------------------------------------------------------------


def check_splits(**splits: Dataset) -> None:
    """Raise `DataError` if a prompt is in two splits: the score would measure memory.

    Of a row whose every answer is trained, the messages before each of them are a prompt.
    """
    scored: dict[str, tuple[str, str]] = {}  # prompts of last answers: their split and source
    known: dict[str, tuple[str, str]] = {}  # prompts of all answers
    for name, rows in splits.items():
        own_scored: dict[str, tuple[str, str]] = {}
        own_known: dict[str, tuple[str, str]] = {}
        for row in rows.select_columns(
            [c for c in ("prompt", "source", "every_answer") if c in rows.column_names]
        ):
            prompts = list(_prompts(row))
            # Chats often begin alike: a prompt is one too many only where it is scored.
            for prompt, others in [(prompts[-1], known), *((p, scored) for p in prompts)]:
                if prompt in others:
                    other, first = others[prompt]
                    raise DataError(
                        f"{row['source']}: this prompt of the {name} split is in the {other} split "
                        f"too ({first}). Keep it in one of them, or the score measures memory."
                    )
            own_scored.setdefault(prompts[-1], (name, row["source"]))
            for prompt in prompts:
                own_known.setdefault(prompt, (name, row["source"]))
        scored |= own_scored
        known |= own_known


def _prompts(row: dict[str, Any]) -> Iterator[str]:
    """What comes before each trained answer of a row; last, what comes before its last."""
    messages = row["prompt"]
    if row.get("every_answer"):
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index:
                yield json.dumps(messages[:index], sort_keys=True)
    yield json.dumps(messages, sort_keys=True)
