"""What the numbers say, in sentences. Every word here follows from a comparison; nothing is known beforehand."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from moepp.reports.comparison import BUDGETS, EQUAL_WITHIN, Comparison, Difference
from moepp.reports.effective_speedup import effective_speedups
from moepp.reports.recipe import RECIPE, recipe_of
from moepp.reports.results import SweepResults
from moepp.reports.tables import CONFOUNDED, UNSTABLE, plus_minus, signed, speedup_over_seeds, speedups, typical
from moepp.statistics.seeds import POWER, SIGNIFICANCE
from moepp.statistics.tables import quantity
from moepp.statistics.wording import among, several

PAYS = ("does not pay", "pays")
DISTURBED = 1.5  # median over fastest call, above which other work has had a part in a timing
DROPS_ALLOWED = 0.03  # of all slots in training, above which a report warns
UNEVEN = 1.5  # times the least uneven arm's busiest FFN expert, above which a report warns
TARGET_WITHIN = 0.02  # of all slots: how near to its target an FFN share must be before an arm is judged


def verdict(comparison: Comparison, secondary: Sequence[str] | None = None) -> list[str]:
    """One entry per claim: arms and effects, the paper's order, speed. `secondary` is what an answer says of arms and
    effects, and stands in their place.
    """
    missing = len(missing_runs(comparison))
    preliminary = [f"Preliminary, planned runs still missing: {missing}."] if missing else []
    judged = [_arms(comparison), *_effects(comparison)] if secondary is None else secondary
    order = [_order(comparison)] if comparison.design.paper else []
    warned = [*_drops(comparison), *_off_target(comparison), *_uneven(comparison)]
    warned += [*_recipes(comparison), *_unstable(comparison)]
    speed = [_speed(comparison), *_wall_clock(comparison)]
    return [*preliminary, *judged, *warned, *order, *speed]


def _drops(comparison: Comparison) -> list[str]:
    results, said = comparison.results, []
    for arm in comparison.design.arms:
        share, early = (results.mean(arm, f"train_dropped_share{phase}") for phase in ("", "_early"))
        if share is not None and share > DROPS_ALLOWED:
            first = "" if early is None else f", {early:.0%} in the first tenth"
            said.append(f"{arm} {share:.1%}{first}")
    if not said:
        return []
    return [
        f"Warning: slots are dropped in training, which validation never does: {'; '.join(said)}. What they cost is"
        " part of these differences; sweep `capacity` measures it."
    ]


def _off_target(comparison: Comparison) -> list[str]:
    results, said = comparison.results, []
    for arm in comparison.design.arms:
        share, target = results.mean(arm, "ffn_share"), results.target_share(arm)
        if None not in (share, target) and abs(share - target) > TARGET_WITHIN:
            said.append(f"{arm} {share:.3f} against {target:.3f}")
    return [f"Warning: the FFN share has not reached its target: {'; '.join(said)}."] if said else []


def _uneven(comparison: Comparison) -> list[str]:
    results = comparison.results
    known = {arm: results.mean(arm, "load_max_over_mean") for arm in comparison.design.arms}
    loads = {arm: load for arm, load in known.items() if load is not None}
    least = min(loads, key=loads.__getitem__, default="")
    uneven = [arm for arm, load in loads.items() if load > UNEVEN * loads[least]]
    if not uneven:
        return []
    said = "; ".join(f"{arm} {loads[arm]:.2f}{_waited_for(results, arm)}" for arm in uneven)
    return [
        f"Warning: the busiest FFN expert has {loads[least]:.2f} times the mean load in {least}, far more elsewhere:"
        f" {said}. One device does not pay for that; expert parallelism and a capacity do."
    ]


def _waited_for(results: SweepResults, arm: str) -> str:
    """What all wait for where every FFN expert has a device of its own."""
    own, base = _busiest_rows(results, arm), _busiest_rows(results, results.baseline)
    if arm == results.baseline or not own or not base:
        return ""
    return f" ({own / base:.2f} times the rows of the busiest in {results.baseline})"


def _busiest_rows(results: SweepResults, arm: str) -> float | None:
    """Of one FFN expert, per token, as far as means over layers tell."""
    run = next(iter(results.runs.get(arm, {}).values()), None)
    experts = run.experts.get("ffn") if run else None
    routed, load = (results.mean(arm, name) for name in ("ffn_per_token", "load_max_over_mean"))
    return routed * load / experts if experts and routed and load else None


def _recipes(comparison: Comparison) -> list[str]:
    differing = {arm: d.confounds for arm, d in comparison.differences.items() if d.confounds}
    if not differing:
        return []
    said = "; ".join(f"{arm} in {', '.join(keys)}" for arm, keys in differing.items())
    return [
        f"Warning: arms differ from {comparison.results.baseline} in their recipe too, which this sweep is not about"
        f" ({CONFOUNDED}): {said}."
    ]


def _unstable(comparison: Comparison) -> list[str]:
    said = "; ".join(f"{arm} {why}" for arm, why in comparison.unstable.items())
    if not said:
        return []
    return [
        f"Unstable: {said}. Their t-intervals ({UNSTABLE}) are no guide; differences are judged by the sign test over"
        " seeds, and the median stands beside them."
    ]


def missing_runs(comparison: Comparison) -> list[str]:
    missing = comparison.results.missing.items()
    return [f"{arm}, seed {seed}: {why}" for (arm, seed), why in missing if arm in comparison.design.arms]


def noise_floor(comparison: Comparison) -> list[str]:
    if all(noise.difference_std is None for noise in comparison.noise.values()):
        return ["Fewer than two seeds are shared with the baseline: the noise of a difference is unknown."]
    family, differences = comparison.design.family, comparison.differences.values()
    tests = len(family.secondary) if family else sum(d.p_holm is not None for d in differences)
    text = {arm: d.estimate.shared.error for arm, d in comparison.differences.items() if d.estimate.shared.error}
    said = [
        f"Seen: the smallest true difference to {comparison.results.baseline} that as many pairs would show with"
        f" {POWER:.0%} probability, alone at {SIGNIFICANCE:.0%} and as the clearest of {tests} after correction"
        f"{' (a primary contrast needs none)' if family else ''}. Each arm by its own scatter, in nats per token.",
    ]
    if not text:
        return [*said, "The error of the held-out text is not known of these records, and not in the intervals."]
    low, high = min(text.values()), max(text.values())
    return [
        *said,
        f"The held-out text adds a standard error of {low:.4f} to {high:.4f} to a difference (over its documents); it"
        " is in the intervals.",
    ]


def held_equal(comparison: Comparison) -> list[str]:
    """Budgets that the arms share within 1 % and those they do not, against what the sweep declares; recipes."""
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
    recipes = {arm: recipe for arm in comparison.design.arms if (recipe := recipe_of(results, arm))}
    for key, name in RECIPE.items():
        values = {arm: recipe[key] for arm, recipe in recipes.items() if key in recipe}
        if values:
            one = len(set(values.values())) == 1
            said.append(f"{name[0].upper()}{name[1:]}: {next(iter(values.values())) if one else _by_value(values)}.")
    return said


def _by_value(values: dict[str, str]) -> str:
    """`1.1 (a, b), none (c)`."""
    arms = {value: [arm for arm in values if values[arm] == value] for value in dict.fromkeys(values.values())}
    return ", ".join(f"{value} ({among(having, values, 'arm')})" for value, having in arms.items())


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
        said.append(f"Not distinguishable from {baseline} at this scale: {among(rest, differences, 'other')}.")
        said.append("That is no proof of equality: see the noise floor for what would go unseen.")
    return " ".join(said)


def _effects(comparison: Comparison) -> list[str]:
    said = []
    for name, difference in comparison.contrasts.items():
        found = "not distinguishable from none at this scale"
        if difference.significant:
            found = f"{'lower' if difference.estimate.mean < 0 else 'higher'} validation loss, beyond noise"
        median = f", typical seed {typical(difference)}" if difference.robust else ""
        said.append(f"Effect of {name}: {signed(difference)}{median}, {found}.")
    return said


def _order(comparison: Comparison) -> str:
    order = comparison.ordering
    if not order.ranked:
        return "The paper's order of the arms cannot be examined: no two arms share a finished seed."
    separated = len(order.confirmed) + len(order.contradicted)
    differ = "differs" if separated == 1 else "differ"
    said = f"The paper's average score ranks {several(order.ranked, 'pair')} of these arms; "
    said += f"here {separated} {differ} beyond noise. "
    if not separated:
        said += "Its order can be neither confirmed nor refuted at this scale."
    elif not order.contradicted:
        said += "It goes the paper's way." if separated == 1 else "All of these go the paper's way."
    else:
        against = "; ".join(
            f"{worse} has the lower loss, the paper has {better}" for better, worse in order.contradicted
        )
        go = "goes" if len(order.confirmed) == 1 else "go"
        said += f"{len(order.confirmed)} {go} the paper's way, {len(order.contradicted)} against it ({against})."
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
        over = speedup_over_seeds(results, arm)
        interval = f", over seeds {over.low:.2f} to {over.high:.2f}" if over and over.low is not None else ""
        said.append(f"{arm} {measured:.2f}x{interval} (ideal for its FFN compute {ideal:.2f}x{printed})")
    line = f"Expert forward against {results.baseline}, learned routing: {'; '.join(said)}."
    if results.timing_scatter > DISTURBED:
        return (
            f"{line} Other work disturbed this timing (median calls took up to {results.timing_scatter:.1f} times as"
            " long as the fastest): remove timing.json and call again on an idle machine before quoting a speed."
        )
    return f"{line} Fastest: {fastest}."


def _wall_clock(comparison: Comparison) -> list[str]:
    """Whether an arm pays where the clock counts: against the baseline's loss after as long, where it has runs of other
    lengths, else where the arm is ahead in both loss and time.
    """
    base, said = comparison.results.baseline, defaultdict(list)
    for arm, speedup in effective_speedups(comparison.results, comparison.design.arms).items():
        if (at := speedup.at_equal_time) is not None:
            verb = "makes no difference beyond noise" if not at.excludes_zero else PAYS[at.mean < 0]
            said[verb].append(f"{arm} ({plus_minus(at, '+')})")
    parts = [f"{verb}: {', '.join(arms)}" for verb, arms in said.items()]
    if parts:
        return [f"In equal training time against {base}, nats: {'; '.join(parts)}."]
    ahead = _ahead_in_loss_and_time(comparison)
    return [f"Lower loss than {base} and no slower, so it pays in equal training time too: {ahead}."] if ahead else []


def _ahead_in_loss_and_time(comparison: Comparison) -> str:
    if comparison.results.timing_scatter > DISTURBED:
        return ""
    speeds = comparison.results.training_speeds
    base = speeds.get(comparison.results.baseline, math.inf)
    lower = [arm for arm, d in comparison.differences.items() if d.significant and d.estimate.mean < 0]
    return ", ".join(f"{arm} ({speeds[arm] / base:.2f} times as fast)" for arm in lower if speeds.get(arm, 0) >= base)


def _named(differences: dict[str, Difference], keep: Callable[[Difference], bool]) -> list[str]:
    return [f"{arm} ({signed(d)})" for arm, d in differences.items() if keep(d)]
