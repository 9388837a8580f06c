"""Does the time of the experts follow their FLOPs, as Table 1 says of the complexity?

Paper, Table 1: O(T) for vanilla MoE, O(tau N_FFN T / (tau N_FFN + N_ZC)) for MoE++. Its Table 3 has the times: over
vanilla MoE they fall by less than that. Expected here: executed FFN experts per token follow the formula where training
is long enough for the balance loss; time is a straight line in them with a part that does not shrink.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.reports.results import ROUTINGS, SweepResults
from moepp.reports.targets import balanced_share
from moepp.statistics import style
from moepp.statistics.claims import Claim, judge
from moepp.statistics.style import Figure
from moepp.statistics.tables import Cell, Table

from .table3 import PAPER, TAUS

if TYPE_CHECKING:
    from moepp.training.settings import RunConfig

WITHIN = 0.05  # of all slots: how far an FFN share may be from its target and still follow the formula
LINE = 3  # points that a line takes


@dataclass(frozen=True)
class Line:
    """Least squares; half widths are of 95 % t-intervals over the points."""

    intercept: float
    slope: float
    intercept_half_width: float
    slope_half_width: float
    residual_std: float

    @classmethod
    def through(cls, x: list[float], y: list[float]) -> "Line":
        from scipy.stats import linregress, t

        fit, freedom = linregress(x, y), len(x) - 2
        wide = float(t.ppf(0.975, freedom))
        residuals = sum((b - fit.intercept - fit.slope * a) ** 2 for a, b in zip(x, y, strict=True))
        half_widths = wide * float(fit.intercept_stderr), wide * float(fit.stderr)
        return cls(float(fit.intercept), float(fit.slope), *half_widths, math.sqrt(residuals / freedom))

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


Points = dict[str, tuple[list[float], list[float]]]  # series -> FFN compute and time, both over vanilla MoE's


def paper_points() -> Points:
    """Of the sizes with a line's worth of rows: its 7B models are two."""
    points = {}
    for size, rows in PAPER.items():
        base = rows["vanilla"].expert_forward_ms
        if len(rows) >= LINE:
            points[f"paper, {size.upper()}"] = (
                [row.ffn_share for row in rows.values()],
                [row.expert_forward_ms / base for row in rows.values()],
            )
    return points


def measure(context: Context) -> Findings:
    results = context.results("tau")
    arms = [arm for arm in ("vanilla", *TAUS) if arm in results.runs]
    points = _our_points(results, arms) | paper_points()
    lines = {series: Line.through(*xy) for series, xy in points.items()}
    claims = (*_share_claims(results), *(_fixed_part(series, line) for series, line in lines.items()))
    fits = tuple(
        (series, line.intercept, line.intercept_half_width, line.slope, line.slope_half_width, line.residual_std)
        for series, line in lines.items()
    )
    columns = ("series", "fixed part", "± of it", "slope", "± of it", "residual")
    caption = (
        "Time = fixed part + slope x FFN compute, over vanilla MoE's time and compute; ± is the half width of a 95 %"
        " interval over the points of the series."
    )
    paths = {arm: next(iter(context.run_directories("tau", arm).values())) for arm in arms}
    tables = (_compute_table(results, paths), Table("fits", caption, columns, fits))
    return Findings(
        tables, (_plot(points, lines),), claims, notes=_missing(arms), setup={"timing": results.timing_setup}
    )


def _missing(arms: list[str]) -> tuple[str, ...]:
    missing = [arm for arm in ("vanilla", *TAUS) if arm not in arms]
    lines = "" if "vanilla" in arms and len(arms) >= LINE else ", so no line is fitted to our times"
    return (f"No finished run of {', '.join(missing)}{lines}.",) if missing else ()


def _our_points(results: SweepResults, arms: list[str]) -> Points:
    """None where vanilla MoE or too many arms have not run."""
    if "vanilla" not in arms or len(arms) < LINE:
        return {}
    points = {}
    for routing in ROUTINGS:
        times = [results.expert_times[arm, routing] for arm in arms]
        base = results.expert_times["vanilla", routing]
        points[f"here, {routing} routing"] = (
            [time.ffn_width / base.ffn_width for time in times],
            [time.median_ms / base.median_ms for time in times],
        )
    return points


