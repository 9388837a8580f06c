"""A trial of a sweep as one worker sees it: claimed, run in a process of its own, and given back."""

import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from moepp.config import save
from moepp.errors import DiskFull, Interrupted
from moepp.process import STOP_SIGNALS, cause_of_end, last_lines
from moepp.records import RunRecord, write_json
from moepp.sweeps.allocations import Allocation
from moepp.sweeps.leases import LEASE_FILE, NO_LEASE, STALE_SECONDS, Heartbeat, Lease, LeaseWatch
from moepp.sweeps.progress import TrialProgress
from moepp.sweeps.spec import Trial
from moepp.sweeps.status import outcome

DEATHS_PER_CRASH = 3  # while a trial makes no progress; who kills a sweep twice in a row loses nothing
ASKED_TO_STOP = {Interrupted.exit_code, *(-number for number in (signal.SIGINT, *STOP_SIGNALS))}  # exit codes


class Process(Protocol):
    """What is used here of subprocess.Popen."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


Start = Callable[[Path, Path, Mapping[str, str]], Process]  # of a trial: given its config, its log and its environment


class Job:
    """The trial, its record and, while this worker has them, its lease and its process."""

    def __init__(self, trial: Trial, retries: int, heartbeat: Heartbeat, stale: float = STALE_SECONDS):
        self.trial, self.label = trial, f"{trial.arm} s{trial.seed}"
        self.retries, self.heartbeat = retries, heartbeat
        self.record = RunRecord(trial.directory)
        self.progress = TrialProgress(self.record, trial.config.trainer.steps)
        self.watch = LeaseWatch(self.record.path / "leases", stale)
        self.lease: Lease | None = None
        self.process: Process | None = None
        self.allocation: Allocation = {}

    @property
    def done(self) -> bool:
        return self.record.status == "done"

    @property
    def failure(self) -> str:
        """Why nobody will try this trial again; empty while somebody may."""
        return outcome(self.record, self.retries)[1]

    @property
    def settled(self) -> bool:
        return outcome(self.record, self.retries)[0] != "open"

    @property
    def seconds(self) -> float:
        """That the latest attempt of a finished trial took; 0 where another sweep has made it."""
        with suppress(FileNotFoundError):
            return (self.record.path / "done").stat().st_mtime - (self.record.path / "attempt.json").stat().st_mtime
        return 0.0

    def claim(self) -> bool:
        """Whether this worker may run the trial now."""
        lease = self.watch.claim()
        if lease is None:
            self.progress.read()
            return False
        if self.settled:  # by its last holder, after this worker had looked
            lease.release()
            return False
        if lease.from_dead:
            self._count_death()
            if self.settled:
                lease.release()
                return False
        self.heartbeat.add(lease)
        self.lease = lease
        return True

    def start(self, start: Start, allocation: Allocation) -> None:
        self.allocation, path = allocation, self.record.path
        (path / "failed.json").unlink(missing_ok=True)
        self.trial.config.trainer.progress = False  # the sweep's bar is the one people watch
        save(self.trial.config, path / "config.yaml")
        attempt, resume_point = self.record.read("attempt.json"), self._resume_point()
        deaths = attempt["deaths"] if attempt.get("from") == resume_point else 0
        environment = {**allocation, LEASE_FILE: str(self.lease.path)}
        self.process = start(path / "config.yaml", path / "log.txt", environment)
        write_json(path / "attempt.json", {"from": resume_point, "deaths": deaths})

    def ended(self) -> bool:
        """Whether the process has ended. One whose lease is lost is killed: the trial is another worker's now."""
        if self.process.poll() is None and self.lease.lost:
            print(f"warning: {self.label} was taken over by another worker; stopping it here", file=sys.stderr)
            self.process.kill()
            self.process.wait()
        return self.process.returncode is not None

    def settle(self) -> None:
        """Closes the books on an ended process and gives the trial back.

        Only the `done` marker is success: a trial that was ended from outside may well exit with code 0. Raises
        DiskFull where it could not save: that is no fault of the trial's, and would be the next one's end too.
        """
        code, log = self.process.returncode, self.record.path / "log.txt"
        try:
            if self.settled or self.lease.lost or code == NO_LEASE:
                return
            if code == DiskFull.exit_code:
                raise DiskFull(f"cannot write {self.record.path}, for the disk is full; the same command continues")
            if code in ASKED_TO_STOP:
                self._count_death()
            else:
                self._count_crash(self.record.read("failed.json").get("reason") or cause_of_end(code, log))
        finally:
            self.release()

    def release(self) -> None:
        if self.lease is not None:
            self.heartbeat.release(self.lease)
        self.lease = None

    def _count_death(self) -> None:
        """Of this trial by a stop signal, or of a worker that is gone together with it.

        Either may come from outside, and must cost the trial nothing now and then. The trial may also be the cause, by
        taking all memory, say, and must not be tried for ever when it never reaches another checkpoint. Several such
        deaths in a row are a crash.
        """
        attempt = self.record.read("attempt.json")
        if not attempt or attempt["from"] != self._resume_point():
            return
        deaths = attempt["deaths"] + 1
        write_json(self.record.path / "attempt.json", {**attempt, "deaths": deaths})
        if deaths % DEATHS_PER_CRASH == 0:
            self._count_crash(f"it was stopped or its worker died {deaths} times before it reached another checkpoint")

    def _resume_point(self) -> str:
        """Name of the newest checkpoint; empty before the first."""
        return max((path.name for path in self.record.checkpoints.glob("step-*.ckpt")), default="")

    def _count_crash(self, reason: str) -> None:
        self.record.crash(reason)
        if len(self.record.crashes) > self.retries:
            self.record.fail(reason, last_lines(self.record.path / "log.txt"))
        else:
            (self.record.path / "failed.json").unlink(missing_ok=True)
            print(f"warning: {self.label} is tried again: {reason}", file=sys.stderr)
