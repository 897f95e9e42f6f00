"""Memory: the plan, the simulation and real steps of Trainer agree, and each rests on something.

The real steps run on the CPU. What needs a GPU stands in tests/gpu.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from helpers import CourseError, logs, memory, models, tiny, training
from helpers.memory import Storages
from helpers.profiles import PROFILES, pick_falcon

GIB = memory.GIB
LOADED_AS = {"int8": "int8", "qlora": "nf4"}
FALCON = "tiiuae/falcon-7b"
T4 = {"precision": "fp16", "device": "cuda", "attn_implementation": "sdpa"}


def measured_peak(
    model_id: str,
    method: str,
    batch_size: int,
    sequence_length: int,
    answer_length: int,
    folder: Path,
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    attn_implementation: str = "eager",
) -> int:
    """The peak of two real steps of Trainer, on rows of which one has padding."""
    profile = dataclasses.replace(
        PROFILES["laptop"],
        model_id=model_id,
        device="cpu",
        precision=precision,
        attn_implementation=attn_implementation,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
    )
    loaded_as = "fp32" if method == "full" else LOADED_AS.get(method, precision)
    model = models.load_model(profile, loaded_as)
    if method != "full":
        model = training.add_adapter(model, profile, target_modules="all-linear")
    answer = answer_length - 1  # the collator keeps the position before the answer, too
    lengths = [sequence_length - 4] + [sequence_length] * (batch_size - 1)
    rows = [
        {
            "input_ids": [(7 * row + token) % 1000 for token in range(length)],
            "labels": [-100] * (length - answer) + list(range(answer)),
            "length": length,
        }
        for row, length in enumerate(lengths)
    ]
    arguments = training.training_arguments(
        profile, folder, 2, max_steps=2, eval_strategy="no", save_strategy="no"
    )
    tokenizer = models.load_tokenizer(profile)
    with logs.quiet():  # the 8-bit layers warn of every cast
        trainer = training.make_trainer(model, arguments, Dataset.from_list(rows), None, tokenizer)
        with memory.measure(model) as measured:
            trainer.train()
    assert measured.baseline_bytes < measured.peak_bytes
    return measured.peak_bytes


SMOLLM2 = "SmolLM2-135M-Instruct"
REAL_STEPS = [
    # model, method, rows, tokens, positions with logits, and what differs from plain fp32
    (SMOLLM2, "lora", 2, 48, 12, {}),
    (SMOLLM2, "lora", 3, 40, 40, {"gradient_checkpointing": True}),
    (SMOLLM2, "qlora", 2, 48, 12, {}),
    (SMOLLM2, "qlora", 2, 48, 12, {"gradient_checkpointing": True}),
    (SMOLLM2, "full", 2, 32, 12, {}),
    ("tiny-falcon", "full", 4, 64, 24, {}),
    ("tiny-falcon", "full", 4, 64, 24, {"precision": "bf16", "gradient_checkpointing": True}),
    ("tiny-falcon", "lora", 4, 64, 24, {}),
    ("tiny-falcon", "lora", 2, 160, 24, {"gradient_checkpointing": True}),
    ("tiny-falcon", "lora", 4, 64, 64, {"precision": "bf16"}),
    ("tiny-falcon", "int8", 4, 64, 24, {}),
    ("tiny-falcon", "int8", 4, 64, 24, {"precision": "bf16"}),
    ("tiny-falcon", "qlora", 8, 32, 24, {}),
    ("tiny-falcon", "qlora", 4, 96, 24, {"precision": "bf16", "gradient_checkpointing": True}),
    ("tiny-falcon", "qlora", 4, 64, 24, {"attn_implementation": "sdpa"}),
    ("tiny-llama", "int8", 4, 64, 24, {"gradient_checkpointing": True}),
    ("tiny-llama", "lora", 4, 128, 24, {"attn_implementation": "sdpa"}),
]


@pytest.mark.parametrize(("model_id", "method", "rows", "tokens", "positions", "more"), REAL_STEPS)
def test_plan_and_simulation_agree_with_real_steps(
    model_id: str,
    method: str,
    rows: int,
    tokens: int,
    positions: int,
    more: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if model_id == SMOLLM2:
        request.getfixturevalue("laptop")  # skips where the weights are not here
    settings = {"batch_size": rows, "sequence_length": tokens, "answer_length": positions, **more}
    measured = measured_peak(model_id, method, rows, tokens, positions, tmp_path, **more)
    planned = memory.plan(model_id, method, **settings)
    simulated = memory.simulate(model_id, method, **settings)
    assert simulated.total == pytest.approx(measured, rel=0.01)
    assert planned.total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("qlora", {"batch_size": 4, "sequence_length": 256, "answer_length": 48}),
        ("qlora", {"batch_size": 1, "sequence_length": 512, "gradient_checkpointing": True}),
        (
            "qlora",
            {"batch_size": 4, "sequence_length": 512, "target_modules": ["query_key_value"]},
        ),
        ("int8", {"batch_size": 2, "sequence_length": 256, "gradient_checkpointing": True}),
        ("full", {"batch_size": 1, "sequence_length": 256, "gradient_checkpointing": True}),
    ],
)
def test_the_closed_form_agrees_with_the_simulation_of_falcon_7b(
    method: str, settings: dict[str, Any]
) -> None:
    planned = memory.plan(FALCON, method, **settings, **T4)
    simulated = memory.simulate(FALCON, method, **settings, **T4)
    assert planned.total == pytest.approx(simulated.total, rel=0.05)
    for part in ("weights", "adapters", "optimizer"):
        assert planned.components[part] == pytest.approx(simulated.components[part], rel=0.001)


# -- what the plan rests on --------------------------------------------------------------------


def test_an_independent_count_gives_the_same_peak(tiny_model: torch.nn.Module) -> None:
    """PyTorch's profiler hears of every byte from the CPU allocator itself."""
    model = tiny_model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        ids = torch.randint(0, 1000, (2, 24))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        peak = max(peak, alive)
    assert peak > 0
    with memory.measure(model) as measured:
        step()
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    grown = measured.peak_bytes - measured.baseline_bytes - states
    assert grown == pytest.approx(peak, rel=0.01)


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    before = torch.zeros(1000)  # 4,000 bytes that are there already
    with Storages() as storages:
        first = before + 1
        view = first.view(10, 100)[2:]
        assert storages.bytes == 8000
        del first
        assert storages.bytes == 8000  # the view holds it
        del view
        assert storages.bytes == 4000
        torch.zeros(250)
    assert (storages.bytes, storages.peak) == (4000, 8000)