def _compute_table(results: SweepResults, paths: Mapping[str, Path]) -> Table:
    from moepp.config import load
    from moepp.training.settings import RunConfig

    rows = []
    for arm, path in paths.items():
        config, experts = load(RunConfig, path / "config.yaml"), next(iter(results.runs[arm].values())).experts
        share, used = results.mean(arm, "ffn_share"), results.mean(arm, "ffn_per_token")
        times = (results.expert_times[arm, routing].median_ms for routing in ROUTINGS)
        flops = (expert_flops(config), expert_flops(config, used))
        rows.append((arm, _target(arm, experts), share, used, *flops, *times))
    columns = ("arm", "FFN share, Table 1", "FFN share, executed", "FFN experts per token",
               "expert FLOPs per token, Table 1", "expert FLOPs per token, executed", "learned routing, ms",
               "balanced routing, ms")  # fmt: skip
    caption = (
        "Expert compute by formula and as executed (means over seeds; forward FLOPs of all layers' FFN and constant"
        " experts, without router and attention), and expert forward times."
    )
    return Table("compute", caption, columns, tuple(rows))


def expert_flops(config: "RunConfig", ffn_per_token: float | None = None) -> float:
    """Forward FLOPs per token of the experts: with so many FFN experts in a layer, or those of a balanced one. Zero
    and copy experts cost none.
    """
    from moepp.models.budget import forward_flops

    part = forward_flops(config.model, config.data.seq_len, ffn_per_token)
    return part["ffn_experts"] + part["constant_experts"]


def _target(arm: str, counts: Mapping[str, int]) -> float:
    zero_computation = sum(counts[kind] for kind in ("zero", "copy", "constant"))
    return balanced_share(TAUS[arm], counts["ffn"], zero_computation) if arm in TAUS else 1.0


def _share_claims(results: SweepResults) -> Iterable[Claim]:
    for arm in TAUS:
        if (share := results.estimate(arm, "ffn_share")) is None:
            continue
        target = _target(arm, next(iter(results.runs[arm].values())).experts)
        off, half = share.mean - target, share.half_width
        verdict = "undecided"  # until the whole interval lies inside the band or outside
        if half is not None and abs(off) + half < WITHIN:
            verdict = "holds"
        elif half is not None and abs(off) - half > WITHIN:
            verdict = "fails"
        statement = f"{arm}: the executed FFN share is within {WITHIN} of {target:.3f}, off by"
        yield Claim(statement, verdict, off, *((None, None) if half is None else (off - half, off + half)))


def _fixed_part(series: str, line: Line) -> Claim:
    low, high = line.intercept - line.intercept_half_width, line.intercept + line.intercept_half_width
    statement = f"{series}: a part of vanilla MoE's expert time does not shrink with FFN compute"
    return Claim(statement, judge(low, high, above=0.0), line.intercept, low, high, "of it")


def _plot(points: Points, lines: dict[str, Line]) -> Figure:
    rows = [(series, x, y, lines[series].at(x)) for series, xy in points.items() for x, y in zip(*xy, strict=True)]
    return time_figure(rows)


def time_figure(rows: Sequence[Sequence[Cell]]) -> Figure:
    """Points and their lines, each through two of its fitted times."""
    caption = (
        "Expert forward time against executed FFN compute, both over vanilla MoE's: each point the median of repeats of"
        " one arm, each line fitted to its series, whose fixed part has an interval in the table of fits; the dashed"
        " diagonal is time in proportion to compute."
    )
    data = Table("time", caption, ("series", "FFN compute", "time", "fitted time"), tuple(rows))
    return Figure(data, partial(_draw, rows))


def _draw(rows: Sequence[Sequence[Cell]]) -> Any:
    figure, axes = style.axes_of(6.4, 4.4)
    axes.plot([0, 1], [0, 1], "--", color=style.GREY, lw=1)
    for series, look in style.looks(row[0] for row in rows).items():
        _, x, y, fitted = zip(*(row for row in rows if row[0] == series), strict=True)
        (x0, y0), (x1, y1) = min(zip(x, fitted, strict=True)), max(zip(x, fitted, strict=True))
        slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
        fixed = y0 - slope * x0
        axes.plot([0, 1], [fixed, fixed + slope], color=look["color"], ls=look["ls"], lw=0.9)
        axes.plot(x, y, look["marker"], color=look["color"], ms=5)
        axes.plot([], [], ms=5, label=f"{series} ({fixed:.2f} fixed)", **look)
    axes.set_xlim(0, 1.05)
    axes.set_ylim(0, None)
    axes.set_xlabel("FFN compute per token, over vanilla MoE's")
    axes.set_ylabel("expert forward time, over vanilla MoE's")
    axes.legend(loc="lower right")
    return figure


EXPERIMENT = Experiment(
    name="table1",
    title="Complexity of the experts, and their time",
    question="Does the time of the experts follow their FLOPs?",
    expected="compute follows the formula; time is linear in it with a fixed part, so it falls by less.",
    measure=measure,
    reference="Table 1",
    runs=(Runs("tau", timed=True),),
    notes=(
        "The paper's points are its Table 3, with the FFN share that the formula promises: what its models reached is"
        " not printed.",
        "Intervals are over the points of a line, not over repeats; a time is the median that"
        " provenance.json describes.",
    ),
)
