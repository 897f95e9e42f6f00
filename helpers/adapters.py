"""The fine-tuned adapter that several notebooks look at: trained once, kept in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers import set_seed

from helpers.data import load_triage
from helpers.encoding import LIVE_LENGTH, encode, filter_by_length
from helpers.models import load_model, load_tokenizer
from helpers.profiles import Profile
from helpers.training import (
    OneLineProgress,
    add_adapter,
    make_trainer,
    optimizer_steps,
    training_arguments,
)
from helpers.weights import cache_dir


def tuned_adapter(profile: Profile) -> Path:
    """The folder of the course's fine-tuned adapter: one epoch over the rows of notebook 05.

    Several notebooks look at the same fine-tuned model. It is trained once, with the profile's own
    settings and seed 42 (some minutes on a CPU, with a line of progress per evaluation), and kept
    in the cache. `PeftModel.from_pretrained(model, folder)` loads it.
    """
    target = tuned_folder(profile)
    if (target / "adapter_model.safetensors").is_file():
        print("The fine-tuned adapter comes from the cache of an earlier run.")
        return target
    print("Training the adapter (once; it is kept for the other notebooks) ...")
    tokenizer = load_tokenizer(profile)
    triage = load_triage()
    rows = filter_by_length(encode(triage["train"], tokenizer, profile.max_length), LIVE_LENGTH)
    watched = encode(triage["validation"].select(range(16)), tokenizer, profile.max_length)
    steps = optimizer_steps(len(rows), profile.batch_size, 1)
    set_seed(42)
    model = add_adapter(load_model(profile), profile)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
        arguments = training_arguments(
            profile, folder, steps, num_train_epochs=1, save_strategy="no"
        )
        make_trainer(model, arguments, rows, watched, tokenizer, (OneLineProgress(),)).train()
        model.save_pretrained(Path(folder) / "adapter")
        shutil.rmtree(target, ignore_errors=True)  # of a notebook that was stopped while it saved
        os.replace(Path(folder) / "adapter", target)
    return target


def tuned_folder(profile: Profile) -> Path:
    """Where `tuned_adapter` keeps its adapter; another profile or other data give another one."""
    settings = json.dumps(dataclasses.asdict(profile) | {"up to": LIVE_LENGTH}, sort_keys=True)
    rows = "".join(load_triage()["train"]["message"])
    digest = hashlib.sha256((settings + rows).encode()).hexdigest()
    return cache_dir() / "runs" / f"tuned-{digest[:12]}"
