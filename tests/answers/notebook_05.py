"""Right forms and typical mistakes of notebook 05's exercises; test_exercises.py tries them."""

import math

import torch
from transformers import get_scheduler


def from_the_library(step: int, steps: int, warmup: int, peak: float) -> float:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler("cosine", optimizer, warmup, steps)
    return peak * scheduler.lr_lambdas[0](step)


def by_hand(step: int, steps: int, warmup: int, peak: float) -> float:
    if step < warmup:
        return peak * step / warmup
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def dot(losses: list[float], tokens: list[int]) -> float:
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True))


RIGHT = [
    ("05.1", 171),
    ("05.1", 171.0),
    ("05.1", "171 steps"),
    ("05.1", torch.tensor(171)),
    ("05.2", from_the_library),
    ("05.2", by_hand),
    ("05.3", lambda losses, tokens: dot(losses, tokens) / sum(tokens)),
    ("05.3", lambda a, n: (torch.tensor(a) * torch.tensor(n)).sum() / torch.tensor(n).sum()),
]
WRONG = [
    ("05.1", 342, "counts batches"),
    ("05.1", "57", "one epoch"),
    ("05.1", 1368, "how often a row is read"),
    ("05.1", 684, "fewer steps of more rows"),
    ("05.1", 12, "Count the batches"),
    ("05.2", lambda s, n, w, p: p * math.cos(math.pi * s / n), "below zero"),
    ("05.2", lambda s, n, w, p: p * (1 + math.cos(math.pi * s / n)) / 2, "What does the warm-up"),
    (
        "05.2",
        lambda s, n, w, p: (
            p * s / w if s < w else p * (1 + math.cos(2 * math.pi * (s - w) / (n - w))) / 2
        ),
        "high again at the end",
    ),
    (
        "05.2",
        lambda s, n, w, p: p * s / w if s < w else p * (1 + math.cos(math.pi * s / n)) / 2,
        "Count the cosine from the end",
    ),
    (
        "05.2",
        lambda s, n, w, p: p * s / w if s < w else p * (n - s) / (n - w),
        "yours falls straight",
    ),
    ("05.3", lambda losses, tokens: sum(losses) / len(losses), "the same say"),
    ("05.3", lambda losses, tokens: sum(losses), "A sum grows"),
    ("05.3", lambda losses, tokens: dot(losses, tokens), "make it a mean"),
    ("05.3", lambda losses, tokens: dot(losses, tokens) / 3, "not of tokens"),
]