def test_the_baseline_is_what_the_model_holds() -> None:
    for precision in ("fp32", "int8", "nf4"):
        model = models.load_model(PROFILES["tiny"], precision)
        with memory.measure(model) as measured:
            pass
        # get_memory_footprint leaves out the constants of quantization: an eighth, and 1 KiB each.
        footprint = model.get_memory_footprint()
        assert footprint <= measured.baseline_bytes < 1.3 * footprint


@pytest.mark.parametrize(("method", "loaded_as"), [("lora", "fp32"), ("qlora", "nf4")])
def test_planned_weights_are_those_of_the_loaded_model(
    method: str, loaded_as: str, laptop: Any
) -> None:
    planned = memory.plan(SMOLLM2, method, batch_size=1, sequence_length=8)
    with memory.measure(models.load_model(laptop, loaded_as)) as measured:
        pass
    assert planned.components["weights"] == pytest.approx(measured.baseline_bytes, rel=0.01)


def test_falcon_7b_by_arithmetic() -> None:
    settings = {"batch_size": 1, "sequence_length": 8, "target_modules": ["query_key_value"]}
    planned = memory.plan(FALCON, "qlora", **settings, **T4)
    learning = 32 * 16 * (4544 + 4672)
    assert learning == 4_718_592
    assert planned.components["adapters"] == 4 * learning
    assert planned.components["optimizer"] == 8 * learning
    paged = memory.plan(FALCON, "qlora", **settings, **T4, optimizer="paged_adamw_8bit")
    assert paged.components["optimizer"] == 2 * learning + learning // 32
    full = memory.plan(FALCON, "full", **{**settings, "target_modules": None}, **T4)
    assert full.components["weights"] == 4 * 6_921_720_704


def test_heads_that_share_a_key_get_the_plain_attention_kernel() -> None:
    query, key = torch.zeros(1, 71, 16, 64), torch.zeros(1, 1, 16, 64)
    assert torch._fused_sdp_choice(query, key, key) == 0  # the plain one
    assert torch._fused_sdp_choice(query, query, query) != 0


def test_checkpointing_does_not_free_what_8_bit_layers_keep() -> None:
    config = LlamaConfig(**memory.ARCHITECTURES[SMOLLM2] | {"num_hidden_layers": 8})
    settings = {"batch_size": 4, "sequence_length": 128, "answer_length": 8}
    saved = {
        method: memory.simulate(config, method, **settings).components["activations"]
        / memory.simulate(config, method, **settings, gradient_checkpointing=True).components[
            "activations"
        ]
        for method in ("int8", "qlora")
    }
    assert saved["qlora"] > 2 * saved["int8"]


