"""Checkpoints that a killed run can trust, and a Trainer that resumes exactly.

A checkpoint counts only with its seal: a file, written last, that names the run and holds the size
and the SHA-256 of every other file. Whatever has no seal of this run is never used, and never
deleted or overwritten.

Resuming is exact in any epoch, because nothing depends on what happened before: the order of the
rows follows from the seed and the epoch alone, random numbers (dropout) from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from helpers import CourseError
from helpers.training import StepTimer

SEAL = "sealed.json"
OWNER = "run_id"  # written first: an unsealed checkpoint with it is a torn one of this run
KEPT = 2  # the newest checkpoints; the best one is kept besides
PREFIX = "checkpoint-"


class TrainingFailed(CourseError):
    """The training cannot go on. What was good before is kept."""


# -- finding and checking ----------------------------------------------------------------------


def step_of(folder: Path) -> int:
    """The step of `checkpoint-N`; -1 for any other name."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else -1


def all_checkpoints(output: Path) -> list[Path]:
    """Every `checkpoint-N` in a folder, the newest first, whoever wrote it."""
    return sorted((p for p in output.glob(f"{PREFIX}*") if step_of(p) >= 0), key=step_of)[::-1]


def seal(folder: Path, run_id: str, **facts: Any) -> None:
    """Close a checkpoint: from now on any change of its files can be noticed."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, sha256(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    content = {"run_id": run_id, "step": step_of(folder), **facts, "files": files}
    write_json(folder / SEAL, content)


def read_seal(folder: Path, run_id: str) -> dict[str, Any] | None:
    """The facts of a checkpoint of this run; None where it is torn, or another's."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if content["run_id"] != run_id or content["step"] != step_of(folder):
            return None
        for name, (size, digest) in content["files"].items():
            path = folder / name
            if path.stat().st_size != size or sha256(path) != digest:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def newest_good(output: Path, run_id: str) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint of this run that is whole, and the newer ones that are not."""
    passed_over = []
    for folder in all_checkpoints(output):
        if read_seal(folder, run_id) is not None:
            return folder, passed_over
        passed_over.append(folder)
    return None, passed_over


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file. NaN and infinity become null."""
    unfinished = path.with_name(path.name + ".unfinished")
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def finite(value: Any) -> Any:
    """The same content with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- training ----------------------------------------------------------------------------------


class EpochSampler(Sampler[int]):
    """The order of rows in an epoch, from the seed and the number of the epoch alone.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step, over all processes.
        seed: of the run.
        grouped: put rows of similar length together, as transformers' `LengthGroupedSampler` does,
            so that batches need little padding; otherwise any order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, grouped: bool) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.grouped = grouped
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch))
        if self.grouped:
            return iter(
                get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
            )
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


def _mixed(*numbers: int) -> int:
    """One seed from several numbers, such as the run's seed and a step."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:7], "big")


class _Repeatable(TrainerCallback):
    """Set what is random before it is used, so that a resumed run draws what the first one drew."""

    def __init__(self, sampler: EpochSampler, seed: int) -> None:
        self.sampler = sampler
        self.seed = seed

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches = len(kwargs["train_dataloader"])
        steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
        self.sampler.epoch = state.global_step // steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(_mixed(self.seed, state.global_step, args.process_index))


class ResumableTrainer(Trainer):
    """A `Trainer` that resumes exactly, seals its checkpoints, and stops at a non-finite loss.

    Args:
        run_id: names the run in its checkpoints.
        arguments: as for `Trainer`. `save_total_limit` stays unset: Trainer would delete whatever
            is named checkpoint-N, and only sealed checkpoints of this run may go.
    """

    def __init__(self, *, run_id: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.run_id = run_id
        self.timer = StepTimer()
        args = self.args
        self.sampler = EpochSampler(
            list(self.train_dataset["length"]),
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed,
            grouped=args.train_sampling_strategy == "group_by_length",
        )
        self.add_callback(self.timer)
        self.add_callback(_Repeatable(self.sampler, args.seed))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # All processes stop together: one that stops alone leaves the others waiting for it.
        losses = self.accelerator.gather(loss.reshape(1)) if self.args.world_size > 1 else loss
        if not torch.isfinite(losses).all():
            raise self._failed("loss", self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            raise self._failed("validation loss", self.state.global_step)
        return metrics

    def _failed(self, what: str, step: int) -> TrainingFailed:
        kept, _ = newest_good(Path(self.args.output_dir), self.run_id)
        saved = "adapter" if hasattr(self.model, "peft_config") else "model"
        where = f" The {saved} of step {step_of(kept)} is kept in {kept}." if kept else ""
        return TrainingFailed(
            f"The {what} is not a finite number at step {step}: the updates are "
            f"too large for this model. Start in a new --output folder with a lower "
            f"--learning-rate; {self.args.learning_rate / 10:.1g} is a tenth of this one.{where}"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad):
            raise self._failed("update", self.state.global_step)
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        if self.args.should_save:  # the first process writes for all
            self._claim(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            tokens = self.state.num_input_tokens_seen
            seal(folder, self.run_id, seconds=self.timer.seconds, tokens=tokens)
            self._remove_old(folder.parent)

    def _claim(self, folder: Path) -> None:
        """Make the folder, or empty it if a killed save of this run left something in it."""
        if folder.exists() and any(folder.iterdir()):
            if not owns(folder, self.run_id):
                raise TrainingFailed(
                    f"{folder} was not written by this run, so the checkpoint of step "
                    f"{self.state.global_step} cannot be saved. Move it away and use --resume."
                )
            _delete(folder)
        folder.mkdir(exist_ok=True)
        try:
            (folder / OWNER).write_text(self.run_id)
        except OSError:  # a full disk: without its owner's name nobody could claim it later
            (folder / OWNER).unlink(missing_ok=True)
            folder.rmdir()
            raise

    def _remove_old(self, output: Path) -> None:
        """Delete all checkpoints of this run but the newest ones and the best one.

        Later ones are damaged: they were passed over, and are written again in their turn.
        """
        own = [
            path
            for path in all_checkpoints(output)
            if step_of(path) <= self.state.global_step and owns(path, self.run_id)
        ]
        for folder in own[KEPT:]:
            if step_of(folder) != self.state.best_global_step:
                _delete(folder)


def owns(folder: Path, run_id: str) -> bool:
    """True if a checkpoint, whole or torn, was written by this run."""
    try:
        return (folder / OWNER).read_text() == run_id
    except (OSError, ValueError):
        return False


def _delete(folder: Path) -> None:
    """Delete a checkpoint: its seal first and its owner last, in case the process is killed.

    What the seal does not list was put there by somebody else, and stays.
    """
    try:
        written = set(json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        written = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    (folder / SEAL).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # the content of a folder before itself
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path != folder / OWNER and str(path.relative_to(folder)) in written:
            path.unlink()
    (folder / OWNER).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
