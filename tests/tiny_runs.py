"""A finished run of the tiny model, small enough for many tests, that learned something."""

import json
from pathlib import Path

from helpers.finetune import main

ANSWERS = {"kettle": "steel", "lamp": "brass", "chair": "oak wood", "vase": "clay"}
SYSTEM = "Name the material."


def write_rows(path: Path, first: int, count: int) -> Path:
    """Rows whose answer depends on one word of the question."""
    things = list(ANSWERS)
    rows = []
    for number in range(first, first + count):
        thing = things[number % len(things)]
        prompt = f"my {thing} {number} is late"
        rows.append({"system": SYSTEM, "prompt": prompt, "completion": ANSWERS[thing]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path, *options: str) -> Path:
    """Train tiny-llama for some seconds, and return the folder of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        *("--train", write_rows(folder / "train.jsonl", 0, 64)),
        *("--validation", write_rows(folder / "validation.jsonl", 100, 12)),
        *("--test", write_rows(folder / "test.jsonl", 200, 12)),
    ]
    settings = ["--profile", "tiny", "--epochs", "30", "--batch-size", "4"]
    if "full" in options:
        settings += ["--learning-rate", "2e-3"]
    else:
        settings += ["--learning-rate", "1e-2", "--rank", "16"]
    run = folder / "run"
    assert main([*map(str, files), *settings, "--output", str(run), *options]) == 0
    return run
