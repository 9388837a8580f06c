"""Figures of a comparison, each drawn from the rows it shows; None where the records lack its data."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from moepp.reports.comparison import OBJECTIVE, Comparison, Difference
from moepp.reports.effective_speedup import effective_speedups
from moepp.reports.results import ROUTINGS, Run
from moepp.reports.tables import speedups
from moepp.reports.trend import trend
from moepp.statistics.seeds import Estimate, mean_interval
from moepp.statistics.style import (
    BLUE,
    GREY,
    INK,
    Figure,
    axes_of,
    counted,
    hover,
    label_ends,
    looks,
    plain_log,
    room_for,
    wrapped,
)
from moepp.statistics.tables import Cell, Rows, Table, rounded

EFFECT = "effect of "
ROW = 0.32  # inches of a row of a difference
SIDES = {"learned": {"color": BLUE}, "balanced": {"color": "0.85", "hatch": "////"}}


def figures(comparison: Comparison) -> tuple[Figure, ...]:
    """All that the records have data for."""
    found = (figure_of(comparison) for figure_of in (trend, paired, speedup, equal_time, curves))
    return tuple(figure for figure in found if figure)


def paired(comparison: Comparison) -> Figure | None:
    """Of the arms to the baseline, and of the effects."""
    baseline = comparison.results.baseline
    shown = {f"{arm} – {baseline}": d for arm, d in comparison.differences.items()}
    shown |= {f"{EFFECT}{name}": d for name, d in comparison.contrasts.items()}
    rows = [(name, *_numbers(difference)) for name, difference in shown.items()]
    return differences_figure(rows, baseline) if rows else None


def _numbers(difference: Difference) -> tuple[float | str | None, ...]:
    estimate = difference.estimate
    by_seed = " ".join(f"{seed}:{rounded(value)}" for seed, value in difference.by_seed.items())
    return estimate.n, estimate.mean, estimate.low, estimate.high, difference.p_holm, by_seed


def differences_figure(rows: Rows, baseline: str) -> Figure:
    """Every seed, the mean and its interval; arms above, effects below."""
    columns = ("difference", "n", "mean", "low", "high", "p_holm", "seed:difference")
    caption = (
        "Paired differences in final validation loss, nats per token: every seed, the mean and its 95 % t-interval,"
        f" {counted((row[1] for row in rows), 'paired seed')}. Left of 0 is better than {baseline}."
    )
    return Figure(Table("differences", caption, columns, tuple(rows)), partial(_draw_differences, rows, baseline))


def _draw_differences(rows: Rows, baseline: str):
    arms = {row[0].removesuffix(f" – {baseline}"): row for row in rows if not row[0].startswith(EFFECT)}
    effects = {wrapped(row[0].removeprefix(EFFECT)): row for row in rows if row[0].startswith(EFFECT)}
    parts = {f"arm minus {baseline}": arms, "effect": effects}
    parts = {title: part for title, part in parts.items() if part}
    height = 0.9 + 0.3 * len(parts) + ROW * len(rows)
    ratios = [len(part) for part in parts.values()]
    width, rows = room_for([*arms, *effects]), len(parts)
    figure, axes = axes_of(width, height, rows=rows, sharex=True, squeeze=False, height_ratios=ratios)
    panels = axes[:, 0]
    for panel, (title, part) in zip(panels, parts.items(), strict=True):
        _draw_rows(panel, part)
        panel.set_title(title, loc="left", fontsize=9, fontweight="bold")
    panels[-1].set_xlabel("difference in validation loss, nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def _draw_rows(axes: Any, rows: dict[str, Sequence[Cell]]) -> None:
    mean = {"fmt": "D", "color": BLUE, "ms": 5, "capsize": 3, "label": "mean, 95 % interval"}
    half_widths = [math.nan if row[3] is None else row[4] - row[2] for row in rows.values()]
    axes.errorbar([row[2] for row in rows.values()], range(len(rows)), xerr=half_widths, **mean)
    seeds = [(float(pair.split(":")[1]), y + 0.26) for y, row in enumerate(rows.values()) for pair in row[6].split()]
    axes.plot(*zip(*seeds, strict=True), "o", mfc="none", mec=GREY, ms=4, label="one seed")
    hover(axes, ((row[2], y, _said(name, row)) for y, (name, row) in enumerate(rows.items())))
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _said(name: str, row: Sequence[Cell]) -> str:
    _, n, mean, low, high, p, _ = row
    interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    corrected = "" if p is None else f", p = {p:.2g} after Holm"
    return f"{' '.join(name.split())}: {mean:+.4f}{interval}, n = {n}{corrected}"


def speedup(comparison: Comparison) -> Figure | None:
    """Expert forward over the baseline's, under both routings."""
    results = comparison.results
    arms = [a for a in comparison.design.arms if a != results.baseline and (a, "learned") in results.expert_times]
    rows = [(arm, routing, *speedups(results, arm, routing)) for routing in ROUTINGS for arm in arms]
    rows = [row for row in rows if None not in row]
    return speedup_figure(rows, results.baseline) if rows else None


