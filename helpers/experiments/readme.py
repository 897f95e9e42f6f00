"""What the README and the adapter's card say of the records.

python -m helpers.experiments readme
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from helpers import CourseError, experiments, statistics
from helpers.adapters import SHIPPED
from helpers.data import DATA, FIELDS, load_triage, ticket_json
from helpers.drawings import picture, result
from helpers.weights import GGUF_FILE, HUB_REPOSITORY

ROOT = DATA.parent
PICTURE = DATA / "result.png"
BLOCK = re.compile(r"(<!-- figures: [^>]*-->\n).*?(<!-- end of figures -->)", re.DOTALL)
# From the least to the most that is done for a ticket: label of the record -> what readers call it.
WAYS = {
    "zero-shot": "the model as it comes",
    "few-shot, spelled out": "the same, told all fields and values, and shown six examples",
    "rules": "patterns and classifiers on the same messages, no language model",
    "lora": "fine-tuned (LoRA) on 456 labelled messages",
}


def scores() -> dict[str, list[float]]:
    """{label: exact match on the test split, of each run}, for the labels of `WAYS`.

    Raises:
        CourseError: one of them is not recorded.
    """
    found: dict[str, list[float]] = {label: [] for label in WAYS}
    for record in experiments.read("ways"):
        if record["label"] in found:
            found[record["label"]].append(record["test"]["exact_match"])
    if missing := [label for label, values in found.items() if not values]:
        raise CourseError(
            f"Experiment `ways` has no record of {', '.join(missing)}. Make it: "
            f"python -m helpers.experiments run ways"
        )
    return found


def table() -> str:
    """The scores as a table in Markdown, with 95 % intervals."""
    rows = len(load_triage()["test"])
    lines = [
        f"| on {rows} messages that it never saw | tickets right in every field |",
        "|---|---|",
    ]
    for label, values in scores().items():
        mean = sum(values) / len(values)
        low, high = statistics.wilson_interval(mean, rows)
        runs = f", mean of {len(values)} runs" if len(values) > 1 else ""
        lines.append(f"| {WAYS[label]} | **{mean:.0%}** ({low:.0%} to {high:.0%}{runs}) |")
    return "\n".join(lines).replace("%", " %") + "\n"


def example() -> dict[str, str]:
    """A short test message that fine-tuning gets right in every run and rules get wrong.

    Returns:
        message, and the answers by the labels of `WAYS`.
    """
    answers: dict[str, list[list[str]]] = {label: [] for label in WAYS}
    for record in experiments.read("ways"):
        if record["label"] in WAYS:
            answers[record["label"]].append(experiments.answers(record))
    for index, row in enumerate(load_triage()["test"]):
        reference = ticket_json(row)
        tuned = all(run[index] == reference for run in answers["lora"])
        if tuned and answers["rules"][0][index] != reference and len(row["message"]) < 40:
            chosen = {label: runs[0][index] for label, runs in answers.items()}
            return {"message": row["message"]} | chosen
    raise CourseError("No short test message tells fine-tuning and rules apart.")


def shown() -> dict[str, Any]:
    """What the picture shows: an example, and the scores."""
    return {"example": example(), "scores": scores()}


def drawn(example: dict[str, str], scores: dict[str, list[float]]) -> Figure:
    """The picture: one message, what each way answers, and how often each is right."""
    answers = [
        (
            "the model as it comes",
            textwrap.shorten(example["zero-shot"], 96, placeholder=" …"),
            False,
        ),
        ("rules, no language model", example["rules"], False),
        ("fine-tuned", example["lora"], True),
    ]
    bars = [
        (name, sum(scores[label]) / len(scores[label]))
        for name, label in (("as it comes", "zero-shot"), ("rules", "rules"), ("tuned", "lora"))
    ]
    return result(example["message"], answers, bars, len(load_triage()["test"]))


def write(readme: Path = ROOT / "README.md") -> None:
    """Write the picture, and the figures into their place in the README."""
    content = shown()
    PICTURE.write_bytes(picture(drawn(**content), json.dumps(content, ensure_ascii=False)))
    text = readme.read_text(encoding="utf-8")
    readme.write_text(updated(text), encoding="utf-8")
    (SHIPPED / "README.md").write_text(card(), encoding="utf-8")


def updated(text: str) -> str:
    """The README with the figures of the records."""
    if not BLOCK.search(text):
        raise CourseError("The README has no place for the figures: <!-- figures: ... -->.")
    return BLOCK.sub(lambda found: found[1] + "\n" + table() + "\n" + found[2], text)


# -- the adapter that the course ships ---------------------------------------------------------


def shipped() -> dict[str, Any]:
    """The record of the run that made data/adapters/tickets."""
    named = json.loads((SHIPPED / "run.json").read_text(encoding="utf-8"))
    (record,) = (
        record
        for record in experiments.read(named["experiment"])
        if (record["label"], record["seed"]) == (named["label"], named["seed"])
    )
    return record


CARD = """\
---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
pipeline_tag: text-generation
license: apache-2.0
tags: [lora]
---

