"""The observations of the paper's appendix on task-level expert load: hypotheses, tests, tables and a figure."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moepp.routing import load_findings as findings
from moepp.routing.load_report import middle_layer
from moepp.routing.loads import KINDS, ExpertLoad, Loads, bits_per_byte
from moepp.statistics.hypotheses import Effect, Hypothesis
from moepp.statistics.style import Figure, axes_of, label_points, looks
from moepp.statistics.tables import Cell, Table

Tests = list[tuple[Hypothesis, list[Effect]]]

OVER_TASKS = (  # hypothesis, its effect, the layers it needs
    (Hypothesis(
        "Tasks that use more FFN experts in a layer do so in the next", "correlation over tasks", above=0.0,
        paper="adjacent layers correlate",
    ), findings.adjacent_layers, 2),
    (Hypothesis(
        "Adjacent layers agree more than layers further apart", "difference of correlations", above=0.0,
        paper="adjacent layers correlate",
    ), findings.adjacent_over_distant_layers, 3),
    (Hypothesis(
        "Tasks differ more in shallow layers (the first quarter) and the last than between them",
        "FFN experts per token", above=0.0, paper="shallow and final layers vary most across tasks",
    ), findings.ends_over_middle, 3),
    (Hypothesis(
        "Harder tasks do not simply use more FFN experts (rank correlation below 0.5)", "rho", below=0.5,
        paper="no simple relation",
    ), findings.difficulty_and_ffn, 1),
    (Hypothesis(
        "Easier tasks use more zero experts", "rho over tasks", above=0.0, paper="zero experts track ease",
    ), findings.ease_and_zero, 1),
    (Hypothesis(
        "Easier examples of a task use more zero experts", "rho over examples, mean of tasks", above=0.0,
        paper="not examined",
    ), findings.ease_and_zero_within_tasks, 1),
)  # fmt: skip
ARC_TEXT = Hypothesis(
    "ARC-C uses more FFN experts than ARC-E, mean over layers", "FFN experts per token", above=0.0,
    paper="its text says more",
)  # fmt: skip
ARC_FIGURE = Hypothesis(
    "ARC-C uses fewer FFN experts than ARC-E in the middle layer", "FFN experts per token", below=0.0,
    paper="its Fig. 4 shows 1.515 against 1.569 in layer 12",
)  # fmt: skip
TOPICS = Hypothesis(
    "Topics are assigned to different experts", "of an even share", above=0.0, paper="assignments differ by topic",
)  # fmt: skip


def observations(loads: Loads) -> Tests:
    """Every observation that these texts allow, with its effect in each model."""
    models, first = list(loads.values()), next(iter(loads.values()))
    tests: Tests = []
    for hypothesis, effect, layers in OVER_TASKS:
        if findings.enough_examples(first) and first.layers >= layers:
            tests.append((hypothesis, [effect(load) for load in models]))
    if {"ARC-C", "ARC-E"} <= set(first.groups):
        middle = middle_layer(first.layers)
        for hypothesis, layers in ((ARC_TEXT, slice(None)), (ARC_FIGURE, slice(middle, middle + 1))):
            tests.append((hypothesis, [findings.ffn_difference(load, "ARC-C", "ARC-E", layers) for load in models]))
    by_topic = [load.grouped_by(load.topic) for load in models]
    if findings.enough_examples(by_topic[0]):
        tests.append((TOPICS, [findings.topics_differ(load) for load in by_topic]))
    return tests


def observation_tables(loads: Loads, tests: Tests) -> tuple[Table, ...]:
    """Tasks with their difficulty and use of experts, every effect in every model, and the deviations by layer."""
    first = next(iter(loads.values()))
    task_columns = ("group", "bits per byte", "FFN experts per token", "zero experts per token")
    means = np.mean([_task_rows(load) for load in loads.values()], axis=0)
    tasks = tuple((group, *(float(x) for x in row)) for group, row in zip(first.groups, means, strict=True))
    effects = tuple(
        (hypothesis.statement, name, effect.interval.value, effect.interval.low, effect.interval.high, effect.p)
        for hypothesis, found in tests
        for name, effect in zip(loads, found, strict=True)
    )
    tables = [
        Table("tasks", "Difficulty and use of experts, means over layers and models.", task_columns, tasks),
        Table("effects", "Every test in every model: intervals and p over its examples, p not corrected.",
              ("statement", "model", "effect", "low", "high", "p"), effects),
    ]  # fmt: skip
    if findings.enough_examples(first):
        deviations = np.stack([findings.layer_deviations(load) for load in loads.values()], axis=1)
        rows = tuple((i + 1, *(float(x) for x in row)) for i, row in enumerate(deviations))
        caption = "Deviation between tasks of FFN experts per token by layer, noise of examples taken off."
        tables.append(Table("layers", caption, ("layer", *loads), rows))
    return tuple(tables)


def _task_rows(load: ExpertLoad) -> np.ndarray:
    rows = [load.rows(group) for group in load.groups]
    kinds = [load.by_kind_XLI[r].sum(0).mean(0) / load.tokens_X[r].sum() for r in rows]
    return np.column_stack(
        [bits_per_byte(load), [k[KINDS.index("ffn")] for k in kinds], [k[KINDS.index("zero")] for k in kinds]]
    )


def observation_plot(tables: Sequence[Table]) -> Figure:
    """Difficulty against the use of FFN and of zero experts."""
    return difficulty_figure(tables[0].rows, tables[0].columns)


def difficulty_figure(rows: Sequence[Sequence[Cell]], columns: tuple[str, ...]) -> Figure:
    """A point for each task."""
    caption = (
        f"Difficulty of {len(rows)} tasks (bits per byte, harder to the right) and their use of experts per token,"
        " means over layers and models; no interval (the table of effects has those)."
    )
    return Figure(Table("difficulty", caption, columns, tuple(rows)), partial(_draw, rows, columns))


def _draw(rows: Sequence[Sequence[Cell]], columns: tuple[str, ...]) -> Any:
    figure, axes = axes_of(width=7.2, height=3.8, columns=2)
    for column, one, look in zip((2, 3), axes, looks(columns[2:]).values(), strict=True):
        points = {row[0]: (row[1], row[column]) for row in rows}
        one.plot(*zip(*points.values(), strict=True), look["marker"], color=look["color"])
        one.set_xlabel("bits per byte")
        one.set_ylabel(columns[column])
        label_points(one, points, width=2.6, height=3.2)
    return figure
