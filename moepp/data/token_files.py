"""Token files: a corpus split by document, tokenised once and read through memory maps.

<cache>/<digest>/
  header.json      format, dtype, end-of-text id, counts, digest, where the text comes from
  tokenizer.json   the tokenizer, as Hugging Face `tokenizers` writes it
  train.bin        token ids, flat and little-endian; every document ends with the end-of-text token
  val.bin          the same for the held-out documents
  val.lengths.bin  uint32: UTF-8 bytes of text that each id of val.bin stands for, 0 for end-of-text
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moepp.errors import UsageError

FORMAT = 1
DTYPES = ("<u2", "<u4")  # of ids: the first while they fit
LENGTH_DTYPE = "<u4"


@dataclass(frozen=True)
class Counts:
    """Size of one split: documents, ids including end-of-text, UTF-8 bytes of text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What header.json says."""

    format: int
    digest: str  # 16 hex digits of everything that decides the tokens: corpus content, tokenizer, split
    dtype: str  # "<u2" or "<u4"
    vocab_size: int  # highest id + 1
    end_of_text: int
    corpus: str  # where the text comes from and its terms
    train: Counts
    val: Counts
    bad_rows: int = 0  # left out by data.bad_rows=skip
    without_tokens: int = 0  # documents in which the tokenizer finds none
    lost_characters: int = 0  # of the held-out text, dropped by the tokenizer or unknown to it

    def __str__(self) -> str:
        """What there is, and what of the text is not."""
        train, val = self.train, self.val
        documents = f"documents: {train.documents:,} and {val.documents:,}"
        lost = {
            "bad rows left out": self.bad_rows,
            "documents without a token": self.without_tokens,
            "held-out characters that the tokenizer does not know": self.lost_characters,
        }
        told = "".join(f"; {what}: {count:,}" for what, count in lost.items() if count)
        return f"{train.tokens:,} training tokens, {val.tokens:,} held out; {documents}{told}"

    @classmethod
    def read(cls, path: Path) -> "Header":
        try:
            values = json.loads(path.read_text())
            header = cls(**{**values, "train": Counts(**values["train"]), "val": Counts(**values["val"])})
        except FileNotFoundError:
            raise UsageError(f"{path.parent} is no folder of prepared tokens: it has no {path.name}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} is not the header of prepared tokens: {error}") from None
        if header.format != FORMAT or header.dtype not in DTYPES:
            raise UsageError(
                f"{path}: format {header.format} with ids as {header.dtype}; this version reads format {FORMAT}"
            )
        return header


@dataclass(frozen=True)
class TokenFiles:
    """A folder of prepared tokens.

    `train`, `val` and `val_lengths` open a new memory map at each use: that takes some 50 microseconds, and lets this
    object be pickled into data-loading processes, where a memory map would be copied whole.
    """

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> "TokenFiles":
        """Raises UsageError unless the header is ours and every file has the size it states."""
        files = cls(path, Header.read(path / "header.json"))
        width = np.dtype(files.header.dtype).itemsize
        expected = {
            "train.bin": files.header.train.tokens * width,
            "val.bin": files.header.val.tokens * width,
            "val.lengths.bin": files.header.val.tokens * np.dtype(LENGTH_DTYPE).itemsize,
        }
        for name, size in expected.items():
            found = (path / name).stat().st_size if (path / name).exists() else 0
            if found != size:
                raise UsageError(
                    f"{path / name} holds {found:,} bytes instead of {size:,}; delete {path} and prepare it again"
                )
        return files

    @property
    def train(self) -> np.memmap:
        """Token ids of the training split, [tokens]."""
        return np.memmap(self.path / "train.bin", dtype=self.header.dtype, mode="r")

    @property
    def val(self) -> np.memmap:
        """Token ids of the held-out split, [tokens]."""
        return np.memmap(self.path / "val.bin", dtype=self.header.dtype, mode="r")

    @property
    def val_lengths(self) -> np.memmap:
        """UTF-8 bytes of text that each id of `val` stands for, [tokens]."""
        return np.memmap(self.path / "val.lengths.bin", dtype=LENGTH_DTYPE, mode="r")
