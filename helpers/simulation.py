"""A training step on PyTorch's meta device: the real shapes, no weights, every byte followed.

`helpers.memory` is the way in; this is what its `simulate` and `measure` are made of.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from helpers import models
from helpers.memory import COMPONENTS, Plan, Settings

# -- following bytes ---------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """While active, follow every storage that an operation reads or makes, until it is freed.

    A storage is the memory behind one or more tensors; views share one, and it counts once.
    A storage that is first seen as an input was there before, so it counts from the start.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}  # address -> (number, storage)
        self._sizes: list[int] = []  # by number, in order of appearance
        self._shapes: list[tuple[int, ...]] = []
        self._changes: list[int] = []  # number + 1 where one appears, its negative where it goes
        self._from_the_start: set[int] = set()

    def watch(self, tensor: torch.Tensor, existed: bool = True) -> int:
        """Follow the storage of a tensor; return its number."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address][0]
        number, size = len(self._sizes), storage.nbytes()

        def gone(_: weakref.ref) -> None:
            del self._alive[address]
            self.bytes -= size
            self._changes.append(-(number + 1))

        self._alive[address] = (number, weakref.ref(storage, gone))
        self._sizes.append(size)
        self._shapes.append(tuple(tensor.shape))
        self.bytes += size
        if existed:
            self.peak += size
            self._from_the_start.add(number)
        else:
            self._changes.append(number + 1)
        self.peak = max(self.peak, self.bytes)
        return number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self.watch(value)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.watch(value, existed=False)
        return result

    @property
    def now(self) -> int:
        """The position in time: how many storages have come and gone."""
        return len(self._changes)

    def fullest(self) -> tuple[int, dict[int, tuple[int, tuple[int, ...]]]]:
        """(position in time, {number: (bytes, shape)}) of the moment with the most bytes alive."""
        size = most = sum(self._sizes[number] for number in self._from_the_start)
        when = 0
        for position, change in enumerate(self._changes, start=1):
            size += self._sizes[abs(change) - 1] * (1 if change > 0 else -1)
            if size > most:
                when, most = position, size
        alive = set(self._from_the_start)
        for change in self._changes[:when]:
            if change > 0:
                alive.add(change - 1)
            else:
                alive.discard(-change - 1)
        return when, {number: (self._sizes[number], self._shapes[number]) for number in alive}


def held(model: torch.nn.Module) -> Iterator[torch.Tensor | None]:
    """Every tensor that a model holds: parameters, buffers, and the constants of quantization."""
    for module in model.modules():
        yield from module._parameters.values()
        yield from module._buffers.values()
        state = getattr(module, "state", None)  # of a Linear8bitLt
        yield from (getattr(state, name, None) for name in ("CB", "SCB"))
    for parameter in model.parameters():
        yield from (getattr(parameter, name, None) for name in ("CB", "SCB"))
        if (state := getattr(parameter, "quant_state", None)) is not None:  # of a Params4bit
            yield from (state.absmax, state.code, state.offset)
            if state.state2 is not None:
                yield from (state.state2.absmax, state.state2.code)


# -- the simulation ----------------------------------------------------------------------------


def simulate(name: str, config: PreTrainedConfig, settings: Settings) -> Plan:
    """The plan of a model's training step, by running it; see `helpers.memory.simulate`."""
    config = copy.deepcopy(config)  # building a model writes into it
    pretended = _Pretend(settings)
    with models.quiet(), torch.device("meta"), pretended.as_if_there():
        network = _build(config, settings, pretended)
        labels, moments = {}, {}
        with Storages() as storages:
            _label_held(network, storages, labels)
            states = _optimizer_states(network, settings)
            labels |= {storages.watch(state): "optimizer" for state in states}
            _one_step(network, config, settings, pretended, storages, labels, moments)
            when, alive = storages.fullest()
    components = dict.fromkeys(COMPONENTS, 0)
    for number, (size, shape) in alive.items():
        kind = labels.get(number, "logits" if config.vocab_size in shape else "activations")
        components[kind] += size
    moment = next(name for name, end in moments.items() if when <= end)
    return Plan(name, settings.method, components, moment)


def _build(config: PreTrainedConfig, settings: Settings, pretended: _Pretend) -> torch.nn.Module:
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
        arguments = {"use_reentrant": False, "context_fn": pretended.checkpointed}
        model.activation_checkpointing_enable(arguments)
    return models.ready(model).train()


def _quantize(model: PreTrainedModel, settings: Settings) -> None:
    """Put bitsandbytes' layers where transformers would, with weights of the quantized shape."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    four_bits = settings.method == "qlora"
    if four_bits:
        config = models.quantization_config("nf4", settings.dtype)
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


def _label_held(network: torch.nn.Module, storages: Storages, labels: dict[int, str]) -> None:
    for tensor in held(network):
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
    pretended: _Pretend,
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
    with pretended:
        with pretended.autocast():
            outputs = network(**batch, num_items_in_batch=torch.empty((), dtype=torch.long))
        if settings.autocast:  # accelerate hands all outputs back in fp32
            outputs = {"loss": outputs["loss"], "logits": outputs["logits"].float()}
        loss = outputs["loss"]
        del outputs, batch
        moments["forward"] = storages.now
        loss.backward()  # without the pretence; recomputed layers bring their own
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


class _Pretend(TorchFunctionMode):
    """What a real device does and the meta device leaves out: autocast, and a choice of kernels."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self._casts: dict[int, torch.Tensor] | None = None

    @contextlib.contextmanager
    def as_if_there(self) -> Iterator[None]:
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
            # As helpers.models.mend_falcon does, but for the moment.
            stack.enter_context(patch(modeling_falcon, "FalconLinear", torch.nn.Linear))
            # PEFT asks whether autocast is on for the GPU; nobody tells it of a CPU's.
            on = self.settings.autocast and self.settings.device == "cuda"
            stack.enter_context(
                patch(torch, "is_autocast_enabled", lambda kind="cuda": on and kind == "cuda")
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
