"""Which runs there are: each experiment is a question and the runs that answer it.

Every choice is made on the validation split. The test split is scored at the end of the runs of
`ways` and `rows` alone, once each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from helpers.experiments import read
from helpers.methods import METHODS

SEEDS = (0, 1, 2)
SIZES = (16, 32, 64, 128, 256, 456)  # labelled rows; the last is the whole train split


@dataclass(frozen=True)
class Trial:
    """A run to be made.

    Attributes:
        label, seed: together its name within the experiment.
        settings: fields of `helpers.config.RunConfig`, and
            way: "rules", or a way to prompt; a training without it
            rows: learn from this many, drawn by the seed
            short: learn from short rows alone and watch some of validation, as notebook 07 does
            scratch: start from random parameters
            peft: a key of `helpers.methods.METHODS`, in place of LoRA
            lora, arguments: further settings of `LoraConfig` and `TrainingArguments`
    """

    label: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A question and its runs.

    Attributes:
        plan: the runs that are known so far. Later stages follow from the records of earlier ones.
        scored: when the validation split is answered: "end", or after every "epoch" too; with
            "evaluation" it is scored after the reference's beginnings, whenever the loss is taken.
        answered: write the answers to the validation split at the end; without it they are judged
            after the reference's beginnings, which is faster.
        tested: answer the test split at the end.
    """

    question: str
    plan: Callable[[], list[Trial]]
    scored: str = "end"
    answered: bool = True
    tested: bool = False


START = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 8, "rank": 16, "alpha": 32}

# The recipe is chosen among these, by the mean of three seeds.
CANDIDATES: dict[str, dict[str, Any]] = {
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "learning rate 1e-3": {},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "batch size 8, learning rate 1e-3": {"batch_size": 8},
    "batch size 8, learning rate 2e-3": {"batch_size": 8, "learning_rate": 2e-3},
}
# What else is changed, one thing at a time or two that belong together.
VARIATIONS: dict[str, dict[str, Any]] = {
    "learning rate 2e-4": {"learning_rate": 2e-4},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "rank 4": {"rank": 4, "alpha": 8},
    "rank 64": {"rank": 64, "alpha": 128},
    "rank 4, learning rate 2e-3": {"rank": 4, "alpha": 8, "learning_rate": 2e-3},
    "rank 64, learning rate 5e-4": {"rank": 64, "alpha": 128, "learning_rate": 5e-4},
    "alpha 16": {"alpha": 16},
    "alpha 64": {"alpha": 64},
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "queries and values only": {"target_modules": ["q_proj", "v_proj"]},
    "MLP only": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "dropout 0.1": {"lora": {"lora_dropout": 0.1}},
    "4 epochs": {"epochs": 4},
    "4 epochs, learning rate 2e-3": {"epochs": 4, "learning_rate": 2e-3},
    "constant learning rate": {"arguments": {"lr_scheduler_type": "constant_with_warmup"}},
}
# Rates for the ways that are not LoRA in 16 or 32 bits.
OTHER_RATES = {
    "qlora": (5e-4, 1e-3, 2e-3),
    "full": (5e-5, 1e-4, 2e-4, 4e-4),
    "from scratch": (3e-4, 1e-3, 3e-3),
}


def _way(name: str) -> dict[str, Any]:
    if name == "qlora":
        return {**START, "method": "qlora"}
    without_lora = {key: START[key] for key in ("batch_size", "epochs")}
    return {**without_lora, "method": "full"} | ({"scratch": True} if "scratch" in name else {})


def _at(name: str, rate: float) -> str:
    """The label of a run at a learning rate."""
    return f"{name}, learning rate {rate:.0e}".replace("e-0", "e-")


def rates() -> list[Trial]:
    """The candidates for the recipe over three seeds, and the learning rates of other ways."""
    trials = [
        Trial(label, seed, START | change) for seed in SEEDS for label, change in CANDIDATES.items()
    ]
    return trials + [
        Trial(_at(name, rate), 0, _way(name) | {"learning_rate": rate})
        for name, tried in OTHER_RATES.items()
        for rate in tried
    ]


def settings() -> list[Trial]:
    """What else can be set, seed by seed; `learning rate 1e-3` of `rates` is their middle."""
    return [
        Trial(label, seed, START | change) for seed in SEEDS for label, change in VARIATIONS.items()
    ]


def best(records: list[dict[str, Any]], labels: Iterable[str]) -> str | None:
    """The label with the highest mean exact match on validation; None before all are recorded.

    Of equal ones the one with the lowest loss.
    """

    def means(label: str) -> tuple[float, float]:
        found = [r["validation"] for r in records if r["label"] == label]
        exact, loss = ([score[key] for score in found] for key in ("exact_match", "loss"))
        return round(sum(exact) / len(exact), 6), -sum(loss) / len(loss)

    labels = list(labels)
    if not set(labels) <= {record["label"] for record in records}:
        return None
    return max(labels, key=means)


def recipe() -> dict[str, Any] | None:
    """The settings of LoRA that the other experiments use; None until the candidates are done."""
    records = [record for record in read("rates") if record["label"] in CANDIDATES]
    if len(records) < len(CANDIDATES) * len(SEEDS):
        return None
    return START | CANDIDATES[best(records, CANDIDATES) or ""]


