"""Expert load by example: which experts the tokens of each example chose in each MoE layer, and how hard it was.

Shape suffixes: X examples, L MoE layers, N experts (FFN, constant, copy, zero), K groups of examples, D draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from moepp.statistics.resampling import DRAWS, bootstrap_sums

KINDS = ("ffn", "constant", "copy", "zero")


@dataclass(frozen=True)
class ExpertLoad:
    """One model's routing of X examples. `group` is the task of an example; `topic` its subject area and `subject` are
    "" where it has none.

    Nats and bytes are those of what an example asks for (a gold answer, else the whole text): their quotient over
    ln 2, bits per byte, is how hard it was for this model.
    """

    kinds: tuple[str, ...]  # the type of each expert
    chosen_XLN: np.ndarray  # tokens of the example that chose the expert
    tokens_X: np.ndarray
    nats_X: np.ndarray
    bytes_X: np.ndarray
    group: tuple[str, ...]
    topic: tuple[str, ...]
    subject: tuple[str, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names in the order of their first example."""
        return tuple(dict.fromkeys(self.group))

    @property
    def layers(self) -> int:
        return self.chosen_XLN.shape[1]

    @property
    def types(self) -> tuple[str, ...]:
        """KINDS, and the registered types that the model has."""
        return tuple(dict.fromkeys([*KINDS, *self.kinds]))

    @cached_property
    def by_kind_XLI(self) -> np.ndarray:
        """The same counts summed over experts of a type, [X, L, I] in the order of `types`."""
        member_NI = np.array([[kind == name for name in self.types] for kind in self.kinds], dtype=float)
        return self.chosen_XLN @ member_NI

    def rows(self, group: str) -> np.ndarray:
        """Positions of a group's examples."""
        return np.flatnonzero(np.array(self.group) == group)

    def grouped_by(self, label: tuple[str, ...]) -> "ExpertLoad":
        """The examples whose label, such as their `topic`, is not "", grouped by it."""
        rows = [i for i, name in enumerate(label) if name]
        return replace(self.select(rows), group=tuple(label[i] for i in rows))

    def select(self, rows: Sequence[int]) -> "ExpertLoad":
        counts = (self.chosen_XLN[rows], self.tokens_X[rows], self.nats_X[rows], self.bytes_X[rows])
        names = (tuple(label[i] for i in rows) for label in (self.group, self.topic, self.subject))
        return ExpertLoad(self.kinds, *counts, *names)


Loads = Mapping[str, ExpertLoad]  # of every model over the same texts


def shares_KLN(load: ExpertLoad) -> np.ndarray:
    """Share of a group's routed slots in a layer that each expert got (Fig. 4's "density"); a layer sums to 1."""
    sums = np.stack([load.chosen_XLN[load.rows(group)].sum(0) for group in load.groups]).astype(float)
    return sums / sums.sum(-1, keepdims=True)


def ffn_per_token(load: ExpertLoad, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """FFN experts per token of every group and layer, [K, L], and the ends of its 95 % interval over examples."""
    values, lows, highs = [], [], []
    for index, group in enumerate(load.groups):
        rows = load.rows(group)
        columns = np.concatenate([load.by_kind_XLI[rows, :, 0], load.tokens_X[rows, None]], axis=1)
        sums, drawn = columns.sum(0), bootstrap_sums(columns, draws, (0, index))
        low, high = np.quantile(drawn[:, :-1] / drawn[:, -1:], (0.025, 0.975), axis=0)
        values.append(sums[:-1] / sums[-1])
        lows.append(low)
        highs.append(high)
    return np.stack(values), np.stack(lows), np.stack(highs)


def bits_per_byte(load: ExpertLoad) -> np.ndarray:
    """How hard each group was for the model, [K]."""
    nats = np.array([[side[load.rows(group)].sum() for group in load.groups] for side in (load.nats_X, load.bytes_X)])
    return nats[0] / nats[1] / math.log(2)
