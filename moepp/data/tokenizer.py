"""Text to token ids by a byte-level BPE trained on the corpus or any tokenizer.json; bytes per token."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
MADE_BY_TRANSFORMERS = "transformers makes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)"
MOST_LOST = 0.01  # share of the text that a tokenizer may drop
# A space before a word, and what of ASCII follows a letter or a digit and is neither.
WORD_STARTS = re.compile(r"(?= \S)|(?<=[A-Za-z0-9])(?=[\x00-/:-@\[-`{-\x7f])")
WORDS, LONGEST_WORD = 2**20, 64  # whose ids are kept, by a process: some 150 MB
# How these split text, "{}" for how many digits they take together.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def refuse_too_few_ids(vocab_size: int) -> None:
    """Raises UsageError for a vocabulary in which a byte-level BPE has no room for all bytes and the end of a text."""
    least = len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= least:
        raise UsageError(f"a byte-level BPE needs a vocab_size above {least}, not {vocab_size}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, as GPT-2's: every text can be encoded and decoded exactly."""
    refuse_too_few_ids(vocab_size)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
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
        raise UsageError(f"{path} is no readable tokenizer.json: {error}; {MADE_BY_TRANSFORMERS}") from None
    tokenizer.no_truncation()  # published files may carry the settings of their last use
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer: Tokenizer, folder: Path | None = None, name: str = "") -> int:
    """The id that ends every document: that of the token `name`, else of the one known by name, else of what the files
    beside a published tokenizer say.

    Raises UsageError where nothing tells it, and for a `name` that is a token of ordinary text.
    """
    names = [name] if name else [known for known in END_OF_TEXT if tokenizer.token_to_id(known) is not None]
    names = names or _said_to_end(tokenizer, folder)
    if not names or (end := tokenizer.token_to_id(names[0])) is None:
        raise UsageError(
            f"data.tokenizer{f' in {folder}' if folder else ''}: {name or 'end-of-text'} is no token of it; set"
            f" data.end_of_text to the token that ends a document, such as {' '.join(END_OF_TEXT)}"
        )
    text = tokenizer.decode([end], skip_special_tokens=False)
    if name and ("\ufffd" in text or end in encode_text(tokenizer, text)):  # a part of a character is of text as well
        raise UsageError(
            f"data.end_of_text={name} is a token of ordinary text, which would end documents wherever it stands; set it"
            f" to a token that no text gives, such as {' '.join(END_OF_TEXT)}"
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
    Without `offsets`, which are 0 then, it takes less time.

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


def ids_of(tokenizer: Tokenizer, dtype: str) -> Callable[[Iterable[str]], Iterator[tuple[str, bytes]]]:
    """What makes, as `encode` does, of each text its ids alone, as they lie in a file. It remembers words."""
    if splits_as_known(tokenizer):
        tokenizer.encode_special_tokens = True
        return WordIds(tokenizer, dtype).of_texts

    def of_texts(texts: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for text, encoding in encode(tokenizer, texts, offsets=False):
            yield text, np.array(encoding.ids, dtype).tobytes()

    return of_texts


class WordIds(dict[str, bytes]):
    """Ids of the words of a text, each distinct one tokenised once: text has few of them. Of a tokenizer that
    `splits_as_known` alone.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        super().__init__()
        self.tokenizer, self.dtype = tokenizer, dtype
        added = tokenizer.get_added_tokens_decoder().values()
        self.whole = [token.content for token in added if not token.special]  # tokens inside a text, too

    def of_texts(self, texts: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for text in texts:
            parts = (part for piece in pieces(text) for part in self._parts(piece))
            if ids := b"".join(map(self.__getitem__, parts)):
                yield text, ids

    def _parts(self, text: str) -> list[str]:
        return [text] if any(token in text for token in self.whole) else WORD_STARTS.split(text)

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self.tokenizer.encode(word, add_special_tokens=False).ids, self.dtype).tobytes()
        if len(self) < WORDS and len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids


def splits_as_known(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are those of its parts by WORD_STARTS: those patterns of byte-level BPEs begin a token there
    and look at nothing before it; where the part before ends in white space, they take this as they would have.
    """
    made = json.loads(tokenizer.to_str())
    normalizer, composed = made["normalizer"], {"type": "NFC"}  # which composes no ASCII with what stands before it
    added = any(token["normalized"] and not token["special"] for token in made["added_tokens"])
    return (normalizer is None or (normalizer == composed and not added)) and _is_known(made["pre_tokenizer"])


def _is_known(pre_tokenizer: dict[str, Any] | None) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return True  # GPT-2's
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return pattern in (LLAMA3.format("{1,3}"), LLAMA3.format(""))  # Qwen's takes digits one by one
    return False


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


@dataclass(frozen=True)
class Written(Counts):
    """Of held-out texts also their characters beside white space, and how many of these are lost: dropped by the
    tokenizer or unknown to it.
    """

    lost: int = 0
    characters: int = 0

    def refuse_loss(self, name: str) -> None:
        """Raises UsageError where too many are lost."""
        if self.lost > MOST_LOST * self.characters:
            raise UsageError(
                f"data.tokenizer={name} loses {self.lost / self.characters:.1%} of the held-out text ({self.lost:,}"
                f" characters that are dropped or unknown to it), more than {MOST_LOST:.0%}; choose a tokenizer made"
                " for this text"
            )


class Writer:
    """Writes the ids of texts, each ended by `end`."""

    def __init__(self, tokenizer: Tokenizer, end: int, dtype: str):
        self.tokenizer, self.end, self.dtype = tokenizer, end, dtype
        self.to_ids, self.loss = ids_of(tokenizer, dtype), LossCount(tokenizer)

    def write(self, texts: Iterable[str], path: Path) -> Written:
        documents = tokens = size = 0
        end = np.array([self.end], self.dtype).tobytes()
        with open(path, "wb") as file:
            for text, ids in self.to_ids(texts):
                tokens += file.write(ids + end) // len(end)
                documents += 1
                size += len(text.encode())
        return Written(documents, tokens, size)

    def write_measured(self, texts: Iterable[str], path: Path, length_path: Path) -> Written:
        """And into a second file the bytes of text that each id stands for."""
        documents = tokens = size = lost = characters = 0
        with open(path, "wb") as ids, open(length_path, "wb") as lengths:
            for text, encoding in encode(self.tokenizer, texts):
                ids.write(np.array([*encoding.ids, self.end], self.dtype).tobytes())  # tofile hides what the disk says
                lengths.write(np.append(token_bytes(text, encoding.offsets), 0).astype(LENGTH_DTYPE).tobytes())
                documents += 1
                tokens += len(encoding) + 1
                size += len(text.encode())
                lost += self.loss.of(text, encoding)
                characters += len(text) - sum(map(str.isspace, text))
        return Written(documents, tokens, size, lost, characters)


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
    """Counts the characters of a text that a tokenizer drops or makes an unknown token of, beside white space."""

    def __init__(self, tokenizer: Tokenizer):
        model = json.loads(tokenizer.to_str())["model"]
        name, number = model.get("unk_token"), model.get("unk_id")
        self._unknown = tokenizer.token_to_id(name) if isinstance(name, str) else number

    def of(self, text: str, encoding: Encoding | Encoded) -> int:
        covered = np.zeros(len(text) + 1, dtype=np.int64)
        offsets, ids = np.asarray(encoding.offsets).reshape(-1, 2), np.asarray(encoding.ids)
        kept = offsets if self._unknown is None else offsets[ids != self._unknown]
        np.add.at(covered, kept[:, 0], 1)
        np.add.at(covered, kept[:, 1], -1)
        return sum(not text[place].isspace() for place in np.flatnonzero(covered.cumsum()[:-1] <= 0))


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
