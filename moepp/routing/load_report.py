"""Table, figures and claims on task-level expert load: Fig. 4 and A to E.

`loads` hold the load of every model over the same texts. Experts of different seeds have nothing to do with each other,
so bars that show single experts are those of the first model, and numbers by type are means over models.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moepp.routing import load_findings as findings
from moepp.routing.loads import ExpertLoad, ffn_per_token, shares_KLN
from moepp.statistics.claims import Claim
from moepp.statistics.hypotheses import Hypothesis, decide, over_models
from moepp.statistics.resampling import Interval
from moepp.statistics.style import BLUE, COLOURS, INK, Figure, axes_of
from moepp.statistics.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Loads = Mapping[str, ExpertLoad]
LAYERS_IN_A_FIGURE = 5  # as in the paper's appendix
FILL = {"constant": ("0.75", "////"), "copy": ("0.88", "...."), "zero": ("white", "")}
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
    ffn = shares[..., : load.kinds.count("ffn")].sum(-1) * load.chosen_XLN.sum() / load.layers / load.tokens_X.sum()
    rows = [
        (group, layer + 1, expert, load.kinds[expert], float(shares[k, layer, expert]))
        for layer in layers
        for k, group in enumerate(load.groups)
        for expert in range(len(load.kinds))
    ]
    caption = (
        f"Share of slots by expert ({model}), layer{'s' if len(layers) > 1 else ''} {_span(layers)}: from below FFN,"
        " constant, copy and zero experts. Points: FFN experts per token."
    )

    def draw():
        figure, axes = axes_of(width=7.2, height=0.9 + 1.7 * len(layers), rows=len(layers))
        for layer, one in zip(layers, np.atleast_1d(axes), strict=True):
            _bars(one, load, shares[:, layer], ffn[:, layer], layer, legend=layer == layers[0])
        return figure

    return Figure(Table(stem, caption, ("group", "layer", "expert", "kind", "share"), tuple(rows)), draw)


def _span(layers: Sequence[int]) -> str:
    return str(layers[0] + 1) if len(layers) == 1 else f"{layers[0] + 1} to {layers[-1] + 1}"


def _bars(axes: "Axes", load: ExpertLoad, share_KN: np.ndarray, ffn_K: np.ndarray, layer: int, legend: bool) -> None:
    groups = np.arange(len(load.groups))
    bottom, seen = np.zeros(len(groups)), set()
    for expert, kind in enumerate(load.kinds):
        colour, hatch = (BLUE, "") if kind == "ffn" else FILL.get(kind, REGISTERED)
        label = kind if kind not in seen else None
        axes.bar(
            groups, share_KN[:, expert], 0.7, bottom, color=colour, hatch=hatch, edgecolor=INK, lw=0.4, label=label
        )
        bottom += share_KN[:, expert]
        seen.add(kind)
    right = axes.twinx()
    right.plot(
        groups, ffn_K, "D--", color=COLOURS[1], mec=INK, mew=0.6, ms=5, lw=1, label="FFN experts per token (right)"
    )
    centre, span = (ffn_K.max() + ffn_K.min()) / 2, max(0.1, float(np.ptp(ffn_K)))
    right.set_ylim(centre - span, centre + span)  # its own scale, as in the paper: tasks differ by little
    right.grid(False)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"layer {layer + 1}\nshare of slots")
    axes.set_xticks(groups, load.groups, rotation=30, ha="right")
    if legend:
        handles = [part for one in (axes, right) for part in one.get_legend_handles_labels()[0]]
        axes.figure.legend(handles=handles, loc="outside upper center", ncols=5)


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
