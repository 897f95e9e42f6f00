"""Answers, scores and losses. Base and tuned model go through the same functions."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.data import IGNORED, CompletionCollator, split_text
from helpers.models import quiet, ready


@contextlib.contextmanager
def inference_mode(model: PreTrainedModel) -> Iterator[None]:
    """Run a block in eval mode with no gradients, then put the model back as it was."""
    training = model.training
    ready(model).eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int = 64,
    batch_size: int = 32,
    progress: bool = False,
) -> list[str]:
    """Answer each prompt greedily (the likeliest token at each step), in the order given.

    Prompts of similar length share a batch, padded on the left; the KV cache keeps what was
    computed for earlier tokens.

    Args:
        prompts: lists of chat messages, as in the column prompt of a dataset.
        max_new_tokens: where an answer is cut that does not end by itself.
        progress: show a bar.
    """
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(ids)
    starts = range(0, len(ids), batch_size)
    with inference_mode(model):
        for start in tqdm(starts, desc="answers", disable=not progress, leave=False):
            batch = longest_first[start : start + batch_size]
            padded = tokenizer.pad(
                {"input_ids": [ids[index] for index in batch]},
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            with quiet():
                output = model.generate(
                    **padded,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            new = output[:, padded["input_ids"].shape[1] :]
            for index, row in zip(batch, new, strict=True):
                answers[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object that an answer is, or None. Text before or after it counts as a fault."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # also numbers too long and lists too deep for Python
        return None
    return value if isinstance(value, dict) else None


def same_answer(answer: str, wanted: str) -> bool:
    """True if two answers say the same: equal JSON objects, otherwise equal text."""
    if (wanted_object := parse(wanted)) is not None:
        return parse(answer) == wanted_object
    return answer.strip() == wanted.strip()


def score(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """Compare answers with the wanted ones.

    Returns:
        exact_match: share that says exactly what was wanted, 0 to 1
        valid_json: share that is a JSON object, or None if none was wanted
        fields: {field: share right}, over all rows in which the field is wanted
    """
    if len(answers) != len(wanted) or not wanted:
        raise ValueError(f"{len(answers)} answers for {len(wanted)} wanted ones.")
    pairs = [(parse(answer), parse(want)) for answer, want in zip(answers, wanted, strict=True)]
    structured = [(got or {}, want) for got, want in pairs if want is not None]
    fields = {}
    for field in dict.fromkeys(key for _, want in structured for key in want):
        hits = [got.get(field, ...) == want[field] for got, want in structured if field in want]
        fields[field] = sum(hits) / len(hits)
    exact = [same_answer(answer, want) for answer, want in zip(answers, wanted, strict=True)]
    return {
        "exact_match": sum(exact) / len(exact),
        "valid_json": sum(got is not None for got, _ in pairs) / len(pairs) if structured else None,
        "fields": fields,
    }


def answers_wanted(rows: Dataset) -> list[str]:
    """The right answer of every row, as text."""
    return [completion[0]["content"] for completion in rows["completion"]]


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval in which the true share lies with 95 % confidence, for `count` trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22 (1927).
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


# -- losses ------------------------------------------------------------------------------------


def value_spans(answer: str) -> list[tuple[int, int]]:
    """Where the values of a flat JSON object stand in its compact text: [(start, end), ...]."""
    if (values := parse(answer)) is None:
        return []
    spans, text = [], "{"
    for key, value in values.items():
        text += json.dumps(key, ensure_ascii=False) + ":"
        start = len(text)
        text += json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        spans.append((start, len(text)))
        text += ","
    return spans if text[:-1] + "}" == answer else []


def answer_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int = 32,
) -> dict[str, float | None]:
    """Mean cross-entropy per token, in nats.

    Returns:
        loss: over all tokens of the answers
        value_loss: over the tokens of the JSON values alone (None where answers are no JSON):
            most tokens of a ticket are boilerplate that is right for every ticket, and the mean
            over all of them hides errors.
    """
    features, value_masks = [], []
    for row in rows:
        prompt, answer = split_text(row, tokenizer)
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        spans = value_spans(answer.removesuffix(tokenizer.eos_token))
        value_masks.append(
            [
                any(first < end and last > start for start, end in spans)
                for first, last in encoded["offset_mapping"]
            ]
        )
        answer_ids = encoded["input_ids"]
        features.append(
            {
                "input_ids": prompt_ids + answer_ids,
                "labels": [IGNORED] * len(prompt_ids) + answer_ids,
            }
        )
    losses = token_losses(model, tokenizer, features, batch_size)
    every = torch.cat(losses)
    values = torch.cat(
        [loss[torch.tensor(mask)] for loss, mask in zip(losses, value_masks, strict=True)]
    )
    return {
        "loss": every.mean().item(),
        "value_loss": values.mean().item() if len(values) else None,
    }


def token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[dict[str, list[int]]],
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """Cross-entropy of every label that is not -100: one float tensor (answer length,) per row."""
    collate = CompletionCollator(tokenizer.pad_token_id)
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    result: list[torch.Tensor] = [torch.empty(0)] * len(features)
    with inference_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collate([features[index] for index in indices])
            labels = batch.pop("labels")[:, 1:]
            keep = batch.pop("logits_to_keep")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**batch, logits_to_keep=keep, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1).cpu(),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="none",
            ).view_as(labels)
            for index, row, label in zip(indices, loss, labels, strict=True):
                result[index] = row[label != IGNORED]
    return result


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 8,
) -> float:
    """How surprised a model is by plain text: e to the mean cross-entropy per token.

    1 is a model that foresees every token; the size of the vocabulary is one that guesses. The
    first token of each text has nothing before it and is not counted. Only models with the same
    tokenizer can be compared.

    Raises:
        ValueError: no text has two tokens.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    features = [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids if len(row) > 1]
    if not features:
        raise ValueError("There is no text with at least two tokens.")
    return math.exp(torch.cat(token_losses(model, tokenizer, features, batch_size)).mean().item())


# -- is one better? ----------------------------------------------------------------------------


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test, two-sided, for two models on the same examples.

    Args:
        only_first: how many examples the first model alone gets right.
        only_second: how many the second model alone gets right. Where both are right, or both
            wrong, the example says nothing about which is better.

    Returns:
        How often fair coins, one for each example on which the two differ, would come out at
        least this uneven. Small: the models differ. Large: this test set cannot tell.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
    or percentages", Psychometrika 12 (1947).
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"Counts cannot be negative: {only_first}, {only_second}.")
    coins = only_first + only_second
    tail = sum(math.comb(coins, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**coins)
