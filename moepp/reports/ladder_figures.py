"""Figures of a ladder: losses with their laws, and the speed-up against size."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from moepp.reports.ladder import FAMILIES, INTERVAL, Rung
from moepp.statistics.power_law import PowerLaw
from moepp.statistics.seeds import mean_interval
from moepp.statistics.style import INK, Figure, axes_of, counted, hover, looks, plain_log
from moepp.statistics.tables import Rows, Table


def losses_figure(rungs: Sequence[Rung], laws: Mapping[str, PowerLaw]) -> Figure:
    rows = []
    for one in sorted(rungs, key=lambda one: (one.family == "moepp", one.size, one.tokens)):
        found, law = mean_interval(list(one.loss.values())), laws.get(one.family)
        by_law = law and float(law.losses_F(one.size, one.tokens)[0])
        rows.append(
            (FAMILIES[one.family], one.rung, one.size, one.tokens, found.n, found.mean, found.low, found.high, by_law)
        )
    caption = (
        "Validation loss, nats per token, against training tokens: mean and 95 % t-interval"
        f" ({counted((row[4] for row in rows), 'seed')}); lines: the laws of all sizes."
    )
    columns = ("family", "rung", "parameters", "tokens", "n", "val_loss", *INTERVAL, "law")
    return Figure(Table("losses", caption, columns, tuple(rows)), partial(_draw_losses, rows))


def _draw_losses(rows: Rows) -> Any:
    figure, axes = axes_of(8.4, 3.6, columns=len(FAMILIES), sharey=True)
    sizes = {row[1]: f"{row[2] / 1e6:.2g} M" for row in rows}
    look = looks(sizes)
    for panel, family in zip(axes, FAMILIES.values(), strict=True):
        for rung, size in sizes.items():
            if line := [row for row in rows if row[:2] == (family, rung)]:
                _draw_rung(panel, line, size, look[rung])
        panel.set_xscale("log")
        plain_log(panel.xaxis)
        panel.set_title(family, loc="left", fontsize=9, fontweight="bold")
        panel.set_xlabel("training tokens, millions")
    axes[0].set_ylabel("validation loss, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(sizes), title="parameters")
    return figure


def _draw_rung(panel: Any, line: Rows, size: str, look: Mapping[str, Any]) -> None:
    millions, loss, law = [row[3] / 1e6 for row in line], [row[5] for row in line], [row[8] for row in line]
    half_widths = [0 if row[6] is None else row[7] - row[5] for row in line]
    panel.errorbar(millions, loss, yerr=half_widths, capsize=3, ms=4, label=size, **{**look, "ls": ""})
    if None not in law:
        panel.plot(millions, law, **{**look, "marker": ""})
    said = [f"{row[0]}, {size}, {row[3]:,.0f} tokens: {row[5]:.4f}, n = {row[4]}" for row in line]
    hover(panel, zip(millions, loss, said, strict=True))


def speedups_figure(table: Table) -> Figure:
    caption = (
        "Effective speed-up of MoE++ at equal loss, in training FLOPs, against size, after each number of tokens; 95 %"
        f" bootstrap intervals ({counted((row[3] for row in table.rows), 'seed')}; open where they reach the edge)."
    )
    return Figure(Table("speedups", caption, table.columns, table.rows), partial(_draw_speedups, table.rows))


def _draw_speedups(rows: Rows) -> Any:
    figure, axes = axes_of(5.4, 3.4)
    look = looks(lengths := list(dict.fromkeys(row[2] for row in rows)))
    top = 1.1 * max((end for row in rows for end in row[4:] if math.isfinite(end)), default=2.0)
    for place, tokens in enumerate(lengths):
        line = [row for row in rows if row[2] == tokens and math.isfinite(row[4])]
        if line:
            millions, values = [row[1] / 1e6 * 1.05**place for row in line], [row[4] for row in line]
            ends = [[row[4] - max(row[5], 0.0) for row in line], [min(row[6], top) - row[4] for row in line]]
            axes.errorbar(millions, values, yerr=ends, capsize=3, ms=5, label=f"{tokens / 1e6:.2g} M", **look[tokens])
            said = [
                f"{n:,.0f} parameters: {value:.3f} [{low:.3f}, {high:.3f}]" for _, n, _, _, value, low, high in line
            ]
            hover(axes, zip(millions, values, said, strict=True))
    axes.axhline(1, color=INK, lw=0.8, ls="--")
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("FLOPs of vanilla MoE over MoE++'s")
    figure.legend(loc="outside upper right", ncols=len(lengths), title="training tokens")
    return figure
