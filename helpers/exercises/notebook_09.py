"""Exercises of notebook 09: Falcon-7B on a T4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.exercises import Exercise, close, says

# -- 09.1: one matrix in NF4 -------------------------------------------------------------------

WEIGHTS = 4544 * 18176
SCALES = WEIGHTS // 64
NF4_BYTES = WEIGHTS // 2 + SCALES + 4 * -(-SCALES // 256)


def _about(value: float) -> Callable[[Any], bool]:
    """Bytes; MB and MiB are taken, too."""
    return lambda answer: any(
        close(answer, value / unit, relative=0.004) for unit in (1, 10**6, 2**20)
    )


# -- 09.2: labels ------------------------------------------------------------------------------

EOS = 11
# Two rows, padded on the left with the eos token itself; both end with a real one.
IDS = [[EOS, EOS, 5, 6, EOS], [7, 8, 9, 10, EOS]]
MASK = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
LABELS = [[-100, -100, 5, 6, EOS], [7, 8, 9, 10, EOS]]


def _labels(function: Any) -> list[list[int]] | None:
    """What the function makes of the rows, as lists; tensors go in, lists or tensors come out."""
    import torch

    made = function(torch.tensor(IDS), torch.tensor(MASK))
    if made is None or made is ...:
        return None
    return torch.as_tensor(made).tolist()


def _is(expected: list[list[int]]) -> Callable[[Any], bool]:
    return lambda function: _labels(function) == expected


# -- 09.4: the largest batch -------------------------------------------------------------------

GIB = 2**30


def _bytes_for(batch_size: int) -> int:
    """A made-up model: 5 GiB, and 2 GiB for every row."""
    return (5 + 2 * batch_size) * GIB


def _largest(function: Any) -> tuple[Any, ...]:
    """Its answers for a card with room for 4 rows, one with room for none, and an exact fit."""
    return tuple(function(_bytes_for, memory) for memory in (15 * GIB, 7 * GIB, 10 * GIB))


EXERCISES = {
    "09.1": Exercise(
        task=(
            "One matrix of Falcon's MLP has 4544 x 18176 weights. How many bytes does it take in "
            "NF4 with double quantization? (Blocks of 64 weights share a scale of one byte; 256 of "
            "those scales share one of four bytes.)"
        ),
        right=_about(NF4_BYTES),
        praise=(
            "The scales add a good three percent to the half byte per weight: 4.127 bits "
            "for a weight."
        ),
        hints=(
            (
                _about(WEIGHTS // 2),
                "That is half a byte per weight. What turns a code from 0 to 15 back into a weight "
                "has to be stored as well.",
            ),
            (
                _about(WEIGHTS // 2 + 4 * SCALES),
                "You took four bytes for the scale of every block. That is what double "
                "quantization saves.",
            ),
            (
                lambda answer: _about(WEIGHTS)(answer) or _about(2 * NF4_BYTES)(answer),
                "How many weights fit into one byte, if each takes 4 bits?",
            ),
            (
                _about(8 * NF4_BYTES),
                "These are bits. The question is for bytes.",
            ),
        ),
        otherwise=(
            "Add three things: the codes, one scale for 64 weights, and one scale for 256 scales."
        ),
    ),
    "09.2": Exercise(
        task=(
            "Write labels(input_ids, attention_mask), both tensors of shape (rows, length): the "
            "ids, with -100 where there is padding. It must also be right for a tokenizer whose "
            "pad token is its eos token."
        ),
        right=_is(LABELS),
        praise=(
            "The mask knows what is padding; the id does not, if padding and the end of an "
            "answer look alike."
        ),
        hints=(
            (
                _is([[-100, -100, 5, 6, -100], [7, 8, 9, 10, -100]]),
                "The real eos at the end of each row is gone. A model trained so never learns to "
                "stop. What tells a real eos from padding?",
            ),
            (
                _is(IDS),
                "Nothing is masked: the model would learn to write padding.",
            ),
            (
                _is([[EOS, EOS, -100, -100, -100], [-100] * 5]),
                "It is the wrong way round. What does a 1 in the attention mask mean?",
            ),
            (
                _is([[0, 0, 5, 6, EOS], [7, 8, 9, 10, EOS]]),
                "0 is the id of a token, so it would be learned. Which label does the loss skip?",
            ),
            (
                _is([[-100, 5, 6, EOS, -100], [8, 9, 10, EOS, -100]]),
                "You shifted them. transformers' models do that themselves: label i belongs to "
                "token i.",
            ),
        ),
        otherwise="Compare your labels for ids [[11, 11, 5, 6, 11]] and mask [[0, 0, 1, 1, 1]].",
        trial=_labels,
    ),
    "09.3": Exercise(
        task=(
            "A QLoRA run of Falcon-7B (4 rows of 512 tokens, all linear layers, no checkpoints) "
            'does not fit on a T4. Which one change makes it fit: "rank 4", "paged optimizer", '
            '"gradient checkpointing" or "query_key_value only"? Guess, then ask memory.plan.'
        ),
        right=lambda answer: says(
            answer,
            "gradient checkpointing",
            "gradient_checkpointing",
            "checkpointing",
            "checkpoints",
            "activation checkpointing",
        ),
        praise=(
            "What overflows is what the layers keep for the backward pass, and that alone is "
            "what checkpoints save. The price is time: every layer runs forward twice."
        ),
        hints=(
            (
                lambda answer: says(answer, "rank 4", "rank", "rank=4", "lora rank"),
                "Look at the component adapters: how much is there to save, and how much is too "
                "much in all?",
            ),
            (
                lambda answer: says(
                    answer, "paged optimizer", "paged", "optimizer", "paged_adamw_8bit"
                ),
                "Look at the component optimizer. LoRA has left little of it already.",
            ),
            (
                lambda answer: says(
                    answer, "query_key_value only", "query_key_value", "target_modules"
                ),
                "Fewer adapters keep fewer inputs: it does help. Put target_modules="
                '["query_key_value"] into the plan and look at the total.',
            ),
            (
                lambda answer: says(answer, "double quantization", "nf4", "quantization"),
                "The weights are in 4 bits already. Which component is the biggest?",
            ),
        ),
        otherwise=(
            "Choose one of the four, in quotes. The biggest component of the plan says where to "
            "look."
        ),
    ),
    "09.4": Exercise(
        task=(
            "Write largest_batch(bytes_for, memory): the largest number of rows for which "
            "bytes_for(rows) leaves a tenth of memory free, or 0. bytes_for is a function such as "
            "lambda rows: memory.plan(..., batch_size=rows).total, and grows with the rows."
        ),
        right=lambda function: _largest(function) == (4, 0, 2),
        praise=(
            "That is the whole of fitting a run to a card: plan, compare, leave some air. The "
            "tenth is for what no plan counts: the CUDA context, workspaces, gaps."
        ),
        hints=(
            (
                lambda function: _largest(function) == (5, 1, 2),
                "You filled the card to the brim. A tenth of it must stay free.",
            ),
            (
                lambda function: _largest(function) == (5, 1, 3),
                "You return the first batch that does not fit. The one before is asked for.",
            ),
            (
                lambda function: _largest(function)[0] == 4 and _largest(function)[2] == 1,
                "Exactly nine tenths still leave a tenth free: is it < or <=?",
            ),
            (
                lambda function: _largest(function)[0] == 4 and _largest(function)[1] != 0,
                "If not even one row fits, the answer is 0.",
            ),
        ),
        otherwise="Count up from 1 while bytes_for(rows) <= 0.9 * memory.",
        trial=lambda function: function(_bytes_for, 15 * GIB),
    ),
}
