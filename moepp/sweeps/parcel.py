"""Finished trials without their weights, in one archive that is small enough to be committed: a long sweep goes on
from it on another machine, and reports are rebuilt from it.
"""

import io
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer
from moepp.records import RunRecord, digest_of, link_or_copy
from moepp.sweeps.plan import read_plan

ENDED = ("done", "pruned")
OF_THE_SWEEP = ("sweep.json", "timing.json", "tasks.json", "probe.json")
LEFT_BEHIND = {  # weights, and what only this machine can use
    "checkpoints", "leases", "lock", "log.txt", "ranks", "attempt.json", "crashes.json", "mlflow.json", "__pycache__",
}  # fmt: skip


def pack(directory: Path, archive: Path) -> int:
    """Writes the records of all trials that have ended, and returns how many. The same records give the same bytes; a
    file that several of them hold, such as the tokenizer, is stored once. Raises UsageError where none has ended.
    """
    plan = read_plan(directory) or {"trials": []}
    ended = [path for path in sorted({trial["path"] for trial in plan["trials"]}) if _status(directory / path) in ENDED]
    if not ended:
        raise UsageError(f"{directory} holds no finished trial to pack")
    files = [directory / name for name in OF_THE_SWEEP if (directory / name).exists()]
    files += [file for path in ended for file in _files(directory / path)]
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f".{archive.name}")
    stored: dict[str, str] = {}
    with tarfile.open(temporary, "w:xz", preset=9) as tar:
        for file in files:
            name, digest = str(file.relative_to(directory)), digest_of(file)
            first = stored.setdefault(digest, name) if file.stat().st_size else name
            tar.addfile(*_member(file, name, first))
    os.replace(temporary, archive)
    return len(ended)


def unpack(archive: Path, directory: Path) -> tuple[int, int]:
    """Puts the packed records where the sweep finds them; what is there already stays. Returns how many are new, and
    how many were packed. Raises UsageError without an archive.
    """
    if not archive.is_file():
        raise UsageError(f"there is no archive {archive}; `sweep pack` writes it where the trials are")
    refuse_pointer(archive)
    directory.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpack-", dir=directory))
    try:
        _extract(archive, scratch)
        records = sorted(path.parent for name in ("done", "pruned.json") for path in scratch.rglob(name))
        if not records:
            raise UsageError(f"{archive} holds no finished trial; `sweep pack` writes one that does")
        new = [record for record in records if _move(record, directory / record.relative_to(scratch))]
        for name in OF_THE_SWEEP:
            if (scratch / name).exists() and not (directory / name).exists():
                link_or_copy(scratch / name, directory / name)
        return len(new), len(records)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(archive: Path, scratch: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(":")
        raise UsageError(f"{archive} is no whole archive of `sweep pack` ({said}); pack or copy it again") from None


def _status(path: Path) -> str:
    return RunRecord(path).status


def _files(record: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(record):
        folders[:] = sorted(set(folders) - LEFT_BEHIND)
        yield from (Path(folder, name) for name in sorted(set(names) - LEFT_BEHIND) if not name.startswith("."))


def _member(file: Path, name: str, first: str) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A file, or a link to the `first` of the same content, without owner and time."""
    member, content = tarfile.TarInfo(name), b"" if first != name else file.read_bytes()
    member.size = len(content)
    if first != name:
        member.type, member.linkname = tarfile.LNKTYPE, first
    return member, io.BytesIO(content)


def _move(record: Path, target: Path) -> bool:
    """Files that are linked to each other in the archive come apart: a record may be written to."""
    if target.exists():
        return False
    for file in (path for path in record.rglob("*") if path.is_file() and path.stat().st_nlink > 1):
        copy = file.with_name(f".{file.name}")
        shutil.copy2(file, copy)
        os.replace(copy, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    record.rename(target)
    return True
