"""The masks: numbers may differ between processors, words and the order of lines may not."""

from pathlib import Path

import pytest
from masks import CONFIG, mask


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("loss 0.194, 8 % exact", "loss 0.2071, 11 % exact"),
        ("step   12   1.5e-05", "step 8 -2e+3"),
        ("4,718,592 parameters", "98 parameters"),
        ("name  ----\nloss  0.1", "name  ------\nloss  12.25"),
    ],
)
def test_numbers_and_alignment_are_overlooked(stored: str, shown: str) -> None:
    assert mask(stored) == mask(shown)


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("loss 0.194", "loss nan"),
        ("verdict: healthy", "verdict: overfitting"),
        ("a 1\nb 2", "b 1\na 2"),
        ("3 of 4 right", "3 right"),
        ("one line 1", "one line 1\nand another"),
    ],
)
def test_words_lines_and_missing_numbers_are_not(stored: str, shown: str) -> None:
    assert mask(stored) != mask(shown)


def test_nbval_is_told_to_use_the_masks(pytestconfig: pytest.Config) -> None:
    assert Path(pytestconfig.getoption("nbval_sanitize_with")).samefile(CONFIG)
