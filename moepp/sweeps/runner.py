"""Runs a sweep: a process per trial. What is finished is never run again, what was cut short continues.

Any number of runners, on any machines that share the folder of records, may work at one sweep (moepp/sweeps/leases.py).
"""

import math
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moepp.addresses import without_user
from moepp.errors import Interrupted, RunError, UsageError, reason
from moepp.process import start, stop_requests
from moepp.sweeps.allocations import Allocation, own_share
from moepp.sweeps.budgets import match_trials, require_match
from moepp.sweeps.fork_server import ForkServer, can_fork
from moepp.sweeps.hints import sweep_command
from moepp.sweeps.job import Job, Start
from moepp.sweeps.leases import STALE_SECONDS, Heartbeat, Lease, LeaseWatch
from moepp.sweeps.plan import promise
from moepp.sweeps.progress import SweepProgress
from moepp.sweeps.search import Search, refuse_storage
from moepp.sweeps.sharing import share_finished_runs
from moepp.sweeps.spanning import refuse_too_many_nodes, start_step
from moepp.sweeps.spec import Sweep, Trial
from moepp.sweeps.trial import TRIAL_COMMAND
from moepp.tracking.follower import Follower
from moepp.tracking.mirror import follow
from moepp.tracking.mlflow_store import store_uri
from moepp.tracking.settings import TrackingConfig
from moepp.training.settings import RunConfig, TrainerConfig

MARGIN_SECONDS = 5.0  # beyond trainer.stop_s, all of which the starter of a trial's ranks gives to them
POLL_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between two looks at the trials of other workers


def run_sweep(
    sweep: Sweep,
    scale: str,
    workers: int = 0,
    extra: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    command: Sequence[str] = TRIAL_COMMAND,
    one_share: bool = False,
    stale: float = STALE_SECONDS,
    minutes: float = math.inf,
) -> Path:
    """Works at a sweep until none of its trials is left, and returns its directory, `runs/<sweep>-<scale>/`.

    The machine is divided among `workers` (0: one per GPU, else one per core). This process runs all of them; with
    `one_share` it is one of them, on a share that no other such process has (0 is then all cores where there is no
    GPU). Trials that others hold are waited for, and taken over after `stale` seconds without a sign of life. `command`
    runs one trial, given the path of its frozen config.

    Raises UsageError when the arms break `match`, or the directory holds the sweep with other settings; RunError when
    trials failed (the others have been run by then) or the disk cannot be written; Interrupted after a stop signal or
    when the `minutes` are over: no trial begins that would not end in time, as long as the slowest before, and those
    that still run are asked to save.
    Called again, it goes on where it stopped.
    """
    if workers < 0:
        raise UsageError(f"workers={workers} must not be negative")
    deadline = time.monotonic() + 60 * minutes
    prepared = begin(sweep, scale, extra, seeds, workers, one_share)
    config, directory = prepared.config, prepared.directory
    heartbeat = Heartbeat(stale)
    with _one_line_about_the_disk(directory):
        job = partial(Job, retries=sweep.retries, heartbeat=heartbeat, stale=stale)
        mirrored = config.tracking.backend == "mlflow"
        mirror = _SharedMirror(directory, config.tracking, config.runs, heartbeat, stale) if mirrored else None
        with (
            own_share(prepared.allocations) if one_share else nullcontext(prepared.allocations) as allocations,
            _starting(command, allocations, config.trainer) as start_trial,
        ):
            runner = _Runner(allocations, start_trial, job, progress, prepared.search, deadline)
            runner.learn(prepared.trials)
            with heartbeat.running(), follow(mirror) if mirror else nullcontext():
                runner.run()
    failures = [f"{job.label}: {job.failure}" for job in runner.jobs if job.failure]
    raise_failures(sweep_command("retry", sweep, scale, extra), failures, runner.planned)
    return directory


@dataclass(frozen=True)
class PreparedSweep:
    """A sweep whose trials are checked, have their data prepared and are promised: workers anywhere can run them."""

    directory: Path
    config: RunConfig  # of a trial; in what a launcher or a runner asks for they are all alike
    trials: Sequence[Trial]  # that are known by now: a search proposes more
    search: Search | None
    allocations: list[Allocation]


