"""The memory of a training step in closed form, from the shape of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from helpers import CourseError
from helpers.memory.settings import COMPONENTS, Plan, Settings, find_config


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the closed form needs to know of an architecture."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    tied: bool  # the output layer's weights are the embedding's
    linears: dict[str, tuple[int, int]]  # of one layer: (inputs, outputs)
    reads: tuple[tuple[str, ...], ...]  # which of them read the same tensor
    inner: int  # numbers per token that the MLP keeps between its linear layers
    norms: int  # per layer
    norm_weights: int  # in the whole model
    one_key: bool  # all heads share one key and value

    @property
    def linear_weights(self) -> int:
        """Of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def other_weights(self) -> int:
        """Embedding, norms and, if it has weights of its own, the output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.norm_weights


def _shape(config: PreTrainedConfig) -> _Shape:
    h, layers = config.hidden_size, config.num_hidden_layers
    common: dict[str, Any] = {
        "layers": layers,
        "hidden": h,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "tied": config.tie_word_embeddings,
    }
    if config.model_type == "llama":
        width = getattr(config, "head_dim", None) or h // config.num_attention_heads
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        inner = config.intermediate_size
        return _Shape(
            **common,
            linears={
                "q_proj": (h, queries),
                "k_proj": (h, keys),
                "v_proj": (h, keys),
                "o_proj": (queries, h),
                "gate_proj": (h, inner),
                "up_proj": (h, inner),
                "down_proj": (inner, h),
            },
            reads=(
                ("q_proj", "k_proj", "v_proj"),
                ("o_proj",),
                ("gate_proj", "up_proj"),
                ("down_proj",),
            ),
            inner=3 * inner,  # gate, its activation, up
            norms=2,
            norm_weights=h * (2 * layers + 1),
            one_key=False,
        )
    if config.model_type == "falcon" and config.multi_query and config.parallel_attn:
        width = h // config.num_attention_heads
        inner = config.ffn_hidden_size
        return _Shape(
            **common,
            linears={
                "query_key_value": (h, h + 2 * width),
                "dense": (h, h),
                "dense_h_to_4h": (h, inner),
                "dense_4h_to_h": (inner, h),
            },
            reads=(
                ("query_key_value", "dense_h_to_4h"),
                ("dense",),
                ("dense_4h_to_h",),
            ),
            inner=inner,  # what goes into the activation function
            norms=1,
            norm_weights=2 * h * (layers + 1),  # weight and bias
            one_key=True,
        )
    raise CourseError(
        f"There is no closed form for the architecture {config.model_type!r}. "
        f"Use memory.simulate with the same arguments."
    )


def plan(
    model: str | PreTrainedConfig | torch.nn.Module, method: str = "lora", **settings: Any
) -> Plan:
    """Plan the memory of a training step from the shape of a model, by formula.

    Args:
        model: "SmolLM2-135M-Instruct", "tiiuae/falcon-7b", a config or a model of the architecture
            Llama or Falcon-7B. Weights are neither needed nor read.
        method: "full", "lora", "int8" or "qlora".
        settings: batch_size and sequence_length, and what else differs from the defaults of
            `Settings`, which explains them all.

    Raises:
        CourseError: for an unknown model or setting.
    """
    name, config = find_config(model)
    step = Settings(method=method, **settings)
    shape = _shape(config)
    targets = step.target_modules or tuple(shape.linears)
    if unknown := [target for target in targets if target not in shape.linears]:
        raise CourseError(f"{name} has no linear layer {unknown[0]!r}: {tuple(shape.linears)}.")

    # What is there from the first step on: exact.
    frozen = _weight_bytes(shape, step)
    ranks = [sum(shape.linears[target]) * step.lora_rank for target in targets]
    learning = shape.layers * sum(ranks)
    if method == "full":
        learning = shape.layers * shape.linear_weights + shape.other_weights
    eight_bits = step.optimizer == "paged_adamw_8bit"
    always = dict.fromkeys(COMPONENTS, 0) | {
        "weights": frozen,
        "adapters": 0 if method == "full" else 4 * learning,
        # Two fp32 numbers per weight; or two bytes, and two fp32 scales for 256 weights.
        "optimizer": 2 * learning + 8 * learning // 256 if eight_bits else 8 * learning,
    }

    # What a forward pass leaves behind for the backward pass.
    tokens, positions = step.batch_size * step.sequence_length, step.batch_size * step.keep
    layer = tokens * _kept_per_token(shape, step, targets)
    stream = tokens * shape.hidden * _stream_bytes(step)
    past_checkpoints = tokens * _kept_past_checkpoints(shape, step, targets)
    kept = shape.layers * (stream + past_checkpoints if step.gradient_checkpointing else layer)
    kept += (
        tokens * shape.hidden * (8 if method == "full" and not shape.one_key else 4)
    )  # last norm
    if step.autocast and not step.gradient_checkpointing:  # 16-bit copies of weights that learn
        copied = shape.layers * (shape.linear_weights if method == "full" else sum(ranks))
        kept += copied * step.dtype.itemsize

    # The step is fullest at one of four moments.
    again = layer if step.gradient_checkpointing else 0
    table = shape.vocabulary * shape.hidden
    cast_table = table * step.dtype.itemsize if _output_is_cast(step) else 0
    table_gradient = 4 * table if method == "full" else 0
    distribution = 4 * positions * shape.vocabulary  # one fp32 number per position and token
    moments = {
        # log-probabilities, their gradient, the logits' gradient; then that of the output weights
        "output layer": {
            "activations": kept,
            "logits": cast_table + max(3 * distribution, distribution + table_gradient),
        },
        # the last layer's backward pass; checkpointed, it is computed again first
        "MLP": {
            "activations": kept + again + tokens * _mlp_work(shape, step, targets),
            "gradients": table_gradient,
        },
        # scores before and after the mask, or the gradients of scores; the MLP keeps nothing yet
        "attention": {
            "activations": kept + again + tokens * _attention_work(shape, step, targets),
            "gradients": table_gradient,
        },
        # A table that serves as embedding and as output layer has two gradients, and their sum.
        "embedding": {"gradients": 4 * learning + (2 * table_gradient if shape.tied else 0)},
    }
    fullest = max(moments, key=lambda moment: sum(moments[moment].values()))
    parts = {part: int(size) for part, size in moments[fullest].items()}
    return Plan(name, method, always | parts, fullest)


def _weight_bytes(shape: _Shape, settings: Settings) -> int:
    linear, other = shape.layers * shape.linear_weights, shape.other_weights
    if settings.method == "full":
        return 4 * (linear + other)
    if settings.method == "lora":
        return settings.dtype.itemsize * (linear + other)
    if settings.method == "int8":  # a byte per weight, an fp32 scale per output
        outputs = shape.layers * sum(out for _, out in shape.linears.values())
        return linear + 4 * outputs + 4 * other
    # Half a byte per weight, a byte of scale per 64, an fp32 scale per 256 of those.
    return linear // 2 + linear // 64 + 4 * linear // (64 * 256) + 4 * other


def _stream_bytes(settings: Settings) -> int:
    """Of a number in the stream from layer to layer: it has the format of the embedding."""
    return settings.dtype.itemsize if settings.method == "lora" else 4


def _output_is_cast(settings: Settings) -> bool:
    """Under autocast fp32 weights are multiplied as a 16-bit copy, kept for the backward pass."""
    return settings.autocast and settings.method != "lora"


def _kept_per_token(shape: _Shape, settings: Settings, targets: Sequence[str]) -> float:
    """Bytes that one layer keeps of one token until its backward pass."""
    number = settings.dtype.itemsize
    stream = _stream_bytes(settings)
    full, h = settings.method == "full", shape.hidden
    trained = tuple(shape.linears) if full else targets

    # A norm computes in fp32 and keeps its input; one that learns, written in Python, also its
    # normalized output.
    kept = shape.norms * h * (stream if shape.one_key and settings.device == "cpu" else 4)
    if full and not shape.one_key:
        kept += shape.norms * 4 * h
    # A linear layer that learns keeps its input. Layers that read the same tensor share it; where
    # autocast has to cast it, each keeps a copy of its own.
    for group in shape.reads:
        learns = [name for name in group if name in trained]
        cast = settings.autocast and _input_bytes(shape, settings, group) != number
        copies = len(learns) if cast else min(1, len(learns))
        if settings.method == "int8" and not cast:  # the 8-bit layers keep it in any case
            copies = 0 if settings.autocast else 1
        kept += copies * number * shape.linears[group[0]][0]
        kept += 0 if full else len(learns) * number * settings.lora_rank
    # Queries, keys and values, as wide as all heads together; PyTorch's plain kernel, which Falcon
    # gets with sdpa because its heads share a key, has them in fp32.
    plain = shape.one_key and settings.attn_implementation == "sdpa"
    kept += 3 * h * (4 if plain else number)
    kept += _scores_per_token(shape, settings)
    if settings.attn_implementation == "sdpa" and not shape.one_key:
        # A fused kernel keeps the mask, too, and its output, if the next layer does not keep that.
        kept += number * settings.sequence_length
        kept += number * h if settings.autocast or "o_proj" not in trained else 0
    # Between the linear layers of the MLP.
    kept += shape.inner * _inner_bytes(settings)
    if not settings.gradient_checkpointing and settings.autocast:
        kept += _kept_past_checkpoints(shape, settings, targets)
    return kept


def _input_bytes(shape: _Shape, settings: Settings, group: tuple[str, ...]) -> int:
    """Of a number that these linear layers read."""
    if group == shape.reads[-1]:  # the end of the MLP
        return _inner_bytes(settings)
    if group[0] in ("o_proj", "dense"):  # after the attention
        return settings.dtype.itemsize
    return _stream_bytes(settings)


def _inner_bytes(settings: Settings) -> int:
    """Of a number between two linear layers.

    Layers of bitsandbytes hand back the format they were given; in 8 bits on a CPU autocast's.
    """
    number = settings.dtype.itemsize
    if settings.method == "int8":
        return number if settings.device == "cpu" else 4
    return 4 if settings.method == "qlora" else number


def _kept_past_checkpoints(shape: _Shape, settings: Settings, targets: Sequence[str]) -> float:
    """Bytes per token and layer that the 8-bit layers keep of their inputs.

    They keep them in a way that checkpointing does not see (as attributes of the autograd context).
    """
    if settings.method != "int8":
        return 0
    number, kept = settings.dtype.itemsize, 0
    for group in shape.reads:
        inputs = shape.linears[group[0]][0]
        if group[0] in ("down_proj", "dense_4h_to_h"):
            kept += inputs * _inner_bytes(settings)
        else:
            kept += inputs * (number if group[0] in ("o_proj", "dense") else 4)
    return kept


def _scores_per_token(shape: _Shape, settings: Settings) -> int:
    """Bytes of a score for every head and every other token, after the softmax."""
    if settings.attn_implementation == "sdpa":
        # A fused kernel keeps one number per head.
        return 4 * shape.heads * (settings.sequence_length if shape.one_key else 1)
    softmax, number = _softmax_bytes(shape, settings), settings.dtype.itemsize
    copy = number if number != softmax else 0  # to be multiplied with the values
    return shape.heads * settings.sequence_length * (softmax + copy)


def _softmax_bytes(shape: _Shape, settings: Settings) -> int:
    return _stream_bytes(settings) if shape.one_key and settings.device == "cpu" else 4


def _mlp_work(shape: _Shape, settings: Settings, targets: Sequence[str]) -> float:
    """Bytes per token that the MLP's backward pass needs beside what is kept."""
    unpacked = 0
    if settings.method in ("int8", "qlora"):  # a matrix, unpacked to be multiplied
        biggest = max(inputs * outputs for inputs, outputs in shape.linears.values())
        unpacked = biggest * settings.dtype.itemsize
    tokens = settings.batch_size * settings.sequence_length
    # Three gradients as wide as the last layer's input; that itself is needed no more.
    widest = shape.linears[shape.reads[-1][0]][0]
    gradients = 3 * widest * _inner_bytes(settings)
    return gradients - _last_input(shape, settings, targets) + unpacked / tokens


def _last_input(shape: _Shape, settings: Settings, targets: Sequence[str]) -> int:
    """Bytes per token of what the MLP's last linear layer keeps of its input."""
    last = shape.reads[-1][0]
    kept = settings.method in ("full", "int8") or last in targets
    return settings.dtype.itemsize * shape.linears[last][0] if kept else 0


def _attention_work(shape: _Shape, settings: Settings, targets: Sequence[str]) -> float:
    """Bytes per token that attention needs beside what is kept, less what the MLP keeps later."""
    work = 0
    if settings.attn_implementation == "eager" or shape.one_key:
        number, softmax = settings.dtype.itemsize, _softmax_bytes(shape, settings)
        copy = number if number != softmax else 0  # there is none yet, or no more
        forward = number + softmax - copy  # scores before and after the mask
        backward = 2 * softmax - copy  # the gradients of the softmax and of the scores
        eager = settings.attn_implementation == "eager"
        if shape.one_key and eager and settings.gradient_checkpointing:
            forward += softmax  # Falcon hands that of the layer before on
        work = shape.heads * settings.sequence_length * max(forward, backward)
    of_the_mlp = shape.inner * _inner_bytes(settings) + _last_input(shape, settings, targets)
    return work - of_the_mlp
