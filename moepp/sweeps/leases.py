"""Leases: which of many workers, on any machines that share a file system, runs a trial.

A lease is a folder with one small file per claim, numbered from 1; the highest number is the present claim. To claim is
to create the next number. A hard link to a complete file does that for exactly one worker, so of several that find the
same dead holder one takes over. Numbers are never deleted, hence never granted twice.

The holder beats: it counts up a number inside its file. Who has not seen the file change for `stale` seconds, by its
own clock, may claim; the clocks of two machines are never compared. On the holder's own machine the kernel tells it
sooner, for the file is locked until the holder ends.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

STALE_SECONDS = 60.0  # longer than network file systems hide a change (NFS caches attributes for some 30 to 60 s)
LONGEST_STALE_SECONDS = 3600.0  # a claim that asks for more is damaged: nobody could ever take over
BEATS = 10  # within the stale time
LEASE_FILE = "MOEPP_LEASE"
NO_LEASE = 75  # exit code of a trial that ended itself because its worker no longer beats
FREE = b"free"


@dataclass(frozen=True)
class Holder:
    """Who made a claim: what the first line of its file says."""

    host: str
    pid: int
    machine: str  # this boot of this kernel; empty where a lock on the file cannot prove that the holder lives
    started: int  # Unix ms by the holder's clock, for people
    stale: float  # seconds without a beat after which the claim may be taken over

    @classmethod
    def of(cls, content: bytes) -> "Holder | None":
        """None for what no worker writes: a file that a broken disk has cut or scrambled."""
        try:
            holder = cls(**json.loads(content.split(b"\n", 1)[0]))
        except (ValueError, TypeError):
            return None
        proper = isinstance(holder.stale, int | float) and 0 < holder.stale <= LONGEST_STALE_SECONDS
        return holder if proper and isinstance(holder.machine, str) else None


class Lease:
    """A claim held by this process.

    Beats go to the file that was created, whatever the lease's newest number is by now: a holder that slept through a
    takeover cannot disturb its successor.
    """

    def __init__(self, path: Path, descriptor: int, head: int):
        self.path = path
        self.from_dead = False  # the holder before had not given it back
        self._descriptor: int | None = descriptor
        self._head, self._beats = head, 0
        self._guard = threading.Lock()

    @property
    def lost(self) -> bool:
        """Another worker has taken over, or somebody has removed the folder."""
        return _successor(self.path).exists() or not self.path.exists()

    def beat(self) -> None:
        self._beats += 1
        self._write(b"held")

    def release(self) -> None:
        """Lets the next worker claim at once. What cannot be written now is left to grow stale."""
        with suppress(OSError):
            self._write(FREE)
        with self._guard:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def _write(self, state: bytes) -> None:
        with self._guard:
            if self._descriptor is not None:
                os.pwrite(self._descriptor, state + b" %010d\n" % self._beats, self._head)
                os.fsync(self._descriptor)


class LeaseWatch:
    """What one worker has seen of a lease."""

    def __init__(self, folder: Path, stale: float = STALE_SECONDS):
        self.folder, self._stale = folder, stale
        self._seen: tuple[int, bytes] | None = None
        self._since = 0.0

    def claim(self) -> Lease | None:
        """The lease, if it was free or its holder is gone; None while another holds it or was quicker.

        A holder without a beat counts as gone after its stale time, which begins with this worker's first look.
        """
        number, content = newest(self.folder)
        if number and not self._is_over(number, content):
            return None
        lease = _create(self.folder, number + 1, self._stale)
        if lease:
            lease.from_dead = number > 0 and not is_free(content)
        return lease

    def _is_over(self, number: int, content: bytes) -> bool:
        holder, path = Holder.of(content), self.folder / str(number)
        if holder and (is_free(content) or died_here(holder, path)):
            return True
        if self._seen != (number, content):
            self._seen, self._since = (number, content), time.monotonic()
        silent = time.monotonic() - self._since
        if silent < (holder.stale if holder else self._stale):
            return False
        who = f"process {holder.pid} on {holder.host}" if holder else "an unreadable lease"
        print(f"warning: taking over {path} from {who}, silent for {silent:.0f} s", file=sys.stderr)
        return True


def newest(folder: Path) -> tuple[int, bytes]:
    """Number and content of the present claim; (0, b"") when there was never one."""
    try:
        number = max((int(name) for name in os.listdir(folder) if name.isdecimal() and name.isascii()), default=0)
        return number, (folder / str(number)).read_bytes() if number else b""
    except FileNotFoundError:
        return 0, b""


def is_free(content: bytes) -> bool:
    """The holder gave the lease back."""
    return content.partition(b"\n")[2].startswith(FREE + b" ")


def died_here(holder: Holder, path: Path) -> bool:
    """The holder ran on this machine and has ended: the kernel has dropped its lock on the claim's file."""
    if not holder.machine or holder.machine != _machine():
        return False
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


