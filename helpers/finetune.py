"""Fine-tune a model from the command line: the notebooks' training as one command.

    python -m helpers.finetune --output runs/first
    python -m helpers.finetune --train my.jsonl --validation mine.jsonl --output runs/mine

Rows are JSONL, CSV or Parquet with prompt and completion, or messages. Without --train the course's
own tickets are used. It writes into the output folder:

    adapter/         the LoRA adapter in safetensors (model/ after --method full)
    metrics.json     scores before and after, losses, seconds, tokens per second, peak memory
    history.json     {"train": [[step, loss], ...], "eval": [[step, loss], ...]}
    diagnosis.json   what the curves say
    answers.json     every answer on the test split, before and after
    checkpoint-*     from which --resume continues

Several processes, one for each GPU, share every step and the scoring:

    accelerate launch --num_processes 2 -m helpers.finetune --output runs/two
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed

from helpers import (
    CourseError,
    data,
    encoding,
    evaluation,
    models,
    profiles,
    statistics,
    tracking,
    training,
)
from helpers import rows as row_files
from helpers.diagnosis import diagnose
from helpers.memory import peak_memory_bytes

FULL_LEARNING_RATE = 5e-5  # full fine-tuning moves every weight, so it needs smaller steps
WATCHED_ROWS = 48  # enough to see the trend while training; more would cost more than they tell


def finetune(
    output: str | Path,
    train: str | Path | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    profile: str | None = None,
    method: str | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    rank: int | None = None,
    seed: int = 42,
    resume: bool = False,
    track: str = "off",
) -> dict[str, Any]:
    """Fine-tune, score before and after on the same test rows, and write the files named above.

    Args:
        output: a new folder, or with `resume` that of a run that was interrupted.
        train, validation, test: files of rows; without `train` the course's own data.
        profile: "tiny", "laptop" or "falcon-7b"; picked from the machine if not given.
        method: "lora", "qlora" (frozen weights in 4 bits) or "full"; the profile's if not given.
        epochs, learning_rate, batch_size, rank: the profile's if not given. The batch size is that
            of one process: two processes take steps of twice as many rows.
        track: "off", "offline" or "online", see `helpers.tracking`.

    Returns:
        What stands in metrics.json.

    Raises:
        CourseError: for bad rows or settings, before anything is trained.
    """
    began = time.perf_counter()
    output = Path(output)
    chosen = profiles.pick_profile(profile)
    method = method or ("qlora" if chosen.quantized else "lora")
    default_rate = FULL_LEARNING_RATE if method == "full" else chosen.learning_rate
    chosen = dataclasses.replace(
        chosen,
        epochs=epochs or chosen.epochs,
        learning_rate=learning_rate or default_rate,
        batch_size=batch_size or chosen.batch_size,
        lora_rank=rank or chosen.lora_rank,
    )
    checkpoint = _require_output(output, resume)
    processes = PartialState(cpu=chosen.device == "cpu")  # alone, or one of several
    report_to = tracking.report_to(track, output)

    rows = _load_rows(train, validation, test)
    tokenizer = models.load_tokenizer(chosen)
    features = {
        name: encoding.encode(split, tokenizer, chosen.max_length) for name, split in rows.items()
    }
    set_seed(seed)
    model = models.load_model(chosen, _precision(method, chosen))
    output.mkdir(parents=True, exist_ok=True)

    answers, scores = {}, {}
    if "test" in rows:
        scores["base"], answers["base"] = _score(
            model, tokenizer, rows["test"], features["test"], processes
        )
        print(f"base model: {scores['base']['exact_match']:.1%} exact on the test split")

    set_seed(seed)
    if method != "full":
        model = training.add_adapter(model, chosen)
    total = model.num_parameters()
    trainable = model.num_parameters(only_trainable=True)
    print(f"{method}: training {trainable:,} of {total:,} weights ({trainable / total:.2%})")
    watched = features["validation"].shuffle(seed=0)
    count, eval_batch_size = _evaluation_batches(
        min(WATCHED_ROWS, len(watched)), chosen.eval_batch_size, processes.num_processes
    )
    watched = watched.select(range(count))
    print(f"while training, the validation loss is that of {len(watched)} rows")
    timer = training.StepTimer()
    trainer = training.make_trainer(
        model,
        training.training_arguments(
            chosen,
            output,
            training.optimizer_steps(
                len(features["train"]), chosen.batch_size * processes.num_processes, chosen.epochs
            ),
            seed=seed,
            per_device_eval_batch_size=eval_batch_size,
            ddp_find_unused_parameters=False,  # every adapter takes part in every step
            report_to=report_to,
        ),
        features["train"],
        watched,
        tokenizer,
        (timer, training.OneLineProgress()),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    peak = max(_gather([peak_memory_bytes()], processes))

    if "test" in rows:
        scores["test"], answers["test"] = _score(
            model, tokenizer, rows["test"], features["test"], processes
        )
        losses = evaluation.answer_losses(model, tokenizer, rows["test"])
    train_curve, eval_curve = training.curves(trainer)
    diagnosis = diagnose(train_curve, eval_curve)
    tokens = sum(features["train"]["length"]) / len(features["train"])
    tokens_per_step = tokens * chosen.batch_size * processes.num_processes
    metrics = {
        "base_exact_match": scores["base"]["exact_match"] if scores else None,
        "test_exact_match": scores["test"]["exact_match"] if scores else None,
        "test_fields": scores["test"]["fields"] if scores else None,
        "test_valid_json": scores["test"]["valid_json"] if scores else None,
        "test_rows": len(rows["test"]) if "test" in rows else 0,
        "test_loss": losses["loss"] if scores else None,
        "test_value_loss": losses["value_loss"] if scores else None,
        "validation_loss": eval_curve[-1][1] if eval_curve else None,
        "train_seconds": round(timer.seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "tokens_per_second": round(tokens_per_step * timer.steps / timer.seconds, 1)
        if timer.steps
        else None,
        "peak_memory_bytes": peak,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "method": method,
        "processes": processes.num_processes,
        "seed": seed,
        "profile": dataclasses.asdict(chosen),
    }
    # All processes call this, since a model may be spread over them; the first one writes.
    trainer.save_model(output / ("model" if method == "full" else "adapter"))
    if processes.is_main_process:
        _write(output / "history.json", {"train": train_curve, "eval": eval_curve})
        _write(output / "diagnosis.json", diagnosis.to_dict())
        if answers:
            _write(output / "answers.json", answers)
        _write(output / "metrics.json", metrics)
    print(f"diagnosis: {diagnosis.verdict}. {diagnosis.explanation}")
    if scores:
        low, high = statistics.wilson_interval(metrics["test_exact_match"], len(rows["test"]))
        print(
            f"exact match on the test split: {metrics['base_exact_match']:.1%} before, "
            f"{metrics['test_exact_match']:.1%} after (95 % interval {low:.0%} to {high:.0%})"
        )
    print(f"{metrics['total_seconds']:.0f} s in all; everything is in {output}")
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        processes.destroy_process_group()
    return metrics


def _require_output(output: Path, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a new run; CourseError if the two do not fit."""
    if (output / "metrics.json").exists():
        raise CourseError(f"{output} holds a finished run. Name another --output folder.")
    checkpoint = training.last_checkpoint(output)
    if checkpoint and not resume:
        raise CourseError(
            f"{output} holds an interrupted run. Add --resume to continue it, or name another "
            f"--output folder."
        )
    if resume and not checkpoint:
        raise CourseError(
            f"{output} holds no complete checkpoint to resume from. Leave out --resume to start."
        )
    return checkpoint


