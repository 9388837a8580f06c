"""Successive halving on steps: points of a space that fall behind stop early.

pruner: {successive_halving: {first: 120, factor: 2}}      # rungs at steps 120, 240, 480, ... before the last

At each rung a trial goes on while its validation loss is within the best 1/factor of all that have reached that rung so
far, or the best of fewer (asynchronous successive halving, Li et al. 2018, arXiv 1810.05934): no trial ever waits for
another. It competes with trials of its own seed and its own group, the points of one space or the proposals for one arm
of a search; arms that are named in the sweep file, and the baseline, always run to their end.

The rivals' losses are read from their run records: every machine sees the same, there is nothing else to report to, and
a trial that was killed at a rung asks the same question again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.records import RunRecord, UnreadableRecord, read_json


@dataclass(frozen=True)
class SuccessiveHalving:
    """`first` is the step of the first rung; each later one lies `factor` times further."""

    first: int
    factor: int

    def is_rung(self, step: int, steps: int) -> bool:
        rung = self.first
        while rung < min(step, steps):
            rung *= self.factor
        return rung == step < steps

    def keeps(self, loss: float, losses: Sequence[float]) -> bool:
        """Whether a trial with `loss` goes on; `losses` are of all at this rung, its own among them."""
        return loss <= sorted(losses)[max(1, len(losses) // self.factor) - 1]


def parse(pruner: Mapping[str, Any]) -> SuccessiveHalving | None:
    """None for an empty one. Raises UsageError for what is no pruner."""
    if not pruner:
        return None
    halving = pruner.get("successive_halving")
    whole = isinstance(halving, Mapping) and set(halving) == {"first", "factor"}
    if len(pruner) > 1 or not whole or any(type(value) is not int for value in halving.values()):
        raise UsageError("pruner must be {successive_halving: {first: STEP, factor: NUMBER}}, in whole numbers")
    if halving["first"] < 1 or halving["factor"] < 2:
        raise UsageError("pruner: first must be at least 1 and factor at least 2")
    return SuccessiveHalving(**halving)


class SweepPruner:
    """Decides for one trial of a sweep, whose directory is `record.path`."""

    def __init__(self, record: RunRecord, halving: SuccessiveHalving, trial: Mapping[str, Any]):
        self.record, self.halving, self.steps = record, halving, trial["steps"]
        self._group, self._seed = trial["group"], trial["seed"]

    @classmethod
    def of(cls, directory: Path) -> "SweepPruner | None":
        """None for a run that nobody prunes."""
        plan = read_json(directory.parent / "sweep.json") or {}
        halving = parse(plan.get("pruner", {}))
        mine = [trial for trial in plan.get("trials", []) if trial["path"] == directory.name and trial.get("group")]
        return cls(RunRecord(directory), halving, mine[0]) if halving and mine else None

    def verdict(self, step: int, loss: float) -> str:
        """Why the trial stops here; empty where it goes on. Writes nothing."""
        if not self.halving.is_rung(step, self.steps):
            return ""
        losses = [loss, *self._rivals(step)]
        if self.halving.keeps(loss, losses):
            return ""
        rank = sum(other < loss for other in losses) + 1
        return f"validation loss {loss:.4g} at step {step} is number {rank} of {len(losses)}"

    def _rivals(self, step: int) -> list[float]:
        """Losses at `step` of the others; read anew, for new ones may have been proposed."""
        folder = self.record.path.parent
        trials = read_json(folder / "sweep.json")["trials"]
        paths = {t["path"] for t in trials if t.get("group") == self._group and t["seed"] == self._seed}
        losses = (_losses_at(RunRecord(folder / path), step) for path in paths - {self.record.path.name})
        return [found[-1] for found in losses if found]


def _losses_at(record: RunRecord, step: int) -> list[float]:
    """None of a record that cannot be read: its own trial says so, and the others go on without it."""
    try:
        return [line["val/loss"] for line in record.metrics() if line["step"] == step and "val/loss" in line]
    except UnreadableRecord:
        return []
