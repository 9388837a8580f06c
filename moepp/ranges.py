"""Whole numbers from the first to the last, as people write them: `0..19`."""

import re

LONGEST = 10_000  # numbers; more is a slip of the finger


def whole_range(word: str) -> range | None:
    """None for what is no range, or one of more than LONGEST numbers."""
    found = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", word, re.ASCII)
    numbers = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    return numbers if 0 < len(numbers) <= LONGEST else None
