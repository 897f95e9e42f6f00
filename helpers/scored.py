"""A finished run or an adapter, loaded as it was scored: the same answers as in answers.json.

Scoring and answering must agree in everything that changes an answer: the base model, its
precision, the adapter, the chat template, the system message, and when an answer ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError, data, evaluation, models, profiles, rows
from helpers.adapters import SHIPPED
from helpers.chat import ChatEncoder
from helpers.checkpoints import sha256
from helpers.encoding import IGNORED, encode_row, labels_of
from helpers.logs import quiet
from helpers.pipeline import MARGIN, base_precision, read_record
from helpers.weights import HUB_ID, MODEL, last_line

EXPORT_RECORD = "export.json"  # what helpers.export writes beside a model about its origin
PARTS = ("adapter", "best_adapter", "model", "best_model")


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a trained model is, and what is known of its training.

    Attributes:
        folder: of the adapter, or of the whole model.
        is_adapter: which of the two.
        record: the run.json of its run; None where there is none.
        metrics: the metrics.json of its run; empty where there is none.
        profile: with the base model, its device and its precision.
        precision: that the base model is loaded in.
    """

    folder: Path
    is_adapter: bool
    record: dict[str, Any] | None
    metrics: dict[str, Any]
    profile: profiles.Profile
    precision: str

    @property
    def base(self) -> str:
        """How others know the base model."""
        named = self.profile.model_id
        if self.record and named == self.record["profile"]["model_id"] and "model" in self.record:
            return self.record["model"]["base"]
        return models.base_id(named)


def find(folder: Path, base: str | None = None) -> Found:
    """Look at a folder of a run, of an adapter or of a model. Loads nothing.

    Args:
        base: the base model of an adapter, instead of the one that it names.

    Raises:
        CourseError: it is none of the three, or the run has nothing trained yet.
    """
    if not folder.is_dir():
        raise CourseError(f"{folder}: there is no such folder. Check --run.")
    record, home, part = read_record(folder), folder, folder
    if not _holds_a_model(folder) and record is not None:
        parts = [folder / name for name in ("adapter", "model") if _holds_a_model(folder / name)]
        if not parts:
            raise CourseError(
                f"The run in {folder} has not saved anything yet (no adapter/, no model/). Finish "
                f"it: python -m helpers.finetune --output {folder} --resume"
            )
        part = parts[0]
    elif record is None and (folder.absolute().name in PARTS or (folder / "sealed.json").is_file()):
        home = folder.absolute().parent
        record = read_record(home)
    if not _holds_a_model(part):
        raise CourseError(
            f"{folder} is no folder of a run (run.json), of an adapter (adapter_config.json) or of "
            f"a model (config.json). Check --run."
        )
    is_adapter = (part / "adapter_config.json").is_file()
    profile = _profile(part, is_adapter, record, base)
    method = record["settings"]["method"] if record else "lora"
    precision = base_precision(method, profile)
    return Found(part, is_adapter, record, _metrics(home), profile, precision)


def _holds_a_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def _profile(
    part: Path, is_adapter: bool, record: dict[str, Any] | None, base: str | None
) -> profiles.Profile:
    if record is not None:
        try:
            profile = profiles.from_json(record["profile"])
        except (KeyError, TypeError) as error:
            raise CourseError(
                f"The run.json beside {part} was written by another version of this course, or "
                f"changed. Name the folder of the adapter outside the run."
            ) from error
        if profile.device == "cuda" and not torch.cuda.is_available():
            slow = profile.precision == "fp16"  # on a processor
            precision = "fp32" if slow else profile.precision
            profile = dataclasses.replace(profile, device="cpu", precision=precision)
    else:
        profile = profiles.pick_profile(verbose=False)
    if not is_adapter:
        profile = dataclasses.replace(profile, model_id=str(part), quantized=False)
    elif base is not None or record is None:
        profile = dataclasses.replace(profile, model_id=base or _base_of(part))
    if record is None and (profile.device == "cpu" or profile.model_id == MODEL):
        # The scoring's precision is unknown, or it is the course's: fp32 adds no rounding.
        profile = dataclasses.replace(profile, precision="fp32", attn_implementation="sdpa")
    return profile


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names; the course's own by the copy that it keeps."""
    try:
        text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
        base = json.loads(text)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise CourseError(
            f"{adapter / 'adapter_config.json'} is damaged ({last_line(error)}). Copy the adapter "
            f"again."
        ) from error
    if not base:
        raise CourseError(f"The adapter in {adapter} names no base model. Name it with --model.")
    return MODEL if base == HUB_ID else base


