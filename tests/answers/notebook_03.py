"""Right forms and typical mistakes of notebook 03's exercises; test_exercises.py tries them."""

from collections.abc import Callable

import torch


def grid(steps: float = 15, block: int | None = 32, finish: Callable = torch.round) -> Callable:
    """A rounding function, right as it stands; other arguments make typical mistakes."""

    def sixteen_values(matrix: torch.Tensor) -> torch.Tensor:
        blocks = matrix.reshape(-1, block or matrix.numel())
        least = blocks.amin(dim=1, keepdim=True)
        step = (blocks.amax(dim=1, keepdim=True) - least) / steps
        return (finish((blocks - least) / step) * step + least).reshape(matrix.shape)

    return sixteen_values


def block_by_block(matrix: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(matrix).flatten()
    for start in range(0, matrix.numel(), 32):
        block = matrix.flatten()[start : start + 32]
        levels = torch.linspace(block.min().item(), block.max().item(), 16)
        nearest = (block[:, None] - levels).abs().argmin(dim=1)
        result[start : start + 32] = levels[nearest]
    return result.reshape(matrix.shape)


def codes(matrix: torch.Tensor) -> torch.Tensor:
    blocks = matrix.reshape(-1, 32)
    least = blocks.amin(dim=1, keepdim=True)
    step = (blocks.amax(dim=1, keepdim=True) - least) / 15
    return torch.round((blocks - least) / step).reshape(matrix.shape)


def without_least(matrix: torch.Tensor) -> torch.Tensor:
    blocks = matrix.reshape(-1, 32)
    step = (blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)) / 15
    return (codes(matrix).reshape(-1, 32) * step).reshape(matrix.shape)


def absmax(matrix: torch.Tensor) -> torch.Tensor:
    blocks = matrix.reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return (torch.round(blocks / scale) * scale).reshape(matrix.shape)


RIGHT = [
    ("03.1", 147),
    ("03.1", "147"),
    ("03.1", 9 << 4 | 3),
    ("03.1", "0x93"),
    ("03.1", torch.tensor(147, dtype=torch.uint8)),
    ("03.2", 5),
    ("03.2", "5 bits"),
    ("03.2", 4 + 2 * 16 / 32),
    ("03.2", torch.tensor(5.0)),
    ("03.3", 3.39),
    ("03.3", "3.4"),
    ("03.3", "about 3.4 times"),
    ("03.3", 16 / (0.05 * 16 + 0.95 * (4 + 8 / 64 + 32 / (64 * 256)))),
    ("03.3", torch.tensor(3.389)),
    ("03.4", grid()),
    ("03.4", block_by_block),
]
WRONG = [
    ("03.1", 57, "wrong order"),
    ("03.1", "93", "base 16"),
    ("03.1", 12, "From a sum"),
    ("03.1", 75, "three bits"),
    ("03.1", 2307, "does not fit"),
    ("03.1", 27, "four binary digits"),
    ("03.2", 4, "code alone"),
    ("03.2", "4.5", "two numbers"),
    ("03.2", 36, "whole block"),
    ("03.2", 160, "How many weights are in it"),
    ("03.2", 6, "scales of bitsandbytes"),
    ("03.2", 0.625, "bytes"),
    ("03.2", 7, "Count all bits"),
    ("03.3", 4, "16 / 4"),
    ("03.3", 3.88, "5 % that are not"),
    ("03.3", 16 / 4.6, "what do their scales take"),
    ("03.3", 3.15, "without double"),
    ("03.3", 2.9, "How many bits is that"),
    ("03.3", 6.78, "compares with fp32"),
    ("03.3", 0.295, "Turn it round"),
    ("03.3", 3.73, "ratios may not"),
    ("03.3", 2, "on average"),
    ("03.4", lambda matrix: matrix, "unchanged"),
    ("03.4", codes, "return the codes"),
    ("03.4", without_least, "add it again"),
    ("03.4", absmax, "That is absmax"),
    ("03.4", grid(block=None), "Which harm did blocks"),
    ("03.4", grid(block=64), "per row"),
    ("03.4", grid(steps=16), "How many gaps"),
    ("03.4", grid(finish=torch.floor), "rounded down"),
    ("03.4", lambda matrix: grid()(matrix).reshape(-1, 32), "The shape"),
    ("03.4", lambda matrix: matrix * 2, "on paper"),
]
TASKS = [("03.1", "neighbours"), ("03.2", "Q4_1"), ("03.3", "bf16"), ("03.4", "sixteen_values")]
