"""Texts to route: questions with their answers, tagged sentences, or held-out documents, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moepp.data.tokenizer import encode, token_bytes


@dataclass(frozen=True)
class Passage:
    """A text before tokenisation. The answer, what `text` is scored on, begins at character `answer`."""

    text: str
    group: str
    topic: str = ""
    subject: str = ""
    answer: int = 0


@dataclass(frozen=True)
class Text:
    """A tokenised text: ids [S] and the UTF-8 bytes each stands for [S]; the answer begins at token `answer`."""

    ids: np.ndarray
    bytes: np.ndarray
    group: str
    topic: str = ""
    subject: str = ""
    answer: int = 0

    def named(self, label: str) -> "Text":
        return replace(self, group=label, topic=label)


def tokenize(tokenizer: Tokenizer, passages: Sequence[Passage]) -> list[Text]:
    """Passages without a token are left out. A token that holds the last of the question and the first of the answer is
    the answer's.
    """
    pending = iter(passages)
    texts = []
    for text, encoding in encode(tokenizer, [passage.text for passage in passages]):
        passage = next(p for p in pending if p.text == text)  # those in between had no token
        ends = [end for _, end in encoding.offsets]
        answer = min(int(np.searchsorted(ends, passage.answer, side="right")), len(ends) - 1)
        size = token_bytes(text, encoding.offsets)
        texts.append(Text(np.array(encoding.ids), size, passage.group, passage.topic, passage.subject, answer))
    return texts


def documents(ids: np.ndarray, lengths: np.ndarray, end_of_text: int) -> list[Text]:
    """The documents of a split's token files, ids and bytes per id [T] each, without their end-of-text tokens."""
    ends = np.flatnonzero(ids == end_of_text)
    found = []
    for start, end in zip(np.concatenate(([0], ends[:-1] + 1)), ends, strict=True):
        if end > start:
            found.append(Text(ids[start:end].astype(np.int64), lengths[start:end].astype(np.int64), group=""))
    return found


def text_windows(texts: Sequence[Text], size: int, limit: int) -> list[Text]:
    """Texts cut into pieces of `size` tokens, shorter last pieces left out; of each group at most `limit`, evenly
    spread.
    """
    pieces: dict[str, list[Text]] = {}
    for text in texts:
        for start in range(0, len(text.ids) - size + 1, size):
            part = slice(start, start + size)
            pieces.setdefault(text.group, []).append(replace(text, ids=text.ids[part], bytes=text.bytes[part]))
    return [piece for group in pieces.values() for piece in evenly_chosen(group, limit)]


def evenly_chosen(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly spread over them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(limit, len(items))).astype(int))]
