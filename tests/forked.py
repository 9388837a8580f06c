"""What the package starts of itself, ranks and fork servers, as forks of the test's process: all is loaded there, and
a new Python takes six seconds to load it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from moepp.cli import main
from moepp.process import PARENT_PID

started: list[int] = []  # processes


class Fork:
    """What is used of subprocess.Popen."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        return self._ended(0)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def start(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    show: bool = False,
    stdin: int = subprocess.DEVNULL,
) -> Fork:
    """In place of `moepp.process.start`, for commands of moepp.cli; nothing is shown."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        started.append(pid)
        return Fork(pid)
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        if stdin != subprocess.DEVNULL:
            os.dup2(stdin, 0), os.close(stdin)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.excepthook = sys.__excepthook__  # torch wraps it in every group of processes that it joins
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update({**environment, PARENT_PID: str(parent)})
        code = main(command[command.index("moepp.cli") + 1 :])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)
