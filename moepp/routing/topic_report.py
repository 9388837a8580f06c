"""Tables and figures on expert load by topic: the areas of MMLU and its subjects, where the texts have them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from moepp.routing.load_report import intervals, load_table, middle_plot
from moepp.routing.loads import KINDS, ExpertLoad, Loads
from moepp.statistics.hypotheses import over_models
from moepp.statistics.resampling import Interval, bootstrap_sums
from moepp.statistics.style import INK, Figure, axes_of, few_ticks, looks
from moepp.statistics.tables import Cell, Table

MEASURES = ("FFN experts per token", *(f"{kind} share" for kind in KINDS[1:]))


def topic_tables(loads: Loads) -> tuple[Table, ...]:
    """Load by area in the middle layer, and every subject, mean over layers; none where no text has a subject."""
    areas = _grouped(loads, "topic")
    return (load_table(areas, {}, "topics", "topic, the areas of MMLU,"), _subject_table(loads)) if areas else ()


def topic_plots(loads: Loads, tables: tuple[Table, ...]) -> tuple[Figure, ...]:
    """`tables` as `topic_tables` gives them."""
    return (middle_plot(_grouped(loads, "topic"), "topics_middle_layer"), subjects_figure(tables[1])) if tables else ()


def _grouped(loads: Loads, label: str) -> Loads:
    """The examples of subjects only, grouped by a label that each of them has; nothing without such examples."""
    if not any(next(iter(loads.values())).subject):
        return {}
    with_subject = {name: load.grouped_by(load.subject) for name, load in loads.items()}
    return {name: load.grouped_by(getattr(load, label)) for name, load in with_subject.items()}


def _subject_table(loads: Loads) -> Table:
    by_subject = _grouped(loads, "subject")
    first = next(iter(by_subject.values()))
    measured = [_measures(load) for load in by_subject.values()]
    rows = []
    for k, subject in enumerate(first.groups):
        of_subject = first.rows(subject)
        found = [over_models([model[k][m] for model in measured]) for m in range(len(MEASURES))]
        cells = [cell for one in found for cell in (one.value, one.low, one.high)]
        rows.append((subject.replace("_", " "), first.topic[of_subject[0]], len(of_subject), *cells))
    rows.sort(key=lambda row: (row[1], -row[3]))
    columns = (
        "subject",
        "area",
        "examples",
        *(end for name in MEASURES for end in (name, f"{name}: low", f"{name}: high")),
    )
    caption = f"Expert load by subject of MMLU, mean over layers. {intervals(loads)}"
    return Table("subjects", caption, columns, tuple(rows))


def _measures(load: ExpertLoad) -> list[list[Interval]]:
    """Of every group each of MEASURES, mean over layers, with its interval over examples."""
    columns_XM = np.concatenate([load.by_kind_XLI.mean(1), load.tokens_X[:, None]], axis=1)
    found = []
    for index, group in enumerate(load.groups):
        rows_XM = columns_XM[load.rows(group)]
        value_M, drawn_DM = _ratios(rows_XM.sum(0)), _ratios(bootstrap_sums(rows_XM, seed=(0, index)))
        low_M, high_M = np.quantile(drawn_DM, (0.025, 0.975), axis=0)
        found.append([Interval(float(v), float(a), float(b)) for v, a, b in zip(value_M, low_M, high_M, strict=True)])
    return found


def _ratios(sums: np.ndarray) -> np.ndarray:
    """FFN experts per token and the shares of slots of the other types, of sums [..., 5]."""
    slots = sums[..., :-1].sum(-1, keepdims=True)
    return np.concatenate([sums[..., :1] / sums[..., -1:], sums[..., 1:-1] / slots], axis=-1)


def subjects_figure(table: Table) -> Figure:
    """A row per subject, by area, those with most FFN experts first; a panel per measure."""
    return Figure(table, partial(_draw, table.rows))


def _draw(rows: Sequence[Sequence[Cell]]) -> Any:
    figure, axes = axes_of(width=9.0, height=1.2 + 0.17 * len(rows), columns=len(MEASURES), sharey=True)
    areas = {area: [y for y, row in enumerate(rows) if row[1] == area] for area in dict.fromkeys(r[1] for r in rows)}
    look = looks(areas)
    for m, one in enumerate(axes):
        value, low, high = (np.array([row[3 + 3 * m + end] for row in rows], dtype=float) for end in range(3))
        for area, y in areas.items():
            errors, shape = [value[y] - low[y], high[y] - value[y]], look[area] | {"ls": "none"}
            one.errorbar(value[y], y, xerr=errors, ms=4, elinewidth=0.7, label=area, **shape)
            one.axhline(y[0] - 0.5, color=INK, lw=0.6)
        one.set_xlabel(MEASURES[m])
        few_ticks(one.xaxis)
    axes[0].set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=7)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(areas))
    return figure
