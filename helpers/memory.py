"""How much memory a training run takes: planned, simulated and measured.

Three views of one number, the bytes alive at the fullest moment of a training step:

    plan        a closed form, written out below; for understanding, in no time
    simulate    the real architecture's real step, run on PyTorch's meta device, where tensors have
                a shape and no content; for truth, in seconds, without weights and without a GPU
    measure     the same count around a step with real tensors

On a CPU the last two agree to a fraction of a percent, and the first comes within 5 % of them
(tests/test_memory.py). All count what is asked of the allocator. What a kernel takes and gives back
before it returns, the gaps between tensors, Python and (on a GPU) the CUDA context come on top.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from helpers import CourseError, models

GIB = 2**30
METHODS = ("full", "lora", "int8", "qlora")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
COMPONENTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits")

# Bytes that a program can have: as torch reports it for the GPUs, which is less than their names
# say; of a laptop's 8 GB, without what the system and a browser hold.
DEVICES = {
    "laptop (8 GB)": 5 * GIB,
    "T4 (16 GB)": int(14.7 * GIB),
    "L4 (24 GB)": int(22.0 * GIB),
    "A100 (40 GB)": int(39.4 * GIB),
    "H100 (80 GB)": int(79.0 * GIB),
}
HEADROOM = 0.1  # share to leave for the CUDA context, kernels' workspaces and gaps between tensors

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


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU if there is one, otherwise resident.

    The resident size covers everything in the process, Python and the libraries included.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


@dataclasses.dataclass(frozen=True)
class Plan:
    """The bytes alive at the fullest moment of a training step.

    Attributes:
        model: its name.
        method: "full", "lora", "int8" or "qlora".
        components: bytes by component, in the order of `COMPONENTS`. They add up to `total`; what
            is not alive at that moment (gradients, if the step is fullest before there are any)
            counts nothing.
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
        lines = [f"{name:12}{_size(size):>12}" for name, size in self.components.items()]
        return "\n".join([*lines, f"{'total':12}{_size(self.total):>12}"])


def will_it_fit(
    plans: Mapping[str, Plan], devices: Mapping[str, int] = DEVICES, headroom: float = HEADROOM
) -> str:
    """A table: for every plan its bytes, and on which device they fit with some headroom left.

    Args:
        plans: by the name that the row gets.
        devices: bytes of memory by name.
        headroom: the share of a device that must stay free.
    """
    wide = max(map(len, plans))
    lines = [f"{'':{wide}}{'GiB':>8}" + "".join(f"{name:>15}" for name in devices)]
    for name, one in plans.items():
        marks = "".join(
            f"{'fits' if one.fits(memory, headroom) else '-':>15}" for memory in devices.values()
        )
        lines.append(f"{name:{wide}}{one.total / GIB:>8.2f}{marks}")
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The training step that `plan` and `simulate` are asked about.

    Attributes:
        method: "full" (all weights learn, kept in fp32), "lora" (frozen weights in `precision`),
            "int8" or "qlora" (frozen weights in 8 or in 4 bits, the rest in fp32). The last three
            train a LoRA adapter in fp32.
        batch_size, sequence_length: rows, and tokens per row with its padding.
        answer_length: positions at the end of a row that get logits (the `logits_to_keep` of
            `helpers.data.CompletionCollator`); all if not given.
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
            "method": METHODS,
            "precision": tuple(PRECISIONS),
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
        return PRECISIONS[self.precision]

    @property
    def autocast(self) -> bool:
        """Trainer computes in bf16 or fp16 by autocast, whatever format the weights have."""
        return self.precision != "fp32"


def _config(model: str | PreTrainedConfig | torch.nn.Module) -> tuple[str, PreTrainedConfig]:
    """(name, config) of a model id, a config or a model."""
    if isinstance(model, str):
        if model in ARCHITECTURES:
            return model, AutoConfig.for_model(**ARCHITECTURES[model])
        if model in models.TINY_MODELS:
            return model, AutoConfig.from_pretrained(models.build_tiny(model))
        raise CourseError(
            f"The shape of {model!r} is not known here. Choose one of "
            f"{(*ARCHITECTURES, *models.TINY_MODELS)}, or give the config: "
            f"AutoConfig.from_pretrained({model!r})."
        )
    config = model if isinstance(model, PreTrainedConfig) else model.config
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name, config


# -- the closed form ---------------------------------------------------------------------------


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
    name, config = _config(model)
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
    # A linear layer that learns keeps its input. Layers that read the same tensor share it; under
    # autocast each has a cast copy of its own.
    for group in shape.reads:
        learns = [name for name in group if name in trained]
        copies = len(learns) if settings.autocast else min(1, len(learns))
        if settings.method == "int8" and not settings.autocast:
            copies = 1  # the 8-bit layers keep it in any case
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


# -- the simulation and the measurement --------------------------------------------------------


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
    from helpers import simulation

    name, config = _config(model)
    return simulation.simulate(name, config, Settings(method=method, **settings))


@dataclasses.dataclass
class Measured:
    """What `measure` found, in bytes: the model alone, and the fullest moment, model included."""

    baseline_bytes: int = 0
    peak_bytes: int = 0


@contextlib.contextmanager
def measure(model: torch.nn.Module) -> Iterator[Measured]:
    """Measure the memory of what runs in the block: `with measure(model) as measured: step()`.

    On a CPU every storage is followed (`helpers.simulation.Storages`). On a GPU PyTorch's allocator
    counts by itself, and its count is taken.

    Yields:
        A `Measured`; complete when the block has ended.
    """
    from helpers.simulation import Storages, held

    measured = Measured()
    tensors = [tensor for tensor in held(model) if isinstance(tensor, torch.Tensor)]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        measured.baseline_bytes = torch.cuda.memory_allocated()
        try:
            yield measured
        finally:
            torch.cuda.synchronize()
            measured.peak_bytes = torch.cuda.max_memory_allocated()
        return
    storages = Storages()
    for tensor in tensors:
        storages.watch(tensor)
    del tensors
    measured.baseline_bytes = storages.bytes
    try:
        with storages:
            yield measured
    finally:
        measured.peak_bytes = storages.peak
