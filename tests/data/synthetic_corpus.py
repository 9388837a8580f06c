"""Small corpora and token folders for the data tests."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np

from moepp.data.token_files import FORMAT, Counts, Header

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "expert",
    "router",
    "token",
    "copy",
    "zero",
    "naïve",
    "東京",
    "🙂",
    "café",
    "load",
]


def texts(count: int) -> list[str]:
    """`count` different documents of some 60 words, with characters of one to four UTF-8 bytes."""
    generator = random.Random(0)
    return [f"document {i}: " + " ".join(generator.choices(WORDS, k=60)) + ".\n" for i in range(count)]


def write_texts(folder: Path, count: int = 20) -> Path:
    """A folder with one .txt file per document."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts(count)):
        (folder / f"{i:03}.txt").write_text(text)
    return folder


def write_token_folder(folder: Path, train: int, val: int) -> Path:
    """Prepared tokens: ids count up from 0 in train and from 10,000 in val, and val id i stands for i % 7 bytes."""
    folder.mkdir(parents=True)
    np.arange(train, dtype="<u2").tofile(folder / "train.bin")
    np.arange(10_000, 10_000 + val, dtype="<u2").tofile(folder / "val.bin")
    (np.arange(val) % 7).astype("<u4").tofile(folder / "val.lengths.bin")
    header = Header(
        FORMAT, "0123456789abcdef", "<u2", 20_000, 0, "counting", Counts(1, train, train), Counts(1, val, val)
    )
    (folder / "header.json").write_text(json.dumps(asdict(header)))
    return folder
