"""Every widget without a browser: moving a control draws another picture or says what is wrong."""

import signal
import types
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from matplotlib.figure import Figure

from helpers import CourseError, encoding, experiments, models, quantization, widgets
from helpers.profiles import PROFILES


def title(explorer: widgets.Explorer) -> str:
    figure = explorer.picture_now()
    assert isinstance(figure, Figure)
    return figure._suptitle.get_text() if figure._suptitle else figure.axes[0].get_title("left")


def move(explorer: widgets.Explorer, control: str, value: Any) -> None:
    """Move a control as a hand would, and see that the picture follows."""
    before = explorer.picture.value
    explorer.controls[control].value = value
    assert explorer.status.value == "" and explorer.picture.value != before


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def test_the_token_explorer_shows_what_is_trained(tiny_tokenizer: Any) -> None:
    explorer = widgets.token_explorer(tiny_tokenizer, "hello", "ok")
    few = int(title(explorer).split(" of them")[0].split()[-1])
    move(explorer, "answer", "ok, and a good deal more than that")
    many = int(title(explorer).split(" of them")[0].split()[-1])
    assert few < many
    move(explorer, "message", "hello again, all of you")
    assert int(title(explorer).split(" of them")[0].split()[-1]) == many


def test_more_bits_and_smaller_blocks_make_smaller_errors(weight: torch.Tensor) -> None:
    explorer = widgets.quantization_explorer(weight)

    def error() -> float:
        return float(title(explorer).split("error ")[1].split("%")[0])

    first = error()
    move(explorer, "bits", 6)
    assert error() < first
    move(explorer, "bits", 3)
    assert error() > first
    move(explorer, "block", 1024)
    coarse = error()
    move(explorer, "block", 16)
    assert error() < coarse
    move(explorer, "levels", "evenly spaced")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["evenly spaced", "normal quantiles"])
def test_levels_span_minus_one_to_one_with_an_exact_zero(bits: int, kind: str) -> None:
    levels = quantization.make_levels(bits, kind)
    assert len(levels) == 2**bits - (kind == "evenly spaced")
    assert levels[0] == -1 and levels[-1] == 1 and 0 in levels
    assert (levels.diff() > 0).all()


def test_four_bits_of_normal_quantiles_are_the_librarys_nf4(weight: torch.Tensor) -> None:
    levels = quantization.make_levels(4, "normal quantiles")
    assert torch.allclose(levels, bnb.get_4bit_type("nf4", device="cpu"), atol=1e-6)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    theirs = bnb.dequantize_4bit(packed, state)
    ours = quantization.quantize_dequantize(weight.flatten(), levels, 64).view_as(weight)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_last_block_that_is_not_full_is_rounded_too() -> None:
    levels = quantization.make_levels(8, "evenly spaced")
    values = torch.tensor([1.0, -0.5, 0.25, 0.1, 2.0])
    assert torch.allclose(quantization.quantize_dequantize(values, levels, 4), values, atol=0.01)


def test_the_rank_explorer_counts_and_rebuilds(weight: torch.Tensor) -> None:
    explorer = widgets.rank_explorer(weight, "update")
    assert explorer.controls["rank"].max == 64
    move(explorer, "rank", 64)
    assert "keeps 100%" in title(explorer) and f"{64 * 160:,} of {96 * 64:,}" in title(explorer)
    move(explorer, "rank", 1)
    assert f"with {160:,} of" in title(explorer)


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return experiments.read("cures")


def test_the_overfitting_explorer_cuts_a_run_and_judges_it(runs: list[dict[str, Any]]) -> None:
    explorer = widgets.overfitting_explorer(runs)
    steps = explorer.controls["until"].options
    verdicts = set()
    for step in (steps[0], steps[-1]):
        explorer.controls["until"].value = step
        verdicts.add(title(explorer).split(": ")[1])
    assert "inconclusive" in verdicts and len(verdicts) == 2