def test_other_architectures_are_simulated_but_have_no_closed_form() -> None:
    config = GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=500)
    settings = {"batch_size": 2, "sequence_length": 16}
    with pytest.raises(CourseError, match=r"no closed form.*'gpt2'.*memory\.simulate"):
        memory.plan(config, "full", **settings)
    simulated = memory.simulate(config, "full", **settings)
    weights = sum(w.numel() for w in AutoModelForCausalLM.from_config(config).parameters())
    assert simulated.components["weights"] == pytest.approx(4 * weights, rel=0.01)


def test_a_model_or_its_config_will_do(tiny_model: torch.nn.Module) -> None:
    settings = {"batch_size": 2, "sequence_length": 16}
    totals = {
        memory.plan(model, "lora", **settings).total
        for model in ("tiny-llama", tiny_model, tiny_model.config)
    }
    assert len(totals) == 1


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        ("nobody/nothing", {}, "shape of 'nobody/nothing' is not known.*AutoConfig"),
        (SMOLLM2, {"method": "dora"}, "no method 'dora'.*qlora"),
        (SMOLLM2, {"precision": "fp8"}, "no precision 'fp8'.*bf16"),
        (SMOLLM2, {"optimizer": "sgd"}, "no optimizer 'sgd'"),
        (SMOLLM2, {"batch_size": 0}, "batch_size must be at least 1"),
        (SMOLLM2, {"answer_length": 9}, "answer_length must be from 1 to 8"),
        (SMOLLM2, {"target_modules": ["c_attn"]}, "no linear layer 'c_attn'.*q_proj"),
    ],
)
def test_bad_settings_are_named(model: str, changed: dict[str, Any], message: str) -> None:
    settings = {"batch_size": 1, "sequence_length": 8} | changed
    with pytest.raises(CourseError, match=message):
        memory.plan(model, **settings)


def test_the_table_says_where_it_fits() -> None:
    plans = {
        method: memory.plan(FALCON, method, batch_size=1, sequence_length=8, **T4)
        for method in ("full", "qlora")
    }
    table = memory.will_it_fit(plans, {"T4": int(14.7 * GIB), "two H100": 160 * GIB}).splitlines()
    assert [line.split()[-2:] for line in table[1:]] == [["-", "fits"], ["fits", "fits"]]
    tight = int(plans["qlora"].total / 0.95)
    assert "-" in memory.will_it_fit({"qlora": plans["qlora"]}, {"tight": tight})


# -- Falcon, as far as it goes without a GPU ---------------------------------------------------


def falcon(name: str = "nf4") -> Any:
    profile = dataclasses.replace(
        PROFILES["falcon-7b"], model_id="tiny-falcon", device="cpu", precision="fp32"
    )
    return models.load_model(profile, name)


def test_transformers_alone_leaves_falcon_unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why patch_falcon() is needed. If this fails, transformers has changed and it may go."""
    from transformers.models.falcon import modeling_falcon

    class FalconLinear(torch.nn.Linear):  # what stands there in transformers
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T

    monkeypatch.setattr(models, "patch_falcon", lambda: None)
    monkeypatch.setattr(modeling_falcon, "FalconLinear", FalconLinear)
    assert not any(isinstance(module, Linear4bit) for module in falcon().modules())


def test_falcon_is_quantized_and_computes_the_same() -> None:
    quantized = [module for module in falcon().modules() if isinstance(module, Linear4bit)]
    assert len(quantized) == 2 * 4  # layers, linear layers in each
    model = falcon("fp32")
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_without_a_big_gpu_the_profile_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSE_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rehearsal, real = pick_falcon(verbose=False), PROFILES["falcon-7b"]
    assert (rehearsal.model_id, rehearsal.device) == ("tiny-falcon", "cpu")
    for kept in ("target_modules", "lora_rank", "batch_size", "gradient_checkpointing"):
        assert getattr(rehearsal, kept) == getattr(real, kept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (15 * GIB, 15 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    picked = pick_falcon(verbose=False)
    assert (picked.name, picked.device, picked.precision) == ("falcon-7b", "cuda", "fp16")


def test_the_tiny_falcon_lacks_what_the_big_one_lacks() -> None:
    from transformers import AutoTokenizer

    raw = AutoTokenizer.from_pretrained(tiny.build_tiny("tiny-falcon"))
    assert (raw.pad_token, raw.chat_template, raw.eos_token_id) == (None, None, 11)
    profile = dataclasses.replace(PROFILES["falcon-7b"], model_id="tiny-falcon", device="cpu")
    tokenizer = models.load_tokenizer(profile)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (">>SUFFIX<<", 9)
    assert len(tokenizer) == falcon("fp32").config.vocab_size  # no row was added
