"""The stored training runs that notebook 07 compares: one line per run in data/curves.jsonl.

    python tests/benchmarks/overfitting_runs.py [--output FILE] [--list]

Every run trains SmolLM2-135M with LoRA on few rows, for the same number of steps, and differs from
the baseline in one setting. The seed decides which rows are taken, the start of the adapter and
the order of the batches, so two runs of one seed differ in the setting alone. A run that stands in
the file is skipped: stop the script whenever you like, and start it again. About two minutes a run
on one core.

What is measured at every evaluation, always on the same 24 validation rows:

    eval              mean loss per answer token, in nats
    value_loss        the same over the tokens of the JSON values alone
    row_loss          mean loss of every single row
    eval_exact_match  share of rows whose answer is right in every token
    fields_right      share of the fields (four per row) that are right in every token
    value_accuracy    share of the value tokens that are right
    confidence        mean probability of the likeliest token at the value tokens

The tokens are those that the model finds likeliest after the *right* beginning of the answer. For
a whole answer this is the same as greedy generation: that goes wrong at the first wrong token.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, set_seed

from helpers import data, encoding, evaluation, models, profiles, training

OUTPUT = Path(__file__).resolve().parents[2] / "data" / "curves.jsonl"
LONGEST = 64  # tokens; the short rows, for speed
VALIDATION_ROWS = 24
STEPS, BATCH_SIZE, EVAL_EVERY, LOG_EVERY = 40, 4, 5, 2
BASELINE = {"rows": 8, "rank": 32, "learning_rate": 1e-3, "dropout": 0.0, "weight_decay": 0.0}
CHANGES: dict[str, dict[str, float]] = {
    "baseline": {},
    "155 rows": {"rows": 155},
    "32 rows": {"rows": 32},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "rank 2": {"rank": 2},
    "dropout 0.2": {"dropout": 0.2},
    "weight decay 0.1": {"weight_decay": 0.1},
}
SEEDS = (0, 1, 2)


def short_rows(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """The rows of a split that are at most LONGEST tokens long, and their features."""
    features = encoding.encode(split, tokenizer, max_length=512)
    chosen = [index for index, length in enumerate(features["length"]) if length <= LONGEST]
    return split.select(chosen), features.select(chosen)


def reduce(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits (rows, K, vocabulary) -> likeliest token, its probability, log-probability of the
    label: three tensors (rows, K - 1), where position i is about label i + 1."""
    logp = logits.float().log_softmax(-1)[:, :-1]
    best, token = logp.max(-1)
    wanted = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    return token, best.exp(), logp.gather(-1, wanted).squeeze(-1)


class Measure:
    """What `Trainer` calls as `compute_metrics`; `rows` are those of the evaluation, in order."""

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        # For every row one mask (answer length,) per field: the tokens that hold its value.
        self.fields: list[list[np.ndarray]] = []
        for row in rows:
            _, answer = encoding.split_text(row, tokenizer)
            encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
            offsets = np.array(encoded["offset_mapping"])
            spans = evaluation.value_spans(answer.removesuffix(tokenizer.eos_token))
            self.fields.append([(offsets[:, 0] < b) & (offsets[:, 1] > a) for a, b in spans])

    def __call__(self, prediction: EvalPrediction) -> dict[str, Any]:
        """All that the head of this file lists, except the loss, which `Trainer` adds."""
        tokens, confidence, logp = prediction.predictions
        labels = prediction.label_ids[:, 1:]
        exact, fields, row_loss, value_right, value_sure, value_loss = [], [], [], [], [], []
        for index, masks in enumerate(self.fields):
            answer = labels[index] != encoding.IGNORED
            right = (tokens[index] == labels[index])[answer]
            values = np.any(masks, axis=0)
            exact.append(right.all())
            fields += [right[mask].all() for mask in masks]
            row_loss.append(round(-float(logp[index][answer].mean()), 3))
            value_right.append(right[values])
            value_sure.append(confidence[index][answer][values])
            value_loss.append(-logp[index][answer][values])
        return {
            "exact_match": float(np.mean(exact)),
            "fields_right": float(np.mean(fields)),
            "row_loss": row_loss,
            "value_accuracy": float(np.concatenate(value_right).mean()),
            "confidence": float(np.concatenate(value_sure).mean()),
            "value_loss": float(np.concatenate(value_loss).mean()),
        }


def train(settings: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Make one run. Returns what a line of the file holds."""
    began = time.perf_counter()
    profile = profiles.pick_profile("laptop", verbose=False)
    tokenizer = models.load_tokenizer(profile)
    triage = data.load_triage()
    _, features = short_rows(triage["train"], tokenizer)
    features = features.shuffle(seed=settings["seed"]).select(range(settings["rows"]))
    rows, watched = short_rows(triage["validation"], tokenizer)
    rows, watched = (part.select(range(VALIDATION_ROWS)) for part in (rows, watched))

    set_seed(settings["seed"])
    model = training.add_adapter(
        models.load_model(profile), profile, settings["rank"], lora_dropout=settings["dropout"]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = training.training_arguments(
            profile,
            folder,
            steps,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=8,
            train_sampling_strategy="random",
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            eval_steps=EVAL_EVERY,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            prediction_loss_only=False,
            seed=settings["seed"],
        )
        timer, progress = training.StepTimer(), training.OneLineProgress()
        trainer = training.make_trainer(
            model, arguments, features, watched, tokenizer, (timer, progress)
        )
        trainer.compute_metrics = Measure(rows, tokenizer)
        trainer.preprocess_logits_for_metrics = reduce
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]

    def curve(name: str) -> list[list[Any]]:
        values = [entry[f"eval_{name}"] for entry in history]
        values = [round(v, 4) if isinstance(v, float) else v for v in values]
        return [[entry["step"], value] for entry, value in zip(history, values, strict=True)]

    return {
        **settings,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "train": [[step, round(loss, 4)] for step, loss in training.curves(trainer)[0]],
        "eval": curve("loss"),
        "value_loss": curve("value_loss"),
        "eval_exact_match": curve("exact_match"),
        "fields_right": curve("fields_right"),
        "value_accuracy": curve("value_accuracy"),
        "confidence": curve("confidence"),
        "row_loss": curve("row_loss"),
        "exact_match": round(history[-1]["eval_exact_match"], 4),
        "train_seconds": round(timer.seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "precision": profile.precision,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def planned() -> list[dict[str, Any]]:
    """The settings of all runs: every change for the first seed, then for the next."""
    return [
        {"name": name, "seed": seed, **BASELINE, **change}
        for seed in SEEDS
        for name, change in CHANGES.items()
    ]


def main() -> None:
    """Make the runs that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--list", action="store_true", help="say which runs are missing, and stop")
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    if options.output.exists():
        done = [json.loads(line) for line in options.output.read_text("utf-8").splitlines()]
    made = [{key: run[key] for key in planned()[0]} for run in done]
    missing = [settings for settings in planned() if settings not in made]
    print(f"{len(planned()) - len(missing)} of {len(planned())} runs are in {options.output.name}")
    for number, settings in enumerate(missing, start=1):
        print(f"{number}/{len(missing)}: {settings}", flush=True)
        if options.list:
            continue
        done.append(train(settings))
        unfinished = options.output.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(run) + "\n" for run in done), encoding="utf-8")
        os.replace(unfinished, options.output)  # a run is in the file whole or not at all


if __name__ == "__main__":
    main()