def test_models_answer_side_by_side_and_nothing_is_markup() -> None:
    answers = {"base": lambda text: f"<b>{text}</b>", "tuned": lambda text: text.upper()}
    explorer = widgets.compare_models(answers, "first")
    assert "&lt;b&gt;first&lt;/b&gt;" in explorer.picture.value
    explorer.controls["message"].value = "second"
    assert "SECOND" in explorer.picture.value and "first" not in explorer.picture.value


def test_what_cannot_be_drawn_is_said_and_the_old_picture_stays() -> None:
    def draw(message: str) -> str:
        if message == "bad":
            raise CourseError("This cannot be drawn. Try another.")
        return message

    control = widgets.ipywidgets.Text("good")
    explorer = widgets.Explorer(draw, {"message": control})
    control.value = "bad"
    assert explorer.status.value == "This cannot be drawn. Try another."
    assert explorer.picture.value == "good"
    control.value = "better"
    assert explorer.status.value == "" and explorer.picture.value == "better"


@pytest.mark.parametrize("still", ["figure", "text"])
def test_a_still_goes_along_for_readers_without_a_browser(still: str, weight: torch.Tensor) -> None:
    explorer = widgets.rank_explorer(weight)
    bundle = widgets._both(
        explorer.box, explorer.picture_now() if still == "figure" else "<p>x</p>"
    )
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert ("image/png" in bundle) != ("text/html" in bundle)


# -- training ----------------------------------------------------------------------------------


def states(step: int) -> tuple[Any, Any]:
    return (
        types.SimpleNamespace(global_step=step, max_steps=100),
        types.SimpleNamespace(should_training_stop=False),
    )


def test_live_training_collects_draws_and_stops() -> None:
    live = widgets.LiveTraining("Losses")
    state, control = states(1)
    live.on_train_begin(None, state, control)
    first = live.picture.value
    live.on_log(None, state, control, {"loss": 2.0})
    live.on_log(None, state, control, {"eval_loss": 1.5})
    assert live.picture.value != first
    assert (live.train, live.evals) == ([(1, 2.0)], [(1, 1.5)])
    live.on_step_end(None, state, control)
    assert not control.should_training_stop and live.status.value == "step 1 of 100"
    live.button.click()
    live.on_step_end(None, *states(2)[:1], control)
    assert control.should_training_stop and live.stopped_at == 2
    live.on_train_end(None, *states(2)[:1], control)
    assert live.status.value == "stopped at step 2 of 100" and live.button.disabled


def test_the_first_interrupt_stops_after_the_step_and_the_second_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    live = widgets.LiveTraining()
    state, control = states(1)
    with pytest.raises(KeyboardInterrupt), live:
        live.on_train_begin(None, state, control)
        signal.raise_signal(signal.SIGINT)
        live.on_step_end(None, state, control)
        assert control.should_training_stop
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_training_that_fails_gives_the_interrupt_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    live = widgets.LiveTraining()
    with pytest.raises(ZeroDivisionError), live:
        live.on_train_begin(None, *states(1))
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before
    assert live.button.disabled and live.status.value == "ended by ZeroDivisionError"


def test_a_stopped_trainer_keeps_the_adapter(triage: Any, tmp_path: Path) -> None:
    from helpers import training

    profile = PROFILES["tiny"]
    tokenizer = models.load_tokenizer(profile)
    rows = encoding.encode(triage["train"].select(range(32)), tokenizer, profile.max_length)
    model = training.add_adapter(models.load_model(profile), profile)
    live = widgets.LiveTraining()

    class Press(training.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                live.button.click()

    args = training.training_arguments(
        profile, tmp_path, 4, save_strategy="no", eval_strategy="no", learning_rate=1e-2
    )
    trainer = training.make_trainer(model, args, rows, None, tokenizer, (live, Press()))
    with live:
        trainer.train()
    assert live.stopped_at == trainer.state.global_step == 2
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
