"""Does the time of the experts follow their FLOPs, as Table 1 says of the complexity?

Paper, Table 1: O(T) for vanilla MoE, O(tau N_FFN T / (tau N_FFN + N_ZC)) for MoE++. Its Table 3 has the times: over
vanilla MoE they fall by less than that. Expected here: executed FFN experts per token follow the formula where training
is long enough for the balance loss; time is a straight line in them with a part that does not shrink.
"""

from moepp.analysis import style
from moepp.analysis.fits import Line, fit_line
from moepp.analysis.results import ROUTINGS, SweepResults
from moepp.analysis.study import Claim, Plot, Runs, Study, StudyContext, StudyReport, Table, judge

TAUS = {"tau_0.10": 0.1, "tau_0.25": 0.25, "tau_0.50": 0.5, "tau_0.75": 0.75, "tau_1.00": 1.0}
MS = {  # expert forward time of Table 3, vanilla MoE and tau as above; FFN and zero-computation experts
    "0.6B": ((535.3, 202.4, 277.8, 387.3, 427.6, 449.6), (8, 4)),
    "1B": ((610.9, 289.3, 384.9, 469.7, 500.3, 530.2), (16, 4)),
    "2B": ((683.4, 417.9, 473.7, 532.7, 561.0, 590.5), (32, 8)),
}
WITHIN = 0.05  # of all slots: how far an FFN share may be from its target and still follow the formula

Points = dict[str, tuple[list[float], list[float]]]  # series -> FFN compute and time, both over vanilla MoE's


def target_share(tau: float, ffn: int, zero_computation: int) -> float:
    return tau * ffn / (tau * ffn + zero_computation)


def paper_points() -> Points:
    return {
        f"paper, {size}": (
            [1.0, *(target_share(tau, *experts) for tau in TAUS.values())],
            [milliseconds / times[0] for milliseconds in times],
        )
        for size, (times, experts) in MS.items()
    }


def measure(context: StudyContext) -> StudyReport:
    from moepp.sweeps.timing import time_arms

    time_arms(context.directories["tau"])
    results = context.results("tau")
    points = _our_points(results) | paper_points()
    lines = {series: fit_line(*xy) for series, xy in points.items()}
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
    fit_table = Table("fits", caption, columns, fits)
    return StudyReport(
        (_compute_table(results), fit_table), (_plot(points, lines),), claims, setup={"timing": results.timing_setup}
    )


def _our_points(results: SweepResults) -> Points:
    points = {}
    for routing in ROUTINGS:
        times = [results.expert_times[arm, routing] for arm in ("vanilla", *TAUS)]
        base = times[0]
        points[f"here, {routing} routing"] = (
            [time.ffn_width / base.ffn_width for time in times],
            [time.median_ms / base.median_ms for time in times],
        )
    return points


def _compute_table(results: SweepResults) -> Table:
    rows = []
    for arm, tau in (("vanilla", None), *TAUS.items()):
        counts = next(iter(results.runs[arm].values())).experts
        zero_computation = sum(counts[kind] for kind in ("zero", "copy", "constant"))
        target = 1.0 if tau is None else target_share(tau, counts["ffn"], zero_computation)
        learned, balanced = (results.expert_times[arm, routing].median_ms for routing in ROUTINGS)
        executed = (results.mean(arm, metric) for metric in ("ffn_share", "ffn_per_token", "flops_per_token"))
        rows.append((arm, target, *executed, learned, balanced))
    columns = ("arm", "FFN share, Table 1", "FFN share, executed", "FFN experts per token", "forward FLOPs per token",
               "learned routing, ms", "balanced routing, ms")  # fmt: skip
    caption = "Expert compute by formula and as executed (means over seeds), and expert forward times."
    return Table("compute", caption, columns, tuple(rows))


def _share_claims(results: SweepResults) -> list[Claim]:
    claims = []
    for arm, tau in TAUS.items():
        counts = next(iter(results.runs[arm].values())).experts
        target = target_share(tau, counts["ffn"], counts["zero"] + counts["copy"] + counts["constant"])
        share = results.estimate(arm, "ffn_share")
        off, half = share.mean - target, share.half_width
        verdict = "undecided"  # until the whole interval lies inside the band or outside
        if half is not None and abs(off) + half < WITHIN:
            verdict = "holds"
        elif half is not None and abs(off) - half > WITHIN:
            verdict = "fails"
        statement = f"{arm}: the executed FFN share is within {WITHIN} of {target:.3f}, off by"
        claims.append(Claim(statement, verdict, off, *((None, None) if half is None else (off - half, off + half))))
    return claims


def _fixed_part(series: str, line: Line) -> Claim:
    low, high = line.intercept - line.intercept_half_width, line.intercept + line.intercept_half_width
    statement = f"{series}: a part of vanilla MoE's expert time does not shrink with FFN compute"
    return Claim(statement, judge(low, high, above=0.0), line.intercept, low, high, "of it")


def _plot(points: Points, lines: dict[str, Line]) -> Plot:
    rows = tuple((series, x, y, lines[series].at(x)) for series, xy in points.items() for x, y in zip(*xy, strict=True))
    caption = (
        "Expert forward time against executed FFN compute, both over vanilla MoE's; the dashed diagonal is time in"
        " proportion to compute."
    )
    data = Table("time", caption, ("series", "FFN compute", "time", "fitted time"), rows)

    def draw():
        figure, axes = style.axes_of(6.4, 4.0)
        axes.plot([0, 1], [0, 1], "--", color=style.GREY, lw=1)
        for (series, (x, y)), colour, marker in zip(points.items(), style.COLOURS, style.MARKERS, strict=False):
            axes.plot(x, y, marker, color=colour, ms=5, label=f"{series} ({lines[series].intercept:.2f} fixed)")
            axes.plot([0, 1], [lines[series].at(0), lines[series].at(1)], color=colour, lw=0.8)
        axes.set_xlim(0, 1.05)
        axes.set_ylim(0, None)
        axes.set_xlabel("FFN compute per token, over vanilla MoE's")
        axes.set_ylabel("expert forward time, over vanilla MoE's")
        axes.legend(loc="lower right")
        return figure

    return Plot(data, draw)


STUDY = Study(
    name="table1",
    title="Complexity of the experts, and their time",
    question="Does the time of the experts follow their FLOPs?",
    expected="compute follows the formula; time is linear in it with a fixed part, so it falls by less.",
    measure=measure,
    reference="Table 1",
    runs=(Runs("tau"),),
    notes=(
        "The paper's points are its Table 3, with the FFN share that the formula promises: what its models reached is"
        " not printed.",
        "Intervals are over the points of a line, six each, not over repeats; a time is the median that"
        " provenance.json describes.",
    ),
)
