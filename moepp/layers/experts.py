"""The two kinds of experts: FFN experts that cost a matrix product, and zero-computation experts that cost next to
nothing.

Shape suffixes: T tokens, K top-k, R rows handed to FFN experts, D model width, F hidden width, E FFN experts, C
constant experts, Z all zero-computation experts, N all experts. Expert order is FFN, constant, copy, zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.layers.dispatch import LocalDispatcher, SlotCounts
from moepp.layers.kernels.base import Affine, RoutedTokens
from moepp.layers.settings import Backend, ExpertCounts


class FFNExperts(nn.Module):
    """E SwiGLU experts, stacked so that a strategy can slice dimension 0 and nothing else.

    `w_in` [E, 2F, D] holds the gate projection in its first F rows and the up projection in the others; `w_out` is
    [E, D, F]. The `dispatcher` decides where and by which kernel the rows are computed; a strategy replaces it, the
    layer never asks for a rank.
    """

    def __init__(self, experts: int, dim: int, hidden: int, backend: Backend = "auto"):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.w_out = nn.Parameter(torch.empty(experts, dim, hidden))
        self.dispatcher = LocalDispatcher(backend)

    def forward(self, tokens: RoutedTokens, counts: SlotCounts | None = None) -> Tensor:
        """Sum over k of gate * expert(x), plus what the other experts add, [T, D] in the gates' dtype."""
        return self.dispatcher(self.w_in, self.w_out, tokens, counts)


class ZeroComputationExperts(nn.Module):
    """Zero (Eq. 3), copy (Eq. 4) and constant (Eq. 5) experts as one affine map of the input, nothing gathered.

    A constant expert j mixes its input with a learned vector: a_j1 x + a_j2 v_j, [a_j1, a_j2] = softmax(W_j x).
    """

    no_weight_decay = ("vectors",)

    def __init__(self, counts: ExpertCounts, dim: int):
        super().__init__()
        self.counts = counts
        if counts.constant:
            self.w_mix = nn.Parameter(torch.empty(2 * counts.constant, dim))  # W_c of Eq. 5, two rows per expert
            self.vectors = nn.Parameter(torch.empty(counts.constant, dim))  # v of Eq. 5

    def mix(self, x_TD: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[a_j1, a_j2] of every token and constant expert, chosen or not, [T, C, 2]; None without constant experts."""
        if not self.counts.constant:
            return None
        mix_TC2 = F.linear(x_TD.to(dtype), self.w_mix.to(dtype)).unflatten(1, (self.counts.constant, 2))
        return mix_TC2.softmax(-1)

    def forward(self, gate_TZ: Tensor, mix_TC2: Tensor | None) -> Affine:
        """`gate_TZ` holds a token's gate for every zero-computation expert, 0 where not chosen, in expert order."""
        counts = self.counts
        gate_TC, gate_copies, _ = gate_TZ.split([counts.constant, counts.copy, counts.zero], 1)
        scale_T = gate_copies.sum(1)
        if mix_TC2 is None:
            return Affine(scale_T)
        scale_T = scale_T + (gate_TC * mix_TC2[..., 0]).sum(1)
        return Affine(scale_T, gate_TC * mix_TC2[..., 1], self.vectors.to(gate_TZ.dtype))
