"""A stage: a command line in a process group of its own, with its own time, that can take nothing else down."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.errors import Interrupted

GRACE_SECONDS = 8.0  # from SIGTERM to SIGKILL
TICK_SECONDS = 20.0  # between two looks at what a running stage has finished
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Stage:
    name: str
    share: float  # of the time that is left, against the shares of the stages to come
    command: tuple[str, ...]  # {minutes}: what the command itself has, a little less than its limit
    folder: Path  # in which it runs
    attempts: int = 1  # of a command that failed and, called again, does what is missing


def run_stage(
    stage: Stage, seconds: float, log: Path, environment: Mapping[str, str], meanwhile: Callable[[], None]
) -> dict[str, Any]:
    """Runs a stage for at most so many seconds and says how it ended. Calls `meanwhile` now and then.

    `outcome` is ok, failed, unfinished (it stopped by itself and a second call continues) or timed out.
    """
    began = time.monotonic()
    minutes = max(0.85 * seconds, seconds - 20) / 60  # the rest is for its start and its end
    words = [word.replace("{minutes}", f"{minutes:.3f}") for word in stage.command]
    with open(log, "ab", buffering=0) as output:
        output.write(b"\n" if output.tell() else b"")  # what an earlier call wrote may end within a line
        process = subprocess.Popen(
            words, cwd=stage.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    try:
        ended = _wait(process, began + seconds, meanwhile)
    finally:
        _end_group(process)
    code, took = process.returncode, round(time.monotonic() - began, 1)
    outcome = {0: "ok", Interrupted.exit_code: "unfinished"}.get(code, "failed") if ended else "timed out"
    why = "" if outcome == "ok" else _why(code, log)
    return {"outcome": outcome, "code": code, "limit": round(seconds, 1), "seconds": took, "why": why}


def _die_with_parent() -> None:
    """A command that is killed at its own limit must not leave a stage on the GPU, beside the next call's."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(process: subprocess.Popen, deadline: float, meanwhile: Callable[[], None]) -> bool:
    """Whether the process has ended by itself."""
    while (left := deadline - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(left, TICK_SECONDS))
            return True
        meanwhile()
    return False


def _end_group(process: subprocess.Popen) -> None:
    """Asks the whole group to end, then kills what is left of it; what the kernel cannot end is left behind."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 3.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _why(code: int | None, log: Path) -> str:
    """The signal that has ended it, and what it printed last."""
    lines = [line.strip() for line in log.read_text(errors="replace")[-4000:].splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "nothing printed"
    return f"{signal.Signals(-code).name}; {last}" if code and code < 0 else last
