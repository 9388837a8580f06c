"""The report of a sweep that searches: the best proposal of each arm, what told better from worse, and the history."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moepp.records import read_json
from moepp.reports.experiment import Context, Findings
from moepp.reports.proposals import Proposal, best, importances, read_proposals
from moepp.statistics.style import Figure, axes_of, hover, looks, whole_ticks
from moepp.statistics.tables import Cell, Table

FLATTERED = (
    "The best of many proposals on a seed flatters itself, and the more so the more there are: train the winners with"
    " other seeds before comparing them."
)


@dataclass(frozen=True)
class SearchReport:
    """`measure` of a sweep that searches."""

    sweep: str  # `Runs.sweep`

    def __call__(self, context: Context) -> Findings:
        directory = context.directories[self.sweep]
        proposals, baseline = read_proposals(directory), read_json(directory / "sweep.json").get("baseline", "")
        arms = list(dict.fromkeys(proposal.arm for proposal in proposals))
        keys = tuple(dict.fromkeys(key for proposal in proposals for key in proposal.point))
        weights = [(arm, *weight) for arm in arms for weight in importances(proposals, arm).items()]
        caption = "Share of each key in what separates better from worse"
        shares = Table("importance", caption, ("arm", "key", "share"), tuple(weights))
        few = () if weights else ("Fewer than eight finished proposals in an arm: no importances.",)
        winners = _winners(proposals, arms, keys)
        tables = (winners, shares) if weights else (winners,)
        return Findings(tables, (_history(proposals, arms, keys, baseline),), notes=(FLATTERED, *few))


def _winners(proposals: Sequence[Proposal], arms: Sequence[str], keys: tuple[str, ...]) -> Table:
    rows = []
    for arm in arms:
        found, own = best(proposals, arm), [proposal for proposal in proposals if proposal.arm == arm]
        chosen = (found.name, found.loss, *map(found.point.get, keys)) if found else (None,) * (2 + len(keys))
        rows.append((arm, *chosen, len(own), sum(proposal.state == "pruned" for proposal in own)))
    caption = "The best proposal of each arm, out of so many; pruned ones stopped at a rung"
    return Table("best", caption, ("arm", "proposal", "loss", *keys, "proposals", "pruned"), tuple(rows))


def _history(proposals: Sequence[Proposal], arms: Sequence[str], keys: tuple[str, ...], baseline: str) -> Figure:
    rows = []
    for arm in arms:
        for number, proposal in enumerate((proposal for proposal in proposals if proposal.arm == arm), start=1):
            point = map(proposal.point.get, keys)
            rows.append((arm, number, proposal.state, proposal.step, proposal.loss, *point))
    return history_figure(rows, keys, baseline)


def history_figure(rows: Sequence[Sequence[Cell]], keys: Sequence[str], baseline: str) -> Figure:
    """Where every proposal ended, in the order in which they were made."""
    caption = (
        "Every proposal, mean over its seeds: validation loss, nats per token, at its last step; no interval. Filled"
        " marks trained to their end; small open ones were pruned early, so they end higher."
    )
    columns = ("arm", "proposal", "state", "step", "loss", *keys)
    return Figure(Table("history", caption, columns, tuple(rows)), partial(_draw, rows, baseline))


def _draw(rows: Sequence[Sequence[Cell]], baseline: str) -> Any:
    figure, axes = axes_of(5.6, 3.4)
    for arm, look in looks((row[0] for row in rows), baseline).items():
        for state, size, says, fill in (("done", 30, "to its end", look["color"]), ("pruned", 12, "pruned", "none")):
            points = [(row[1], row[4]) for row in rows if row[0] == arm and row[2] == state and row[4] is not None]
            if points:
                shape = {"marker": look["marker"], "fc": fill, "ec": look["color"], "label": f"{arm}, {says}"}
                axes.scatter(*zip(*points, strict=True), s=size, **shape)
                hover(axes, ((n, loss, f"{arm} {n}, {says}: {loss:.4f}") for n, loss in points))
    axes.set_xlabel("proposal, in the order made")
    axes.set_ylabel("validation loss, nats per token")
    whole_ticks(axes.xaxis)
    figure.legend(loc="outside upper center", ncols=2)
    return figure