def begin(
    sweep: Sweep,
    scale: str,
    extra: Sequence[str],
    seeds: Sequence[int] | None,
    workers: int = 0,
    one_share: bool = False,
    nodes: int | None = None,
) -> PreparedSweep:
    """What comes before the first trial. Arguments and errors as of `run_sweep`; a trial may span as many `nodes`, or
    those of the Slurm job that this process runs in.
    """
    matched = match_trials(sweep, scale, extra, seeds, workers, one_share)
    require_match(sweep.match, matched.arms, matched.seconds)
    trials, allocations, freeze = matched.trials, matched.allocations, DataFreezer()
    refuse_too_many_nodes(trials, nodes)
    for trial in trials:
        freeze(trial)
    config = trials[0].config
    directory = Path(config.runs) / config.name
    search = None
    if sweep.search(scale):
        refuse_storage(sweep.storage, 0 if one_share else len(allocations))
        search = Search(sweep, scale, extra, seeds, freeze)
    with _one_line_about_the_disk(directory):
        if search:
            search.begin()
            trials = search.known()
        else:
            if shared := share_finished_runs(trials):
                print(f"{shared} of {len(trials)} trials are finished runs of other sweeps")
            promise(directory, sweep, scale, trials, extra)
    return PreparedSweep(directory, config, trials, search, allocations)


def raise_failures(retry: str, failures: Sequence[str], trials: int) -> None:
    """`failures` says of each failed trial, out of so many `trials`, which it is and why; `retry` is the command."""
    if failures:
        raise RunError(
            f"{len(failures)} of {trials} trials failed; `{retry}` lets the same command try them again"
            f" ({'; '.join(failures)})"
        )


@contextmanager
def _one_line_about_the_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or directory
        raise RunError(f"cannot write {place} ({reason(error)}); the same command continues") from error


@contextmanager
def _starting(command: Sequence[str], allocations: Sequence[Allocation], trainer: TrainerConfig) -> Iterator[Start]:
    if trainer.num_nodes > 1:
        yield partial(start_step, command, trainer)
        return
    if tuple(command) != TRIAL_COMMAND or not can_fork():
        yield lambda config, log, environment: start([*command, str(config)], log, environment)
        return
    server = ForkServer(allocations[0])  # for all: what loading minds, the number of threads, is alike in them
    try:
        yield server.start
    finally:
        server.close()


class DataFreezer:
    """Writes the digests of its data and initial weights into a trial's config, preparing every distinct data set
    once.
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def __call__(self, trial: Trial) -> None:
        from moepp.data.prepare import prepare
        from moepp.training.foreign import completed
        from moepp.training.initial import initial_weights

        trial.config = completed(trial.config)
        wanted = repr(trial.config.data)
        if wanted not in self._digests:
            self._digests[wanted] = prepare(trial.config.data).header.digest
        trial.config.data.digest = self._digests[wanted]
        trial.config.init_weights = initial_weights(trial.config)


class _SharedMirror:
    """The MLflow mirror of a sweep's folder, kept by a process of one of its runners: two would do all work twice."""

    def __init__(self, directory: Path, tracking: TrackingConfig, runs: str, heartbeat: Heartbeat, stale: float):
        self.uri = without_user(store_uri(tracking, runs))
        self._start = partial(Follower, directory, tracking, runs, folder=True)
        self._heartbeat, self._watch = heartbeat, LeaseWatch(directory / "mirror", stale)
        self._lease: Lease | None = None

    def sync(self, ended: bool = False) -> None:
        """Sees to it that the folder is mirrored, by this runner where no other does."""
        if self._lease is not None and self._lease.lost:
            self._give_up()
        if self._lease is None:
            self._lease = self._watch.claim()
            if self._lease is None:
                return
            self._heartbeat.add(self._lease)
            self._follower = self._start()
        elif self._follower.gone:
            self._follower = self._start()
        if ended:
            self._give_up()

    def _give_up(self) -> None:
        self._follower.end()
        self._heartbeat.release(self._lease)
        self._lease = None


