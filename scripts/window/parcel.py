"""What comes back from the GPU's machine: three files, each written anew and in one step after every stage."""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moepp.records import write_json, write_text
from window.summary import summary

LIMIT = 16 * 2**20 - 2**16  # bytes of window.tar.gz
LEFT_BEHIND = {"site", "tokens", "checkpoints", "leases", "__pycache__"}  # folders that can be made again, or are large


def publish(work: Path, out: Path, state: Mapping[str, Any]) -> None:
    """Writes summary.md, state.json and window.tar.gz into `out`.

    Where the archive would be too large, profiler traces are left out first and then the largest files.
    """
    sizes = dict(_files(work))
    left_out: list[str] = []
    while len(archive := _archive(work, sorted(sizes))) > LIMIT:
        left_out.append(max(sizes, key=lambda name: ("trace" in name, sizes[name])))
        del sizes[left_out[-1]]
    _replace(out / "window.tar.gz", archive)
    write_json(out / "state.json", state)
    write_text(out / "summary.md", summary(work, state, left_out))


def unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _files(work: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes."""
    for folder, folders, names in os.walk(work):
        folders[:] = [name for name in folders if name not in LEFT_BEHIND]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # a running stage has just removed it
                yield str(path.relative_to(work)), path.stat().st_size


def _archive(work: Path, names: list[str]) -> bytes:
    """Each file as it is at one moment: a stage may be writing it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for name in names:
            with suppress(FileNotFoundError):
                info, content = tar.gettarinfo(work / name, name), (work / name).read_bytes()
                info.type, info.size = tarfile.REGTYPE, len(content)  # also where another name is linked to it
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
