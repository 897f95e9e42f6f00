"""What only a CUDA GPU can show: python -m pytest tests/gpu -m gpu -s

Each test skips where there is none. The first runs everywhere, so that the code which the others
share is known to run at all.
"""

import dataclasses
import gc
import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from table import Run, falcon_7b, falcon_run
from transformers import FalconConfig

from helpers import CourseError, memory, models, profiles, training, weights
from helpers.data import load_triage
from helpers.encoding import encode
from helpers.evaluation import answer_losses

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is here")


def test_the_shared_code_runs_on_a_tiny_falcon() -> None:
    config = FalconConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    profile = dataclasses.replace(
        profiles.PROFILES["falcon-7b"], device="cpu", precision="fp32", batch_size=2
    )
    run, planned = falcon_run(config, profile, steps=2, length=48, answer=8)
    assert len(run.losses) == 2 and all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[0] == pytest.approx(math.log(256), rel=0.1)  # random weights know nothing
    assert planned.total == pytest.approx(run.peak_bytes, rel=0.02)


@pytest.fixture(scope="module")
def profile() -> profiles.Profile:
    """fp16, whatever the card: that is what a T4 has, and the harder case."""
    try:
        picked = profiles.pick_profile("falcon-7b")
    except CourseError as error:
        pytest.skip(str(error))
    if torch.cuda.get_device_properties(0).total_memory < 14 * memory.GIB:
        pytest.skip("this GPU has less than the 14 GiB that Falcon-7B needs")
    return dataclasses.replace(picked, precision="fp16", batch_size=1)


@pytest.fixture(scope="module")
def falcon(profile: profiles.Profile) -> tuple[Run, memory.Plan]:
    """Twenty steps of QLoRA on a Falcon-7B of random weights, 512 tokens each."""
    gc.collect()
    torch.cuda.empty_cache()
    run, planned = falcon_run(falcon_7b(), profile, steps=20, length=512)
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    print(f"\n{name} ({total / memory.GIB:.1f} GiB), Falcon-7B in NF4, fp16, 512 tokens a step")
    print(f"  planned peak       {planned.total / memory.GIB:6.2f} GiB")
    print(f"  measured peak      {run.peak_bytes / memory.GIB:6.2f} GiB")
    print(f"  tokens per second  {run.tokens_per_second:6.0f}")
    return run, planned


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_gpu_quantizes_as_the_cpu_does(quant_type: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    arguments = {"compress_statistics": True, "quant_type": quant_type}
    on_cpu = dequantize_4bit(*quantize_4bit(weight, **arguments))
    on_gpu = dequantize_4bit(*quantize_4bit(weight.cuda(), **arguments)).cpu()
    # A value, or a scale, halfway between two codes may go either way; nearly all must agree.
    assert torch.isclose(on_gpu, on_cpu, rtol=1e-2, atol=1e-3).float().mean() > 0.99
    errors = [(back - weight).norm() / weight.norm() for back in (on_cpu, on_gpu)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.gpu
@needs_gpu
def test_a_4_bit_layer_sends_the_right_gradient_back() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(
        512, 256, bias=False, quant_type="nf4", compute_dtype=torch.float16, device="cpu"
    ).cuda()
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16, requires_grad=True)
    y = layer(x)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float16)
    torch.testing.assert_close(y, x @ weight.T, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    expected = weight.float().sum(0).expand(64, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_gpu
def test_the_peak_of_falcon_7b_is_the_planned_one(falcon: tuple[Run, memory.Plan]) -> None:
    run, planned = falcon
    # Ten percent: the allocator rounds, and kernels take workspace that no plan knows.
    assert run.peak_bytes == pytest.approx(planned.total, rel=0.1)
    assert run.peak_bytes < 0.9 * 14.7 * memory.GIB  # a T4


@pytest.mark.gpu
@needs_gpu
def test_twenty_steps_in_fp16_stay_finite(falcon: tuple[Run, memory.Plan]) -> None:
    run, _ = falcon
    assert len(run.losses) == 20
    assert all(math.isfinite(loss) for loss in run.losses)
    # Random weights know nothing; and the same rows again and again can be learned.
    assert run.losses[0] == pytest.approx(math.log(65024), rel=0.2)
    assert run.losses[-1] < run.losses[0]


@pytest.mark.gpu
@needs_gpu
def test_it_trains_faster_than_a_cpu_could(falcon: tuple[Run, memory.Plan]) -> None:
    run, _ = falcon
    assert run.tokens_per_second > 20  # a guard against a path that falls back to something slow


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("loaded_as", [None, "nf4"])
def test_the_laptop_path_runs_on_the_gpu(
    precision: str, loaded_as: str | None, tmp_path: Path
) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU only emulates bf16")
    try:
        weights.fetch_smollm2()
    except CourseError as error:
        pytest.skip(f"the weights are not here: {error}")
    picked = profiles.pick_profile("laptop", verbose=False)
    assert picked.device == "cuda"
    profile = dataclasses.replace(picked, precision=precision)
    tokenizer, triage = models.load_tokenizer(profile), load_triage()
    rows = encode(triage["train"].select(range(80)), tokenizer, profile.max_length)
    model = training.add_adapter(models.load_model(profile, loaded_as or precision), profile)
    before = answer_losses(model, tokenizer, triage["validation"].select(range(16)))["loss"]
    arguments = training.training_arguments(
        profile, tmp_path, 20, num_train_epochs=1, eval_strategy="no", save_strategy="no"
    )
    with memory.measure(model) as measured:
        training.make_trainer(model, arguments, rows, None, tokenizer).train()
    after = answer_losses(model, tokenizer, triage["validation"].select(range(16)))["loss"]
    print(f"\n{precision}, {loaded_as}: loss {before:.2f} -> {after:.2f}, {measured}")
    assert after < 0.8 * before
    adapter = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.dtype is torch.float32 for weight in adapter)  # fp16 needs it
    assert all(torch.isfinite(weight).all() for weight in adapter)
