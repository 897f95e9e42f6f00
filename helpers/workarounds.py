"""Bugs of the libraries: what each does, where it is reported, and which versions have it.

Each function can be called twice without harm. When an upstream release fixes a bug, its test in
tests/test_workarounds.py fails and the workaround goes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import PreTrainedModel


def apply_workarounds(model: PreTrainedModel) -> PreTrainedModel:
    """Apply, in place, the workarounds that a loaded model needs, and return the model."""
    leave_casting_to_autocast()
    keep_four_bit_weights_trainable(model)
    make_output_input_contiguous(model)
    place_virtual_tokens(model)
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


def place_virtual_tokens(model: torch.nn.Module) -> None:
    """Let prompt tuning and prefix tuning compute what they mean.

    PEFT hands on the KV cache as `past_key_values`, which transformers now calls `cache`. In
    `generate` this has no error: the prefix is left out, and the virtual tokens of prompt tuning
    are inserted again before every new token. Besides, PEFT lengthens labels that `logits_to_keep`
    has cut, and padding on the left comes between virtual tokens and text, so that the loss of a
    row depends on the rows beside it.
    Holds for peft 0.21 with transformers 5.24; not reported.
    """
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return
    if hasattr(model, "_places_virtual_tokens"):
        return
    is_prefix = model.active_peft_config.peft_type == PeftType.PREFIX_TUNING

    def correct_inputs(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("past_key_values") is not None:
            kwargs["cache"] = kwargs.pop("past_key_values")
        mask = kwargs.get("attention_mask")  # (rows, virtual tokens + padding + text)
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if mask is not None:
            length = (embeddings if ids is None else ids).shape[1]
            kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        if kwargs.get("labels") is not None and (keep := kwargs.get("logits_to_keep")):
            kwargs["labels"] = kwargs["labels"][:, -keep:]
        return args, kwargs

    def prepare_inputs_for_generation(input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = model.base_model_prepare_inputs_for_generation(input_ids, **kwargs)
        ids, mask, cache = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("cache")
        inputs.pop("position_ids", None)  # they do not count the virtual tokens
        if mask is not None:  # it is left out where nothing is padded
            virtual = mask.new_ones(len(mask), model.active_peft_config.num_virtual_tokens)
            inputs["attention_mask"] = torch.cat([virtual, mask], dim=1)
        if not kwargs.get("use_cache") or cache is None or cache.get_seq_length() == 0:
            prompt = model.get_prompt(len(ids))
            if is_prefix:
                inputs["cache"] = prompt
            else:
                text = model.word_embeddings(ids)
                inputs["inputs_embeds"] = torch.cat([prompt.to(text.dtype), text], dim=1)
                inputs["input_ids"] = None
        return inputs

    model.get_base_model().register_forward_pre_hook(correct_inputs, with_kwargs=True)
    model.prepare_inputs_for_generation = prepare_inputs_for_generation
    model._places_virtual_tokens = True


def patch_falcon() -> None:
    """Let bitsandbytes quantize Falcon. Call it before the model is loaded.

    transformers replaces layers of the class `nn.Linear` itself and none of its subclasses.
    Falcon's layers are of a subclass that computes the same, so Falcon-7B "in 4 bits" would stay
    in 16 bits, with no more than a misleading warning, and run out of memory.
    Holds for transformers 5.24; not reported.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear
