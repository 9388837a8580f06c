"""The documents of a corpus on disk: read once from where they come, and as often as needed from here.

<folder>/
  00000.arrow  text and hash of the first documents, SHARD_BYTES of text and less than a batch more; 00001.arrow, ...
  read.json    how many there are: all of them have been read
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from moepp import register
from moepp.data.corpora import Corpus
from moepp.errors import UsageError
from moepp.records import fsync, read_json, write_json

SCHEMA = pa.schema({"text": pa.large_string(), "hash": pa.int64()})
SHARD_BYTES = 2**26  # of text: what one process tokenises before it is kept
BATCH_BYTES = 2**22  # of text, and a document more: held in memory
MOST_LOST = 0.5  # share of the documents that may be left out
READ = "read.json"


@dataclass(frozen=True)
class Documents:
    """Those that are not blank, in their corpus's order; and how many bad ones were left out."""

    folder: Path
    shards: int
    count: int
    bad_rows: int
    lowest: int  # of the hashes
    highest: int

    @classmethod
    def open(cls, folder: Path) -> "Documents":
        return cls(folder, **read_json(folder / READ))

    def held_out_below(self, val_share: float) -> int:
        """Documents with lower hashes are held out: the lowest `val_share` of all hashes there are.

        The side depends on a document's content alone, so equal documents share it and a growing corpus never moves
        one. Where that would leave a side empty, the lowest hash is held out, or the highest kept. Raises UsageError
        for fewer than two different documents.
        """
        if self.lowest == self.highest:
            raise UsageError(
                f"the corpus has {self.count} document(s), all alike, and none can be held out; "
                "give more files, or split them into documents with data.separator"
            )
        return min(max(int(val_share * 2**63), self.lowest + 1), self.highest)

    def texts(self, shard: int, below: int, held_out: bool) -> Iterator[str]:
        """Those of a shard with hashes `below`, or all others."""
        with pa.memory_map(str(_path(self.folder, shard))) as file:
            batches = pa.ipc.open_file(file)
            for number in range(batches.num_record_batches):
                batch = batches.get_batch(number)
                chosen = (batch["hash"].to_numpy() < below) == held_out
                yield from batch["text"].filter(pa.array(chosen)).to_pylist()

    def all_texts(self, below: int, held_out: bool) -> Iterator[str]:
        """The same of all shards."""
        return (text for shard in range(self.shards) for text in self.texts(shard, below, held_out))


def store(corpus: Corpus, folder: Path, progress: bool) -> Documents:
    """The documents of a corpus, read into the folder unless they have been. Raises UsageError where most are bad."""
    if not (folder / READ).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(_only_texts(corpus), desc="reading", unit=" documents", disable=not progress) as texts:
            extents = _write_shards(_batches(texts, corpus.config.split_seed), folder)
        count, bad = sum(extent.count for extent in extents), corpus.bad.count
        refuse_most_lost("cannot be read as text", bad, bad + count)
        if not count:
            raise UsageError(f"data.corpus={corpus.config.corpus} holds no text")
        lowest, highest = min(extent.lowest for extent in extents), max(extent.highest for extent in extents)
        counted = {"shards": len(extents), "count": count, "bad_rows": bad}
        write_json(folder / READ, {**counted, "lowest": lowest, "highest": highest})
    return Documents.open(folder)


def _only_texts(corpus: Corpus) -> Iterator[str]:
    """Raises UsageError for a corpus, somebody's own, that yields anything else."""
    named, found = register.corpus.described(corpus.config.corpus), corpus.texts()
    if not isinstance(found, Iterable):
        raise UsageError(f"{named} returned {type(found).__name__}; it must yield texts")
    for number, text in enumerate(found, start=1):
        if not isinstance(text, str):
            raise UsageError(f"{named} yielded {type(text).__name__} as document {number}; it must yield texts, str")
        if _is_whole(text):
            yield text
        else:
            corpus.bad.add(f"{named} document {number}", "holds half a character, a surrogate by itself")


def _is_whole(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


class Extent(NamedTuple):
    """Of a shard's documents: how many there are, and their lowest and highest hash."""

    count: int
    lowest: int
    highest: int


class Batch(NamedTuple):
    texts: list[str]
    hashes: list[int]
    size: int  # UTF-8 bytes of text


def _write_shards(batches: Iterator[Batch], folder: Path) -> list[Extent]:
    return [
        _write_shard(itertools.chain([first], batches), _path(folder, number)) for number, first in enumerate(batches)
    ]


def _write_shard(batches: Iterable[Batch], path: Path) -> Extent:
    """Takes as many batches as belong into it."""
    size, hashes = 0, []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as table:
        for batch in batches:
            table.write_batch(pa.record_batch([batch.texts, batch.hashes], schema=SCHEMA))
            hashes += batch.hashes
            size += batch.size
            if size >= SHARD_BYTES:
                break
    fsync(path)
    return Extent(len(hashes), min(hashes), max(hashes))


def _batches(texts: Iterable[str], split_seed: int) -> Iterator[Batch]:
    found, hashes, size = [], [], 0
    for text in texts:
        if not text or text.isspace():
            continue
        content = text.encode()
        found.append(text)
        hashes.append(content_hash(content, split_seed))
        size += len(content)
        if size >= BATCH_BYTES:
            yield Batch(found, hashes, size)
            found, hashes, size = [], [], 0
    if found:
        yield Batch(found, hashes, size)


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.arrow"


def content_hash(content: bytes, seed: int) -> int:
    """63 bits (Arrow's integers are signed) of a hash of a text in UTF-8, keyed by `seed`."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()) >> 1


def refuse_most_lost(how: str, lost: int, documents: int) -> None:
    """Raises UsageError for a corpus in which most documents vanish."""
    if lost > MOST_LOST * documents:
        raise UsageError(
            f"{lost:,} of {documents:,} documents {how}, more than the {MOST_LOST:.0%} that may be left out; check"
            " data.path, data.text_column, data.separator and data.tokenizer"
        )
