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
    finetune      the training as a command: python -m helpers.finetune
    notebooks     run notebooks and store their outputs: python -m helpers notebooks
    __main__      set-up: python -m helpers start | test | notebooks
"""


class CourseError(Exception):
    """A foreseen failure. Its text says what happened, where, and what to do next."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a stack trace."""
        return [f"{type(self).__name__}: {self}"]
