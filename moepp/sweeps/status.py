"""Where a sweep stands, read from sweep.json and the records of its trials: no torch, and nothing is written."""

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.records import RunRecord, UnreadableRecord
from moepp.sweeps.leases import Holder, died_here, is_free, newest

STATES = ("done", "pruned", "running", "failed", "damaged", "waiting")
TIMED_TRIALS = 20  # finished ones whose time stands for the rest
RATE_LINES = 10  # newest logged lines whose speed stands for the rest of a trial


@dataclass(frozen=True)
class TrialStatus:
    label: str  # arm and seed
    state: str  # one of STATES
    path: Path
    step: int
    steps: int
    seconds_left: float | None = None  # of a running trial, at its latest speed
    note: str = ""  # who runs it, or what is wrong with it
    log: tuple[str, ...] = ()  # last lines of a failed trial


@dataclass(frozen=True)
class SweepStatus:
    trials: Sequence[TrialStatus]
    unproposed: int = 0  # trials that a search has yet to ask for
    left: int = 0  # that the newest call waits for

    def count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    @property
    def trial_seconds(self) -> float | None:
        """Mean training time of finished trials; None before the first."""
        done = (trial.path for trial in self.trials if trial.state == "done")
        timed = (seconds for path in done if (seconds := _train_seconds(path)) is not None)
        seconds = list(itertools.islice(timed, TIMED_TRIALS))
        return statistics.fmean(seconds) if seconds else None

    def final_metrics(self) -> dict[str, int]:
        """How many of the finished trials have each `final/` metric, as a finite number."""
        finals = (_final(trial.path) for trial in self.trials if trial.state == "done")
        return Counter(name for final in finals for name, value in final.items() if math.isfinite(value))

    @property
    def seconds_left(self) -> float | None:
        """Until the last trial ends with as many at a time as run now; None when nobody can know."""
        running = [trial for trial in self.trials if trial.state == "running"]
        per_trial, waiting = self.trial_seconds, self.count("waiting") + self.unproposed
        left = [per_trial if trial.seconds_left is None else trial.seconds_left for trial in running]
        if not running or None in left or (waiting and per_trial is None):
            return None
        return max(*left, (sum(left) + waiting * (per_trial or 0.0)) / len(running))


def read_status(directory: Path, plan: dict[str, Any]) -> SweepStatus:
    """`plan` is what sweep.json of `directory` holds. A record that cannot be read counts as failed.

    Of the trials that the newest call leaves out only those that have ended well, or run, are shown, and none that is
    asked for under another name.
    """
    retries = plan.get("retries", -1)
    asked = [_read(directory, trial, retries) for trial in plan["trials"] if not trial.get("left_out")]
    paths = {status.path for status in asked}
    others = [_read(directory, trial, retries) for trial in plan["trials"] if trial.get("left_out")]
    shown = [status for status in others if status.state not in ("failed", "waiting") and status.path not in paths]
    unproposed = max(0, plan.get("planned", 0) - len(asked))
    left = sum(status.state in ("running", "waiting") for status in asked) + unproposed
    return SweepStatus([*asked, *shown], unproposed, left)


def outcome(record: RunRecord, retries: int) -> tuple[str, str]:
    """`done`, `pruned`, `damaged`, `failed` or, while somebody may try the trial (again), `open`; and why it failed.

    A trial has failed once it has crashed more than `retries` times, or when the books on that cannot be read.
    """
    try:
        status = record.status
        if status in ("done", "pruned"):
            return status, ""
        if status == "damaged":
            return status, record.damage
        record.read("attempt.json")
        crashes, reason = len(record.crashes), record.read("failed.json").get("reason", "")
    except UnreadableRecord as error:
        return "failed", str(error)
    return ("failed", reason) if status == "failed" and crashes > retries else ("open", "")


def _read(directory: Path, trial: dict[str, Any], retries: int) -> TrialStatus:
    path = directory / trial["path"]
    try:
        return _trial(path, trial, retries)
    except UnreadableRecord as error:
        return TrialStatus(f"{trial['arm']} s{trial['seed']}", "failed", path, 0, trial["steps"], None, str(error))


def _trial(path: Path, trial: dict[str, Any], retries: int) -> TrialStatus:
    label, steps, record = f"{trial['arm']} s{trial['seed']}", trial["steps"], RunRecord(path)
    status, reason = outcome(record, retries)
    if status == "done":
        return TrialStatus(label, "done", path, steps, steps)
    if status == "damaged":
        return TrialStatus(label, status, path, steps, steps, None, reason)
    if status == "pruned":
        pruned = record.read("pruned.json")
        return TrialStatus(label, "pruned", path, pruned["step"], steps, None, pruned["reason"])
    lines = record.metrics()
    step = min(steps, int(lines[-1]["step"])) if lines else 0
    if holder := _holder(path / "leases"):
        return TrialStatus(label, "running", path, step, steps, _seconds_left(lines, step, steps), holder)
    if status == "failed":
        log = tuple(record.read("failed.json").get("log", ()))
        return TrialStatus(label, "failed", path, step, steps, None, reason, log)
    return TrialStatus(label, "waiting", path, step, steps)


def _train_seconds(path: Path) -> float | None:
    return _final(path).get("train_seconds")


def _final(path: Path) -> dict[str, float]:
    try:
        return RunRecord(path).final()
    except UnreadableRecord:
        return {}


def _holder(leases: Path) -> str:
    """Who has the trial, in words; empty when anybody may claim it."""
    number, content = newest(leases)
    holder, path = Holder.of(content), leases / str(number)
    if not number or (holder and (is_free(content) or died_here(holder, path))):
        return ""
    # Two machines' clocks meet here, which is good enough to inform and never decides.
    silent = time.time() - path.stat().st_mtime
    who = f"process {holder.pid} on {holder.host}" if holder else "an unreadable lease"
    late = holder is not None and silent > holder.stale
    return f"{who}, silent for {silent:.0f} s: any worker takes over" if late else who


def _seconds_left(lines: Sequence[dict[str, float]], step: int, steps: int) -> float | None:
    recent = lines[-RATE_LINES:]
    if len(recent) < 2 or recent[-1]["step"] <= recent[0]["step"]:
        return None
    per_step = (recent[-1]["time"] - recent[0]["time"]) / 1000 / (recent[-1]["step"] - recent[0]["step"])
    return max(0.0, per_step * (steps - step) - (time.time() - recent[-1]["time"] / 1000))
