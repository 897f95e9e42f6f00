"""The training loop: what learns, how steps are counted, and which loss is minimized."""

import math
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from helpers import CourseError, data, encoding, models, training
from helpers.profiles import PROFILES

TINY = PROFILES["tiny"]


def test_a_new_adapter_changes_nothing_and_learns_alone() -> None:
    model = models.load_model(TINY)
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        model = training.add_adapter(model, TINY, rank=4)
        assert torch.equal(model(ids).logits, before)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "accumulation"),
    [(10, 4, 1, 1), (12, 4, 2, 1), (10, 4, 1.5, 1), (33, 4, 2, 2), (3, 8, 1, 4)],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    rows: int, batch_size: int, epochs: float, accumulation: int, tmp_path: Path
) -> None:
    tokenizer = models.load_tokenizer(TINY)
    features = encoding.encode(data.load_triage()["train"].select(range(rows)), tokenizer, 512)
    arguments = training.training_arguments(
        TINY,
        tmp_path,
        steps=4,
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
        eval_strategy="no",
        save_strategy="no",
    )
    model = training.add_adapter(models.load_model(TINY), TINY)
    trainer = training.make_trainer(model, arguments, features, None, tokenizer)
    trainer.train()
    assert trainer.state.global_step == training.optimizer_steps(
        rows, batch_size, epochs, accumulation
    )


def test_the_loss_falls_and_the_curves_show_it(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(TINY)
    triage = data.load_triage()
    train = encoding.encode(triage["train"].select(range(64)), tokenizer, 512)
    validation = encoding.encode(triage["validation"].select(range(8)), tokenizer, 512)
    steps = training.optimizer_steps(64, TINY.batch_size, 3)
    arguments = training.training_arguments(TINY, tmp_path, steps, num_train_epochs=3)
    model = training.add_adapter(models.load_model(TINY), TINY)
    timer = training.StepTimer()
    trainer = training.make_trainer(model, arguments, train, validation, tokenizer, (timer,))
    trainer.train()
    train_curve, eval_curve = training.curves(trainer)
    assert eval_curve[-1][1] < eval_curve[0][1] < math.log(len(tokenizer)) * 1.1
    assert train_curve[-1][1] < train_curve[0][1]
    assert timer.steps == steps and timer.seconds > 0
    assert get_last_checkpoint(str(tmp_path))


def test_no_rows_is_a_clear_error(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(TINY)
    features = encoding.encode(data.load_triage()["train"].select(range(2)), tokenizer, 512)
    arguments = training.training_arguments(TINY, tmp_path, 1)
    with pytest.raises(CourseError, match="no rows"):
        training.make_trainer(
            models.load_model(TINY), arguments, features.select([]), None, tokenizer
        )
