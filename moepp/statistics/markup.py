"""Text as text in Markdown: names, questions, notes and messages mean themselves, and draw in nothing."""

import re

CODE = re.compile(r"((?<!`)`[^`\n]+`(?!`))")
# What would begin markup, an image, a link, HTML or an entity; underscores within words and bare signs do not.
ACTIVE = re.compile(r"[\\`*]|<(?=[A-Za-z/!?])|(?<=\])[(\[:]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
BLOCK = re.compile(r"(?:[-+]|#{1,6}|\d+[.)])(?=\s|$)|[>~=]")  # a list, heading, quote or fence, where a line begins


def escaped(text: str) -> str:
    """One line of text as Markdown shows it; code between backticks stays code."""
    parts = CODE.split(" ".join(text.split()))
    line = "".join(part if place % 2 else ACTIVE.sub(r"\\\g<0>", part) for place, part in enumerate(parts))
    block = BLOCK.match(line)
    return f"{line[: block.end() - 1]}\\{line[block.end() - 1 :]}" if block else line


def cell(text: str) -> str:
    """The same within a table."""
    return escaped(text).replace("|", r"\|")


def code(text: str) -> str:
    """As code, whatever stands in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"
