"""Kills workers, trials and the tracker of a sweep at random, and checks that it still keeps its promise.

    python scripts/torture.py [--trials 60] [--workers 6] [--kills 60] [--seed 0] [--folder FOLDER]

Two sweeps of the same tiny trials are run: one undisturbed, one whose workers and trials get SIGKILL every few seconds
while the MLflow server they report to dies and comes back. In the end every trial must have finished, none must have
done so twice, every record and every MLflow history must hold each step exactly once, and both sweeps
must give the same table. tests/sweeps/test_torture.py is the same in a few seconds, with trials that train nothing.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moepp.records import RunRecord, read_json  # noqa: E402

STEPS = 40
SECONDS_BETWEEN_KILLS = (1.0, 4.0)
SECONDS_WITHOUT_TRACKER = (3.0, 10.0)
SHARE_OF_WORKERS, SHARE_OF_TRACKER = 0.3, 0.1  # of the kills; the rest are trials
SWEEP = """
name: torture
question: Does a sweep keep its promise?
base: [size=smoke, trainer.steps={steps}, trainer.log_every=1, trainer.val_every=20, trainer.checkpoint_every=5,
       trainer.expert_timing=false, trainer.threads=1, data.cache={cache}]
scales: {{smoke: {{set: []}}}}
baseline: lr0
arms: {{{arms}}}
seeds: {seeds}
retries: 1000
"""


def trial() -> int:
    """`run.py trial` that adds a line to `ends` in its record whenever it comes to the end."""
    from moepp.cli import main

    finish = RunRecord.finish

    def finish_and_say_so(record: RunRecord) -> None:
        finish(record)
        with open(record.path / "ends", "a") as ends:
            ends.write(f"{os.getpid()}\n")

    RunRecord.finish = finish_and_say_so
    return main(sys.argv[1:])


def work() -> int:
    """`run.py sweep work` whose trials are those above."""
    from moepp.sweeps.reading import read_sweep
    from moepp.sweeps.runner import run_sweep

    command = (sys.executable, __file__, "trial")
    run_sweep(read_sweep(sys.argv[2]), "smoke", 0, sys.argv[3:], progress=False, command=command, one_share=True)
    return 0


def run(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "run.py"), *map(str, words)]


class Torture:
    """The disturbed sweep: its workers, its tracker, and what has been killed so far."""

    def __init__(self, folder: Path, workers: int, seed: int):
        self.folder, self.runs, self.directory = folder, folder / "cut", folder / "cut" / "torture-smoke"
        self.chance = random.Random(seed)
        self.kills = {"workers": 0, "trials": 0, "tracker": 0}
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.words = [f"runs={self.runs}", f"tracking.uri=http://127.0.0.1:{self.port}"]
        self._tracker: subprocess.Popen | None = None
        self._tracker_is_back = 0.0
        self.workers = [self._start_worker() for _ in range(workers)]

    def _start_worker(self) -> subprocess.Popen:
        command = [sys.executable, __file__, "work", self.folder / "torture.yaml", *self.words]
        with open(self.folder / "workers.txt", "a") as log:
            return subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def start_tracker(self) -> None:
        # The records' own store, so that a server that comes back finds what the one before it was sent.
        command = run("ui", f"runs={self.runs}", "--port", self.port)
        with open(self.folder / "tracker.txt", "a") as log:
            self._tracker = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def stop_tracker(self) -> None:
        if self._tracker is not None:
            os.killpg(self._tracker.pid, signal.SIGKILL)
            self._tracker.wait()
        self._tracker = None

    def disturb(self, kills: int) -> None:
        """Kills until `kills` have been made or the workers have ended."""
        while sum(self.kills.values()) < kills and any(worker.poll() is None for worker in self.workers):
            time.sleep(self.chance.uniform(*SECONDS_BETWEEN_KILLS))
            if self._tracker is None and time.monotonic() > self._tracker_is_back:
                self.start_tracker()
            drawn = self.chance.random()
            if drawn < SHARE_OF_WORKERS:
                self._kill_worker()
            elif drawn < SHARE_OF_WORKERS + SHARE_OF_TRACKER and self._tracker is not None:
                self.stop_tracker()
                self._tracker_is_back = time.monotonic() + self.chance.uniform(*SECONDS_WITHOUT_TRACKER)
                self.kills["tracker"] += 1
            else:
                self._kill_trial()
        if self._tracker is None:
            self.start_tracker()

    def _kill_worker(self) -> None:
        victim = self.chance.choice(self.workers)
        if victim.poll() is not None:
            return
        victim.kill()
        victim.wait()
        self.workers[self.workers.index(victim)] = self._start_worker()
        self.kills["workers"] += 1

    def _kill_trial(self) -> None:
        trials = sorted(path for path in Path("/proc").glob("[0-9]*/cmdline") if self._is_trial(path))
        with suppress(ProcessLookupError, IndexError):  # it was quicker, or none runs
            os.kill(int(self.chance.choice(trials).parent.name), signal.SIGKILL)
            self.kills["trials"] += 1

    def _is_trial(self, cmdline: Path) -> bool:
        with suppress(OSError):
            words = cmdline.read_bytes().split(b"\0")
            return b"trial" in words and any(word.startswith(bytes(self.directory)) for word in words)
        return False

    def end(self) -> None:
        self.stop_tracker()
        for worker in self.workers:
            worker.kill()
            worker.wait()


def trials(directory: Path) -> dict[tuple[str, int], RunRecord]:
    plan = read_json(directory / "sweep.json")["trials"]
    return {(trial["arm"], trial["seed"]): RunRecord(directory / trial["path"]) for trial in plan}


def table(directory: Path) -> dict[tuple[str, int], tuple[float, float]]:
    finals = {trial: record.final() for trial, record in trials(directory).items()}
    return {trial: (final["val_loss"], final["val_bits_per_byte"]) for trial, final in finals.items()}


def check(directory: Path, store: str) -> None:
    """Raises AssertionError naming the record that breaks the promise."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    for record in trials(directory).values():
        assert record.status == "done", f"{record.path} is {record.status}"
        ends = record.path / "ends"  # absent where the trial was killed between `done` and this
        times = len(ends.read_text().splitlines()) if ends.exists() else 1
        assert times == 1, f"{record.path} ran to its end {times} times"
        lines = record.metrics()
        assert sum("final/val_loss" in line for line in lines) == 1, f"{record.path} ended more than once"
        steps = [line["step"] for line in lines if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1)), f"{record.path}: steps {steps}"
        run_id = read_json(record.path / "mlflow.json")["run_id"]
        history = sorted(point.step for point in client.get_metric_history(run_id, "train/loss"))
        assert history == steps, f"{record.path}: MLflow has steps {history}"
        assert client.get_run(run_id).info.status == "FINISHED", f"{record.path}: not FINISHED in MLflow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"trials": 60, "workers": 6, "kills": 60, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, help="of all that is written; a temporary one unless given")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    seeds = min(6, options.trials)
    arms = ", ".join(f"lr{n}: [optim.lr={n + 1}e-3]" for n in range(-(-options.trials // seeds)))
    text = SWEEP.format(steps=STEPS, cache=ROOT / ".cache", arms=arms, seeds=list(range(seeds)))
    (folder / "torture.yaml").write_text(text)

    began = time.monotonic()
    whole = ["sweep", "run", folder / "torture.yaml", "--scale", "smoke", f"runs={folder / 'whole'}"]
    subprocess.run(run(*whole, "tracking=jsonl"), check=True)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    torture = Torture(folder, options.workers, options.seed)
    try:
        torture.disturb(options.kills)
        codes = [worker.wait() for worker in torture.workers]
        assert codes == [0] * options.workers, f"the workers ended with {codes}; see {folder / 'workers.txt'}"
    finally:
        torture.end()
    print(f"disturbed: {time.monotonic() - began:.0f} s, killed {torture.kills}", flush=True)
    store = f"sqlite:///{torture.runs}/mlflow.db"
    subprocess.run(run("sync", f"runs={torture.runs}", f"tracking.uri={store}"), check=True)
    check(torture.directory, store)
    assert table(torture.directory) == table(folder / "whole" / "torture-smoke"), "the tables differ"
    print(f"the promise holds: {len(table(torture.directory))} trials, each step once, both tables equal ({folder})")


if __name__ == "__main__":
    roles = {"trial": trial, "work": work}
    sys.exit(roles[sys.argv[1]]() if sys.argv[1:2] and sys.argv[1] in roles else main())
