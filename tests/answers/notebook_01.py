"""Right forms and typical mistakes of notebook 01's exercises; test_exercises.py tries them."""

import torch

from helpers.exercises.notebook_01 import MESSAGES, SITUATIONS

RIGHT = [
    ("01.1", 816),
    ("01.1", 257_656 / 316),
    ("01.1", "815 requests"),
    ("01.1", torch.tensor(815.4)),
    ("01.2", 13),
    ("01.2", "about 13 bytes"),
    ("01.2", (1310.4e6 - 1120.6e6) / (19_537_920 - 4_884_480)),
    ("01.3", MESSAGES),
    ("01.3", "1,650 messages"),
    ("01.4", SITUATIONS),
    ("01.4", {key: f" {way.upper()}" for key, way in SITUATIONS.items()}),
]
WRONG = [
    ("01.1", 257_656 / 362, "the difference"),
    ("01.1", 257_656 / 46, "the short prompt"),
    ("01.1", 102, "one epoch"),
    ("01.1", "257,656", "Those are tokens"),
    ("01.1", 3, "does one request save"),
    ("01.2", 16, "before or after"),
    ("01.2", 4, "the parameter alone"),
    ("01.2", "8 bytes", "what the optimizer keeps"),
    ("01.2", 1120.6e6 / 4_884_480, "a whole peak"),
    ("01.2", 1, "trained at r=64"),
    ("01.3", 114, "our test split"),
    ("01.3", 1000, "still overlap"),
    ("01.3", "5,000", "fewer messages will do"),
    ("01.3", 0, "Raise the count"),
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
]