def speedup_figure(rows: Rows, baseline: str) -> Figure:
    """Measured, against the ideal of time in proportion to FFN compute."""
    caption = (
        f"Expert forward, {baseline}'s time over the arm's (medians of repeats of one run of each, in one process; no"
        " interval), and what it would be if time followed FFN compute."
    )
    columns = ("arm", "routing", "speedup", "ideal_speedup")
    return Figure(Table("speedup", caption, columns, tuple(rows)), partial(_draw_speedup, rows, baseline))


def _draw_speedup(rows: Rows, baseline: str):
    arms = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = axes_of(max(6.4, room_for(arms)), height=1.4 + 0.42 * len(arms))
    middle = {routing: 0.36 * place - 0.18 for place, routing in enumerate(SIDES)}
    for routing, look in SIDES.items():
        bars = [(arms.index(arm) + middle[routing], measured) for arm, r, measured, _ in rows if r == routing]
        if bars:
            shape = {"height": 0.32, "edgecolor": INK, "lw": 0.6, "label": f"{routing} routing"}
            axes.barh(*zip(*bars, strict=True), **look, **shape)
    middles = [arms.index(arm) + middle[routing] for arm, routing, *_ in rows]
    said = [f"{arm}, {routing} routing: {measured:.2f}, ideal {ideal:.2f}" for arm, routing, measured, ideal in rows]
    hover(axes, zip((row[2] for row in rows), middles, said, strict=True))
    low, high = [y - 0.18 for y in middles], [y + 0.18 for y in middles]
    axes.vlines([row[-1] for row in rows], low, high, color=INK, lw=2.2, label="ideal: time follows FFN compute")
    axes.axvline(1, color=INK, lw=0.8, ls="--")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(wrapped(f"expert forward: time of {baseline} over that of the arm", 56))
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def equal_time(comparison: Comparison) -> Figure | None:
    """Loss against training time, where the baseline has runs of several lengths and the arms were timed together."""
    results, base = comparison.results, comparison.results.baseline
    found = effective_speedups(results, comparison.design.arms)
    arms = [
        (arm, speedup.seconds, results.estimate(arm, OBJECTIVE)) for arm, speedup in found.items() if speedup.seconds
    ]
    lengths = [(base, length, _mean_loss(runs)) for length, runs in results.at_lengths(base).items() if runs]
    rows = [(name, time, loss.n, loss.mean, loss.low, loss.high) for name, time, loss in (*lengths, *arms)]
    return equal_time_figure(rows, base) if arms else None


def _mean_loss(runs: Mapping[int, Run]) -> Estimate:
    return mean_interval([run.final[OBJECTIVE] for run in runs.values()])


def equal_time_figure(rows: Rows, baseline: str) -> Figure:
    """Does an arm pay at equal wall-clock? It does below the line of the baseline's lengths."""
    caption = (
        f"Validation loss, nats per token, against training time over {baseline}'s own: mean and 95 % t-interval"
        f" ({counted((row[2] for row in rows), 'seed')}). The line joins runs of {baseline} to other lengths, each"
        " with its schedule to its end: an arm below it pays at equal wall-clock. Times are of a training pass, all"
        " arms interleaved in one process; their noise is not shown."
    )
    columns = ("arm", "time", "n", "val_loss", "low", "high")
    return Figure(Table("equal_time", caption, columns, tuple(rows)), partial(_draw_equal_time, rows, baseline))


