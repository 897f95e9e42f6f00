"""Bugs of the libraries: what each does, where it is reported, and which versions have it.

Each function can be called twice without harm. When an upstream release fixes a bug, its test in
tests/test_workarounds.py fails and the workaround goes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def apply_workarounds(model: PreTrainedModel) -> PreTrainedModel:
    """Apply, in place, the workarounds that a loaded model needs, and return the model."""
    leave_casting_to_autocast()
    keep_four_bit_weights_trainable(model)
    make_output_input_contiguous(model)
    return model


def keep_four_bit_weights_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on processors with AVX512-BF16.

    There the first forward pass in eval mode repacks them for an inference kernel, and training
    after that computes garbage, with no more than a warning.

    Holds for bitsandbytes 0.50. Related:
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def make_output_input_contiguous(model: PreTrainedModel) -> None:
    """Hand the output layer a contiguous input.

    `logits_to_keep` cuts the hidden states to a view that is not contiguous. On a CPU the matrix
    product then copies the whole output matrix once per row: a quarter of a training step of
    SmolLM2. Holds for torch 2.13 with transformers 5.24; not reported.
    """
    head = model.get_output_embeddings()
    if head is not None and not getattr(head, "_gets_contiguous_input", False):
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        head._gets_contiguous_input = True


def leave_casting_to_autocast() -> None:
    """Keep PEFT's adapters from casting their input to fp32 while autocast is on.

    Autocast casts it back for the matrix product, so the values are the same; the detour costs a
    twelfth of a LoRA step on a CPU in bf16, and memory for a second copy of every layer's input.
    PEFT means to skip it in 4-bit layers, but asks about autocast on CUDA alone.
    Holds for peft 0.21; not reported.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    cast = BaseTunerLayer._cast_input_dtype
    if hasattr(cast, "_original"):
        return

    def cast_without_autocast(
        self: BaseTunerLayer, x: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if x is not None and torch.is_autocast_enabled(x.device.type):
            return x
        return cast(self, x, dtype)

    cast_without_autocast._original = cast  # type: ignore[attr-defined]
    BaseTunerLayer._cast_input_dtype = cast_without_autocast


def patch_falcon() -> None:
    """Let bitsandbytes quantize Falcon. Call it before the model is loaded.

    transformers replaces layers of the class `nn.Linear` itself and none of its subclasses.
    Falcon's layers are of a subclass that computes the same, so Falcon-7B "in 4 bits" would stay
    in 16 bits, with no more than a misleading warning, and run out of memory.
    Holds for transformers 5.24; not reported.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear
