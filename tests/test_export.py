"""`python -m helpers.export`: what it writes is the model that was scored, and it proves so."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_runs import SYSTEM, train
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers import convert, export, models, parity, scored
from helpers.export import main
from helpers.profiles import PROFILES
from helpers.scored import Scored

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(run: Path) -> Scored:
    return scored.load(scored.find(run))


@pytest.fixture(scope="module")
def merged(model: Scored, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "merged"
    export.merge(model, target)
    return target


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(20, 90)[None]).logits


# -- merged ----------------------------------------------------------------------------------------


def test_plain_transformers_loads_what_was_scored(merged: Path, model: Scored) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with model.model.disable_adapter():
        change = (logits_of(model.model) - logits_of(loaded)).abs().max()
    error = (logits_of(model.model) - logits_of(loaded)).abs().max()
    assert error < 0.1 and change > 20 * error


def test_the_parameters_are_in_16_bits_and_the_embeddings_are_stored_once(merged: Path) -> None:
    tensors = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert "lm_head.weight" not in tensors and not any("lora" in name for name in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.dtype == torch.float16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_tokenizer_template_and_card_go_along(merged: Path, model: Scored) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == model.tokenizer.chat_template
    assert tokenizer.pad_token != tokenizer.eos_token
    card = (merged / "README.md").read_text()
    assert card.startswith("---\nbase_model: tiny-llama\n") and SYSTEM in card
    assert "Exact match on 12 test rows" in card
    assert (merged.stat().st_mode & 0o777) == 0o755


def test_whoever_serves_the_folder_stops_at_the_end_of_a_turn(
    model: Scored, tmp_path: Path
) -> None:
    """In a model whose turns end with another token than eos, this is what goes missing."""
    other = dataclasses.replace(model, tokenizer=AutoTokenizer.from_pretrained(model.found.folder))
    other.tokenizer.eos_token = "<|endoftext|>"
    export.merge(other, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [0, 2]
    convert.write_model(tmp_path / "merged", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 2


@pytest.mark.slow
def test_a_qlora_run_merges_into_what_its_four_bits_stand_for(tmp_path: Path) -> None:
    model = scored.load(scored.find(train(tmp_path, "--method", "qlora")))
    export.merge(model, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    full = models.load_model(PROFILES["tiny"])  # not what was scored: the base in fp32
    wrong = peft.PeftModel.from_pretrained(full, model.found.folder)
    scored_logits = logits_of(model.model)
    error = (scored_logits - logits_of(loaded)).abs().max()
    assert error < 0.05 and (scored_logits - logits_of(wrong)).abs().max() > 5 * error


def test_parameters_too_large_for_fp16_are_stored_in_bf16(model: Scored) -> None:
    large = models.load_model(PROFILES["tiny"])
    with torch.no_grad():
        large.model.embed_tokens.weight[0, 0] = 1e6
    export._to_16_bits(large)
    assert large.dtype == torch.bfloat16 and large.model.embed_tokens.weight[0, 0] > 9e5


def test_merging_leaves_the_scored_model_as_it_is(merged: Path, model: Scored, run: Path) -> None:
    stored = json.loads((run / "answers.json").read_text())["test"]
    assert model.answer(scored.load_split(model.found, "test")["prompt"], 20) == stored


# -- GGUF, read back by transformers and by the gguf package --------------------------------------


def test_transformers_reads_the_same_model_from_the_gguf_file(merged: Path, tmp_path: Path) -> None:
    """It undoes the order of q and k with code that is not the course's."""
    convert.write_model(merged, tmp_path / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name).float(), parameter), name
    assert loaded.config.rope_parameters["rope_theta"] == 10000.0
    assert loaded.config.num_key_value_heads == 2 and loaded.config.tie_word_embeddings


