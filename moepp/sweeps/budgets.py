"""What a sweep holds equal, computed from the configs of its arms before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from moepp.errors import UsageError

if TYPE_CHECKING:
    from moepp.models.budget import Budget
    from moepp.sweeps.spec import Trial

WITHIN = 0.01  # relative difference that still counts as equal


def budgets(trials: Sequence["Trial"]) -> dict[str, "Budget"]:
    """The budget of every arm; seeds do not change it."""
    from moepp.models.budget import Budget

    arms = {trial.arm: trial.config for trial in reversed(trials)}
    found = {}
    for arm in dict.fromkeys(trial.arm for trial in trials):
        model, data, trainer = arms[arm].model, arms[arm].data, arms[arm].trainer
        found[arm] = Budget.of(model, data.seq_len, trainer.steps * data.batch_size * data.seq_len)
    return found


def spread(values: Sequence[float]) -> float:
    """How much larger the largest is than the smallest, relative."""
    return max(values) / min(values) - 1 if min(values) else float(max(values) > 0)


def require_match(match: str, arms: Mapping[str, "Budget"]) -> None:
    """Raises UsageError, with the table of budgets, when the arms differ in what `match` declares equal."""
    if match == "none":
        return
    difference = spread([getattr(budget, match) for budget in arms.values()])
    if difference > WITHIN:
        raise UsageError(
            f"the arms differ by {difference:.1%} in {match}, which the sweep declares equal within {WITHIN:.0%};"
            " change the arms, or state match: none\n" + "\n".join(table(arms))
        )


def table(arms: Mapping[str, "Budget"]) -> list[str]:
    """One line per arm, and how far the arms differ."""
    rows = {arm: asdict(budget) for arm, budget in arms.items()}
    names = list(next(iter(rows.values())))
    width = max(len("difference"), *map(len, rows))
    lines = ["  ".join([" " * width, *(f"{name:>15}" for name in names)])]
    for arm, row in rows.items():
        lines.append("  ".join([f"{arm:<{width}}", *(f"{row[name]:>15,.0f}" for name in names)]))
    spreads = [f"{spread([row[name] for row in rows.values()]):>15.1%}" for name in names]
    return [*lines, "  ".join([f"{'difference':<{width}}", *spreads])]
