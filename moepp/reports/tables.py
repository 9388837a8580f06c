"""Tables of a comparison: what is shown, with intervals and marks, and seven digits beside it."""

from collections.abc import Sequence

from moepp.reports.comparison import BUDGETS, SECOND, Comparison, Difference
from moepp.reports.effective_speedup import effective_speedup, effective_speedups
from moepp.reports.recipe import RECIPE, recipe_of
from moepp.reports.results import ROUTINGS, SweepResults
from moepp.statistics.seeds import Estimate, Ratio, ratio_interval
from moepp.statistics.tables import NONE, Cell, Table, number, quantity

ALONE, CORRECTED = "†", "‡"  # a difference whose own interval excludes 0; one that survives Holm's correction
UNSTABLE, CONFOUNDED = "≈", "§"  # of an arm whose seeds make no t-interval; of arms that differ in their recipe too
MEASURED = (
    "val_loss", "val_bits_per_byte", "val_accuracy",
    "ffn_per_token", "ffn_share", "zero_share", "copy_share", "constant_share",
    "train_dropped_share", "train_dropped_share_early", "train_dropped_share_late", "dropped_share",
    "online_loss", "averaged_val_loss", "load_max_over_mean", "router_entropy",
    "tokens_per_s", "step_time_ms", "peak_mem_gib", "expert_forward_ms", "expert_forward_ms_balanced", "train_seconds",
    "total_params", "active_params", "flops_per_token", "tokens",
)  # fmt: skip
EXPERT_TIME = "expert_forward_ms"
LEGEND = f"loss: validation, ± 95 % interval; {ALONE} excludes 0 alone, {CORRECTED} after Holm's correction, as p is"


def shown(rows: Sequence[Sequence[Cell]], caption: str = "") -> Table:
    """Of a header and rows that are text already."""
    head, *body = rows
    return Table("", caption, tuple(head), tuple(map(tuple, body)))


def plus_minus(estimate: Estimate | None, sign: str = "") -> str:
    return NONE if estimate is None else f"{estimate.mean:{sign}.4f} ± {number(estimate.half_width)}"


def of_seeds(results: SweepResults, arm: str, metric: str, form: str = "") -> str:
    """The mean in that format, else with its interval; and how many seeds have the metric, where not all of an arm's
    do.
    """
    estimate = results.estimate(arm, metric)
    if estimate is None:
        return NONE
    shown = format(estimate.mean, form) if form else plus_minus(estimate)
    return shown + (f" (n = {estimate.n})" if estimate.n < len(results.runs[arm]) else "")


def signed(difference: Difference | None) -> str:
    """A difference with its marks."""
    if difference is None:
        return NONE
    alone = difference.robust is None and difference.estimate.excludes_zero
    mark = CORRECTED if difference.significant else ALONE if alone else ""
    mark += (UNSTABLE if difference.robust else "") + (CONFOUNDED if difference.confounds else "")
    return plus_minus(difference.estimate, sign="+") + mark


def typical(difference: Difference | None) -> str:
    """The median over seeds with the interval that any distribution allows; only where the t-interval is no guide."""
    if difference is None or difference.robust is None:
        return NONE
    found = difference.robust
    return f"{found.median:+.4f} [{found.low:+.4f}, {found.high:+.4f}] ({found.level:.0%})"


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


def speedup_over_seeds(results: SweepResults, arm: str) -> Ratio | None:
    """The speed-up of the expert forward as every pair of runs measured it at its end, in processes of their own: what
    differs from one process to the next is in its interval.
    """
    base, ours = (results.by_seed(name, EXPERT_TIME) for name in (results.baseline, arm))
    pairs = [(base[seed], ours[seed]) for seed in ours if seed in base and arm != results.baseline]
    return ratio_interval(*zip(*pairs, strict=True)) if pairs else None


def _with_interval(ratio: Ratio | None) -> str:
    if ratio is None:
        return NONE
    ends = "" if ratio.low is None else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.value:.2f}{ends}"


