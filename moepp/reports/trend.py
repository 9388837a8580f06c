"""The figure of a sweep's `trend`: validation loss and expert time of arms against a number they differ in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepp.reports.comparison import OBJECTIVE, Comparison
from moepp.reports.results import SweepResults
from moepp.statistics.seeds import Estimate
from moepp.statistics.style import BLUE, GREY, INK, Figure, axes_of
from moepp.statistics.tables import Table

LOOKS = (  # told apart by marker and line, so that grey paper loses nothing
    {"color": INK, "marker": "o", "ls": "-"},
    {"color": BLUE, "marker": "s", "mfc": "none", "ls": "--"},
)
DODGE = 0.012  # of the axis, between series at one x


@dataclass(frozen=True)
class Point:
    arm: str
    x: float | None  # None for the level of a baseline that is in no series
    loss: Estimate
    expert_forward_ms: float | None

    @property
    def half_width(self) -> float:
        return math.nan if self.loss.half_width is None else self.loss.half_width


def trend(comparison: Comparison) -> Figure | None:
    """None where the sweep declares no trend, or no arm of it has run."""
    declared, results = comparison.design.trend, comparison.results
    series = {name: _points(arms, results, declared.x) for name, arms in declared.series.items()} if declared else {}
    drawn = [point for points in series.values() for point in points]
    if not drawn:
        return None
    inside = any(results.baseline in arms for arms in declared.series.values())
    level = [] if inside else _points([results.baseline], results)
    timed = any(point.expert_forward_ms for point in drawn)

    def draw():
        figure, axes = axes_of(width=8.4 if timed else 4.6, height=3.4, columns=1 + timed)
        _draw_loss(axes[0] if timed else axes, series, level)
        if timed:
            _draw_time(axes[1], series, level)
        for one in figure.axes:
            one.set_xlabel(declared.x)
        figure.legend(loc="outside upper right", ncols=3)
        return figure

    return Figure(_data(declared.x, {**series, "baseline": level}), draw)


def _points(arms: Sequence[str], results: SweepResults, x: str = "") -> list[Point]:
    found = []
    for arm in arms:
        time = results.expert_times.get((arm, "learned"))
        value = next((run.config.get(x) for run in results.runs.get(arm, {}).values()), None)
        loss = results.estimate(arm, OBJECTIVE)
        if loss and (not x or isinstance(value, int | float)):
            found.append(Point(arm, value, loss, time and time.median_ms))
    return found


def _draw_loss(axes: Any, series: Mapping[str, Sequence[Point]], level: Sequence[Point]) -> None:
    every_x = [point.x for points in series.values() for point in points]
    step = DODGE * (max(every_x) - min(every_x))
    for place, (name, look) in enumerate(zip(series, LOOKS, strict=False)):
        points = series[name]
        x, y = [point.x + step * place for point in points], [point.loss.mean for point in points]
        half_widths = [point.half_width for point in points]
        axes.errorbar(x, y, yerr=half_widths, label=name, capsize=3, elinewidth=0.8, ms=5, lw=1, **look)
    for point in level:
        axes.axhline(point.loss.mean, color=GREY, ls=":", lw=1.2, label=point.arm)
        if point.loss.half_width is not None:
            axes.axhspan(point.loss.low, point.loss.high, color=GREY, alpha=0.15, lw=0)
    axes.set_ylabel("validation loss, nats per token")


def _draw_time(axes: Any, series: Mapping[str, Sequence[Point]], level: Sequence[Point]) -> None:
    for points, look in zip(series.values(), LOOKS, strict=False):
        timed = [(point.x, point.expert_forward_ms) for point in points if point.expert_forward_ms is not None]
        if timed:
            axes.plot(*zip(*timed, strict=True), ms=5, lw=1, **look)
    for point in level:
        if point.expert_forward_ms is not None:
            axes.axhline(point.expert_forward_ms, color=GREY, ls=":", lw=1.2)
    axes.set_ylim(0, None)
    axes.set_ylabel("expert forward, ms (learned routing)")


def _data(x: str, series: Mapping[str, Sequence[Point]]) -> Table:
    rows = tuple(
        (name, p.arm, p.x, p.loss.n, p.loss.mean, p.loss.low, p.loss.high, p.expert_forward_ms)
        for name, points in series.items()
        for p in points
    )
    caption = (
        "Validation loss against what is varied, mean and 95 % interval over the seeds of each arm by itself; where"
        " timed, the expert forward beside it."
    )
    return Table("trend", caption, ("series", "arm", x, "n", "val_loss", "low", "high", "expert_forward_ms"), rows)
