"""How far does a search of its own carry MoE++ and vanilla MoE?

The other sweeps train all arms with the values of their size. Here TPE proposes learning rate, warm-up, balance weight
and, for MoE++, tau: as often for one side as for the other. Expected: both gain about the same on those values, for
they were chosen on both.
"""

from collections.abc import Sequence

from moepp.reports.proposals import Proposal, best, importances, read_proposals
from moepp.reports.study import Plot, Runs, Study, StudyContext, StudyReport, Table
from moepp.statistics.style import COLOURS, MARKERS, axes_of

SWEEP = "hyperparameters"


def measure(context: StudyContext) -> StudyReport:
    proposals = read_proposals(context.directories[SWEEP])
    arms = list(dict.fromkeys(proposal.arm for proposal in proposals))
    keys = tuple(dict.fromkeys(key for proposal in proposals for key in proposal.point))
    chosen = [(arm, best(proposals, arm)) for arm in arms]
    winners = Table(
        "best",
        "The best proposal of each arm, out of so many; pruned ones stopped at a rung",
        ("arm", "proposal", "loss", *keys, "proposals", "pruned"),
        tuple(
            (
                arm,
                found.name if found else None,
                found.loss if found else None,
                *(found.point.get(key) if found else None for key in keys),
                sum(proposal.arm == arm for proposal in proposals),
                sum(proposal.arm == arm and proposal.state == "pruned" for proposal in proposals),
            )
            for arm, found in chosen
        ),
    )
    weights = {arm: importances(proposals, arm) for arm in arms}
    weighed = tuple((arm, key, share) for arm in arms for key, share in weights[arm].items())
    notes = (
        "The best of many proposals on a seed flatters itself, and the more so the more there are: train the winners"
        " with other seeds before comparing them.",
    )
    if not weighed:
        notes += ("Fewer than eight finished proposals in an arm: no importances.",)
    shares = Table(
        "importance", "Share of each key in what separates better from worse", ("arm", "key", "share"), weighed
    )
    return StudyReport((winners, shares) if weighed else (winners,), (_history(proposals, keys),), notes=notes)


def _history(proposals: Sequence[Proposal], keys: tuple[str, ...]) -> Plot:
    arms = list(dict.fromkeys(proposal.arm for proposal in proposals))
    number = {arm: 0 for arm in arms}
    rows = []
    for proposal in proposals:
        number[proposal.arm] += 1
        values = (proposal.point.get(key) for key in keys)
        rows.append((proposal.arm, number[proposal.arm], proposal.state, proposal.step, proposal.loss, *values))
    columns = ("arm", "proposal", "state", "step", "loss", *keys)
    data = Table("history", "Every proposal: large markers ran to their end", columns, tuple(rows))

    def draw():
        figure, axes = axes_of(5.6, 3.2)
        for arm, colour, marker in zip(arms, COLOURS, MARKERS, strict=False):
            for state, size in (("done", 30), ("pruned", 8)):
                points = [(n, loss) for a, n, s, _, loss, *_ in rows if a == arm and s == state and loss is not None]
                label = arm if state == "done" else None
                axes.scatter(
                    *zip(*points, strict=True) if points else ([], []), s=size, c=colour, marker=marker, label=label
                )
        axes.set_xlabel("proposal")
        axes.set_ylabel("validation loss where it ended")
        axes.legend()
        return figure

    return Plot(data, draw)


STUDY = Study(
    name="hyperparameters",
    title="Each side with values searched for it alone",
    question="How far does a search of its own carry MoE++ and vanilla MoE?",
    expected="both gain about the same on the values of their size",
    measure=measure,
    runs=(Runs(SWEEP),),
    scales=("smoke", "laptop"),
)
