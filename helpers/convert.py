"""A model or an adapter of the Llama family -> GGUF, the file format of llama.cpp and Ollama.

A GGUF file holds everything that serving needs: the matrices, the sizes, the tokenizer and the chat
template. Three things go wrong silently, and the answers are others than before: llama.cpp rotates
pairs of neighbouring rows of q and k where transformers rotates halves, so these rows are put into
another order; the rule that cuts a text before the merges of its tokenizer has a name in GGUF, and
it must be that of the tokenizer at hand; and whether a start token is added must fit the template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from helpers import CourseError
from helpers.encoding import stop_token_ids

ARCHITECTURE = gguf.MODEL_ARCH.LLAMA
INSTEAD = (
    "Export it with --format merged, and convert that folder with convert_hf_to_gguf.py of "
    "llama.cpp, or serve it as it is with vLLM or `transformers serve`"
)
# Our name: the format of matrices, and that of the embeddings, which are the output layer too.
QUANTIZATIONS = {
    "f16": (GGMLQuantizationType.F16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q4_1),
}
# GPT-2's rule, as the tokenizers library has it built in, and two that are written out.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


class NotConvertible(CourseError):
    """A model or adapter that this course does not write as GGUF. Says what to use instead."""


# -- a whole model -----------------------------------------------------------------------------


def write_model(model: Path, target: Path, quantize: str = "f16", name: str | None = None) -> None:
    """Write a folder of safetensors with its tokenizer as one GGUF file.

    Args:
        model: a folder that `from_pretrained` loads.
        target: the file; it appears whole or not at all.
        quantize: a key of `QUANTIZATIONS`. Vectors stay in fp32, and so do few columns.
        name: what the file calls itself.

    Raises:
        NotConvertible: another architecture, or a tokenizer that has no name in GGUF.
    """
    matrix, embedding, file_type = QUANTIZATIONS[quantize]
    config = _llama_config(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_type("model")
    writer.add_name(name or model.name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for name, tensor in _renamed(_tensors(model), config):
        kind = embedding if name.startswith(("token_embd.", "output.")) else matrix
        if tensor.ndim == 1:
            kind = GGMLQuantizationType.F32
        elif tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    _write(writer, target)


def require_convertible(model: Path) -> None:
    """Raise `NotConvertible` now rather than after the work, for a folder or file of a model."""
    config = _llama_config(model)
    _tokenizer_keys(AutoTokenizer.from_pretrained(model), config.vocab_size)


def _llama_config(model: Path | str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "llama":
        raise NotConvertible(
            f"This course writes GGUF for the Llama family, and this model is of the type "
            f"{config.model_type!r}. {INSTEAD}."
        )
    if config.rope_parameters["rope_type"] not in ("default", "llama3"):
        raise NotConvertible(
            f"This model stretches its context by {config.rope_parameters['rope_type']!r}, which "
            f"this course does not write. {INSTEAD}."
        )
    return config


def _head_size(config: PreTrainedConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    head = _head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is not a dict
                yield name, tensors.get_tensor(name)


def _renamed(
    tensors: Iterator[tuple[str, torch.Tensor]], config: PreTrainedConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors under llama.cpp's names, in fp32, with q and k in its order of rows."""
    names = gguf.get_tensor_name_map(ARCHITECTURE, config.num_hidden_layers)
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # without an output layer llama.cpp takes the embeddings
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise NotConvertible(f"llama.cpp's Llama has no parameter such as {name}. {INSTEAD}.")
        yield target, _permuted(name, tensor.float().numpy(), config)
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)


def _permuted(name: str, tensor: np.ndarray, config: PreTrainedConfig) -> np.ndarray:
    """Rows 0 .. n of each head of q and k in the order 0, n/2, 1, n/2 + 1, ...; others as is."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    layer = next((layer for layer in heads if f".{layer}." in name), None)
    if layer is None:
        return tensor
    halves = tensor.reshape(heads[layer], 2, -1, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def _llama3_factors(config: PreTrainedConfig) -> np.ndarray:
    """How much slower than without stretching each pair of a head turns (Llama 3.1)."""
    rope = config.rope_parameters
    head = _head_size(config)
    frequencies = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


# -- the tokenizer -----------------------------------------------------------------------------


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    keys = _tokenizer_keys(tokenizer, size)
    writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
    writer.add_tokenizer_pre(keys["pre"])
    writer.add_token_list(keys["tokens"])
    writer.add_token_types(keys["types"])
    writer.add_token_merges(keys["merges"])
    for name, token in keys["ids"].items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(keys["add_bos"])
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(keys["template"])


def _tokenizer_keys(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """What GGUF says about a tokenizer.

    Raises:
        NotConvertible: it is not byte-level BPE, or cuts texts by an unknown rule.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    rule = _cutting_rule(content)
    template = tokenizer.chat_template
    if model["type"] != "BPE" or model.get("byte_fallback") or rule is None:
        raise NotConvertible(
            f"The tokenizer of this model ({model['type']}, cut by another rule than GPT-2's, "
            f"SmolLM's, Llama 3's or Qwen 2's) is none that this course writes. {INSTEAD}."
        )
    if not isinstance(template, str):
        raise NotConvertible(
            f"The tokenizer of this model has no chat template, or several, and a server needs "
            f"one. {INSTEAD}."
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    words = {index: text for text, index in model["vocab"].items()}
    words |= {index: token["content"] for index, token in added.items()}
    types = []
    for index in range(size):
        if index not in words:  # rows of the embeddings that no token uses
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            special = added[index]["special"]
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    ids = {n: getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "unk", "pad")}
    # The token that ends a turn, where it is not eos: without it answers would not end.
    others = [token for token in stop_token_ids(tokenizer) if token != tokenizer.eos_token_id]
    ids["eot"] = others[0] if others else None
    return {
        "pre": rule,
        "tokens": [words.get(index, f"[unused {index}]") for index in range(size)],
        "types": types,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "ids": {name: token for name, token in ids.items() if token is not None},
        "add_bos": _begins_with_bos(tokenizer),
        "template": template,
    }