PROMPTS = tuple(
    f"{examples}{instruction}{schema}"
    for instruction in ("", ", spelled out")
    for examples in ("zero-shot", "few-shot")
    for schema in ("", " + schema")
)


def ways() -> list[Trial]:
    """One task, from rules to full fine-tuning, each at its own best learning rate."""
    trials = [Trial(name, 0, {"way": name}) for name in ("rules", *PROMPTS)]
    chosen, records = recipe(), read("rates")
    if chosen is None:
        return trials
    trials += [Trial("lora", seed, chosen) for seed in SEEDS]
    for name, tried in OTHER_RATES.items():
        by_label = {_at(name, rate): rate for rate in tried}
        if found := best(records, by_label):
            change = {"learning_rate": by_label[found]}
            trials += [Trial(name, seed, _way(name) | change) for seed in SEEDS]
    return trials


def rows() -> list[Trial]:
    """LoRA and rules on the same rows. Fewer rows are read more often, but in fewer steps.

    LoRA on the whole train split is recorded in `ways`.
    """
    trials = [
        Trial(f"rules, {size} rows", seed, {"way": "rules", "rows": size})
        for size in SIZES
        for seed in SEEDS
    ]
    if (chosen := recipe()) is None:
        return trials
    for size in SIZES[-2::-1]:
        epochs = round(chosen["epochs"] * (SIZES[-1] / size) ** 0.5)
        change = {"rows": size, "epochs": epochs}
        trials += [Trial(f"lora, {size} rows", seed, chosen | change) for seed in SEEDS]
    return trials


FEW = {"rows": 8, "short": True, "rank": 32, "alpha": 64, "learning_rate": 1e-3}
FEW |= {"batch_size": 4, "epochs": 20}
CURES: dict[str, dict[str, Any]] = {
    "8 rows": {},
    "155 rows": {"rows": 155, "epochs": 2},  # all that are short; forty steps are once and a bit
    "32 rows": {"rows": 32, "epochs": 5},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "rank 2": {"rank": 2, "alpha": 4},
    "dropout 0.2": {"lora": {"lora_dropout": 0.2}},
    "weight decay 0.1": {"arguments": {"weight_decay": 0.1}},
}


def cures() -> list[Trial]:
    """Eight rows, forty steps, at a constant rate: overfitting on purpose, and what helps."""
    arguments = {
        "max_steps": 40,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "eval_steps": 5,
        "train_sampling_strategy": "random",
    }
    return [
        Trial(
            label,
            seed,
            FEW | change | {"arguments": arguments | change.get("arguments", {})},
        )
        for seed in SEEDS
        for label, change in CURES.items()
    ]


TIE = 0.01  # nats


def methods() -> list[Trial]:
    """Each method of PEFT for one epoch at three rates or more; then longer, over three seeds.

    Where the rate with the lowest loss is the lowest or the highest that was tried, one beyond it
    is tried too, at most twice. Of the rates within `TIE` of the lowest loss the lowest is taken:
    longer runs want lower rates, and at lower rates a model forgets less. Where that is another
    rate than the one of the lowest loss, both are recorded.
    """
    half = {"rows": 228, "batch_size": 4, "method": "full", "arguments": {"eval_strategy": "no"}}
    losses = {
        record["label"]: math.inf if (loss := record["validation"]["loss"]) is None else loss
        for record in read("methods")
    }

    def short(name: str, rate: float) -> Trial:
        change = {"epochs": 1, "peft": name, "learning_rate": rate}
        return Trial(f"{_at(name, rate)}, one epoch", 0, half | change)

    def swept(name: str, rates: list[float]) -> tuple[list[float], list[float]]:
        """The rates to be tried, and the best of them once all are recorded: one, or two."""
        by_rate = {rate: losses.get(short(name, rate).label) for rate in rates}
        if None in by_rate.values():
            return rates, []
        found = min(by_rate, key=by_rate.__getitem__)
        step = round(max(rates) / sorted(rates)[-2], 1)
        beyond = {min(rates): min(rates) / step, max(rates): max(rates) * step}.get(found)
        if beyond is None or len(rates) >= len(METHODS[name].rates) + 2:
            near = [rate for rate in rates if by_rate[rate] <= by_rate[found] + TIE]
            return rates, sorted({min(near), found})
        return swept(name, [*rates, float(f"{beyond:.0e}")])

    tried = {name: swept(name, list(method.rates)) for name, method in METHODS.items()}
    return [short(name, rate) for name, (rates, _) in tried.items() for rate in rates] + [
        Trial(_at(name, rate), seed, half | {"epochs": 3, "peft": name, "learning_rate": rate})
        for seed in SEEDS
        for name, (_, best_rates) in tried.items()
        for rate in best_rates
    ]


EXPERIMENTS = {
    "rates": Experiment("Which learning rate, which batch size, how many epochs?", rates, "epoch"),
    "ways": Experiment(
        "What do rules, prompts and training reach on the same rows?", ways, tested=True
    ),
    "rows": Experiment("From how many labelled rows on does it pay?", rows, tested=True),
    "settings": Experiment("What do rank, alpha, targets and the rest change?", settings),
    "methods": Experiment("Which PEFT method, each at its own best rate?", methods, answered=False),
    "cures": Experiment("What helps against overfitting?", cures, "evaluation"),
}
