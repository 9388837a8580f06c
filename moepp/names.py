"""The one rule for names: of runs, sweeps, scales, arms, tags and experiments.

They become folders, jobs of a cluster, axes and headings: a name is letters, digits and a few signs, and can be no
path, no command and no markup.
"""

import difflib
import re
from collections.abc import Iterable

LENGTH = 120  # characters; a file system takes 255 bytes
SIGNS = "_ . - + = , @"
NAME = re.compile(rf"\w[\w.+=,@-]{{0,{LENGTH - 1}}}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # line ends among them


def check(what: str, names: Iterable[str]) -> None:
    """Raises ValueError, in one line, for the first of `names` that is none; `what` is the key or the place."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{what}={name!r}: a name begins with a letter or digit and holds letters, digits and {SIGNS}, at most"
                f" {LENGTH} characters"
            )


def check_label(what: str, text: str) -> None:
    """Of a figure or a table. Raises ValueError for more than a line, and for the sign that begins a formula there."""
    check_line(what, text)
    if not text.strip() or "$" in text or len(text) > LENGTH:
        raise ValueError(f"{what}={text!r}: a label holds 1 to {LENGTH} characters, and no $")


def check_line(what: str, text: str) -> None:
    """Raises ValueError for text with line ends or other control characters, as no path or parameter needs them."""
    if CONTROL.search(text):
        raise ValueError(f"{what}={text!r} must be one line without control characters")


def plain(text: str) -> str:
    """`text` as a name: `_` for each character that none may have."""
    return re.sub(r"[^\w.+=,@-]", "_", text)[:LENGTH]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line that refuses a name: the nearest of those `known`, where one is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The line that refuses a name which is none of `known`, with the nearest of them."""
    known = list(known)
    return f"unknown {kind} '{name}'; choose from {', '.join(known) or '(none)'}{did_you_mean(name, known)}"
