"""Figures of a comparison, each with the rows it shows; None where the records lack its data."""

import math
import statistics
from itertools import cycle

from moepp.reports.comparison import Comparison, Difference
from moepp.reports.results import ROUTINGS
from moepp.reports.tables import speedups
from moepp.reports.trend import trend
from moepp.statistics.style import BLUE, COLOURS, GREY, INK, MARKERS, Figure, axes_of
from moepp.statistics.tables import Table


def figures(comparison: Comparison) -> tuple[Figure, ...]:
    """All that the records have data for."""
    found = (figure_of(comparison) for figure_of in (trend, differences, speedup, curves))
    return tuple(figure for figure in found if figure)


def differences(comparison: Comparison) -> Figure | None:
    """Paired differences in validation loss: every seed, the mean and its interval; arms above, effects below."""
    shown = {f"{arm} – {comparison.results.baseline}": d for arm, d in comparison.differences.items()}
    arms = len(shown)
    shown |= {f"effect of {name}": d for name, d in comparison.contrasts.items()}
    if not shown:
        return None

    def draw():
        figure, axes = axes_of(width=6.4, height=1.2 + 0.32 * len(shown))
        estimates = [difference.estimate for difference in shown.values()]
        half_widths = [math.nan if e.half_width is None else e.half_width for e in estimates]
        mean = {"fmt": "D", "color": BLUE, "ms": 5, "capsize": 3, "label": "mean, 95 % interval"}
        axes.errorbar([e.mean for e in estimates], range(len(shown)), xerr=half_widths, **mean)
        seeds = [(value, y + 0.24) for y, d in enumerate(shown.values()) for value in d.by_seed.values()]
        axes.plot(*zip(*seeds, strict=True), "o", mfc="none", mec=GREY, ms=4, label="one seed")
        axes.axvline(0, color=INK, lw=0.8)
        axes.axhline(arms - 0.5, color=GREY, lw=0.6)
        axes.set_yticks(range(len(shown)), list(shown))
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("difference in validation loss, nats per token (left of 0 is better)")
        figure.legend(loc="outside upper right", ncols=2)
        return figure

    columns = ("difference", "n", "mean", "low", "high", "p_holm", "seed:difference")
    rows = tuple((name, *_numbers(difference)) for name, difference in shown.items())
    caption = "Differences in validation loss: every seed, the mean, its 95 % interval."
    return Figure(Table("differences", caption, columns, rows), draw)


def _numbers(difference: Difference) -> tuple[float | str | None, ...]:
    estimate = difference.estimate
    by_seed = " ".join(f"{seed}:{value}" for seed, value in difference.by_seed.items())
    return estimate.n, estimate.mean, estimate.low, estimate.high, difference.p_holm, by_seed


def speedup(comparison: Comparison) -> Figure | None:
    """Expert forward over the baseline's, against the ideal of time proportional to FFN compute."""
    results = comparison.results
    arms = [a for a in comparison.design.arms if a != results.baseline and (a, "learned") in results.expert_times]
    rows = [(arm, routing, *speedups(results, arm, routing)) for routing in ROUTINGS for arm in arms]
    rows = [row for row in rows if None not in row]
    if not rows:
        return None

    def draw():
        figure, axes = axes_of(width=6.4, height=1.2 + 0.42 * len(arms))
        offset = {"learned": -0.18, "balanced": 0.18}
        for routing, look in (("learned", {"color": BLUE}), ("balanced", {"color": "0.85", "hatch": "////"})):
            bars = [(arms.index(arm) + offset[routing], measured) for arm, r, measured, _ in rows if r == routing]
            look |= {"height": 0.32, "edgecolor": INK, "lw": 0.6, "label": f"{routing} routing"}
            if bars:
                axes.barh(*zip(*bars, strict=True), **look)
        middles = [arms.index(arm) + offset[routing] for arm, routing, *_ in rows]
        low, high = [y - 0.18 for y in middles], [y + 0.18 for y in middles]
        ideal = {"color": INK, "lw": 2.2, "label": "ideal, baseline's FFN compute / arm's"}
        axes.vlines([row[-1] for row in rows], low, high, **ideal)
        axes.axvline(1, color=INK, lw=0.8, ls="--")
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlabel(f"speed-up of the expert forward over {results.baseline} (baseline time / arm time)")
        figure.legend(loc="outside upper right", ncols=3)
        return figure

    caption = "Expert forward: measured speed-up, and the ideal if time followed FFN compute."
    return Figure(Table("speedup", caption, ("arm", "routing", "speedup", "ideal_speedup"), tuple(rows)), draw)


def curves(comparison: Comparison) -> Figure | None:
    """Validation loss over tokens and its distance to the baseline; means over the seeds shared with the baseline."""
    lines = {arm: line for arm in comparison.design.arms if (line := _curve(comparison, arm))}
    if not lines:
        return None

    def draw():
        figure, (loss_axes, gap_axes) = axes_of(width=9.0, height=3.6, columns=2)
        for (arm, line), colour, marker in zip(lines.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
            tokens, loss, gap = zip(*line, strict=True)
            look = {"color": colour, "marker": marker, "ms": 4, "lw": 1.1, "markevery": max(1, len(line) // 8)}
            loss_axes.plot([t / 1e6 for t in tokens], loss, label=arm, **look)
            gap_axes.plot([t / 1e6 for t in tokens], gap, **look)
        loss_axes.set_ylabel("validation loss, nats per token")
        gap_axes.set_ylabel(f"validation loss minus {comparison.results.baseline}")
        for axes in (loss_axes, gap_axes):
            axes.set_xlabel("training tokens, millions")
        figure.legend(loc="outside right center")
        return figure

    caption = "Validation loss over training, mean over seeds; right: distance to the baseline."
    rows = tuple((arm, f"{tokens:.0f}", loss, gap) for arm, line in lines.items() for tokens, loss, gap in line)
    return Figure(Table("curves", caption, ("arm", "tokens", "val_loss", "minus_baseline"), rows), draw)


def _curve(comparison: Comparison, arm: str) -> list[tuple[float, float, float]]:
    """(tokens, loss, loss minus the baseline's) at every validation that all paired runs have."""
    runs, baseline = comparison.results.runs, comparison.results.runs.get(comparison.results.baseline, {})
    ours = runs.get(arm, {})
    pairs = [(dict(ours[seed].curve), dict(baseline[seed].curve)) for seed in sorted(set(ours) & set(baseline))]
    tokens = sorted(set.intersection(*(set(curve) for pair in pairs for curve in pair))) if pairs else []
    return [
        (t, statistics.fmean(a[t] for a, _ in pairs), statistics.fmean(a[t] - b[t] for a, b in pairs)) for t in tokens
    ]
