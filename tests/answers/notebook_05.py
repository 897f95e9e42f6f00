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


# Measured in bf16; fp32 differs by a few hundredths where the loss does not leap.
LOSSES = {
    1e-4: [2.353, 2.514, 2.515, 2.662, 2.520, 2.377],
    1e-3: [2.353, 1.849, 1.260, 0.941, 0.907, 0.546],
    1e-2: [2.353, 1.334, 6.993, 5.563, 3.693, 6.152],
    1e-1: [2.353, 11.48, 27.28, 94.80, 69.00, 17.27],
}
LAST = {rate: losses[-1] for rate, losses in LOSSES.items()}
WARMING = {rate: [2.353, 2.528, 2.579, 2.794, 2.714, 2.600 - 2 * rate] for rate in LOSSES}
WARMING[1e-1] = [2.353, 2.528, 2.579, 2.794, 2.1, 3.4]
FIRST = [2.3526, 2.5282, 2.5786, 2.7939]
PARTS = [2.3643, 2.5352, 2.5583, 2.7310]
SINGLE = [2.1034, 2.8291, 2.3321, 2.9127]


RIGHT = [
    ("05.1", LOSSES),
    ("05.1", LAST),
    ("05.1", {rate: [torch.tensor(x) for x in losses] for rate, losses in LOSSES.items()}),
    ("05.1", {str(rate): losses for rate, losses in LOSSES.items()}),
    ("05.2", from_the_library),
    ("05.2", by_hand),
    ("05.3", [FIRST, PARTS, SINGLE]),
    ("05.3", (tuple(PARTS), torch.tensor(PARTS), SINGLE)),
]
WRONG = [
    ("05.1", 1e-3, "all four rates"),
    ("05.1", {1e-3: LOSSES[1e-3]}, "all four rates"),
    ("05.1", {**LOSSES, 1e-2: [0.5, 0.6], 1e-1: [0.7, 11.0]}, "first losses differ"),
    ("05.1", dict.fromkeys(LOSSES, LOSSES[1e-3]), "All four end alike"),
    ("05.1", WARMING, "still warming up"),
    ("05.1", {**LOSSES, 1e-2: [*LOSSES[1e-3][:-1], 0.1]}, "Start each rate"),
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
    ("05.3", [FIRST, PARTS], "three lists"),
    ("05.3", [FIRST, PARTS * 4, SINGLE * 4], "four optimizer steps"),
    ("05.3", [[0.9, 0.8, 0.7, 0.6], PARTS, SINGLE], "trained before"),
    ("05.3", [FIRST, SINGLE, SINGLE], "sees other rows"),
    ("05.3", [FIRST, PARTS, PARTS], "both settings are 1"),
]
