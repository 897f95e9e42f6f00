"""Answers, scores and losses. Base and tuned model go through the same functions."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from helpers.chat import ChatEncoder
from helpers.encoding import (
    IGNORED,
    CompletionCollator,
    encode_prompts,
    encode_row,
    labels_of,
    stop_token_ids,
)
from helpers.logs import quiet
from helpers.workarounds import apply_workarounds


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Run a block in eval mode and without gradients, then restore the model's mode."""
    training = model.training
    apply_workarounds(model).eval()
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
    new_logits_processor: Callable[[], LogitsProcessor] | None = None,
) -> list[str]:
    """Answer each prompt greedily (the likeliest token at each step), in the order given.

    Prompts of similar length share a batch, padded on the left; the KV cache keeps what was
    computed for earlier tokens.

    Args:
        prompts: lists of chat messages, as in the column prompt of a dataset.
        max_new_tokens: where an answer is cut that does not end by itself; earlier where the model
            can read no more.
        progress: show a bar.
        new_logits_processor: makes what restricts the next token, one for each batch (see
            `helpers.prompting`).
    """
    ids = encode_prompts(prompts, tokenizer)
    longest_first = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    answers = [""] * len(ids)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = context or math.inf
    # A prompt that leaves less room than asked for is answered alone, up to the end of its room.
    crowded = [index for index in longest_first if len(ids[index]) + max_new_tokens > context]
    rest = longest_first[len(crowded) :]
    batches = [[index] for index in crowded]
    batches += [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]
    with evaluating(model):
        for batch in tqdm(batches, desc="answers", disable=not progress, leave=False):
            room = context - len(ids[batch[0]])
            padded = tokenizer.pad(
                {"input_ids": [ids[index] for index in batch]},
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            with quiet():
                output = model.generate(
                    **padded,
                    max_new_tokens=max(1, min(max_new_tokens, room)),
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=stop_token_ids(tokenizer),
                    pad_token_id=tokenizer.pad_token_id,
                    logits_processor=[new_logits_processor()] if new_logits_processor else None,
                )
            new = output[:, padded["input_ids"].shape[1] :]
            for index, row in zip(batch, new, strict=True):
                answers[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def parse(answer: str) -> dict[str, Any] | None:
    """The JSON object that an answer is, or None. Text before or after the object is an error."""
    try:
        value = json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # also numbers too long and lists too deep for Python
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    """Python's reader accepts NaN and Infinity; JSON does not."""
    raise ValueError(f"{name} is not JSON")


def same_answer(answer: str, reference: str) -> bool:
    """True if two answers say the same: equal JSON objects, otherwise equal text."""
    if (expected := parse(reference)) is not None:
        return _same_value(parse(answer), expected)
    return answer.strip() == reference.strip()


def _same_value(first: Any, second: Any) -> bool:
    """Equality as JSON means it: unlike in Python, true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            _same_value(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same_value, first, second))
    return first == second


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Compare answers with the reference answers.

    Returns:
        exact_match: fraction of answers that say exactly what the reference says, 0 to 1
        valid_json: of the rows whose reference is a JSON object, the fraction whose answer is
            one too; None if there is no such row
        fields: {field: fraction right}, over the rows whose reference has the field

    Raises:
        ValueError: there are no references, or not one per answer.
    """
    if len(answers) != len(references) or not references:
        raise ValueError(f"{len(answers)} answers for {len(references)} reference answers.")
    parsed = [(parse(got), parse(ref)) for got, ref in zip(answers, references, strict=True)]
    structured = [(got, ref) for got, ref in parsed if ref is not None]
    fields = {}
    for field in dict.fromkeys(key for _, ref in structured for key in ref):
        hits = [
            got is not None and field in got and _same_value(got[field], ref[field])
            for got, ref in structured
            if field in ref
        ]
        fields[field] = sum(hits) / len(hits)
    exact = [same_answer(got, ref) for got, ref in zip(answers, references, strict=True)]
    valid = [got is not None for got, _ in structured]
    return {
        "exact_match": sum(exact) / len(exact),
        "valid_json": sum(valid) / len(valid) if valid else None,
        "fields": fields,
    }


def references(rows: Dataset) -> list[str]:
    """The reference answer of every row, as text."""
    return [completion[0]["content"] for completion in rows["completion"]]


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
        loss: over all trained tokens, those of the answers
        value_loss: over the tokens of the JSON values in the last answers alone (None where these
            are no JSON): most tokens of a ticket are boilerplate that is right for every ticket,
            and the mean over all of them hides errors.
    """
    features, fields = _with_fields(rows, tokenizer)
    losses = token_losses(model, tokenizer, features, batch_size)
    values = torch.cat([loss[masks.any(0)] for loss, masks in zip(losses, fields, strict=True)])
    return {
        "loss": torch.cat(losses).mean().item(),
        "value_loss": values.mean().item() if len(values) else None,
    }


def scores_after_references(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    batch_size: int = 32,
) -> dict[str, Any]:
    """What the model finds likeliest after each *right* beginning of the reference answers.

    One forward pass, where generating takes one for each token. A whole answer is right here
    exactly where greedy generation writes it, for that goes wrong at the first wrong token. A field
    is judged after right fields, where a generated answer may have gone wrong before it.

    Args:
        rows: whose answers are flat JSON objects.

    Returns:
        loss, value_loss: as in `answer_losses`
        exact_match: fraction of answers of which every token is right
        fields_right: fraction of the fields of which every token is right
        value_accuracy: fraction of the values' tokens that are right
        confidence: mean probability of the likeliest token, over the values' tokens
        row_loss: mean loss of each row, in their order
        row_right: whether every token of the row's answer is right

    Raises:
        ValueError: no answer is a flat JSON object.
    """
    features, fields = _with_fields(rows, tokenizer)
    if not any(len(masks) for masks in fields):
        raise ValueError("None of the reference answers is a flat JSON object.")
    losses, right, sure = ([torch.empty(0)] * len(features) for _ in range(3))
    for index, logits, labels in _answer_logits(model, tokenizer, features, batch_size):
        log_probabilities = logits.log_softmax(-1)
        best, token = log_probabilities.max(-1)
        losses[index] = -log_probabilities.gather(-1, labels[:, None]).squeeze(-1)
        right[index], sure[index] = token == labels, best.exp()

    def values(per_token: list[torch.Tensor]) -> float:
        chosen = [row[masks.any(0)] for row, masks in zip(per_token, fields, strict=True)]
        return torch.cat(chosen).float().mean().item()

    hits = [row[mask].all() for row, masks in zip(right, fields, strict=True) for mask in masks]
    whole = torch.stack([row.all() for row in right])
    return {
        "loss": torch.cat(losses).mean().item(),
        "value_loss": values(losses),
        "exact_match": whole.float().mean().item(),
        "fields_right": torch.stack(hits).float().mean().item(),
        "value_accuracy": values(right),
        "confidence": values(sure),
        "row_loss": [row.mean().item() for row in losses],
        "row_right": whole.tolist(),
    }


def _with_fields(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, list[int]]], list[torch.Tensor]]:
    """Features, and for each row a bool tensor (fields, answer length,): where its values are."""
    encoder = ChatEncoder(tokenizer)
    features, fields = [], []
    for row in rows:
        chat = encode_row(row, encoder)
        labels = labels_of(chat)
        features.append({"input_ids": chat.input_ids, "labels": labels})
        shift = chat.last_content[0]
        offsets = torch.tensor(
            [pair for pair, label in zip(chat.offsets, labels, strict=True) if label != IGNORED]
        )
        masks = [
            (offsets[:, 0] < end + shift) & (offsets[:, 1] > start + shift)
            for start, end in value_spans(chat.text[slice(*chat.last_content)])
        ]
        fields.append(torch.stack(masks) if masks else torch.zeros(0, len(offsets)).bool())
    return features, fields


def token_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[dict[str, list[int]]],
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """Cross-entropy of every label that is not -100: one float tensor (answer length,) per row."""
    result: list[torch.Tensor] = [torch.empty(0)] * len(features)
    for index, logits, labels in _answer_logits(model, tokenizer, features, batch_size):
        result[index] = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return result


def _answer_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[dict[str, list[int]]],
    batch_size: int,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, float logits (answer length, vocabulary), labels (answer length,)) of each row.

    Rows of similar length share a batch, so they do not come in their own order.
    """
    collate = CompletionCollator(tokenizer.pad_token_id)
    order = sorted(range(len(features)), key=lambda index: len(features[index]["input_ids"]))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collate([features[index] for index in indices])
            labels = batch.pop("labels")[:, 1:]
            keep = batch.pop("logits_to_keep")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            logits = model(**batch, logits_to_keep=keep, use_cache=False).logits[:, :-1]
            for index, row, label in zip(indices, logits.float().cpu(), labels, strict=True):
                yield index, row[label != IGNORED], label[label != IGNORED]


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
