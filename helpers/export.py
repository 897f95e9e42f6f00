"""Export a fine-tuned model, and prove that the export answers as the scored model did.

    python -m helpers.export --run runs/first --format merged --output served/model
    python -m helpers.export --run runs/first --format gguf --output served/model.gguf
    python -m helpers.export --run runs/first --format gguf --quantize q8_0 --output served/q8.gguf
    python -m helpers.export --run runs/first --format lora --output served/adapter.gguf

    merged   a folder: 16-bit safetensors with tokenizer, chat template and card, for transformers,
             `transformers serve`, vLLM, or llama.cpp's own converter
    gguf     one file for llama.cpp, Ollama and their kin; of the Llama family
    lora     the adapter alone as GGUF, to stand beside its base model in llama.cpp

Afterwards both models answer the same validation rows, greedily. How many answers differ, and by
how little, is printed and stored (export.json in the folder, or NAME.export.json beside the file).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import CourseError, commands
from helpers.commands import note

if TYPE_CHECKING:  # imported where it is used, so that --help need not wait for torch
    from transformers import PreTrainedModel

    from helpers.parity import Parity
    from helpers.scored import Found, Scored

FORMATS = ("merged", "gguf", "lora")
QUANTIZE = ("f16", "q8_0", "q4_1")
ROWS = 20  # of the validation split, for the parity report


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and export.

    Returns:
        The exit code: 0, with a warning where the answers differ by more than rounding; 2 for what
        cannot be exported; 1 where memory or disk is full; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return commands.run(lambda: _export(options))


def _parser() -> argparse.ArgumentParser:
    parser = commands.Parser("export", __doc__)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH")
    parser.add_argument("--quantize", choices=QUANTIZE, help="of --format gguf (default: f16)")
    parser.add_argument(
        "--rows",
        type=int,
        default=ROWS,
        metavar="N",
        help=f"validation rows for the parity report; 0 for none (default: {ROWS})",
    )
    return parser


def _export(options: argparse.Namespace) -> int:
    _require_fitting(options)
    # Here, so that --help and a wrong option need not wait for torch.
    from helpers import convert, models, scored

    found = scored.find(options.run, options.model)
    if options.format == "lora" and not found.is_adapter:
        raise CourseError("--format lora needs an adapter, and this is a whole model: use gguf.")
    if options.format != "merged":
        base = Path(models.model_path(found.profile))
        convert.require_convertible(base if base.is_dir() else str(base))
    model = scored.load(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.format == "merged":
        merge(model, options.output)
    elif options.format == "lora":
        convert.write_adapter(found.folder, Path(models.model_path(found.profile)), options.output)
    else:
        with tempfile.TemporaryDirectory(dir=options.output.parent, prefix="unfinished-") as folder:
            merge(model, Path(folder) / "merged")
            name = f"{Path(found.base).name} fine-tuned"
            convert.write_model(
                Path(folder) / "merged", options.output, options.quantize or "f16", name
            )
    note(f"written: {options.output} ({_size(options.output) / 1e6:,.0f} MB)")
    report = check(model, options.format, options.output, options.rows)
    _write_record(model, options, report)
    if report is not None:
        note(str(report))
        if report.warning:
            note(f"warning: {report.warning}")
    return commands.OK


def _require_fitting(options: argparse.Namespace) -> None:
    output, folder = options.output, options.format == "merged"
    if options.quantize and options.format != "gguf":
        raise CourseError("--quantize is a setting of --format gguf. Leave it out.")
    if options.rows < 0:
        raise CourseError(f"--rows must be at least 0, not {options.rows}.")
    if not folder and output.suffix != ".gguf":
        raise CourseError(f"--output {output} is to be a file: its name must end in .gguf.")
    if folder and output.suffix == ".gguf":
        raise CourseError(f"--output {output} is to be a folder: --format gguf writes a file.")
    if output.exists():
        raise CourseError(f"--output {output} is there already. Name another one.")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# -- merging -----------------------------------------------------------------------------------


def merge(model: Scored, target: Path) -> None:
    """Write a folder with the adapter merged into the base model, in 16 bits.

    The sum is made in fp32 from the base model as it was scored, so of a QLoRA run from the values
    that its 4 bits stand for, and rounded once. Afterwards `model` is as it was.

    Raises:
        CourseError: it does not fit into this machine's memory.
    """
    _require_memory(model)
    merged = _merged(model)
    _to_16_bits(merged)
    _set_end_tokens(merged, model)
    unfinished = Path(tempfile.mkdtemp(dir=target.parent, prefix="unfinished-"))
    try:
        merged.save_pretrained(unfinished)
        model.tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(_card(model.found), encoding="utf-8")
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _require_memory(model: Scored) -> None:
    import psutil

    needed = 4 * sum(p.numel() for p in model.model.parameters())
    free = psutil.virtual_memory().available
    if needed > free:
        raise CourseError(
            f"Merging takes {needed / 1e9:.1f} GB of memory (fp32), and {free / 1e9:.1f} GB are "
            f"free. Use a machine with more, or serve the adapter beside its base model."
        )


def _merged(model: Scored) -> PreTrainedModel:
    """A copy of the model in fp32, on the CPU, with the adapter added in."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from helpers import models
    from helpers.logs import quiet

    found = model.found
    with quiet():
        if found.precision in ("nf4", "int8", "fp4"):
            base = models.load_model(found.profile, found.precision)
            base = base.dequantize()
            base.config.quantization_config = None
        else:
            # As scored: rounded to the run's precision first, and summed in fp32.
            base = AutoModelForCausalLM.from_pretrained(
                models.model_path(found.profile), dtype=models.torch_dtype(found.precision)
            )
        base = base.to("cpu", torch.float32)
        if not found.is_adapter:
            return base
        return PeftModel.from_pretrained(base, str(found.folder)).merge_and_unload()


