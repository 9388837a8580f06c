"""Whether a repeated run lost what the original lost, and if not, what else differs between them."""

import math
from dataclasses import dataclass

from moepp.config import leaves
from moepp.errors import UsageError
from moepp.records import RunRecord
from moepp.reports.side_by_side import Change, provenance_changes

KINDS = {"code": "git.", "data": "data.", "versions": "versions.", "hardware": "hardware."}  # prefixes in provenance

SECTIONS = {prefix.rstrip("."): kind for kind, prefix in KINDS.items()}


@dataclass(frozen=True)
class Repetition:
    """`train/loss` at every logged step and `final/val_loss` of two runs of one config.

    `largest` is the greatest absolute difference in nats, found at `where`; infinite where only one run has a value.
    `differs` names, by kind, everything else that is not the same or, with uncommitted changes, not known to be.
    `ended` says how either run ended, unless both are done.
    """

    compared: int
    differing: int
    largest: float
    where: str
    differs: dict[str, list[str]]
    ended: str = ""

    @property
    def equal(self) -> bool:
        return not self.differing

    @property
    def unexplained(self) -> bool:
        """The losses differ although nothing else does."""
        return not self.equal and not self.differs


def compare_repetition(original: RunRecord, again: RunRecord) -> Repetition:
    """Compares two finished runs, without any tolerance. Of runs that were pruned or failed the steps count that both
    have logged. Raises UsageError when there is none.
    """
    a, b = _losses(original), _losses(again)
    done = original.status == again.status == "done"
    ended = "" if done else f"original {original.status}, repetition {again.status}"
    apart = {where: _distance(a.get(where), b.get(where)) for where in (a | b if done else a.keys() & b.keys())}
    if not apart:
        raise UsageError(f"{original.path} and {again.path} share no logged loss that could be compared")
    where = max(apart, key=apart.__getitem__)
    differing = sum(distance > 0 for distance in apart.values())
    return Repetition(len(apart), differing, apart[where], where, _differences(original, again), ended)


def describe_repetition(repetition: Repetition) -> list[str]:
    """One line for each kind of circumstance and one for the losses."""
    lines = [f"{kind:<9} {'; '.join(repetition.differs.get(kind, ['the same']))}" for kind in KINDS]
    lines += [f"ended     {repetition.ended}"] if repetition.ended else []
    if repetition.equal:
        return [*lines, f"losses    equal, all {repetition.compared} of them, to the last bit"]
    count = f"{repetition.differing} of {repetition.compared} {'differs' if repetition.differing == 1 else 'differ'}"
    return [*lines, f"losses    {count}, by {repetition.largest:.3g} at most ({repetition.where})"]


def _losses(record: RunRecord) -> dict[str, float]:
    lines = [line for line in record.metrics() if "train/loss" in line]
    losses = {f"train/loss, step {line['step']}": line["train/loss"] for line in lines}
    final = record.final()
    return losses | ({"final/val_loss": final["val_loss"]} if "val_loss" in final else {})


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
        for kind, said in _earlier(record).items():
            found[kind].append(f"the {name} was begun with {said}")
    return {kind: differences for kind, differences in found.items() if differences}


def _earlier(record: RunRecord) -> dict[str, str]:
    """By kind, what earlier attempts at a run had otherwise than its last: it may have moved, or been updated."""
    last = record.read("provenance.json")
    found: dict[str, list[str]] = {}
    for attempt in last.get("earlier", []):
        now = dict(leaves({kind: last.get(kind, {}) for kind in SECTIONS}))
        for key, value in leaves({kind: attempt.get(kind, {}) for kind in SECTIONS}):
            if value != now.get(key):
                section, _, name = key.partition(".")
                found.setdefault(SECTIONS[section], []).append(f"{name} {value}")
    return {kind: ", ".join(dict.fromkeys(said)) for kind, said in found.items()}


def _say(change: Change) -> str:
    return f"{change.key.partition('.')[2]} {change.a} -> {change.b}"
