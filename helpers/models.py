"""Load models and tokenizers, by profile."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers import CourseError
from helpers.logs import quiet
from helpers.profiles import FLOAT_FORMATS, Profile, torch_dtype
from helpers.tiny import TINY_MODELS, build_tiny
from helpers.weights import MODEL, fetch_smollm2, last_line
from helpers.workarounds import apply_workarounds, patch_falcon

PRECISIONS = (*FLOAT_FORMATS, "int8", "nf4", "fp4")

# A tokenizer without a template (Falcon-7B) gets this one.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
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
                device_map={"": 0 if profile.device == "cuda" else "cpu"},
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise _loading_error(profile, where, error) from error
    return apply_workarounds(model)


def _loading_error(profile: Profile, where: str, error: Exception) -> CourseError:
    return CourseError(
        f"{profile.model_id} could not be loaded from {where}: {last_line(error)} "
        f"If it is a model of the Hub, check the network; if it lies in the cache, delete "
        f"that folder and run this again."
    )
