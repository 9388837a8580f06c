"""The answer to a sweep's question: its primary contrast in words, then the secondary ones, with and without the runs
that a rule excludes.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from moepp.records import RunRecord
from moepp.reports.comparison import Comparison, Difference
from moepp.reports.results import Run, SweepResults
from moepp.statistics.wording import several
from moepp.sweeps.spec import Contrast, Exclusions, Primary


@dataclass(frozen=True)
class Answer:
    """`first` is the first line of a report; `secondary` follows it."""

    first: str
    secondary: tuple[str, ...]
    excluded: Mapping[tuple[str, int], str] = field(default_factory=dict)  # (arm, seed) -> by which rule


def exclude(results: SweepResults, rules: Exclusions) -> tuple[SweepResults, dict[tuple[str, int], str]]:
    """The results without the runs that a rule excludes, and why each of these is."""
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()] if any(asdict(rules).values()) else []
    excluded = {(run.arm, run.seed): reason for run in runs if (reason := _excluded_by(run, rules))}
    kept = {arm: {s: run for s, run in by.items() if (arm, s) not in excluded} for arm, by in results.runs.items()}
    return replace(results, runs={arm: by_seed for arm, by_seed in kept.items() if by_seed}), excluded


def _excluded_by(run: Run, rules: Exclusions) -> str:
    if (step := rules.loss_above_step) is not None:
        lines = RunRecord(run.path).metrics()
        then = next((line["val/loss"] for line in lines if "val/loss" in line and line["step"] >= step), math.inf)
        if run.final["val_loss"] > then:
            return f"ends at {run.final['val_loss']:.4f}, above its {then:.4f} of step {step}"
    share, target = run.value("ffn_share"), run.target_share
    known = rules.share_off_target is not None and None not in (share, target)
    if known and abs(share - target) > rules.share_off_target:
        return f"FFN share {share:.3f}, further than {rules.share_off_target} from the target {target:.3f}"
    return ""


def answer(
    primary: Primary,
    kept: Comparison,
    whole: Comparison,
    excluded: Mapping[tuple[str, int], str],
    opening: str = "",
) -> Answer | None:
    """`opening` is the contrast that the first line answers where it is not the primary one: its p is then corrected as
    every secondary one's. None where the contrast is none of the comparison's.
    """
    design, baseline = kept.design, kept.results.baseline
    if primary.contrast not in {*design.arms, *design.contrasts}:
        return None
    contrast = design.contrasts.get(primary.contrast) or Contrast([primary.contrast], [baseline])
    found, before = _judged(kept, primary.contrast), _judged(whole, primary.contrast)
    secondary = _secondary(kept, primary.contrast, contrast)
    if opening in secondary:
        difference = secondary.pop(opening)
        first = f"{_sentence(design.contrasts[opening], difference, kept.results, primary.smallest, True)} Secondary."
        others = (_said("Primary", primary.contrast, found),) if found else ()
    else:
        first, others = _sentence(contrast, found, kept.results, primary.smallest), ()
    if excluded and before:
        first += f" With the {several(len(excluded), 'run')} that a rule excludes: {_numbers(before)}."
    others += tuple(_said("Secondary", name, difference, True) for name, difference in secondary.items())
    return Answer(first, others, excluded)


def _judged(comparison: Comparison, name: str) -> Difference | None:
    return comparison.contrasts.get(name) or comparison.differences.get(name)


def _secondary(comparison: Comparison, primary: str, contrast: Contrast) -> dict[str, Difference]:
    """All others that are tested."""
    sides, baseline = comparison.design.contrasts, comparison.results.baseline
    found = {f"{arm} minus {baseline}": d for arm, d in comparison.differences.items() if arm != primary}
    if contrast.minus == [baseline] and len(contrast.arms) == 1:
        found.pop(f"{contrast.arms[0]} minus {baseline}", None)
    found |= {n: d for n, d in comparison.contrasts.items() if n != primary and sides[n] != contrast}
    return {name: d for name, d in found.items() if d.p_holm is not None}


def _said(rank: str, name: str, difference: Difference, corrected: bool = False) -> str:
    verdict = "beyond noise" if difference.significant else "not distinguishable from none"
    told = "" if difference.p_holm is None else f"; {verdict}"
    return f"{rank}, {name}: {_numbers(difference, corrected)}{told}."


def _interval(difference: Difference) -> tuple[float, float | None, float | None]:
    """Centre, low and high: of the median where an arm is unstable."""
    robust, estimate = difference.robust, difference.estimate
    return (robust.median, robust.low, robust.high) if robust else (estimate.mean, estimate.low, estimate.high)


def _numbers(difference: Difference, corrected: bool = False) -> str:
    centre, low, high = _interval(difference)
    what = "median " if difference.robust else ""
    level = f"{difference.robust.level:.0%}" if difference.robust else "95 %"
    said = f"{what}{centre:+.4f} nats per token"
    if low is not None:
        said += f" ({level} interval {low:+.4f} to {high:+.4f})"
    n = f"n = {several(difference.estimate.n, 'paired seed')}"
    p = difference.p_holm
    return f"{said}, {n}" + ("" if p is None else f", p = {p:.2g}{' after Holm' if corrected else ''}")


def _sentence(
    contrast: Contrast,
    found: Difference | None,
    results: SweepResults,
    smallest: float | None,
    corrected: bool = False,
) -> str:
    on, off = (_side(side) for side in (contrast.arms, contrast.minus))
    if found is None:
        return f"No answer yet: {on} and {off} share no finished seed."
    centre, *_ = _interval(found)
    if found.p_holm is None:
        said = f"No answer yet: {on} ends {_apart(centre)} {off} on one seed"
    elif found.significant:
        said = f"{on} ends {_apart(centre)} {off}, beyond noise"
    else:
        said = f"{on} and {off} cannot be told apart here"
    weighed = f", {_weighed(found, smallest, found.significant)}" if smallest else ""
    return f"{said}{weighed}: {_numbers(found, corrected)}{_costs(contrast, results)}."


def _side(arms: Sequence[str]) -> str:
    return arms[0] if len(arms) == 1 else f"the mean of {', '.join(arms[:-1])} and {arms[-1]}"


def _apart(difference: float) -> str:
    return "with a lower validation loss than" if difference < 0 else "with a higher validation loss than"


def _weighed(difference: Difference, smallest: float, beyond_noise: bool) -> str:
    """Against the smallest difference that was said to matter."""
    _, low, high = _interval(difference)
    if low is None or (low < -smallest < high) or (low < smallest < high):
        return f"and whether by the {smallest:g} that matters is open"
    if -smallest <= low and high <= smallest:
        return f"and by less than the {smallest:g} that matters"
    if not beyond_noise:  # as where unstable arms have a sign test, which five seeds cannot pass
        return f"though the whole interval lies beyond the {smallest:g} that matters"
    return f"by more than the {smallest:g} that matters"


def _costs(contrast: Contrast, results: SweepResults) -> str:
    """What the first side spends of the second's, as measured."""
    said = []
    for metric, what in (("ffn_per_token", "FFN experts per token"), ("flops_per_token", "forward FLOPs")):
        on, off = (_mean(results, side, metric) for side in (contrast.arms, contrast.minus))
        if on and off:
            said.append(f"{on / off:.2f} times the {what}" + (f" ({on:.2f} to {off:.2f})" if on < 1000 else ""))
    speeds = results.training_speeds
    if speeds.keys() >= {*contrast.arms, *contrast.minus}:
        on, off = (statistics.fmean(1 / speeds[arm] for arm in side) for side in (contrast.arms, contrast.minus))
        said.append(f"{on / off:.2f} times the training time per token")
    return f"; at {', '.join(said)}" if said else ""


def _mean(results: SweepResults, arms: Sequence[str], metric: str) -> float | None:
    means = [results.mean(arm, metric) for arm in arms]
    return None if None in means else statistics.fmean(means)
