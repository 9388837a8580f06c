"""What the numbers say, in sentences. Every word here follows from a comparison; nothing is known beforehand."""

from collections.abc import Callable

from moepp.reports.comparison import BUDGETS, EQUAL_WITHIN, Comparison, Difference
from moepp.reports.tables import signed, speedups
from moepp.statistics.seeds import POWER, SIGNIFICANCE
from moepp.statistics.tables import quantity


def verdict(comparison: Comparison) -> list[str]:
    """One entry per claim: arms, effects, the paper's order, speed."""
    missing = len(missing_runs(comparison))
    preliminary = [f"Preliminary, planned runs still missing: {missing}."] if missing else []
    order = [_order(comparison)] if comparison.design.paper else []
    return [*preliminary, _arms(comparison), *_effects(comparison), *order, _speed(comparison)]


def missing_runs(comparison: Comparison) -> list[str]:
    missing = comparison.results.missing.items()
    return [f"{arm}, seed {seed}: {why}" for (arm, seed), why in missing if arm in comparison.design.arms]


def noise_floor(comparison: Comparison) -> list[str]:
    noise, baseline = comparison.noise, comparison.results.baseline
    said = []
    if noise.baseline_std is not None:
        n = len(comparison.results.runs[baseline])
        said.append(f"Standard deviation of {baseline} over {n} seeds: {noise.baseline_std:.4f} nats per token.")
    if noise.difference_std is None:
        return [*said, "Fewer than two seeds are shared with the baseline: the noise of a difference is unknown."]
    tests = sum(d.p_holm is not None for d in comparison.differences.values())
    return [
        *said,
        f"Standard deviation of a paired difference (same seed on both sides, pooled over arms):"
        f" {noise.difference_std:.4f}.",
        f"Smallest true difference that {noise.pairs} pairs would show with {POWER:.0%} probability:"
        f" {noise.detectable:.4f} for one arm judged alone at {SIGNIFICANCE:.0%},"
        f" {noise.detectable_corrected:.4f} for the clearest of {tests} after correction.",
    ]


def held_equal(comparison: Comparison) -> list[str]:
    """What the arms share within 1 %, what they do not, and whether that is what the sweep declares."""
    results, budgets = comparison.results, comparison.budgets
    equal = [budget.name for budget in budgets.values() if budget.equal]
    said = [f"Equal within {EQUAL_WITHIN:.0%}: {', '.join(equal) or 'nothing'}."]
    for budget in budgets.values():
        if not budget.equal:
            (low, least), (high, most) = budget.low, budget.high
            said.append(
                f"Not equal: {budget.name}, {quantity(least)} ({low}) to {quantity(most)} ({high}),"
                f" {budget.spread:.1%} more."
            )
    shares = {arm: share for arm in comparison.design.arms if (share := results.mean(arm, "ffn_share"))}
    if shares and max(shares.values()) / min(shares.values()) - 1 > EQUAL_WITHIN:
        low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        said.append(
            "The arms are not matched in expert compute: the measured FFN share of all slots runs from"
            f" {shares[low]:.3f} ({low}) to {shares[high]:.3f} ({high})."
        )
    if results.match in budgets and not budgets[results.match].equal:
        said.append(f"The sweep declares {BUDGETS[results.match]} equal; the records say they are not.")
    return said


def _arms(comparison: Comparison) -> str:
    baseline, differences = comparison.results.baseline, comparison.differences
    if not differences:
        return f"No seed is finished in both {baseline} and another arm: nothing can be compared yet."
    tested = [d for d in differences.values() if d.p_holm is not None]
    if not tested:
        return f"No arm shares two seeds with {baseline}: no difference can be told from noise. Run three or more."
    lower = _named(differences, lambda d: d.significant and d.estimate.mean < 0)
    higher = _named(differences, lambda d: d.significant and d.estimate.mean > 0)
    rest = [arm for arm, d in differences.items() if not d.significant]
    said = []
    if lower:
        said.append(f"Lower validation loss than {baseline}, beyond noise: {', '.join(lower)}.")
    if higher:
        said.append(f"Higher validation loss than {baseline}, beyond noise: {', '.join(higher)}.")
    if rest:
        said.append(f"Not distinguishable from {baseline} at this scale: {', '.join(rest)}.")
        said.append("That is no proof of equality: see the noise floor for what would go unseen.")
    return " ".join(said)


def _effects(comparison: Comparison) -> list[str]:
    said = []
    for name, difference in comparison.contrasts.items():
        found = "not distinguishable from none at this scale"
        if difference.significant:
            found = f"{'lower' if difference.estimate.mean < 0 else 'higher'} validation loss, beyond noise"
        said.append(f"Effect of {name}: {signed(difference)}, {found}.")
    return said


def _order(comparison: Comparison) -> str:
    order = comparison.ordering
    if not order.ranked:
        return "The paper's order of the arms cannot be examined: no two arms share a finished seed."
    separated = len(order.confirmed) + len(order.contradicted)
    said = f"The paper's average score ranks {order.ranked} pairs of these arms; here {separated} differ beyond noise. "
    if not separated:
        said += "Its order can be neither confirmed nor refuted at this scale."
    elif not order.contradicted:
        said += "All of these go the paper's way."
    else:
        against = "; ".join(
            f"{worse} has the lower loss, the paper has {better}" for better, worse in order.contradicted
        )
        said += f"{len(order.confirmed)} go the paper's way, {len(order.contradicted)} against it ({against})."
    return (
        f"{said} Noise ignored, our mean losses agree with {order.agreeing} of {order.ranked} (half would by chance);"
        f" without {comparison.design.paper.noisy_task} the paper's own scores keep {order.kept}."
    )


def _speed(comparison: Comparison) -> str:
    results, design = comparison.results, comparison.design
    timed = {arm: times for arm in design.arms if None not in (times := speedups(results, arm, "learned"))}
    timed.pop(results.baseline, None)
    if not timed:
        return "Expert forward times were not measured together for these arms, so no speed-up is shown."
    fastest = max(timed, key=lambda arm: timed[arm][0])
    paper = design.paper
    reported = {arm: speedup for arm in (paper.rows if paper else ()) if (speedup := paper.speedup(arm))}
    shown = dict.fromkeys([fastest, *(arm for arm in timed if arm in reported)])
    said = []
    for arm in shown:
        measured, ideal = timed[arm]
        printed = f", paper {reported[arm]:.2f}x" if arm in reported else ""
        said.append(f"{arm} {measured:.2f}x (ideal for its FFN compute {ideal:.2f}x{printed})")
    return f"Expert forward against {results.baseline}, learned routing: {'; '.join(said)}. Fastest: {fastest}."


def _named(differences: dict[str, Difference], keep: Callable[[Difference], bool]) -> list[str]:
    return [f"{arm} ({signed(d)})" for arm, d in differences.items() if keep(d)]
