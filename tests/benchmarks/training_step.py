"""Speed, memory growth and loss of the course's training step beside TRL's, on the same batches.

    python tests/benchmarks/training_step.py [--method lora|qlora] [--precision fp32|bf16]
                                             [--steps 16] [--rounds 2] [--cpu-time] [--profile]

    trl        TRL's SFTTrainer with its defaults (its loss is computed in chunks)
    course     helpers.training

Both get the same token ids in the same batches in the same order (rows of similar length together),
so that step by step the losses can be compared. Every run is a process of its own, and the two
alternate, so that a slow moment of the machine does not fall on one of them. Tokens are counted
without padding; the first two steps, in which buffers are made, are not timed. Memory growth is the
highest resident set size during training, less the size before it.

On a busy machine `--cpu-time` gives steadier figures: one thread, and the time that counts is the
process's own.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

WAYS = ("trl", "course")
WARM_UP = 2  # steps


def matrix_product_rate(dtype: Any, now: Any = time.perf_counter, size: int = 1024) -> float:
    """GFLOP/s of square matrix products: the processor's rate in this very minute."""
    import torch

    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds = []
    for _ in range(12):
        started = now()
        left @ right
        seconds.append(now() - started)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e9


def resident_bytes(field: str) -> int:
    """The process's memory: VmRSS, now; VmHWM, its highest since `forget_peak`. Linux only."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let VmHWM start again from the memory that is in use now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def make_trainer(way: str, method: str, precision: str | None, steps: int) -> tuple[Any, list[int]]:
    """A trainer for `steps` batches, and how many tokens each batch has."""
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    from helpers import data, encoding, models, profiles, training

    profile = profiles.pick_profile("laptop", verbose=False)
    if precision:
        attention, _ = profiles.pick_attention("cpu", precision)
        profile = dataclasses.replace(
            profile, device="cpu", precision=precision, attn_implementation=attention
        )
    tokenizer = models.load_tokenizer(profile)
    rows = data.load_triage()["train"]
    features = encoding.encode(rows, tokenizer, profile.max_length)
    size = profile.batch_size
    by_length = sorted(range(len(rows)), key=lambda index: features[index]["length"])
    batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
    batches = random.Random(0).sample(batches, steps)
    order = [index for batch in batches for index in batch]
    tokens = [sum(features[index]["length"] for index in batch) for batch in batches]
    set_seed(0)
    model = training.add_adapter(
        models.load_model(profile, "nf4" if method == "qlora" else None), profile
    )
    args = training.training_arguments(
        profile,
        tempfile.mkdtemp(),
        steps,
        num_train_epochs=1,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        seed=0,
        train_sampling_strategy="sequential",
    )
    if way == "course":
        return training.make_trainer(model, args, features.select(order), None, tokenizer), tokens
    # The course's settings where they are common to both; TRL's own defaults elsewhere.
    names = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "bf16")
    names += ("per_device_train_batch_size", "use_cpu", "seed", "num_train_epochs", "logging_steps")
    names += ("eval_strategy", "save_strategy", "report_to", "dataloader_pin_memory")
    names += ("train_sampling_strategy", "output_dir")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            gradient_checkpointing=False, **{name: getattr(args, name) for name in names}
        ),
        train_dataset=features.select(order).select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
    )
    training.remove_progress_callbacks(trainer)
    return trainer, tokens


def train(
    way: str, method: str, precision: str | None, steps: int, cpu_time: bool = False
) -> dict[str, Any]:
    """Train one way for `steps` steps and measure it."""
    import warnings

    warnings.simplefilter("ignore")
    import torch
    from transformers import TrainerCallback

    now = time.process_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)

    class Stopwatch(TrainerCallback):
        """The seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(now() - self.started)

    trainer, tokens = make_trainer(way, method, precision, steps)
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    rates = [matrix_product_rate(torch.float32, now), matrix_product_rate(dtype, now)]
    gc.collect()
    before = resident_bytes("VmRSS")
    forget_peak()
    trainer.train()
    growth = resident_bytes("VmHWM") - before
    return {
        "way": way,
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(stopwatch.seconds[WARM_UP:]),
        "memory_growth": growth,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "gflops": rates,
    }


# -- where the time goes -----------------------------------------------------------------------

PRODUCTS = ("aten::mm", "aten::addmm", "aten::mkldnn_linear", "mkldnn::_linear_pointwise")


