"""The two kinds of experts: FFN experts that cost a matrix product, and zero-computation experts that cost next to
nothing.

Shape suffixes: T tokens, K top-k, R rows handed to FFN experts, D model width, F hidden width, E FFN experts, C
constant experts, Z all zero-computation experts, N all experts. Expert order is FFN, constant, copy, zero.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.layers.dispatch import LocalDispatcher


@dataclass
class ExpertCounts:
    """How many experts of each type a layer has. All three zero-computation counts at 0 is a vanilla MoE."""

    ffn: int = 8
    zero: int = 1
    copy: int = 1
    constant: int = 2

    def __post_init__(self) -> None:
        for name in ("ffn", "zero", "copy", "constant"):
            if getattr(self, name) < 0:
                raise ValueError(f"experts.{name}={getattr(self, name)} must not be negative")
        if self.ffn < 1:
            raise ValueError("experts.ffn must be at least 1")

    @property
    def zero_computation(self) -> int:
        return self.zero + self.copy + self.constant

    @property
    def total(self) -> int:
        return self.ffn + self.zero_computation

    def kinds(self) -> list[str]:
        """The type of every expert, in expert order."""
        return ["ffn"] * self.ffn + ["constant"] * self.constant + ["copy"] * self.copy + ["zero"] * self.zero


class FFNExperts(nn.Module):
    """E SwiGLU experts, stacked so that a strategy can slice dimension 0 and nothing else.

    `w_in` [E, 2F, D] holds the gate projection in its first F rows and the up projection in the others; `w_out` is [E,
    D, F]. The `dispatcher` decides where the rows are computed; a strategy replaces it, the layer never asks for a
    rank.
    """

    def __init__(self, experts: int, dim: int, hidden: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.w_out = nn.Parameter(torch.empty(experts, dim, hidden))
        self.dispatcher = LocalDispatcher()

    def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """Sum over k of gate * expert(x), in at least float32, [T, D]. Slots whose expert id is E or more contribute
        nothing.
        """
        return self.dispatcher(self.w_in, self.w_out, x_TD, expert_TK, gate_TK)


class ZeroComputationExperts(nn.Module):
    """Zero (Eq. 3), copy (Eq. 4) and constant (Eq. 5) experts as one pass: y = c_x * x + G_c a_2 @ V, with no gather or
    scatter.

    A constant expert j mixes its input with a learned vector: a_j1 x + a_j2 v_j, [a_j1, a_j2] = softmax(W_j x).
    """

    no_weight_decay = ("vectors",)

    def __init__(self, counts: ExpertCounts, dim: int):
        super().__init__()
        self.constant, self.copy = counts.constant, counts.copy
        if counts.constant:
            self.w_mix = nn.Parameter(torch.empty(2 * counts.constant, dim))  # W_c of Eq. 5, two rows per expert
            self.vectors = nn.Parameter(torch.empty(counts.constant, dim))  # v of Eq. 5

    def forward(self, x_TD: Tensor, gate_TZ: Tensor) -> Tensor:
        """The gated sum of all zero-computation experts, [T, D], in gate_TZ's dtype.

        `gate_TZ` holds a token's gate for every zero-computation expert, 0 where not chosen, in expert order.
        """
        x_TD = x_TD.to(gate_TZ.dtype)
        gate_TC, gate_copies, _ = gate_TZ.split(
            [self.constant, self.copy, gate_TZ.shape[1] - self.constant - self.copy], 1
        )
        c_T = gate_copies.sum(1)
        if not self.constant:
            return c_T[:, None] * x_TD
        mix_TC2 = F.linear(x_TD, self.w_mix.to(x_TD.dtype)).unflatten(1, (self.constant, 2)).softmax(-1)
        c_T = c_T + (gate_TC * mix_TC2[..., 0]).sum(1)
        return torch.addmm(c_T[:, None] * x_TD, gate_TC * mix_TC2[..., 1], self.vectors.to(x_TD.dtype))
