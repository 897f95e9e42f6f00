"""A training step on PyTorch's meta device: the real shapes, no weights, every byte followed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers.logs import quiet
from helpers.memory.measure import Storages, iter_tensors
from helpers.memory.settings import COMPONENTS, Plan, Settings, find_config
from helpers.models import quantization_config
from helpers.workarounds import apply_workarounds


def simulate(
    model: str | PreTrainedConfig | torch.nn.Module, method: str = "lora", **settings: Any
) -> Plan:
    """Run one training step of the real architecture without its weights, and follow its bytes.

    The model's own code runs forward and backward on the meta device, with PEFT's adapters and
    bitsandbytes' layers; every operation has its real shapes, and nothing is computed. The step is
    not the first one: the optimizer has its state already. The rows are taken to have padding.

    Args:
        model, method, settings: as for `plan`; any decoder of transformers will do.

    Raises:
        CourseError: for an unknown model or setting.
    """
    name, config = find_config(model)
    return _simulate(name, config, Settings(method=method, **settings))


def _simulate(name: str, config: PreTrainedConfig, settings: Settings) -> Plan:
    config = copy.deepcopy(config)  # building a model writes into it
    emulation = _DeviceEmulation(settings)
    with quiet(), torch.device("meta"), emulation.patched():
        network = _build(config, settings, emulation)
        labels, moments = {}, {}
        with Storages() as storages:
            _label_model_tensors(network, storages, labels)
            states = _optimizer_states(network, settings)
            labels |= {storages.watch(state): "optimizer" for state in states}
            _one_step(network, config, settings, emulation, storages, labels, moments)
            when, alive = storages.fullest()
    components = dict.fromkeys(COMPONENTS, 0)
    for number, (size, shape) in alive.items():
        kind = labels.get(number, "logits" if config.vocab_size in shape else "activations")
        components[kind] += size
    moment = next(name for name, end in moments.items() if when <= end)
    return Plan(name, settings.method, components, moment)


def _build(
    config: PreTrainedConfig, settings: Settings, emulation: _DeviceEmulation
) -> torch.nn.Module:
    """The model as the course trains it, without weights."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    full = settings.method == "full"
    # The frozen weights have the format of the activations; weights that learn are kept in fp32.
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32 if full else settings.dtype,
        attn_implementation=settings.attn_implementation,
    )
    model.config.use_cache = False  # as Trainer sets it
    if settings.method in ("int8", "qlora"):
        _quantize(model, settings)
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=settings.gradient_checkpointing
        )
    if not full:
        targets = list(settings.target_modules) if settings.target_modules else "all-linear"
        lora = LoraConfig(r=settings.lora_rank, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if settings.gradient_checkpointing:
        arguments = {"use_reentrant": False, "context_fn": emulation.checkpointed}
        model.activation_checkpointing_enable(arguments)
    return apply_workarounds(model).train()


def _quantize(model: PreTrainedModel, settings: Settings) -> None:
    """Put bitsandbytes' layers where transformers would, with weights of the quantized shape."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    four_bits = settings.method == "qlora"
    if four_bits:
        config = quantization_config("nf4", settings.dtype)
    else:  # which columns are outliers, multiplied apart in 16 bits, is not known without weights
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    for name, module in model.named_modules():
        shape = shapes.get(f"{name}.weight")
        if type(module).__name__ == "Linear4bit":
            blocks = -(-shape.numel() // 64)
            groups = -(-blocks // 256)
            of_scales = QuantState(
                torch.empty(groups), code=torch.empty(256), blocksize=256, dtype=torch.float32
            )
            state = QuantState(
                absmax=torch.empty(blocks, dtype=torch.uint8),
                shape=shape,
                code=torch.empty(16),
                blocksize=64,
                quant_type="nf4",
                dtype=settings.dtype,
                offset=torch.empty(()),
                state2=of_scales,
            )
            packed = torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
            module.weight = Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True
            )
        elif type(module).__name__ == "Linear8bitLt":
            weight = torch.empty(shape, dtype=torch.int8)
            module.weight = Int8Params(weight, requires_grad=False)
            module.state.CB, module.state.SCB = weight, torch.empty(shape[0])
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bits, not four_bits


def _label_model_tensors(
    network: torch.nn.Module, storages: Storages, labels: dict[int, str]
) -> None:
    for tensor in iter_tensors(network):
        if tensor is not None:
            labels[storages.watch(tensor)] = "weights"
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            labels[storages.watch(parameter)] = "adapters"
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: labels.update({storages.watch(p.grad): "gradients"})
            )


def _optimizer_states(network: torch.nn.Module, settings: Settings) -> list[torch.Tensor]:
    """The tensors that AdamW keeps for every weight that learns.

    PyTorch's keeps two numbers in fp32. That of bitsandbytes keeps two bytes, and two fp32 scales
    for 256 weights; tensors under 4096 weights stay in fp32.
    """
    states = []
    for weight in network.parameters():
        if not weight.requires_grad:
            continue
        eight_bits = settings.optimizer == "paged_adamw_8bit" and weight.numel() >= 4096
        dtype = torch.uint8 if eight_bits else torch.float32
        states += [torch.empty_like(weight, dtype=dtype) for _ in range(2)]
        if eight_bits:
            states += [torch.empty(-(-weight.numel() // 256)) for _ in range(2)]
    return states


def _one_step(
    network: torch.nn.Module,
    config: PreTrainedConfig,
    settings: Settings,
    emulation: _DeviceEmulation,
    storages: Storages,
    labels: dict[int, str],
    moments: dict[str, int],
) -> None:
    """What Trainer does in a step; the optimizer works in place and needs nothing more."""
    rows, length = settings.batch_size, settings.sequence_length
    batch: dict[str, Any] = {
        "input_ids": torch.empty(rows, length, dtype=torch.long),
        "attention_mask": torch.empty(rows, length, dtype=torch.long),
        "labels": torch.empty(rows, settings.keep, dtype=torch.long),
        "logits_to_keep": settings.keep,
    }
    with emulation:
        with emulation.autocast():
            outputs = network(**batch, num_items_in_batch=torch.empty((), dtype=torch.long))
        if settings.autocast:  # accelerate hands all outputs back in fp32
            outputs = {"loss": outputs["loss"], "logits": outputs["logits"].float()}
        loss = outputs["loss"]
        del outputs, batch
        moments["forward"] = storages.now
        loss.backward()  # outside of the emulation; recomputed layers enter it themselves
    del loss
    moments["backward"] = storages.now
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    moments["optimizer"] = storages.now


_MATRIX_PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.nn.functional.scaled_dot_product_attention,
}


class _DeviceEmulation(TorchFunctionMode):
    """What a real device does and the meta device leaves out: autocast, and a choice of kernels."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self._casts: dict[int, torch.Tensor] | None = None

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Make the libraries take the paths that they take on the real device."""
        import bitsandbytes
        from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
        from transformers import masking_utils
        from transformers.models.falcon import modeling_falcon

        def int8_product(x: Any, weight: Any, out: Any = None, state: Any = None, bias: Any = None):
            on_cpu = self.settings.device == "cpu"
            return (MatMul8bitFp if on_cpu else MatMul8bitLt).apply(x, weight, out, bias, state)

        with contextlib.ExitStack() as stack:
            patch = mock.patch.object
            # A batch with padding has a mask; whether it has some cannot be read off a meta tensor.
            stack.enter_context(
                patch(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
            )
            stack.enter_context(patch(bitsandbytes, "matmul", int8_product))
            # As helpers.workarounds.patch_falcon does, but for the moment.
            stack.enter_context(patch(modeling_falcon, "FalconLinear", torch.nn.Linear))
            # Adapters ask whether autocast is on for their input (helpers.workarounds), and
            # PEFT itself whether it is on for a GPU.
            on = {"meta", "cuda"} if self.settings.device == "cuda" else {"meta"}
            stack.enter_context(
                patch(
                    torch,
                    "is_autocast_enabled",
                    lambda kind="cuda": self.settings.autocast and kind in on,
                )
            )
            yield

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward pass under autocast: weights that learn are cast once and kept."""
        self._casts = {}
        yield
        self._casts = None

    def checkpointed(self) -> tuple[Any, Any]:
        """The contexts in which a checkpointed layer runs first, and again in the backward pass."""
        return contextlib.nullcontext(), self._again()

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        with torch.device("meta"), self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.settings.autocast and func in _MATRIX_PRODUCTS:
            args, kwargs = tree_map_only(torch.Tensor, self._lower, (args, kwargs))
        elif self._in_fp32(func):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _in_fp32(self, func: Any) -> bool:
        """Autocast does layer norms in fp32 on a GPU, and not on a CPU."""
        gpu = self.settings.device == "cuda"
        return self.settings.autocast and gpu and func is torch.nn.functional.layer_norm

    def _lower(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.dtype is self.settings.dtype:
            return tensor
        if self._casts is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(self.settings.dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(self.settings.dtype)
        return self._casts[id(tensor)]

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """The kernel that PyTorch would pick: a fused one needs as many keys as queries.

        Falcon's heads share one key, so it gets the plain one, which stores all the scores.
        """
        aten = torch.ops.aten
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0)
        if query.shape[1] != key.shape[1]:
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
            )[0]
        if self.settings.device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
