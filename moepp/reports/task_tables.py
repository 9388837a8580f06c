"""Downstream tasks in a sweep's report: what was asked, accuracy beside chance, and bits per byte of the gold answers,
against the baseline. A difference has one interval, in which seeds and examples are crossed: another training run would
move it, and other questions would.

Shape suffixes: N examples.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moepp.evaluation.results import GOLD, NOISY_TASK, TaskResult, load_task_results
from moepp.reports.paper import PaperScores
from moepp.reports.results import SweepResults
from moepp.reports.tables import ALONE, CORRECTED, shown
from moepp.statistics.clusters import cluster_error
from moepp.statistics.seeds import SIGNIFICANCE, Estimate, SharedError, holm, mean_interval, paired_difference
from moepp.statistics.tables import NONE, Cell, Table, number

PRINTED = {  # the harness's names -> the paper's
    "sciq": "SciQ", "piqa": "PIQA", "winogrande": "WinoGrande", "arc_easy": "ARC-E", "hellaswag": "HellaSwag",
    "logiqa": "LogiQA", "boolq": "BoolQ", "lambada_openai": "LAMBADA", "nq_open": "NQ",
}  # fmt: skip
MEAN, MEAN_WITHOUT = "mean", "mean without BoolQ"
TaskScores = Mapping[str, Mapping[int, Mapping[str, TaskResult]]]  # arm -> seed -> task
HOW_TO_READ = f"""\
Values stand with their 95 % t-interval over seeds. Differences to the baseline are paired: both sides share seeds and
examples. Their interval (95 %, Student's t) holds for other seeds and other examples of these tasks; one seed has none.
`{ALONE}`: it excludes 0. `{CORRECTED}`: it still does at 5 % after Holm's correction over the arms of its row. Nothing
is corrected for the number of tasks. Means over tasks are unweighted, and speak of these tasks alone: nothing here
tells what others would give. Chance: the expected share of right answers of one who draws from the choices; 0 where
there are none to choose from."""
ASKED = (
    "What was asked. Prompts longer than the context are cut: they lose their first examples, and a score then is not"
    " one with that many shots."
)
TextRows = list[list[str]]


@dataclass(frozen=True)
class Measure:
    """A task's value is the sum of `of` over the examples, over the sum of `size`; both are [N]."""

    name: str
    form: str
    of: Callable[[TaskResult], np.ndarray]
    size: Callable[[TaskResult], np.ndarray]

    def value(self, result: TaskResult) -> float:
        return float(self.of(result).sum() / self.size(result).sum())


MEASURES = (
    Measure(
        "accuracy",
        ".1f",
        lambda result: np.array([100 * example.metrics[result.accuracy_metric] for example in result.examples]),
        lambda result: np.ones(len(result.examples)),
    ),
    Measure(
        GOLD,
        ".3f",
        lambda result: np.array([-example.gold_nats / math.log(2) for example in result.examples]),
        lambda result: np.array([example.gold_bytes for example in result.examples], dtype=float),
    ),
)


@dataclass(frozen=True)
class TaskDifference:
    """An arm minus the baseline, over seeds crossed with examples, with p corrected over the arms; None where a single
    seed has no scatter.
    """

    estimate: Estimate
    p_holm: float | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        estimate = self.estimate
        return estimate.mean, estimate.half_width, self.p_holm, estimate.std, estimate.shared.error


@dataclass(frozen=True)
class TaskTables:
    """`setup`, `accuracy` and `gold` are shown; `full` has both measures to seven digits, a line per arm and row;
    `asked` goes into provenance.json; `left_out` names tasks that not all runs answered alike.
    """

    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    baseline: str
    asked: dict[str, dict[str, Any]]
    setup: Table
    accuracy: Table
    accuracy_differences: Table
    gold: Table
    full: Table

    @property
    def section(self) -> tuple[str | Table, ...]:
        """Of the report."""
        missing = f"Not shown, because runs lack them or were asked something else: {', '.join(self.left_out)}."
        left_out = (missing,) if self.left_out else ()
        if not self.tasks:
            return left_out
        accuracy = (self.accuracy, self.accuracy_differences) if self.accuracy.rows else ()
        return (*left_out, self.setup, *accuracy, self.gold, HOW_TO_READ)


def task_tables(results: SweepResults, arms: Sequence[str]) -> TaskTables | None:
    """The tasks on which every finished run was asked the same; None where nothing was asked."""
    scores = {
        arm: {seed: load_task_results(run.path) for seed, run in sorted(results.runs.get(arm, {}).items())}
        for arm in arms
    }
    runs = [stored for by_seed in scores.values() for stored in by_seed.values()]
    named = sorted({task for stored in runs for task in stored})
    if not named:
        return None
    tasks = tuple(task for task in named if _asked_alike(runs, task))
    others = [arm for arm in arms if arm != results.baseline]
    accuracy, gold = MEASURES
    answered = tuple(task for task in tasks if runs[0][task].accuracy_metric)  # the others are whole texts
    measured = {accuracy: answered, gold: tasks}
    values = {measure.name: _values(measure, scores, of) for measure, of in measured.items()}
    base = results.baseline
    found = {measure.name: _differences(measure, scores, of, base, others) for measure, of in measured.items()}
    return TaskTables(
        tasks=tasks,
        left_out=tuple(task for task in named if task not in tasks),
        baseline=base,
        asked={task: _asked(runs, task) for task in tasks},
        setup=shown(_setup(runs, tasks), ASKED),
        accuracy=shown(
            _with_chance(_value_rows(accuracy, values["accuracy"], arms, answered), runs[0]),
            "Accuracy in % (exact match for NQ):",
        ),
        accuracy_differences=shown(
            _difference_rows(accuracy, found["accuracy"], others, answered),
            f"Accuracy minus {base}, in points:",
        ),
        gold=shown(
            _join(
                _value_rows(gold, values[GOLD], [base], tasks),
                _difference_rows(gold, found[GOLD], others, tasks),
            ),
            f"Bits per byte of the gold answer, of {base} and of the other arms minus {base}; lower is better:",
        ),
        full=_full(values, found, arms, tasks),
    )


def paper_accuracy(paper: PaperScores, tasks: Sequence[str]) -> Table | None:
    """The paper's scores of these tasks by arm, with their means; None where it has none of them."""
    printed = [task for task in tasks if PRINTED.get(task) in paper.tasks]
    if not printed:
        return None
    scores = {arm: dict(zip(paper.tasks, row.scores, strict=True)) for arm, row in paper.rows.items()}
    rows = [
        [row, *(f"{statistics.fmean(of_arm[PRINTED[task]] for task in group):.1f}" for of_arm in scores.values())]
        for row, group in _groups(printed).items()
    ]
    return shown([["task", *scores], *rows], f"The paper's, of its {paper.size.upper()} model:")


def _asked_alike(runs: Sequence[Mapping[str, TaskResult]], task: str) -> bool:
    return all(task in stored and stored[task].about.asked == runs[0][task].about.asked for stored in runs)


def _asked(runs: Sequence[Mapping[str, TaskResult]], task: str) -> dict[str, Any]:
    """What was asked, and the contexts and shares of cut prompts of the runs."""
    abouts = [stored[task].about for stored in runs]
    contexts, cuts = sorted({about.context for about in abouts}), [about.cut for about in abouts]
    return {**abouts[0].asked, "context": contexts, "cut": [min(cuts), max(cuts)]}


def _setup(runs: Sequence[Mapping[str, TaskResult]], tasks: Sequence[str]) -> TextRows:
    rows = [["task", "shots", "examples", "prompts cut", "context", "examples of the prompt from", "data", "lm_eval"]]
    for task in tasks:
        asked = _asked(runs, task)
        low, high = (f"{share:.0%}" for share in asked["cut"])
        rows.append([
            task,
            str(asked["shots"]),
            str(asked["examples"]),
            low if low == high else f"{low} to {high}",
            ", ".join(map(str, asked["context"])),
            asked["examples_from"] or NONE,
            asked["data"],
            asked["lm_eval"],
        ])  # fmt: skip
    return rows


def _groups(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Row -> the tasks that it is the mean of."""
    others = [task for task in tasks if task != NOISY_TASK]
    groups = {task: [task] for task in tasks}
    if len(tasks) > 1:
        groups[MEAN] = list(tasks)
    if len(others) > 1 and len(others) < len(tasks):
        groups[MEAN_WITHOUT] = others
    return groups


def _values(measure: Measure, scores: TaskScores, tasks: Sequence[str]) -> dict[str, dict[str, dict[int, float]]]:
    """arm -> row -> seed -> value."""
    found = {}
    for arm, by_seed in scores.items():
        single = {seed: {task: measure.value(stored[task]) for task in tasks} for seed, stored in by_seed.items()}
        found[arm] = {
            row: {seed: statistics.fmean(values[task] for task in group) for seed, values in single.items()}
            for row, group in _groups(tasks).items()
        }
    return found


def _differences(
    measure: Measure, scores: TaskScores, tasks: Sequence[str], baseline: str, others: Sequence[str]
) -> dict[str, dict[str, TaskDifference]]:
    """row -> arm -> difference, of the arms that share a seed with the baseline."""
    seeds = {arm: sorted(scores[arm].keys() & scores[baseline].keys()) for arm in others}
    arms = [arm for arm in others if seeds[arm]]
    if not arms:
        return {}
    errors = {
        arm: {task: _error_over_examples(measure, scores, task, (arm, baseline), seeds[arm]) for task in tasks}
        for arm in arms
    }
    values = _values(measure, scores, tasks)
    found = {}
    for row, group in _groups(tasks).items():
        estimates = {
            arm: paired_difference(
                *([values[side][row][seed] for seed in seeds[arm]] for side in (arm, baseline)),
                shared=_of_mean([errors[arm][task] for task in group]),
            )
            for arm in arms
        }
        tested = {arm: e.p_value for arm, e in estimates.items() if e.p_value is not None}
        p = dict(zip(tested, holm(list(tested.values())), strict=True))
        found[row] = {arm: TaskDifference(estimate, p.get(arm)) for arm, estimate in estimates.items()}
    return found


def _error_over_examples(
    measure: Measure, scores: TaskScores, task: str, sides: tuple[str, str], seeds: Sequence[int]
) -> SharedError:
    """Of the difference of two arms, mean over these seeds."""
    ours_N, theirs_N = (np.mean([measure.of(scores[arm][s][task]) for s in seeds], axis=0) for arm in sides)
    return cluster_error(ours_N - theirs_N, size_N=measure.size(scores[sides[0]][seeds[0]][task]))


def _of_mean(errors: Sequence[SharedError]) -> SharedError:
    """Of the mean over tasks, whose examples are independent."""
    total = math.fsum(error.error**2 for error in errors)
    parts = math.fsum(error.error**4 / error.freedom for error in errors)
    freedom = max(1, int(total**2 / parts)) if parts else 1  # rounding may leave a little less than 1
    return SharedError(math.sqrt(total) / len(errors), freedom)


def chance_share(result: TaskResult) -> float:
    """Right answers by chance, as a share of the examples: one of as many as each example has choices."""
    return statistics.fmean(1 / len(example.choices) if example.choices else 0.0 for example in result.examples)


def _with_chance(rows: TextRows, stored: Mapping[str, TaskResult]) -> TextRows:
    tasks = [row[0] for row in rows[1:] if row[0] in stored]
    by_row = {
        row: statistics.fmean(chance_share(stored[task]) for task in group) for row, group in _groups(tasks).items()
    }
    return [[*row[:1], f"{100 * by_row[row[0]]:.1f}" if row[0] in by_row else "chance", *row[1:]] for row in rows]


def _value_rows(
    measure: Measure, values: Mapping[str, Mapping[str, Mapping[int, float]]], arms: Sequence[str], tasks: Sequence[str]
) -> TextRows:
    rows = [["task", *arms]]
    for row in _groups(tasks):
        cells = []
        for arm in arms:
            estimate = mean_interval(list(values[arm][row].values())) if values[arm].get(row) else None
            cells.append(_plus_minus(estimate, measure.form))
        rows.append([row, *cells])
    return rows


def _difference_rows(
    measure: Measure, found: Mapping[str, Mapping[str, TaskDifference]], arms: Sequence[str], tasks: Sequence[str]
) -> TextRows:
    rows = [["task", *arms]]
    for row in _groups(tasks):
        rows.append([row, *(_cell(found.get(row, {}).get(arm), f"+{measure.form}") for arm in arms)])
    return rows


def _cell(difference: TaskDifference | None, form: str) -> str:
    if difference is None:
        return NONE
    estimate, p = difference.estimate, difference.p_holm
    mark = "" if not estimate.excludes_zero else CORRECTED if p is not None and p < SIGNIFICANCE else ALONE
    return _plus_minus(estimate, form) + mark


def _plus_minus(estimate: Estimate | None, form: str) -> str:
    if estimate is None:
        return NONE
    return f"{estimate.mean:{form}} ± {number(estimate.half_width, form.removeprefix('+'))}"


def _join(left: TextRows, right: TextRows) -> TextRows:
    return [[*a, *b[1:]] for a, b in zip(left, right, strict=True)]


def _full(
    values: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]],
    found: Mapping[str, Mapping[str, Mapping[str, TaskDifference]]],
    arms: Sequence[str],
    tasks: Sequence[str],
) -> Table:
    columns = ("measure", "task", "arm", "seeds", "value", "half_width", "difference", "difference_half_width",
               "p_holm", "sd_over_seeds", "error_over_examples")  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for measure, by_arm in values.items():
        for row in _groups(tasks):
            for arm in arms:
                if not by_arm[arm].get(row):
                    continue
                own, against = mean_interval(list(by_arm[arm][row].values())), found[measure].get(row, {}).get(arm)
                cells = (measure, row, arm, own.n, own.mean, own.half_width)
                rows.append((*cells, *(against.cells if against else (None,) * 5)))
    return Table("tasks", "Scores on downstream tasks.", columns, tuple(rows))