# Customer messages to tickets: a LoRA adapter of SmolLM2-135M-Instruct

It turns a customer's message into one line of JSON: category, urgency, product and order number.
Made by the recorded run `{experiment}`, `{label}`, seed {seed} (`data/runs/{experiment}.jsonl`),
and stored in 16 bits.

| on {rows} test messages, scored once | this adapter | rules |
|---|---|---|
{scores}

Rules are `helpers/rules.py`: patterns, and classifiers fitted to the train split. {rivals} \
On the validation split, on which the settings were chosen, exact match was {validation:.0%}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{repository}"  # what it was trained on, not the original
file = "{file}"  # is unpacked at loading, by the package gguf
model = AutoModelForCausalLM.from_pretrained(name, gguf_file=file)
model = PeftModel.from_pretrained(model, "data/adapters/tickets")
tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=file)
```

The system message is "Turn the message into a JSON ticket."; the message goes through the chat
template; answers are greedy. In the course: `python -m helpers.answer --run data/adapters/tickets`.

## What to know before you use it

- It was trained and scored on the parameters of a 4-bit file (Q4_1) that were unpacked, not on the
  original ones.
- The {trained} messages that it learned from, and those it was scored on, are synthetic: see
  `data/README.md`. Real mail differs.
- Perplexity on prose rose from {prose_before:.0f} to {prose:.0f}: it has forgotten some of what the
  base model knew.
- {tokens:,} tokens in {epochs} epochs; learning rate {learning_rate:g}, r = {rank}, lora_alpha =
  {alpha}, all linear layers; {precision}.
"""


def card() -> str:
    """The model card of the shipped adapter."""
    record, rows = shipped(), len(load_triage()["test"])
    by_label = {entry["label"]: entry for entry in experiments.read("ways")}
    rules, base = by_label["rules"]["test"], by_label["zero-shot"]
    lines, better = [], []
    for name, label in (("exact_match", "all four fields right"), *((f, f) for f in FIELDS)):
        ours, theirs = (
            score[name] if name == "exact_match" else score["fields"][name]
            for score in (record["test"], rules)
        )
        low, high = statistics.wilson_interval(ours, rows)
        lines.append(f"| {label} | {ours:.1%} ({low:.0%} to {high:.0%}) | {theirs:.1%} |")
        if theirs > ours:
            better.append(label)
    rivals = (
        f"They are better in: {', '.join(better)}." if better else "They are better in no field."
    )
    settings = record["settings"]
    text = CARD.format(
        **{key: record[key] for key in ("experiment", "label", "seed", "tokens")},
        repository=HUB_REPOSITORY,
        file=GGUF_FILE,
        rows=rows,
        scores="\n".join(lines),
        rivals=rivals,
        validation=record["validation"]["exact_match"],
        trained=len(load_triage()["train"]),
        prose_before=base["prose_perplexity"],
        prose=record["prose_perplexity"],
        **{key: settings[key] for key in ("learning_rate", "rank", "alpha", "precision")},
        epochs=round(settings["epochs"]),
    )
    return text.replace("%", " %")
