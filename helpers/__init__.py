"""What the notebooks share: loading models, preparing data, training, scoring, drawing.

The calls a learner came for stand in the notebooks. Which file holds what:

    profiles     which model, on which device, in which number format
    models       bring, load and save models and tokenizers
    data         rows of text -> token ids, labels, batches
    training     thin over transformers' Trainer
    evaluation   answers, scores, losses
    diagnosis    read loss curves: healthy, overfitting, ...
    memory       plan, simulate and measure the memory of a training step
    simulation   ... on the meta device: what memory is made of
    plotting     every figure, in one style
    finetune     the same training as a command: python -m helpers.finetune
    __main__     set-up: python -m helpers start | test | notebooks
"""


class CourseError(Exception):
    """A fault that was foreseen. Its text says what happened, where, and what to do next."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this instead of a stack trace."""
        return [f"{type(self).__name__}: {self}"]
