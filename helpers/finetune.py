"""Fine-tune a model from the command line: the notebooks' training as one command.

    python -m helpers.finetune --output runs/first
    python -m helpers.finetune --train my.jsonl --validation held_out.jsonl --output runs/mine

Rows are JSONL, CSV or Parquet with prompt and completion, or messages. Without --train the course's
own tickets are used. It writes into the output folder:

    run.json         settings, hashes of the data, versions, machine: written first
    adapter/         the LoRA adapter in safetensors (model/ after --method full)
    best_adapter/    the one with the lowest validation loss, where that is not the last
    metrics.json     scores before and after, losses, seconds, tokens per second, peak memory
    history.json     {"train": [[step, loss], ...], "eval": [[step, loss], ...]}
    diagnosis.json   what the curves say
    answers.json     every answer to the test rows, before and after
    README.md        a model card with the figures of this run
    checkpoint-*     from which --resume continues

Nothing that another program wrote into the folder is overwritten or deleted. --resume continues a
run with its own settings and rows; what you name again has to be the same.

Several processes, one for each GPU, share every step and the scoring:

    accelerate launch --num_processes 2 -m helpers.finetune --output runs/two
"""

from __future__ import annotations

import os
import sys

from helpers import CourseError, commands
from helpers.config import RunConfig, from_command_line


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and run.

    Returns:
        The exit code: 0; 2 for settings or rows that cannot be used; 1 where training failed; 130
        after Ctrl-C.
    """
    first = os.environ.get("RANK", "0") == "0"  # what `accelerate launch` numbers processes by
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks for all
    code, text = 2, ""
    try:
        config = from_command_line(arguments, __doc__)
        try:
            code, text = run(config)
        except KeyboardInterrupt:
            code, text = 130, _after_ctrl_c(config)
    except CourseError as error:
        text = f"error: {error}"
    if first and text:
        print(text, file=sys.stderr)
    return code


def _after_ctrl_c(config: RunConfig) -> str:
    if (config.output / "metrics.json").is_file():
        return f"Stopped. The run in {config.output} is finished."
    if (config.output / "run.json").is_file():
        return "Stopped. The same command with --resume continues."
    return "Stopped. The same command starts again: nothing was trained yet."


def run(config: RunConfig) -> tuple[int, str]:
    """Run the pipeline.

    Returns:
        The exit code, and for a training that failed in a way that can be foreseen one line.

    Raises:
        CourseError: settings or rows cannot be used, or packages are missing.
    """
    commands.require_packages()
    # Here, so that --help and a wrong option need not wait for torch.
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from helpers.checkpoints import TrainingFailed
    from helpers.pipeline import finetune

    try:
        finetune(config)
        return 0, ""
    except TrainingFailed as error:
        return 1, f"error: {error}"
    except OutOfMemoryError:
        return 1, (
            "error: The GPU's memory is full. Start in a new --output folder with a lower "
            "--batch-size, and --accumulation raised by the same factor."
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_disk_full(error, config):
            raise
        return 1, (
            f"error: The disk of {config.output} is full. Free some space, then use the same "
            f"command with --resume."
        )


def _is_disk_full(error: Exception, config: RunConfig) -> bool:
    """torch and safetensors report a full disk in words of their own, so ask the disk."""
    import errno
    import shutil

    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return config.output.is_dir() and shutil.disk_usage(config.output).free < 1_000_000


if __name__ == "__main__":
    sys.exit(main())
