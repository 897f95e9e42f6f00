"""The settings of a run: one dataclass for the command line, its help and run.json. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from helpers import CourseError
from helpers.commands import OneLineParser
from helpers.profiles import FLOAT_FORMATS, METHODS, PROFILES
from helpers.tracking import MODES


class UsageError(CourseError):
    """Settings that cannot be used together, or on this machine."""


class Option(NamedTuple):
    """How a setting looks on the command line."""

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `python -m helpers.finetune` can be told; None means: not named, so a default holds.

    Raises:
        UsageError: a value is out of range, or two options do not go together.
    """

    output: Annotated[Path, Option("folder for the results", "DIR")]
    train: Annotated[Path | None, Option("rows to learn from (default: tickets)", "FILE")] = None
    validation: Annotated[Path | None, Option("rows to watch overfitting on", "FILE")] = None
    test: Annotated[Path | None, Option("rows to score, before and after", "FILE")] = None
    model: Annotated[
        str | None, Option("folder or Hub id of a causal language model", "ID_OR_FOLDER")
    ] = None
    profile: Annotated[
        str | None, Option("model, precision, sizes (default: by machine)", None, tuple(PROFILES))
    ] = None
    precision: Annotated[
        str | None,
        Option("number format to compute in (default: by machine)", None, tuple(FLOAT_FORMATS)),
    ] = None
    method: Annotated[str | None, Option("default: by profile", None, METHODS)] = None
    epochs: Annotated[float | None, Option("passes over the training rows", "N")] = None
    learning_rate: Annotated[float | None, Option("the highest of the schedule", "X")] = None
    batch_size: Annotated[int | None, Option("rows per process and forward pass", "N")] = None
    accumulation: Annotated[int | None, Option("batches per optimizer step (default: 1)", "N")] = (
        None
    )
    rank: Annotated[int | None, Option("LoRA's r, the rank of the update", "R")] = None
    alpha: Annotated[
        int | None, Option("LoRA's alpha; alpha/r scales the update (default: 2r)", "A")
    ] = None
    target_modules: Annotated[
        tuple[str, ...] | None, Option("layers that get an adapter (default: all linear)", "NAME")
    ] = None
    max_length: Annotated[int | None, Option("longest row, in tokens", "N")] = None
    seed: Annotated[
        int | None, Option("of the adapter and the order of rows (default: 42)", "S")
    ] = None
    resume: Annotated[bool, Option("continue the interrupted run in --output")] = False
    tracking: Annotated[str, Option("Weights & Biases (default: off)", None, MODES)] = "off"

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{_flag(name)} must be above zero, not {value}.")
        for name in ("batch_size", "accumulation", "rank", "alpha", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} must be at least 1, not {value}.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be from 0 to {2**32 - 1}, not {self.seed}.")
        if self.train is None and (self.validation or self.test) and not self.resume:
            raise UsageError("--validation and --test need --train: they belong together.")
        if self.train is not None and self.validation is None and not self.resume:
            raise UsageError(
                "--train needs --validation: rows that are not trained on show overfitting."
            )
        if self.method == "full":
            for name in ("rank", "alpha", "target_modules"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{_flag(name)} is a setting of LoRA, not of --method full.")

    def given(self) -> dict[str, Any]:
        """The settings that were named, ready for JSON."""
        return {
            field.name: as_json(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in NOT_RECORDED and getattr(self, field.name) != field.default
        }


# Where the results go, whether the run goes on and where its progress is shown change no result.
NOT_RECORDED = ("output", "resume", "tracking")


def as_json(value: Any) -> Any:
    """A setting as JSON holds it: a path as text, a tuple as a list."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of `RunConfig`: an option for every field."""
    made = OneLineParser(
        prog="python -m helpers.finetune",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(RunConfig, include_extras=True)
    for field in dataclasses.fields(RunConfig):
        kind, option = get_args(hints[field.name])
        how: dict[str, Any] = {"help": option.help}
        if field.default is dataclasses.MISSING:
            how["required"] = True
        else:
            how["default"] = field.default
        if kind is bool:
            made.add_argument(_flag(field.name), action="store_true", **how)
            continue
        how |= {"metavar": option.metavar, "choices": option.choices}
        if field.name == "target_modules":
            how["nargs"] = "+"
        else:  # `int | None` -> int
            how["type"] = next((t for t in get_args(kind) if t is not type(None)), kind)
        made.add_argument(_flag(field.name), **how)
    return made


def from_command_line(arguments: list[str] | None, description: str | None) -> RunConfig:
    """Read the command line. Exits with 2 on an unknown option, 0 after `--help`.

    Raises:
        UsageError: as `RunConfig`.
    """
    options = vars(parser(description).parse_args(arguments))
    if options["target_modules"] is not None:
        # One or several names, by spaces or by commas.
        names = (name for text in options["target_modules"] for name in text.split(","))
        options["target_modules"] = tuple(filter(None, names))
    return RunConfig(**options)
