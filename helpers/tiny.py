"""Tiny models of random weights, built on the spot: for tests, and to rehearse Falcon-7B."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from helpers import CourseError
from helpers.data import load_triage
from helpers.logs import quiet
from helpers.weights import CACHE_VARIABLE, cache_dir

TINY_MODELS = ("tiny-llama", "tiny-falcon")


def build_tiny(name: str) -> Path:
    """Build a model of random weights with a tokenizer trained on the course's data, once.

    Args:
        name: "tiny-llama", or "tiny-falcon": Falcon-7B's architecture, 64 wide and 2 layers deep.
            Like the original, its tokenizer has 12 special tokens under the ids 0 to 11, and
            neither a pad token nor a chat template.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        CourseError: the cache cannot be written.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    write = _write_tiny_falcon if name == "tiny-falcon" else _write_tiny_llama
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            if not target.is_dir():  # another process was faster
                with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
                    write(Path(folder) / "tiny")
                    os.replace(Path(folder) / "tiny", target)
    except (OSError, SafetensorError) as error:
        raise CourseError(
            f"The model could not be stored in {target.parent}: {error}. Set {CACHE_VARIABLE} to a "
            f"folder that can be written, then run this again."
        ) from error
    return target


# In the order of their ids, 0 to 11, in Falcon's own tokenizer.
FALCON_SPECIAL_TOKENS = (
    *(f">>{word}<<" for word in ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT")),
    *(f">>{word}<<" for word in ("ANSWER", "QUESTION", "DOMAIN", "PREFIX", "SUFFIX", "MIDDLE")),
    "<|endoftext|>",
)


def _write_tiny_llama(target: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    _write_random(config, tokenizer, target)


def _write_tiny_falcon(target: Path) -> None:
    end = "<|endoftext|>"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_train_bpe(FALCON_SPECIAL_TOKENS), bos_token=end, eos_token=end
    )
    config = transformers.FalconConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _write_random(config, tokenizer, target)


def _train_bpe(special_tokens: tuple[str, ...]) -> tokenizers.Tokenizer:
    bpe = tokenizers.ByteLevelBPETokenizer()
    with contextlib.redirect_stdout(io.StringIO()):
        bpe.train_from_iterator(
            load_triage()["train"]["message"],
            vocab_size=1024,
            special_tokens=list(special_tokens),
            show_progress=False,
        )
    return bpe._tokenizer


def _write_random(
    config: transformers.PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, target: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with quiet():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