def _to_16_bits(model: PreTrainedModel) -> None:
    """fp16, which rounds less than bf16; bf16 where a parameter is too large for fp16."""
    import torch

    largest = max(parameter.abs().max().item() for parameter in model.parameters())
    dtype = torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16
    model.to(dtype)
    model.config.dtype = dtype


def _set_end_tokens(merged: PreTrainedModel, model: Scored) -> None:
    """Whoever serves the folder stops where scoring stopped: at eos or at the end of a turn."""
    from transformers import GenerationConfig

    from helpers.encoding import stop_token_ids

    tokenizer = model.tokenizer
    ends = stop_token_ids(tokenizer)
    merged.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    merged.config.eos_token_id = merged.generation_config.eos_token_id
    merged.config.pad_token_id = tokenizer.pad_token_id


def _card(found: Found) -> str:
    from helpers.scored import task_of

    task = task_of(found)
    score = found.metrics.get("test_exact_match")
    scored = ""
    if score is not None:
        scored = (
            f"\n\nExact match on {found.metrics['test_rows']} test rows: {score:.1%} (base model "
            f"{found.metrics['base_exact_match']:.1%}). It was scored before merging; export.json "
            f"says how the merged model's answers compare."
        )
    system = (
        f"\n\nEvery training row had this system message: `{task.system}`" if task.system else ""
    )
    return (
        f"---\nbase_model: {found.base}\nlibrary_name: transformers\n"
        f"pipeline_tag: text-generation\n---\n\n"
        f"# {found.base}, fine-tuned and merged\n\n"
        f"All parameters in 16 bits, with the adapter added in by `python -m helpers.export`."
        f"{scored}{system}\n\n## How to use it\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("model")\n```\n\n'
        "Prompts go through the chat template of this tokenizer, and answers are greedy.\n"
    )


# -- the parity report -------------------------------------------------------------------------


def check(model: Scored, kind: str, output: Path, count: int = ROWS) -> Parity | None:
    """Let the export and the scored model answer the same validation rows.

    Args:
        kind: one of `FORMATS`.

    Returns:
        The comparison; None, with the reason on stderr, where none could be made.
    """
    from helpers import parity, scored, serving

    rows = scored.load_split(model.found, "validation") if count else None
    if rows is None:
        if count:
            note("parity was not measured: the validation rows of the run are not at hand")
        return None
    if kind != "merged" and not serving.is_installed():
        note(f"parity was not measured: it needs llama.cpp ({serving.INSTALL})")
        return None
    rows = rows.select(range(min(count, len(rows))))
    limit = scored.answer_limit(rows, model.tokenizer)
    bar = sys.stderr.isatty()
    expected = model.answer(rows["prompt"], limit, bar)
    if kind == "merged":
        served, prompt_ids = _answers_of_folder(output, rows["prompt"], limit)
        return parity.compare(model, rows["prompt"], expected, served, prompt_ids)
    with tempfile.TemporaryDirectory() as folder:
        files, scales = [output], None
        if kind == "lora":
            files, scales = [_base_gguf(model.found, Path(folder)), output], [1.0]
        with serving.Server(files[0], files[1:]) as server:
            served = server.answers(rows["prompt"], limit, scales, bar)
            return parity.compare(model, rows["prompt"], expected, served, server.prompt_ids)


def _answers_of_folder(folder: Path, prompts: Any, limit: int) -> tuple[list[str], Any]:
    """Answers of a merged folder, loaded as anybody would who has no course: by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.logs import quiet

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids_of(messages: list[dict[str, str]]) -> list[int]:
        chat = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=True
        )
        return list(chat["input_ids"])

    answers = []
    for prompt in prompts:
        ids = torch.tensor([ids_of(prompt)], device=device)
        with quiet(), torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit)
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers, ids_of


def _base_gguf(found: Found, folder: Path) -> Path:
    from helpers import convert, models

    target = folder / "base.gguf"
    convert.write_model(Path(models.model_path(found.profile)), target)
    return target


def _write_record(model: Scored, options: argparse.Namespace, report: Parity | None) -> None:
    import dataclasses

    from helpers import scored
    from helpers.checkpoints import write_json

    output: Path = options.output
    record = {
        "base": model.found.base,
        "run_id": (model.found.record or {}).get("run_id"),
        "format": options.format,
        "quantize": (options.quantize or "f16") if options.format == "gguf" else None,
        "task": dataclasses.asdict(scored.task_of(model.found)),
        "parity": report.to_dict() if report is not None else None,
    }
    beside = output.with_name(f"{output.stem}.{scored.EXPORT_RECORD}")
    write_json(output / scored.EXPORT_RECORD if output.is_dir() else beside, record)


if __name__ == "__main__":
    sys.exit(main())
