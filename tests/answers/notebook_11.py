"""Right forms and typical mistakes of notebook 11's exercises; test_exercises.py tries them."""

import math

import torch

Losses = dict[float, float]


def by_axis(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return weight * scale if scales_input else weight * scale[:, None]


def by_diagonal(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return weight @ scale.diag() if scales_input else scale.diag() @ weight


def in_place(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    weight *= scale if scales_input else scale[:, None]
    return weight


def other_way_round(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return by_axis(weight, scale, not scales_input)


def columns_only(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return weight * scale


def rows_only(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return weight * scale[:, None]


def change_only(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return by_axis(weight, scale, scales_input) - weight


def added(weight: torch.Tensor, scale: torch.Tensor, scales_input: bool) -> torch.Tensor:
    return by_axis(weight, scale, scales_input) + weight


def best_of(losses: Losses) -> float:
    return min((rate for rate in losses if not math.isnan(losses[rate])), key=losses.__getitem__)


def beyond_the_edge(losses: Losses) -> float | None:
    rate = best_of(losses)
    if rate == max(losses):
        return 3 * rate
    return rate / 3 if rate == min(losses) else None


def by_place(losses: Losses) -> float | None:
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda i: (math.isnan(losses[rates[i]]), losses[rates[i]]))
    if 0 < place < len(rates) - 1:
        return None
    return round(rates[place] * 3 if place else rates[place] / 3, 6)


def nan_wins(losses: Losses) -> float | None:
    rate = min(losses, key=losses.__getitem__)
    return {min(losses): rate / 3, max(losses): rate * 3}.get(rate)


CHOICES = {"a": "LoRA", "b": "full", "c": "IA3", "d": "rsLoRA", "e": "prompt tuning"}

RIGHT = [
    ("11.1", 74_880),
    ("11.1", "74,880"),
    ("11.1", 57_600 + 30 * 576),
    ("11.2", by_axis),
    ("11.2", by_diagonal),
    ("11.3", (0.62, 0.58)),
    ("11.3", [0.62, 0.64]),
    ("11.3", {"LoRA": 0.6, "rsLoRA": 0.7}),
    ("11.3", torch.tensor([0.8, 0.5])),
    ("11.4", CHOICES),
    ("11.4", {k: v.upper() for k, v in CHOICES.items()} | {"b": "full fine-tuning"}),
    ("11.5", beyond_the_edge),
    ("11.5", by_place),
]

WRONG = [
    ("11.1", 17_280, "what the queries add"),
    ("11.1", 57_600, "as it was"),
    ("11.1", 2_496, "one layer"),
    ("11.1", 58_176, "Every layer has its own"),
    ("11.1", 610_560, "thin matrices"),
    ("11.1", 1000, "on top of 57,600"),
    ("11.2", in_place, "in place"),
    ("11.2", other_way_round, "other way round"),
    ("11.2", columns_only, "an output is a row"),
    ("11.2", rows_only, "What does scales_input change"),
    ("11.2", change_only, "the change of the matrix"),
    ("11.2", added, "as LoRA does"),
    ("11.2", lambda weight, scale, scales_input: weight, "column j alone"),
    ("11.3", (0.5, float("nan")), "no number"),
    ("11.3", (3e-4, 1e-3), "look like learning rates"),
    ("11.3", (0.6, 2.4), "where it began"),
    ("11.3", (0.6, 1.2), "still above rsLoRA"),
    ("11.3", 0.6, "Give both"),
    ("11.3", (5.0, 4.0), "Two losses below 2.3"),
    ("11.4", CHOICES | {"c": "prompt tuning", "e": "IA3"}, "stays in front of every text"),
    ("11.4", CHOICES | {"a": "rsLoRA", "d": "LoRA"}, "the root of the rank"),
    ("11.4", CHOICES | {"b": "LoRA", "a": "full"}, "what is left"),
    ("11.4", CHOICES | {"d": "IA3", "c": "rsLoRA"}, "divides by less"),
    ("11.4", CHOICES | {"e": "LoRA", "a": "prompt tuning"}, "nothing but inputs"),
    ("11.4", CHOICES | {"c": "LoRA", "a": "IA3"}, "fits and merges"),
    ("11.4", {"a": "LoRA"}, "the letters a to e"),
    ("11.5", best_of, "return None"),
    ("11.5", lambda losses: beyond_the_edge(losses) or best_of(losses), "return None"),
    ("11.5", lambda losses: 3 * max(losses) if best_of(losses) == max(losses) else None, "lowest"),
    ("11.5", lambda losses: min(losses) / 3 if best_of(losses) == min(losses) else None, "highest"),
    ("11.5", nan_wins, "Without nan it is right"),
    ("11.5", lambda losses: 1e-3, "First the rate"),
]
