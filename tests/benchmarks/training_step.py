"""Tokens per second, memory and loss of three ways to train the same adapter on the same rows.

    python tests/benchmarks/training_step.py [--steps 24] [--rounds 2]

    tutorial   Trainer, every row padded to 256 tokens, loss on all tokens (the common recipe)
    trl        TRL's SFTTrainer with its defaults: padded to the longest row, loss on the answer
    course     helpers.training

Every run is a process of its own, so that its peak memory is its own; the three alternate, so
that a slow moment of the machine does not fall on one of them. Tokens are counted without padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

WAYS = ("tutorial", "trl", "course")
PADDED_LENGTH = 256
VALIDATION_ROWS = 54


def train(way: str, steps: int) -> dict[str, Any]:
    """Train one way for `steps` steps and measure it."""
    import warnings

    warnings.simplefilter("ignore")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    from helpers import data, encoding, evaluation, memory, models, profiles, training

    profile = profiles.pick_profile("laptop", verbose=False)
    tokenizer = models.load_tokenizer(profile)
    triage = data.load_triage()
    rows = triage["train"].select(range(steps * profile.batch_size))
    set_seed(0)
    model = training.add_adapter(models.load_model(profile), profile)
    memory_before = memory.peak_memory_bytes()
    timer: TrainerCallback = training.StepTimer()
    folder = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "num_train_epochs": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "seed": 0,
    }
    if way == "course":
        args = training.training_arguments(profile, folder, steps, **common)
        features = encoding.encode(rows, tokenizer, profile.max_length)
        trainer = training.make_trainer(model, args, features, None, tokenizer, (timer,))
    elif way == "tutorial":
        args = training.training_arguments(
            profile, folder, steps, train_sampling_strategy="random", **common
        )
        texts = ["".join(encoding.split_text(row, tokenizer)) for row in rows]
        padded = tokenizer(texts, padding="max_length", max_length=PADDED_LENGTH, truncation=True)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=[{"input_ids": ids} for ids in padded["input_ids"]],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[timer],
        )
    else:
        from trl import SFTConfig, SFTTrainer

        # The course's settings where they are common to both; TRL's own defaults elsewhere.
        ours = training.training_arguments(profile, folder, steps, **common)
        names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "bf16")
        names += ("per_device_train_batch_size", "use_cpu", "seed", "num_train_epochs")
        names += ("eval_strategy", "save_strategy", "report_to", "dataloader_pin_memory")
        shared = {name: getattr(ours, name) for name in names}
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=folder, gradient_checkpointing=False, **shared),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
            callbacks=[timer],
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    peak = memory.peak_memory_bytes()
    tokens = sum(encoding.encode(rows, tokenizer, profile.max_length)["length"])
    held_out = triage["validation"].select(range(VALIDATION_ROWS))
    return {
        "way": way,
        "tokens_per_second": tokens / timer.seconds,
        "seconds": timer.seconds,
        "peak_memory": peak,
        "memory_before": memory_before,
        "validation_loss": evaluation.answer_losses(model, tokenizer, held_out)["loss"],
    }


def main() -> None:
    """Run the rounds and print one line per way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(train(options.way, options.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--steps", str(options.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
    speed = {
        way: statistics.median(run["tokens_per_second"] for run in runs)
        for way, runs in results.items()
    }
    print("way       tokens/s  course is  peak memory  of it training  validation loss")
    for way, runs in results.items():
        print(
            f"{way:9} {speed[way]:8.0f} {speed['course'] / speed[way]:9.2f}x"
            f" {max(run['peak_memory'] for run in runs) / 2**20:8.0f} MiB"
            f" {max(run['peak_memory'] - run['memory_before'] for run in runs) / 2**20:11.0f} MiB"
            f" {statistics.median(run['validation_loss'] for run in runs):16.4f}"
        )


if __name__ == "__main__":
    main()
