"""Right forms and typical mistakes of notebook 09's exercises; test_exercises.py tries them."""

from collections.abc import Callable
from typing import Any

import torch

from helpers import memory
from helpers.exercises.notebook_09 import GIB, NF4_BYTES, WEIGHTS

Plan = Callable[[int], int]


def by_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return input_ids.masked_fill(attention_mask == 0, -100)


def by_mask_in_lists(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    return [
        [token if kept else -100 for token, kept in zip(row, mask, strict=True)]
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]


def by_id(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return input_ids.masked_fill(input_ids == 11, -100)


def all_of_them(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return input_ids


def wrong_way_round(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return input_ids.masked_fill(attention_mask == 1, -100)


def with_zeros(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    return input_ids * attention_mask


def shifted(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    labels = by_mask(input_ids, attention_mask)
    return torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)


def planned(rows: int, length: int, checkpoints: bool = True) -> float:
    """GiB of a step with the settings of the notebook's `run`."""
    return (
        memory.plan(
            "tiiuae/falcon-7b",
            "qlora",
            batch_size=rows,
            sequence_length=length,
            answer_length=48,
            precision="fp16",
            device="cuda",
            attn_implementation="sdpa",
            gradient_checkpointing=checkpoints,
        ).total
        / GIB
    )


SHORT, LONG = planned(8, 256), planned(1, 2048)


def counting_up(bytes_for: Plan, memory: int) -> int:
    rows = 0
    while bytes_for(rows + 1) <= 0.9 * memory:
        rows += 1
    return rows


def from_a_list(bytes_for: Plan, memory: int) -> int:
    return max([0] + [rows for rows in range(1, 100) if bytes_for(rows) <= memory - memory / 10])


def to_the_brim(bytes_for: Plan, memory: int) -> int:
    return max([0] + [rows for rows in range(1, 100) if bytes_for(rows) <= memory])


def one_too_many(bytes_for: Plan, memory: int) -> int:
    return counting_up(bytes_for, memory) + 1


def strictly(bytes_for: Plan, memory: int) -> int:
    return max([0] + [rows for rows in range(1, 100) if bytes_for(rows) < 0.9 * memory])


def at_least_one(bytes_for: Plan, memory: int) -> int:
    return max(1, counting_up(bytes_for, memory))


def broken(*_: Any) -> int:
    raise ZeroDivisionError("division by zero")


RIGHT = [
    ("09.1", NF4_BYTES),
    ("09.1", 42_606_532),
    ("09.1", "42,606,532 bytes"),
    ("09.1", "about 42.6 MB"),
    ("09.1", 40.63),  # MiB
    ("09.1", torch.tensor(42606532.0)),
    ("09.2", by_mask),
    ("09.2", by_mask_in_lists),
    ("09.3", LONG - SHORT),
    ("09.3", (LONG - SHORT) * GIB),  # bytes
    ("09.3", f"{LONG - SHORT:.2f} GiB"),
    ("09.4", counting_up),
    ("09.4", from_a_list),
]

WRONG = [
    ("09.1", WEIGHTS // 2, "half a byte per weight"),
    ("09.1", 46.5e6, "four bytes for the scale of every block"),
    ("09.1", WEIGHTS, "How many weights fit into one byte"),
    ("09.1", 8 * NF4_BYTES, "These are bits"),
    ("09.1", 17, "Add three things"),
    ("09.2", by_id, "gone. A model trained so never learns to stop"),
    ("09.2", all_of_them, "Nothing is masked"),
    ("09.2", wrong_way_round, "wrong way round"),
    ("09.2", with_zeros, "0 is the id of a token"),
    ("09.2", shifted, "You shifted them"),
    ("09.2", broken, "raised ZeroDivisionError"),
    ("09.3", 0, "if each token cost the same"),
    ("09.3", SHORT - LONG, "Which of the two takes more"),
    ("09.3", LONG, "total of one of them"),
    ("09.3", LONG / SHORT, "how many times as much"),
    ("09.3", planned(1, 2048, False) - planned(8, 256, False), "without checkpoints"),
    ("09.3", 17, "subtract the totals"),
    ("09.4", to_the_brim, "to the brim"),
    ("09.4", one_too_many, "first batch that does not fit"),
    ("09.4", strictly, "< or <="),
    ("09.4", at_least_one, "not even one row fits"),
    ("09.4", lambda bytes_for, memory: 7, "Count up from 1"),
    ("09.4", broken, "raised ZeroDivisionError"),
]
