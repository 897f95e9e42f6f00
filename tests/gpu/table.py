"""What a CUDA GPU does with Falcon-7B in 4 bits, as a table for the README.

    python tests/gpu/table.py [--steps 20] [--length 512] [--batches 1 2 4]

The model has the real shape and random weights, made and quantized one matrix at a time: nothing is
downloaded, and memory and speed are those of the real one. (What it learns means nothing.) Each
line is a real run of Trainer: LoRA of rank 16 on query_key_value, gradient checkpointing, paged
8-bit AdamW, in fp16 or, where the card has it, bf16. About 5 minutes on a T4, by estimate.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import sys
import tempfile
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
)
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.base import get_keys_to_not_convert

from helpers import logs, memory, models, profiles, training, workarounds
from helpers.encoding import CompletionCollator

PAD = 9  # >>SUFFIX<<


def random_falcon(
    config: PreTrainedConfig, dtype: torch.dtype, device: str, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A Falcon of random weights, its linear layers in NF4, made on `device` piece by piece."""
    workarounds.patch_falcon()
    with logs.quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        quantization = models.quantization_config("nf4", dtype)
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
    torch.manual_seed(0)
    for name, module in model.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            shape = shapes.get(f"{name}.{key}", parameter.shape)
            if "norm" in name or name.endswith("ln_f"):
                values = torch.ones(shape) if key == "weight" else torch.zeros(shape)
            else:
                values = 0.02 * torch.randn(shape, dtype=dtype, device=device)
            module._parameters[key] = _parameter(module, values.to(device, dtype))
    # A buffer that is computed, not loaded; and the output layer is the embedding.
    model.transformer.rotary_emb = type(model.transformer.rotary_emb)(config).to(device)
    model.tie_weights()
    # What transformers sets on a model that it has quantized; Trainer and PEFT look at it.
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    model.quantization_method = quantization.quant_method
    return workarounds.apply_workarounds(model)


def _parameter(module: torch.nn.Module, values: torch.Tensor) -> torch.nn.Parameter:
    if not isinstance(module, Linear4bit):
        return torch.nn.Parameter(values, requires_grad=False)
    packed, state = quantize_4bit(values, compress_statistics=True, quant_type="nf4")
    module.quant_state = state
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
        module=module,
    )


@dataclasses.dataclass
class Run:
    """What a run of Trainer gave. Bytes are those that PyTorch's allocator handed out."""

    losses: list[float]
    peak_bytes: int
    baseline_bytes: int
    tokens_per_second: float


def train(
    model: Any, profile: profiles.Profile, steps: int, length: int, answer: int, optimizer: str
) -> Run:
    """Train an adapter on rows of random tokens, all of `length`, and measure it."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, vocabulary, (profile.batch_size, length), generator=generator).tolist()
    labels = [[-100] * (length - answer + 1) + row[length - answer + 1 :] for row in ids]
    rows = Dataset.from_dict(
        {"input_ids": ids, "labels": labels, "length": [length] * profile.batch_size}
    )
    timer = training.StepTimer()
    with tempfile.TemporaryDirectory() as folder, logs.quiet():
        arguments = training.training_arguments(
            profile,
            folder,
            steps,
            max_steps=steps,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            optim=optimizer,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=CompletionCollator(PAD),
            callbacks=[timer],
        )
        training.remove_progress_callbacks(trainer)
        with memory.measure(model) as measured:
            trainer.train()
    losses = [loss for _, loss in training.curves(trainer)[0]]
    tokens = timer.steps * profile.batch_size * length
    return Run(
        losses, measured.peak_bytes, measured.baseline_bytes, tokens / max(timer.seconds, 1e-9)
    )


def falcon_run(
    config: PreTrainedConfig,
    profile: profiles.Profile,
    steps: int,
    length: int,
    answer: int = 48,
    optimizer: str = "paged_adamw_8bit",
) -> tuple[Run, memory.Plan]:
    """Build, train and plan: what was measured, and the simulation of the same step."""
    attention = profile.attn_implementation
    model = random_falcon(config, profile.dtype, profile.device, attention)
    model = training.add_adapter(model, profile)
    run = train(model, profile, steps, length, answer, optimizer)
    planned = memory.simulate(
        config,
        "qlora",
        batch_size=profile.batch_size,
        sequence_length=length,
        answer_length=answer,
        precision=profile.precision,
        lora_rank=profile.lora_rank,
        target_modules=profile.target_modules,
        gradient_checkpointing=profile.gradient_checkpointing,
        optimizer=optimizer,
        attn_implementation=attention,
        device=profile.device,
    )
    return run, planned


def falcon_7b() -> PreTrainedConfig:
    """The shape of Falcon-7B, written down in helpers.memory."""
    return AutoConfig.for_model(**memory.ARCHITECTURES["tiiuae/falcon-7b"])


def main() -> int:
    """Print the table. Returns the exit code: 1 without a CUDA GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="rows per step")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA GPU is here, so there is nothing to measure.", file=sys.stderr)
        return 1
    profile = profiles.pick_profile("falcon-7b", verbose=False)
    total = torch.cuda.get_device_properties(0).total_memory
    print(f"{torch.cuda.get_device_name()}, {total / memory.GIB:.1f} GiB, {profile.precision}")
    print(f"torch {torch.__version__}, rows of {options.length} tokens, {options.steps} steps\n")
    print("| rows per step | planned | measured peak | tokens per second | losses |")
    print("|---|---|---|---|---|")
    for rows in options.batches:
        gc.collect()  # the model before is in cycles, and would count into the next one's peak
        torch.cuda.empty_cache()
        one = dataclasses.replace(profile, batch_size=rows)
        run, planned = falcon_run(falcon_7b(), one, options.steps, options.length)
        finite = all(math.isfinite(loss) for loss in run.losses)
        print(
            f"| {rows} | {planned.total / memory.GIB:.2f} GiB | {run.peak_bytes / memory.GIB:.2f} "
            f"GiB | {run.tokens_per_second:.0f} | {'all finite' if finite else 'NOT FINITE'} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
