"""Fine-tuning, thin over transformers' Trainer and PEFT.

The notebooks call `LoraConfig`, `TrainingArguments` and `Trainer` themselves; what stands here is
what the command and several notebooks need in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.notebook import NotebookProgressCallback

from helpers import CourseError
from helpers.data import CompletionCollator, encode, load_triage
from helpers.models import cache_dir, load_model, load_tokenizer, quiet, ready
from helpers.profiles import Profile

METHODS = ("lora", "qlora", "full")
# Tokens; notebook 05 learns from the rows up to here: with the longer ones it takes over 5 minutes.
LESSON_LENGTH = 80


def lora_config(profile: Profile, rank: int | None = None, **overrides: Any) -> LoraConfig:
    """The profile's `LoraConfig`; `lora_alpha` is twice the rank, so the update's scale is 2."""
    rank = rank or profile.lora_rank
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "target_modules": list(profile.target_modules),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**settings | overrides)


def add_adapter(
    model: PreTrainedModel, profile: Profile, rank: int | None = None, **overrides: Any
) -> PeftModel:
    """Freeze a model, quantized or not, and add the profile's LoRA adapter to it."""
    with quiet():
        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=profile.gradient_checkpointing
            )
        return get_peft_model(model, lora_config(profile, rank, **overrides))


def training_arguments(
    profile: Profile, output_dir: str | Path, steps: int, **overrides: Any
) -> TrainingArguments:
    """The profile's `TrainingArguments` for a run of `steps` optimizer steps.

    The validation loss is measured six times, so that `helpers.diagnosis` has a curve to read.
    """
    every = max(1, math.ceil(steps / 6))
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": profile.epochs,
        "per_device_train_batch_size": profile.batch_size,
        "per_device_eval_batch_size": profile.eval_batch_size,
        "learning_rate": profile.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "max_grad_norm": 1.0,
        "bf16": profile.precision == "bf16",
        "fp16": profile.precision == "fp16",
        "activation_checkpointing": profile.gradient_checkpointing,  # its name since 5.x
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "logging_steps": max(1, every // 4),
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "prediction_loss_only": True,
        "dataloader_pin_memory": profile.device == "cuda",
        "use_cpu": profile.device == "cpu",
        "report_to": "none",
        "seed": 42,
    }
    return TrainingArguments(**settings | overrides)


def tuned_adapter(profile: Profile) -> Path:
    """The folder of the course's fine-tuned adapter: one epoch over the rows of notebook 05.

    Several notebooks look at the same fine-tuned model. It is trained once, with the profile's own
    settings and seed 42 (some minutes on a CPU, with a line of progress per evaluation), and kept
    in the cache. `PeftModel.from_pretrained(model, folder)` loads it.
    """
    target = tuned_folder(profile)
    if (target / "adapter_model.safetensors").is_file():
        print("The fine-tuned adapter comes from the cache of an earlier run.")
        return target
    print("Training the adapter (once; it is kept for the other notebooks) ...")
    tokenizer = load_tokenizer(profile)
    triage = load_triage()
    rows = up_to(encode(triage["train"], tokenizer, profile.max_length), LESSON_LENGTH)
    watched = encode(triage["validation"].select(range(16)), tokenizer, profile.max_length)
    steps = steps_for(len(rows), profile.batch_size, 1)
    set_seed(42)
    model = add_adapter(load_model(profile), profile)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
        arguments = training_arguments(
            profile, folder, steps, num_train_epochs=1, save_strategy="no"
        )
        make_trainer(model, arguments, rows, watched, tokenizer, (OneLineProgress(),)).train()
        model.save_pretrained(Path(folder) / "adapter")
        shutil.rmtree(target, ignore_errors=True)  # of a notebook that was stopped while it saved
        os.replace(Path(folder) / "adapter", target)
    return target


def up_to(features: Dataset, length: int) -> Dataset:
    """The features of `helpers.data.encode` that are at most `length` tokens long."""
    return features.select([i for i, n in enumerate(features["length"]) if n <= length])


def tuned_folder(profile: Profile) -> Path:
    """Where `tuned_adapter` keeps its adapter; another profile or other data give another one."""
    settings = json.dumps(dataclasses.asdict(profile) | {"up to": LESSON_LENGTH}, sort_keys=True)
    rows = "".join(load_triage()["train"]["message"])
    digest = hashlib.sha256((settings + rows).encode()).hexdigest()
    return cache_dir() / "runs" / f"tuned-{digest[:12]}"


def steps_for(rows: int, batch_size: int, epochs: float, accumulation: int = 1) -> int:
    """Optimizer steps of a run, counted as Trainer counts them."""
    per_epoch = max(1, math.ceil(math.ceil(rows / batch_size) / accumulation))
    return math.ceil(per_epoch * epochs)


class StepTimer(TrainerCallback):
    """Add up the seconds spent in training steps, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self.steps += 1
            self._started = None


class OneLineProgress(TrainerCallback):
    """Print one line per evaluation: step, both losses, seconds so far."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self._train_loss = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **kwargs: Any) -> None:
        self._train_loss = logs.get("loss", self._train_loss)
        if "eval_loss" in logs:
            print(
                f"step {state.global_step:>4}/{state.max_steps}  "
                f"train loss {self._train_loss:.3f}  validation loss {logs['eval_loss']:.3f}  "
                f"{time.perf_counter() - self._start:4.0f} s",
                flush=True,
            )


def make_trainer(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    train: Dataset,
    validation: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Trainer:
    """A `Trainer` for features of `helpers.data.encode`, without its own progress output."""
    if len(train) == 0:
        raise CourseError("There is nothing to train on: the train split has no rows.")
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    trainer = Trainer(
        model=ready(model),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CompletionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    silence(trainer)
    return trainer


def silence(trainer: Trainer) -> None:
    """Take away the bar, table or dictionaries that a `Trainer` prints by itself."""
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in a folder, or None.

    A run that is killed while it saves leaves a checkpoint without `trainer_state.json`, which is
    written last; such a one is passed over.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    complete = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
        and (path / "trainer_state.json").is_file()
    ]
    newest = max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)
    return str(newest) if newest else None


def curves(trainer: Trainer) -> tuple[list[list[float]], list[list[float]]]:
    """The run's losses as ([[step, train loss], ...], [[step, validation loss], ...])."""
    history = trainer.state.log_history
    train = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    evals = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    return train, evals


def trainable_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) weights of a model; a 4-bit weight counts as one, not as half a byte."""
    trainable = total = 0
    for parameter in model.parameters():
        quant_state = getattr(parameter, "quant_state", None)
        count = math.prod(quant_state.shape) if quant_state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
