"""helpers/methods.py: each method trains what it says, answers, and starts alike everywhere."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from helpers import CourseError, data, encoding, methods, models, training
from helpers.encoding import IGNORED, CompletionCollator
from helpers.evaluation import answer_losses, evaluating, generate_answers, token_losses
from helpers.profiles import PROFILES

TINY = PROFILES["tiny"]
LABELS = list(methods.METHODS)
VIRTUAL = ["prompt tuning", "prefix tuning"]
# Part of each weight moves into the adapter.
DECOMPOSED = {"PiSSA", "OLoRA"}
# What the names of all trained parameters contain.
TRAINED = {
    "LoRA": "lora_",
    "LoRA of rank 1": "lora_",
    "rsLoRA": "lora_",
    "LoRA+": "lora_",
    "DoRA": "lora_",
    "PiSSA": "lora_",
    "OLoRA": "lora_",
    "VeRA": "vera_lambda_",
    "IA3": "ia3_l",
    "prompt tuning": "prompt_encoder",
    "prefix tuning": "prompt_encoder",
    "LayerNorm tuning": "ln_tuning_layers",
    "last layers": "layers.1.",
    "full": "",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.load_tokenizer(TINY)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return data.load_triage()["train"].select(range(6))


@pytest.fixture(scope="module")
def features(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return encoding.encode(rows, tokenizer, 512)


def prepared(label: str) -> PreTrainedModel | PeftModel:
    set_seed(0)
    return methods.prepare(models.load_model(TINY), label)


def disturbed(label: str) -> PreTrainedModel | PeftModel:
    """A method's model as after some training: every trained number is moved."""
    model = prepared(label)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 1.0 if label in VIRTUAL else 0.1
                parameter.add_(scale * torch.randn(parameter.shape))
    return model.eval()


def base_parameters(model: PreTrainedModel | PeftModel) -> list[torch.Tensor]:
    """Copies of all frozen parameters, in order."""
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, features: Dataset, size: int = 32
) -> torch.Tensor:
    return torch.cat(token_losses(model, tokenizer, list(features), size))


def test_the_labels_are_those_of_the_methods() -> None:
    assert TRAINED.keys() == methods.METHODS.keys()
    for label, method in methods.METHODS.items():
        low, middle, high = method.rates
        assert method.label == label and method.description.count(".") == 2
        assert 1.9 <= middle / low <= 4 and 1.9 <= high / middle <= 4


