"""Tables, figure and claims on the two highest routing scores, with and without the gating residual (Fig. 6)."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moepp.routing.scores import MODE_BINS, RoutingScores
from moepp.statistics.claims import Claim, Verdict, judge
from moepp.statistics.resampling import Interval
from moepp.statistics.seeds import SIGNIFICANCE, holm, mean_interval, paired_difference
from moepp.statistics.style import BLUE, COLOURS, Figure, axes_of, counted
from moepp.statistics.tables import Cell, Table
from moepp.statistics.wording import several

Scores = Mapping[str, Mapping[str, RoutingScores]]  # arm -> model ("seed 0") -> scores of all layers
RANKS = ("highest", "second")
STATISTICS = ("mean", "variance", "range", "range98", "mode")
MARGIN = 0.10  # a mean or range within 10 % of the other arm's counts as unchanged


def score_table(scores: Scores, paper: Mapping[str, Sequence[float]]) -> Table:
    """Statistics of each arm's scores, all layers pooled as in the paper, mean over models; the paper's modes by arm
    beside them.
    """
    rows = []
    for arm, models in scores.items():
        pooled = [model.pooled().statistics() for model in models.values()]
        for rank, name in enumerate(RANKS):
            cells = []
            for statistic in STATISTICS:
                estimate = mean_interval([float(one[statistic][0, rank]) for one in pooled])
                cells += [estimate.mean, estimate.half_width]
            rows.append((arm, name, len(models), *cells, paper[arm][rank]))
    columns = ["arm", "score", "models", *(column for name in STATISTICS for column in (name, f"± {name}"))]
    columns.append("paper: mode")
    caption = (
        "The two highest routing scores of a token, all layers together; ± is the half width of a 95 % t-interval over"
        " models. `range98` lies between the percentiles 1 and 99; a mode is the middle of the fullest bin of width"
        f" {1 / MODE_BINS:g}, so smaller differences are none."
    )
    return Table("scores", caption, tuple(columns), tuple(rows))


def layer_scores(scores: Scores) -> Table:
    """Mean and variance by layer, mean over models."""
    rows = []
    for arm, models in scores.items():
        found = [model.statistics() for model in models.values()]
        mean, variance = (np.mean([one[name] for one in found], axis=0) for name in ("mean", "variance"))
        for layer in range(len(mean)):
            cells = [float(side[layer, rank]) for rank in range(2) for side in (mean, variance)]
            rows.append((arm, layer + 1, *cells))
    columns = ("arm", "layer", *(f"{rank} score, {name}" for rank in RANKS for name in ("mean", "variance")))
    return Table("score_layers", "The same by layer; the first has no residual in either arm.", columns, tuple(rows))


def histogram_plot(scores: Scores) -> Figure:
    """Both scores' histograms, arm beside arm, over all models and layers."""
    share, edges = {}, np.arange(MODE_BINS) / MODE_BINS
    for arm, models in scores.items():
        counts = sum(model.pooled().coarse()[0] for model in models.values())
        share[arm] = counts / counts.sum(-1, keepdims=True)
    rows = tuple(
        (arm, RANKS[rank], float(edges[b]), float(values[rank, b]))
        for arm, values in share.items()
        for rank in range(2)
        for b in range(MODE_BINS)
        if values[rank, b]
    )
    models = [len(of_arm) for of_arm in scores.values()]
    return scores_figure(rows, models)


def scores_figure(rows: Sequence[Sequence[Cell]], models: Sequence[int]) -> Figure:
    """A panel for each arm. `models` counts the models of each."""
    caption = (
        "The two highest routing scores of every token and layer, as shares of tokens in bins of"
        f" {1 / MODE_BINS:g}; {counted(models, 'model')} of an arm together, no interval."
    )
    data = Table("histograms", caption, ("arm", "score", "from", "share of tokens"), tuple(rows))
    return Figure(data, partial(_draw, rows))


