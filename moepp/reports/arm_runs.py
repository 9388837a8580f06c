"""What a tracker shows of each arm: the report's means with their intervals, and curves over training."""

import statistics
from collections.abc import Mapping, Sequence

from moepp.records import RunRecord
from moepp.reports.comparison import Comparison
from moepp.reports.results import Run
from moepp.reports.tables import speedup_over_seeds, speedups
from moepp.statistics.seeds import Estimate, Ratio
from moepp.tracking.arm_runs import ArmRun

MEANS = ("val_loss", "val_accuracy", "val_bits_per_byte", "ffn_per_token", "tokens_per_s")
CURVES = ("val/loss", "train/loss", "router/ffn_per_token", "router/load_max_over_mean")


def parent_metrics(comparison: Comparison) -> dict[str, float]:
    """`report/<arm>/<name>`, of the sweep's parent run."""
    values = {arm: _values(comparison, arm) for arm in comparison.design.arms}
    return {f"report/{arm}/{name}": value for arm, found in values.items() for name, value in found.items()}


def arm_runs(comparison: Comparison) -> dict[str, ArmRun]:
    """Of every arm with a finished run."""
    runs = comparison.results.runs
    arms = [arm for arm in comparison.design.arms if arm in runs]
    return {arm: ArmRun(_values(comparison, arm), _curves(list(runs[arm].values()))) for arm in arms}


def _values(comparison: Comparison, arm: str) -> dict[str, float]:
    """The speed-up is that of the arms timed together; `.._over_seeds` has an interval."""
    results, difference = comparison.results, comparison.differences.get(arm)
    found: dict[str, float | None] = {}
    for name in MEANS:
        found |= _interval(name, results.estimate(arm, name))
    found |= _interval("val_loss_minus_baseline", difference and difference.estimate)
    found |= {"expert_forward_speedup": speedups(results, arm, "learned")[0]}
    found |= _interval("expert_forward_speedup_over_seeds", speedup_over_seeds(results, arm))
    found |= {"training_tokens_per_s": results.training_speeds.get(arm)}
    return {name: value for name, value in found.items() if value is not None}


def _interval(name: str, found: Estimate | Ratio | None) -> dict[str, float | None]:
    if found is None:
        return {}
    middle = found.value if isinstance(found, Ratio) else found.mean
    return {name: middle, f"{name}_low": found.low, f"{name}_high": found.high}


def _curves(runs: Sequence[Run]) -> Mapping[str, list[tuple[int, float]]]:
    """(training tokens, mean over seeds) wherever all runs have the metric."""
    lines = [_by_tokens(run) for run in runs]
    found = {}
    for name in CURVES:
        series = [{tokens: line[name] for tokens, line in own.items() if name in line} for own in lines]
        shared = sorted(set.intersection(*map(set, series)))
        found[name] = [(tokens, statistics.fmean(one[tokens] for one in series)) for tokens in shared]
    return found


def _by_tokens(run: Run) -> dict[int, dict[str, float]]:
    lines = [line for line in RunRecord(run.path).metrics() if line["step"]]
    per_step = run.budget.get("tokens", 0) / max((line["step"] for line in lines), default=1)
    merged: dict[int, dict[str, float]] = {}
    for line in lines:
        merged.setdefault(round(line["step"] * per_step), {}).update(line)
    return merged