def _draw_equal_time(rows: Rows, baseline: str):
    arms = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = axes_of(room_for(arms), max(3.4, 0.8 + 0.2 * len(arms)))
    look = looks(arms, baseline)
    for arm in arms:
        own = [row for row in rows if row[0] == arm]
        _, time, _, loss, low, _ = zip(*own, strict=True)
        half_widths = [0 if end is None else mean - end for mean, end in zip(loss, low, strict=True)]
        shape = {"capsize": 3, "elinewidth": 0.8, "ms": 5, "label": arm}
        axes.errorbar(time, loss, yerr=half_widths, **shape, **{**look[arm], **({} if arm == baseline else {"ls": ""})})
        said = [f"{arm}: {mean:.4f} in {at:.2f} times the time, n = {n}" for _, at, n, mean, *_ in own]
        hover(axes, zip(time, loss, said, strict=True))
    lengths = [row[1] for row in rows if row[0] == baseline]
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.set_xlabel(wrapped(f"training time over that of {baseline}", 56))
    axes.set_ylabel("validation loss, nats per token")
    figure.legend(loc="outside right upper")
    return figure


def curves(comparison: Comparison) -> Figure | None:
    """Of every arm, over the seeds it shares with the baseline."""
    lines = {arm: line for arm in comparison.design.arms if (line := _curve(comparison, arm))}
    rows = [(arm, f"{tokens:.0f}", loss, gap) for arm, line in lines.items() for tokens, loss, gap in line]
    baseline, runs = comparison.results.baseline, comparison.results.runs
    paired = [len(set(runs[arm]) & set(runs[baseline])) for arm in lines]
    return curves_figure(rows, baseline, paired) if rows else None


def curves_figure(rows: Rows, baseline: str, paired: Sequence[int]) -> Figure:
    """`paired` counts the seeds of each arm."""
    caption = (
        f"Validation loss over training, nats per token, mean over seeds ({counted(paired, 'paired seed')}); right:"
        f" distance to {baseline}. Intervals of the ends are in the figure of differences."
    )
    columns = ("arm", "tokens", "val_loss", "minus_baseline")
    return Figure(Table("curves", caption, columns, tuple(rows)), partial(_draw_curves, rows, baseline))


def _draw_curves(rows: Rows, baseline: str):
    arms = list(dict.fromkeys(row[0] for row in rows))
    height = max(3.4, 0.8 + 0.155 * len(arms))
    figure, (loss_axes, gap_axes) = axes_of(room_for(arms, axes=7.2), height, columns=2)
    look, ends = looks(arms, baseline), {}
    for arm in arms:
        line = [(float(tokens) / 1e6, loss, gap) for name, tokens, loss, gap in rows if name == arm]
        millions, loss, gap = zip(*line, strict=True)
        ends[arm] = (millions[-1], gap[-1])
        shape = {"ms": 4, "markevery": max(1, len(line) // 8), "clip_on": False, **look[arm]}
        loss_axes.plot(millions, loss, **shape)
        gap_axes.plot(millions, gap, **shape)
        said = [f"{arm}, {t:.3g} M tokens: {a:.4f} ({b:+.4f})" for t, a, b in line]
        hover(loss_axes, zip(millions, loss, said, strict=True))
        hover(gap_axes, zip(millions, gap, said, strict=True))
    loss_axes.set_ylabel("validation loss, nats per token")
    gap_axes.set_ylabel(wrapped(f"minus that of {baseline}", 40))
    for axes in (loss_axes, gap_axes):
        axes.set_xlabel("training tokens, millions")
        axes.set_xlim(right=max(x for x, _ in ends.values()))
    gap_axes.set_ylim(gap_axes.get_ylim())
    label_ends(gap_axes, ends, look, height - 0.6)
    return figure


def _curve(comparison: Comparison, arm: str) -> list[tuple[float, float, float]]:
    """(tokens, loss, loss minus the baseline's) at every validation that all paired runs have."""
    runs, baseline = comparison.results.runs, comparison.results.runs.get(comparison.results.baseline, {})
    ours = runs.get(arm, {})
    pairs = [(dict(ours[seed].curve), dict(baseline[seed].curve)) for seed in sorted(set(ours) & set(baseline))]
    tokens = sorted(set.intersection(*(set(curve) for pair in pairs for curve in pair))) if pairs else []
    return [
        (t, statistics.fmean(a[t] for a, _ in pairs), statistics.fmean(a[t] - b[t] for a, b in pairs)) for t in tokens
    ]
