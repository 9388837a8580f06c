"""Texts whose words are known, with or without part-of-speech tags, and which token belongs to which word (Fig. 5)."""

import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from moepp.errors import UsageError
from moepp.routing.task_texts import read_lines

WHOLE, FIRST, LATER = "whole word", "first fragment", "later fragment"
NO_LETTER = "no letter"  # of punctuation and numbers: neither a whole word nor a fragment of one
ACROSS = "across words"
NO_CLASS = "no class"  # of a word whose tag is punctuation: the coarse tags of Brown have "." for "not"


@dataclass(frozen=True)
class TaggedText:
    """A text, the (first, after-last) character of each of its W words [W, 2], and their tags ("" where unknown)."""

    text: str
    spans: np.ndarray
    tags: tuple[str, ...]


def read_tagged(path: Path, words: int, seed: int = 0) -> list[TaggedText]:
    """Texts of about `words` words in all, drawn at random by `seed`, from a JSONL(.gz) of words and their tags,
    `{"words": [...], "pos": [...]}`.

    A line is a sentence; neighbouring lines of the same `file`, where they name one, are one text. Words are joined by
    spaces. A word with letters under a tag without any is of NO_CLASS. Raises UsageError for other lines.
    """
    rows = [_row(path, number, line) for number, line in enumerate(read_lines(path), start=1)]
    if not rows:
        raise UsageError(f"{path} holds no sentence")
    documents = [list(rows) for _, rows in groupby(rows, key=lambda row: row[2])]
    texts, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if total >= words:
            break
        text = _joined(documents[index])
        total += len(text.tags)
        texts.append(text)
    return texts


def _row(path: Path, number: int, line: str) -> tuple[list[str], list[str], object]:
    try:
        row = json.loads(line)
        words, tags = list(row["words"]), list(row["pos"])
        if len(words) != len(tags) or not all(isinstance(word, str) and word for word in words + tags):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f'{path} line {number} is not {{"words": [...], "pos": [...]}} with a tag for every word'
        ) from None
    classes = [
        tag if has_letter(tag) or not has_letter(word) else NO_CLASS for word, tag in zip(words, tags, strict=True)
    ]
    return words, classes, row.get("file", number)


def _joined(rows: list[tuple[list[str], list[str], object]]) -> TaggedText:
    words = [word for row in rows for word in row[0]]
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    spans = np.stack([ends - [len(word) for word in words], ends], axis=1)
    return TaggedText(" ".join(words), spans, tuple(tag for row in rows for tag in row[1]))


def has_letter(text: str) -> bool:
    return any(character.isalpha() for character in text)


def split_words(text: str) -> TaggedText:
    """Words as runs of letters, digits and what joins them, other characters one by one; no tags."""
    spans = [match.span() for match in re.finditer(r"\w+(?:['’-]\w+)*|[^\w\s]", text)]
    return TaggedText(text, np.array(spans, dtype=int).reshape(-1, 2), ("",) * len(spans))


def align(token_spans: np.ndarray, tagged: TaggedText) -> tuple[np.ndarray, list[str]]:
    """For tokens with characters `token_spans` [S, 2], the word that each belongs to, -1 for none, and its part of it.

    Exact for any tokenizer that gives character offsets: a token is a whole word if it holds all its characters (blanks
    around them aside), else a fragment, also where it is one byte of a character. All tokens of a word without a letter
    are NO_LETTER. A token with characters of several words belongs to none.
    """
    starts, ends = tagged.spans[:, 0], tagged.spans[:, 1]
    first = np.searchsorted(ends, token_spans[:, 0], side="right")  # the first word that ends after the token begins
    last = np.searchsorted(starts, token_spans[:, 1], side="left") - 1  # the last that begins before it ends
    spelled = [has_letter(tagged.text[start:end]) for start, end in tagged.spans]
    words, parts, seen = np.full(len(token_spans), -1), [], set()
    for index, (low, high) in enumerate(zip(first, last, strict=True)):
        if low > high:
            parts.append("")  # blanks only
        elif low < high:
            parts.append(ACROSS)
        else:
            words[index] = low
            begins, stops = token_spans[index]
            alone = low not in seen and not _shares(token_spans, index)
            whole = begins <= starts[low] and stops >= ends[low] and alone
            part = WHOLE if whole else LATER if low in seen else FIRST
            parts.append(part if spelled[low] else NO_LETTER)
            seen.add(low)
    return words, parts


def _shares(token_spans: np.ndarray, index: int) -> bool:
    """Whether the next token holds other bytes of this token's last character."""
    return index + 1 < len(token_spans) and token_spans[index + 1, 0] < token_spans[index, 1]
