"""The run record: a directory that says everything about one run, with no tracker and no torch needed to read it.

    config.yaml       the resolved config                 budget.json      parameters, FLOPs, tokens
    provenance.json   commit, versions, hardware, data    metrics.jsonl    one JSON object per logged step
    tokenizer.json    what turns its text into ids        checkpoints/     what a second call resumes from
    tables/           per-layer, per-expert tables
    evaluation/       scores on downstream tasks, one file each
    mlflow.json       the MLflow run, once mirrored       log.txt          what a child process printed
    done              the run reached its last step and its final evaluation
    failed.json       why it stopped instead             crashes.json     every attempt that ended in neither
    pruned.json       why its sweep stopped it early: it was no longer among the best
    ranks/            what each process of a run over several devices printed
    lock              held by the process that trains here
    leases/           which worker of a sweep may start that process
    attempt.json      the checkpoint that its latest attempt began from, and how many workers have died since

A run is finished when `done` exists and its metrics are whole: an exit code or a tracker's status proves nothing.
It is enough by itself: it generates, is scored and reported on a machine that has neither its text nor its tokens.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from moepp.addresses import is_private, without_user
from moepp.errors import RunError
from moepp.locks import locked

TOKENIZER = "tokenizer.json"
VAL_WINDOWS = "tables/val_windows.csv"  # the loss of every window of the last validation
SECONDS_FOR_A_LOOK = 0.5  # `RunRecord.held` takes the lock for an instant, and must not turn away who comes to train
_here: set[Path] = set()  # records whose lock this process has
_guard = threading.Lock()


def write_text(path: Path, text: str) -> None:
    """Replaces `path` in one step: a reader or a crash sees the old file or the new one, never half of it. Addresses
    lose their users, and a text that holds anything secret is its owner's alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # other machines have the same process ids
    mode = 0o600 if is_private(text) else 0o666
    try:
        opener = partial(os.open, mode=mode)
        with open(temporary, "w", encoding="utf-8", opener=opener) as file:
            file.write(without_user(text))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems refuse it for folders
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """`target` appears whole. For files that are never written again: one copy on the disk where it can be linked."""
    try:
        os.link(source, target)
    except OSError:
        temporary = Path(target).with_name(f".{Path(target).name}.{secrets.token_hex(4)}")
        shutil.copy2(source, temporary)
        os.replace(temporary, target)


