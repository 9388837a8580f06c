"""Trials as forks of a process that has loaded what they need: to load it takes seconds, a fork milliseconds.

Such a trial ends like any child of the runner's: when it is asked to, when it is killed, and when the runner dies, for
it is tied to the fork server and that to the runner. Only on Linux: the libraries of macOS do not work in a fork of a
process that has used them. Nor does CUDA, which loading leaves alone; where something loaded it after all, a fork
becomes a new Python before it is the trial.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from moepp.process import STOP_SIGNALS, die_with, die_with_parent, lower_session, start
from moepp.sweeps.allocations import Allocation
from moepp.sweeps.trial import TRIAL_COMMAND, load_libraries

NOT_FOR_THE_SERVER = (signal.SIGINT, *STOP_SIGNALS)
COMMAND = (sys.executable, "-m", "moepp.cli", "fork-server")
# What a process opens to compute on a GPU (CUDA, CUDA on a Jetson, ROCm, WSL), and keeps open. Merely to count GPUs,
# as torch does through NVML, needs none of NVIDIA's, and forks are none the worse for it.
COMPUTE_NODES = ("/dev/nvidia-uvm", "/dev/nvhost*", "/dev/kfd", "/dev/dxg")


def can_fork() -> bool:
    """Whether trials may come from a fork server on this machine."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not Linux, or one before 5.3
        return False
    return True


@dataclass(frozen=True)
class _Fork:
    """What the runner asks for: a fork, of this number, that trains a config."""

    number: int
    config: Path
    log: Path
    environment: dict[str, str]


@dataclass(frozen=True)
class _Signal:
    number: int  # of the fork
    signal: int


class ForkServer:
    """The runner's side. `allocation` is for the loading: trials bring theirs."""

    def __init__(self, allocation: Allocation) -> None:
        # Threads do not survive a fork. Trials have no use for this pool of them: their products are torch's.
        self._environment = {**allocation, "OPENBLAS_NUM_THREADS": "1"}
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None
        self._trials: dict[int, ForkedTrial] = {}  # that run, by their numbers
        self._forks = 0

    def start(self, config: Path, log: Path, environment: Mapping[str, str]) -> "ForkedTrial":
        """The trial of a frozen config, which begins when the server has loaded and prints into `log`.

        The server is started with the first, into whose log it prints: an import that fails, say.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._pipe, theirs = Pipe()
            with theirs:
                self._process = start(COMMAND, log, self._environment, stdin=theirs.fileno())
        log.touch()  # also where the server dies before it has forked
        self._forks += 1
        trial = self._trials[self._forks] = ForkedTrial(self, self._forks)
        self.send(_Fork(self._forks, config, log, {**environment}))
        return trial

    def send(self, message: _Fork | _Signal) -> None:
        with suppress(OSError):  # it is dead, as `listen` will find
            self._pipe.send(message)

    def listen(self, seconds: float | None = 0.0) -> None:
        """Takes what the server says about trials that have ended, waiting so long (None: for ever) for a word."""
        try:
            while self._trials and self._pipe.poll(seconds):
                number, code = self._pipe.recv()
                self._trials.pop(number).returncode = code
                seconds = 0.0
        except (EOFError, OSError):  # it is dead, and every trial with it
            code = self._process.wait()
            while self._trials:
                self._trials.popitem()[1].returncode = code

    def close(self) -> None:
        """Ends the server, and the trials that still run there."""
        if self._process is not None:
            self._process.kill()
            self.listen(None)
            self._process.wait()
            self._pipe.close()
            self._process = None


@dataclass
class ForkedTrial:
    """What is used here of subprocess.Popen, for a child of the fork server's."""

    server: ForkServer = field(repr=False)
    number: int
    returncode: int | None = None

    def poll(self) -> int | None:
        self.server.listen()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"trial {self.number}", timeout or 0.0)
            self.server.listen(min(left, 1.0))
        return self.returncode

    def terminate(self) -> None:
        self.server.send(_Signal(self.number, signal.SIGTERM))

    def kill(self) -> None:
        self.server.send(_Signal(self.number, signal.SIGKILL))


def serve_forks() -> Path | None:
    """Makes this process, whose standard input is a pipe from the runner, the fork server.

    Returns in every fork, with the config that it is to train, and None here once the runner has gone.
    """
    die_with_parent()
    # They may be sent to all processes of a job: the trials shall save, for which they need this one. A signal that
    # reaches a fork before it is a trial waits for that.
    signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_THE_SERVER)
    runner = Connection(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    load_libraries()
    anew = _holds_gpu()
    if anew:
        print("warning: what trials load has initialised a GPU, which no fork can use; they load anew", file=sys.stderr)
    config = _fork_on_request(runner)
    if config and anew:
        os.execv(TRIAL_COMMAND[0], [*TRIAL_COMMAND, str(config)])
    return config


def _holds_gpu() -> bool:
    """Whether this process has initialised CUDA or its like, by whichever library."""
    links = [entry.path for entry in os.scandir("/proc/self/fd")]
    return any(fnmatch(os.path.realpath(link), node) for link in links for node in COMPUTE_NODES)


def _fork_on_request(runner: Connection) -> Path | None:
    server, living = os.getpid(), {}  # pid and number of a fork, by a descriptor: that stays the fork's own
    while True:
        for ready in wait([runner, *living]):
            if ready is not runner:
                pid, number = living.pop(ready)
                os.close(ready)
                runner.send((number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                continue
            try:
                message = runner.recv()
            except EOFError:
                return None
            if isinstance(message, _Signal):
                for descriptor, (_, number) in living.items():
                    if number == message.number:
                        signal.pidfd_send_signal(descriptor, message.signal)
                continue
            if not (pid := os.fork()):
                runner.close()
                for descriptor in living:
                    os.close(descriptor)
                _become_trial(message, server)
                return message.config
            living[os.pidfd_open(pid)] = pid, message.number


def _become_trial(fork: _Fork, server: int) -> None:
    """Gives this process what `process.start` and a new Python would have given it."""
    os.setsid()
    lower_session()
    die_with(server)
    with open(fork.log, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(fork.environment)
    sys.argv[1:] = ["trial", str(fork.config)]  # what provenance shows
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_THE_SERVER)
