"""Keep the libraries' progress bars and advice out of outputs. Errors always come through."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, advice and warnings of the libraries while a block runs."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    try:
        quiet_libraries()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def quiet_libraries() -> None:
    """Switch off progress bars and advice for the rest of a notebook.

    Python's warnings stay, but for one: peft 0.21 asks transformers 5.24 for a name that will go.
    """
    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