def _create(folder: Path, number: int, stale: float) -> Lease | None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{number}.{secrets.token_hex(4)}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    claimed = False
    try:
        holder = Holder(socket.gethostname(), os.getpid(), _lock(descriptor), int(time.time() * 1000), stale)
        head = json.dumps(vars(holder)).encode() + b"\n"
        os.pwrite(descriptor, head, 0)
        lease = Lease(folder / str(number), descriptor, len(head))
        lease.beat()  # complete and on the disk before anybody can see it
        claimed = _link(temporary, lease.path)
        return lease if claimed else None
    finally:
        temporary.unlink()
        if not claimed:
            os.close(descriptor)


def _link(temporary: Path, path: Path) -> bool:
    with suppress(FileExistsError):  # another worker's, or ours that a network file system asked for twice
        os.link(temporary, path)
    return temporary.stat().st_nlink == 2


def _lock(descriptor: int) -> str:
    """Locks the file for as long as this process lives; returns the machine on which that can be seen."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks
        return ""
    return _machine()


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _successor(path: Path) -> Path:
    return path.with_name(str(int(path.name) + 1))


class Heartbeat:
    """Beats for all leases that this process holds."""

    def __init__(self, stale: float = STALE_SECONDS):
        self._seconds = stale / BEATS
        self._leases: set[Lease] = set()
        self._guard = threading.Lock()

    def add(self, lease: Lease) -> None:
        with self._guard:
            self._leases.add(lease)

    def release(self, lease: Lease) -> None:
        with self._guard:
            self._leases.discard(lease)
        lease.release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Beats in a thread until the block ends."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self._seconds):
                with self._guard:
                    leases = list(self._leases)
                for lease in leases:
                    with suppress(OSError):  # the next beat tries again; meanwhile the trial guards itself
                        lease.beat()

        thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def exclusive(folder: Path, stale: float = STALE_SECONDS) -> Iterator[None]:
    """Waits for the lease and holds it, however long the block takes."""
    watch, heartbeat = LeaseWatch(folder, stale), Heartbeat(stale)
    while (lease := watch.claim()) is None:
        time.sleep(0.1)
    heartbeat.add(lease)
    try:
        with heartbeat.running():
            yield
    finally:
        heartbeat.release(lease)


def end_without_lease() -> float:
    """Ends this trial when its worker has stopped beating or lost the lease, before another worker may take over.

    The parent's death is no help when the worker is merely stopped, or cut off from the file system. Returns the
    lease's stale time in seconds; does nothing in a process that no worker started, and returns 0.
    """
    name = os.environ.pop(LEASE_FILE, None)
    if name is None:
        return 0.0
    path = Path(name)
    holder = Holder.of(path.read_bytes()) if path.exists() else None
    stale = holder.stale if holder else STALE_SECONDS
    threading.Thread(target=_guard, args=(path, stale), daemon=True, name="lease").start()
    return stale


def _guard(path: Path, stale: float) -> None:
    """Gives up after half the stale time: who takes over must have waited for all of it since the same last beat.

    One gap is left: a machine that is suspended as a whole wakes up with this thread asleep for stale / 20 seconds.
    """
    content, since = b"", time.monotonic()
    while True:
        with suppress(OSError):
            if (now := path.read_bytes()) != content:
                content, since = now, time.monotonic()
        if time.monotonic() - since > stale / 2 or _successor(path).exists():
            os._exit(NO_LEASE)
        time.sleep(stale / 20)
