"""Tables of a comparison: what is shown, with intervals and marks, and the full precision beside it."""

from collections.abc import Sequence

from moepp.reports.comparison import Comparison, Difference
from moepp.reports.effective_speedup import effective_speedup
from moepp.reports.results import ROUTINGS, SweepResults
from moepp.statistics.seeds import Estimate
from moepp.statistics.tables import NONE, Cell, Table, number, quantity

ALONE, CORRECTED = "†", "‡"  # a difference whose own interval excludes 0; one that survives Holm's correction
MEASURED = (
    "val_loss", "val_bits_per_byte", "val_accuracy",
    "ffn_per_token", "ffn_share", "zero_share", "copy_share", "constant_share",
    "dropped_share", "load_max_over_mean", "router_entropy",
    "tokens_per_s", "step_time_ms", "peak_mem_gib", "expert_forward_ms", "expert_forward_ms_balanced", "train_seconds",
    "total_params", "active_params", "flops_per_token", "tokens",
)  # fmt: skip
LEGEND = f"loss: validation, ± 95 % interval; {ALONE} excludes 0 alone, {CORRECTED} after Holm's correction, as p is"


def shown(rows: Sequence[Sequence[Cell]], caption: str = "") -> Table:
    """Of a header and rows that are text already."""
    head, *body = rows
    return Table("", caption, tuple(head), tuple(map(tuple, body)))


def plus_minus(estimate: Estimate | None, sign: str = "") -> str:
    return NONE if estimate is None else f"{estimate.mean:{sign}.4f} ± {number(estimate.half_width)}"


def signed(difference: Difference | None) -> str:
    """A difference with its mark of significance."""
    if difference is None:
        return NONE
    mark = CORRECTED if difference.significant else ALONE if difference.estimate.excludes_zero else ""
    return plus_minus(difference.estimate, sign="+") + mark


def p_value(difference: Difference | None) -> str:
    if difference is None or difference.p_holm is None:
        return NONE
    return f"{difference.p_holm:.3f}" if difference.p_holm >= 0.001 else "<0.001"


def seeds(comparison: Comparison, arm: str) -> str:
    """The finished seeds of an arm, and the pairs they make with the baseline where these are fewer."""
    n, found = len(comparison.results.runs.get(arm, {})), comparison.differences.get(arm)
    return f"{n} ({found.estimate.n} paired)" if found and found.estimate.n < n else str(n)


def experts(results: SweepResults, arm: str) -> str:
    """`8 + 1/1/2`: FFN experts + zero/copy/constant experts, and shared ones where there are any."""
    counts = next((run.experts for run in results.runs.get(arm, {}).values()), {})
    if not counts:
        return NONE
    shared = f", {counts['shared']} shared" if counts.get("shared") else ""
    others = "".join(f", {count} {kind}" for kind, count in counts.get("others", {}).items())
    return f"{counts['ffn']} + {counts['zero']}/{counts['copy']}/{counts['constant']}{others}{shared}"


def speedups(results: SweepResults, arm: str, routing: str) -> tuple[float | None, float | None]:
    """Measured (of medians) and ideal (of FFN compute) speed-up of the expert forward over the baseline."""
    measured = results.ratio(arm, routing, lambda time: time.median_ms)
    ideal = results.ratio(arm, routing, lambda time: time.ffn_width)
    return measured, ideal


def overview(comparison: Comparison) -> Table:
    """The short form, for the end of a command within 120 columns and for a tracker's page."""
    results, paper = comparison.results, comparison.design.paper
    rows = [["arm", "n", "loss", f"minus {results.baseline}", "p", "bpb", "FFN/tok", "speed-up", "ideal", "tokens/s"]]
    rows[0] += ["paper %"] if paper else []
    for arm in comparison.design.arms:
        measured, ideal = speedups(results, arm, "learned")
        rows.append([
            *_loss_cells(comparison, arm),
            number(results.mean(arm, "val_bits_per_byte")),
            number(results.mean(arm, "ffn_per_token"), ".2f"),
            number(measured, ".2f"),
            number(ideal, ".2f"),
            number(results.training_speeds.get(arm), ".0f"),
        ])  # fmt: skip
        if paper:
            printed = paper.rows.get(arm)
            rows[-1].append(number(printed and printed.average, ".1f"))
    return shown(rows, LEGEND)


def _loss_cells(comparison: Comparison, arm: str) -> list[str]:
    found = comparison.differences.get(arm)
    loss = plus_minus(comparison.results.estimate(arm, "val_loss"))
    return [arm, seeds(comparison, arm), loss, signed(found), p_value(found)]


def quality_table(comparison: Comparison) -> Table:
    results, paper = comparison.results, comparison.design.paper
    rows = [["arm", "n", "validation loss", f"minus {results.baseline}", "p (Holm)", "bits per byte", "accuracy"]]
    rows[0] += ["paper: average, %", f"paper: minus {results.baseline}"] if paper else []
    for arm in comparison.design.arms:
        rows.append([
            *_loss_cells(comparison, arm),
            plus_minus(results.estimate(arm, "val_bits_per_byte")),
            plus_minus(results.estimate(arm, "val_accuracy")),
            *(_paper_quality(comparison, arm) if paper else ()),
        ])  # fmt: skip
    return shown(rows)


def _paper_quality(comparison: Comparison, arm: str) -> list[str]:
    rows, baseline = comparison.design.paper.rows, comparison.results.baseline
    if arm not in rows:
        return [NONE, NONE]
    average, base = rows[arm].average, rows[baseline].average
    return [f"{average:.1f}", NONE if arm == baseline else f"{average - base:+.1f}"]


