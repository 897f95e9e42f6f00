"""The model card of a run: README.md, from the run's own figures."""

from __future__ import annotations

from typing import Any

from helpers.diagnosis import Diagnosis
from helpers.statistics import wilson_interval


def model_card(record: dict[str, Any], metrics: dict[str, Any], diagnosis: Diagnosis) -> str:
    """The card in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        record: the content of run.json.
        metrics: the content of metrics.json.
        diagnosis: of the run's losses.
    """
    settings, base = record["settings"], record["model"]["base"]
    full = settings["method"] == "full"
    metadata = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if full else 'peft'}",
        "pipeline_tag: text-generation",
        f"tags: [{'full-fine-tuning' if full else settings['method']}]",
        "---",
    ]
    parts = [
        "\n".join(metadata),
        f"# {base}, fine-tuned",
        f"{'All parameters' if full else 'A LoRA adapter'} of [{base}], trained by "
        f"`python -m helpers.finetune` for {metrics['steps']} steps on "
        f"{record['data']['train']['rows']} rows. {metrics['trainable_parameters']:,} of "
        f"{metrics['total_parameters']:,} parameters were trained.",
        "## Results\n\n" + _results(metrics),
        f"The loss curves read as **{diagnosis.verdict}** ({diagnosis.confidence} confidence). "
        f"{diagnosis.explanation}",
        "## How to use it\n\n" + _usage(base, full, record["model"]["on_the_hub"]),
        "## Settings\n\n" + _table("setting", "value", _settings(record)),
        "## Data\n\n"
        + _table(
            "split",
            "rows, SHA-256 of the file",
            {
                name: f"{split['rows']}, `{split['sha256'][:16]}...`"
                for name, split in record["data"].items()
            },
        ),
        "## What it cost\n\n" + _table("", "", _cost(record, metrics)),
        "## Limits\n\nIt was scored on rows like those it was trained on, and on no other task. "
        "What the base model could do besides was not measured; fine-tuning loses some of it.",
    ]
    return "\n\n".join(parts).replace(f"[{base}]", f"`{base}`") + "\n"


def _results(metrics: dict[str, Any]) -> str:
    rows = metrics["test_rows"]
    losses = (
        f"Validation loss on {metrics['validation_rows']} rows: "
        f"{_number(metrics['validation_loss'])} nats per answer token"
    )
    if metrics["best_step"] not in (None, metrics["steps"]):
        best = _number(metrics["best_validation_loss"])
        losses += f"; the lowest, {best}, was at step {metrics['best_step']}"
    if not rows:
        return f"It was not scored: the run had no test rows. {losses}."
    low, high = wilson_interval(metrics["test_exact_match"], rows)
    shown = {
        "exact match, base model": f"{metrics['base_exact_match']:.1%}",
        "exact match, fine-tuned": f"{metrics['test_exact_match']:.1%} "
        f"(95 % interval {low:.0%} to {high:.0%})",
    }
    for field, fraction in (metrics["test_fields"] or {}).items():
        shown[f"{field} right"] = f"{fraction:.1%}"
    if metrics["test_valid_json"] is not None:
        shown["valid JSON"] = f"{metrics['test_valid_json']:.1%}"
    shown["loss per answer token (nats)"] = _number(metrics["test_loss"])
    return _table(f"on {rows} test rows", "", shown) + f"\n\n{losses}."


def _usage(base: str, full: bool, on_the_hub: bool) -> str:
    load = (
        'model = AutoModelForCausalLM.from_pretrained("model")'
        if full
        else f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(model, "adapter")'
    )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if not full:
        imports = "from peft import PeftModel\n" + imports
    folder = "model" if full else "adapter"
    note = ""
    if not (full or on_the_hub):
        note = f"`{base}` was a folder on the machine of the training: put its path there.\n\n"
    return (
        f"{note}"
        f"```python\n{imports}\n\n{load}\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n```\n\n'
        "Prompts go through the chat template of this tokenizer, and answers are greedy."
    )


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    hidden = ("train", "validation", "test", "model")
    chosen = {k: v for k, v in record["settings"].items() if k not in hidden and v is not None}
    chosen["precision"] = record["profile"]["precision"]
    return {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in chosen.items()
    }


def _cost(record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, str]:
    machine = record["machine"]
    where = machine.get("gpu") or f"{machine['system']}, {machine['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return {
        "training": f"{metrics['train_seconds']:.0f} s, {metrics['tokens']:,} tokens",
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB",
        "machine": where,
        "versions": versions,
    }


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _table(left: str, right: str, rows: dict[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