def part_of_the_step(name: str, shapes: list[Any], vocabulary: int, rank: int) -> str:
    """The part of a training step that an operation belongs to, by its name and its shapes."""
    sizes = {size for shape in shapes if isinstance(shape, list) for size in shape}
    if "adam" in name.lower() or "optimizer" in name.lower():
        return "optimizer"
    if "softmax" in name or "bmm" in name or "attention" in name or "flash" in name:
        return "output layer and loss" if vocabulary in sizes else "attention"
    if vocabulary in sizes:
        return "output layer and loss"
    if name in PRODUCTS:
        return "adapter's matrix products" if rank in sizes else "layers' matrix products"
    if "bitsandbytes" in name:
        return "4-bit to training precision"
    if "norm" in name and "foreach" in name:
        return "gradient norm"
    if name in ("aten::copy_", "aten::clone", "aten::cat", "aten::fill_", "aten::zero_"):
        return "copies and casts"
    if name.startswith("aten::"):
        return "element by element (norms, activation, rotation, sums)"
    return "Python, autograd, data"


def print_profile(way: str, method: str, precision: str | None, steps: int) -> None:
    """Run some steps under PyTorch's profiler and print where their time went."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    trainer, _ = make_trainer(way, method, precision, steps)
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    class AfterWarmUp(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                profiler.start()
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == steps:
                self.seconds = time.perf_counter() - self.started
                profiler.stop()

    clock = AfterWarmUp()
    trainer.add_callback(clock)
    trainer.train()
    parts: collections.Counter[str] = collections.Counter()
    details: collections.Counter[tuple[str, str]] = collections.Counter()
    vocabulary, rank = trainer.model.config.vocab_size, trainer.model.peft_config["default"].r
    for event in profiler.key_averages(group_by_input_shape=True):
        part = part_of_the_step(event.key, event.input_shapes, vocabulary, rank)
        parts[part] += event.self_cpu_time_total
        details[part, event.key] += event.self_cpu_time_total
    whole = sum(parts.values())
    product = matrix_product_rate(torch.bfloat16 if trainer.args.bf16 else torch.float32)
    seconds = clock.seconds / (steps - WARM_UP)
    print(f"{way}, {method}: {seconds:.3f} s a step under the profiler; ", end="")
    print(f"the processor's matrix products: {product:.0f} GFLOP/s")
    for part, microseconds in parts.most_common():
        print(f"{microseconds / whole:6.1%}  {part}")
        for (owner, name), own in details.most_common(25):
            if owner == part and own > whole / 200:
                print(f"{own / whole:14.1%}  {name}")


def main() -> None:
    """Run the rounds and print one line per way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("lora", "qlora"), default="lora")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="without it the profile's")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its own time")
    parser.add_argument("--profile", action="store_true", help="where the course's time goes")
    parser.add_argument("--way", choices=WAYS, help="one of the two; its figures as JSON")
    options = parser.parse_args()
    settings = (options.method, options.precision, options.steps)
    if options.profile:
        print_profile(options.way or "course", *settings)
        return
    if options.way:
        print(json.dumps(train(options.way, *settings, options.cpu_time)))
        return
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--way", way],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
    runs = [run for way in WAYS for run in results[way]]
    fp32, training = (statistics.median(run["gflops"][i] for run in runs) for i in (0, 1))
    precision = runs[0]["precision"]
    print(f"{options.method}, {precision}; matrix products: fp32 {fp32:.0f} GFLOP/s, ", end="")
    print(f"{precision} {training:.0f} GFLOP/s")
    speed = {w: statistics.median(r["tokens_per_second"] for r in results[w]) for w in WAYS}
    growth = {w: statistics.median(r["memory_growth"] for r in results[w]) for w in WAYS}
    print("way     tokens/s  of TRL's  memory growth  of TRL's  loss, first and last step")
    for way in WAYS:
        losses = results[way][0]["losses"]
        print(
            f"{way:7} {speed[way]:8.0f} {speed[way] / speed['trl']:8.2f}x"
            f" {growth[way] / 2**20:10.0f} MiB {growth[way] / growth['trl']:8.2f}x"
            f"  {losses[0]:.4f} {losses[-1]:.4f}"
        )
    pairs = zip(results["trl"][0]["losses"], results["course"][0]["losses"], strict=True)
    print(f"largest difference of the losses of a step: {max(abs(a - b) for a, b in pairs):.4f}")


if __name__ == "__main__":
    main()
