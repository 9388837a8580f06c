"""What the tracker costs a training run: `python scripts/logging_overhead.py`.

Trains the same laptop-scale run with the run record alone, with MLflow on SQLite and with an MLflow server on this
machine, interleaved, and prints medians over rounds. Each run is a process of its own with one thread; seeds differ
between rounds and are shared within one. On a noisy machine these ratios cannot show a percent, so it also prints what
training itself spends on its record (writing it is all that happens inside the process), and the CPU time of the whole
command, the mirror's own process included.
"""

import argparse
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from moepp.config import compose
from moepp.records import RunRecord
from moepp.training.record_logger import RecordLogger
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

TRACKERS = ("jsonl", "sqlite", "server")
SECONDS_TO_START = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--log-every", type=int, default=20, help="steps; 20 is the laptop scale's")
    options = parser.parse_args()
    rounds: list[dict[str, dict[str, float]]] = []
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder) / "served") as uri:
        shape = ["size=tiny", f"trainer.steps={options.steps}", f"trainer.log_every={options.log_every}"]
        shape += ["trainer.threads=1", "trainer.progress=false", "trainer.expert_timing=false"]
        subprocess.run([sys.executable, "run.py", "prepare", "size=tiny"], check=True, stdout=subprocess.DEVNULL)
        for seed in range(options.rounds):
            order = TRACKERS[seed % 3 :] + TRACKERS[: seed % 3]
            runs = {tracker: Path(folder) / f"{tracker}-{seed}" for tracker in order}
            rounds.append({name: _run([*shape, f"seed={seed}"], name, runs[name], uri) for name in order})
            shares.append(_share_of_record([*shape, f"seed={seed}"], Path(folder) / "inside"))
    for name in TRACKERS:
        cells = []
        for metric in ("step_time_ms", "train_seconds", "process_seconds", "cpu_seconds"):
            value = statistics.median(found[name][metric] for found in rounds)
            ratios = [found[name][metric] / found["jsonl"][metric] - 1 for found in rounds]
            cells.append(
                f"{metric} {value:8.2f} ({statistics.median(ratios):+6.2%}, {min(ratios):+.1%} to {max(ratios):+.1%})"
            )
        print(f"{name:<7} " + "  ".join(cells))
    share, least, most = (f"{of(shares):.2%}" for of in (statistics.median, min, max))
    print(f"the record itself takes {share} of the training time ({least} to {most})")


def _run(shape: list[str], tracker: str, runs: Path, uri: str) -> dict[str, float]:
    where = {"jsonl": ["tracking=jsonl"], "sqlite": [], "server": [f"tracking.uri={uri}"]}[tracker]
    began, before = time.perf_counter(), _cpu_seconds()
    command = [sys.executable, "run.py", "train", *shape, *where, f"runs={runs}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    (record,) = (RunRecord(path) for path in (runs / "train").iterdir())
    final = record.final()
    taken = {"process_seconds": seconds, "cpu_seconds": _cpu_seconds() - before}
    return {name: final[name] for name in ("step_time_ms", "train_seconds")} | taken


def _cpu_seconds() -> float:
    """Of all that this process has started and seen the end of, and of what that has started."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _share_of_record(shape: list[str], runs: Path) -> float:
    """Of the training time of a run in this process, what its logger takes."""
    spent, log_metrics = 0.0, RecordLogger.log_metrics

    def timed(logger: RecordLogger, metrics: Mapping[str, float], step: int) -> None:
        nonlocal spent
        began = time.perf_counter()
        log_metrics(logger, metrics, step)
        spent += time.perf_counter() - began

    config = freeze(compose(RunConfig, [*shape, "tracking=jsonl", f"runs={runs}"]))
    with mock.patch.object(RecordLogger, "log_metrics", timed):
        record = train(config, run_directory(config))
    return spent / record.final()["train_seconds"]


@contextmanager
def _server(runs: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "run.py", "ui", "--port", str(port), f"runs={runs}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{uri}/health")
        yield uri
    finally:
        server.terminate()
        server.wait()


def _wait(page: str) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            urllib.request.urlopen(page, timeout=5)
            return
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(f"no MLflow server at {page} within {SECONDS_TO_START} s")
            time.sleep(0.5)


if __name__ == "__main__":
    main()
