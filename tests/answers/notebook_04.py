"""Right forms and typical mistakes of notebook 04's exercises; test_exercises.py tries them."""

import math

import torch


def by_the_book(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float
) -> torch.Tensor:
    return weight + alpha / A.shape[0] * (B @ A)


def in_one_call(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float
) -> torch.Tensor:
    return torch.addmm(weight, B, A, alpha=alpha / B.shape[1])


def column_by_column(
    weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float
) -> torch.Tensor:
    result = weight.clone()
    for row, column in zip(A, B.T, strict=True):
        result += alpha / len(A) * torch.outer(column, row)
    return result


def in_place(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    weight += alpha / A.shape[0] * (B @ A)
    return weight


RIGHT = [
    ("04.1", 460_800),
    ("04.1", 460_800.0),
    ("04.1", "460,800 parameters"),
    ("04.1", torch.tensor(460_800)),
    ("04.2", (0.25, 2)),
    ("04.2", [0.25, 2.0]),
    ("04.2", "0.25, 2"),
    ("04.2", "(25 %, 2)"),
    ("04.2", "0.25 and 2"),
    ("04.2", torch.tensor([0.25, 2.0])),
    ("04.2", {"usual": 0.25, "rslora": 2}),
    ("04.3", "neither"),
    ("04.3", " Neither. "),
    ("04.3", "none"),
    ("04.4", 0.31),
    ("04.4", "0.31 nats"),
    ("04.4", torch.tensor(0.44)),
    ("04.5", by_the_book),
    ("04.5", in_one_call),
    ("04.5", column_by_column),
    ("04.5", lambda weight, A, B, alpha: by_the_book(weight, A, B, alpha).numpy()),
]
WRONG = [
    ("04.1", 15_360, "one block"),
    ("04.1", "276,480", "Something is missing"),
    ("04.1", 184_320, "Something is missing"),
    ("04.1", 552_960, "How many outputs"),
    ("04.1", 13_271_040, "two thin matrices"),
    ("04.1", 106_168_320, "not their product"),
    ("04.1", 921_600, "right for r = 16"),
    ("04.1", 480, "not a number of parameters"),
    ("04.1", 1234, "One layer first"),
    ("04.2", (2, 0.25), "Which of them belongs"),
    ("04.2", (4, 0.5), "Upside down"),
    ("04.2", (16, 2), "Alpha itself"),
    ("04.2", (0.25, 0.25), "the divisor changes"),
    ("04.2", (0.25, 0.5), "of r alone"),
    ("04.2", 0.25, "one of the two"),
    ("04.2", (1, 1), "lora_alpha / r is the first"),
    ("04.3", "B", "is A one of the factors"),
    ("04.3", "only A", "What does B hold"),
    ("04.3", "both", "nudge one entry"),
    ("04.3", "C", "One of the four words"),
    ("04.4", float("nan"), "diverged"),
    ("04.4", 8e-3, "looks like a learning rate"),
    ("04.4", 0.5, "Go further"),
    ("04.4", 0.634, "No better than at 2e-3"),
    ("04.4", 3.7, "before training"),
    ("04.4", by_the_book, "Call the function"),
    ("04.4", -1, "a positive number"),
    ("04.5", in_place, "has changed"),
    ("04.5", lambda w, A, B, alpha: w + B @ A, "The scale is missing"),
    ("04.5", lambda w, A, B, alpha: w + alpha * (B @ A), "alpha alone"),
    ("04.5", lambda w, A, B, alpha: w + alpha / math.sqrt(len(A)) * (B @ A), "rsLoRA's scale"),
    ("04.5", lambda w, A, B, alpha: w + alpha / A.shape[1] * (B @ A), "a width of the layer"),
    ("04.5", lambda w, A, B, alpha: w + alpha / len(B) * (B @ A), "a width of the layer"),
    ("04.5", lambda w, A, B, alpha: w + len(A) / alpha * (B @ A), "upside down"),
    ("04.5", lambda w, A, B, alpha: alpha / len(A) * (B @ A), "What is it added to"),
    ("04.5", lambda w, A, B, alpha: w - alpha / len(A) * (B @ A), "takes the update away"),
    ("04.5", lambda w, A, B, alpha: w + A @ B, "your function raised"),
    ("04.5", lambda w, A, B, alpha: w, "number of A's rows"),
]
