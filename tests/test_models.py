"""helpers/models.py and helpers/tiny.py: loading, and the tiny models."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError, models, weights
from helpers.profiles import PROFILES, Profile

ROOT = Path(__file__).parent.parent
TINY = PROFILES["tiny"]


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


def test_a_tokenizer_with_no_token_to_spare_pads_with_eos(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|endoftext|>", "<|im_end|>"))
    profile = dataclasses.replace(TINY, model_id=str(tmp_path))
    assert models.load_tokenizer(profile).pad_token == "<|endoftext|>"
    monkeypatch.setattr(models, "SPARE_PAD_TOKENS", (">>SUFFIX<<",))
    tokenizer = models.load_tokenizer(profile)  # as GPT-2's and Pythia's
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_the_tiny_model_is_built_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    for seed in (1, 2):  # the surrounding state of the random numbers must not matter
        torch.manual_seed(seed)
        monkeypatch.setenv(weights.CACHE_VARIABLE, str(tmp_path / str(seed)))
        folder = Path(models.model_path(TINY))
        builds.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert {"model.safetensors", "tokenizer.json"} <= builds[0].keys()
    assert builds[0] == builds[1]
