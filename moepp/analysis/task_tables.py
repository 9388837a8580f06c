"""Downstream tasks in a sweep's report: accuracy, and bits per byte of the gold answers against the baseline."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moepp.analysis.experiment import Experiment
from moepp.analysis.results import Run, SweepResults
from moepp.analysis.statistics import Estimate, mean_interval, paired_difference
from moepp.analysis.tables import ALONE, NONE, Rows, number
from moepp.evaluation.results import ACCURACIES, GOLD, NOISY_TASK

Metric = Callable[[Any], float]  # of a run, or of a row of the paper
PRINTED = {  # the harness's names -> the paper's
    "sciq": "SciQ", "piqa": "PIQA", "winogrande": "WinoGrande", "arc_easy": "ARC-E", "hellaswag": "HellaSwag",
    "logiqa": "LogiQA", "boolq": "BoolQ", "lambada_openai": "LAMBADA", "nq_open": "NQ",
}  # fmt: skip


@dataclass(frozen=True)
class TaskColumns:
    """Rows of two tables, by arm. `csv` has both at full precision."""

    tasks: tuple[str, ...]
    accuracy: Rows
    bits_per_byte: Rows
    csv: Rows


def task_columns(results: SweepResults, arms: Sequence[str]) -> TaskColumns | None:
    """The tasks on which every finished run was scored with equally many examples; None where there is no such task.

    Means over tasks are unweighted, taken within each run, with and without BoolQ.
    """
    runs = [run for arm in arms for run in results.runs.get(arm, {}).values()]
    tasks = _common_tasks(runs)
    if not tasks:
        return None
    examples = {task: int(runs[0].final[f"{task}_examples"]) for task in tasks}
    heads = [f"{task} (n={examples[task]})" for task in tasks]
    accuracies = _columns(tasks, lambda task: lambda run: 100 * _accuracy(run, task))
    bits = _columns(tasks, lambda task: lambda run: run.final[f"{task}_{GOLD}"])
    means = [name for name in accuracies if name not in tasks]
    accuracy, bits_rows, csv = [["arm", *heads, *means]], [["arm", *heads, *means]], []
    for arm in arms:
        found = {name: _estimate(results, arm, metric) for name, metric in accuracies.items()}
        accuracy.append([arm, *(_plus_minus(estimate, ".1f") for estimate in found.values())])
        own = {name: _estimate(results, arm, metric) for name, metric in bits.items()}
        against = {name: _difference(results, arm, metric) for name, metric in bits.items()}
        if arm == results.baseline:
            bits_rows.append([arm, *(_plus_minus(estimate, ".3f") for estimate in own.values())])
        else:
            bits_rows.append([arm, *(_plus_minus(estimate, "+.3f") for estimate in against.values())])
        cells = {"arm": arm}
        for kind, estimates in (("accuracy", found), (GOLD, own), (f"{GOLD}_minus_{results.baseline}", against)):
            for name, estimate in estimates.items():
                cells |= {f"{name} {kind}": estimate and estimate.mean}
                cells |= {f"{name} {kind} half width": estimate and estimate.half_width}
        csv.append(cells)
    values = [["" if value is None else str(value) for value in cells.values()] for cells in csv]
    return TaskColumns(tasks, accuracy, bits_rows, [list(csv[0]), *values])


def paper_accuracy(experiment: Experiment, tasks: Sequence[str]) -> Rows | None:
    """The paper's scores of these tasks by arm, with their means; None where it has none of them."""
    printed = [task for task in tasks if PRINTED.get(task) in experiment.tasks]
    if not printed or not experiment.paper:
        return None
    scores = {arm: dict(zip(experiment.tasks, row.scores, strict=True)) for arm, row in experiment.paper.items()}
    columns = _columns(printed, lambda task: lambda arm: scores[arm][PRINTED[task]])
    rows = [[arm, *(f"{score(arm):.1f}" for score in columns.values())] for arm in experiment.arms if arm in scores]
    return [["arm", *columns], *rows]


def _common_tasks(runs: Sequence[Run]) -> tuple[str, ...]:
    suffix = f"_{GOLD}"
    tasks = [name.removesuffix(suffix) for name in (runs[0].final if runs else ()) if name.endswith(suffix)]
    return tuple(task for task in tasks if len({run.final.get(f"{task}_examples") for run in runs}) == 1)


def _columns(tasks: Sequence[str], of: Callable[[str], Metric]) -> dict[str, Metric]:
    """The metric of each task, and its means with and without BoolQ where there are several tasks."""
    columns = {task: of(task) for task in tasks}
    groups = {"mean": list(tasks), "mean without BoolQ": [task for task in tasks if task != NOISY_TASK]}
    if NOISY_TASK not in tasks:
        del groups["mean without BoolQ"]
    for name, kept in groups.items():
        if len(kept) > 1:
            columns[name] = _mean([columns[task] for task in kept])
    return columns


def _mean(metrics: Sequence[Metric]) -> Metric:
    return lambda run: statistics.fmean(metric(run) for metric in metrics)


def _accuracy(run: Run, task: str) -> float:
    return next(run.final[f"{task}_{name}"] for name in ACCURACIES if f"{task}_{name}" in run.final)


def _estimate(results: SweepResults, arm: str, metric: Metric) -> Estimate | None:
    runs = results.runs.get(arm, {})
    return mean_interval([metric(runs[seed]) for seed in sorted(runs)]) if runs else None


def _difference(results: SweepResults, arm: str, metric: Metric) -> Estimate | None:
    """Paired by seed; None without a common seed, and for the baseline itself."""
    ours, base = results.runs.get(arm, {}), results.runs.get(results.baseline, {})
    seeds = sorted(ours.keys() & base.keys())
    if not seeds or arm == results.baseline:
        return None
    return paired_difference([metric(ours[seed]) for seed in seeds], [metric(base[seed]) for seed in seeds])


def _plus_minus(estimate: Estimate | None, form: str) -> str:
    """A mean, its half width, and the mark of a difference (a signed form) whose interval excludes 0."""
    if estimate is None:
        return NONE
    mark = ALONE if form.startswith("+") and estimate.excludes_zero else ""
    return f"{estimate.mean:{form}} ± {number(estimate.half_width, form.removeprefix('+'))}{mark}"