def overview(comparison: Comparison) -> Table:
    """The short form, for the end of a command, what matters most first, and for a tracker's page."""
    results, paper = comparison.results, comparison.design.paper
    first = ["arm", "n", "loss", f"minus {results.baseline}", "FFN/tok", "speed-up"]  # what fits into 80 columns
    rows = [[*first, "ideal", "p", "bpb", "tokens/s"]]
    rows[0] += ["paper %"] if paper else []
    for arm in comparison.design.arms:
        measured, ideal = speedups(results, arm, "learned")
        *loss, p = _loss_cells(comparison, arm)
        rows.append([
            *loss,
            of_seeds(results, arm, "ffn_per_token", ".2f"),
            number(measured, ".2f"),
            number(ideal, ".2f"),
            p,
            of_seeds(results, arm, "val_bits_per_byte", ".4f"),
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
    rows[0] += ["typical seed"] if comparison.unstable else []
    rows[0] += ["paper: average, %", f"paper: minus {results.baseline}"] if paper else []
    for arm in comparison.design.arms:
        rows.append([
            *_loss_cells(comparison, arm),
            of_seeds(results, arm, "val_bits_per_byte"),
            of_seeds(results, arm, "val_accuracy"),
            *([typical(comparison.differences.get(arm))] if comparison.unstable else ()),
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
    rows[0] += ["typical seed"] if comparison.unstable else []
    rows[0] += ["paper: difference in average, %"] if paper else []
    for name, contrast in comparison.design.contrasts.items():
        found = comparison.contrasts.get(name)
        rows.append([name, str(found.estimate.n if found else 0), signed(found), p_value(found)])
        rows[-1] += [typical(found)] if comparison.unstable else []
        rows[-1] += [number(paper.effect(contrast), "+.2f")] if paper else []
    return shown(rows)


def cost_table(comparison: Comparison) -> Table:
    """Expert compute and speed; `ideal` is the speed-up if time were proportional to the timed batch's FFN compute."""
    results, paper = comparison.results, comparison.design.paper
    rows = [["arm", "experts: FFN + zero/copy/constant", "FFN experts per token", "FFN share", "FFN share, target"]]
    rows[0].append("busiest FFN expert, times the mean load")
    timed = ("expert forward, ms", "speed-up", "ideal")
    rows[0] += [f"{routing}: {column}" for routing in ROUTINGS for column in timed]
    rows[0].append("speed-up over seeds, 95 %")
    rows[0] += list(DROPPED)
    rows[0] += ["training, tokens/s", *(["paper: FFN share", "paper: speed-up"] if paper else [])]
    for arm in comparison.design.arms:
        row = [arm, experts(results, arm), of_seeds(results, arm, "ffn_per_token", ".3f")]
        row += [of_seeds(results, arm, "ffn_share", ".3f"), number(results.target_share(arm), ".3f")]
        row.append(of_seeds(results, arm, "load_max_over_mean", ".2f"))
        for routing in ROUTINGS:
            time = results.expert_times.get((arm, routing))
            measured, ideal = speedups(results, arm, routing)
            row += [number(time and time.median_ms, ".2f"), number(measured, ".2f"), number(ideal, ".2f")]
        row.append(_with_interval(speedup_over_seeds(results, arm)))
        row += [*_dropped(results, arm), number(results.training_speeds.get(arm), ".0f")]
        if paper:
            printed = paper.rows.get(arm)
            row += [number(printed and printed.ffn_share, ".3f"), number(paper.speedup(arm), ".2f")]
        rows.append(row)
    return shown(rows)


DROPPED = ("dropped in training, %", "first tenth", "last tenth", "by layer")


def _dropped(results: SweepResults, arm: str) -> list[str]:
    """Shares of slots in percent, of all of training, its ends, and every layer."""
    names = [f"train_dropped_share{phase}" for phase in ("", "_early", "_late")]
    shares = [results.mean(arm, name) for name in names]
    layers = []
    while (share := results.mean(arm, f"train_dropped_share_layer_{len(layers) + 1}")) is not None:
        layers.append(f"{100 * share:.0f}")
    return [*(number(share and 100 * share, ".1f") for share in shares), " / ".join(layers) or NONE]


def noise_table(comparison: Comparison) -> Table:
    """What every arm's own scatter lets be seen."""
    rows = [["arm", "n", "sd over seeds", "sd of the difference", "seen alone", "seen after correction", "seeds"]]
    for arm, noise in comparison.noise.items():
        smallest = (noise.std, noise.difference_std, noise.detectable, noise.detectable_corrected)
        state = f"unstable: {comparison.unstable[arm]}" if arm in comparison.unstable else NONE
        rows.append([arm, seeds(comparison, arm), *map(number, smallest), state])
    return shown(rows)


def recipe_table(comparison: Comparison) -> Table:
    """Capacity, balance weight, warm-up and rate of every arm, and in what else its recipe is not the baseline's."""
    rows = [["arm", *RECIPE.values(), "differs from the baseline without being about it"]]
    for arm in comparison.design.arms:
        found, recipe = comparison.differences.get(arm), recipe_of(comparison.results, arm)
        confounds = ", ".join(found.confounds) if found else ""
        rows.append(
            [arm, *(recipe.get(key, NONE) for key in RECIPE), f"{CONFOUNDED} {confounds}" if confounds else NONE]
        )
    return shown(rows)


def second_table(comparison: Comparison) -> Table:
    """The same differences in measures beside the validation loss."""
    found, arms = comparison.second, [arm for arm in comparison.design.arms if arm != comparison.results.baseline]
    rows = [["arm", *(SECOND[name] for name in found)]]
    rows += [[arm, *(_of_pairs(comparison, arm, found[name].get(arm)) for name in found)] for arm in arms]
    return shown(rows)


def _of_pairs(comparison: Comparison, arm: str, difference: Difference | None) -> str:
    """With the number of pairs, where these are fewer than those of the loss."""
    n, main = difference and difference.estimate.n, comparison.differences.get(arm)
    return signed(difference) + (f" (n = {n})" if n and main and n < main.estimate.n else "")


def effective_table(comparison: Comparison) -> Table:
    """Tokens and time that the baseline needs to reach each arm's final loss, over the arm's own, and what the two lose
    in equal time.
    """
    base = comparison.results.baseline
    rows = [["arm", "n", "tokens", "interval", "training speed", "time", "interval", f"minus {base} in equal time"]]
    for arm, found in effective_speedups(comparison.results, comparison.design.arms).items():
        tokens, time = found.tokens, found.time
        row = [arm, str(found.n), str(tokens), tokens.interval, number(found.speed, ".2f")]
        row += [str(time), time.interval] if time else [NONE, NONE]
        rows.append([*row, plus_minus(found.at_equal_time, sign="+")])
    return shown(rows)


def budget_table(comparison: Comparison) -> Table:
    results = comparison.results
    budgets = {name: said for name, said in BUDGETS.items() if name != "train_seconds"}  # which not all seeds may have
    rows = [["arm", *budgets.values(), BUDGETS["train_seconds"], "peak memory, GiB"]]
    for arm in comparison.design.arms:
        row = [arm, *(quantity(results.mean(arm, name)) for name in budgets)]
        row += [of_seeds(results, arm, "train_seconds", ".0f"), of_seeds(results, arm, "peak_mem_gib", ".2f")]
        rows.append(row)
    return shown(rows)


def full_table(comparison: Comparison) -> Table:
    """One row per arm: every mean with its interval, differences, times and the paper's numbers, to seven digits."""
    results, arms = comparison.results, comparison.design.arms
    fewer = [m for m in MEASURED if any(0 < len(results.by_seed(a, m)) < len(results.runs.get(a, {})) for a in arms)]
    rows = [_full_row(comparison, arm, fewer) for arm in arms]
    return Table("table", "Every number of the comparison.", tuple(rows[0]), tuple(tuple(row.values()) for row in rows))


def _full_row(comparison: Comparison, arm: str, fewer: Sequence[str]) -> dict[str, Cell]:
    """`fewer`: metrics that some finished seeds lack."""
    results, found, paper = comparison.results, comparison.differences.get(arm), comparison.design.paper
    trained = " ".join(map(str, sorted(results.runs.get(arm, {}))))
    cells: dict[str, Cell] = {"arm": arm, "experts": experts(results, arm), "seeds": trained}
    for metric in MEASURED:
        cells |= _interval(metric, results.estimate(arm, metric))
        cells |= {f"{metric}_n": len(results.by_seed(arm, metric))} if metric in fewer else {}
    cells["ffn_share_target"] = results.target_share(arm)
    cells |= _interval("difference", found.estimate if found else None)
    robust = found and found.robust
    cells |= {"difference_median": robust and robust.median, "difference_median_low": robust and robust.low}
    cells |= {"difference_median_high": robust and robust.high, "difference_median_level": robust and robust.level}
    cells |= {"unstable": comparison.unstable.get(arm), "confounds": " ".join(found.confounds) if found else None}
    cells |= {"difference_n": found.estimate.n if found else None, "p": found.estimate.p_value if found else None}
    cells |= {"p_holm": found.p_holm if found else None}
    for routing in ROUTINGS:
        time = results.expert_times.get((arm, routing))
        cells |= {f"{routing}_median_ms": time and time.median_ms, f"{routing}_min_ms": time and time.min_ms}
        cells[f"{routing}_speedup"], cells[f"{routing}_ideal_speedup"] = speedups(results, arm, routing)
        cells[f"{routing}_speedup_of_min"] = results.ratio(arm, routing, lambda time: time.min_ms)
    over_seeds = speedup_over_seeds(results, arm)
    cells |= {"speedup_over_seeds": over_seeds and over_seeds.value}
    cells |= {"speedup_over_seeds_low": over_seeds and over_seeds.low}
    cells |= {"speedup_over_seeds_high": over_seeds and over_seeds.high}
    cells["training_tokens_per_s"] = results.training_speeds.get(arm)
    effective = effective_speedup(results, arm)
    for name, crossed in {"tokens": effective and effective.tokens, "time": effective and effective.time}.items():
        cells |= {f"effective_{name}": crossed and crossed.value}
        cells |= {f"effective_{name}_bound": crossed and crossed.beyond.strip()}
        cells |= {f"effective_{name}_low": crossed and crossed.low, f"effective_{name}_high": crossed and crossed.high}
    cells |= _interval("difference_in_equal_time", effective and effective.at_equal_time)
    if paper:
        printed = paper.rows.get(arm)
        cells |= {f"paper_{name}": printed and getattr(printed, name) for name in ("average", "ffn_share")}
        cells["paper_speedup"] = paper.speedup(arm)
    return cells


def _interval(name: str, estimate: Estimate | None) -> dict[str, Cell]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