def effects_table(comparison: Comparison) -> Table:
    """The contrasts: arms with something against arms without it."""
    paper = comparison.design.paper
    rows = [["effect of", "n", "difference in validation loss", "p (Holm)"]]
    rows[0] += ["paper: difference in average, %"] if paper else []
    for name, contrast in comparison.design.contrasts.items():
        found = comparison.contrasts.get(name)
        rows.append([name, str(found.estimate.n if found else 0), signed(found), p_value(found)])
        rows[-1] += [number(paper.effect(contrast), "+.2f")] if paper else []
    return shown(rows)


def cost_table(comparison: Comparison) -> Table:
    """Expert compute and speed; `ideal` is the speed-up if time were proportional to the timed batch's FFN compute."""
    results, paper = comparison.results, comparison.design.paper
    rows = [["arm", "experts: FFN + zero/copy/constant", "FFN experts per token", "FFN share", "FFN share, target"]]
    timed = ("expert forward, ms", "speed-up", "ideal")
    rows[0] += [f"{routing}: {column}" for routing in ROUTINGS for column in timed]
    rows[0] += ["training, tokens/s", *(["paper: FFN share", "paper: speed-up"] if paper else [])]
    for arm in comparison.design.arms:
        row = [arm, experts(results, arm), number(results.mean(arm, "ffn_per_token"), ".3f")]
        row += [number(results.mean(arm, "ffn_share"), ".3f"), number(results.target_share(arm), ".3f")]
        for routing in ROUTINGS:
            time = results.expert_times.get((arm, routing))
            measured, ideal = speedups(results, arm, routing)
            row += [number(time and time.median_ms, ".2f"), number(measured, ".2f"), number(ideal, ".2f")]
        row.append(number(results.training_speeds.get(arm), ".0f"))
        if paper:
            printed = paper.rows.get(arm)
            row += [number(printed and printed.ffn_share, ".3f"), number(paper.speedup(arm), ".2f")]
        rows.append(row)
    return shown(rows)


def effective_table(comparison: Comparison) -> Table:
    """Tokens and time that the baseline needs to reach each arm's final loss, over the arm's own."""
    results = comparison.results
    rows = [["arm", "n", "baseline's tokens / arm's", "interval", "training speed", "effective speed-up"]]
    for arm in comparison.design.arms:
        found = effective_speedup(results, arm)
        if found is None or arm == results.baseline:
            continue
        n = f"{found.log_tokens.n}" + (f" ({found.censored} censored)" if found.censored else "")
        interval = "{:.2f} to {:.2f}".format(*found.interval) if found.interval else NONE
        time = NONE if found.time is None else f"{found.bound}{found.time:.2f}"
        rows.append([arm, n, f"{found.bound}{found.tokens:.2f}", interval, number(found.speed, ".2f"), time])
    return shown(rows)


def budget_table(comparison: Comparison) -> Table:
    results = comparison.results
    budgets = {
        "total_params": "total parameters",
        "active_params": "activated parameters",
        "flops_per_token": "forward FLOPs/token",
        "tokens": "training tokens",
    }
    rows = [["arm", *budgets.values(), "training time, s", "peak memory, GiB"]]
    for arm in comparison.design.arms:
        row = [arm, *(quantity(results.mean(arm, name)) for name in budgets)]
        row += [number(results.mean(arm, "train_seconds"), ".0f"), number(results.mean(arm, "peak_mem_gib"), ".2f")]
        rows.append(row)
    return shown(rows)


def full_table(comparison: Comparison) -> Table:
    """One row per arm: every mean with its interval, differences, times and the paper's numbers, at full precision."""
    rows = [_full_row(comparison, arm) for arm in comparison.design.arms]
    return Table("table", "Every number of the comparison.", tuple(rows[0]), tuple(tuple(row.values()) for row in rows))


def _full_row(comparison: Comparison, arm: str) -> dict[str, Cell]:
    results, found, paper = comparison.results, comparison.differences.get(arm), comparison.design.paper
    trained = " ".join(map(str, sorted(results.runs.get(arm, {}))))
    cells: dict[str, Cell] = {"arm": arm, "experts": experts(results, arm), "seeds": trained}
    for metric in MEASURED:
        cells |= _interval(metric, results.estimate(arm, metric))
    cells["ffn_share_target"] = results.target_share(arm)
    cells |= _interval("difference", found.estimate if found else None)
    cells |= {"difference_n": found.estimate.n if found else None, "p": found.estimate.p_value if found else None}
    cells |= {"p_holm": found.p_holm if found else None}
    for routing in ROUTINGS:
        time = results.expert_times.get((arm, routing))
        cells |= {f"{routing}_median_ms": time and time.median_ms, f"{routing}_min_ms": time and time.min_ms}
        cells[f"{routing}_speedup"], cells[f"{routing}_ideal_speedup"] = speedups(results, arm, routing)
        cells[f"{routing}_speedup_of_min"] = results.ratio(arm, routing, lambda time: time.min_ms)
    cells["training_tokens_per_s"] = results.training_speeds.get(arm)
    effective = effective_speedup(results, arm)
    cells |= {"effective_tokens": effective and effective.tokens, "effective_speedup": effective and effective.time}
    cells |= {"effective_bound": effective and effective.bound.strip()}
    if paper:
        printed = paper.rows.get(arm)
        cells |= {f"paper_{name}": printed and getattr(printed, name) for name in ("average", "ffn_share")}
        cells["paper_speedup"] = paper.speedup(arm)
    return cells


def _interval(name: str, estimate: Estimate | None) -> dict[str, Cell]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
