"""Text to token ids by a byte-level BPE trained on the corpus or any tokenizer.json; bytes per token."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, trainers

from moepp.data.token_files import LENGTH_DTYPE, Counts
from moepp.errors import UsageError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # ours, and what other tokenizers call it
BATCH = 2**22  # characters tokenised at a time, over all cores


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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises UsageError for a file that is no tokenizer.json or knows no end-of-text token."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"data.tokenizer={path} is neither 'bpe' nor a readable tokenizer.json: {error}") from None
    tokenizer.no_truncation()  # published files may carry the settings of their last use
    tokenizer.no_padding()
    if not any(tokenizer.token_to_id(name) is not None for name in END_OF_TEXT):
        raise UsageError(f"data.tokenizer={path} has no end-of-text token; it needs one of {' '.join(END_OF_TEXT)}")
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends every document."""
    return next(token for name in END_OF_TEXT if (token := tokenizer.token_to_id(name)) is not None)


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, Encoding]]:
    """Each text with its encoding, ids and character offsets, in order; texts without a single token are left out.

    A special token's name inside a text is text: it is spelt out and cannot end a document.
    """
    tokenizer.encode_special_tokens = True
    for batch in _batches(texts):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            if encoding.ids:
                yield text, encoding


def write_split(
    tokenizer: Tokenizer, texts: Iterable[str], dtype: str, id_path: Path, length_path: Path | None = None
) -> Counts:
    """Writes the ids of all texts, each ended by end-of-text, and where `length_path` is given the bytes per id."""
    end = end_of_text(tokenizer)
    documents = tokens = size = 0
    with open(id_path, "wb") as ids, open(length_path or os.devnull, "wb") as lengths:
        for text, encoding in encode(tokenizer, texts):
            np.array([*encoding.ids, end], dtype=dtype).tofile(ids)
            if length_path:
                np.append(token_bytes(text, encoding.offsets), 0).astype(LENGTH_DTYPE).tofile(lengths)
            documents += 1
            tokens += len(encoding.ids) + 1
            size += len(text.encode())
    return Counts(documents, tokens, size)


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """UTF-8 bytes of `text` that each token stands for, [tokens], from their (start, end) in characters.

    They sum to the text's bytes for any tokenizer: a token stands for all text after the furthest end before it, and
    the last one for the rest too. So a character spread over several tokens counts with the first of them, and text
    that a tokenizer drops with the token after it.
    """
    ends = np.maximum.accumulate([end for _, end in offsets])
    ends[-1] = len(text)
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.diff(np.concatenate(([0], np.cumsum(widths)))[ends], prepend=0)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
