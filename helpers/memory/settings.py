"""What the plan, the simulation and the measurement share: the settings of a step and a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from helpers import CourseError
from helpers.profiles import FLOAT_FORMATS, GIB, torch_dtype
from helpers.tiny import TINY_MODELS, build_tiny

PLANNED_METHODS = ("full", "lora", "int8", "qlora")  # int8 can be planned, not trained
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")

# Bytes that a program can use: for a GPU what torch reports, which is less than its name says; for
# a laptop with 8 GB what the system and a browser leave.
DEVICES = {
    "laptop (8 GB)": 5 * GIB,
    "T4 (16 GB)": int(14.7 * GIB),
    "L4 (24 GB)": int(22.0 * GIB),
    "A100 (40 GB)": int(39.4 * GIB),
    "H100 (80 GB)": int(79.0 * GIB),
}
HEADROOM = (
    0.1  # fraction to leave free for the CUDA context, kernels' workspaces and gaps between tensors
)

# The shapes of the course's two models, so that planning needs neither weights nor a network.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "tiiuae/falcon-7b": {
        "model_type": "falcon",
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,  # all heads share one key and one value
        "parallel_attn": True,  # attention and MLP read the same normalized input
        "new_decoder_architecture": False,  # that is Falcon-40B
        "bias": False,
        "alibi": False,
        "tie_word_embeddings": True,
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes in use at the peak of a training step.

    Attributes:
        model: its name.
        method: "full", "lora", "int8" or "qlora".
        components: bytes by component, in the order of `COMPONENTS`. They add up to `total`; what
            does not exist at that moment (gradients, if the peak comes before the backward pass)
            counts as zero.
        moment: when that is. A simulation knows the pass ("forward", "backward", "optimizer"), the
            closed form what is being done ("output layer", "MLP", "attention", "embedding").
    """

    model: str
    method: str
    components: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes of all components together."""
        return sum(self.components.values())

    def fits(self, memory: int, headroom: float = HEADROOM) -> bool:
        """True if a device with so many bytes holds it and keeps `headroom` of them free."""
        return self.total <= (1 - headroom) * memory

    def __str__(self) -> str:
        lines = [f"{name:12}{format_bytes(size):>12}" for name, size in self.components.items()]
        return "\n".join([*lines, f"{'total':12}{format_bytes(self.total):>12}"])


def will_it_fit(
    plans: Mapping[str, Plan], devices: Mapping[str, int] = DEVICES, headroom: float = HEADROOM
) -> str:
    """A table: for every plan its bytes, and on which device they fit with some headroom left.

    Args:
        plans: by the name that the row gets.
        devices: bytes of memory by name.
        headroom: the fraction of a device that must stay free.
    """
    wide = max(map(len, plans))
    lines = [f"{'':{wide}}{'GiB':>8}" + "".join(f"{name:>15}" for name in devices)]
    for name, one in plans.items():
        marks = "".join(
            f"{'fits' if one.fits(memory, headroom) else '-':>15}" for memory in devices.values()
        )
        lines.append(f"{name:{wide}}{one.total / GIB:>8.2f}{marks}")
    return "\n".join(lines)


def format_bytes(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The training step that `plan` and `simulate` are asked about.

    Attributes:
        method: "full" (all weights are trained, in fp32), "lora" (frozen weights in `precision`),
            "int8" or "qlora" (frozen weights in 8 or in 4 bits, the rest in fp32). The last three
            train a LoRA adapter in fp32.
        batch_size, sequence_length: rows, and tokens per row with its padding.
        answer_length: positions at the end of a row that get logits (the `logits_to_keep` of
            `helpers.encoding.CompletionCollator`); all if not given.
        precision: "fp32", "bf16" or "fp16": what is computed in, by autocast.
        lora_rank, target_modules: of the adapter; all linear layers if not given.
        gradient_checkpointing: keep each layer's input alone and compute the rest again.
        optimizer: "adamw" (PyTorch's, fused) or "paged_adamw_8bit" (bitsandbytes').
        attn_implementation: "eager" or "sdpa".
        device: "cpu" or "cuda"; some paths differ.

    Raises:
        CourseError: for a value that is none of these.
    """

    method: str = "lora"
    batch_size: int
    sequence_length: int
    answer_length: int | None = None
    precision: str = "fp32"
    lora_rank: int = 16
    target_modules: Sequence[str] | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    attn_implementation: str = "eager"
    device: str = "cpu"

    def __post_init__(self) -> None:
        choices = {
            "method": PLANNED_METHODS,
            "precision": tuple(FLOAT_FORMATS),
            "optimizer": OPTIMIZERS,
            "attn_implementation": ("eager", "sdpa"),
            "device": ("cpu", "cuda"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise CourseError(f"There is no {name} {value!r}. Choose one of {allowed}.")
        for name in ("batch_size", "sequence_length", "lora_rank"):
            if (value := getattr(self, name)) < 1:
                raise CourseError(f"{name} must be at least 1, not {value}.")
        answer, length = self.answer_length, self.sequence_length
        if answer is not None and not 1 <= answer <= length:
            raise CourseError(f"answer_length must be from 1 to {length}, not {answer}.")

    @property
    def keep(self) -> int:
        """Positions per row that get logits."""
        return self.answer_length or self.sequence_length

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`."""
        return torch_dtype(self.precision)

    @property
    def autocast(self) -> bool:
        """Trainer computes in bf16 or fp16 by autocast, whatever format the weights have."""
        return self.precision != "fp32"


def find_config(model: str | PreTrainedConfig | torch.nn.Module) -> tuple[str, PreTrainedConfig]:
    """(name, config) of a model id, a config or a model."""
    if isinstance(model, str):
        if model in ARCHITECTURES:
            return model, AutoConfig.for_model(**ARCHITECTURES[model])
        if model in TINY_MODELS:
            return model, AutoConfig.from_pretrained(build_tiny(model))
        raise CourseError(
            f"The shape of {model!r} is not known here. Choose one of "
            f"{(*ARCHITECTURES, *TINY_MODELS)}, or give the config: "
            f"AutoConfig.from_pretrained({model!r})."
        )
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name, config