class _Runner:
    """The loop over jobs: claims, starts, watches and, when interrupted, stops them. A search adds jobs while it runs:
    those that other workers asked for and, where a allocation finds nothing to do, one that this worker asks for.
    """

    def __init__(
        self,
        allocations: list[Allocation],
        start: Start,
        job: Callable[[Trial], Job],
        progress: bool,
        search: Search | None,
        deadline: float = math.inf,
    ):
        self.free, self._start, self._job, self.search = allocations, start, job, search
        self.jobs: list[Job] = []
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._deadline = deadline  # as time.monotonic() counts
        self._slowest = 0.0  # seconds of a trial
        self.stop = threading.Event()
        self._next_look = 0.0
        self._bar = SweepProgress(progress)
        self._exhausted = search is None

    @property
    def planned(self) -> int:
        return self.search.planned if self.search else len(self.jobs)

    def learn(self, trials: Sequence[Trial]) -> None:
        new = [self._job(trial) for trial in trials]
        self.jobs += new
        self.waiting += [job for job in new if not job.settled]
        self._time(new)
        self._bar.add([job.progress for job in new])

    def run(self) -> None:
        with stop_requests() as self.stop:
            try:
                while self._goes_on():
                    self._claim()
                    time.sleep(POLL_SECONDS)
                    self._bar.show([job.progress for job in self.running])
                    if not self.stop.is_set():
                        self._settle()
            finally:
                self._stop()
                self._bar.close()
        if self.stop.is_set() or self.waiting or self.running or not self._exhausted:
            done, why = sum(job.done for job in self.jobs), "interrupted" if self.stop.is_set() else "out of time"
            raise Interrupted(f"{why}: {done} of {self.planned} trials are finished; the same command continues")

    def _goes_on(self) -> bool:
        if self.stop.is_set() or time.monotonic() > self._deadline:
            return False
        if self.running or any(self._fits(job) for job in self.waiting):
            return True
        return not self._exhausted and self._fits()

    def _fits(self, job: Job | None = None) -> bool:
        """Whether a trial, a new one or what is left of this job's, ends in time if it takes as long as the slowest."""
        left = 1 - job.progress.step / job.progress.steps if job else 1.0
        return time.monotonic() + left * self._slowest < self._deadline

    def _time(self, jobs: Sequence[Job]) -> None:
        self._slowest = max([self._slowest, *(job.seconds for job in jobs if job.done)])

    def _claim(self) -> None:
        """Fills the free allocations, as far as there are trials that nobody holds."""
        if not self.free or time.monotonic() < self._next_look:
            return
        if self.search:
            self.learn(self.search.known())
        self._start_free()
        while self.free and not self._exhausted and not self.stop.is_set() and self._fits():
            proposed = self.search.propose()
            self._exhausted = not proposed
            self.learn(proposed)
            self._start_free()
        if self.free:
            self._next_look = time.monotonic() + LOOK_SECONDS

    def _start_free(self) -> None:
        for job in list(self.waiting):
            if not self.free:
                return
            if job.settled:
                job.progress.read()
                self.waiting.remove(job)
            elif self._fits(job) and job.claim():
                self.waiting.remove(job)
                self.running.append(job)
                job.start(self._start, self.free.pop(0))
                self._bar.describe(f"{self.jobs.index(job) + 1}/{self.planned} {job.label}")

    def _settle(self) -> None:
        """Closes the books on ended trials and frees their allocations."""
        for job in [job for job in self.running if job.ended()]:
            job.settle()
            self.running.remove(job)
            self.free.append(job.allocation)
            self._time([job])
            if not job.settled:
                self.waiting.append(job)
            self._next_look = 0.0

    def _stop(self) -> None:
        started = [job for job in self.running if job.process]
        for job in started:
            job.process.terminate()
        asked = time.monotonic()
        for job in started:
            deadline = asked + job.trial.config.trainer.stop_s + MARGIN_SECONDS
            try:
                job.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        for job in self.running:
            job.release()
