"""A profile says which model, on which device, in which number format, and with which settings.

The cells of a notebook are the same for every profile. `pick_profile()` chooses one from the
machine and prints why; the environment variable COURSE_PROFILE overrides the choice.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from helpers import SPIN_COUNT, SPIN_VARIABLES, CourseError

if TYPE_CHECKING:
    import torch  # imported where it is used, so that `--help` need not wait for it

ENVIRONMENT_VARIABLE = "COURSE_PROFILE"
GIB = 2**30
METHODS = ("lora", "qlora", "full")  # ways to fine-tune
FLOAT_FORMATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # ours: torch's name


def torch_dtype(precision: str) -> torch.dtype:
    """The torch dtype of "fp32", "bf16" or "fp16"."""
    import torch

    return getattr(torch, FLOAT_FORMATS[precision])


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything that differs between a laptop and a GPU. `precision` is "auto" until picked."""

    name: str
    model_id: str  # a Hugging Face model id, or the name of a model that the course builds
    precision: str  # the number format of activations: "fp32", "bf16" or "fp16"
    device: str  # "cpu" or "cuda"
    attn_implementation: str
    quantized: bool  # load the frozen weights in 4 bits unless told otherwise
    target_modules: tuple[str, ...]  # the linear layers that LoRA adapts
    lora_rank: int
    learning_rate: float
    batch_size: int
    eval_batch_size: int
    epochs: float
    max_length: int  # longest example, in tokens
    gradient_checkpointing: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of `precision`."""
        return torch_dtype(self.precision)


def from_json(stored: dict[str, Any]) -> Profile:
    """The profile that `dataclasses.asdict` took apart for run.json.

    Raises:
        KeyError, TypeError: it was stored by another version of the course.
    """
    return Profile(**stored | {"target_modules": tuple(stored["target_modules"])})


LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PROFILES = {
    "tiny": Profile(
        name="tiny",
        model_id="tiny-llama",
        precision="fp32",
        device="cpu",
        attn_implementation="eager",
        quantized=False,
        target_modules=LLAMA_LINEAR,
        lora_rank=8,
        learning_rate=5e-3,
        batch_size=8,
        eval_batch_size=32,
        epochs=1,
        max_length=512,
    ),
    "laptop": Profile(
        name="laptop",
        model_id="SmolLM2-135M-Instruct",
        precision="auto",
        device="auto",
        attn_implementation="auto",
        quantized=False,
        target_modules=LLAMA_LINEAR,
        lora_rank=16,
        learning_rate=1e-3,
        batch_size=4,
        eval_batch_size=32,
        epochs=8,
        max_length=512,
    ),
    "falcon-7b": Profile(
        name="falcon-7b",
        model_id="tiiuae/falcon-7b",
        precision="auto",
        device="cuda",
        attn_implementation="sdpa",
        quantized=True,
        target_modules=("query_key_value",),
        lora_rank=16,
        learning_rate=2e-4,
        batch_size=4,
        eval_batch_size=16,
        epochs=2,
        max_length=512,
        gradient_checkpointing=True,
    ),
}


def cpu_has_bf16() -> bool:
    """True where the processor multiplies bf16 itself (AVX512-BF16, AMX)."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def pick_precision(device: str) -> tuple[str, str]:
    """Return ("fp32" | "bf16" | "fp16", the reason) for a device, "cpu" or "cuda"."""
    if device == "cpu":
        if cpu_has_bf16():
            return "bf16", "this processor computes bf16 itself"
        return "fp32", "this processor has no bf16 instructions, so bf16 would be slower"
    import torch

    # Without including_emulation=False a T4 says yes, and then runs bf16 many times slower.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"{torch.cuda.get_device_name()} computes bf16 itself"
    return "fp16", f"{torch.cuda.get_device_name()} only emulates bf16"


