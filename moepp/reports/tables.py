"""Tables of a comparison: rows as text for the report and the terminal, full-precision columns for the CSV."""

from moepp.reports.comparison import Comparison, Difference
from moepp.reports.effective_speedup import effective_speedup
from moepp.reports.experiment import Experiment
from moepp.reports.results import ROUTINGS, SweepResults
from moepp.statistics.seeds import Estimate

NONE = "–"  # no value: never NaN, never 0
ALONE, CORRECTED = "†", "‡"  # a difference whose own interval excludes 0; one that survives Holm's correction
MEASURED = (
    "val_loss", "val_bits_per_byte", "val_accuracy",
    "ffn_per_token", "ffn_share", "zero_share", "copy_share", "constant_share",
    "dropped_share", "load_max_over_mean", "router_entropy",
    "tokens_per_s", "step_time_ms", "peak_mem_gib", "expert_forward_ms", "expert_forward_ms_balanced", "train_seconds",
    "total_params", "active_params", "flops_per_token", "tokens",
)  # fmt: skip
Rows = list[list[str]]


def number(value: float | None, form: str = ".4f") -> str:
    return NONE if value is None else format(value, form)


def quantity(value: float | None) -> str:
    """1234567 -> 1.23M."""
    if value is None:
        return NONE
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


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
    return f"{counts['ffn']} + {counts['zero']}/{counts['copy']}/{counts['constant']}{shared}"


def speedups(results: SweepResults, arm: str, routing: str) -> tuple[float | None, float | None]:
    """Measured (of medians) and ideal (of FFN compute) speed-up of the expert forward over the baseline."""
    measured = results.ratio(arm, routing, lambda time: time.median_ms)
    ideal = results.ratio(arm, routing, lambda time: time.ffn_width)
    return measured, ideal


def quality_table(comparison: Comparison) -> Rows:
    results, experiment = comparison.results, comparison.experiment
    rows = [["arm", "n", "validation loss", f"minus {results.baseline}", "p (Holm)", "bits per byte", "accuracy"]]
    if experiment.paper:
        rows[0] += ["paper: average, %", f"paper: minus {results.baseline}"]
    for arm in experiment.arms:
        found = comparison.differences.get(arm)
        rows.append([
            arm,
            seeds(comparison, arm),
            plus_minus(results.estimate(arm, "val_loss")),
            signed(found),
            p_value(found),
            plus_minus(results.estimate(arm, "val_bits_per_byte")),
            plus_minus(results.estimate(arm, "val_accuracy")),
        ])  # fmt: skip
        if experiment.paper:
            rows[-1] += _paper_quality(experiment, arm, results.baseline)
    return rows


def _paper_quality(experiment: Experiment, arm: str, baseline: str) -> list[str]:
    if arm not in experiment.paper:
        return [NONE, NONE]
    paper, base = experiment.paper[arm].average, experiment.paper[baseline].average
    return [f"{paper:.1f}", NONE if arm == baseline else f"{paper - base:+.1f}"]


def effects_table(comparison: Comparison) -> Rows:
    """The experiment's contrasts: arms with something against arms without it."""
    experiment = comparison.experiment
    rows = [["effect of", "n", "validation loss, on minus off", "p (Holm)"]]
    if experiment.paper:
        rows[0].append("paper: average, on minus off, %")
    for name in experiment.contrasts:
        found = comparison.contrasts.get(name)
        rows.append([name, str(found.estimate.n if found else 0), signed(found), p_value(found)])
        if experiment.paper:
            rows[-1].append(number(experiment.paper_effect(name), "+.2f"))
    return rows


def cost_table(comparison: Comparison) -> Rows:
    """Expert compute and speed; `ideal` is the speed-up if time were proportional to the timed batch's FFN compute."""
    results, experiment = comparison.results, comparison.experiment
    rows = [["arm", "experts: FFN + zero/copy/constant", "FFN experts per token", "FFN share", "FFN share, target"]]
    rows[0] += [
        f"{routing}: {column}" for routing in ROUTINGS for column in ("expert forward, ms", "speed-up", "ideal")
    ]
    rows[0].append("training, tokens/s")
    if experiment.paper:
        rows[0] += ["paper: FFN share", "paper: speed-up"]
    for arm in experiment.arms:
        row = [arm, experts(results, arm), number(results.mean(arm, "ffn_per_token"), ".3f")]
        row += [number(results.mean(arm, "ffn_share"), ".3f"), number(results.target_share(arm), ".3f")]
        for routing in ROUTINGS:
            time = results.expert_times.get((arm, routing))
            measured, ideal = speedups(results, arm, routing)
            row += [number(time and time.median_ms, ".2f"), number(measured, ".2f"), number(ideal, ".2f")]
        row.append(number(results.training_speeds.get(arm), ".0f"))
        if experiment.paper:
            paper = experiment.paper.get(arm)
            row += [number(paper and paper.ffn_share, ".3f"), number(paper and paper.speedup, ".2f")]
        rows.append(row)
    return rows


