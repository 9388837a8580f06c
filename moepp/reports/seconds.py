"""Where the seconds of a command went: before the first trial, in the trials by what they did, and afterwards.

Trials tell it themselves, by the times in their records, wherever they ran.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from moepp.records import RunRecord, read_json
from moepp.statistics.wording import several

PARTS = ("start", "training", "validation", "last measurements")  # of a trial


class Clock:
    """Of one command, which begins now."""

    def __init__(self) -> None:
        self.began, self.phases = time.time(), Counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.time()
        try:
            yield
        finally:
            self.phases[name] += time.time() - begin

    def told(self, directories: Iterable[Path]) -> list[str]:
        """Lines of all that was spent until now; `directories` are the sweeps whose trials may be new."""
        whole = time.time() - self.began
        records = [record for directory in directories for record in _finished_since(directory, self.began)]
        trials = [(started(record), ended(record)) for record in records]
        before = min((begin for begin, _ in trials), default=self.began) - self.began
        running = max((end for _, end in trials), default=self.began + before) - self.began - before
        spent = {"data and plan": before, "trials": running, **self.phases}
        spent["other"] = whole - sum(spent.values())
        lines = [f"the {whole:.0f} s went to {_listed(spent)}"]
        if parts := sum(map(parts_of, records), Counter()):
            lines.append(f"the seconds of the {several(len(records), 'new trial')}, summed: {_listed(parts)}")
        return lines


def parts_of(record: RunRecord) -> Counter[str]:
    """The seconds of a finished trial. A validation takes the time since the line of the step that it follows; the
    run's own clock counts it as training.
    """
    lines = record.metrics()
    follows = [(before, line) for before, line in pairwise(lines) if before["step"] == line["step"]]
    validation = sum(line["time"] - before["time"] for before, line in follows if "val/loss" in line) / 1000
    last = (lines[-1]["time"] - lines[-2]["time"]) / 1000 if len(lines) > 1 else 0.0
    training = record.final().get("train_seconds", 0.0) - validation
    start = ended(record) - started(record) - training - validation - last
    return Counter(dict(zip(PARTS, (max(0.0, start), training, validation, last), strict=True)))


def started(record: RunRecord) -> float:
    """Seconds since 1970, of the attempt that ended it; 0 where its record does not say."""
    said = record.read("provenance.json").get("started")
    return datetime.fromisoformat(said).timestamp() if said else 0.0


def ended(record: RunRecord) -> float:
    return (record.path / "done").stat().st_mtime


def _finished_since(directory: Path, began: float) -> list[RunRecord]:
    """Trials that began then or later; records tell whole seconds."""
    planned = read_json(directory / "sweep.json")["trials"]
    records = [RunRecord(directory / trial["path"]) for trial in planned if not trial.get("left_out")]
    return [record for record in records if record.status == "done" and started(record) >= int(began)]


def _listed(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items() if round(spent))
