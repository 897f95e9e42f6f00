"""What the notebooks share: loading models, preparing data, training, scoring, drawing.

The calls a learner came for are in the notebooks' own cells. Which file holds what; each imports
only from files above it in this list:

    logs          keep the libraries' progress bars and advice out of outputs
    profiles      which model, on which device, in which number format, and why
    data          the course's own 684 messages and their tickets
    rows          read and check a file of training rows
    encoding      rows -> token ids, labels, batches
    statistics    an interval for a score, a test for two models
    quantization  block-wise quantization, written out
    diagnosis     read loss curves: healthy, overfitting, ...
    tracking      Weights & Biases, offline unless told otherwise
    weights       fetch, check, convert and cache the model
    tiny          tiny models of random weights, for tests and rehearsals
    workarounds   bugs of the libraries, each with its link
    models        load models and tokenizers
    training      thin over transformers' Trainer and PEFT
    evaluation    answers, scores, losses
    adapters      the fine-tuned adapter that notebooks share
    memory        the memory of a training step: planned, simulated, measured
    plotting      every chart, in one style
    drawings      every drawing of an idea, in one style
    widgets       explorers and live training curves
    exercises     exercises that check themselves, one file per notebook
    config        the settings of a run, and its command line
    checkpoints   checkpoints that a killed run can trust, and exact resuming
    card          the model card of a run
    pipeline      a run from its settings to its model card
    finetune      the training as a command: python -m helpers.finetune
    notebooks     run notebooks and store their outputs: python -m helpers notebooks
    __main__      set-up: python -m helpers start | test | notebooks
"""

from __future__ import annotations

import os
import sys

# Read by OpenMP when torch is imported, so it is set here, before anything imports torch: how long
# a thread of GNU's OpenMP (torch's on Linux) spins while it waits for the others. Left alone it
# spins for milliseconds, and one other busy process makes training about five times slower: on that
# core the spinning thread keeps the one that is waited for from running.
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
if "torch" not in sys.modules and not any(name in os.environ for name in SPIN_VARIABLES):
    os.environ["GOMP_SPINCOUNT"] = "2000"


class CourseError(Exception):
    """A foreseen failure. Its text says what happened, where, and what to do next."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a stack trace."""
        return [f"{type(self).__name__}: {self}"]