def _draw(rows: Sequence[Sequence[Cell]]) -> Any:
    arms = list(dict.fromkeys(row[0] for row in rows))
    shape = {"columns": len(arms), "sharey": True, "squeeze": False}
    figure, axes = axes_of(width=7.2, height=3.2, **shape)
    edges = np.arange(MODE_BINS + 1) / MODE_BINS
    for one, arm in zip(axes[0], arms, strict=True):
        for rank, colour, hatch in ((0, BLUE, ""), (1, COLOURS[2], "////")):
            share = np.zeros(MODE_BINS)
            for *_, start, value in (row for row in rows if row[:2] == (arm, RANKS[rank])):
                share[round(start * MODE_BINS)] = value
            label = f"{RANKS[rank]} score"
            one.stairs(share, edges, fill=True, alpha=0.55, color=colour, hatch=hatch, label=label)
        one.set(title=arm, xlabel="routing score", xlim=(0, 1), ylim=(0, 1.05 * max(row[3] for row in rows)))
    axes[0, 0].set_ylabel(f"share of tokens per {1 / MODE_BINS:g}")
    axes[0, 0].legend()
    return figure


def score_claims(scores: Scores, on: str, off: str) -> tuple[Claim, ...]:
    """The paper's claim in six parts: with the residual each score's variance is smaller, its mean and range the same.

    Logarithms of ratios, on over off, paired by model; "the same" is an equivalence test (two one-sided t-tests) within
    MARGIN. p by Holm over the six; with fewer than two pairs everything is undecided.
    """
    names = [name for name in scores[on] if name in scores[off]]
    found = []
    for rank, label in enumerate(RANKS):
        for statistic in ("variance", "mean", "range98"):
            pairs = [
                [float(np.log(scores[arm][name].pooled().statistics()[statistic][0, rank])) for name in names]
                for arm in (on, off)
            ]
            found.append((label, statistic, *_tested(*pairs, equivalence=statistic != "variance")))
    corrected = holm([p for *_, p in found])
    return tuple(
        _claim(label, statistic, interval, verdict, len(names), p)
        for (label, statistic, interval, verdict, _), p in zip(found, corrected, strict=True)
    )


def _tested(on: Sequence[float], off: Sequence[float], equivalence: bool) -> tuple[Interval | None, Verdict, float]:
    """The difference of logarithms with its interval, the verdict before correction, and its p."""
    if len(on) < 2 or not all(map(math.isfinite, [*on, *off])):  # a variance of 0 has no logarithm
        return None, "undecided", 1.0
    estimate = paired_difference(on, off)
    interval = Interval(estimate.mean, estimate.low, estimate.high)
    if not equivalence:
        return interval, judge(interval.low, interval.high, below=0.0), estimate.p_value
    margin = math.log1p(MARGIN)
    differences = [a - b for a, b in zip(on, off, strict=True)]
    sides = [mean_interval([sign * d + margin for d in differences]) for sign in (1, -1)]  # both must lie above 0
    inside = max(side.p_value / 2 if side.mean > 0 else 1 - side.p_value / 2 for side in sides)
    if interval.low > margin or interval.high < -margin:
        return interval, "fails", min(1.0, 2 * (1 - inside))
    return interval, "holds" if inside < SIGNIFICANCE else "undecided", inside


def _claim(label: str, statistic: str, interval: Interval | None, verdict: Verdict, pairs: int, p: float) -> Claim:
    name = {"variance": "smaller variance", "mean": "the same mean", "range98": "the same range (percentiles 1 to 99)"}
    statement = f"With the residual the {label} score has {name[statistic]}"
    if interval is None:
        return Claim(statement, "undecided", note=f"no interval from {several(pairs, 'pair')} of runs")
    value, low, high = (math.expm1(x) for x in (interval.value, interval.low, interval.high))
    note = f"{several(pairs, 'pair')} of runs"
    note += "" if statistic == "variance" else f"; the same means within {MARGIN:.0%}"
    return Claim(
        statement, verdict if p < SIGNIFICANCE else "undecided", value, low, high, "relative change", p,
        paper={"variance": "smaller"}.get(statistic, "the same"), note=note,
    )  # fmt: skip
