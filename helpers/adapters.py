"""The fine-tuned adapter that several notebooks look at: the learner's own, or the course's."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import set_seed

from helpers.data import DATA, load_triage
from helpers.encoding import encode
from helpers.models import load_model, load_tokenizer
from helpers.profiles import Profile
from helpers.training import (
    OneLineProgress,
    add_adapter,
    make_trainer,
    optimizer_steps,
    training_arguments,
)
from helpers.weights import MODEL, cache_dir

SHIPPED = DATA / "adapters" / "tickets"  # its card names the recorded run that made it


def ticket_adapter(profile: Profile) -> Path:
    """The folder of a fine-tuned adapter for the tickets, and one line that says which it is.

    The adapter of a whole run of notebook 05, if there is one; or else the one that comes with the
    course. For another model than the course's there is none, so it is trained once, with the
    profile's own settings, and kept.
    """
    own = own_adapter(profile)
    if (own / "adapter_model.safetensors").is_file():
        print("adapter   yours: of a whole run in notebook 05")
        return own
    if profile.model_id == MODEL:
        print("adapter   the one that comes with the course: data/adapters/tickets")
        return SHIPPED
    print(f"adapter   none for {profile.model_id} yet: training one, which is kept")
    _train(profile, own)
    return own


def own_adapter(profile: Profile) -> Path:
    """Where a learner's own adapter is kept; another model has another folder."""
    return cache_dir() / "runs" / f"tickets-{profile.model_id.replace('/', '--')}"


def _train(profile: Profile, target: Path) -> None:
    """The profile's run on the tickets, without scores; an unfinished one leaves nothing."""
    tokenizer, triage = load_tokenizer(profile), load_triage()
    rows = encode(triage["train"], tokenizer, profile.max_length)
    watched = encode(triage["validation"].select(range(16)), tokenizer, profile.max_length)
    steps = optimizer_steps(len(rows), profile.batch_size, profile.epochs)
    set_seed(42)
    model = add_adapter(load_model(profile), profile)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unfinished-") as folder:
        arguments = training_arguments(profile, folder, steps, save_strategy="no")
        make_trainer(model, arguments, rows, watched, tokenizer, (OneLineProgress(),)).train()
        model.save_pretrained(Path(folder) / "adapter")
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / "adapter").replace(target)
