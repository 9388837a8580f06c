"""How large a difference can this suite see, with how many seeds?

The paper trains one seed per row and draws conclusions from 0.2 points. Here vanilla MoE and MoE++ are trained with
several seeds; the spread gives the smallest true difference that n seeds show with 80 % probability. Expected here: at
three seeds nothing below a few hundredths of a nat can be seen, and pairing by seed (same data order) helps.
"""

import math
import statistics

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.statistics import style
from moepp.statistics.claims import Claim, judge
from moepp.statistics.seeds import (
    POWER,
    SIGNIFICANCE,
    mean_interval,
    minimal_detectable_difference,
    variance_ratio_interval,
)
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table

COUNTS = (2, 3, 4, 5, 7, 10, 15, 20)  # of seeds
ARMS = {"vanilla": "vanilla MoE", "moepp": "MoE++"}


def std_interval(std: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of a normal standard deviation estimated from n values."""
    from scipy.special import chdtri

    low, high = (chdtri(n - 1, p) for p in ((1 - level) / 2, (1 + level) / 2))
    return std * math.sqrt((n - 1) / low), std * math.sqrt((n - 1) / high)


def measure(context: Context) -> Findings:
    results = context.results("gating_residual")
    losses = {arm: results.by_seed(arm, "val_loss") for arm in ARMS}
    seeds = sorted(set.intersection(*(set(found) for found in losses.values())))
    both = [[losses[arm][seed] for seed in seeds] for arm in ARMS]
    spreads = {ARMS[arm]: list(found.values()) for arm, found in losses.items()}
    spreads["MoE++ minus vanilla MoE, same seed"] = [b - a for a, b in zip(*both, strict=True)]
    rows = tuple((seed, *(losses[arm][seed] for arm in ARMS)) for seed in seeds)
    by_seed = Table("losses", "Validation loss of every seed, nats per token.", ("seed", *ARMS.values()), rows)
    tables = (_spread_table(spreads), by_seed)
    if len(seeds) < 3:
        return Findings(tables, notes=("Fewer than three seeds: what could be seen is not computed.",))
    paired = statistics.stdev(spreads["MoE++ minus vanilla MoE, same seed"])
    pooled = math.sqrt(sum(statistics.variance(values) for values in both))  # of a difference of unrelated seeds
    data = Table(
        "detectable",
        f"Smallest true difference, in nats per token, that n seeds on each side show with {POWER:.0%} probability at"
        f" {SIGNIFICANCE:.0%}; from the scatter of {len(seeds)} paired seeds.",
        ("seeds", "paired by seed", "unrelated seeds"),
        tuple((n, _detectable(paired, n), _detectable(pooled, n, paired=False)) for n in COUNTS),
    )
    return Findings((*tables, data), (detectable_figure(data),), (_pairing(*both),))


def _pairing(a: list[float], b: list[float]) -> Claim:
    """With q the variance of a - b over that of a + b, the two variances' ratio is 2 q / (1 + q): unrelated seeds give
    the mean of both.
    """
    differences, sums = ([y + sign * x for x, y in zip(a, b, strict=True)] for sign in (-1, 1))
    q = statistics.variance(differences) / statistics.variance(sums)
    ratio, low, high = (math.sqrt(2 * q / (1 + q)) for q in (q, *variance_ratio_interval(differences, sums)))
    return Claim(
        "pairing by seed narrows a difference, its standard deviation over that of unrelated seeds",
        judge(low, high, below=1.0),
        ratio,
        low,
        high,
        note=f"Pitman-Morgan interval over {len(a)} pairs.",
    )


def _detectable(std: float, n: int, paired: bool = True) -> float:
    return minimal_detectable_difference(std, n, 1 - SIGNIFICANCE, POWER, paired)


def _spread_table(spreads: dict[str, list[float]]) -> Table:
    rows = []
    for name, values in spreads.items():
        found = mean_interval(values)
        interval = (None, None) if found.std is None else std_interval(found.std, found.n)
        rows.append((name, found.n, found.mean, found.half_width, found.std, *interval))
    columns = ("validation loss of", "n", "mean", "± of it", "standard deviation", "low", "high")
    caption = "Spread over seeds; low and high bound the standard deviation with 95 % confidence."
    return Table("spread", caption, columns, tuple(rows))


def detectable_figure(data: Table) -> Figure:
    return Figure(data, lambda: _draw(data))


def _draw(data: Table):
    figure, axes = style.axes_of(5.2, 3.4)
    seeds = [row[0] for row in data.rows]
    for column, (name, look) in enumerate(style.looks(data.columns[1:]).items(), start=1):
        axes.plot(seeds, [row[column] for row in data.rows], ms=5, label=name, **look)
    axes.set_yscale("log")
    style.plain_log(axes.yaxis)
    style.whole_ticks(axes.xaxis)
    axes.set_xlabel("seeds on each side")
    axes.set_ylabel("smallest visible difference, nats per token")
    axes.legend()
    return figure


EXPERIMENT = Experiment(
    name="seeds",
    title="The noise floor",
    question="How large a difference can this suite see, with how many seeds?",
    expected="hundredths of a nat with three seeds; pairing by seed narrows it.",
    measure=measure,
    runs=(Runs("gating_residual", arms=tuple(ARMS)),),
    notes=(
        "Judged alone: where one of k arms is picked for its difference, the level to pass is the corrected one of each"
        " report.",
        "The noise is that of this scale; longer runs of larger models vary less.",
    ),
)
