"""Runs a sweep: a child process per trial. What is finished is never run again, what was cut short continues."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from moepp.config import save
from moepp.errors import Interrupted, RunError, UsageError
from moepp.records import RunRecord, write_json
from moepp.sweeps.process import cause_of_end, start
from moepp.sweeps.progress import SweepProgress, TrialProgress
from moepp.sweeps.slots import Slot, divide
from moepp.sweeps.spec import Sweep, Trial
from moepp.training.tracking import FolderMirror

TRIAL_COMMAND = (sys.executable, "-m", "moepp.cli", "trial")
SECONDS_TO_STOP = 30  # a stopped trial finishes its step and writes a checkpoint
POLL_SECONDS = 0.2


def run_sweep(
    sweep: Sweep,
    scale: str,
    workers: int = 0,
    extra: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    command: Sequence[str] = TRIAL_COMMAND,
) -> Path:
    """Runs every trial that is not done and returns the sweep's directory, `runs/<sweep>-<scale>/`.

    `workers` trials at a time (0: one per GPU, else one per core). `command` runs one trial, given the path of its
    frozen config. Raises RunError when trials failed (the others have been run by then) or the disk cannot be written,
    and Interrupted after Ctrl-C or SIGTERM. Called again, it goes on where it stopped and tries failed trials anew.
    """
    if workers < 0:
        raise UsageError(f"workers={workers} must not be negative")
    trials = sweep.trials(scale, extra, seeds)
    _freeze_data(trials)
    config = trials[0].config
    directory = Path(config.runs) / config.name
    mirrored = config.tracking.backend == "mlflow"
    try:
        with RunRecord(directory).lock():
            jobs = [_Job(trial) for trial in trials]
            _describe(sweep, scale, jobs, directory)
            with FolderMirror(directory, config.tracking, config.runs).follow() if mirrored else nullcontext():
                _Runner(jobs, divide(workers, config.trainer), command, progress).run()
    except OSError as error:
        place = error.filename or directory
        raise RunError(f"cannot write {place} ({error.strerror}); the same command continues") from error
    failures = [f"{job.label}: {job.failure}" for job in jobs if job.failure]
    if failures:
        raise RunError(
            f"{len(failures)} of {len(jobs)} trials failed; the same command tries them again ({'; '.join(failures)})"
        )
    return directory


def _freeze_data(trials: Sequence[Trial]) -> None:
    """Writes the digest of the data into each config, preparing every distinct data set once."""
    from moepp.training.tokens import prepare

    digests: dict[str, str] = {}
    for trial in trials:
        wanted = repr(trial.config.data)
        if wanted not in digests:
            digests[wanted] = prepare(trial.config.data).header.digest
        trial.config.data.digest = digests[wanted]


class _Job:
    """A trial on this machine."""

    def __init__(self, trial: Trial):
        self.trial, self.label = trial, f"{trial.arm} s{trial.seed}"
        self.record = RunRecord(trial.directory)
        self.progress = TrialProgress(self.record, trial.config.trainer.steps)
        self.process: subprocess.Popen | None = None
        self.slot: Slot = {}
        self.failure = ""

    @property
    def done(self) -> bool:
        return self.record.status == "done"

    def start(self, command: Sequence[str], slot: Slot) -> None:
        self.slot, path = slot, self.record.path
        path.mkdir(parents=True, exist_ok=True)
        (path / "failed.json").unlink(missing_ok=True)
        self.trial.config.trainer.progress = False  # the sweep's bar is the one people watch
        save(self.trial.config, path / "config.yaml")
        self.process = start([*command, str(path / "config.yaml")], path / "log.txt", slot)

    def settle(self) -> None:
        """Only the `done` marker is success: a trial that was ended from outside may well exit with code 0."""
        if self.done:
            return
        if self.record.status != "failed":
            self.record.fail(cause_of_end(self.process.returncode, self.record.path / "log.txt"))
        self.failure = self.record.read("failed.json")["reason"]


def _describe(sweep: Sweep, scale: str, jobs: Sequence[_Job], directory: Path) -> None:
    about = {key: getattr(sweep, key) for key in ("name", "question", "paper", "baseline", "match", "objective")}
    trials = [{"arm": job.trial.arm, "seed": job.trial.seed, "path": job.record.path.name} for job in jobs]
    write_json(directory / "sweep.json", {**about, "scale": scale, "trials": trials})


@dataclass
class _Runner:
    """The loop over jobs: starts, watches and, when interrupted, stops them."""

    jobs: Sequence[_Job]
    slots: list[Slot]  # free ones
    command: Sequence[str]
    progress: bool
    interrupted: bool = False

    def run(self) -> None:
        waiting = [job for job in self.jobs if not job.done]
        running: list[_Job] = []
        bar = SweepProgress([job.progress for job in self.jobs], self.progress)
        with self._interruptible():
            try:
                while (waiting or running) and not self.interrupted:
                    while waiting and self.slots:
                        job = waiting.pop(0)
                        job.start(self.command, self.slots.pop(0))
                        running.append(job)
                        bar.describe(f"trial {self.jobs.index(job) + 1}/{len(self.jobs)} {job.label}")
                    time.sleep(POLL_SECONDS)
                    bar.show([job.progress for job in running])
                    if not self.interrupted:
                        running = self._settle(running)
            finally:
                self._stop(running)
                bar.close()
        if self.interrupted:
            done = sum(job.done for job in self.jobs)
            raise Interrupted(
                f"interrupted: {done} of {len(self.jobs)} trials are finished; the same command continues"
            )

    def _settle(self, running: list[_Job]) -> list[_Job]:
        """Closes the books on ended trials and frees their slots; returns the others."""
        for job in running:
            if job.process.poll() is not None:
                job.settle()
                self.slots.append(job.slot)
        return [job for job in running if job.process.returncode is None]

    def _stop(self, running: list[_Job]) -> None:
        processes = [job.process for job in running if job.process]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop instead of this process, which then has its trials to stop."""

        def interrupt(*_: object) -> None:
            self.interrupted = True

        previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
