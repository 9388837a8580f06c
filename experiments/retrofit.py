"""Which zero-computation expert can be added to a trained model, and what does the gating residual do there?

The sweep's own report, and beside it the divergence from the teacher at each step of the way: calibrated and untrained,
with trained routers, with trained experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from moepp.records import RunRecord
from moepp.reports.arms import of_sweep
from moepp.reports.experiment import Context, Findings
from moepp.reports.results import Run, SweepResults
from moepp.statistics.seeds import mean_interval, paired_difference
from moepp.statistics.tables import NONE, Table

SWEEP = "retrofit"
KINDS = ("zero", "copy", "constant", "scaled_copy", "all", "no_residual", "one_zero")
SHARES = ("0.9", "0.75", "0.5")
EXPECTED = (
    "zero experts lead without training; the gating residual makes no difference until the routers move, which they do"
    " only a little here"
)
OF_SWEEP = of_sweep(SWEEP)


def measure(context: Context) -> Findings:
    found, results = OF_SWEEP.measure(context), context.results(SWEEP)
    tables = (
        stages(results, "divergence", "KL(teacher || model) on held-out text, nats per token"),
        stages(results, "bits_per_byte", "Bits per byte of held-out text"),
        differences(results),
        shares(results),
    )
    sections = {"From calibrated to trained": (*tables, READING), **found.sections}
    return replace(found, sections=sections, summary=tables[0])


READING = """\
`untrained`: calibrated by quantile on one batch, nothing learnt. `routers`: routers and new experts have learnt the
teacher's distribution. `experts`: the family's experts too. Means over seeds, `±` the half width of a 95 % t-interval.
Each pair of stages is of the same runs, so their difference is surer than the intervals say."""


def stages(results: SweepResults, metric: str, caption: str) -> Table:
    """One row per kind and share."""
    rows = []
    for kind in KINDS:
        for share in SHARES:
            routers, experts = (results.runs.get(arm, {}) for arm in (f"{kind}_{share}", f"{kind}_{share}_experts"))
            trained = final(f"val_{metric}")
            cells = (said(routers, untrained(f"val/{metric}")), said(routers, trained), said(experts, trained))
            rows.append((kind.replace("_", " "), share, *cells))
    return Table("", f"{caption}.", ("new experts", "FFN share", "untrained", "routers", "experts"), with_values(rows))


def with_values(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Those that say something beside what they are of."""
    return tuple(row for row in rows if any(cell != NONE for cell in row[2:]))


def differences(results: SweepResults) -> Table:
    """Of divergences, paired over seeds, which share a teacher."""
    pairs = [(kind, "zero") for kind in KINDS if kind != "zero"] + [("all", "no_residual")]
    rows = [
        (
            f"{kind} minus {other}".replace("_", " "),
            share,
            *(difference(results, kind, other, share, of) for of in STAGES),
        )
        for kind, other in pairs
        for share in SHARES
    ]
    caption = "The same divergence in differences, paired over seeds; `*`: this interval alone excludes 0."
    return Table("", caption, ("new experts", "FFN share", "untrained", "routers"), with_values(rows))


def difference(results: SweepResults, kind: str, other: str, share: str, of: Callable[[Run], float | None]) -> str:
    ours, theirs = (results.runs.get(f"{name}_{share}", {}) for name in (kind, other))
    both = [(of(ours[seed]), of(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    if len(known) < 2:
        return NONE
    found = paired_difference(*zip(*known, strict=True))
    return f"{found.mean:+.4f} ± {found.half_width:.4f}" + (" *" if found.excludes_zero else "")


def shares(results: SweepResults) -> Table:
    """What the calibration and the balance loss have made of the share that was asked for."""
    names = {"untrained": untrained("router/ffn_share"), "trained": final("ffn_share")}
    rows = [
        (arm, *(said(runs, of) for of in names.values()))
        for arm, runs in results.runs.items()
        if arm != results.baseline
    ]
    return Table("", "The share of slots that FFN experts keep, on held-out text.", ("arm", *names), tuple(rows))


def said(runs: Mapping[int, Run], of: Callable[[Run], float | None]) -> str:
    values = [value for run in runs.values() if (value := of(run)) is not None]
    if not values:
        return NONE
    found = mean_interval(values)
    return f"{found.mean:.4f}" + (f" ± {found.half_width:.4f}" if found.half_width is not None else "")


def final(metric: str) -> Callable[[Run], float | None]:
    return lambda run: run.value(metric)


def untrained(metric: str) -> Callable[[Run], float | None]:
    """Of the validation before the first step, the first line that a run writes."""
    return lambda run: next((line[metric] for line in RunRecord(run.path).metrics() if metric in line), None)


STAGES = (untrained("val/divergence"), final("val_divergence"))
EXPERIMENT = replace(OF_SWEEP, measure=measure, expected=EXPECTED)