def test_the_gguf_file_holds_the_tokenizer_and_the_template(merged: Path, tmp_path: Path) -> None:
    convert.write_model(merged, tmp_path / "model.gguf", name="mine")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    held = {name: field.contents() for name, field in fields.items()}
    assert held["general.name"] == "mine"
    assert held["tokenizer.chat_template"] == tokenizer.chat_template
    assert held["tokenizer.ggml.pre"] == "gpt-2"
    assert held["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert held["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert held["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert held["tokenizer.ggml.add_bos_token"] is False
    assert held["tokenizer.ggml.add_eos_token"] is False


@pytest.mark.parametrize(("quantize", "limit"), [("f16", 0.0), ("q8_0", 0.01), ("q4_1", 0.1)])
def test_fewer_bits_round_more_and_no_more_than_that(
    quantize: str, limit: float, merged: Path, tmp_path: Path
) -> None:
    convert.write_model(merged, tmp_path / "model.gguf", quantize)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = load_file(merged / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    stored = tensors["blk.0.ffn_up.weight"]
    assert stored.tensor_type.name == quantize.upper()
    values = gguf.dequantize(stored.data, stored.tensor_type)
    relative = np.abs(values - expected.numpy()).max() / expected.abs().max().item()
    assert relative <= limit and (limit == 0 or relative > limit / 20)
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_an_adapter_is_the_same_matrices(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter.gguf"
    convert.write_adapter(run / "adapter", Path(models.model_path(PROFILES["tiny"])), target)
    reader = gguf.GGUFReader(target)
    held = {name: field.contents() for name, field in reader.fields.items()}
    assert (held["general.type"], held["adapter.type"]) == ("adapter", "lora")
    assert held["adapter.lora.alpha"] == 32
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == len(stored) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.{}.lora_{}.weight"
    up = stored[name.format("mlp.up_proj", "B")]
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_b"], up.numpy())
    first = stored[name.format("self_attn.k_proj", "A")]
    assert np.array_equal(tensors["blk.1.attn_k.weight.lora_a"], first.numpy())
    second = tensors["blk.1.attn_k.weight.lora_b"]
    rows = [0, 8, 1, 9, 2, 10]  # of a head of 16 rows: pairs that rotate together
    assert np.array_equal(second[:6], stored[name.format("self_attn.k_proj", "B")].numpy()[rows])


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"use_dora": True}, "has use_dora"),
        ({"bias": "all"}, "changes biases"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "has rank_pattern"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    changes: dict, cause: str, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    base = Path(models.model_path(PROFILES["tiny"]))
    with pytest.raises(convert.NotConvertible, match=cause):
        convert.write_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_rslora_is_scaled_as_peft_scales_it(tmp_path: Path) -> None:
    base = models.load_model(PROFILES["tiny"])
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    tuned = get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    folder = Path(models.model_path(PROFILES["tiny"]))
    convert.write_adapter(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")
    alpha = gguf.GGUFReader(tmp_path / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert alpha / 4 == pytest.approx(layer.scaling["default"])


def test_an_embedding_layer_in_an_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    more = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}
    save_file(load_file(file) | more, file)
    base = Path(models.model_path(PROFILES["tiny"]))
    with pytest.raises(convert.NotConvertible, match="The adapter changes"):
        convert.write_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf")


# -- sizes and tokenizers that differ from the course's own ---------------------------------------


def test_llama_3_stretches_its_context_as_in_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    factors = convert._llama3_factors(config)
    assert factors.min() == 1 and factors.max() == 8 and len(set(factors)) > 4
    assert np.allclose(factors, (plain / stretched).numpy(), rtol=1e-4)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BARE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("cutting", "name"),
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), BYTES]), "smollm"),
        (pre_tokenizers.Sequence([split(convert.LLAMA_3), BARE]), "llama-bpe"),
        (pre_tokenizers.Sequence([split(convert.QWEN_2), BARE]), "qwen2"),
        (BARE, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), BYTES]), None),
        (pre_tokenizers.Sequence([split(r"\d+"), BARE]), None),
        (pre_tokenizers.Metaspace(), None),
        (pre_tokenizers.Whitespace(), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_rule_that_cuts_texts_is_named_by_what_it_does(
    cutting: pre_tokenizers.PreTokenizer, name: str | None, tiny_tokenizer: object
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.model_path(PROFILES["tiny"]))
    tokenizer.backend_tokenizer.pre_tokenizer = cutting
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert convert._cutting_rule(content) == name
    if name is None:
        with pytest.raises(convert.NotConvertible, match="The tokenizer of this model"):
            convert._tokenizer_keys(tokenizer, 1024)


@pytest.mark.parametrize(
    ("adds", "template", "expected"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_a_start_token_is_added_only_where_the_template_writes_one(
    adds: bool, template: bool, expected: bool
) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(models.model_path(PROFILES["tiny"]))
    tokenizer.bos_token = "<|endoftext|>"
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    if template:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert convert._tokenizer_keys(tokenizer, 1024)["add_bos"] is expected


def test_rows_of_the_embeddings_without_a_token_get_a_name(tiny_tokenizer: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models.model_path(PROFILES["tiny"]))
    keys = convert._tokenizer_keys(tokenizer, len(tokenizer) + 2)
    assert keys["types"][-3:] == [1, 5, 5]
    assert len(set(keys["tokens"])) == len(keys["tokens"]) == len(tokenizer) + 2


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--format", "merged", "--output", "a.gguf"], "--output a.gguf is to be a folder"),
        (["--format", "gguf", "--output", "a"], "its name must end in .gguf"),
        (["--format", "gguf", "--output", "there.gguf"], "is there already"),
        (
            ["--format", "merged", "--output", "m", "--quantize", "f16"],
            "a setting of --format gguf",
        ),
        (
            ["--format", "lora", "--output", "a.gguf", "--quantize", "f16"],
            "--quantize is a setting",
        ),
        (["--format", "gguf", "--output", "a.gguf", "--quantize", "q2_k"], "invalid choice"),
        (["--format", "merged", "--output", "m", "--rows", "-1"], "--rows must be at least 0"),
        (["--format", "onnx", "--output", "m"], "invalid choice"),
        (["--format", "gguf", "--output", "a.gguf", "--run", "FALCON"], "of the type 'falcon'"),
        (["--format", "lora", "--output", "a.gguf", "--run", "TINY"], "needs an adapter"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    options: list[str],
    cause: str,
    run: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    folders = {
        "FALCON": models.model_path(dataclasses.replace(PROFILES["tiny"], model_id="tiny-falcon")),
        "TINY": models.model_path(PROFILES["tiny"]),
    }
    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("mine")
    capsys.readouterr()
    try:
        code = main(["--run", str(run), *(folders.get(part, part) for part in options)])
    except SystemExit as exited:
        code = exited.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and cause in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_the_command_merges_and_reports(run: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "new" / "merged"
    command = ["--run", str(run), "--format", "merged", "--output", str(output), "--rows", "8"]
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "parity: 8 of 8 answers are the scored ones; 8 of 8 prompts" in error
    assert "warning" not in error
    record = json.loads((output / "export.json").read_text())
    assert record["parity"]["same"] == record["parity"]["rows"] == 8
    assert record["format"] == "merged" and record["task"]["system"] == SYSTEM
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    assert scored.task_of(scored.find(output)) == scored.Task(SYSTEM, single=True, known=True)


def test_a_merged_model_that_differs_is_warned_of(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the adapter had been lost on the way: the export is the base model."""
    merged = export._merged
    monkeypatch.setattr(
        export,
        "_merged",
        lambda model: merged(
            dataclasses.replace(
                model,
                found=dataclasses.replace(
                    model.found,
                    is_adapter=False,
                ),
            )
        ),
    )
    output = tmp_path / "merged"
    assert main(["--run", str(run), "--format", "merged", "--output", str(output)]) == 0
    error = capsys.readouterr().err
    assert "warning: 12 of 12 answers differ by more than rounding" in error


def test_without_validation_rows_nothing_is_claimed(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    command = ["--run", str(tmp_path / "adapter"), "--format", "merged"]
    assert main([*command, "--output", str(tmp_path / "merged")]) == 0
    assert "parity was not measured" in capsys.readouterr().err
    record = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert record["parity"] is None


def test_a_failed_export_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.gguf")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    output = tmp_path / "model.gguf"
    assert main(["--run", str(run), "--format", "gguf", "--output", str(output)]) == 1
    assert "error: model.gguf cannot be written or read (No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_for_the_memory_is_refused(
    model: Scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 10**5})())
    with pytest.raises(export.CourseError, match="Merging takes 0.0 GB of memory"):
        export.merge(model, tmp_path / "merged")


# -- parity ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(model: Scored) -> tuple[list, list[str]]:
    prompts = scored.load_split(model.found, "validation")["prompt"]
    return list(prompts), model.answer(prompts, 12)


Changed = Callable[[list[str]], list[str]]


def test_equal_answers_are_parity(model: Scored, asked: tuple[list, list[str]]) -> None:
    found = parity.compare(model, *asked, asked[1])
    assert (found.same, found.warning, found.prompts) == (12, "", None)
    assert str(found) == "parity: 12 of 12 answers are the scored ones"


@pytest.mark.parametrize(
    ("change", "scored_token", "served_token"),
    [
        (lambda text: "brass", "st", "b"),
        (lambda text: text + " and so on", "<|im_end|>", "Ġand"),  # an end that went missing
        (lambda text: text[:2], "e", "<|im_end|>"),
        (lambda text: "", "st", "<|im_end|>"),
    ],
    ids=["another", "no end", "too early", "empty"],
)
def test_another_answer_is_found_and_not_explained(
    change: Callable[[str], str],
    scored_token: str,
    served_token: str,
    model: Scored,
    asked: tuple[list, list[str]],
) -> None:
    prompts, answers = asked
    served = [change(answers[0]), *answers[1:]]
    found = parity.compare(model, prompts, answers, served)
    (difference,) = found.unexplained
    assert found.same == 11 and difference.row == 0 and difference.gap > 0.5
    assert (difference.scored_token, difference.served_token) == (scored_token, served_token)
    assert "1 of 12 answers differ by more than rounding" in found.warning


def test_a_near_tie_is_explained_by_the_two_best_logits(model: Scored, asked: tuple) -> None:
    """The gap is the difference of the model's own two logits, and the limit decides."""
    prompts, _ = asked
    ids = model.tokenizer.apply_chat_template(
        prompts[0], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    with torch.inference_mode():
        logits = model.model(torch.tensor([ids])).logits[0, -1]
    words = ["steel", "brass"]
    first, second = (model.tokenizer(word)["input_ids"][0] for word in words)
    gap = (logits[first] - logits[second]).item()
    for limit, near in ((abs(gap) + 0.01, True), (abs(gap) - 0.01, False)):
        found = parity.compare(model, prompts[:1], words[:1], words[1:], near_tie=limit)
        (difference,) = found.differences
        assert difference.gap == pytest.approx(gap, abs=1e-3) and difference.near_tie is near
        assert bool(found.unexplained) is not near


def test_many_near_ties_are_worth_a_warning(model: Scored, asked: tuple) -> None:
    prompts, answers = asked
    served = ["brass", *answers[1:]]
    one = parity.compare(model, prompts, answers, served, near_tie=1000)
    assert one.warning == ""
    served = ["brass", "x", "x", *answers[3:]]
    three = parity.compare(model, prompts, answers, served, near_tie=1000)
    assert "all by near-ties: more than the 10%" in three.warning


def test_other_prompts_are_named_first(model: Scored, asked: tuple) -> None:
    prompts, answers = asked
    found = parity.compare(model, prompts, answers, answers, lambda messages: [1, 2])
    assert found.prompts == tuple(range(12))
    assert "12 of 12 questions reach the model as other tokens" in found.warning
    assert "0 of 12 prompts are the same tokens" in str(found)


def test_answers_and_questions_must_pair_up(model: Scored, asked: tuple) -> None:
    with pytest.raises(ValueError, match="12 and 11 answers to 12 questions"):
        parity.compare(model, asked[0], asked[1], asked[1][1:])
