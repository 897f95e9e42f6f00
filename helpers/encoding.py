"""Rows -> token ids, labels and batches.

Only answers are learned: every other label is -100, which the loss ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.chat import ChatEncoder, EncodedChat
from helpers.rows import DataError

IGNORED = -100  # the label that the loss skips; PyTorch's and transformers' convention


def split_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Put one row through the chat template: the text of the prompt, and that of the last answer.

    The answer ends with the template's end-of-turn token, or eos where the template writes none:
    from it a model learns when to stop. Do not tokenize the two as they are: control tokens that
    somebody typed into a message would take effect. `encode` reads them as plain text.
    """
    return ChatEncoder(tokenizer).split(row["prompt"] + row["completion"], row["source"])


def encode(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    context_length: int | None = None,
) -> Dataset:
    """Turn rows into features.

    Args:
        rows: with prompt, completion and source, and perhaps every_answer (see `helpers.rows`).
        max_length: in tokens.
        context_length: what the model can read, if known; errors advise no more than that.

    Returns:
        A dataset with input_ids (the whole conversation), labels (the same, with -100 for every
        token that is not of a trained answer) and length, all in tokens.

    Raises:
        DataError: rows are longer than `max_length` tokens (cutting them would cut off their
            answers), or the chat template cannot write them.
    """
    encoder = ChatEncoder(tokenizer)
    features = []
    for row in rows:
        chat = encode_row(row, encoder)
        labels = labels_of(chat)
        if all(label == IGNORED for label in labels):
            raise DataError(f"{row['source']}: the row has no answer to train. Remove it.")
        features.append({"input_ids": chat.input_ids, "labels": labels, "length": len(labels)})
    _require_length(rows, [feature["length"] for feature in features], max_length, context_length)
    return Dataset.from_list(features)


def encode_row(row: dict[str, Any], encoder: ChatEncoder) -> EncodedChat:
    """One row as text and tokens, with the places of its answers."""
    return encoder.encode_chat(
        row["prompt"] + row["completion"], row["source"], bool(row.get("every_answer"))
    )


def labels_of(chat: EncodedChat) -> list[int]:
    """The token ids of the answers; -100 for all other tokens."""
    labels = [IGNORED] * len(chat.input_ids)
    for answer in chat.answers:
        tokens = slice(*answer.tokens)
        labels[tokens] = chat.input_ids[tokens]
    return labels


def encode_prompts(
    prompts: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each prompt with the generation prompt: what a model reads to answer."""
    encoder = ChatEncoder(tokenizer)
    return [encoder.encode_prompt(prompt) for prompt in prompts]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: eos, and the template's end-of-turn token if it is another."""
    return ChatEncoder(tokenizer).stop_ids()


def _require_length(
    rows: Dataset, lengths: Sequence[int], max_length: int, context_length: int | None
) -> None:
    """Raise `DataError` that lists the rows that are too long, the first ten by name."""
    sources = rows["source"]
    long = [(sources[index], n) for index, n in enumerate(lengths) if n > max_length]
    if not long:
        return
    (source, length), *others = long
    text = f"{source}: the row is {length} tokens long, and {max_length} is the limit"
    if others:
        named = ", ".join(f"{other} ({n} tokens)" for other, n in others[:9])
        more = f" and {len(others) - 9} more" if len(others) > 9 else ""
        text += f"; {len(long)} rows are too long, also {named}{more}"
    longest = max(n for _, n in long)
    advice = "Shorten or split it" if not others else "Shorten or split them"
    if context_length is None or longest <= context_length:
        advice += f", or raise max_length (--max-length) to {longest}"
    elif max_length < context_length:
        advice += f": the model reads at most {context_length} tokens"
    else:
        advice += ": the model reads no more"
    raise DataError(f"{text}. {advice}.")


class CompletionCollator:
    """Make a batch: pad on the left, and keep only the labels from the first trained token on.

    Padding on the left puts the ends of all rows at the right edge. The model then computes logits
    for the last K positions alone (`logits_to_keep`), K reaching from the first trained token of
    the batch, and the one token before it, from which it is predicted, to the end. The vocabulary
    is 49,152 wide: for single answers this saves more than a tenth of the work and most of the
    memory of the output layer, for the same loss.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Features of `encode` -> input_ids, attention_mask (rows, longest), labels (rows, K)."""
        longest = max(len(feature["input_ids"]) for feature in features)
        keep = min(max(map(_from_first_label, features)) + 1, longest)
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


def _from_first_label(feature: dict[str, Any]) -> int:
    """How many tokens there are from the first trained one to the end."""
    labels = feature["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    return len(labels) - first
