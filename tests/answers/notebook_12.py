"""Right forms and typical mistakes of notebook 12's exercises; test_exercises.py tries them."""

import torch

Ids = list[int]


def by_pairs(scored: Ids, served: Ids) -> int | None:
    for place, (one, other) in enumerate(zip(scored, served, strict=False)):
        if one != other:
            return place
    return None if len(scored) == len(served) else min(len(scored), len(served))


def by_prefix(scored: Ids, served: Ids) -> int | None:
    if scored == served:
        return None
    place = 0
    while scored[: place + 1] == served[: place + 1]:
        place += 1
    return place


def up_to_the_shorter(scored: Ids, served: Ids) -> int | None:
    pairs = enumerate(zip(scored, served, strict=False))
    return next((place for place, (one, other) in pairs if one != other), None)


def never_none(scored: Ids, served: Ids) -> int:
    place = by_pairs(scored, served)
    return len(scored) if place is None else place


def from_one(scored: Ids, served: Ids) -> int | None:
    place = by_pairs(scored, served)
    return None if place is None else place + 1


def the_token(scored: Ids, served: Ids) -> int | None:
    place = by_pairs(scored, served)
    return None if place is None else [*served, 0][place]


RIGHT = [
    ("12.1", ["template", "adapter", "end token"]),
    ("12.1", ("The template", "Adapter.", "eos")),
    ("12.1", "template, adapter, end token"),
    ("12.2", 340),
    ("12.2", "340 MB"),
    ("12.2", 320e6 / 32 * 34 / 1e6),
    ("12.3", [0, 4, 1, 5, 2, 6, 3, 7]),
    ("12.3", torch.arange(8).view(2, 4).T.flatten()),
    ("12.3", ("0", "4", "1", "5", "2", "6", "3", "7")),
    ("12.4", by_pairs),
    ("12.4", by_prefix),
    ("12.5", [2, 4]),
    ("12.5", (4, 2)),
    ("12.5", {"2", "4"}),
]

WRONG = [
    ("12.1", ["adapter", "template", "end token"], "What writes a prompt"),
    ("12.1", ["template", "end token", "adapter"], "right up to their end"),
    ("12.1", ["template", "template", "end token"], "do not go together"),
    ("12.1", ["template", "adapter", "adapter"], "happened once"),
    ("12.1", ["template", "adapter"], "three in all"),
    ("12.1", ["the server", "adapter", "eos"], "one of the words"),
    ("12.2", 320, "beside each block"),
    ("12.2", 640, "the size in 16 bits"),
    ("12.2", 2720, "megabits"),
    ("12.2", 340e6, "How many MB"),
    ("12.2", 960, "shares one"),
    ("12.2", 100, "how many bytes does each take"),
    ("12.3", list(range(8)), "rotate row 0 with row 1"),
    ("12.3", [0, 2, 4, 6, 1, 3, 5, 7], "the way back"),
    ("12.3", [4, 0, 5, 1, 6, 2, 7, 3], "first half comes first"),
    ("12.3", [0, 4, 1, 5], "eight numbers"),
    ("12.3", [0, 4, 2, 6, 1, 5, 3, 7], "column by column"),
    ("12.4", up_to_the_shorter, "zip stops"),
    ("12.4", never_none, "there is no such place"),
    ("12.4", from_one, "counted from 0"),
    ("12.4", the_token, "That is the token"),
    ("12.4", lambda scored, served: 0, "first unequal pair"),
    ("12.5", [1, 2, 3, 4], "two thousand times"),
    ("12.5", [1, 3], "largest gaps"),
    ("12.5", [2, 3, 4], "3.7 times"),
    ("12.5", [4], "one of them"),
    ("12.5", 2, "Give a list"),
    ("12.5", [1, 2], "Take the difference"),
]
