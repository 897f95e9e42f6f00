"""Rows -> token ids, labels and batches.

Only the answer is learned: the labels of the prompt are -100, which the loss ignores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from helpers.rows import DataError

IGNORED = -100  # the label that the loss skips; PyTorch's and transformers' convention
LIVE_LENGTH = 80  # tokens; live runs in notebooks learn from rows up to here, to stay short


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


def filter_by_length(features: Dataset, max_length: int) -> Dataset:
    """The features of `encode` that are at most `max_length` tokens long."""
    return features.select([i for i, n in enumerate(features["length"]) if n <= max_length])
