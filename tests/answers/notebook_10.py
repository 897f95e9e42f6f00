"""Right forms and typical mistakes of notebook 10's exercises; test_exercises.py tries them."""

import numpy as np
import torch


def ratio(weights: float, adapter: float, gpus: int) -> float:
    return 1.0 if gpus == 1 else (adapter + 2 * (weights + adapter)) / (2 * adapter)


def ratio_from_amounts(weights: float, adapter: float, gpus: int) -> float:
    share = (gpus - 1) / gpus
    if share == 0:
        return 1
    return share * (adapter + 2 * (weights + adapter)) / (share * 2 * adapter)


def ratio_as_tensor(weights: float, adapter: float, gpus: int) -> torch.Tensor:
    return torch.tensor(ratio(weights, adapter, gpus))


RIGHT = [
    ("10.1", 4),
    ("10.1", "4 rows"),
    ("10.1", 8 * 2 / 4),
    ("10.1", torch.tensor(4)),
    ("10.2", 16.5),
    ("10.2", "16.5 GB"),
    ("10.2", 16.5e9),
    ("10.2", 3 * 2 + 3 * 14 / 4),
    ("10.2", np.float64(16.5)),
    ("10.3", ratio),
    ("10.3", ratio_from_amounts),
    ("10.3", ratio_as_tensor),
    ("10.4", torch.float16),
    ("10.4", "torch.float16"),
    ("10.4", "fp16"),
    ("10.4", torch.half),
]

WRONG = [
    ("10.1", 16, "How many processes read"),
    ("10.1", 2, "with its accumulation"),
    ("10.1", "8", "And in the old run"),
    ("10.1", 64, "each of them needs fewer"),
    ("10.1", 5, "set them equal"),
    ("10.2", 48, "one GPU would hold alone"),
    ("10.2", "12 GB", "One part stays whole"),
    ("10.2", 21, "Look at the name again"),
    ("10.2", 10.5, "What else is on the GPU"),
    ("10.2", 16.5e9 / 2**30, "10^9 bytes here"),
    ("10.2", 7, "one by one"),
    (
        "10.3",
        lambda w, a, n: (a + 2 * (w + a)) / (2 * a),
        "With one, nobody sends",
    ),
    ("10.3", lambda w, a, n: 1.0 if n == 1 else (2 * a + w) / (2 * a), "How often are they"),
    ("10.3", lambda w, a, n: 1.0 if n == 1 else (a + 2 * w) / (2 * a), "gathered as well"),
    ("10.3", lambda w, a, n: 1.0 if n == 1 else (a + 2 * (w + a)) / a, "spread the sum"),
    ("10.3", lambda w, a, n: 1.5, "Do frozen weights have gradients"),
    ("10.3", lambda w, a, n: 1 / ratio(w, a, n), "Upside down"),
    ("10.3", lambda w, a, n: ratio(w, a, n) * (n - 1) / n, "same factor"),
    ("10.3", lambda w, a, n: 7.0, "and divide"),
    ("10.4", torch.bfloat16, "What do the norms have here"),
    ("10.4", "uint8", "tried plain bytes"),
    ("10.4", torch.float32, "What is everything else"),
    ("10.4", "nothing", "Name a dtype"),
]
