"""Exercises of notebook 01: ways to adapt a model, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from helpers.exercises import Exercise, close, number, says

Chat = list[dict[str, str]]
Pairs = Sequence[tuple[str, str]]

# 01.1: tokens of one prompt, and how many requests.
PREFIX, SHOT, SHOTS, MESSAGE, ANSWER, REQUESTS = 36, 60, 3, 24, 25, 1000
FIXED = PREFIX + SHOTS * SHOT
PAID = REQUESTS * (FIXED + MESSAGE)

# 01.4: what fits which situation.
WAYS = ("rules", "prompt", "lora", "qlora", "full", "scratch")
SITUATIONS = {"a": "rules", "b": "prompt", "c": "qlora", "d": "full", "e": "scratch"}

# 01.5: what the learner's function is called with. The words are counted, and 2 for each message.
SYSTEM = "Turn the message into JSON."
EXAMPLES = [("lamp is broken", '{"a": 1}'), ("where is my parcel", '{"a": 2}'), ("hi", '{"a": 3}')]
ASKED = "my kettle leaks"


def _count(messages: Chat) -> int:
    return sum(2 + len(message["content"].split()) for message in messages)


def few_shot(
    system: str, examples: Pairs, message: str, count: Callable[[Chat], int], budget: int
) -> Chat:
    """The reference solution: as many examples from the front as the budget of tokens allows."""
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": message}]
    for asked, answered in examples:
        turn = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        ]
        longer = [*prompt[:-1], *turn, prompt[-1]]
        if count(longer) > budget:
            break
        prompt = longer
    return prompt


LENGTHS = [_count(few_shot(SYSTEM, EXAMPLES[:shots], ASKED, _count, 10**6)) for shots in range(4)]
NONE, ONE, _, THREE = LENGTHS
BUDGETS = range(NONE, THREE + 2)
LONG = [
    EXAMPLES[0],
    ("word " * 30, '{"a": 4}'),
    EXAMPLES[2],
]  # the second never fits, the third would


def _build(f: Callable[..., Chat], budget: int, pairs: Pairs = tuple(EXAMPLES)) -> Chat:
    return list(f(SYSTEM, list(pairs), ASKED, _count, budget))


def _roles(f: Callable[..., Chat], budget: int = 10**6) -> list[str]:
    return [message["role"] for message in _build(f, budget)]


def _right_prompt(f: Callable[..., Chat]) -> bool:
    if _changes_its_input(f):
        return False
    cases = [(budget, EXAMPLES) for budget in BUDGETS]
    cases += [(ONE + 8, LONG), (10**6, [])]
    return all(
        _build(f, budget, pairs) == few_shot(SYSTEM, pairs, ASKED, _count, budget)
        for budget, pairs in cases
    )


def _changes_its_input(f: Callable[..., Chat]) -> bool:
    given = list(EXAMPLES)
    f(SYSTEM, given, ASKED, _count, 10**6)
    return given != EXAMPLES


def _fraction(answer: Any) -> float:
    """The fraction in an answer: 2/3, "2/3", "67 %", 0.667 or 66.7."""
    if isinstance(answer, str) and "/" in answer:
        return float(Fraction(answer.replace(" ", "")))
    value = number(answer)
    return value / 100 if value > 1 else value


def _is_fraction(answer: Any, expected: float, tolerance: float = 0.008) -> bool:
    return abs(_fraction(answer) - expected) <= tolerance


def _chosen(answer: dict[str, str], letter: str) -> str:
    return str(answer[letter]).strip().casefold()


EXERCISES = {
    "01.1": Exercise(
        task=(
            f"A prompt holds {PREFIX} tokens of instruction and chat marks, {SHOTS} examples of "
            f"{SHOT} tokens each, and a message of {MESSAGE} tokens. The answer has {ANSWER} "
            f"tokens. How many prompt tokens do {REQUESTS} requests take? Set prompt_tokens to the "
            "number."
        ),
        right=lambda answer: close(answer, PAID, 0) or says(answer, "240k", "240 k"),
        praise=f"{PREFIX} + {SHOTS} x {SHOT} + {MESSAGE} tokens, {REQUESTS} times.",
        hints=[
            (
                lambda answer: close(answer, FIXED + REQUESTS * MESSAGE, 0),
                "You send the examples once. What does the model know of them in request two?",
            ),
            (
                lambda answer: close(answer, PAID + REQUESTS * ANSWER, 0),
                "That counts the answer too. Which tokens do you send, and which come back?",
            ),
            (
                lambda answer: close(answer, REQUESTS * (PREFIX + SHOT + MESSAGE), 0),
                "How many examples are in the prompt?",
            ),
            (
                lambda answer: close(answer, REQUESTS * SHOTS * SHOT, 0),
                "Those are the examples alone. What else is sent with each request?",
            ),
            (
                lambda answer: close(answer, REQUESTS * (PREFIX + MESSAGE), 0),
                "That is the prompt without examples: what a fine-tuned model would need.",
            ),
            (lambda answer: close(answer, FIXED + MESSAGE, 0), "That is one request."),
        ],
        otherwise="Add up one prompt first. All of it is sent again with the next request.",
    ),
    "01.2": Exercise(
        task=(
            "For each parameter and token the forward pass costs one multiplication. The backward "
            "pass costs one for the gradient that is handed down to the layer below, and one for "
            "the gradient of the parameter itself. LoRA freezes the parameters; neglect its own "
            "small matrices. What fraction of the multiplications of full fine-tuning is left? "
            "Set fraction_left."
        ),
        right=lambda answer: _is_fraction(answer, 2 / 3),
        praise="Two of three are left, however few are trained. Section 10 counts nearly that.",
        hints=[
            (
                lambda answer: _is_fraction(answer, 0.036, 0.004),
                "That is the fraction of parameters that are trained. Does a frozen parameter take "
                "no part in the forward pass?",
            ),
            (
                lambda answer: _is_fraction(answer, 1 / 3),
                "That is the forward pass alone. There are adapters in the lowest layer too: how "
                "does the error get down to them?",
            ),
            (
                lambda answer: _is_fraction(answer, 1 / 2),
                "That takes forward and backward to cost the same. Count the products again: "
                "how many in each, and which one goes?",
            ),
            (
                lambda answer: _is_fraction(answer, 1.0),
                "Which of the three products is of no use for a parameter that will not change?",
            ),
        ],
        otherwise="Write the three products down. Which can be left out if a parameter is frozen?",
    ),
    "01.3": Exercise(
        task=(
            "A few-shot prompt has 340 tokens, the prompt of the fine-tuned model 40. A million "
            "prompt tokens cost 0.10 euro with either. Fine-tuning took half an hour on a GPU "
            "rented at 0.60 euro an hour. After how many requests has it paid for itself? "
            "Set requests to the number."
        ),
        right=lambda answer: close(answer, 10_000, 0) or says(answer, "10k", "10 k"),
        praise="0.30 euro of training, 300 tokens or 0.00003 euro saved with each request.",
        hints=[
            (
                lambda answer: close(answer, 20_000, 0),
                "That is a whole hour on the GPU. How long did the training take?",
            ),
            (
                lambda answer: close(answer, 8824, 0.001),
                "The fine-tuned model reads a prompt as well. What is saved is the difference.",
            ),
            (
                lambda answer: close(answer, 75_000, 0),
                "That divides by what the short prompt costs. What does a request save?",
            ),
            (
                lambda answer: number(answer) < 1 or close(answer, 0.01, 0),
                "The price is for a million tokens. What does one cost?",
            ),
        ],
        otherwise="What did the training cost, and what does one request save? Divide.",
    ),
    "01.4": Exercise(
        task=(
            f"Which way do you try first? Set choices to a dict such as {{'a': 'lora', ...}}, with "
            f"values from {', '.join(WAYS)}; each of them at most once.\n"
            "(a) Every ticket number in the mails looks like #123456, and you want it out.\n"
            "(b) A shop gets twenty mails a day, nobody has labelled any, and a large hosted model "
            "may be used.\n"
            "(c) 3,000 labelled mails, a 7B model, one GPU of 16 GB.\n"
            "(d) A million labelled rows on a new kind of task, a 1B model, eight GPUs of 80 GB. "
            "LoRA was tried at several ranks and falls short.\n"
            "(e) Protein sequences: no language model reads that alphabet. There are billions of "
            "them, and a cluster."
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
    "01.5": Exercise(
        task=(
            "Write within_budget(system, examples, message, count, budget). It returns chat "
            "messages: the system text, then examples as turns of user and assistant, then "
            "the message. examples is a list of (message, ticket). count(messages) tells how "
            "many tokens a list of chat messages has. Take examples from the front, as long "
            "as the whole prompt has at most budget tokens; stop at the first that does not "
            "fit."
        ),
        right=_right_prompt,
        praise="The message is always in, and the examples take what room is left.",
        hints=[
            (
                lambda f: (
                    not all(
                        isinstance(message, dict) and set(message) == {"role", "content"}
                        for message in _build(f, 10**6)
                    )
                ),
                'Return a list of dicts, each {"role": ..., "content": ...}.',
            ),
            (
                _changes_its_input,
                "Your function changes the list examples. What would the next request get?",
            ),
            (
                lambda f: _roles(f)[0] != "system",
                "The first chat message should have the role system.",
            ),
            (
                lambda f: _build(f, 10**6)[-1] != {"role": "user", "content": ASKED},
                "What should the model answer? The last chat message should be the user's.",
            ),
            (
                lambda f: "assistant" not in _roles(f),
                "Who says the ticket in an example? Give it that role, so that the model sees "
                "itself answer.",
            ),
            (
                lambda f: _roles(f)[1:-1] != ["user", "assistant"] * 3,
                "With a large budget all three examples should be in, user and assistant in turns.",
            ),
            (
                lambda f: (
                    [m["content"] for m in _build(f, 10**6)][1:6:2] != [a for a, _ in EXAMPLES]
                ),
                "The examples should keep their order, and each its own ticket.",
            ),
            (
                lambda f: (
                    _build(f, THREE - 1) == _build(f, 10**6) and _build(f, NONE) == _build(f, 10**6)
                ),
                "Your prompt is the same for every budget. What if the examples do not fit?",
            ),
            (
                lambda f: any(_count(_build(f, budget)) > budget for budget in BUDGETS),
                "Some of your prompts are longer than the budget. Does it count the system text, "
                "the message and the new example?",
            ),
            (
                lambda f: _build(f, THREE) != few_shot(SYSTEM, EXAMPLES, ASKED, _count, THREE),
                "A prompt of exactly budget tokens still fits.",
            ),
            (
                lambda f: (
                    _build(f, ONE + 8, LONG) != few_shot(SYSTEM, LONG, ASKED, _count, ONE + 8)
                ),
                "When one example does not fit, yours goes on with later ones. Stop there.",
            ),
        ],
        otherwise="Build the prompt without examples, then add one after the other before its end.",
        trial=lambda f: f(SYSTEM, list(EXAMPLES), ASKED, _count, 10**6),
    ),
}
