"""The MLflow mirror of one run, kept by a process of its own: inside the process that trains, MLflow's imports and
requests would take the interpreter's lock from it for seconds.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from moepp.config import CONF
from moepp.records import RunRecord
from moepp.training.tracking import SECONDS_TO_END, Mirror, TrackingConfig, follow

NICE = 10  # training comes first where cores are few
SECONDS_TO_LEAVE = 10.0  # beyond those the last pass may take


@contextmanager
def followed(directory: Path, tracking: TrackingConfig, runs: Path | str) -> Iterator[None]:
    """Mirrors the record in `directory` until the block ends, and a last time then."""
    about = {"record": str(directory), "tracking": asdict(tracking), "runs": str(runs)}
    path = os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "moepp.training.follower"],
        stdin=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    process.stdin.write(json.dumps(about) + "\n")
    process.stdin.flush()
    try:
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(SECONDS_TO_END + SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGTERM):  # the end of the run ends this process too, after the last pass
        signal.signal(number, signal.SIG_IGN)
    about = json.loads(sys.stdin.readline())
    with follow(Mirror(RunRecord(about["record"]), TrackingConfig(**about["tracking"]), about["runs"])):
        sys.stdin.read()  # ends with the process that trains, whichever way that ends


if __name__ == "__main__":
    main()