def _cutting_rule(content: dict[str, Any]) -> str | None:
    """GGUF's name for the rule by which a text is cut before the merges; None for an unknown one.

    Named by what the tokenizer does: the copy of a model may cut otherwise than the original.
    """
    if content["normalizer"] is not None:
        return None
    rule = content["pre_tokenizer"] or {}
    steps = rule.get("pretokenizers", [rule])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return "gpt-2" if last["use_regex"] else None
    if len(steps) > 2:
        return None
    first = steps[0]
    if first["type"] == "Digits" and first["individual_digits"] and last["use_regex"]:
        return "smollm"
    pattern = first.get("pattern", {}).get("Regex")
    if first.get("behavior") != "Isolated" or last["use_regex"]:
        return None
    return {LLAMA_3: "llama-bpe", QWEN_2: "qwen2"}.get(pattern)


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts bos before a text, and the chat template does so too.

    llama.cpp then counts the template's alone. Where the template writes none, none was scored.
    """
    if tokenizer.bos_token is None or tokenizer("-")["input_ids"][0] != tokenizer.bos_token_id:
        return False
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "-"}], tokenize=False)
    return chat.startswith(tokenizer.bos_token)


# -- an adapter --------------------------------------------------------------------------------


def write_adapter(adapter: Path, base: Path, target: Path) -> None:
    """Write a LoRA adapter as GGUF, to be loaded beside its base model.

    Args:
        adapter: a folder of PEFT's, with adapter_config.json and adapter_model.safetensors.
        base: the base model's folder; its config.json is read.

    Raises:
        NotConvertible: another architecture, or more than plain LoRA.
    """
    config = _llama_config(base)
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    _require_plain_lora(settings)
    alpha, rank = settings["lora_alpha"], settings["r"]
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp scales by alpha / rank; rsLoRA by alpha / sqrt(rank).
    scaled = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(scaled))
    names = gguf.get_tensor_name_map(ARCHITECTURE, config.num_hidden_layers)
    for name, tensor in _tensors(adapter):
        layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        target_name = names.get_name(layer)
        if target_name is None or part not in ("A.weight", "B.weight"):
            raise NotConvertible(f"The adapter changes {layer or name}. {_ADAPTER_INSTEAD}.")
        matrix = tensor.float().numpy()
        if part == "B.weight":
            matrix = _permuted(f"{layer}.", matrix, config)
        writer.add_tensor(f"{target_name}.weight.lora_{part[0].lower()}", matrix)
    _write(writer, target)


_ADAPTER_INSTEAD = (
    "Only plain LoRA of linear layers can stand beside a model in llama.cpp. Merge it: "
    "--format gguf"
)


def _require_plain_lora(settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise NotConvertible(
            f"This adapter is of the kind {settings.get('peft_type')}. {_ADAPTER_INSTEAD}."
        )
    more = (
        "use_dora",
        "modules_to_save",
        "alpha_pattern",
        "rank_pattern",
        "trainable_token_indices",
    )
    for name in more:
        if settings.get(name):
            raise NotConvertible(f"This adapter has {name}. {_ADAPTER_INSTEAD}.")
    if settings.get("bias", "none") != "none":
        raise NotConvertible(f"This adapter changes biases. {_ADAPTER_INSTEAD}.")


# -- the file ----------------------------------------------------------------------------------


def _write(writer: GGUFWriter, target: Path) -> None:
    unfinished = target.with_name(target.name + ".unfinished")
    steps: tuple[Callable[[], None], ...] = (
        lambda: writer.write_header_to_file(unfinished),
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    )
    try:
        for step in steps:
            step()
        writer.close()
        os.replace(unfinished, target)
    finally:
        for file in writer.fout or ():
            file.close()
        unfinished.unlink(missing_ok=True)