def paper_table(experiment: Experiment) -> Rows:
    """The paper's own rows; where it has several sizes, the one beside ours first."""
    sizes = {experiment.paper_size: experiment.paper} | dict(experiment.paper_sizes)
    rows = [["size", "arm", *experiment.tasks, "average", f"without {experiment.noisy_task}", "FFN share",
             "expert forward, ms", "speed-up"]]  # fmt: skip
    for size, by_arm in sizes.items():
        for arm, row in by_arm.items():
            means = [f"{row.average:.1f}", f"{experiment.average_without_noisy_task(row):.2f}", f"{row.ffn_share:.3f}"]
            times = [number(row.expert_forward_ms, ".1f"), number(row.speedup, ".2f")]
            rows.append([size.upper(), arm, *(f"{score:.1f}" for score in row.scores), *means, *times])
    return rows


def effective_table(comparison: Comparison) -> Rows:
    """Tokens and time that the baseline needs to reach each arm's final loss, over the arm's own."""
    results = comparison.results
    rows = [["arm", "n", "baseline's tokens / arm's", "interval", "training speed", "effective speed-up"]]
    for arm in comparison.experiment.arms:
        found = effective_speedup(results, arm)
        if found is None or arm == results.baseline:
            continue
        n = f"{found.log_tokens.n}" + (f" ({found.censored} censored)" if found.censored else "")
        interval = "{:.2f} to {:.2f}".format(*found.interval) if found.interval else NONE
        time = NONE if found.time is None else f"{found.bound}{found.time:.2f}"
        rows.append([arm, n, f"{found.bound}{found.tokens:.2f}", interval, number(found.speed, ".2f"), time])
    return rows


def budget_table(comparison: Comparison) -> Rows:
    results = comparison.results
    budgets = {
        "total_params": "total parameters",
        "active_params": "activated parameters",
        "flops_per_token": "forward FLOPs/token",
        "tokens": "training tokens",
    }
    rows = [["arm", *budgets.values(), "training time, s", "peak memory, GiB"]]
    for arm in comparison.experiment.arms:
        row = [arm, *(quantity(results.mean(arm, name)) for name in budgets)]
        row += [number(results.mean(arm, "train_seconds"), ".0f"), number(results.mean(arm, "peak_mem_gib"), ".2f")]
        rows.append(row)
    return rows


def csv_table(comparison: Comparison) -> Rows:
    """One row per arm: every mean with its interval, differences, times and the paper's numbers, at full precision."""
    results, experiment = comparison.results, comparison.experiment
    rows = []
    for arm in experiment.arms:
        found = comparison.differences.get(arm)
        cells = {
            "arm": arm,
            "experts": experts(results, arm),
            "seeds": " ".join(map(str, sorted(results.runs.get(arm, {})))),
        }
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
        if experiment.paper:
            paper = experiment.paper.get(arm)
            cells |= {f"paper_{name}": paper and getattr(paper, name) for name in ("average", "ffn_share", "speedup")}
        rows.append(cells)
    return [list(rows[0]), *(["" if value is None else str(value) for value in cells.values()] for cells in rows)]


def terminal_table(comparison: Comparison) -> str:
    """The short form for the end of a command, within 120 columns."""
    results, experiment = comparison.results, comparison.experiment
    rows = [
        [
            "arm",
            "n",
            "loss",
            f"minus {results.baseline}",
            "p",
            "bpb",
            "FFN/tok",
            "speed-up",
            "ideal",
            "tokens/s",
        ]
    ]
    if experiment.paper:
        rows[0].append("paper %")
    for arm in experiment.arms:
        found = comparison.differences.get(arm)
        measured, ideal = speedups(results, arm, "learned")
        rows.append([
            arm,
            seeds(comparison, arm),
            number(results.mean(arm, "val_loss")),
            signed(found),
            p_value(found),
            number(results.mean(arm, "val_bits_per_byte")),
            number(results.mean(arm, "ffn_per_token"), ".2f"),
            number(measured, ".2f"),
            number(ideal, ".2f"),
            number(results.training_speeds.get(arm), ".0f"),
        ])  # fmt: skip
        if experiment.paper:
            paper = experiment.paper.get(arm)
            rows[-1].append(number(paper and paper.average, ".1f"))
    legend = (
        f"loss: validation, ± 95 % interval; {ALONE} excludes 0 alone, {CORRECTED} after Holm's correction, as p is"
    )
    return "\n".join([*aligned(rows), legend])


def aligned(rows: Rows) -> list[str]:
    """First column left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def markdown(rows: Rows) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])


def _interval(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