@pytest.mark.parametrize("label", LABELS)
def test_training_changes_what_it_should_and_lowers_the_loss(
    label: str, features: Dataset, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = prepared(label)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = base_parameters(model)
    assert trained and all(TRAINED[label] in name for name in trained)
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    rate = methods.METHODS[label].rates[2]
    batch = Dataset.from_list([features[i] for i in range(4)] * 3)  # the same four rows thrice
    arguments = training.training_arguments(
        TINY,
        tmp_path,
        3,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        learning_rate=rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
    )
    optimizer = methods.optimizer(model, label, rate)
    trainer = training.make_trainer(
        model, arguments, batch, None, tokenizer, optimizers=(optimizer, None)
    )
    trainer.train()
    assert trainer.state.global_step == 3
    curve = [loss for _, loss in training.curves(trainer)[0]]
    assert curve[0] > curve[1] > curve[2]
    now = dict(model.named_parameters())
    moved = [name for name, before in trained.items() if not torch.equal(now[name], before)]
    assert len(moved) == len(trained)
    assert all(map(torch.equal, base_parameters(model), frozen))


@pytest.mark.parametrize("label", LABELS)
def test_the_base_model_is_left_as_it_was_where_promised(
    label: str, features: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    base = models.load_model(TINY)
    before = losses(base, tokenizer, features)
    model = disturbed(label)
    assert not torch.allclose(losses(model, tokenizer, features), before, atol=1e-3)
    if isinstance(model, PeftModel) and label not in DECOMPOSED:
        with model.disable_adapter():
            without = losses(model, tokenizer, features)
        torch.testing.assert_close(without, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", [label for label in LABELS if label not in VIRTUAL])
def test_before_training_it_answers_as_the_base_model_does(
    label: str, features: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = losses(models.load_model(TINY), tokenizer, features)
    actual = losses(prepared(label), tokenizer, features)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", LABELS)
def test_answers_do_not_depend_on_the_batch(
    label: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = disturbed(label)
    head = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
    head[:3] = 0  # it seldom stops; the tied output layer would repeat the last token for ever
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    prompts = rows["prompt"][:4]
    together = generate_answers(model, tokenizer, prompts, 12)
    assert together == generate_answers(model, tokenizer, prompts, 12, batch_size=1)
    assert all(together)
    first = answer_losses(model, tokenizer, rows, 6)
    second = answer_losses(model, tokenizer, rows, 1)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)
    assert first["value_loss"] == pytest.approx(second["value_loss"], abs=1e-5)


def merged(model: PeftModel) -> PreTrainedModel:
    return model.merge_and_unload()


@pytest.mark.parametrize(
    "label", [n for n, m in methods.METHODS.items() if m.merges and m.config is not None]
)
def test_the_merged_model_computes_the_same(
    label: str, features: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = disturbed(label)
    before = losses(model, tokenizer, features)
    plain = merged(model)
    assert not isinstance(plain, PeftModel)
    names = {name for name, _ in models.load_model(TINY).named_parameters()}
    assert {name for name, _ in plain.named_parameters()} == names
    torch.testing.assert_close(losses(plain, tokenizer, features), before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("label", VIRTUAL)
def test_virtual_tokens_cannot_be_merged(label: str) -> None:
    assert not methods.METHODS[label].merges
    with pytest.raises(AttributeError):
        merged(prepared(label))


@pytest.mark.parametrize("label", LABELS)
def test_the_same_seed_starts_the_same_model(label: str) -> None:
    first, second = (dict(prepared(label).named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("label", LABELS)
def test_what_is_kept_is_what_was_trained(label: str) -> None:
    model = prepared(label)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert methods.saved_bytes(model) == trained


def test_lora_plus_trains_b_faster_than_a() -> None:
    model = prepared("LoRA+")
    optimizer = methods.optimizer(model, "LoRA+", 1e-3)
    assert optimizer is not None
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == pytest.approx(16e-3 if "lora_B" in name else 1e-3)
    assert not rates
    assert methods.optimizer(model, "LoRA", 1e-3) is None


def test_errors_say_what_to_choose() -> None:
    model = models.load_model(TINY)
    with pytest.raises(CourseError, match="one of LoRA, LoRA of rank 1"):
        methods.prepare(model, "lora")
    with pytest.raises(CourseError, match="fp32"):
        methods.prepare(model.bfloat16(), "LoRA")


# -- virtual tokens: what helpers.workarounds.place_virtual_tokens is for --------------------------


def by_hand(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of one text without padding, by the base model's own forward."""
    base, prompt = model.get_base_model(), model.get_prompt(1)
    tokens = torch.tensor([ids])
    # `type(base).forward`: past the hook that is tested.
    if isinstance(prompt, torch.Tensor):
        embeddings = torch.cat([prompt, base.get_input_embeddings()(tokens)], dim=1)
        output = type(base).forward(base, inputs_embeds=embeddings, use_cache=False)
    else:
        output = type(base).forward(base, input_ids=tokens, cache=prompt)
    return output.logits[0, -len(ids) :]


@pytest.mark.parametrize("label", VIRTUAL)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(
    label: str, features: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = disturbed(label)
    batch = CompletionCollator(tokenizer.pad_token_id)(list(features))
    assert (batch["attention_mask"] == 0).any() and batch["logits_to_keep"] < len(
        batch["input_ids"][0]
    )
    with evaluating(model):
        loss = model(**batch).loss
        expected = torch.cat(
            [
                torch.nn.functional.cross_entropy(
                    by_hand(model, row["input_ids"])[:-1],
                    torch.tensor(row["labels"])[1:],
                    ignore_index=IGNORED,
                    reduction="none",
                )[torch.tensor(row["labels"])[1:] != IGNORED]
                for row in features
            ]
        )
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-5)
    measured = losses(model, tokenizer, features)
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", VIRTUAL)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_generation_computes_the_logits_of_the_forward_pass(
    label: str, use_cache: bool, count: int, features: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = disturbed(label)
    texts = [features["input_ids"][i][: 30 + 5 * i] for i in range(count)]
    padded = tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt")
    with evaluating(model):
        output = model.generate(
            **padded,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, dim=1)  # (rows, new tokens, vocabulary)
        new = output.sequences[:, -6:].tolist()
        for row, text in enumerate(texts):
            expected = by_hand(model, text + new[row])[len(text) - 1 : -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", VIRTUAL)
def test_peft_still_loses_virtual_tokens_in_generation(
    label: str, features: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, peft has fixed it, and that part of our workaround can go."""
    monkeypatch.setattr("helpers.workarounds.place_virtual_tokens", lambda model: None)
    model = disturbed(label)
    text = features["input_ids"][0][:30]
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor([text]),
            attention_mask=torch.ones(1, len(text), dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, -3:].tolist()
        expected = by_hand(model, text + new)[len(text) - 1 : -1]
    assert not torch.allclose(torch.cat(output.logits), expected, atol=1e-2)


def test_peft_still_lengthens_labels_that_were_cut(
    features: Dataset, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, peft has fixed it, and that part of our workaround can go."""
    monkeypatch.setattr("helpers.workarounds.place_virtual_tokens", lambda model: None)
    batch = CompletionCollator(tokenizer.pad_token_id)(list(features))
    with pytest.raises(ValueError, match="to match target batch_size"):
        prepared("prompt tuning")(**batch)


@pytest.mark.parametrize("label", VIRTUAL)
def test_virtual_tokens_are_placed_once(label: str) -> None:
    model = prepared(label)
    hooks = len(model.get_base_model()._forward_pre_hooks)
    with evaluating(model):
        assert len(model.get_base_model()._forward_pre_hooks) == hooks == 1
