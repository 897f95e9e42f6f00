"""Compare outputs with their numbers masked: output_masks.cfg, read as nbval reads it."""

import re
from pathlib import Path

from nbval.plugin import get_sanitize_patterns

CONFIG = Path(__file__).parent / "output_masks.cfg"


def mask(text: str) -> str:
    """Text as it is compared: every number, every run of spaces and every rule made alike."""
    for regex, replacement in get_sanitize_patterns(CONFIG.read_text(encoding="utf-8")):
        text = re.sub(regex, replacement, text)
    return text
