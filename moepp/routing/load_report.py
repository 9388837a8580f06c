"""Table, figures and claims on task-level expert load: Fig. 4 and A to E.

`loads` hold the load of every model over the same texts. Experts of different seeds have nothing to do with each other,
so bars that show single experts are those of the first model, and numbers by type are means over models.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from moepp.routing import load_findings as findings
from moepp.routing.loads import ExpertLoad, Loads, ffn_per_token, shares_KLN
from moepp.statistics.claims import Claim
from moepp.statistics.hypotheses import Hypothesis, decide, over_models
from moepp.statistics.resampling import Interval
from moepp.statistics.style import BLUE, INK, Figure, axes_of, counted
from moepp.statistics.tables import Cell, Table

LAYERS_IN_A_FIGURE = 5  # as in the paper's appendix
FILL = {"constant": ("0.75", "////"), "copy": ("0.88", "\\\\\\\\"), "zero": ("white", "")}
REGISTERED = ("0.6", "xxxx")  # of all types that the package does not know


def middle_layer(layers: int) -> int:
    """The layer of Fig. 4 (12 of 24), counted from 0, in a model of any depth."""
    return max(0, layers // 2 - 1)


def load_table(loads: Loads, paper: Mapping[str, float], name: str = "load", groups: str = "task") -> Table:
    """FFN experts per token and the share of every type by group in the middle layer, beside the paper's."""
    first = next(iter(loads.values()))
    layer = middle_layer(first.layers)
    use = {name: ffn_per_token(load) for name, load in loads.items()}
    rows = []
    for k, group in enumerate(first.groups):
        ffn = over_models([Interval(*(float(side[k, layer]) for side in found)) for found in use.values()])
        shares = [
            float(np.mean([_kind_shares(load, layer)[k, load.types.index(kind)] for load in loads.values()]))
            for kind in first.types
        ]
        row = [group, len(first.rows(group)), ffn.value, ffn.low, ffn.high, *shares]
        rows.append((*row, paper.get(group)) if paper else tuple(row))
    columns = ["group", "examples", "FFN experts per token", "low", "high", *(f"{kind} share" for kind in first.types)]
    if paper:
        columns.append("paper: FFN experts per token")
    caption = f"Expert load by {groups} in layer {layer + 1} of {first.layers}. {intervals(loads)}"
    return Table(name, caption, tuple(columns), tuple(rows))


def intervals(loads: Loads) -> str:
    over = "over examples" if len(loads) == 1 else f"(Student's t) over {len(loads)} models"
    return f"Intervals are 95 % {over}."


def _kind_shares(load: ExpertLoad, layer: int) -> np.ndarray:
    sums = np.stack([load.by_kind_XLI[load.rows(group), layer].sum(0) for group in load.groups])
    return sums / sums.sum(-1, keepdims=True)


def load_plots(loads: Loads) -> tuple[Figure, ...]:
    """Stacked bars of every layer of the first model, five layers a figure, after that of the middle layer."""
    name, load = next(iter(loads.items()))
    parts = [
        list(range(load.layers))[start:][:LAYERS_IN_A_FIGURE] for start in range(0, load.layers, LAYERS_IN_A_FIGURE)
    ]
    by_layer = (_stacked(load, f"layers_{part[0] + 1}_to_{part[-1] + 1}", part, name) for part in parts)
    return middle_plot(loads, "middle_layer"), *by_layer


def middle_plot(loads: Loads, stem: str) -> Figure:
    """Stacked bars of the middle layer of the first model."""
    name, load = next(iter(loads.items()))
    return _stacked(load, stem, [middle_layer(load.layers)], name)


def _stacked(load: ExpertLoad, stem: str, layers: Sequence[int], model: str) -> Figure:
    shares = shares_KLN(load)
    slots = float(load.chosen_XLN.sum() / load.layers / load.tokens_X.sum())
    rows = [
        (group, layer + 1, expert, load.kinds[expert], float(shares[k, layer, expert]))
        for layer in layers
        for k, group in enumerate(load.groups)
        for expert in range(len(load.kinds))
    ]
    examples = [len(load.rows(group)) for group in load.groups]
    return stacked_figure(rows, stem, model, slots, examples)


def stacked_figure(
    rows: Sequence[Sequence[Cell]], stem: str, model: str, slots: float, examples: Sequence[int]
) -> Figure:
    """A panel for each layer, a bar for each group. `slots` are those of a token, `examples` those of each group."""
    layers = list(dict.fromkeys(row[1] for row in rows))
    caption = (
        f"Share of slots by expert ({model}), layer{'s' if len(layers) > 1 else ''} {_span(layers)}: from below FFN,"
        " constant, copy and zero experts; white numbers: FFN experts per token."
        f" {counted(examples, 'example')} of each group, no interval (the table of loads has those)."
    )
    data = Table(stem, caption, ("group", "layer", "expert", "kind", "share"), tuple(rows))
    return Figure(data, partial(_draw, rows, layers, slots))


def _span(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"


def _draw(rows: Sequence[Sequence[Cell]], layers: Sequence[int], slots: float) -> Any:
    groups = list(dict.fromkeys(row[0] for row in rows))
    width = max(5.0, 1.0 + len(groups) * 0.068 * (2 + max(map(len, groups))))
    figure, axes = axes_of(width, 0.7 + 1.7 * len(layers), rows=len(layers), squeeze=False)
    for layer, one in zip(layers, axes[:, 0], strict=True):
        _bars(one, groups, [row for row in rows if row[1] == layer], slots)
        one.tick_params(axis="x", labelsize=8)
        one.set_ylabel(f"layer {layer}\nshare of slots")
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=len(legend[1]))
    return figure


def _bars(axes: Any, groups: Sequence[str], rows: Sequence[Sequence[Cell]], slots: float) -> None:
    bottom, seen = np.zeros(len(groups)), set()
    kinds = dict.fromkeys((row[2], row[3]) for row in rows)
    for expert, kind in kinds:
        share = np.array([row[4] for row in rows if row[2] == expert])
        colour, hatch = (BLUE, "") if kind == "ffn" else FILL.get(kind, REGISTERED)
        shape = {"color": colour, "hatch": hatch, "edgecolor": INK, "lw": 0.4}
        axes.bar(groups, share, 0.8, bottom, label=None if kind in seen else kind, **shape)
        bottom += share
        seen.add(kind)
    for place, group in enumerate(groups):
        ffn = sum(row[4] for row in rows if row[0] == group and row[3] == "ffn")
        said = {"color": "white", "ha": "center", "va": "center", "fontsize": 8, "fontweight": "bold"}
        axes.text(place, ffn / 2, f"{ffn * slots:.2f}", **said, bbox={"fc": BLUE, "ec": "none", "pad": 1})
    axes.set_ylim(0, 1)
    axes.grid(visible=False)


ZERO_MOST = Hypothesis(
    "One zero expert is chosen more than one copy and one constant expert", "of all slots", above=0.0,
    paper="true in its Fig. 4: .081 against .045 and .053, mean over tasks",
)  # fmt: skip
ZERO_TYPE_MOST = Hypothesis(
    "Zero experts together are chosen more than any other type without computation", "of all slots", above=0.0,
    paper="its text says so; its Fig. 4 shows .106 for the two constant experts together",
)  # fmt: skip


def load_claims(loads: Loads) -> tuple[Claim, ...]:
    return decide([
        (hypothesis, [findings.zero_over_other_kinds(load, per_expert) for load in loads.values()])
        for hypothesis, per_expert in ((ZERO_MOST, True), (ZERO_TYPE_MOST, False))
    ])  # fmt: skip
