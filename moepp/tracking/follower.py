"""The MLflow mirror of one run or of a sweep, kept by a process of its own: inside the process that trains, MLflow's
imports and requests would take the interpreter's lock from it for seconds. It outlives whoever started it, to say how
that ended.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from moepp.addresses import without_user
from moepp.process import STOP_SIGNALS, lower_session, python_path
from moepp.records import RunRecord
from moepp.terminal import working
from moepp.tracking.mirror import SECONDS_TO_END, FolderMirror, Mirror, follow
from moepp.tracking.mlflow_store import store_uri
from moepp.tracking.settings import TrackingConfig, mirror_config

NICE = 10  # training comes first where cores are few
PATIENCE = 600.0  # seconds that a last pass may take once nobody waits for it any more
SECONDS_TO_DIE = 10.0  # for the trials of a runner that was killed
END = "end"


class Follower:
    """The process, as the one that started it sees it: it mirrors the record in `directory`, or with `folder` all
    records below it, until it is told to end or the starter dies, and a last time then.
    """

    def __init__(self, directory: Path, tracking: TrackingConfig, runs: Path | str, folder: bool = False):
        self.uri = without_user(store_uri(tracking, runs))
        about = {"directory": str(directory), "tracking": asdict(tracking), "runs": str(runs), "folder": folder}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moepp.tracking.follower"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": python_path()}, start_new_session=True,
        )  # fmt: skip
        self._say(json.dumps(about))

    @property
    def gone(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        """Waits for the last pass, for a time; one that takes longer is made without being waited for."""
        self._say(END)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            with working(f"sending the last of it to {self.uri}"):
                self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            print(f"{self.uri} is slow; the last of this run is still being sent to it", file=sys.stderr)

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it is gone
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


@contextmanager
def followed(directory: Path, tracking: TrackingConfig, runs: Path | str) -> Iterator[None]:
    """Mirrors the record in `directory` until the block ends, and a last time then."""
    follower = Follower(directory, tracking, runs)
    try:
        yield
    finally:
        follower.end()


def main() -> None:
    _yield_cores()
    for number in (signal.SIGINT, *STOP_SIGNALS):  # the end of the run ends this process too, after the last pass
        signal.signal(number, signal.SIG_IGN)
    about = json.loads(sys.stdin.readline())
    directory, tracking, runs = Path(about["directory"]), mirror_config(about["tracking"]), about["runs"]
    of_folder = about["folder"]
    mirror = FolderMirror(directory, tracking, runs) if of_folder else Mirror(RunRecord(directory), tracking, runs)
    with follow(mirror, PATIENCE):
        told = sys.stdin.read()
        let_go_of_errors(SECONDS_TO_END)
        if not told:  # killed without a word, and its children are about to be
            _outlast(mirror)


def _yield_cores() -> None:
    os.nice(NICE)
    lower_session()


def let_go_of_errors(seconds: float) -> None:
    """Once nobody waits for this process, none waits for the end of a pipe that it holds: `train 2>&1 | tee log`."""

    def let_go() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    timer = threading.Timer(seconds, let_go)
    timer.daemon = True
    timer.start()


def _outlast(mirror: Mirror | FolderMirror) -> None:
    """Waits until nobody holds what is mirrored. Other workers of a sweep may well go on: they are not waited for."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while mirror.held and time.monotonic() < deadline:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
