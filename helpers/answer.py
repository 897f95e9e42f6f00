"""Ask a fine-tuned model from the command line: it answers as it did when it was scored.

    python -m helpers.answer --run runs/first "My kettle leaks, order 55-1230"
    python -m helpers.answer --run runs/first --input rows.jsonl > answers.jsonl
    python -m helpers.answer --run runs/first --chat

--run names a folder of helpers.finetune, of an adapter alone, or of a whole model. Base model,
precision, chat template and the end of an answer are those of the scoring.

A message gets the system message that all training rows had, if they had one; --system names
another, or none (""). Rows are asked as they are: JSONL, CSV or Parquet with prompt (and perhaps
system) or messages, as for training, or with message alone. A completion is not shown to the model;
with completions in all rows the exact match is counted. Each row becomes a line of JSON:

    {"source": "rows.jsonl:1", "prompt": [...], "answer": "...", "reference": "..."}

In a chat Ctrl-C stops an answer; Ctrl-D, or Ctrl-C at the prompt, ends the chat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from helpers import CourseError, commands
from helpers.commands import note

if TYPE_CHECKING:  # imported where it is used, so that --help need not wait for torch
    from helpers.scored import Scored, Task

LIMIT = 256  # tokens of an answer, where no reference answers say how long they are


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and answer.

    Returns:
        The exit code: 0; 2 for a folder, rows or options that cannot be used; 1 where memory or
        disk is full; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return commands.run(lambda: _answer(options))


def _parser() -> argparse.ArgumentParser:
    parser = commands.Parser("answer", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("message", nargs="?", help="a question")
    what.add_argument("--input", type=Path, metavar="FILE", help="rows of questions")
    what.add_argument("--chat", action="store_true", help="talk in the terminal")
    parser.add_argument("--output", type=Path, metavar="FILE", help="for the answers to --input")
    parser.add_argument("--system", metavar="TEXT", help="the system message of a message or chat")
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help=f"longest answer (default: {LIMIT}; with completions as in scoring: the longest + 8)",
    )
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _answer(options: argparse.Namespace) -> int:
    from helpers import scored

    _require_fitting(options)
    found = scored.find(options.run, options.model)
    if options.input:
        task = scored.task_of(found)
        questions = load_questions(options.input, task.system)
        with _opened(options.output) as file:
            _answer_rows(scored.load(found), questions, options.max_new_tokens, file)
        return commands.OK
    task = scored.task_of(found)
    system = task.system if options.system is None else options.system
    if options.system is None:
        _say_system(task)
    opening = [{"role": "system", "content": system}] if system else []
    model = scored.load(found)
    if options.chat:
        return _chat(model, opening, task.single, options.max_new_tokens or LIMIT)
    question = [*opening, {"role": "user", "content": options.message}]
    answer = model.answer([question], options.max_new_tokens or LIMIT)[0]
    print(printable(answer) if sys.stdout.isatty() else answer)
    return commands.OK


def _require_fitting(options: argparse.Namespace) -> None:
    if options.output and not options.input:
        raise CourseError("--output is for the answers to --input. Leave it out.")
    if options.output and options.output.exists():
        raise CourseError(f"--output {options.output} is there already. Name another file.")
    if options.system is not None and options.input:
        raise CourseError("--system is for a message or a chat: rows have their own. Leave it out.")
    if options.message is not None and not options.message.strip():
        raise CourseError("The message is empty. Write one, or use --chat.")


def _say_system(task: Task) -> None:
    if task.system:
        note(f"system message, as in all training rows: {task.system}")
    elif not task.known:
        note("no system message: the training rows are not at hand to say whether they had one")


# -- rows --------------------------------------------------------------------------------------


def load_questions(path: Path, system: str | None) -> list[dict[str, Any]]:
    """Read and check a file of questions.

    Args:
        system: for rows that are a message alone.

    Returns:
        For each row source, prompt (chat messages) and reference (None where it has none).

    Raises:
        helpers.rows.DataError: the first fault, with file, line and what to do.
    """
    from helpers import data, rows
    from helpers.readers import read_rows

    questions = []
    for line, row in read_rows(path):
        where = f"{path}:{line}"
        if not isinstance(row, dict):
            raise rows.DataError(f'{where}: a row must be an object such as {{"prompt": "..."}}.')
        row = {key: value for key, value in row.items() if value not in (None, "")}
        reference = row.get("completion")
        if isinstance(row.get("message"), str):  # as in the course's own files
            if all(field in {*row, "product", "order"} for field in data.FIELDS):
                reference = data.ticket_json(dict.fromkeys(data.FIELDS) | row)
            row = {"prompt": row["message"], "system": system}
        elif _ends_with_an_answer(row.get("messages")):
            reference = row["messages"][-1]["content"]
        elif "messages" in row:
            row = {"prompt": row["messages"], "system": row.get("system")}
        if "messages" not in row:
            row = {"completion": "-"} | row
        rows.require_fields(row, where)
        shaped = rows.normalize(row, where)
        if isinstance(reference, list):
            reference = reference[0]["content"]
        questions.append({"source": where, "prompt": shaped["prompt"], "reference": reference})
    if not questions:
        raise rows.DataError(f"{path}: the file has no rows. Each row is one question.")
    return questions


def _ends_with_an_answer(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _answer_rows(
    model: Scored, questions: list[dict[str, Any]], limit: int | None, file: TextIO
) -> None:
    from helpers import evaluation

    references = [question["reference"] for question in questions]
    whole = None not in references
    if limit is None:
        limit = _limit(model, questions) if whole else LIMIT
    prompts = [question["prompt"] for question in questions]
    answers = model.answer(prompts, limit, progress=sys.stderr.isatty())
    for question, answer in zip(questions, answers, strict=True):
        row = question | {"answer": answer}
        row = {key: value for key, value in row.items() if value is not None}
        print(json.dumps(row, ensure_ascii=False), file=file)
    if whole:
        exact = evaluation.score(answers, references)["exact_match"]
        note(f"exact match: {exact:.1%} of {len(answers)} rows")


def _limit(model: Scored, questions: list[dict[str, Any]]) -> int:
    from datasets import Dataset

    from helpers.scored import answer_limit

    rows = [
        question | {"completion": [{"role": "assistant", "content": question["reference"]}]}
        for question in questions
    ]
    return answer_limit(Dataset.from_list(rows), model.tokenizer)


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8") as file:
        yield file


# -- chat --------------------------------------------------------------------------------------


def _chat(model: Scored, opening: list[dict[str, str]], single: bool, limit: int) -> int:
    """Talk until Ctrl-D. Earlier turns are kept, unless no training row had any."""
    if single:
        note("each message stands alone, as in all training rows; Ctrl-D ends the chat")
    else:
        note("the model sees the whole chat; /new begins another one, Ctrl-D ends it")
    turns = list(opening)
    while True:
        try:
            message = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return commands.OK
        if message in ("", "/new"):
            turns = list(opening)
            continue
        asked = [*turns, {"role": "user", "content": message}]
        try:
            reply = stream(model, asked, limit)
        except KeyboardInterrupt:
            print(flush=True)
            note("(stopped; the message does not count)")
            continue
        if not single:
            turns = [*asked, {"role": "assistant", "content": reply}]


def stream(model: Scored, messages: list[dict[str, str]], limit: int = LIMIT) -> str:
    """Print the greedy answer to chat messages as it is made, and return it."""
    import torch
    from transformers import TextStreamer

    from helpers.encoding import encode_prompts, stop_token_ids
    from helpers.evaluation import evaluating
    from helpers.logs import quiet

    class Plain(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(printable(text), end="\n" if stream_end else "", flush=True)

    tokenizer = model.tokenizer
    ids = torch.tensor(encode_prompts([messages], tokenizer), device=model.model.device)
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    room = limit if context is None else min(limit, context - ids.shape[1])
    if room < 1:
        raise CourseError(
            f"The chat is {ids.shape[1]} tokens long, and the model reads {context}. Begin a new "
            f"one with /new."
        )
    with evaluating(model.model), model.computing(), quiet():
        output = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=Plain(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def printable(text: str) -> str:
    """Text without control characters: a model could write those that command a terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


if __name__ == "__main__":
    sys.exit(main())
