"""Two runs, or two arms of sweeps, side by side: what was set, what came out, and what they were made with."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.config import leaves
from moepp.errors import UsageError
from moepp.program import program
from moepp.records import RunRecord, read_json
from moepp.reports.tables import ALONE, MEASURED, shown
from moepp.statistics.seeds import Estimate, paired_difference
from moepp.statistics.tables import NONE, as_lines
from moepp.terminal import width
from moepp.tracking import pages

LABELS = ("name", "runs", "tags", "tracking")  # of the config: where a run lies, not what it is
CIRCUMSTANCES = ("git", "data.digest", "versions", "hardware", "host")  # of the provenance

Pairs = Sequence[tuple[RunRecord, RunRecord]]


@dataclass(frozen=True)
class Side:
    """A run, or the finished runs of a sweep's arm by seed."""

    label: str
    runs: dict[int, RunRecord]
    is_arm: bool
    damaged: tuple[str, ...] = ()  # what is wrong with finished runs that are left out


@dataclass(frozen=True)
class Change:
    """A dotted key with its value on either side; several values where the seeds of an arm differ in it."""

    key: str
    a: str
    b: str


@dataclass(frozen=True)
class MetricDifference:
    """A final metric or budget: both means over the pairs that have it, and `difference`, b minus a."""

    name: str
    a: float
    b: float
    difference: Estimate


def read_side(text: str) -> Side:
    """`<run directory>` or `<sweep directory>:<arm>`. Raises UsageError when it is neither or nothing has finished."""
    if (Path(text) / "config.yaml").is_file():
        record = RunRecord(text)
        if record.status == "damaged":
            raise UsageError(record.damage)
        return Side(text, {record.read("config.yaml").get("seed", 0): record}, is_arm=False)
    folder, colon, arm = text.rpartition(":")
    directory = Path(folder if colon else text)
    sweep = read_json(directory / "sweep.json")
    if sweep is None:
        raise UsageError(f"{text} is neither a run directory nor <sweep directory>:<arm>")
    arms = list(dict.fromkeys(trial["arm"] for trial in sweep["trials"]))
    if arm not in arms:
        raise UsageError(f"{text} names no arm of the sweep; write {directory}:ARM with one of {', '.join(arms)}")
    records = {trial["seed"]: RunRecord(directory / trial["path"]) for trial in sweep["trials"] if trial["arm"] == arm}
    finished = {seed: record for seed, record in sorted(records.items()) if record.status == "done"}
    damaged = tuple(record.damage for record in records.values() if record.status == "damaged")
    if not finished:
        raise UsageError("; ".join([f"no run of {text} has finished", *damaged]))
    return Side(text, finished, True, damaged)


def pair(a: Side, b: Side) -> Pairs:
    """The runs that share a seed; two single runs make a pair whatever their seeds. Raises UsageError for no pair."""
    if not a.is_arm and not b.is_arm:
        return [(*a.runs.values(), *b.runs.values())]
    seeds = [seed for seed in a.runs if seed in b.runs]
    if not seeds:
        raise UsageError(f"{a.label} and {b.label} share no finished seed")
    return [(a.runs[seed], b.runs[seed]) for seed in seeds]


def config_changes(pairs: Pairs) -> list[Change]:
    """Every key of the configs that differs, but for labels."""
    return _changes(pairs, lambda record: _without(record.read("config.yaml"), LABELS))


def provenance_changes(pairs: Pairs) -> list[Change]:
    """What differs in code, data, versions, hardware and host."""
    return _changes(pairs, lambda record: _only(record.read("provenance.json"), CIRCUMSTANCES))


def metric_differences(pairs: Pairs) -> list[MetricDifference]:
    """Final metrics and budgets, those of the reports first; without those that are not finite in any pair."""
    values = [(_numbers(a), _numbers(b)) for a, b in pairs]
    known = {name for pair in values for side in pair for name in side}
    names = [name for name in MEASURED if name in known] + sorted(known - set(MEASURED))
    found = []
    for name in names:
        both = [(a[name], b[name]) for a, b in values if name in a and name in b]
        if both:
            a, b = zip(*both, strict=True)
            found.append(MetricDifference(name, statistics.fmean(a), statistics.fmean(b), paired_difference(b, a)))
    return found


