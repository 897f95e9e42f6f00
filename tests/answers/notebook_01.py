"""Right forms and typical mistakes of notebook 01's exercises; test_exercises.py tries them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from helpers.exercises.notebook_01 import SITUATIONS

Chat = list[dict[str, str]]
Count = Callable[[Chat], int]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turns(examples: Sequence[tuple[str, str]]) -> Chat:
    return [
        say(role, text)
        for pair in examples
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def whole(system: str, examples: Sequence[tuple[str, str]], message: str) -> Chat:
    return [say("system", system), *turns(examples), say("user", message)]


def from_the_longest(system: str, examples: list, message: str, count: Count, budget: int) -> Chat:
    for shots in range(len(examples), 0, -1):
        prompt = whole(system, examples[:shots], message)
        if count(prompt) <= budget:
            return prompt
    return whole(system, [], message)


def one_by_one(system: str, examples: list, message: str, count: Count, budget: int) -> Chat:
    taken: list[tuple[str, str]] = []
    for example in examples:
        if count(whole(system, [*taken, example], message)) > budget:
            break
        taken.append(example)
    return whole(system, taken, message)


def by_adding_up(system: str, examples: list, message: str, count: Count, budget: int) -> Chat:
    room = budget - count(whole(system, [], message))
    prompt = [say("system", system)]
    for example in examples:
        room -= count(turns([example]))
        if room < 0:
            break
        prompt += turns([example])
    return [*prompt, say("user", message)]


def as_a_generator(*arguments: Any) -> Iterator[dict[str, str]]:
    yield from one_by_one(*arguments)


# Mistakes in 01.5


def without_the_message(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e, m, count, budget)[:-1]


def without_the_system(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e, m, count, budget)[1:]


def all_said_by_the_user(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    prompt = one_by_one(s, e, m, count, budget)
    return [say("user", p["content"]) if p["role"] == "assistant" else p for p in prompt]


def one_text(s: str, e: list, m: str, count: Count, budget: int) -> str:
    return "\n".join(p["content"] for p in one_by_one(s, e, m, count, budget))


def at_most_two(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e[:2], m, count, budget)


def from_the_back(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e[::-1], m, count, budget)


def without_a_budget(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return whole(s, e, m)


def message_not_counted(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e, m, lambda messages: count(messages[:-1]), budget)


def one_too_many(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    taken = []
    for example in e:
        if count(whole(s, taken, m)) > budget:
            break
        taken.append(example)
    return whole(s, taken, m)


def strictly_below(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    return one_by_one(s, e, m, count, budget - 1)


def leaps_over(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    taken: list[tuple[str, str]] = []
    for example in e:
        if count(whole(s, [*taken, example], m)) <= budget:
            taken.append(example)
    return whole(s, taken, m)


def uses_up_the_list(s: str, e: list, m: str, count: Count, budget: int) -> Chat:
    taken: list[tuple[str, str]] = []
    while e and count(whole(s, [*taken, e[0]], m)) <= budget:
        taken.append(e.pop(0))
    return whole(s, taken, m)


RIGHT = [
    ("01.1", 240_000),
    ("01.1", "240,000 tokens"),
    ("01.1", torch.tensor(240_000)),
    ("01.1", "240k"),
    ("01.1", 1000 * (36 + 3 * 60 + 24)),
    ("01.2", 2 / 3),
    ("01.2", "2/3"),
    ("01.2", "4 / 6"),
    ("01.2", "67 %"),
    ("01.2", 0.67),
    ("01.2", 66.7),
    ("01.2", torch.tensor(2 / 3)),
    ("01.3", 10_000),
    ("01.3", "10,000 requests"),
    ("01.3", "10k"),
    ("01.3", 0.30 / (300 * 0.10 / 1e6)),
    ("01.4", SITUATIONS),
    ("01.4", {key: f" {way.upper()}" for key, way in SITUATIONS.items()}),
    ("01.5", from_the_longest),
    ("01.5", one_by_one),
    ("01.5", by_adding_up),
    ("01.5", as_a_generator),
]
WRONG = [
    ("01.1", 24_216, "the examples once"),
    ("01.1", 265_000, "which come back"),
    ("01.1", 120_000, "How many examples"),
    ("01.1", "180,000", "the examples alone"),
    ("01.1", 60_000, "without examples"),
    ("01.1", 240, "one request"),
    ("01.1", 7, "Add up one prompt"),
    ("01.2", 0.036, "a frozen parameter"),
    ("01.2", "3.5 %", "a frozen parameter"),
    ("01.2", "1/3", "the forward pass alone"),
    ("01.2", 0.5, "cost the same"),
    ("01.2", 1, "of no use"),
    ("01.2", 0.9, "three products down"),
    ("01.3", 20_000, "a whole hour"),
    ("01.3", 8824, "the difference"),
    ("01.3", 75_000, "what the short prompt costs"),
    ("01.3", 0.01, "for a million"),
    ("01.3", 123, "what does one request save"),
    ("01.4", "lora", "a dict with the keys"),
    ("01.4", {"a": "rules"}, "a dict with the keys"),
    ("01.4", SITUATIONS | {"a": "regex"}, "should be among"),
    ("01.4", SITUATIONS | {"a": "lora"}, "(a): the form"),
    ("01.4", SITUATIONS | {"b": "full"}, "(b): what would you train on"),
    ("01.4", SITUATIONS | {"c": "full", "d": "lora"}, "gradients and the optimizer"),
    ("01.4", SITUATIONS | {"c": "lora"}, "made smaller"),
    ("01.4", SITUATIONS | {"d": "lora"}, "(d): an update of low rank"),
    ("01.4", SITUATIONS | {"e": "full"}, "(e): fine-tuning and prompting"),
    ("01.4", SITUATIONS | {"c": "scratch"}, "Ask each time"),
    ("01.5", without_the_message, "What should the model answer"),
    ("01.5", without_the_system, "the role system"),
    ("01.5", all_said_by_the_user, "sees itself answer"),
    ("01.5", one_text, "a list of dicts"),
    ("01.5", at_most_two, "all three examples"),
    ("01.5", from_the_back, "keep their order"),
    ("01.5", without_a_budget, "the same for every budget"),
    ("01.5", message_not_counted, "longer than the budget"),
    ("01.5", one_too_many, "longer than the budget"),
    ("01.5", strictly_below, "exactly budget tokens"),
    ("01.5", leaps_over, "goes on with later ones"),
    ("01.5", uses_up_the_list, "changes the list"),
    ("01.5", lambda *arguments: 1 / 0, "ZeroDivisionError"),
]
