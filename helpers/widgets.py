"""Things to move and press, in a notebook.

Each shows live controls where a browser runs the notebook, and the same finding as a static
picture where none does: every class or function here also returns a plain figure.
"""

from __future__ import annotations

import base64
import html
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import torch
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase, TrainerCallback

from helpers import CourseError, data, diagnosis, encoding, plotting, quantization
from helpers.chat import ChatEncoder
from helpers.encoding import IGNORED
from helpers.plotting import png

# JupyterLab runs a control's callback in a thread of its own; matplotlib draws one at a time.
_DRAWING = threading.Lock()


def show(widget: ipywidgets.Widget, still: Figure | str) -> DisplayHandle:
    """Display a widget, with a picture (or HTML text) for readers that cannot run it.

    A front end picks the richest form that it knows; `helpers.notebooks` stores the still alone.
    """
    return display(_both(widget, still), raw=True, display_id=True)


def _both(widget: ipywidgets.Widget, still: Figure | str) -> dict[str, Any]:
    form = {"text/html": still} if isinstance(still, str) else {"image/png": _base64(still)}
    # Written out, since the ipywidgets 7 of Colab has no method for it.
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    live = {"application/vnd.jupyter.widget-view+json": view}
    return {**live, **form, "text/plain": type(widget).__name__}


def _base64(figure: Figure) -> str:
    return base64.b64encode(png(figure)).decode()


class LiveTraining(TrainerCallback):
    """Draw both losses while a `Trainer` runs, with a button that stops it after the next step.

    The kernel's interrupt (the square button of JupyterLab and Colab) does the same as the button:
    the step is finished, and the adapter stays as it is then. A second interrupt stops at once.

        live = LiveTraining()
        live.show()
        trainer.add_callback(live)
        with live:
            trainer.train()
    """

    def __init__(self, title: str = "Losses so far") -> None:
        self.title = title
        self.train: list[tuple[int, float]] = []
        self.evals: list[tuple[int, float]] = []
        self.stopped_at: int | None = None
        self._stop = threading.Event()
        self._old_handler: Any = None
        self._shown: DisplayHandle | None = None
        self.picture = ipywidgets.Image(value=png(self.figure()), format="png")
        self.picture.layout.max_width = "770px"
        self.button = ipywidgets.Button(description="Stop training", icon="stop", disabled=True)
        self.button.on_click(lambda _: self.stop())
        self.status = ipywidgets.Label("not started")
        self.box = ipywidgets.VBox([self.picture, ipywidgets.HBox([self.button, self.status])])
        self.box.add_class("course-widget")

    def show(self) -> None:
        """Display the curves and the button."""
        self._shown = show(self.box, self.figure())

    def figure(self) -> Figure:
        """The curves so far."""
        return plotting.loss_curves(self.train, self.evals, self.title)

    def stop(self) -> None:
        """Let the training end after the step that is running. Safe from any thread."""
        self._stop.set()
        self.status.value = "stopping after this step ..."

    def __enter__(self) -> LiveTraining:
        """From here on the kernel's interrupt ends the training instead of raising."""
        self._stop.clear()
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        """Give the interrupt back to the kernel, whether the training ended or failed."""
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None
        self.button.disabled = True
        if kind is not None:
            self.status.value = f"ended by {kind.__name__}"

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._stop.is_set():  # the second interrupt does not wait for the step
            raise KeyboardInterrupt
        self.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train, self.evals, self.stopped_at = [], [], None
        self._stop.clear()
        self.button.disabled = False
        # ipykernel 7.4 hands a click to the shell that last wrote to the button: this one, which is
        # busy. Without its note the click goes where JupyterLab sends it, to a thread of its own.
        if self.button.comm is not None:
            vars(self.button.comm).pop("_reply_subshell_id", None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stop.is_set():
            self.stopped_at = state.global_step
            control.should_training_stop = True
        else:
            self.status.value = f"step {state.global_step} of {state.max_steps}"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict, **kwargs: Any) -> None:
        if "loss" in logs:
            self.train.append((state.global_step, logs["loss"]))
        if "eval_loss" in logs:
            self.evals.append((state.global_step, logs["eval_loss"]))
        with _DRAWING:
            self.picture.value = png(self.figure())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.button.disabled = True
        if self._shown is not None:  # so that the stored page ends with the whole curves
            with _DRAWING:
                self._shown.update(_both(self.box, self.figure()), raw=True)
        how = "stopped" if self.stopped_at is not None else "finished"
        self.status.value = f"{how} at step {state.global_step} of {state.max_steps}"


