"""Fine-tuning, thin over transformers' Trainer and PEFT.

The notebooks call `LoraConfig`, `TrainingArguments` and `Trainer` themselves; here is what the
command and several notebooks share.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.notebook import NotebookProgressCallback

from helpers import CourseError
from helpers.encoding import CompletionCollator
from helpers.logs import quiet
from helpers.profiles import Profile
from helpers.workarounds import apply_workarounds


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

    The validation loss is measured about six times, so that `helpers.diagnosis` has a curve to
    read, and the training loss four times as often: then each checkpoint falls on a logged step,
    and a resumed run logs the same means as one that was never interrupted.
    """
    log = max(1, math.ceil(steps / 24))
    every = 4 * log if steps >= 24 else max(1, math.ceil(steps / 6))
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": profile.epochs,
        "per_device_train_batch_size": profile.batch_size,
        "per_device_eval_batch_size": profile.eval_batch_size,
        "learning_rate": profile.learning_rate,
        "lr_scheduler_type": "cosine",
        # In the first step of a warm-up the rate is zero: a single step would train nothing.
        "warmup_steps": max(1, steps // 20) if steps > 1 else 0,
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
        "logging_steps": log,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "prediction_loss_only": True,
        "dataloader_pin_memory": profile.device == "cuda",
        "use_cpu": profile.device == "cpu",
        "report_to": "none",
        "seed": 42,
    }
    return TrainingArguments(**settings | overrides)


def optimizer_steps(rows: int, batch_size: int, epochs: float, accumulation: int = 1) -> int:
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
            self._write(
                f"step {state.global_step:>4}/{state.max_steps}  "
                f"train loss {self._train_loss:.3f}  validation loss {logs['eval_loss']:.3f}  "
                f"{time.perf_counter() - self._start:4.0f} s"
            )

    def _write(self, line: str) -> None:
        print(line, flush=True)


class Progress(OneLineProgress):
    """`OneLineProgress`, with a bar below it where a person watches a terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            leave=False,
            disable=None if state.is_world_process_zero else True,  # None: where it is no terminal
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()

    def _write(self, line: str) -> None:
        with tqdm.external_write_mode():
            print(line, flush=True)


def make_trainer(
    model: PreTrainedModel | PeftModel,
    args: TrainingArguments,
    train: Dataset,
    validation: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer_class: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    """A `Trainer` for features of `helpers.encoding.encode`, without its own progress output.

    Args:
        trainer_class, options: a subclass of `Trainer`, and what its constructor takes besides.
    """
    if len(train) == 0:
        raise CourseError("There is nothing to train on: the train split has no rows.")
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    trainer = trainer_class(
        model=apply_workarounds(model),
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=CompletionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **options,
    )
    remove_progress_callbacks(trainer)
    return trainer


def remove_progress_callbacks(trainer: Trainer) -> None:
    """Remove the callbacks by which a `Trainer` prints a bar, a table or dictionaries."""
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)


def curves(trainer: Trainer) -> tuple[list[list[float]], list[list[float]]]:
    """The run's losses as ([[step, train loss], ...], [[step, validation loss], ...])."""
    history = trainer.state.log_history
    train = [[entry["step"], entry["loss"]] for entry in history if "loss" in entry]
    evals = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    return train, evals