def comparison_address(records: Iterable[RunRecord]) -> str | None:
    """Address of the MLflow page that compares these runs, or shows the only one; None unless all are mirrored."""
    records = list(records)
    mirrored = [read_json(record.path / "mlflow.json") for record in records]
    if not all(run and "experiment_id" in run for run in mirrored):
        return None
    tracker = records[0].read("config.yaml").get("tracking", {}).get("uri") or os.environ.get("MLFLOW_TRACKING_URI", "")
    experiments = {run["run_id"]: run["experiment_id"] for run in mirrored}
    base, runs = pages.address(tracker, pages.known_port(records[0].path.parent.parent)), list(experiments)
    if len(runs) == 1:
        return pages.run_page(base, experiments[runs[0]], runs[0])
    return pages.comparison_page(base, runs, list(experiments.values()))


def side_by_side(a: Side, b: Side) -> str:
    """The whole comparison as text for the terminal."""
    pairs = pair(a, b)
    seeds = f"paired over seeds {', '.join(str(seed) for seed in a.runs if seed in b.runs)}"
    lines = [f"A  {a.label}", f"B  {b.label}", *([seeds] if a.is_arm or b.is_arm else [])]
    lines += [f"damaged and left out: {damage}" for damage in (*a.damaged, *b.damaged)]
    for title, changes in (("config", config_changes(pairs)), ("made with", provenance_changes(pairs))):
        longest = max((len(change.key) for change in changes), default=0)
        rows = [[title, "A", "B"], *([change.key, *_fitting(longest, change.a, change.b)] for change in changes)]
        lines += ["", *(as_lines(shown(rows)) if changes else [f"{title}: no difference"])]
    page = comparison_address(record for pair in pairs for record in pair)
    browser = f"in the browser (make ui): {page}" if page else f"in the browser: not before `{program()} sync`"
    return "\n".join([*lines, "", *_metric_lines(metric_differences(pairs)), "", browser])


def _fitting(taken: int, *values: str) -> list[str]:
    """The values, cut where they do not fit beside each other into a line of which so much is taken."""
    columns = width()
    each = columns and max(12, (columns - max(taken, len("made with"))) // len(values) - 2)
    return [value if each is None or len(value) <= each else f"{value[: each - 3]}..." for value in values]


def _metric_lines(metrics: Sequence[MetricDifference]) -> list[str]:
    if not metrics:
        return ["no final metrics yet: a run has not finished"]
    rows = [["final", "n", "A", "B", "B - A"]]
    for metric in metrics:
        n, difference = metric.difference.n, _signed(metric.difference)
        rows.append([metric.name, str(n), f"{metric.a:.6g}", f"{metric.b:.6g}", difference])
    if all(metric.difference.n == 1 for metric in metrics):
        return as_lines(shown(rows))
    legend = f"n: pairs that have it; ± 95 % interval of the paired difference; {ALONE} excludes 0, each metric alone"
    return [*as_lines(shown(rows)), legend]


def _signed(difference: Estimate) -> str:
    if not difference.std:  # one pair, or a count that no seed changes
        return f"{difference.mean:+.4g}" if difference.mean else "0"
    mark = ALONE if difference.excludes_zero else ""
    return f"{difference.mean:+.4g} ± {difference.half_width:.3g}{mark}"


def _changes(pairs: Pairs, read: Callable[[RunRecord], dict[str, Any]]) -> list[Change]:
    values = [(read(a), read(b)) for a, b in pairs]
    keys = dict.fromkeys(key for pair in values for side in pair for key in side)
    return [
        Change(key, *(_distinct(pair[side].get(key, NONE) for pair in values) for side in (0, 1)))
        for key in keys
        if any(a.get(key, NONE) != b.get(key, NONE) for a, b in values)
    ]


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(value if isinstance(value, str) else json.dumps(value) for value in values))


def _without(tree: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in leaves(tree) if not _inside(key, left_out)}


def _only(tree: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in leaves(tree) if _inside(key, kept)}


def _inside(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _numbers(record: RunRecord) -> dict[str, float]:
    values = record.read("budget.json") | record.final()
    return {key: value for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}
