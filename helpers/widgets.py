"""Things to move and press, in a notebook.

Each shows live controls where a browser runs the notebook, and the same finding as a static
picture where none does: every class or function here also returns a plain figure.
"""

from __future__ import annotations

import io
import signal
import threading
from typing import Any

import ipywidgets
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure
from transformers import TrainerCallback

from helpers import plotting


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def show(widget: ipywidgets.Widget, figure: Figure) -> DisplayHandle:
    """Display a widget, with a picture for readers that cannot run it.

    A front end picks the richest form that it knows; `helpers.notebooks` stores the picture alone.
    """
    return display(_both(widget, figure), raw=True, display_id=True)


def _both(widget: ipywidgets.Widget, figure: Figure) -> dict[str, Any]:
    picture = {"image/png": png(figure), "text/plain": repr(figure)}
    return {**widget._repr_mimebundle_(), **picture}


class LiveTraining(TrainerCallback):
    """Draw both losses while a `Trainer` runs, with a button that stops it after the next step.

    The kernel's interrupt (the square button of JupyterLab and Colab) does the same as the button:
    the step is finished, and the adapter stays as it is then. A second interrupt stops at once.

        live = LiveTraining()
        live.show()
        Trainer(..., callbacks=[live]).train()
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.train, self.evals, self.stopped_at = [], [], None
        self._stop.clear()
        self.button.disabled = False
        # ipykernel 7.4 hands a click to the shell that last wrote to the button: this one, which is
        # busy. Without its note the click goes where JupyterLab sends it, to a thread of its own.
        if self.button.comm is not None:
            vars(self.button.comm).pop("_reply_subshell_id", None)
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: Any) -> None:
        if self._stop.is_set():  # the second interrupt does not wait for the step
            signal.signal(signal.SIGINT, self._old_handler)
            raise KeyboardInterrupt
        self.stop()

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
        self.picture.value = png(self.figure())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.button.disabled = True
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None
        if self._shown is not None:  # so that the stored page ends with the whole curves
            self._shown.update(_both(self.box, self.figure()), raw=True)
        how = "stopped" if self.stopped_at is not None else "finished"
        self.status.value = f"{how} at step {state.global_step} of {state.max_steps}"
