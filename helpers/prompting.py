"""Answers without training: examples in the prompt, and decoding that only writes valid tickets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError
from helpers.data import FIELDS
from helpers.encoding import stop_token_ids
from helpers.evaluation import generate_answers

Messages = list[dict[str, str]]

# The rows' own instruction, "Turn the message into a JSON ticket.", is enough for one that learns
# from them what a ticket is. For one that does not, this one names fields and values.
SPELLED_OUT = """\
Turn the customer message into one line of JSON with these four keys:
category: delivery, billing, return, defect, account or question
urgency: low, normal or high
product: copied from the message, or null
order: the order number, copied from the message, or null
Answer with the JSON and nothing else."""

# One row of the train split for each category, chosen by hand: short, each urgency twice, every
# combination of with and without a product or an order, and one number that is no order.
EXAMPLES = (146, 87, 108, 81, 62, 261)


def spelled_out(prompt: Messages) -> Messages:
    """A prompt with `SPELLED_OUT` as its system message."""
    return [{"role": "system", "content": SPELLED_OUT}, *_without_system(prompt)]


def few_shot_examples(rows: Dataset) -> list[dict[str, Any]]:
    """Six rows of the train split, one of each category: always the same.

    Args:
        rows: the whole train split, as `helpers.data.load_triage` gives it.
    """
    return [rows[index] for index in EXAMPLES]


def few_shot(prompt: Messages, examples: Sequence[dict[str, Any]]) -> Messages:
    """A prompt with examples as earlier turns: system, message, ticket, ..., the prompt's message.

    Args:
        prompt: the chat messages of a row: perhaps a system message, then the user's.
        examples: rows with prompt and completion.
    """
    turns = [m for row in examples for m in _without_system(row["prompt"]) + row["completion"]]
    system = prompt[: len(prompt) - len(_without_system(prompt))]
    return [*system, *turns, *_without_system(prompt)]


def _without_system(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] != "system"]


def _text_or_null(longest: int) -> dict[str, Any]:
    # In a pattern, as the grammar's own strings may hold a tab, which JSON must write as \t.
    text = {"type": "string", "pattern": rf'^[^"\\\x00-\x1f]{{1,{longest}}}$'}
    return {"anyOf": [text, {"type": "null"}]}


# The JSON schema of a ticket. In the train split the longest product has 29 characters and the
# longest order number 11; without a limit a model that repeats itself would not end a string.
TICKET_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "category": {"enum": ["delivery", "billing", "return", "defect", "account", "question"]},
        "urgency": {"enum": ["low", "normal", "high"]},
        "product": _text_or_null(40),
        "order": _text_or_null(16),
    },
    "required": list(FIELDS),
    "additionalProperties": False,
}


def constrained_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    schema: dict[str, Any],
    max_new_tokens: int = 96,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """Answer as `generate_answers` does, at each step with the likeliest token that fits a schema.

    The answers are compact JSON, with the keys in the schema's order.

    Args:
        prompts: lists of chat messages.
        schema: a JSON schema, such as `TICKET_SCHEMA`.
        max_new_tokens: where an answer is cut, and then invalid. The longest ticket that
            `TICKET_SCHEMA` allows takes SmolLM2 74 tokens.

    Raises:
        CourseError: xgrammar is missing.
    """
    try:
        import xgrammar
        from xgrammar.contrib.hf import LogitsProcessor as GrammarProcessor
    except ImportError as error:
        raise CourseError(
            "Constrained decoding needs xgrammar, which is not installed. Run: pip install xgrammar"
        ) from error
    vocabulary = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer,
        vocab_size=model.config.get_text_config().vocab_size,  # may exceed the tokenizer's
        stop_token_ids=stop_token_ids(tokenizer),
    )
    grammar = xgrammar.GrammarCompiler(vocabulary).compile_json_schema(
        json.dumps(schema), any_whitespace=False, separators=(",", ":")
    )

    def new_processor() -> LogitsProcessor:
        return GrammarProcessor(grammar)

    return generate_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens,
        batch_size,
        progress,
        new_logits_processor=new_processor,
    )
