"""Counts and lists of names as sentences say them."""

from collections.abc import Collection, Sequence

NAMED = 8  # names that a sentence holds; of more it says how many


def several(count: int, noun: str) -> str:
    """`1 run`, `3 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def among(names: Sequence[str], known: Collection[str], noun: str) -> str:
    """`a, b`. Of more than NAMED it is `all 35 arms`, or `33 of 35 arms, all but x, y` where as few are left out."""
    if len(names) <= NAMED:
        return ", ".join(names)
    left_out = [name for name in known if name not in names]
    if not left_out:
        return f"all {len(names)} {noun}s"
    but = f", all but {', '.join(left_out)}" if len(left_out) <= NAMED else ""
    return f"{len(names)} of {len(known)} {noun}s{but}"
