"""What the notebooks share: loading models, preparing data, training, scoring, drawing.

The calls a learner came for are in the notebooks' own cells. Which file holds what; each imports
only from files above it in this list:

    logs          keep the libraries' progress bars and advice out of outputs
    profiles      which model, on which device, in which number format, and why
    data          the course's own 684 messages and their tickets
    rules         tickets without a language model: what fine-tuning has to beat
    readers       read JSONL, CSV and Parquet files
    rows          check the rows of a file, and bring them into one shape
    chat          a chat -> token ids; only the template writes control tokens
    encoding      rows -> token ids, labels, batches
    statistics    an interval for a score, a test for two models
    quantization  block-wise quantization, written out
    diagnosis     read loss curves: healthy, overfitting, ...
    tracking      Weights & Biases, offline unless told otherwise
    weights       fetch, check, convert and cache the model
    tiny          tiny models of random weights, for tests and rehearsals
    workarounds   bugs of the libraries, each with its link
    methods       PEFT's methods side by side
    models        load models and tokenizers
    training      thin over transformers' Trainer and PEFT
    evaluation    answers, scores, losses
    prompting     examples in the prompt, and answers held to a schema
    adapters      the fine-tuned adapter: a learner's own, or the course's
    memory        the memory of a training step: planned, simulated, measured
    plotting      every chart, in one style
    drawings      every drawing of an idea, in one style
    widgets       explorers and live training curves
    exercises     exercises that check themselves, one file per notebook
    commands      what the commands share: options, one-line errors
    config        the settings of a run, and its command line
    checkpoints   checkpoints that a killed run can trust, and exact resuming
    card          the model card of a run
    pipeline      a run from its settings to its model card
    finetune      the training as a command: python -m helpers.finetune
    scored        a finished run or adapter, loaded as it was scored
    parity        are served answers the scored ones?
    convert       a model or an adapter -> GGUF
    serving       llama.cpp in this process, and its endpoint
    export        merged or as GGUF: python -m helpers.export
    answer        a message, a file, a chat: python -m helpers.answer
    experiments   recorded runs: python -m helpers.experiments
    notebooks     run notebooks and store their outputs: python -m helpers notebooks
    __main__      set-up: python -m helpers start | test | notebooks
"""

from __future__ import annotations

import logging
import os
import sys

# Here because it must be set before torch is imported. While a thread of GNU's OpenMP (torch's on
# Linux) waits for the others, it spins for milliseconds; one other busy program then makes training
# five times slower, for the spinning takes the core from the thread that is waited for. Spinning
# briefly and then sleeping, it is two times. What a learner has set stays.
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
SPIN_COUNT = "2000"
_undecided = "torch" not in sys.modules and not any(name in os.environ for name in SPIN_VARIABLES)
if sys.platform == "linux" and _undecided:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

# Here for the same reason: at import bitsandbytes looks for a faster kernel on the Hub, and warns
# where there is no network.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class CourseError(Exception):
    """A foreseen failure. Its text says what happened, where, and what to do next."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a stack trace."""
        return [f"{type(self).__name__}: {self}"]