# -- explorers: controls beside a picture --------------------------------------------------------


class Explorer:
    """Controls and a picture that is drawn anew when one of them moves.

    Attributes:
        controls: {argument of draw: widget}.
    """

    def __init__(
        self, draw: Callable[..., Figure | str], controls: Mapping[str, ipywidgets.Widget]
    ) -> None:
        self._draw = draw
        self.controls = dict(controls)
        self.status = ipywidgets.Label()
        for control in self.controls.values():
            control.observe(lambda _: self.redraw(), names="value")
        self._still = self.picture_now()
        if isinstance(self._still, str):
            self.picture: ipywidgets.Widget = ipywidgets.HTML(self._still)
        else:
            self.picture = ipywidgets.Image(value=png(self._still), format="png")
            self.picture.layout.max_width = "100%"
        self.box = ipywidgets.VBox([*self.controls.values(), self.status, self.picture])
        self.box.add_class("course-widget")

    def picture_now(self) -> Figure | str:
        """The figure (or HTML text) for where the controls stand."""
        return self._draw(**{name: control.value for name, control in self.controls.items()})

    def redraw(self) -> None:
        """Draw again. What cannot be drawn is said below the controls; the old picture stays."""
        try:
            with _DRAWING:
                self._still = now = self.picture_now()
                self.picture.value = now if isinstance(now, str) else png(now)
            self.status.value = ""
        except (CourseError, ValueError) as error:
            self.status.value = str(error)

    def show(self) -> None:
        """Display the controls and the picture."""
        show(self.box, self._still)  # drawn already; drawing may mean asking several models


def _wide(control: ipywidgets.Widget) -> ipywidgets.Widget:
    control.layout.width = "520px"
    control.style.description_width = "140px"
    return control


def token_explorer(
    tokenizer: PreTrainedTokenizerBase,
    message: str = "The zip of my Tarnova tent broke. Order 55-1203.",
    answer: str = '{"category":"defect"}',
) -> Explorer:
    """Type a message and its answer: see the tokens, their ids, and which ones are trained."""
    encoder = ChatEncoder(tokenizer)

    def draw(message: str, answer: str) -> Figure:
        row = {
            "prompt": data.triage_prompt(message),
            "completion": [{"role": "assistant", "content": answer}],
            "source": "here",
        }
        chat = encoding.encode_row(row, encoder)
        first = next(i for i, label in enumerate(encoding.labels_of(chat)) if label != IGNORED)
        texts = [tokenizer.decode([token]) for token in chat.input_ids]
        return plotting.token_ids(
            {
                "prompt": (texts[:first], chat.input_ids[:first], False),
                "answer": (texts[first:], chat.input_ids[first:], True),
            },
            f"{len(texts)} tokens, {len(texts) - first} of them are trained",
        )

    return Explorer(
        draw,
        {
            "message": _wide(
                ipywidgets.Textarea(message, description="message", continuous_update=False)
            ),
            "answer": _wide(ipywidgets.Text(answer, description="answer", continuous_update=False)),
        },
    )


