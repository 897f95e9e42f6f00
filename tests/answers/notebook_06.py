"""Right forms and typical mistakes of notebook 06's exercises; test_exercises.py tries them."""

import math

import torch

SECRET = {"key", "token", "secret", "password"}


def best_by_filter(curves: dict) -> str:
    last = {name: curve[-1][1] for name, curve in curves.items()}
    return min((n for n in last if math.isfinite(last[n])), key=last.get)


def best_by_loop(curves: dict) -> str:
    best, lowest = None, math.inf
    for name in curves:
        if curves[name][-1][1] < lowest:
            best, lowest = name, curves[name][-1][1]
    return best


def best_by_torch(curves: dict) -> str:
    names = list(curves)
    losses = torch.tensor([curves[name][-1][1] for name in names])
    return names[int(torch.nan_to_num(losses, nan=torch.inf).argmin())]


def safe_by_split(config: dict) -> dict:
    return {k: v for k, v in config.items() if k.lower().split("_")[-1] not in SECRET}


def safe_by_deleting_from_a_copy(config: dict) -> dict:
    result = config.copy()
    for name in config:
        if name.lower().rpartition("_")[2] in SECRET:
            result.pop(name)
    return result


def safe_in_place(config: dict) -> dict:
    for name in list(config):
        if name.lower().split("_")[-1] in SECRET:
            del config[name]
    return config


RIGHT = [
    ("06.1", 26),
    ("06.1", "26"),
    ("06.1", 26.0),
    ("06.1", torch.tensor(26)),
    ("06.1", "26 records"),
    ("06.2", "artifact"),
    ("06.2", "The artifact."),
    ("06.2", " ARTIFACTS "),
    ("06.3", best_by_filter),
    ("06.3", best_by_loop),
    ("06.3", best_by_torch),
    ("06.4", safe_by_split),
    ("06.4", safe_by_deleting_from_a_copy),
]

WRONG = [
    ("06.1", 25, "one record more than your rule"),
    ("06.1", "20", "counted the training losses"),
    ("06.1", 120, "Not every step logs"),
    ("06.1", 5, "counted the validation losses"),
    ("06.1", "many", "Count three things"),
    ("06.2", "nothing", "size of a run's folder"),
    ("06.2", "Curves", "Which kinds of records"),
    ("06.2", "config", "read the settings back"),
    ("06.2", "the weather", "one of the four words"),
    ("06.3", lambda c: min(curve[-1][1] for curve in c.values()), "Return the name"),
    ("06.3", lambda c: max(c, key=lambda n: c[n][-1][1]), "highest loss"),
    ("06.3", lambda c: min(c, key=lambda n: min(v for _, v in c[n])), "low once and rose again"),
    ("06.3", lambda c: min(c, key=lambda n: c[n][-1][1]), "as long as every loss is a number"),
    (
        "06.3",
        lambda c: min((n for n in c if math.isfinite(c[n][1][1])), key=lambda n: c[n][1][1]),
        "differ in length",
    ),
    ("06.3", lambda c: "c", "Take the last pair"),
    ("06.4", safe_in_place, "handed in is changed"),
    ("06.4", lambda c: {k: "***" for k in c}, "Every entry is still there"),
    (
        "06.4",
        lambda c: {k: v for k, v in c.items() if k.split("_")[-1] not in SECRET},
        "capital letters",
    ),
    (
        "06.4",
        lambda c: {k: v for k, v in c.items() if not any(w in k.lower() for w in SECRET)},
        "Settings are gone",
    ),
    (
        "06.4",
        lambda c: {k: v for k, v in c.items() if not k.lower().endswith(tuple(SECRET))},
        "Settings are gone",
    ),
    (
        "06.4",
        lambda c: {
            k: v for k, v in c.items() if not k.lower().endswith(tuple(f"_{w}" for w in SECRET))
        },
        "bare word",
    ),
]
