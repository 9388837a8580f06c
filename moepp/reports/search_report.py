"""The report of a sweep that searches: the best proposal of each arm, what told better from worse, and the history."""

from collections.abc import Sequence
from dataclasses import dataclass

from moepp.reports.experiment import Context, Findings
from moepp.reports.proposals import Proposal, best, importances, read_proposals
from moepp.statistics.style import COLOURS, MARKERS, Figure, axes_of
from moepp.statistics.tables import Table

FLATTERED = (
    "The best of many proposals on a seed flatters itself, and the more so the more there are: train the winners with"
    " other seeds before comparing them."
)


@dataclass(frozen=True)
class SearchReport:
    """`measure` of a sweep that searches."""

    sweep: str  # `Runs.sweep`

    def __call__(self, context: Context) -> Findings:
        proposals = read_proposals(context.directories[self.sweep])
        arms = list(dict.fromkeys(proposal.arm for proposal in proposals))
        keys = tuple(dict.fromkeys(key for proposal in proposals for key in proposal.point))
        weights = [(arm, *weight) for arm in arms for weight in importances(proposals, arm).items()]
        caption = "Share of each key in what separates better from worse"
        shares = Table("importance", caption, ("arm", "key", "share"), tuple(weights))
        few = () if weights else ("Fewer than eight finished proposals in an arm: no importances.",)
        winners = _winners(proposals, arms, keys)
        tables = (winners, shares) if weights else (winners,)
        return Findings(tables, (_history(proposals, arms, keys),), notes=(FLATTERED, *few))


def _winners(proposals: Sequence[Proposal], arms: Sequence[str], keys: tuple[str, ...]) -> Table:
    rows = []
    for arm in arms:
        found, own = best(proposals, arm), [proposal for proposal in proposals if proposal.arm == arm]
        chosen = (found.name, found.loss, *map(found.point.get, keys)) if found else (None,) * (2 + len(keys))
        rows.append((arm, *chosen, len(own), sum(proposal.state == "pruned" for proposal in own)))
    caption = "The best proposal of each arm, out of so many; pruned ones stopped at a rung"
    return Table("best", caption, ("arm", "proposal", "loss", *keys, "proposals", "pruned"), tuple(rows))


def _history(proposals: Sequence[Proposal], arms: Sequence[str], keys: tuple[str, ...]) -> Figure:
    rows = []
    for arm in arms:
        for number, proposal in enumerate((proposal for proposal in proposals if proposal.arm == arm), start=1):
            point = map(proposal.point.get, keys)
            rows.append((arm, number, proposal.state, proposal.step, proposal.loss, *point))

    def draw():
        figure, axes = axes_of(5.6, 3.2)
        for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
            for state, size in (("done", 30), ("pruned", 8)):
                points = [(n, loss) for a, n, s, _, loss, *_ in rows if a == arm and s == state and loss is not None]
                look = {"s": size, "c": colour, "marker": marker, "label": arm if state == "done" else None}
                axes.scatter(*zip(*points, strict=True) if points else ([], []), **look)
        axes.set_xlabel("proposal")
        axes.set_ylabel("validation loss where it ended")
        axes.legend()
        return figure

    columns = ("arm", "proposal", "state", "step", "loss", *keys)
    return Figure(Table("history", "Every proposal: large markers ran to their end", columns, tuple(rows)), draw)
