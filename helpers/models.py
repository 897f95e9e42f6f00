"""Load models and tokenizers, by profile, and look at a model before it is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
    """Load a profile's tokenizer, with a chat template and a pad token.

    The pad token is not eos, unless the tokenizer has no other token to spare.
    """
    where = model_path(profile)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
        except Exception as error:  # whatever a file from elsewhere may hold
            raise _loading_error(profile, where, error) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        unused = [t for t in SPARE_PAD_TOKENS if t != tokenizer.eos_token]
        spare = next((t for t in unused if t in tokenizer.get_vocab()), None)
        # Without one eos does as well here: labels and attention mask know padding by its place.
        spare = spare or tokenizer.unk_token or tokenizer.eos_token
        if spare is None:
            raise CourseError(
                f"The tokenizer of {profile.model_id} has no token to pad with and none that ends "
                f"an answer. Set pad_token and eos_token in its tokenizer_config.json."
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
        vocabulary_size: the token ids that it has embeddings for.
        context_length: the most tokens it can read; None where its config does not say.
        target_modules: the layers that get an adapter; empty for full fine-tuning.
        trainable_parameters, total_parameters: with the adapter, if it gets one.
        checkpoint_bytes: of one checkpoint: trained parameters and two optimizer states, in fp32.
    """

    base_id: str
    vocabulary_size: int
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
        except Exception as error:  # whatever a file from elsewhere may hold
            raise _loading_error(profile, where, error) from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CourseError(
                f"{profile.model_id} is of the type {config.model_type!r}, which is no causal "
                f"language model. Choose a model that writes text from left to right."
            )
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation=profile.attn_implementation
                )
        except Exception as error:
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
        base_id=base_id(profile.model_id),
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
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


def base_id(model_id: str) -> str:
    """How others know a model: its Hub id, or the name of its folder, never a path."""
    if model_id == MODEL:
        return HUB_ID
    if not is_folder(model_id):
        return model_id
    folder = Path(os.path.abspath(model_id))
    cached = folder.parent.parent.name  # of the Hub: models--OWNER--NAME/snapshots/COMMIT
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def is_on_the_hub(model_id: str) -> bool:
    """True if `Inspection.base_id` is a Hub id; what the course builds has none."""
    named = model_id not in TINY_MODELS and not is_folder(model_id)
    return named or "/" in base_id(model_id)


def is_folder(model_id: str) -> bool:
    """True for a folder, false for a Hub id or a model that the course makes."""
    return model_id not in (MODEL, *TINY_MODELS) and Path(model_id).is_dir()


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
            model, found = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=dtype,
                quantization_config=quantization_config(precision, dtype),
                attn_implementation=profile.attn_implementation,
                device_map={"": _device(profile)},
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a file from elsewhere may hold
            raise _loading_error(profile, where, error) from error
    # transformers would go on with random numbers in their place.
    missing = found["missing_keys"] & {name for name, _ in model.named_parameters()}
    if missing:
        error = ValueError(f"its files lack {len(missing)} parameters, such as {min(missing)}.")
        raise _loading_error(profile, where, error)
    return apply_workarounds(model)


def _device(profile: Profile) -> int | str:
    """The processor, or the GPU of this process: `accelerate launch` numbers them."""
    return int(os.environ.get("LOCAL_RANK", "0")) if profile.device == "cuda" else "cpu"


def _loading_error(profile: Profile, where: str, error: Exception) -> CourseError:
    reason = last_line(error)
    if "ignore_mismatched_sizes" in reason:
        reason = "the shapes of its parameters are not those of its config.json."
    if Path(where).is_dir():
        lacks = [n for n in ("config.json", "tokenizer.json") if not (Path(where) / n).is_file()]
        if lacks:
            reason = f"it has no {' and no '.join(lacks)}."
        advice = (
            "A whole model has config.json, model.safetensors and tokenizer.json; if the course "
            "stored it there, delete that folder and run this again."
        )
    elif Path(where).is_absolute() or where.startswith("."):
        reason, advice = "there is no such folder.", "Check the name."
    else:
        advice = "Check the name and, for a model of the Hub, the network."
    return CourseError(f"{profile.model_id} could not be loaded from {where}: {reason} {advice}")