def _load_rows(
    train: str | Path | None, validation: str | Path | None, test: str | Path | None
) -> dict[str, Dataset]:
    if train is None:
        if validation or test:
            raise CourseError("--validation and --test need --train: they belong together.")
        return dict(data.load_triage())
    if validation is None:
        raise CourseError(
            "--train needs --validation: rows that are not trained on show whether it overfits."
        )
    files = {"train": train, "validation": validation, "test": test}
    rows = {name: row_files.load_examples(path) for name, path in files.items() if path}
    row_files.check_splits(**rows)
    return rows


def _precision(method: str, profile: profiles.Profile) -> str:
    if method not in profiles.METHODS:
        raise CourseError(f"There is no method {method!r}. Choose one of {profiles.METHODS}.")
    if method == "qlora":
        return "nf4"
    # In bf16 most steps of full fine-tuning are too small to change a weight: they round to zero.
    return "fp32" if method == "full" else profile.precision


def _score(
    model: Any, tokenizer: Any, rows: Dataset, features: Dataset, processes: PartialState
) -> tuple[dict[str, Any], list[str]]:
    longest = max(
        sum(label != encoding.IGNORED for label in labels) for labels in features["labels"]
    )
    mine = range(processes.process_index, len(rows), processes.num_processes)
    answered = evaluation.generate_answers(
        model, tokenizer, rows.select(mine)["prompt"], max_new_tokens=longest + 8
    )
    pairs = _gather(list(zip(mine, answered, strict=True)), processes)
    answers = [answer for _, answer in sorted(pairs)]
    return evaluation.score(answers, evaluation.references(rows)), answers


def _evaluation_batches(rows: int, batch_size: int, processes: int) -> tuple[int, int]:
    """(rows to evaluate, batch size), so that all processes get as many rows as the others.

    Otherwise accelerate repeats rows to fill the last batches, and Trainer (5.24), which divides by
    the tokens of all processes, reports another mean than one process would.
    """
    if processes == 1:
        return rows, batch_size
    share = max(1, rows // processes)
    fitting = [size for size in range(1, min(batch_size, share) + 1) if share % size == 0]
    return min(rows, share * processes), fitting[-1]


def _gather(values: list[Any], processes: PartialState) -> list[Any]:
    """The lists of all processes, one after the other."""
    return gather_object(values) if processes.num_processes > 1 else values


def _write(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", metavar="FILE", help="rows to learn from")
    parser.add_argument("--validation", metavar="FILE", help="rows to watch overfitting on")
    parser.add_argument("--test", metavar="FILE", help="rows to score, before and after")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument("--profile", choices=list(profiles.PROFILES), help="default: by machine")
    parser.add_argument("--method", choices=profiles.METHODS, help="default: by profile")
    parser.add_argument("--epochs", type=_positive, metavar="N")
    parser.add_argument("--learning-rate", type=_positive, metavar="X")
    parser.add_argument(
        "--batch-size", type=_positive_integer, metavar="N", help="rows per step and process"
    )
    parser.add_argument("--rank", type=_positive_integer, metavar="R", help="rank of the update")
    parser.add_argument("--seed", type=int, default=42, metavar="S")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--tracking", choices=tracking.MODES, default="off", help="W&B")
    options = vars(parser.parse_args(arguments))
    first = os.environ.get("RANK", "0") == "0"  # what `accelerate launch` numbers processes by
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks for all
    try:
        finetune(track=options.pop("tracking"), **options)
    except CourseError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command with --resume continues.", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def _positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return value


if __name__ == "__main__":
    sys.exit(main())