def digest_of(*files: Path) -> str:
    """16 hex digits of what the files hold, one after the other."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()[:16]


class UnreadableRecord(RunError):
    """A file that was cut off by a broken disk, edited by hand, or must not be read; the message names it."""


def read_json(path: Path) -> Any:
    """The file's value; None when the file does not exist. Raises UnreadableRecord."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (PermissionError, ValueError) as error:
        raise UnreadableRecord(f"{path} cannot be read ({error}); restore it, or remove it to do without") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    """What `config.save` wrote. By libyaml where PyYAML has it: a report reads a thousand of them."""
    import yaml

    try:
        return dict(yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {})
    except FileNotFoundError:
        return {}
    except (PermissionError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UnreadableRecord(f"{path} cannot be read ({' '.join(str(error).split())}); restore it") from None


def _complete(path: Path) -> bytes:
    """All lines but a last one that was cut off by a crash."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return b""
    except PermissionError as error:
        raise UnreadableRecord(f"{path} cannot be read ({error.strerror})") from None
    return text[: text.rfind(b"\n") + 1]


def _read_lines(path: Path, complete: bytes) -> list[dict[str, float]]:
    lines = []
    for line in complete.splitlines():
        try:
            lines.append(json.loads(line))
            lines[-1]["step"], lines[-1]["time"]
        except (ValueError, TypeError, KeyError):
            raise UnreadableRecord(f"{path} cannot be read; remove the line that begins with {line[:20]!r}") from None
    return lines


class RunRecord:
    """Reads and writes one run directory. One process writes; any number read."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @property
    def status(self) -> str:
        """`done`, `damaged` (done, but its metrics are not whole), `pruned`, `failed`, `started` (has metrics or
        checkpoints, may be running) or `waiting`.
        """
        if (self.path / "done").exists():
            return "damaged" if self.damage else "done"
        if (self.path / "pruned.json").exists():
            return "pruned"
        if (self.path / "failed.json").exists():
            return "failed"
        return "started" if (self.path / "metrics.jsonl").exists() else "waiting"

    @property
    def damage(self) -> str:
        """What is wrong with a finished run's metrics; empty where they are whole: lines that end, no hole among them,
        final ones too. A line that says something else is found when it is read.
        """
        path = self.path / "metrics.jsonl"
        try:
            text = path.read_bytes()
        except OSError as error:
            return f"{path} cannot be read ({error.strerror}); restore it, or remove {self.path} to train it again"
        if text.endswith(b"\n") and b"\0" not in text and b'"final/' in text:
            return ""
        return f"{path} is cut off or has holes; restore it, or remove {self.path} to train it again"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line: `step`, wall-clock `time` in milliseconds, and the metrics."""
        line = json.dumps({"step": step, "time": int(time.time() * 1000), **metrics})
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(line + "\n")

    def keep_metrics(self) -> None:
        """Brings to the disk what was logged, before anything is written that supposes it."""
        with suppress(FileNotFoundError):
            fsync(self.path / "metrics.jsonl")

    def metrics(self) -> list[dict[str, float]]:
        """All complete lines in order; a last line cut off by a crash is left out. Raises UnreadableRecord."""
        return MetricsTail(self).read()

    def rewind(self, step: int) -> None:
        """Forgets metrics after `step` and final ones: a resumed run repeats those steps and writes the same lines
        again.
        """
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [
                line
                for line in self.metrics()
                if 0 < step >= line["step"] and not any("final/" in key for key in line)  # 0: it begins anew
            ]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def final(self) -> dict[str, float]:
        """The `final/*` metrics without their prefix; empty while the run is unfinished."""
        path, found = self.path / "metrics.jsonl", {}
        final = [line for line in _complete(path).splitlines(keepends=True) if b'"final/' in line]  # one of hundreds
        for line in _read_lines(path, b"".join(final)):
            found.update({key.removeprefix("final/"): value for key, value in line.items() if key.startswith("final/")})
        return found

    def replace_final(self, metrics: Mapping[str, float]) -> None:
        """Adds `final/*` metrics to a finished run in one step; those of the same names are replaced, others stay."""
        lines = [{key: value for key, value in line.items() if key not in metrics} for line in self.metrics()]
        kept = [line for line in lines if line.keys() > {"step", "time"}]
        kept.append({"step": lines[-1]["step"], "time": int(time.time() * 1000), **metrics})
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def read(self, name: str) -> dict[str, Any]:
        """`config.yaml`, `budget.json` or `provenance.json` as a plain dict; empty when absent. Raises
        UnreadableRecord.
        """
        if name.endswith(".yaml"):
            return _read_yaml(self.path / name)
        return read_json(self.path / name) or {}

    def keep_tokenizer(self, tokens: Path) -> None:
        """Takes it from the folder of the run's tokens. Those that were prepared elsewhere may come without one."""
        source, target = tokens / TOKENIZER, self.path / TOKENIZER
        if source.is_file() and not target.exists():
            link_or_copy(source, target)

    def finish(self) -> None:
        self.keep_metrics()
        (self.path / "failed.json").unlink(missing_ok=True)
        write_text(self.path / "done", "")

    def prune(self, step: int, reason: str) -> None:
        write_json(self.path / "pruned.json", {"step": step, "reason": reason, "time": int(time.time() * 1000)})

    def fail(self, reason: str, log: Sequence[str] = ()) -> None:
        """`log` holds the last lines that a child process printed."""
        write_json(self.path / "failed.json", {"reason": reason, "time": int(time.time() * 1000), "log": list(log)})

    @property
    def crashes(self) -> list[dict[str, Any]]:
        """`reason` and `time` of every attempt that ended without `done` and was not asked to stop."""
        return read_json(self.path / "crashes.json") or []

    def crash(self, reason: str) -> None:
        write_json(self.path / "crashes.json", [*self.crashes, {"reason": reason, "time": int(time.time() * 1000)}])

    def forgive(self) -> None:
        """Forgets failure and crashes, so that the run counts as unfinished and nothing else is lost."""
        for name in ("failed.json", "crashes.json", "attempt.json"):
            (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process from working in this directory; freed with the process, however it dies.

        Raises RunError with the holder's process id. A POSIX lock: forked data-loading workers that outlive a killed
        run do not hold it. On a file system without locks nobody is kept out.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path.resolve()
        with open(path / "lock", "a+") as file:
            self._take(file, path)
            try:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield
            finally:
                _here.discard(path)

    def _take(self, file: Any, path: Path) -> None:
        deadline = time.monotonic() + SECONDS_FOR_A_LOOK
        while True:
            try:
                with _guard:
                    locked(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _here.add(path)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read() or "?"
                    raise RunError(f"{self.path} is in use by process {holder}; end it or wait for it") from None
            time.sleep(0.02)

    @property
    def held(self) -> bool | None:
        """Whether a process works in this directory; None where the file system has no locks to tell it."""
        with _guard:  # to close any descriptor of a file frees this process's own lock on it
            if self.path.resolve() in _here:
                return True
            try:
                with open(self.path / "lock") as file:
                    return False if locked(fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB) else None
            except FileNotFoundError:
                return False
            except (BlockingIOError, PermissionError):
                return True


class MetricsTail:
    """Follows metrics.jsonl: each `read` returns the lines that are new since the one before."""

    def __init__(self, record: RunRecord):
        self.path = record.path / "metrics.jsonl"
        self._inode = self._offset = 0

    def read(self) -> list[dict[str, float]]:
        """New complete lines in order. A file replaced by `rewind` is read again from its beginning. Raises
        UnreadableRecord.
        """
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self._inode, self._offset = stat.st_ino, 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        except PermissionError as error:
            raise UnreadableRecord(f"{self.path} cannot be read ({error.strerror})") from None
        complete = new[: new.rfind(b"\n") + 1]
        lines = _read_lines(self.path, complete)
        self._offset += len(complete)
        return lines
