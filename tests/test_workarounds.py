"""helpers/workarounds.py: the bugs still exist, and what works around them works."""

from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import models
from helpers.encoding import CompletionCollator, encode
from helpers.evaluation import answer_losses
from helpers.profiles import PROFILES
from helpers.training import add_adapter, curves, make_trainer, training_arguments
from helpers.workarounds import apply_workarounds

TINY = PROFILES["tiny"]


def test_applying_them_twice_adds_one_hook(tiny_model: PreTrainedModel) -> None:
    apply_workarounds(apply_workarounds(tiny_model))
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
    return torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None


@pytest.mark.usefixtures("avx512bf16")
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit")
def test_bitsandbytes_still_spoils_4_bit_weights_in_eval_mode() -> None:
    """If this fails, bitsandbytes has fixed it, and our workaround can go."""
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
