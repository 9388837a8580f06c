"""The figure of a sweep's `trend`: validation loss and expert time of arms against a number they differ in."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from moepp.reports.comparison import OBJECTIVE, Comparison
from moepp.reports.results import SweepResults
from moepp.statistics.style import BASELINE, INK, Figure, Look, axes_of, counted, looks
from moepp.statistics.tables import Cell, Table

DODGE = 0.012  # of the axis, between series at one x
LEVEL = "baseline"  # the series of a baseline that is in no other
TrendRow = Sequence[Cell]  # series, arm, x, n, loss, low, high, expert forward in ms


def trend(comparison: Comparison) -> Figure | None:
    """None where the sweep declares no trend, or no arm of it has run."""
    declared, results = comparison.design.trend, comparison.results
    series = declared.series if declared else {}
    rows = [row for name, arms in series.items() for row in _rows(name, arms, results, declared.x)]
    if not rows:
        return None
    inside = any(results.baseline in arms for arms in series.values())
    level = [] if inside else _rows(LEVEL, [results.baseline], results)
    return trend_figure([*rows, *level], declared.x)


def _rows(series: str, arms: Sequence[str], results: SweepResults, x: str = "") -> Iterable[TrendRow]:
    for arm in arms:
        time = results.expert_times.get((arm, "learned"))
        value = next((run.config.get(x) for run in results.runs.get(arm, {}).values()), None)
        loss = results.estimate(arm, OBJECTIVE)
        if loss and (not x or isinstance(value, int | float)):
            yield series, arm, value, loss.n, loss.mean, loss.low, loss.high, time and time.median_ms


def trend_figure(rows: Sequence[TrendRow], x: str) -> Figure:
    """Loss over `x`; beside it the expert forward, where there are times."""
    caption = (
        f"Validation loss, nats per token, against {x}: mean and 95 % t-interval of each arm by itself"
        f" ({counted((row[3] for row in rows), 'seed')}; band: of the baseline); where timed, the expert forward, ms,"
        " median of repeats of one run."
    )
    columns = ("series", "arm", x, "n", "val_loss", "low", "high", "expert_forward_ms")
    return Figure(Table("trend", caption, columns, tuple(rows)), partial(_draw, rows, x))


def _draw(rows: Sequence[TrendRow], x: str) -> Any:
    timed = any(row[-1] for row in rows if row[0] != LEVEL)
    figure, axes = axes_of(width=8.4 if timed else 4.6, height=3.4, columns=1 + timed)
    names = dict.fromkeys(row[0] for row in rows if row[0] != LEVEL)
    series = {name: [row for row in rows if row[0] == name] for name in names}
    level = [row for row in rows if row[0] == LEVEL]
    look = looks(series)
    _draw_loss(axes[0] if timed else axes, series, look, level)
    if timed:
        _draw_time(axes[1], series, look, level)
    for one in figure.axes:
        one.set_xlabel(x)
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def _draw_loss(axes: Any, series: dict[str, list[TrendRow]], look: dict[str, Look], level: Sequence[TrendRow]) -> None:
    every_x = [row[2] for rows in series.values() for row in rows]
    step = DODGE * (max(every_x) - min(every_x))
    for place, (name, rows) in enumerate(series.items()):
        middles, means = [row[2] + step * place for row in rows], [row[4] for row in rows]
        half_widths = [0 if row[5] is None else row[6] - row[4] for row in rows]
        axes.errorbar(middles, means, yerr=half_widths, label=name, capsize=3, elinewidth=0.8, ms=5, **look[name])
    for _, arm, _, _, mean, low, high, _ in level:
        axes.axhline(mean, color=INK, lw=BASELINE["lw"], label=arm)
        if low is not None:
            axes.axhspan(low, high, color=INK, alpha=0.12, lw=0)
    axes.set_ylabel("validation loss, nats per token")


def _draw_time(axes: Any, series: dict[str, list[TrendRow]], look: dict[str, Look], level: Sequence[TrendRow]) -> None:
    for name, rows in series.items():
        timed = [(row[2], row[-1]) for row in rows if row[-1] is not None]
        if timed:
            axes.plot(*zip(*timed, strict=True), ms=5, **look[name])
    for row in level:
        if row[-1] is not None:
            axes.axhline(row[-1], color=INK, lw=BASELINE["lw"])
    axes.set_ylim(0, 1.08 * max(row[-1] for rows in (*series.values(), level) for row in rows if row[-1]))
    axes.set_ylabel("expert forward, ms (learned routing)")
