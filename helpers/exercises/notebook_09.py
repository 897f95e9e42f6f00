"""Exercises of notebook 09: Falcon-7B on a T4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.exercises import Exercise, close

GIB = 2**30

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


# -- 09.3: short rows or a long one ----------------------------------------------------------------

# GiB by memory.plan; tests/answers/notebook_09.py computes them again.
SHORT_ROWS, LONG_ROW = 6.832, 8.758
WITHOUT_CHECKPOINTS = 31.689


def _longer(answer: Any, gib: float) -> bool:
    """GiB, or bytes."""
    return close(answer, gib) or close(answer, gib * GIB)


# -- 09.4: the largest batch -------------------------------------------------------------------


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
            "The mask says what is padding; the id does not, if padding and the end of an "
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
            "Two QLoRA steps of Falcon-7B with 2048 tokens each: 8 rows of 256, and 1 row of 2048. "
            "How many GiB more does the long row take? Guess, then ask memory.plan, with "
            "gradient checkpointing and the other settings of `run`."
        ),
        right=lambda answer: _longer(answer, LONG_ROW - SHORT_ROWS),
        praise=(
            "The number of tokens is the same, and so is nearly everything that is kept of them. "
            "The scores are not: every token has one for each other token of its own row."
        ),
        hints=(
            (
                lambda answer: close(answer, 0, absolute=0.02),
                "So it would be if each token cost the same. What does the plain attention kernel "
                "store for each pair of tokens in a row?",
            ),
            (
                lambda answer: _longer(answer, SHORT_ROWS - LONG_ROW),
                "The size is right. Which of the two takes more?",
            ),
            (
                lambda answer: _longer(answer, SHORT_ROWS) or _longer(answer, LONG_ROW),
                "That is the total of one of them. The difference is asked for.",
            ),
            (
                lambda answer: close(answer, LONG_ROW / SHORT_ROWS, relative=0.01),
                "That is how many times as much. The difference in GiB is asked for.",
            ),
            (
                lambda answer: _longer(answer, WITHOUT_CHECKPOINTS),
                "That is without checkpoints, where all layers keep their scores. Put "
                "gradient_checkpointing=True into both plans.",
            ),
        ),
        otherwise=(
            'Put run | {"batch_size": 8, "sequence_length": 256} and run | {"batch_size": 1, '
            '"sequence_length": 2048} into memory.plan, and subtract the totals.'
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