def quantization_explorer(weight: torch.Tensor) -> Explorer:
    """Bits, block size and kind of levels against the error on a real weight matrix.

    Args:
        weight: (rows, columns) of floats.
    """
    flat = weight.detach().float().flatten()

    def draw(bits: int, block: int, levels: str) -> Figure:
        table = quantization.make_levels(bits, levels)
        rebuilt = quantization.quantize_dequantize(flat, table, block)
        error = ((rebuilt - flat).norm() / flat.norm()).item()
        cost = bits + 32 / block
        blocks = flat[: len(flat) // block * block].view(-1, block)
        scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)).flatten()
        return plotting.levels_on_histogram(
            scaled[:200_000].numpy(),
            table.numpy(),
            f"{bits} bits, blocks of {block}: error {error:.1%} at {cost:.2f} bits per weight",
        )

    return Explorer(
        draw,
        {
            "bits": _wide(ipywidgets.IntSlider(4, min=2, max=8, description="bits")),
            "block": _wide(
                ipywidgets.SelectionSlider(
                    options=[16, 32, 64, 128, 256, 1024], value=64, description="block size"
                )
            ),
            "levels": _wide(
                ipywidgets.Dropdown(
                    options=["evenly spaced", "normal quantiles"],
                    value="normal quantiles",
                    description="levels",
                )
            ),
        },
    )


def rank_explorer(matrix: torch.Tensor, name: str = "matrix") -> Explorer:
    """Rank against what of a matrix it rebuilds, and how many numbers that takes.

    Args:
        matrix: (d_out, d_in), a weight or an update of one.
        name: what it is called in the title.
    """
    matrix = matrix.detach().float()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = (values**2).cumsum(0) / (values**2).sum()
    most = min(128, len(values))

    def draw(rank: int) -> Figure:
        rebuilt = (left[:, :rank] * values[:rank]) @ right[:rank]
        numbers = rank * sum(matrix.shape)
        return plotting.matrices(
            {"the " + name: matrix[:96, :96].numpy(), f"rank {rank}": rebuilt[:96, :96].numpy()},
            f"Rank {rank} keeps {kept[rank - 1]:.0%} of the {name}, with {numbers:,} of "
            f"{matrix.numel():,} numbers",
        )

    return Explorer(
        draw, {"rank": _wide(ipywidgets.IntSlider(8, min=1, max=most, description="rank r"))}
    )


def overfitting_explorer(runs: Sequence[Mapping[str, Any]]) -> Explorer:
    """Recorded runs: pick a setting and a seed, cut the run off, and see curves and verdict.

    Args:
        runs: from `helpers.experiments.read`, each with a training and a validation curve.
    """
    labels = list(dict.fromkeys(run["label"] for run in runs))
    seeds = sorted({run["seed"] for run in runs})
    steps = sorted({step for run in runs for step, _ in run["eval"]})

    def draw(label: str, seed: int, until: int) -> Figure:
        found = [run for run in runs if (run["label"], run["seed"]) == (label, seed)]
        if not found:
            raise CourseError(f"There is no run of {label!r} with seed {seed}.")
        train, evals = (
            [pair for pair in found[0][curve] if pair[0] <= until] for curve in ("train", "eval")
        )
        verdict = diagnosis.diagnose(train, evals)
        return plotting.loss_curves(
            train,
            evals,
            f"{label}, seed {seed}, {until} steps: {verdict.verdict}",
            verdict.best_step,
        )

    return Explorer(
        draw,
        {
            "label": _wide(ipywidgets.Dropdown(options=labels, description="setting")),
            "seed": _wide(ipywidgets.Dropdown(options=seeds, description="seed")),
            "until": _wide(
                ipywidgets.SelectionSlider(
                    options=steps, value=steps[-1], description="stop after step"
                )
            ),
        },
    )


def compare_models(
    models: Mapping[str, Callable[[str], str]],
    message: str = "hi, the zip of my Tarnova tent broke on day one. order 55-1203. no hurry",
) -> Explorer:
    """The answers of several models to one message of the learner's own, side by side.

    Args:
        models: {"base": function from a message to an answer, ...}.
    """

    def draw(message: str) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top;padding:4px 12px 4px 0'>"
            f"{html.escape(name)}</th><td style='text-align:left'><code>"
            f"{html.escape(answer(message))}</code></td></tr>"
            for name, answer in models.items()
        )
        return f"<p>{html.escape(message)}</p><table>{rows}</table>"

    control = ipywidgets.Textarea(message, description="message", continuous_update=False)
    return Explorer(draw, {"message": _wide(control)})
