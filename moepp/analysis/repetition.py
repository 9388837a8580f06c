"""Whether a repeated run lost what the original lost, and if not, what else differs between them."""

import math
from dataclasses import dataclass

from moepp.analysis.side_by_side import Change, provenance_changes
from moepp.records import RunRecord

KINDS = {"code": "git.", "data": "data.", "versions": "versions.", "hardware": "hardware."}  # prefixes in provenance


@dataclass(frozen=True)
class Repetition:
    """`train/loss` at every logged step and `final/val_loss` of two runs of one config.

    `largest` is the greatest absolute difference in nats, found at `where`; infinite where only one run has a value.
    `differs` names, by kind, everything else that is not the same or, with uncommitted changes, not known to be.
    """

    compared: int
    differing: int
    largest: float
    where: str
    differs: dict[str, list[str]]

    @property
    def equal(self) -> bool:
        return not self.differing

    @property
    def unexplained(self) -> bool:
        """The losses differ although nothing else does."""
        return not self.equal and not self.differs


def compare_repetition(original: RunRecord, again: RunRecord) -> Repetition:
    """Compares two finished runs, without any tolerance."""
    a, b = _losses(original), _losses(again)
    apart = {where: _distance(a.get(where), b.get(where)) for where in a | b}
    where = max(apart, key=apart.__getitem__)
    differing = sum(distance > 0 for distance in apart.values())
    return Repetition(len(apart), differing, apart[where], where, _differences(original, again))


def describe(repetition: Repetition) -> list[str]:
    """One line for each kind of circumstance and one for the losses."""
    lines = [f"{kind:<9} {'; '.join(repetition.differs.get(kind, ['the same']))}" for kind in KINDS]
    if repetition.equal:
        return [*lines, f"losses    equal, all {repetition.compared} of them, to the last bit"]
    count = f"{repetition.differing} of {repetition.compared}"
    return [*lines, f"losses    {count} differ, by {repetition.largest:.3g} at most ({repetition.where})"]


def _losses(record: RunRecord) -> dict[str, float]:
    lines = [line for line in record.metrics() if "train/loss" in line]
    losses = {f"train/loss, step {line['step']}": line["train/loss"] for line in lines}
    return losses | {"final/val_loss": record.final()["val_loss"]}


def _distance(a: float | None, b: float | None) -> float:
    if a is None or b is None or not math.isfinite(a - b):
        return math.inf
    return abs(a - b)


def _differences(original: RunRecord, again: RunRecord) -> dict[str, list[str]]:
    changes = provenance_changes([(original, again)])
    found = {kind: [_say(c) for c in changes if c.key.startswith(prefix)] for kind, prefix in KINDS.items()}
    for name, record in (("original", original), ("repetition", again)):
        if record.read("provenance.json").get("git", {}).get("dirty"):
            found["code"].append(f"uncommitted changes in the {name}")
    return {kind: differences for kind, differences in found.items() if differences}


def _say(change: Change) -> str:
    return f"{change.key.partition('.')[2]} {change.a} -> {change.b}"
