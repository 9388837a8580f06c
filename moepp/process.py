"""Child processes (workers, trials of a sweep, ranks of a run): given what is theirs, never outliving their parent."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moepp.errors import RunError, reason
from moepp.shipped import PACKAGE

# A kill, and what Slurm sends to every process of a job before it takes the machine back (--signal=USR1 or USR2).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
    STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)  # the terminal was closed, or the connection to it
PARENT_PID = "MOEPP_PARENT_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# How torchrun and srun tell a process that it is a rank. A child is no rank of what started its parent.
RANK_VARIABLES = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS")


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Within the block Ctrl-C and stop signals set the event instead of ending this process: it has others to end."""
    stop = threading.Event()

    def request(*_: object) -> None:
        stop.set()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def python_path() -> str:
    """PYTHONPATH with which moepp is importable even when the command was given from another folder."""
    return os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))


def start(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    show: bool = False,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """Starts a process that prints into `log`; with `show` its standard output goes to this process's instead.

    It gets a session of its own: Ctrl-C reaches this process alone, which then asks the other to stop. Call this in
    the main thread, for Linux takes the end of the starting thread for the parent's death. Raises RunError where the
    system has no room for another process.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    child = {**inherited, **environment, "PYTHONPATH": python_path(), PARENT_PID: str(os.getpid())}
    with open(log, "ab") as output:
        try:
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=None if show else output,
                stderr=output,
                env=child,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"cannot start {command[0]}: {reason(error)}") from error


@contextmanager
def no_collections() -> Iterator[None]:
    """For large imports: what they make stays, and to look for garbage in it again and again takes a quarter of their
    time. Later collections pass over it, too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def lower_session() -> None:
    """Gives this process's session the process's own priority: where Linux shares the cores among sessions first
    (sched_autogroup_enabled), nice is heard only within one, and what `start` starts has its own. What was asked to
    leave the cores to others would otherwise take as many as they.
    """
    with suppress(OSError):  # no Linux, one that does not, or a higher priority than it grants
        Path("/proc/self/autogroup").write_text(str(os.nice(0)))


def die_with_parent() -> None:
    """Ties this process to the one that started it: when that dies, by SIGKILL too, the kernel kills this one. And its
    session is as nice as that was.

    Does nothing in a process that `start` did not start, or away from Linux.
    """
    # Taken out of the environment, for this process's own children have it as their parent.
    parent = os.environ.pop(PARENT_PID, None)
    if parent is not None:
        lower_session()
        die_with(int(parent))


def die_with(parent: int) -> None:
    """As `die_with_parent`, for a process that was started otherwise and told who its parent is."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def cause_of_end(returncode: int, log: Path) -> str:
    """One line on a process that ended without saying why: its signal or exit code, and the last line it printed."""
    last = (last_lines(log, 1) or ["nothing printed"])[0]
    if returncode < 0:  # it could not say why: what it printed last may have nothing to do with it
        return f"killed by {signal.Signals(-returncode).name}; its last output: {last}"
    return f"exit code {returncode}; {last}"


def last_lines(log: Path, count: int = 10) -> list[str]:
    """The last lines of a log that are not empty."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return [line.strip() for line in lines if line.strip()][-count:]
