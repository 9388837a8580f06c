"""What is left of the difference between MoE++ and vanilla MoE when each trains at its own best learning rate?

The sweep learning_rate gives both the same five rates. The best rate of a side is chosen on the other seeds and judged
on the one left out, in turn, so choosing flatters nobody. Expected here: the same rate is best for both within a factor
of two, and the difference stays what it is at the shared rate, within noise.
"""

from collections import Counter

from moepp.analysis import style
from moepp.analysis.results import SweepResults
from moepp.analysis.statistics import paired_difference
from moepp.analysis.study import Claim, Plot, Runs, Study, StudyContext, StudyReport, Table, judge

RATES = ("0.00125", "0.0025", "0.005", "0.01", "0.02")
SHARED = "0.005"  # the rate of every other sweep at laptop scale
SIDES = {"vanilla": "vanilla MoE", "moepp": "MoE++"}


def measure(context: StudyContext) -> StudyReport:
    results = context.results("learning_rate")
    losses = {side: _losses(results, side) for side in SIDES}
    seeds = sorted(set.intersection(*(set(by_seed) for rates in losses.values() for by_seed in rates.values())))
    table = _loss_table(losses, seeds)
    plot = Plot(table, lambda: _draw(losses, seeds))
    if len(seeds) < 2:
        return StudyReport((table,), (plot,), notes=("One seed: no rate can be chosen on the others.",))
    chosen = {side: {seed: _best(rates, [s for s in seeds if s != seed]) for seed in seeds}
              for side, rates in losses.items()}  # fmt: skip
    own = {side: [losses[side][chosen[side][seed]][seed] for seed in seeds] for side in SIDES}
    shared = {side: [losses[side][SHARED][seed] for seed in seeds] for side in SIDES}
    claims = (_claim("at its own best rate", own), _claim(f"at the shared rate {SHARED}", shared))
    often = [f"{SIDES[side]}: " + ", ".join(f"{rate} ({n} of {len(seeds)} choices)" for rate, n in
             Counter(by_seed.values()).most_common()) for side, by_seed in chosen.items()]  # fmt: skip
    return StudyReport((table,), (plot,), claims, notes=tuple(f"Best rate of {found}." for found in often))


def _losses(results: SweepResults, side: str) -> dict[str, dict[int, float]]:
    return {rate: results.by_seed(f"{side}_{rate}", "val_loss") for rate in RATES}


def _best(rates: dict[str, dict[int, float]], seeds: list[int]) -> str:
    return min(rates, key=lambda rate: sum(rates[rate][seed] for seed in seeds))


def _claim(where: str, losses: dict[str, list[float]]) -> Claim:
    found = paired_difference(losses["moepp"], losses["vanilla"])
    verdict = judge(found.low, found.high, below=0.0)
    return Claim(f"MoE++ has the lower validation loss {where}, MoE++ minus vanilla MoE", verdict, found.mean,
                 found.low, found.high, "nats per token")  # fmt: skip


def _loss_table(losses: dict[str, dict[str, dict[int, float]]], seeds: list[int]) -> Table:
    rows = tuple(
        (float(rate), *(sum(losses[side][rate][seed] for seed in seeds) / len(seeds) for side in SIDES), len(seeds))
        for rate in RATES
    )
    caption = "Mean validation loss, nats per token, over the seeds that all runs have finished."
    return Table("rates", caption, ("learning rate", *SIDES.values(), "n"), rows)


def _draw(losses: dict[str, dict[str, dict[int, float]]], seeds: list[int]):
    figure, axes = style.axes_of(5.2, 3.4)
    for side, marker, colour in zip(SIDES, ("o", "s"), (style.GREY, style.BLUE), strict=True):
        for seed in seeds:
            axes.plot([float(rate) for rate in RATES], [losses[side][rate][seed] for rate in RATES], marker, mfc="none",
                      color=colour, ms=4)  # fmt: skip
        means = [sum(losses[side][rate][seed] for seed in seeds) / len(seeds) for rate in RATES]
        axes.plot([float(rate) for rate in RATES], means, color=colour, marker=marker, ms=6, lw=1, label=SIDES[side])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    return figure


STUDY = Study(
    name="best_rate",
    title="MoE++ and vanilla MoE, each at its own best learning rate",
    question="What is left of the difference between MoE++ and vanilla MoE when each trains at its own best rate?",
    expected="both are best within a factor of two of the same rate, and the difference stays within noise.",
    measure=measure,
    runs=(Runs("learning_rate"),),
    notes=(
        "Open marks are single seeds. The rate of a side is chosen on the other seeds and judged on the one left out.",
    ),
    scales=("smoke", "laptop"),
)
