"""Documents to token ids, a shard at a time, on all cores: what is whole is never done again.

<folder>/
  job.json               how all shards are tokenised, and below which hash documents are held out
  tokenizer.json         by what
  documents/             the text (documents.py)
  00000.val.bin          ids of the held-out documents of the first shard
  00000.val.lengths.bin  bytes of text that each of them stands for
  00000.val.json         how many, written last: the files are whole
  00000.train.bin        the same of all its other documents
  00000.train.json

What a shard holds depends on nothing but the documents, so neither the number of processes nor a kill changes a token.
"""

import errno
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Literal

from tqdm import tqdm

from moepp.data.documents import Documents
from moepp.data.tokenizer import Writer, Written, load_tokenizer
from moepp.errors import DiskFull, RunError
from moepp.process import cause_of_end, die_with_parent, start
from moepp.records import TOKENIZER, fsync, read_json, write_json

SplitName = Literal["train", "val"]
JOB, DOCUMENTS = "job.json", "documents"
IDS, LENGTHS = "bin", "lengths.bin"
POLL = 0.2  # seconds between looks at the processes


@dataclass(frozen=True)
class TokenJob:
    """How documents become ids: the id that ends each, how ids are written, and which documents are held out."""

    end: int
    dtype: str
    below: int


def tokenise(folder: Path, side: SplitName, progress: bool) -> Written:
    """The sums of all shards of a side; what is missing is made, by a process for each core. Raises RunError where one
    fails, and OSError where the disk is full.
    """
    shards = range(Documents.open(folder / DOCUMENTS).shards)
    missing = [shard for shard in shards if not _counts(folder, shard, side).is_file()]
    workers = min(len(missing), len(os.sched_getaffinity(0)))
    if workers > 1:
        _in_processes(folder, side, workers, progress)
    elif missing:
        tokeniser = Tokeniser(folder, side)
        for shard in missing:
            tokeniser.make(shard, progress)
    counts = [read_json(_counts(folder, shard, side)) for shard in shards]
    return Written(**{name: sum(of_one[name] for of_one in counts) for name in counts[0]})


def join_shards(folder: Path, side: SplitName, kind: str, target: Path) -> None:
    """All shards of a side, one after the other, in one file."""
    with open(target, "wb") as whole:
        for shard in range(Documents.open(folder / DOCUMENTS).shards):
            with open(_path(folder, shard, side, kind), "rb") as part:
                shutil.copyfileobj(part, whole, 2**22)
    fsync(target)


class Tokeniser:
    """Tokenises shards of one side."""

    def __init__(self, folder: Path, side: SplitName):
        self.folder, self.side, self.documents = folder, side, Documents.open(folder / DOCUMENTS)
        job = TokenJob(**read_json(folder / JOB))
        self.below, self.writer = job.below, Writer(load_tokenizer(folder / TOKENIZER), job.end, job.dtype)

    def make_unclaimed(self, claims: Path) -> None:
        """What is missing, as long as nobody has it. A claim is a folder, which only one can make."""
        for shard in range(self.documents.shards):
            try:
                (claims / str(shard)).mkdir()
            except FileExistsError:
                continue
            if not _counts(self.folder, shard, self.side).is_file():
                self.make(shard, progress=False)

    def make(self, shard: int, progress: bool) -> None:
        found = self.documents.texts(shard, self.below, held_out=self.side == "val")
        ids, lengths = (_path(self.folder, shard, self.side, kind) for kind in (IDS, LENGTHS))
        with tqdm(found, desc="tokenising", unit=" documents", disable=not progress) as texts:
            if self.side == "val":
                counts = self.writer.write_measured(texts, ids, lengths)
                fsync(lengths)
            else:
                counts = self.writer.write(texts, ids)
        fsync(ids)
        write_json(_counts(self.folder, shard, self.side), asdict(counts))


def _in_processes(folder: Path, side: SplitName, workers: int, progress: bool) -> None:
    claims, log = Path(tempfile.mkdtemp(prefix="claims-", dir=folder)), folder / "workers.log"
    command = [sys.executable, "-m", __name__, str(folder), side, str(claims)]
    processes = []
    try:
        for _ in range(workers):
            processes.append(start(command, log, {"TOKENIZERS_PARALLELISM": "false"}))
        _wait(processes, folder, side, log, progress)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(claims)


def _wait(processes: list[Popen], folder: Path, side: SplitName, log: Path, progress: bool) -> None:
    total = Documents.open(folder / DOCUMENTS).shards
    with tqdm(total=total, desc="tokenising", unit=" shards", disable=not progress) as bar:
        codes: list[int | None] = [None]
        while None in codes:
            time.sleep(POLL)
            codes = [process.poll() for process in processes]
            failed = next(filter(None, codes), None)
            if failed == DiskFull.exit_code:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if failed:
                raise RunError(f"a process that tokenises ended early: {cause_of_end(failed, log)}")
            bar.update(len(list(folder.glob(f"*.{side}.json"))) - bar.n)


def _path(folder: Path, shard: int, side: SplitName, kind: str) -> Path:
    return folder / f"{shard:05}.{side}.{kind}"


def _counts(folder: Path, shard: int, side: SplitName) -> Path:
    return _path(folder, shard, side, "json")


if __name__ == "__main__":
    die_with_parent()
    try:
        Tokeniser(Path(sys.argv[1]), sys.argv[2]).make_unclaimed(Path(sys.argv[3]))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(DiskFull.exit_code)  # the log lies on that disk, too
