"""What the commands share: options, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from helpers import CourseError

OK, FAILED, REFUSED, STOPPED = 0, 1, 2, 130
RUN_HELP = "folder of a run of helpers.finetune, of an adapter (adapter_config.json), or of a model"
MODEL_HELP = "the base model, where the adapter does not name one that is to be found"


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"error: {message} (--help lists the options)\n")


class Parser(OneLineParser):
    """With `--run` and `--model`, which name a trained model."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m helpers.{prog}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--run", type=Path, required=True, metavar="DIR", help=RUN_HELP)
        self.add_argument("--model", metavar="ID_OR_FOLDER", help=MODEL_HELP)


def note(text: str) -> None:
    """Tell the person something, on stderr: stdout is for answers."""
    print(text, file=sys.stderr)


def require_packages() -> None:
    """Refuse a Python that lacks the course's packages, and name the one that has them.

    Raises:
        CourseError: torch is not installed here.
    """
    if importlib.util.find_spec("torch"):
        return
    folder = Path(__file__).parents[1] / ".venv"
    script = folder / ("Scripts" if os.name == "nt" else "bin") / "activate"
    if script.is_file():
        activate = script if os.name == "nt" else f"source {script}"
        how = f"They are in .venv. Activate it, then use the same command: {activate}"
    else:
        how = "Activate the environment that has them, or install them: python -m helpers start"
    raise CourseError(f"This Python ({sys.executable}) lacks the course's packages. {how}")


def run(work: Callable[[], int]) -> int:
    """Do the work of a command, and turn foreseen failures into one line and an exit code.

    Returns:
        What `work` returns; 2 for what cannot be used, 1 where memory or disk is full, 130 after
        Ctrl-C.
    """
    try:
        require_packages()
        return work()
    except CourseError as error:
        note(f"error: {error}")
        return REFUSED
    except KeyboardInterrupt:
        note("Stopped.")
        return STOPPED
    except BrokenPipeError:  # whoever read the answers has seen enough, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Python flushes it once more
        return OK
    except MemoryError:
        note("error: The memory of this machine is full. Use one with more, or a smaller model.")
        return FAILED
    except OSError as error:
        note(f"error: {error.filename or 'A file'} cannot be written or read ({error.strerror}).")
        return FAILED
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch here
            raise
        note("error: The GPU's memory is full. Answer on one with more, or without it.")
        return FAILED
