"""Figures of a comparison. Each returns the figure with the rows it shows, or None when the records lack its data."""

import math
import statistics
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.reports.comparison import Comparison
from moepp.reports.results import ROUTINGS
from moepp.reports.tables import Rows, speedups
from moepp.reports.trend import trend
from moepp.statistics.style import BLUE, COLOURS, GREY, INK, MARKERS, axes_of, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def differences(comparison: Comparison) -> "tuple[Figure, Rows] | None":
    """Paired differences in validation loss: every seed, the mean and its interval; arms above, effects below."""
    shown = {f"{arm} – {comparison.results.baseline}": d for arm, d in comparison.differences.items()}
    arms = len(shown)
    shown |= {f"effect of {name}": d for name, d in comparison.contrasts.items()}
    if not shown:
        return None
    figure, axes = axes_of(width=6.4, height=1.2 + 0.32 * len(shown))
    rows = [["difference", "n", "mean", "low", "high", "p_holm", "seed:difference"]]
    for name, difference in shown.items():
        estimate = difference.estimate
        numbers = (estimate.n, estimate.mean, estimate.low, estimate.high, difference.p_holm)
        by_seed = " ".join(f"{seed}:{value}" for seed, value in difference.by_seed.items())
        rows.append([name, *("" if value is None else str(value) for value in numbers), by_seed])
    estimates = [difference.estimate for difference in shown.values()]
    half_widths = [math.nan if e.half_width is None else e.half_width for e in estimates]
    means = [e.mean for e in estimates]
    axes.errorbar(
        means, range(len(shown)), xerr=half_widths, fmt="D", color=BLUE, ms=5, capsize=3, label="mean, 95 % interval"
    )
    seeds = [(value, y + 0.24) for y, d in enumerate(shown.values()) for value in d.by_seed.values()]
    axes.plot(*zip(*seeds, strict=True), "o", mfc="none", mec=GREY, ms=4, label="one seed")
    axes.axvline(0, color=INK, lw=0.8)
    axes.axhline(arms - 0.5, color=GREY, lw=0.6)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("difference in validation loss, nats per token (left of 0 is better)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure, rows


def speedup(comparison: Comparison) -> "tuple[Figure, Rows] | None":
    """Expert forward over the baseline's, against the ideal of time proportional to FFN compute."""
    results = comparison.results
    arms = [a for a in comparison.experiment.arms if a != results.baseline and (a, "learned") in results.expert_times]
    found = [(arm, routing, *speedups(results, arm, routing)) for routing in ROUTINGS for arm in arms]
    found = [row for row in found if None not in row]
    if not found:
        return None
    figure, axes = axes_of(width=6.4, height=1.2 + 0.42 * len(arms))
    offset = {"learned": -0.18, "balanced": 0.18}
    for routing, look in (("learned", {"color": BLUE}), ("balanced", {"color": "0.85", "hatch": "////"})):
        bars = [(arms.index(arm) + offset[routing], measured) for arm, r, measured, _ in found if r == routing]
        if bars:
            axes.barh(*zip(*bars, strict=True), height=0.32, edgecolor=INK, lw=0.6, label=f"{routing} routing", **look)
    middles = [arms.index(arm) + offset[routing] for arm, routing, *_ in found]
    ideals = [ideal for *_, ideal in found]
    low, high = [y - 0.18 for y in middles], [y + 0.18 for y in middles]
    axes.vlines(ideals, low, high, color=INK, lw=2.2, label="ideal, baseline's FFN compute / arm's")
    axes.axvline(1, color=INK, lw=0.8, ls="--")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"speed-up of the expert forward over {results.baseline} (baseline time / arm time)")
    figure.legend(loc="outside upper right", ncols=3)
    return figure, [["arm", "routing", "speedup", "ideal_speedup"], *([str(cell) for cell in row] for row in found)]


def curves(comparison: Comparison) -> "tuple[Figure, Rows] | None":
    """Validation loss over tokens and its distance to the baseline; means over the seeds shared with the baseline."""
    results, baseline = comparison.results, comparison.results.baseline
    base_runs = results.runs.get(baseline, {})
    if not any(run.curve for run in base_runs.values()):
        return None
    figure, (loss_axes, gap_axes) = axes_of(width=9.0, height=3.6, columns=2)
    rows = [["arm", "tokens", "val_loss", "minus_baseline"]]
    for arm, colour, marker in zip(comparison.experiment.arms, cycle(COLOURS), cycle(MARKERS), strict=False):
        seeds = sorted(set(results.runs.get(arm, {})) & set(base_runs))
        pairs = [(dict(results.runs[arm][seed].curve), dict(base_runs[seed].curve)) for seed in seeds]
        tokens = sorted(set.intersection(*(set(curve) for pair in pairs for curve in pair))) if pairs else []
        if not tokens:
            continue
        loss = [statistics.fmean(ours[t] for ours, _ in pairs) for t in tokens]
        gap = [statistics.fmean(ours[t] - base[t] for ours, base in pairs) for t in tokens]
        every = max(1, len(tokens) // 8)
        look = {"color": colour, "marker": marker, "ms": 4, "lw": 1.1, "markevery": every}
        loss_axes.plot([t / 1e6 for t in tokens], loss, label=arm, **look)
        gap_axes.plot([t / 1e6 for t in tokens], gap, **look)
        rows += [[arm, f"{t:.0f}", str(x), str(d)] for t, x, d in zip(tokens, loss, gap, strict=True)]
    for axes, label in (
        (loss_axes, "validation loss, nats per token"),
        (gap_axes, f"validation loss minus {baseline}"),
    ):
        axes.set_xlabel("training tokens, millions")
        axes.set_ylabel(label)
    figure.legend(loc="outside right center")
    return figure, rows


FIGURES = {
    "trend": (
        trend,
        "Validation loss against what is varied, mean and 95 % interval over the seeds of each arm by itself; where"
        " timed, the expert forward beside it.",
    ),
    "differences": (differences, "Differences in validation loss: every seed, the mean, its 95 % interval."),
    "speedup": (speedup, "Expert forward: measured speed-up, and the ideal if time followed FFN compute."),
    "curves": (curves, "Validation loss over training, mean over seeds; right: distance to the baseline."),
}


@dataclass(frozen=True)
class Drawn:
    """A figure saved as `name`.svg and `name`.png, and the rows it shows."""

    name: str
    caption: str
    rows: Rows


def draw(comparison: Comparison, out: Path) -> list[Drawn]:
    """Saves every figure the records have data for."""
    drawn = []
    with styled():
        for name, (figure_of, caption) in FIGURES.items():
            if found := figure_of(comparison):
                figure, rows = found
                save(figure, out / name)
                drawn.append(Drawn(name, caption, rows))
    return drawn
