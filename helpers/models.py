"""Load models and tokenizers, by profile, and look at a model before it is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from helpers import CourseError
from helpers.logs import quiet
from helpers.profiles import FLOAT_FORMATS, Profile, torch_dtype
from helpers.tiny import TINY_MODELS, build_tiny
from helpers.weights import HUB_ID, MODEL, fetch_smollm2, last_line
from helpers.workarounds import apply_workarounds, patch_falcon

PRECISIONS = (*FLOAT_FORMATS, "int8", "nf4", "fp4")

# A tokenizer without a template (Falcon-7B) gets this one.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Padding needs a token that never ends an answer. These are unused in the two vocabularies.
SPARE_PAD_TOKENS = ("<|endoftext|>", ">>SUFFIX<<")


def model_path(profile: Profile) -> str:
    """What `from_pretrained` needs for a profile's model: a local folder, or a Hub id."""
    if profile.model_id == MODEL:
        return str(fetch_smollm2())
    if profile.model_id in TINY_MODELS:
        return str(build_tiny(profile.model_id))
    return profile.model_id


def load_tokenizer(profile: Profile) -> PreTrainedTokenizerBase:
    """Load a profile's tokenizer, with a chat template and a pad token that is not eos."""
    where = model_path(profile)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise _loading_error(profile, where, error) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        unused = [t for t in SPARE_PAD_TOKENS if t != tokenizer.eos_token]
        spare = next((t for t in unused if t in tokenizer.get_vocab()), None)
        if spare is None:
            raise CourseError(
                f"The tokenizer of {profile.model_id} has no spare token to pad with. "
                f"Name one of its unused tokens in helpers.models.SPARE_PAD_TOKENS."
            )
        tokenizer.pad_token = spare
    tokenizer.padding_side = "left"
    return tokenizer


def quantization_config(precision: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The `BitsAndBytesConfig` for "int8", "nf4" or "fp4"; None for an unquantized precision."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=precision,  # unset it would be fp4
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What can be known of a model before its weights are loaded.

    Attributes:
        base_id: how others know the model: its Hub id; for a folder, the folder's name.
        context_length: the most tokens it can read; None where its config does not say.
        target_modules: the layers that get an adapter; empty for full fine-tuning.
        trainable_parameters, total_parameters: with the adapter, if it gets one.
        checkpoint_bytes: of one checkpoint: trained parameters and two optimizer states, in fp32.
    """

    base_id: str
    context_length: int | None
    target_modules: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    checkpoint_bytes: int


def inspect_model(
    profile: Profile,
    method: str,
    rank: int | None = None,
    target_modules: Sequence[str] | None = None,
) -> Inspection:
    """Look at a model's architecture, without its weights, and count what would be trained.

    Args:
        method: "lora", "qlora" or "full".
        rank, target_modules: of the adapter; all linear layers but the output layer if not given.

    Raises:
        CourseError: the model is not to be found, has no such layers, or the rank is larger than
            one of their matrices.
    """
    where = model_path(profile)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (OSError, ValueError) as error:
            raise _loading_error(profile, where, error) from error
    total, trained, targets = model.num_parameters(), 0, ()
    if method == "full":
        trained = total
    else:
        shapes = linear_layers(model)
        targets = _match_targets(profile.model_id, shapes, target_modules)
        rank = rank or profile.lora_rank
        for name, shape in shapes.items():
            if _matches(name, targets):
                if rank > min(shape):
                    raise CourseError(
                        f"--rank {rank} is more than the layer {name} of {profile.model_id} can "
                        f"have: its matrix is {shape[0]} x {shape[1]}. Lower --rank to at most "
                        f"{min(shape)}."
                    )
                trained += rank * sum(shape)
        total += trained
    text = config.get_text_config()
    return Inspection(
        base_id=_base_id(profile.model_id),
        context_length=getattr(text, "max_position_embeddings", None),
        target_modules=targets,
        trainable_parameters=trained,
        total_parameters=total,
        checkpoint_bytes=3 * 4 * trained,
    )


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """{name: (inputs, outputs)} of every linear layer but the output layer.

    GPT-2 writes its linear layers as `Conv1D`, with a transposed matrix.
    """
    head = model.get_output_embeddings()
    shapes = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def _match_targets(
    model_id: str, shapes: dict[str, tuple[int, int]], named: Sequence[str] | None
) -> tuple[str, ...]:
    """The target modules by their names, each of which must occur in the model."""
    available = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in shapes))
    if named is None:
        return available
    for target in named:
        if not any(_matches(name, (target,)) for name in shapes):
            raise CourseError(
                f"{model_id} has no linear layer named {target!r}. --target-modules takes some of "
                f"{', '.join(available)}."
            )
    return tuple(named)


def _matches(name: str, targets: Sequence[str]) -> bool:
    """As PEFT does: the whole name of a layer, or the end of it after a dot."""
    return any(name == target or name.endswith("." + target) for target in targets)


def _base_id(model_id: str) -> str:
    """How others know a model: its Hub id, or the name of its folder, never a path."""
    if model_id == MODEL:
        return HUB_ID
    return Path(model_id).name if Path(model_id).is_dir() else model_id


def load_model(profile: Profile, precision: str | None = None) -> PreTrainedModel:
    """Load a profile's model, ready to answer or to train.

    Args:
        profile: from `helpers.profiles.pick_profile`.
        precision: "fp32", "bf16", "fp16", "int8", "nf4" or "fp4". Without it "nf4" where the
            profile is quantized, otherwise the profile's own precision.

    Raises:
        CourseError: for an unknown precision, or when the model cannot be loaded.
    """
    precision = precision or ("nf4" if profile.quantized else profile.precision)
    if precision not in PRECISIONS:
        raise CourseError(f"There is no precision {precision!r}. Choose one of {PRECISIONS}.")
    dtype = torch_dtype(precision if precision in FLOAT_FORMATS else profile.precision)
    where = model_path(profile)
    patch_falcon()
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                quantization_config=quantization_config(precision, dtype),
                attn_implementation=profile.attn_implementation,
                device_map={"": _device(profile)},
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise _loading_error(profile, where, error) from error
    return apply_workarounds(model)


def _device(profile: Profile) -> int | str:
    """The processor, or the GPU of this process: `accelerate launch` numbers them."""
    return int(os.environ.get("LOCAL_RANK", "0")) if profile.device == "cuda" else "cpu"


def _loading_error(profile: Profile, where: str, error: Exception) -> CourseError:
    return CourseError(
        f"{profile.model_id} could not be loaded from {where}: {last_line(error)} "
        f"If it is a model of the Hub, check the network; if it lies in the cache, delete "
        f"that folder and run this again."
    )