def _metrics(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# -- the task ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """What the training rows say about questions.

    Attributes:
        system: the system message that all of them have; None if they have none or several.
        single: true where no training row has more than one turn.
        known: false where the training rows are not at hand.
    """

    system: str | None = None
    single: bool = False
    known: bool = False


def task_of(found: Found) -> Task:
    """What a model was trained to be asked. Of the course's own tickets it is always known."""
    if found.record is None:
        if found.folder.resolve() == SHIPPED.resolve():
            return Task(data.SYSTEM_PROMPT, True, True)
        try:  # an exported model takes the answer with it
            stored = json.loads((found.folder / EXPORT_RECORD).read_text(encoding="utf-8"))["task"]
            return Task(**stored)
        except (OSError, ValueError, KeyError, TypeError):
            return Task()
    split = load_split(found, "train")
    if split is None:
        return Task()
    systems, single = set(), True
    for prompt in split["prompt"]:
        systems.add(prompt[0]["content"] if prompt[0]["role"] == "system" else None)
        single = single and all(message["role"] != "assistant" for message in prompt)
    return Task(systems.pop() if len(systems) == 1 else None, single, True)


def load_split(found: Found, name: str) -> Dataset | None:
    """The rows that a run used, by their content; None where they have gone or changed."""
    if found.record is None:
        tickets = task_of(found).system == data.SYSTEM_PROMPT
        return data.load_triage()[name] if tickets else None
    expected = found.record.get("data", {}).get(name, {}).get("sha256")
    own = data.DATA / "triage" / f"{name}.jsonl"
    named = found.record["settings"].get(name)
    if expected is None:
        return None
    if sha256(own) == expected:
        return data.load_triage()[name]
    try:
        same = named and sha256(Path(named)) == expected
    except OSError:
        return None
    return rows.load_examples(named) if same else None


# -- the model ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model that answers as it did when it was scored."""

    found: Found
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def answer(
        self,
        prompts: Sequence[list[dict[str, str]]],
        max_new_tokens: int = 256,
        progress: bool = False,
    ) -> list[str]:
        """Answer chat prompts greedily: see `helpers.evaluation.generate_answers`."""
        with self.computing():
            return evaluation.generate_answers(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens,
                self.found.profile.eval_batch_size,
                progress,
            )

    def computing(self) -> torch.autocast:
        """Trainer scores under autocast where it trains in 16 bits: then so does every answer."""
        profile = self.found.profile
        return torch.autocast(
            profile.device,
            dtype=profile.dtype if profile.precision != "fp32" else torch.bfloat16,
            enabled=profile.precision != "fp32",
        )


def load(found: Found) -> Scored:
    """Load what `find` found, in the precision and with the template of the scoring.

    Raises:
        CourseError: the base model or the adapter cannot be loaded, or do not fit together.
    """
    base = models.load_model(found.profile, found.precision)
    if not found.is_adapter:
        return Scored(found, base, models.load_tokenizer(found.profile))
    try:
        with quiet():
            model = PeftModel.from_pretrained(base, str(found.folder))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a file from elsewhere may hold
        raise CourseError(
            f"The adapter in {found.folder} could not be loaded onto {found.base}: "
            f"{last_line(error)} Name the base model that it was trained on with --model."
        ) from error
    return Scored(found, model, _tokenizer(found))


def _tokenizer(found: Found) -> PreTrainedTokenizerBase:
    """The tokenizer that was stored with the adapter; the base model's where none was."""
    if not (found.folder / "tokenizer.json").is_file():
        return models.load_tokenizer(found.profile)
    return models.load_tokenizer(
        dataclasses.replace(found.profile, model_id=os.path.abspath(found.folder))
    )


def answer_limit(completions: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where scoring cuts answers to these rows: 8 tokens after the longest reference answer."""
    encoder = ChatEncoder(tokenizer)
    lengths = [
        sum(label != IGNORED for label in labels_of(encode_row(row, encoder)))
        for row in completions
    ]
    return max(lengths) + MARGIN
