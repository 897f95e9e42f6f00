"""The command trains any causal language model, and plain peft and transformers load the result."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from helpers import models
from helpers.finetune import main
from helpers.profiles import PROFILES
from helpers.tiny import build_tiny

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"intermediate_size": 96, "num_key_value_heads": 2}
# Of each architecture: its config, whether its tokenizer has a chat template and a pad token, and
# whether input and output share their embedding.
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], bool, bool]] = {
    "llama": (transformers.LlamaConfig, SIZES | GROUPED, True, True),
    "qwen3": (transformers.Qwen3Config, SIZES | GROUPED | {"head_dim": 16}, True, True),
    "gemma3": (
        transformers.Gemma3TextConfig,
        SIZES | GROUPED | {"head_dim": 16, "sliding_window": 32},
        True,
        True,
    ),
    "phi3": (transformers.Phi3Config, SIZES | GROUPED | {"pad_token_id": 0}, True, False),
    "mistral": (transformers.MistralConfig, SIZES | GROUPED, False, False),
    "gpt2": (
        transformers.GPT2Config,
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 2},
        False,
        False,
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZES | {"intermediate_size": 96}, False, True),
    "falcon": (
        transformers.FalconConfig,
        SIZES | {"multi_query": True, "parallel_attn": True, "bias": False},
        False,
        False,
    ),
}
TIED = {"gemma3", "gpt2", "falcon"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each architecture, as `save_pretrained` leaves it."""
    made = {}
    for name, (config_class, settings, template, pad) in ARCHITECTURES.items():
        folder = tmp_path_factory.mktemp(name) / f"tiny-{name}"
        tokenizer = AutoTokenizer.from_pretrained(build_tiny("tiny-llama"))
        if not template:
            tokenizer.chat_template = None
        if not pad:
            tokenizer.pad_token = None
        config = config_class(
            vocab_size=len(tokenizer), tie_word_embeddings=name in TIED, **settings
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = folder
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, options = tmp_path_factory.mktemp("rows"), []
    for name, count in (("train", 12), ("validation", 3), ("test", 2)):
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"prompt": f"{name} {n}?", "completion": f"answer {n}"}) + "\n"
                for n in range(count)
            )
        )
        options += [f"--{name}", str(path)]
    return options


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_trains_and_plain_libraries_load_it(
    name: str, method: str, folders: dict[str, Path], rows: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    options = ["--profile", "tiny", "--model", str(folders[name]), "--method", method]
    options += ["--epochs", "2", "--batch-size", "4", "--learning-rate", "3e-3", *rows]
    assert main([*options, "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    history = json.loads((output / "history.json").read_text())
    assert metrics["steps"] == 6
    assert history["eval"][-1][1] < history["eval"][0][1] + 0.5

    folder = output / ("model" if method == "full" else "adapter")
    base = AutoModelForCausalLM.from_pretrained(folders[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a test of the result", add_special_tokens=False)["input_ids"]
    before = base(torch.tensor([ids])).logits
    if method == "full":
        tuned = AutoModelForCausalLM.from_pretrained(folder)
        tied = tuned.get_input_embeddings().weight is tuned.get_output_embeddings().weight
        assert tied == (name in TIED)
    else:
        tuned = PeftModel.from_pretrained(base, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == folders[name].name
    after = tuned(torch.tensor([ids])).logits
    assert (after - before).abs().max() > 1e-3  # it is another model than the base


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_inspection_counts_what_peft_trains(name: str, folders: dict[str, Path]) -> None:
    from helpers.training import add_adapter

    profile = dataclasses.replace(PROFILES["tiny"], model_id=str(folders[name]))
    found = models.inspect_model(profile, "lora", 4)
    model = models.load_model(profile)
    layers = {n.rsplit(".", 1)[-1] for n in models.linear_layers(model)}
    assert set(found.target_modules) == layers and "lm_head" not in layers
    model = add_adapter(model, profile, 4, target_modules=list(found.target_modules))
    trained, total = model.get_nb_trainable_parameters()
    assert (found.trainable_parameters, found.total_parameters) == (trained, total)
    full = models.inspect_model(profile, "full")
    assert full.trainable_parameters == full.total_parameters == total - trained
    assert found.context_length == 128


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_model_without_pad_token_or_template_answers(name: str, folders: dict[str, Path]) -> None:
    from helpers.evaluation import generate_answers

    profile = dataclasses.replace(PROFILES["tiny"], model_id=str(folders[name]))
    tokenizer = models.load_tokenizer(profile)
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two words and more")]
    model = models.load_model(profile)
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=4)
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=4)[0] for p in prompts]
    assert together == alone


@pytest.fixture
def damaged(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model's folder, to be damaged."""
    return shutil.copytree(folders["llama"], tmp_path / "model")


def lose_parameters(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def make(folder: Path, config: PreTrainedConfig) -> None:
    """Another model with the same tokenizer."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


BERT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT |= {"initializer_range": 0.2}  # as strong as in a trained model
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer.json"),
    "no parameters": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "half a file": (lambda f: os.truncate(f / "model.safetensors", 900), "could not be loaded"),
    "parameters lost": (lose_parameters, "its files lack 9 parameters"),
    "other shapes": (lambda f: change_config(f, intermediate_size=80), "the shapes of its"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "unknown type": (lambda f: change_config(f, model_type="nonsense"), "could not be loaded"),
    "not causal": (lambda f: change_config(f, model_type="t5"), "no causal language model"),
    "an encoder": (
        lambda f: make(f, transformers.BertConfig(vocab_size=1024, intermediate_size=96, **BERT)),
        "reads text in both directions",
    ),
    "another tokenizer": (
        lambda f: make(f, transformers.LlamaConfig(vocab_size=99, **SIZES | GROUPED)),
        "does not belong to the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_trained_is_one_line(
    damage: str,
    damaged: Path,
    rows: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it, cause = DAMAGE[damage]
    break_it(damaged)
    capsys.readouterr()
    options = ["--profile", "tiny", "--model", str(damaged), *rows]
    assert main([*options, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and cause in error


def test_answers_end_where_the_model_can_read_no_more(folders: dict[str, Path]) -> None:
    """GPT-2 has an embedding for each of its 128 positions, and none for the next."""
    from helpers.evaluation import generate_answers

    profile = dataclasses.replace(PROFILES["tiny"], model_id=str(folders["gpt2"]))
    model, tokenizer = models.load_model(profile), models.load_tokenizer(profile)
    prompts = [[{"role": "user", "content": text}] for text in ("one " * 40, "two")]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=100)
    alone = [generate_answers(model, tokenizer, [p], max_new_tokens=100)[0] for p in prompts]
    assert together == alone


@pytest.mark.parametrize(
    ("folder", "base"),
    [
        ("my-model", "my-model"),
        ("models--someone--their-model/snapshots/0123abcd", "someone/their-model"),
    ],
)
def test_a_folder_is_known_by_its_name_or_its_hub_id(
    folder: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / folder)
    assert models.base_id(".") == models.base_id(str(tmp_path / folder)) == base
    assert models.is_on_the_hub(".") == ("/" in base)


def test_every_process_loads_onto_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = dataclasses.replace(PROFILES["falcon-7b"], device="cuda")
    assert models._device(profile) == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert models._device(profile) == 1
    assert models._device(PROFILES["tiny"]) == "cpu"
