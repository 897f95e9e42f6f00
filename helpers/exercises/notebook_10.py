"""The exercises of notebook 10, scaling out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from helpers.exercises import Exercise, close

# Arguments of traffic_ratio: bytes of frozen weights, bytes of the adapter, GPUs.
TRIALS = ((4e9, 2e7, 2), (4e9, 2e7, 8), (1e6, 1e6, 4), (0.0, 5e6, 2))


def _ratio(weights: float, adapter: float, gpus: int) -> float:
    return 1.0 if gpus == 1 else (adapter + 2 * (weights + adapter)) / (2 * adapter)


def _gives(expected: Callable[..., float], trials: tuple = TRIALS) -> Callable[[Any], bool]:
    """True for functions that give the expected numbers in all trials."""
    return lambda function: all(
        math.isclose(float(function(*trial)), expected(*trial), rel_tol=0.01) for trial in trials
    )


def _dtype(answer: Any) -> str:
    return str(answer).strip().lower().removeprefix("torch.").strip("\"'. ")


EXERCISES = {
    "10.1": Exercise(
        task="From one process with batch size 8 and accumulation 2 to four processes with "
        "accumulation 1: which batch size per process makes the same run?",
        right=lambda answer: close(answer, 4, relative=0, absolute=0.01),
        praise="Batch times processes times accumulation is 16 on both sides.",
        hints=[
            (
                lambda answer: close(answer, 16, relative=0, absolute=0.01),
                "16 rows are what a step needs in all. How many processes read rows?",
            ),
            (
                lambda answer: close(answer, 2, relative=0, absolute=0.01),
                "8 rows shared by four: that leaves something out. How many rows did a step of "
                "the old run see, with its accumulation?",
            ),
            (
                lambda answer: close(answer, 8, relative=0, absolute=0.01),
                "With the same batch size in four processes, how many rows does a step see? And "
                "in the old run?",
            ),
            (
                lambda answer: any(close(answer, n, 0, 0.01) for n in (32, 64)),
                "More processes read more rows in each step, so each of them needs fewer.",
            ),
        ],
        otherwise="Write down batch times processes times accumulation for both runs, and set "
        "them equal.",
    ),
    "10.2": Exercise(
        task="3 billion parameters, full fine-tuning with 16 bytes each, 4 GPUs, "
        "SHARD_GRAD_OP: how many GB (10^9 bytes) does each GPU hold?",
        right=lambda answer: close(answer, 16.5) or close(answer, 16.5e9),
        praise="Whole weights on each GPU, and a quarter of all the rest.",
        hints=[
            (
                lambda answer: close(answer, 48) or close(answer, 48e9),
                "That is what one GPU would hold alone. What does SHARD_GRAD_OP divide?",
            ),
            (
                lambda answer: close(answer, 12) or close(answer, 12e9),
                "A quarter of everything is FULL_SHARD. One part stays whole under SHARD_GRAD_OP.",
            ),
            (
                lambda answer: close(answer, 21) or close(answer, 21e9),
                "The optimizer is divided in your count. Look at the name again: what else is?",
            ),
            (
                lambda answer: close(answer, 10.5) or close(answer, 10.5e9),
                "That is a quarter of gradients and optimizer. What else is on the GPU?",
            ),
            (
                lambda answer: close(answer, 15.37),
                "Nearly: a GB is 10^9 bytes here, as on the label of a GPU's memory.",
            ),
        ],
        otherwise="Take weights, gradients and optimizer one by one: bytes per weight, and whole "
        "or a quarter.",
    ),
    "10.3": Exercise(
        task="Write traffic_ratio(weights, adapter, gpus): bytes that a GPU sends in a step under "
        "FULL_SHARD, divided by those under DDP. With one GPU: 1.0.",
        right=lambda f: _gives(_ratio, (*TRIALS, (4e9, 2e7, 1)))(f),
        praise="The number of GPUs cancels: FULL_SHARD sends so much more on two as on eight.",
        hints=[
            (
                lambda f: _gives(_ratio)(f) and not _gives(_ratio, ((4e9, 2e7, 1),))(f),
                "Right for several GPUs. With one, nobody sends anything: return 1.0 then.",
            ),
            (
                lambda f: (
                    _gives(lambda w, a, n: (a + w + a) / (2 * a))(f)
                    or _gives(lambda w, a, n: (a + w) / (2 * a))(f)
                ),
                "Under FULL_SHARD weights are freed after the forward pass. How often are "
                "they gathered in a step?",
            ),
            (
                lambda f: _gives(lambda w, a, n: (a + 2 * w) / (2 * a))(f),
                "The frozen weights are there twice. The adapter's own weights are sharded and "
                "gathered as well.",
            ),
            (
                lambda f: _gives(lambda w, a, n: (a + 2 * (w + a)) / a)(f),
                "How often does a GPU send its gradients under DDP: once, or once to add and once "
                "more to spread the sum?",
            ),
            (
                lambda f: (
                    _gives(lambda w, a, n: (w + a + 2 * (w + a)) / (2 * (w + a)))(f)
                    or _gives(lambda w, a, n: 1.5)(f)
                ),
                "1.5 is the ratio of full fine-tuning. Do frozen weights have gradients?",
            ),
            (
                lambda f: _gives(lambda w, a, n: 1 / _ratio(w, a, n))(f),
                "Upside down: FULL_SHARD divided by DDP. Which of the two should send more?",
            ),
            (
                lambda f: not math.isclose(float(f(4e9, 2e7, 2)), float(f(4e9, 2e7, 8))),
                "Your ratio changes with the number of GPUs. Both ways have the same factor "
                "(N-1)/N: what happens to it in a division?",
            ),
        ],
        otherwise="Write both amounts with traffic() of section 6, gradients being as large as the "
        "adapter, and divide.",
        trial=lambda f: f(4e9, 2e7, 2),
    ),
    "10.4": Exercise(
        task="The model loads with dtype=torch.float16. Which bnb_4bit_quant_storage will FSDP 1 "
        "take beside it?",
        right=lambda answer: _dtype(answer) in ("float16", "half", "fp16"),
        praise="One flat tensor has one dtype.",
        hints=[
            (
                lambda answer: _dtype(answer) in ("bfloat16", "bf16"),
                "bf16 was right beside norms in bf16. What do the norms have here? And a T4?",
            ),
            (
                lambda answer: _dtype(answer) in ("uint8", "int8", "byte", "nf4", "4 bits", "int4"),
                "Section 8 tried plain bytes. What did FSDP 1 say to them?",
            ),
            (
                lambda answer: _dtype(answer) in ("float32", "float", "fp32"),
                "fp32 would be safe if everything else were fp32. What is everything else?",
            ),
        ],
        otherwise="Name a dtype, such as torch.float32. Section 8 tried three of them.",
    ),
}
