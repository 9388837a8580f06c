"""Text to token ids by a byte-level BPE trained on the corpus or any tokenizer.json; bytes per token."""

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from moepp.data.token_files import LENGTH_DTYPE, Counts
from moepp.errors import UsageError
from moepp.lfs import refuse_pointer
from moepp.records import read_json
from moepp.terminal import working

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # ours, and what other tokenizers call it
BATCH = 2**20  # characters tokenised at a time, over all cores: the steps of the bar
WHOLE = 2**25  # characters of a text that is tokenised in one piece, which takes some 140 times its size in memory
PIECE, SEARCHED = 2**22, 2**16  # characters of a piece of any longer text, and of its end where a space is looked for
SPACE = re.compile(r"(?<=\S) (?=\S)")
MOST_LOST = 0.01  # share of the text that a tokenizer may drop


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, as GPT-2's: every text can be encoded and decoded exactly."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UsageError(f"a byte-level BPE needs a vocab_size above {len(alphabet)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=sorted(alphabet), show_progress=False
    )
    with ExitStack() as phase:  # begins once all texts are read, which has a bar of its own

        def read() -> Iterator[str]:
            yield from (piece for text in texts for piece in pieces(text))
            phase.enter_context(working("training the tokenizer"))

        tokenizer.train_from_iterator(read(), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises UsageError for a file that is no tokenizer.json."""
    try:
        refuse_pointer(path)
        tokenizer = Tokenizer.from_file(str(path))
    except UsageError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"{path} is no readable tokenizer.json: {error}") from None
    tokenizer.no_truncation()  # published files may carry the settings of their last use
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer: Tokenizer, folder: Path | None = None, name: str = "") -> int:
    """The id that ends every document: that of the token `name`, else of the one known by name, else of what the files
    beside a published tokenizer say.

    Raises UsageError where nothing tells it.
    """
    names = [name] if name else [known for known in END_OF_TEXT if tokenizer.token_to_id(known) is not None]
    names = names or _said_to_end(tokenizer, folder)
    if not names or (end := tokenizer.token_to_id(names[0])) is None:
        raise UsageError(
            f"data.tokenizer{f' in {folder}' if folder else ''}: {name or 'end-of-text'} is no token of it; set"
            f" data.end_of_text to the token that ends a document, such as {' '.join(END_OF_TEXT)}"
        )
    return end


def _said_to_end(tokenizer: Tokenizer, folder: Path | None) -> list[str]:
    """What tokenizer_config.json calls eos_token, or the tokens of config.json's eos_token_id."""
    said = {name: _beside(folder, name) for name in ("tokenizer_config.json", "config.json", "generation_config.json")}
    token = said["tokenizer_config.json"].get("eos_token")
    names = [token.get("content") if isinstance(token, dict) else token]
    for name in ("config.json", "generation_config.json"):
        ids = said[name].get("eos_token_id")
        names += [tokenizer.id_to_token(i) for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return [name for name in names if isinstance(name, str)]


def _beside(folder: Path | None, name: str) -> dict[str, Any]:
    found = read_json(folder / name) if folder else None
    return found if isinstance(found, dict) else {}


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one text, by the one rule of training, evaluation and generation: no token is added, and the name of a
    special token inside a text is text, spelt out.
    """
    return [token for _, encoding in encode(tokenizer, [text]) for token in encoding.ids]


@dataclass(frozen=True)
class Encoded:
    """Ids and (start, end) in characters of a text's tokens, as the library's Encoding has them."""

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    tokenizer: Tokenizer, texts: Iterable[str], offsets: bool = True
) -> Iterator[tuple[str, Encoding | Encoded]]:
    """Each text with its encoding, ids and character offsets, in order; texts without a single token are left out.
    Without `offsets`, which are 0 then, it takes two thirds of the time.

    A special token's name inside a text is text: it is spelt out and cannot end a document. A text longer than WHOLE is
    tokenised in pieces. The next batch is tokenised while one is worked on.
    """
    tokenizer.encode_special_tokens = True
    made: deque[Future] = deque()
    with ThreadPoolExecutor(1) as ahead:
        for batch in _batches(texts):
            made.append(ahead.submit(_encode_batch, tokenizer, batch, offsets))
            if len(made) > 1:
                yield from _with_tokens(*made.popleft().result())
        for last in made:
            yield from _with_tokens(*last.result())


def _with_tokens(batch: list[str], encodings: Sequence[Encoding | Encoded]) -> Iterator[tuple[str, Encoding | Encoded]]:
    return (pair for pair in zip(batch, encodings, strict=True) if len(pair[1]))


def _encode_batch(
    tokenizer: Tokenizer, batch: list[str], offsets: bool
) -> tuple[list[str], Sequence[Encoding | Encoded]]:
    if len(batch) == 1 and len(batch[0]) > WHOLE:
        return batch, [_in_pieces(tokenizer, batch[0])]
    call = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    return batch, call(batch, add_special_tokens=False)


def pieces(text: str) -> Iterator[str]:
    """The text itself, or where it is longer than WHOLE its pieces, cut before a space within the words: no
    pre-tokenisation crosses it.
    """
    start, size = 0, len(text) if len(text) <= WHOLE else PIECE
    while len(text) - start > size:
        end = start + size
        spaces = [m.start() for m in SPACE.finditer(text, max(start + 1, end - SEARCHED), end)]
        end = spaces[-1] if spaces else end
        yield text[start:end]
        start = end
    yield text[start:]


def _in_pieces(tokenizer: Tokenizer, text: str) -> Encoded:
    ids, offsets, start = [], [], 0
    for piece in pieces(text):
        encoding = tokenizer.encode(piece, add_special_tokens=False)
        ids.append(np.array(encoding.ids, dtype=np.int64))
        offsets.append(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start)
        start += len(piece)
    return Encoded(np.concatenate(ids), np.concatenate(offsets))


def write_split(
    tokenizer: Tokenizer,
    end: int,
    texts: Iterable[str],
    dtype: str,
    id_path: Path,
    length_path: Path | None = None,
    loss: "LossCount | None" = None,
) -> Counts:
    """Writes the ids of all texts, each ended by `end`, and where `length_path` is given the bytes per id. `loss`
    counts what of them is lost.
    """
    documents = tokens = size = 0
    with open(id_path, "wb") as ids, open(length_path or os.devnull, "wb") as lengths:
        for text, encoding in encode(tokenizer, texts, offsets=bool(loss or length_path)):
            np.array([*encoding.ids, end], dtype).tofile(ids)
            if loss:
                loss.add(text, encoding)
            if length_path:
                np.append(token_bytes(text, encoding.offsets), 0).astype(LENGTH_DTYPE).tofile(lengths)
            documents += 1
            tokens += len(encoding) + 1
            size += len(text.encode())
    return Counts(documents, tokens, size)


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of `text` that each token stands for, [tokens], from their (start, end) in characters.

    They sum to the text's bytes for any tokenizer: a token stands for all text after the furthest end before it, and
    the last one for the rest too. So a character spread over several tokens counts with the first of them, and text
    that a tokenizer drops with the token after it.
    """
    ends = np.maximum.accumulate(np.asarray(offsets)[:, 1])
    ends[-1] = len(text)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.diff(np.concatenate(([0], np.cumsum(widths)))[ends], prepend=0)


class LossCount:
    """Characters of texts that a tokenizer drops or makes an unknown token of, beside white space."""

    def __init__(self, tokenizer: Tokenizer):
        model = json.loads(tokenizer.to_str())["model"]
        name, number = model.get("unk_token"), model.get("unk_id")
        self._unknown = tokenizer.token_to_id(name) if isinstance(name, str) else number
        self.lost = self.all = 0

    def add(self, text: str, encoding: Encoding | Encoded) -> None:
        covered = np.zeros(len(text) + 1, dtype=np.int64)
        offsets, ids = np.asarray(encoding.offsets).reshape(-1, 2), np.asarray(encoding.ids)
        kept = offsets if self._unknown is None else offsets[ids != self._unknown]
        np.add.at(covered, kept[:, 0], 1)
        np.add.at(covered, kept[:, 1], -1)
        self.lost += sum(not text[place].isspace() for place in np.flatnonzero(covered.cumsum()[:-1] <= 0))
        self.all += len(text) - sum(map(str.isspace, text))

    def refuse(self, name: str) -> None:
        if self.lost > MOST_LOST * self.all:
            raise UsageError(
                f"data.tokenizer={name} loses {self.lost / self.all:.1%} of the held-out text ({self.lost:,} characters"
                f" that are dropped or unknown to it), more than {MOST_LOST:.0%}; choose a tokenizer made for this text"
            )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Of BATCH characters and a text more; what is longer than WHOLE comes alone."""
    batch, size = [], 0
    for text in texts:
        if len(text) > WHOLE:
            if batch:
                yield batch
            yield [text]
            batch, size = [], 0
            continue
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
