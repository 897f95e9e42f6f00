"""Exercises of notebook 01: ways to adapt a model, and what they cost."""

from __future__ import annotations

from itertools import count

from helpers.exercises import Exercise, close, number, says
from helpers.statistics import wilson_interval

# 01.1: tokens that the recorded training read in 8 epochs, and those of the six examples.
READ, EPOCHS, SIX_EXAMPLES, SHORT = 257_656, 8, 316, 46
REQUESTS = READ / SIX_EXAMPLES

# 01.2: bytes at the peak of a step for each further parameter that is trained, in fp32. The peak
# comes before the gradients: 4 for the parameter, 8 for the optimizer, the rest activations.
LOWEST, HIGHEST = 12.0, 14.5

# 01.3: two scores, and from how many messages on their intervals lie apart.
LOWER, UPPER = 0.76, 0.80


def _apart(messages: int) -> bool:
    return wilson_interval(LOWER, messages)[1] < wilson_interval(UPPER, messages)[0]


MESSAGES = next(filter(_apart, count(1)))

# 01.4: what fits which situation.
WAYS = ("rules", "prompt", "lora", "qlora", "full", "scratch")
SITUATIONS = {"a": "rules", "b": "prompt", "c": "qlora", "d": "full", "e": "scratch"}


def _chosen(answer: dict[str, str], letter: str) -> str:
    return str(answer[letter]).strip().casefold()


EXERCISES = {
    "01.1": Exercise(
        task=(
            "Section 8 prints the tokens of a request with the short prompt and with six examples, "
            "and the tokens that LoRA's training read. After how many requests have the examples "
            "cost more tokens than the training did? Set requests to the number."
        ),
        right=lambda answer: close(answer, REQUESTS, 0.02) or says(answer, "about 800"),
        praise=f"{READ:,} tokens of training, {SIX_EXAMPLES} tokens saved with each request.",
        hints=[
            (
                lambda answer: close(answer, READ / (SIX_EXAMPLES + SHORT), 0.02),
                "The tuned model reads a prompt as well. What is saved is the difference.",
            ),
            (
                lambda answer: close(answer, READ / SHORT, 0.02),
                "That divides by the short prompt. What does a request save?",
            ),
            (
                lambda answer: close(answer, REQUESTS / EPOCHS, 0.02),
                "That is one epoch. The training read every row in each of its epochs.",
            ),
            (
                lambda answer: close(answer, READ, 0.02),
                "Those are tokens. How many requests save as many?",
            ),
        ],
        otherwise="How many tokens does one request save? Divide what the training read by that.",
    ),
    "01.2": Exercise(
        task=(
            "Build LoRA again with r=64 and everything else as in section 9, and measure its step "
            "with cost_of_a_step. By how many bytes does the peak rise for each further parameter "
            "that is trained? Set bytes_each to the number."
        ),
        right=lambda answer: LOWEST <= number(answer) <= HIGHEST,
        praise=(
            "4 for the parameter, 8 for the optimizer's two numbers, the rest for activations of "
            "the wider adapter. The peak comes at the end of the forward pass: no gradient yet."
        ),
        hints=[
            (
                lambda answer: close(answer, 16, 0.08),
                "That counts the gradients too. When is the peak with LoRA: before or after the "
                "backward pass? Measure it.",
            ),
            (
                lambda answer: close(answer, 4, 0.15),
                "That is the parameter alone. Does the optimizer keep something for it?",
            ),
            (
                lambda answer: close(answer, 8, 0.15),
                "That is what the optimizer keeps. And the parameter itself?",
            ),
            (
                lambda answer: 30 < number(answer) < 300,
                "That divides a whole peak. Take the difference of the two peaks, and the "
                "difference of the two numbers of parameters.",
            ),
        ],
        otherwise="(peak at r=64 - peak at r=16) / (trained at r=64 - trained at r=16), in bytes.",
    ),
    "01.3": Exercise(
        task=(
            f"One model has {LOWER:.0%} exact match and another {UPPER:.0%}. How many test "
            "messages are needed until their 95 % intervals no longer overlap? Try numbers in "
            "statistics.wilson_interval, or write a loop. Set messages to the smallest."
        ),
        right=lambda answer: close(answer, MESSAGES, 0.02),
        praise="So 114 messages cannot rank two good models. Pairs can tell earlier: see 08.",
        hints=[
            (
                lambda answer: close(answer, 114, 0),
                "That is the size of our test split. Print both intervals for it.",
            ),
            (
                lambda answer: 0 < number(answer) < MESSAGES,
                "With so many messages the two intervals still overlap.",
            ),
            (
                lambda answer: number(answer) > MESSAGES,
                "The intervals are apart there, but fewer messages will do.",
            ),
        ],
        otherwise="Raise the count until the upper end of one is below the lower end of the other.",
    ),
    "01.4": Exercise(
        task=(
            f"Which way do you try first? Set choices to a dict such as {{'a': 'lora', ...}}, with "
            f"values from {', '.join(WAYS)}; each of them at most once.\n"
            "(a) Every ticket number in the mails looks like #123456, and you want to extract it.\n"
            "(b) A shop gets twenty mails a day, nobody has labelled any, and a large hosted model "
            "may be used.\n"
            "(c) 3,000 labelled mails, a 7B model, one GPU of 16 GB.\n"
            "(d) A million labelled rows on a new kind of task, a 1B model, eight GPUs of 80 GB. "
            "LoRA was tried at several ranks and falls short.\n"
            "(e) Logs of a machine in a byte code of its own, which no published model was trained "
            "on. There are billions of lines, and a cluster."
        ),
        right=lambda answer: all(_chosen(answer, key) == way for key, way in SITUATIONS.items()),
        praise="The cheapest way that does the job, and each step up only where it is needed.",
        hints=[
            (
                lambda answer: not isinstance(answer, dict) or set(answer) != set(SITUATIONS),
                "The answer should be a dict with the keys a, b, c, d and e.",
            ),
            (
                lambda answer: not {_chosen(answer, key) for key in SITUATIONS} <= set(WAYS),
                f"The values should be among {', '.join(WAYS)}.",
            ),
            (
                lambda answer: _chosen(answer, "a") != "rules",
                "(a): the form never varies. Does finding it take any understanding?",
            ),
            (
                lambda answer: _chosen(answer, "b") != "prompt",
                "(b): what would you train on? And how much do 20 requests a day cost?",
            ),
            (
                lambda answer: _chosen(answer, "c") == "full",
                "(c): 7 billion parameters in 16 bits are 14 GB. Where do gradients and the "
                "optimizer's two numbers for each parameter go?",
            ),
            (
                lambda answer: _chosen(answer, "c") == "lora",
                "(c): 7 billion frozen parameters in 16 bits are 14 GB already. What is left for "
                "the activations, and how could the frozen part be made smaller?",
            ),
            (
                lambda answer: _chosen(answer, "d") in ("lora", "qlora"),
                "(d): an update of low rank was tried and is not enough. What is there room for?",
            ),
            (
                lambda answer: _chosen(answer, "e") != "scratch",
                "(e): fine-tuning and prompting build on what a model has read. What of that "
                "is of use here?",
            ),
        ],
        otherwise="Ask each time: what is there to learn from, and what fits into the memory?",
    ),
}
