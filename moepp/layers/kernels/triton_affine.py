"""c and M of the zero-computation experts' map (base.Affine) from the tokens and their slots: one launch forward, a few
backward.

In plain torch they take some thirty, each shorter than its launch, and read x in float32 for every token: where a GPU
waits for the host, that is what MoE++ loses against vanilla MoE. Importing this module needs the package `triton`.

Shape suffixes as in experts.py; C constant experts, M = 2C rows of their W_c.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .base import first_derivative_only, taken_from
from .triton_rows import COLUMNS, ROWS, mixed_rows, weighted_rows

TOKENS = 128  # of a program that reads slots only


@dataclass(frozen=True)
class AffineIds:
    """Which ids are those of copy and of constant experts; all others add nothing here."""

    copies: range
    constants: range


class AffineSums(torch.autograd.Function):
    """c [T]: the gates of copies, and those of constant experts times their a_1. M [T, C]: the gate of each constant
    expert times its a_2 (Eq. 5). `w_mix` [2C, D] holds W_c of each. All in float32 between load and store.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_mix: Tensor, gate_TK: Tensor, expert_TK: Tensor, ids: AffineIds
    ) -> tuple[Tensor, Tensor]:
        x_TD, w_mix, gate_TK, expert_TK = (given.contiguous() for given in (x_TD, w_mix, gate_TK, expert_TK))
        tokens, dim = x_TD.shape
        scale_T = gate_TK.new_empty(tokens)
        mix_TC, a_TC = (gate_TK.new_empty(tokens, len(ids.constants)) for _ in range(2))
        kernels.affine_sums_kernel[(_blocks(tokens, ROWS),)](
            expert_TK, gate_TK, x_TD, w_mix, scale_T, mix_TC, a_TC, tokens, dim,
            **_slots(ids, gate_TK), BLOCK_T=ROWS, BLOCK_D=COLUMNS,
        )  # fmt: skip
        ctx.save_for_backward(x_TD, w_mix, gate_TK, expert_TK, a_TC)
        ctx.ids = ids
        return scale_T, mix_TC

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dscale_T: Tensor, dmix_TC: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, w_mix, gate_TK, expert_TK, a_TC = taken_from(ctx)
        dgate_TK, dlogit_TM = torch.empty_like(gate_TK), gate_TK.new_empty(len(x_TD), len(w_mix))
        kernels.affine_sums_backward_kernel[(_blocks(len(x_TD), TOKENS),)](
            expert_TK, gate_TK, a_TC, dscale_T.contiguous(), dmix_TC.contiguous(), dgate_TK, dlogit_TM, len(x_TD),
            **_slots(ctx.ids, gate_TK), BLOCK_T=TOKENS,
        )  # fmt: skip
        dx_TD = mixed_rows(dlogit_TM, w_mix, like_TD=x_TD) if ctx.needs_input_grad[0] else None
        return dx_TD, weighted_rows(dlogit_TM, x_TD).to(w_mix.dtype), dgate_TK, None, None


def _slots(ids: AffineIds, gate_TK: Tensor) -> dict[str, int]:
    copies, constants = ids.copies, ids.constants
    return {
        "COPY": copies.start, "COPIES": len(copies), "CONSTANT": constants.start, "C": len(constants),
        "TOP_K": gate_TK.shape[1],
    }  # fmt: skip


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
