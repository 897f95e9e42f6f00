"""What makes a training step faster changes neither its loss nor its gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

import helpers
from helpers import profiles, tiny, workarounds
from helpers.encoding import IGNORED, CompletionCollator
from helpers.profiles import LLAMA_LINEAR

LENGTHS = {"padded": ((9, 4), (6, 3), (12, 2)), "not padded": ((8, 3), (8, 3), (8, 3))}
TARGETS = {"tiny-llama": list(LLAMA_LINEAR), "tiny-falcon": ["query_key_value"]}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny model with an adapter that is not zero."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny.build_tiny(name), dtype=dtype, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[name]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return workarounds.apply_workarounds(model)


def make_features(lengths: tuple[tuple[int, int], ...]) -> list[dict[str, list[int]]]:
    """Rows of (length, tokens of the answer), of random tokens."""
    random = torch.Generator().manual_seed(0)
    features = []
    for length, answer in lengths:
        ids = torch.randint(20, 500, (length,), generator=random).tolist()
        labels = [IGNORED] * (length - answer) + ids[length - answer :]
        features.append({"input_ids": ids, "labels": labels})
    return features


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.requires_grad}


def plain_loss(model: PeftModel, features: list[dict[str, list[int]]]) -> torch.Tensor:
    """The loss by its definition: row after row, without padding, with logits for all positions."""
    losses = []
    for feature in features:
        logits = model(input_ids=torch.tensor([feature["input_ids"]])).logits[0]
        for position, label in enumerate(feature["labels"]):
            if label != IGNORED:
                losses.append(-logits[position - 1].float().log_softmax(-1)[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_has_the_loss_and_gradients_of_its_rows(
    name: str, lengths: tuple[tuple[int, int], ...]
) -> None:
    model, features = make_model(name), make_features(lengths)
    batch = CompletionCollator(pad_token_id=0)(features)
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1]  # some logits are left out
    loss = model(**batch).loss
    expected = plain_loss(model, features)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    got, reference = gradients(model, loss), gradients(model, expected)
    for weight, gradient in reference.items():
        torch.testing.assert_close(got[weight], gradient, rtol=1e-3, atol=1e-6, msg=weight)


@pytest.mark.parametrize("shift", (-1, 1))
def test_an_answer_that_is_off_by_one_has_another_loss(shift: int) -> None:
    model, features = make_model("tiny-llama"), make_features(LENGTHS["padded"])
    batch = CompletionCollator(pad_token_id=0)(features)
    batch["labels"] = batch["labels"].roll(shift, dims=1)
    difference = model(**batch).loss - plain_loss(model, features)
    assert abs(difference.item()) > 1e-3


def step(model: PeftModel) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and gradients of one step in bf16 under autocast, and the bytes that it saves."""
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = CompletionCollator(pad_token_id=0)(make_features(LENGTHS["padded"]))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    total = sum(saved.values())
    return loss, gradients(model, loss), total


@pytest.mark.parametrize("name", TARGETS)
def test_leaving_the_cast_to_autocast_changes_no_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, got, saved = step(make_model(name, torch.bfloat16))
    model = make_model(name, torch.bfloat16)
    patched = BaseTunerLayer._cast_input_dtype
    monkeypatch.setattr(BaseTunerLayer, "_cast_input_dtype", patched._original)
    expected, reference, more = step(model)
    assert torch.equal(loss, expected)
    for weight, gradient in reference.items():
        assert torch.equal(got[weight], gradient), weight
    # Llama's q, k and v, and its gate and up, share an input; each cast kept a copy of its own.
    assert saved < more or name == "tiny-falcon"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is torch's on Linux alone")
def test_the_threads_wait_politely_unless_the_environment_says_otherwise() -> None:
    show = "import helpers, json, os; print(json.dumps(dict(os.environ)))"
    clean = {k: v for k, v in os.environ.items() if k not in helpers.SPIN_VARIABLES}

    def environment(**variables: str) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", show], env=clean | variables, capture_output=True, check=True
        )
        return json.loads(done.stdout)

    assert environment()["GOMP_SPINCOUNT"] == helpers.SPIN_COUNT
    assert environment(GOMP_SPINCOUNT="77")["GOMP_SPINCOUNT"] == "77"
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        assert "GOMP_SPINCOUNT" not in environment(**{name: "1"})


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"GOMP_SPINCOUNT": helpers.SPIN_COUNT}, "without blocking"),
        ({"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS=1 is set"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT=77 is set"),
    ],
)
def test_the_line_about_threads_says_why(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in helpers.SPIN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reason in profiles.threads_reason()
