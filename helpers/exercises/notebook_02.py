"""Exercises of notebook 02: tokenization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from helpers.exercises import Exercise, close, number

TEXT = "Größe 💡"
Labels = Callable[[list[int], list[int], int], Any]
Shorten = Callable[[list[int], list[int], list[int], list[int], int], Any]

# (input_ids, attention_mask, prompt_length). Padding uses 2, which is eos as well.
ON_THE_LEFT = ([2, 2, 2, 2, 1, 9, 2, 4, 7, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 3)
ON_THE_RIGHT = ([1, 9, 2, 4, 7, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0, 0], 3)
WITHOUT = ([1, 9, 2, 4, 2], [1, 1, 1, 1, 1], 3)
LEFT_LABELS = [-100] * 7 + [4, 7, 2]
RIGHT_LABELS = [-100] * 3 + [4, 7, 2] + [-100] * 3

BEFORE, AFTER, ANSWER = [1, 11, 2, 1, 12], [2, 1, 13], [21, 22, 23, 2]
MESSAGE = list(range(101, 109))  # with the other twelve, 20 tokens


def _count(answer: Any) -> float:
    """The number in an answer; of bytes or of a list of token ids, how many they are."""
    if isinstance(answer, (bytes, list, tuple)):
        return len(answer)
    return number(answer)


def _labels(function: Labels, case: tuple[list[int], list[int], int]) -> list[int]:
    input_ids, attention_mask, prompt_length = case
    got = function(list(input_ids), list(attention_mask), prompt_length)
    return torch.as_tensor(got).flatten().tolist()


def _right_labels(function: Labels) -> bool:
    return (
        _labels(function, ON_THE_LEFT) == LEFT_LABELS
        and _labels(function, ON_THE_RIGHT) == RIGHT_LABELS
        and _labels(function, WITHOUT) == [-100] * 3 + [4, 2]
    )


def _shortened(function: Shorten, max_length: int, message: Sequence[int] = MESSAGE) -> list[int]:
    got = function(list(BEFORE), list(message), list(AFTER), list(ANSWER), max_length)
    return torch.as_tensor(got).flatten().tolist()


def _row(message: Sequence[int]) -> list[int]:
    return [*BEFORE, *message, *AFTER, *ANSWER]


def _right_shorten(function: Shorten) -> bool:
    return all(
        _shortened(function, 12 + kept) == _row(MESSAGE[:kept]) for kept in (8, 7, 3, 1, 0, 20)
    ) and _shortened(function, 18, [101, 102]) == _row([101, 102])


EXERCISES = {
    "02.1": Exercise(
        task=f"How many tokens does a byte-level BPE make of {TEXT!r} before it has learned a "
        "single merge? Set answer to the number.",
        right=lambda answer: _count(answer) == 12,
        praise="Before any merge a token is a byte: 12 of them for 7 characters. This is why text "
        "in other scripts costs more, until merges make up for it.",
        hints=(
            (
                lambda answer: _count(answer) == 7,
                "You counted characters. Section 1 showed that some take more than one byte.",
            ),
            (
                lambda answer: _count(answer) == 9,
                "Two bytes for each of ö and ß, good. Is one byte enough for the light bulb?",
            ),
            (
                lambda answer: _count(answer) == 10,
                "The light bulb takes four, good. Which letters here are not English ones?",
            ),
            (
                lambda answer: _count(answer) == 11,
                "Nearly. Look at what is between the word and the light bulb.",
            ),
            (
                lambda answer: _count(answer) in (1, 2),
                "You counted words, or pieces. Pieces are where merging begins: each is still a "
                "row of single symbols. How many?",
            ),
        ),
        otherwise="Each token is one byte now. Write down how many bytes each character takes, "
        "and add up. Section 1 has a line that prints them.",
    ),
    "02.2": Exercise(
        task="Four rows have 30, 110, 35 and 100 tokens and go into batches of two, each padded "
        "to its longest row. How many padding tokens are saved if the rows are grouped by length "
        "instead of taken as they come? Set answer to the number.",
        right=lambda answer: close(answer, 130, absolute=0.01, relative=0),
        praise="145 padding tokens become 15. Grouping saves much where lengths differ a lot; "
        "where all rows are equally long there is nothing to save.",
        hints=(
            (
                lambda answer: close(answer, 145),
                "That is the padding as the rows come. How much of it is left after grouping?",
            ),
            (
                lambda answer: close(answer, 15),
                "That is what is left after grouping. How many were there before?",
            ),
            (
                lambda answer: close(answer, 150) or close(answer, 165),
                "You compare with all rows padded to 110. As they come, each batch of two is "
                "padded to its own longest row.",
            ),
            (
                lambda answer: close(answer, -130),
                "The amount is right. Fewer tokens computed: is that a saving or a loss?",
            ),
            (
                lambda answer: close(answer, 160),
                "Did you add the two amounts? What is saved is the difference between them.",
            ),
        ),
        otherwise="For each batch: twice the longer row, minus what the two rows really have. Do "
        "that for (30, 110) and (35, 100), then for the rows sorted by length.",
    ),
    "02.3": Exercise(
        task="Write row_labels(input_ids, attention_mask, prompt_length): the labels of one "
        "padded row. -100 for padding and for the first prompt_length real tokens; every other "
        "label is the token itself. The padding may stand on either side, and its id may be that "
        "of eos.",
        right=_right_labels,
        trial=lambda function: function(*map(_copy, ON_THE_LEFT)),
        praise="The mask says what is padding, not the id. So eos stays in the labels even where "
        "pad = eos, and the model learns to stop.",
        hints=(
            (
                lambda f: len(_labels(f, ON_THE_LEFT)) != 10,
                "input_ids and labels must be equally long, token for token. A token that is not "
                "learned needs a label, too.",
            ),
            (
                lambda f: _labels(f, ON_THE_LEFT) == [-100] * 7 + [4, 7, -100],
                "The last label is gone: you can no longer see where the answer ends. Did you "
                "recognize padding by its id? In this row eos has the same one.",
            ),
            (
                lambda f: _labels(f, WITHOUT) == WITHOUT[0],
                "The model would learn to write the customer's message too. What does "
                "prompt_length tell you?",
            ),
            (
                lambda f: _labels(f, ON_THE_LEFT)[-6:] == [1, 9, 2, 4, 7, 2],
                "In a row padded on the left the prompt does not begin at position 0. From where "
                "must prompt_length be counted?",
            ),
            (
                lambda f: (
                    -100 not in _labels(f, ON_THE_LEFT)
                    and _labels(f, ON_THE_LEFT)[-3:] == [4, 7, 2]
                ),
                "The right labels are kept, but the others would be learned too. Which number "
                "does the loss skip? Any other, 0 included, is a token id.",
            ),
            (
                lambda f: _labels(f, ON_THE_LEFT) in ([-100] * 6 + [4, 7, 2, -100], [4, 7, 2]),
                "These are shifted by one. The model shifts by itself: a label is under its "
                "own token.",
            ),
            (
                lambda f: (
                    _labels(f, ON_THE_LEFT) == LEFT_LABELS
                    and _labels(f, ON_THE_RIGHT) == [-100] * 3 + [4, 7, 2, 2, 2, 2]
                ),
                "Right for padding on the left. Padded on the right, your labels teach the model "
                "to write eos after eos. What tells you which of them is real?",
            ),
            (
                lambda f: (
                    _labels(f, ON_THE_LEFT) == LEFT_LABELS
                    and _labels(f, ON_THE_RIGHT) != RIGHT_LABELS
                ),
                "Right for padding on the left. Now take a row that is padded on the right: where "
                "does its prompt begin?",
            ),
        ),
        otherwise=f"Try row_labels(*{ON_THE_LEFT}): it should give {LEFT_LABELS}.",
    ),
    "02.4": Exercise(
        task="Write shorten(before, message, after, answer, max_length): five arguments, the "
        "first four lists of ids that make up a row in this order (before: system message and "
        "the opening of the user's turn; after: its end and the generation prompt). Return the "
        "row's ids, at most max_length of them: take as few as possible from the end of the "
        "message, and nothing else. Without the message the row fits.",
        right=_right_shorten,
        trial=lambda function: _call(function, 15),
        praise="The answer, its eos and every marker of the template survive; only the customer "
        "is cut short. Whether the label is still true then is a question for you, not for code.",
        hints=(
            (
                lambda f: _shortened(f, 15) == _row(MESSAGE)[:15],
                "You cut the end of the row, as truncation=True does. What is there?",
            ),
            (
                lambda f: _shortened(f, 15) == _row(MESSAGE)[-15:],
                "You cut the beginning of the row: the system message is gone, and the row begins "
                "in the middle of a turn. Only one of the four lists may get shorter.",
            ),
            (
                lambda f: _shortened(f, 15) == _row(MESSAGE[-3:]) and len(_shortened(f, 12)) > 12,
                "You kept the end of the message; its beginning was asked for. And with no room "
                "at all, message[-0:] is the whole message.",
            ),
            (
                lambda f: _shortened(f, 15) == _row(MESSAGE[-3:]),
                "You kept the end of the message; its beginning was asked for.",
            ),
            (
                lambda f: _shortened(f, 15) == _row(MESSAGE[:3]) and len(_shortened(f, 12)) > 12,
                "Good, except for one case: with max_length 12 there is no room for the message "
                "at all. What does your slice give then?",
            ),
            (
                lambda f: (
                    _shortened(f, 15) == _row(MESSAGE[:3]) and _shortened(f, 32) != _row(MESSAGE)
                ),
                "A row that is too long comes out right. One that fits should come out unchanged.",
            ),
            (
                lambda f: len(_shortened(f, 15)) > 15,
                "The row is still longer than max_length. Which other parts take room, the answer "
                "included?",
            ),
            (
                lambda f: len(_shortened(f, 15)) < 15,
                "More is gone than has to be: the row is shorter than max_length. How much room "
                "do the other three leave?",
            ),
        ),
        otherwise="How much room do before, after and answer leave for the message? That many of "
        "its tokens go between before and after.",
    ),
}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _call(function: Shorten, max_length: int) -> Any:
    return function(list(BEFORE), list(MESSAGE), list(AFTER), list(ANSWER), max_length)
