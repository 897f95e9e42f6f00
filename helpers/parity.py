"""Is what is served what was scored? Two lists of answers to the same questions, compared.

A server may read another prompt (template, system message, tokenizer), compute with another model
(no adapter, fewer bits) or stop elsewhere (no end token), and say nothing about it. Its answers
tell: greedy answers of one model are the same everywhere, but for near-ties. There two tokens are
so close that rounding decides, and from then on the answers may part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from helpers.encoding import encode_prompts, stop_token_ids
from helpers.evaluation import evaluating
from helpers.scored import Scored

Messages = list[dict[str, str]]

# Two logits of the scored model nearer to each other than this (in nats) may change places by
# rounding alone. In bf16 a logit of 20 has steps of 0.125.
NEAR_TIE = {"fp32": 0.1, "bf16": 0.5, "fp16": 0.1}
TOLERATED = 0.1  # fraction of rows that may differ by near-ties before it is worth a warning


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first token at which a served answer parts from the scored one.

    Attributes:
        row: the number of the question, from 0.
        scored, served: the whole answers.
        scored_token, served_token: where they part.
        gap: by how much the scored model prefers its own token, in nats (difference of the two
            logits). Infinite where the two texts are of the same tokens.
        near_tie: true if rounding explains it.
    """

    row: int
    scored: str
    served: str
    scored_token: str
    served_token: str
    gap: float
    near_tie: bool


@dataclasses.dataclass(frozen=True)
class Parity:
    """How served answers compare with the scored ones.

    Attributes:
        rows: questions compared.
        differences: one for each answer that differs.
        prompts: questions that the server reads as other tokens; None if it was not asked.
    """

    rows: int
    differences: tuple[Difference, ...]
    prompts: tuple[int, ...] | None

    @property
    def same(self) -> int:
        """How many answers are the same, character by character."""
        return self.rows - len(self.differences)

    @property
    def unexplained(self) -> tuple[Difference, ...]:
        """The differences that are no near-ties."""
        return tuple(one for one in self.differences if not one.near_tie)

    @property
    def near_ties(self) -> int:
        """How many answers differ where rounding explains it."""
        return len(self.differences) - len(self.unexplained)

    @property
    def warning(self) -> str:
        """What is wrong, in a sentence; empty if the two agree."""
        if self.prompts:
            return (
                f"{len(self.prompts)} of {self.rows} questions reach the model as other tokens: "
                f"another chat template, system message or tokenizer is at work."
            )
        if self.unexplained:
            return (
                f"{len(self.unexplained)} of {self.rows} answers differ by more than rounding: "
                f"another model, other settings, or an end token that did not stop the answer."
            )
        if len(self.differences) > TOLERATED * self.rows:
            return (
                f"{len(self.differences)} of {self.rows} answers differ, all by near-ties: more "
                f"than the {TOLERATED:.0%} that rounding usually changes. Score it again."
            )
        return ""

    def __str__(self) -> str:
        text = f"parity: {self.same} of {self.rows} answers are the scored ones"
        if self.differences:
            text += f"; {self.near_ties} differ by a near-tie, {len(self.unexplained)} by more"
        if self.prompts is not None:
            text += f"; {self.rows - len(self.prompts)} of {self.rows} prompts are the same tokens"
        return text

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "same": self.same,
            "near_ties": self.near_ties,
            "unexplained": len(self.unexplained),
            "other_prompts": None if self.prompts is None else len(self.prompts),
            "warning": self.warning or None,
            "differences": [dataclasses.asdict(one) for one in self.differences],
        }


def compare(
    scored: Scored,
    prompts: Sequence[Messages],
    expected: Sequence[str],
    served: Sequence[str],
    prompt_ids: Callable[[Messages], list[int]] | None = None,
    near_tie: float | None = None,
) -> Parity:
    """Compare served answers with those of the scored model.

    Args:
        scored: the model; it is asked for its logits where two answers part.
        prompts: the questions, as chat messages.
        expected: its answers to them, from `Scored.answer`.
        served: the server's answers.
        prompt_ids: gives the token ids that the server reads for a question.
        near_tie: in nats; by the precision of the scored model if not given.

    Raises:
        ValueError: not one answer of each kind for every question.
    """
    if not len(prompts) == len(expected) == len(served):
        raise ValueError(f"{len(expected)} and {len(served)} answers to {len(prompts)} questions.")
    limit = NEAR_TIE[scored.found.profile.precision] if near_tie is None else near_tie
    ids = encode_prompts(prompts, scored.tokenizer)
    differences = [
        _difference(scored, row, ids[row], first, second, limit)
        for row, (first, second) in enumerate(zip(expected, served, strict=True))
        if first != second
    ]
    others = None
    if prompt_ids is not None:
        others = tuple(row for row, prompt in enumerate(prompts) if prompt_ids(prompt) != ids[row])
    return Parity(len(prompts), tuple(differences), others)


def _difference(
    scored: Scored, row: int, prompt: list[int], first: str, second: str, limit: float
) -> Difference:
    tokenizer = scored.tokenizer
    end = stop_token_ids(tokenizer)[-1]
    one, two = (
        [*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in (first, second)
    )
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if same is None:  # the texts differ and their tokens do not: by what is not a token
        return Difference(row, first, second, "", "", math.inf, False)
    logits = _logits(scored, prompt + one[:same], 1)[-1]
    gap = (logits[one[same]] - logits[two[same]]).item()
    tokens = tokenizer.convert_ids_to_tokens([one[same], two[same]])
    return Difference(row, first, second, *tokens, round(gap, 4), abs(gap) <= limit)


def next_logits(scored: Scored, prompt: Messages, answer: str) -> torch.Tensor:
    """The logits (tokens, vocabulary) of every token of an answer, its end token included."""
    (ids,) = encode_prompts([prompt], scored.tokenizer)
    tokens = scored.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return _logits(scored, ids + tokens, len(tokens) + 1)


def _logits(scored: Scored, ids: list[int], count: int) -> torch.Tensor:
    """The logits (count, vocabulary) that follow the last `count` of some tokens."""
    model = scored.model
    with evaluating(model), scored.computing():
        inputs = torch.tensor([ids], device=model.device)
        logits = model(input_ids=inputs, logits_to_keep=count, use_cache=False).logits
        return logits[0].float()
