"""What is left of the difference between MoE++ and vanilla MoE when each trains at its own best learning rate?

The sweep learning_rate gives both the same five rates. The best rate of a side is chosen on the other seeds and judged
on the one left out, in turn, so choosing flatters nobody. Expected here: the same rate is best for both within a factor
of two, and the difference stays what it is at the shared rate, within noise.
"""

from collections import Counter

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.reports.results import SweepResults
from moepp.statistics import style
from moepp.statistics.claims import Claim, judge
from moepp.statistics.seeds import mean_interval, paired_difference
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table

RATES = ("0.0025", "0.005", "0.01", "0.02", "0.04")
SHARED = "0.01"  # the rate of every other sweep at laptop scale
SIDES = {"vanilla": "vanilla MoE", "moepp": "MoE++"}


Losses = dict[str, dict[str, dict[int, float]]]  # side -> rate -> seed -> validation loss


def measure(context: Context) -> Findings:
    results = context.results("learning_rate")
    losses, seeds, left_out = _complete(results)
    table = _loss_table(losses, seeds)
    plots = (rates_figure(table),) if seeds else ()
    if len(seeds) < 2 or not all(losses.values()):
        return Findings((table,), plots, notes=(*left_out, "Too few runs: no rate can be chosen on other seeds."))
    chosen = {side: {seed: _best(rates, [s for s in seeds if s != seed]) for seed in seeds}
              for side, rates in losses.items()}  # fmt: skip
    own = {side: [losses[side][chosen[side][seed]][seed] for seed in seeds] for side in SIDES}
    claims = [_claim("at its own best rate", own)]
    if all(SHARED in rates for rates in losses.values()):
        shared = {side: [losses[side][SHARED][seed] for seed in seeds] for side in SIDES}
        claims.append(_claim(f"at the shared rate {SHARED}", shared))
    often = [f"Best rate of {SIDES[side]}: " + ", ".join(f"{rate} ({n} of {len(seeds)} choices)" for rate, n in
             Counter(by_seed.values()).most_common()) + "." for side, by_seed in chosen.items()]  # fmt: skip
    return Findings((table,), plots, tuple(claims), notes=(*left_out, *often))


def _complete(results: SweepResults) -> tuple[Losses, list[int], list[str]]:
    """Losses of the rates that have every seed which most rates have, those seeds, and what is left out: a rate that
    diverged with one seed is no candidate for the best.
    """
    found = {(side, rate): results.by_seed(f"{side}_{rate}", "val_loss") for side in SIDES for rate in RATES}
    counts = Counter(seed for by_seed in found.values() for seed in by_seed)
    seeds = sorted(seed for seed, n in counts.items() if n > len(found) / 2)
    lacking = {arm: [seed for seed in seeds if seed not in by_seed] for arm, by_seed in found.items()}
    losses = {side: {rate: found[side, rate] for rate in RATES if not lacking[side, rate]} for side in SIDES}
    said = [
        f"Left out: {SIDES[side]} at {rate}, which lacks a finished run of seed {', '.join(map(str, missing))}."
        for (side, rate), missing in lacking.items()
        if missing
    ]
    return losses, seeds, said


def _best(rates: dict[str, dict[int, float]], seeds: list[int]) -> str:
    return min(rates, key=lambda rate: sum(rates[rate][seed] for seed in seeds))


def _claim(where: str, losses: dict[str, list[float]]) -> Claim:
    found = paired_difference(losses["moepp"], losses["vanilla"])
    verdict = judge(found.low, found.high, below=0.0)
    return Claim(f"MoE++ has the lower validation loss {where}, MoE++ minus vanilla MoE", verdict, found.mean,
                 found.low, found.high, "nats per token")  # fmt: skip


def _loss_table(losses: Losses, seeds: list[int]) -> Table:
    def cells(side: str, rate: str) -> tuple[float | None, ...]:
        by_seed = losses[side].get(rate) if seeds else None
        found = by_seed and mean_interval([by_seed[seed] for seed in seeds])
        return (found.mean, found.low, found.high) if found else (None, None, None)

    rows = tuple((float(rate), *(cell for side in SIDES for cell in cells(side, rate)), len(seeds)) for rate in RATES)
    caption = (
        f"Validation loss, nats per token, by learning rate: mean and 95 % t-interval over the n = {len(seeds)} seeds"
        " that most rates have finished."
    )
    columns = (end for name in SIDES.values() for end in (name, f"{name}: low", f"{name}: high"))
    return Table("rates", caption, ("learning rate", *columns, "n"), rows)


def rates_figure(table: Table) -> Figure:
    return Figure(table, lambda: _draw(table))


def _draw(table: Table):
    figure, axes = style.axes_of(5.2, 3.4)
    for place, look in enumerate(style.looks(SIDES, "vanilla").values()):
        first = 1 + 3 * place
        known = [(row[0], *row[first : first + 3]) for row in table.rows if row[first] is not None]
        if known:
            rates, means, lows, highs = zip(*known, strict=True)
            half_widths = [0 if low is None else (high - low) / 2 for low, high in zip(lows, highs, strict=True)]
            axes.errorbar(rates, means, yerr=half_widths, capsize=3, ms=5, label=table.columns[first], **look)
    axes.set_xscale("log")
    style.plain_log(axes.xaxis)
    axes.set_xticks([row[0] for row in table.rows])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="best_rate",
    title="MoE++ and vanilla MoE, each at its own best learning rate",
    question="What is left of the difference between MoE++ and vanilla MoE when each trains at its own best rate?",
    expected="both are best within a factor of two of the same rate, and the difference stays within noise.",
    measure=measure,
    runs=(Runs("learning_rate"),),
    notes=("The rate of a side is chosen on the other seeds and judged on the one left out.",),
    scales=("smoke", "laptop"),
)