def pick_profile(name: str | None = None, verbose: bool = True) -> Profile:
    """Choose the profile, fill in what depends on the machine, and print the reason in one line.

    Args:
        name: a key of `PROFILES`. Without it COURSE_PROFILE decides, and without that the machine:
            "falcon-7b" on a GPU with at least 14 GiB, "laptop" elsewhere.
        verbose: print the choice and its reasons.

    Raises:
        CourseError: for an unknown name, or a profile that this machine cannot run.
    """
    import torch

    gpu_memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    if name:
        reason = "asked for"
    elif name := os.environ.get(ENVIRONMENT_VARIABLE):
        reason = f"set by {ENVIRONMENT_VARIABLE}"
    elif gpu_memory >= 14 * GIB:
        name, reason = "falcon-7b", f"a GPU with {gpu_memory / GIB:.0f} GiB is here"
    elif gpu_memory:
        name, reason = "laptop", f"a GPU is here, but {gpu_memory / GIB:.0f} GiB is under 14"
    else:
        name, reason = "laptop", "no CUDA GPU is here"
    if name not in PROFILES:
        raise CourseError(
            f"There is no profile {name!r} ({reason}). Choose one of {', '.join(PROFILES)}."
        )
    profile = PROFILES[name]
    if profile.device == "cuda" and not gpu_memory:
        raise CourseError(
            f"The profile {name!r} ({reason}) needs a CUDA GPU with 16 GB, and none is here. "
            f"Use the profile 'laptop', or open the notebook on Colab with a T4."
        )
    device = profile.device
    if device == "auto":
        device = "cuda" if gpu_memory else "cpu"
    precision, why_precision = profile.precision, "the profile says so"
    if precision == "auto":
        precision, why_precision = pick_precision(device)
    attention, why_attention = profile.attn_implementation, "the profile says so"
    if attention == "auto":
        attention, why_attention = pick_attention(device, precision)
    if verbose:
        print(f"profile   {name}: {reason}")
        print(f"model     {profile.model_id} on {device}")
        print(f"precision {precision}: {why_precision}")
        print(f"attention {attention}: {why_attention}")
        if device == "cpu":
            print(f"threads   {torch.get_num_threads()}: {threads_reason()}")
    return dataclasses.replace(
        profile, device=device, precision=precision, attn_implementation=attention
    )


def threads_reason() -> str:
    """Why torch computes with as many threads as it does, and how they wait for each other."""
    if os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        return "one per core; they wait without blocking it, in case another program is busy"
    for name in SPIN_VARIABLES:
        if name in os.environ:
            return f"{name}={os.environ[name]} is set and left as it is"
    if sys.platform == "linux":
        return "one per core; torch was imported before helpers, so another busy program costs more"
    return "one per core"


def pick_falcon(verbose: bool = True) -> Profile:
    """The falcon-7b profile where it can run; elsewhere its rehearsal with a tiny Falcon.

    The rehearsal has everything of the profile (the architecture, 4 bits, checkpoints, the same
    adapter) but the size. Its weights are random, so it learns nothing useful; and it takes bigger
    steps, so that a short run shows something.
    """
    picked = pick_profile(verbose=False)
    if picked.name == "falcon-7b":
        return pick_profile(verbose=verbose)
    if verbose:
        print("profile   rehearsal of falcon-7b: no GPU with 14 GiB, or another profile set")
        print(f"model     tiny-falcon, of random weights, on {picked.device}")
    return dataclasses.replace(
        PROFILES["falcon-7b"],
        name="rehearsal",
        model_id="tiny-falcon",
        device=picked.device,
        precision="fp32" if picked.device == "cpu" else picked.precision,
        learning_rate=1e-2,
    )


def pick_attention(device: str, precision: str) -> tuple[str, str]:
    """Return the attention implementation for a device and number format, and the reason."""
    if device == "cpu" and precision == "bf16":
        return "eager", "in bf16 its backward pass is faster than SDPA's on a CPU"
    if device == "cpu":
        return "sdpa", "in fp32 it trains as fast as eager attention and answers faster"
    return "sdpa", "the fused kernel is faster on a GPU"
