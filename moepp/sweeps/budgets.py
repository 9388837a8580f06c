"""What a sweep holds equal, computed from the configs of its arms before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from moepp.errors import UsageError
from moepp.statistics.tables import Table, as_lines, quantity
from moepp.sweeps.allocations import Allocation, allocate, threads
from moepp.sweeps.probe import give_equal_seconds, step_seconds

if TYPE_CHECKING:
    from moepp.models.budget import Budget
    from moepp.sweeps.spec import Sweep, Trial

WITHIN = 0.01  # relative difference that still counts as equal


@dataclass(frozen=True)
class MatchedTrials:
    """Trials, what of the machine they run on, and what arms cost. `seconds` of training by arm are estimates, and
    there where they are held equal.
    """

    trials: list["Trial"]
    allocations: list[Allocation]
    arms: dict[str, "Budget"]
    seconds: dict[str, float]


def match_trials(
    sweep: "Sweep",
    scale: str,
    extra: Sequence[str],
    seeds: Sequence[int] | None,
    workers: int,
    one_share: bool = False,
) -> MatchedTrials:
    """The trials of a sweep; under `match: wallclock` their steps are set by a probe of each arm in the first
    allocation. Whether they match is for `require_match` to say.
    """
    trials, searched, seconds = sweep.trials(scale, extra, seeds), sweep.search(scale) is not None, {}
    allocations = allocate(workers, trials[0].config.trainer, one_share)
    if sweep.match == "wallclock":
        if searched:
            raise UsageError("match: wallclock needs arms that are known from the start; a search has none")
        per_step = step_seconds(sweep.folder(scale, extra), trials, threads(allocations[0]), most=len(trials))
        give_equal_seconds([trial for trial in trials if not trial.lengthened], sweep.baseline, per_step)
        seconds = {t.arm: t.config.trainer.steps * per_step[t.arm] for t in trials if not t.lengthened}
    ends = sweep.extremes(scale, extra) if searched else []
    return MatchedTrials(trials, allocations, budgets([*trials, *ends]), seconds)


def budgets(trials: Sequence["Trial"]) -> dict[str, "Budget"]:
    """The budget of every arm; seeds do not change it."""
    from moepp.models.budget import Budget

    arms = {trial.arm: trial.config for trial in reversed(trials) if not trial.lengthened}
    found = {}
    for arm in reversed(arms):
        model, data, trainer = arms[arm].model, arms[arm].data, arms[arm].trainer
        found[arm] = Budget.of(model, data.seq_len, trainer.steps * data.batch_size * data.seq_len)
    return found


def relative_spread(values: Sequence[float]) -> float:
    """How much larger the largest is than the smallest, relative."""
    return max(values) / min(values) - 1 if min(values) else float(max(values) > 0)


def require_match(match: str, arms: Mapping[str, "Budget"], seconds: Mapping[str, float] | None = None) -> None:
    """Raises UsageError, with the least and the most of it, when the arms differ in what `match` declares equal."""
    if match == "none":
        return
    values = seconds if match == "wallclock" else {arm: getattr(budget, match) for arm, budget in arms.items()}
    difference = relative_spread(list(values.values()))
    if difference > WITHIN:
        ends = [choose(values, key=values.get) for choose in (min, max)]
        least, most = (f"{quantity(values[arm])} of {arm}" for arm in ends)
        raise UsageError(
            f"the arms differ by {difference:.1%} in {match} ({least} to {most}), which the sweep declares equal within"
            f" {WITHIN:.0%}; change the arms{', train more steps' if seconds else ''}, or state match: none"
        )


def table(arms: Mapping[str, "Budget"], seconds: Mapping[str, float] | None = None) -> list[str]:
    """One line per arm, and how far the arms differ."""
    rows = {arm: ({"seconds": seconds[arm]} if seconds else {}) | asdict(budget) for arm, budget in arms.items()}
    names = list(next(iter(rows.values())))
    cells = [(arm, *(f"{row[name]:,.{1 if name == 'seconds' else 0}f}" for name in names)) for arm, row in rows.items()]
    spreads = (f"{relative_spread([row[name] for row in rows.values()]):.1%}" for name in names)
    return as_lines(Table("", "", ("arm", *names), (*cells, ("difference", *spreads))))
