"""A run that is killed at random moments, twice in a row, ends as if it had run through."""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
# Children of a process that has torch loaded already start in no time, and die like any other.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers.pipeline"])


def run_command(arguments: list[str], variant: str) -> None:
    """The command, in a process of its own. "random" trains rows in any order, with dropout."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    from helpers import finetune, training

    if variant == "random":
        make_arguments, make_config = training.training_arguments, training.lora_config
        training.training_arguments = lambda *args, **options: make_arguments(
            *args, **options | {"train_sampling_strategy": "random"}
        )
        training.lora_config = lambda *args, **options: make_config(
            *args, **options | {"lora_dropout": 0.2}
        )
    sys.exit(finetune.main(arguments))


def start(arguments: list[str], variant: str) -> Any:
    process = FORKS.Process(target=run_command, args=(arguments, variant))
    process.start()
    return process


def write_rows(folder: Path) -> list[str]:
    """26 rows of different lengths: in batches of 4 the last one is short."""
    options = []
    for name, count in (("train", 26), ("validation", 5)):
        rows = [
            {"prompt": f"{name} {n} " + "very " * (n % 7) + "old?", "completion": f"{n * n} years"}
            for n in range(count)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options += [f"--{name}", str(path)]
    return options


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", ["grouped", "random"])
@pytest.mark.parametrize("seed", range(5))
def test_killed_twice_it_ends_in_the_same_bytes(seed: int, variant: str, tmp_path: Path) -> None:
    options = ["--profile", "tiny", "--epochs", "4", "--batch-size", "4", "--seed", str(seed)]
    options += write_rows(tmp_path)
    began = time.monotonic()
    whole = start([*options, "--output", str(tmp_path / "whole")], variant)
    whole.join()
    seconds = time.monotonic() - began
    assert whole.exitcode == 0

    rng = random.Random(seed)
    cut, moments = tmp_path / "cut", []
    for _ in range(2):
        resume = ["--resume"] if (cut / "run.json").is_file() else []
        part = start([*options, "--output", str(cut), *resume], variant)
        part.join(seconds * rng.uniform(0.3, 0.8))
        part.kill()
        part.join()
        moments.append(sorted(path.name for path in cut.glob("checkpoint-*")))
    if not (cut / "metrics.json").is_file():
        last = start(["--output", str(cut), "--profile", "tiny", "--resume"], variant)
        last.join()
        assert last.exitcode == 0, moments

    file = "adapter/adapter_model.safetensors"
    assert (cut / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), moments
    histories = [
        json.loads((run / "history.json").read_text()) for run in (tmp_path / "whole", cut)
    ]
    assert histories[0] == histories[1]
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "whole", cut)]
    assert metrics[0]["tokens"] == metrics[1]["tokens"]  # those of all parts together
    assert metrics[1]["train_seconds"] > metrics[0]["train_seconds"] / 4
    assert any("lora_B" in name and tensor.any() for name, tensor in load_file(cut / file).items())
