"""Weights & Biases, without an account unless one is wanted."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from helpers import CourseError

MODES = ("off", "offline", "online")
PROJECT = "fine-tuning-course"


def report_to(mode: str, folder: str | Path) -> str:
    """Prepare wandb for a run and return the value for `TrainingArguments(report_to=...)`.

    Args:
        mode: "off"; "offline" writes the run into `folder`/wandb, with no account and no network;
            "online" sends it to wandb.ai too.
        folder: where the run's files go.

    Raises:
        CourseError: for an unknown mode, or "online" without a key. Asked for here, before the
            training starts, since wandb's own prompt would block it.
    """
    if mode not in MODES:
        raise CourseError(f"There is no tracking mode {mode!r}. Choose one of {', '.join(MODES)}.")
    if mode == "off":
        return "none"
    if mode == "online" and not _has_key():
        raise CourseError(
            "Tracking online needs a key. Run `wandb login` in a terminal once, which stores it "
            "outside the notebook, or use offline: such a run can be sent later by `wandb sync`."
        )
    os.environ["WANDB_MODE"] = mode
    os.environ["WANDB_DIR"] = str(folder)
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.setdefault("WANDB_SILENT", "true")
    return "wandb"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    for name in (".netrc", "_netrc"):
        try:
            if netrc.netrc(Path.home() / name).authenticators("api.wandb.ai"):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
