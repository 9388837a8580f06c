"""c and M of the zero-computation experts' map (base.Affine) from the slots, in one launch forward and one backward.

In plain torch they take some twenty, each shorter than its launch: where a GPU waits for the host, that is what MoE++
loses against vanilla MoE. Importing this module needs the package `triton`.

Shape suffixes as in experts.py; C constant experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import triton_kernels as kernels
from .base import taken_from

TOKENS = 128  # of a program


@dataclass(frozen=True)
class AffineIds:
    """Which ids are those of copy and of constant experts; all others add nothing here."""

    copies: range
    constants: range


class AffineSums(torch.autograd.Function):
    """c [T]: the gates of copies, and those of constant experts times their a. M [T, C]: the gate of each constant
    expert times its b, both [T, C]. All in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, gate_TK: Tensor, expert_TK: Tensor, a_TC: Tensor, b_TC: Tensor, ids: AffineIds
    ) -> tuple[Tensor, Tensor]:
        gate_TK, expert_TK = gate_TK.contiguous(), expert_TK.contiguous()
        scale_T, mix_TC = gate_TK.new_empty(len(gate_TK)), torch.empty_like(a_TC, memory_format=torch.contiguous_format)
        _launch(kernels.affine_sums_kernel, ids, expert_TK, gate_TK, a_TC, b_TC, scale_T, mix_TC)
        ctx.save_for_backward(gate_TK, expert_TK, a_TC, b_TC)
        ctx.ids = ids
        return scale_T, mix_TC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscale_T: Tensor, dmix_TC: Tensor) -> tuple[Tensor | None, ...]:
        gate_TK, expert_TK, a_TC, b_TC = taken_from(ctx)
        dgate_TK = torch.empty_like(gate_TK)
        da_TC, db_TC = (torch.empty_like(of_TC, memory_format=torch.contiguous_format) for of_TC in (a_TC, b_TC))
        _launch(
            kernels.affine_sums_backward_kernel, ctx.ids, expert_TK, gate_TK, a_TC, b_TC,
            dscale_T.contiguous(), dmix_TC.contiguous(), dgate_TK, da_TC, db_TC,
        )  # fmt: skip
        return dgate_TK, None, da_TC, db_TC, None


def _launch(kernel: Any, ids: AffineIds, expert_TK: Tensor, gate_TK: Tensor, a_TC: Tensor, *others: Tensor) -> None:
    tokens, top_k = gate_TK.shape
    kernel[(-(-tokens // TOKENS),)](
        expert_TK, gate_TK, a_TC, *others, tokens, *a_TC.stride(),
        COPY=ids.copies.start, COPIES=len(ids.copies), CONSTANT=ids.constants.start, C=a_TC.shape[1],
        TOP_K=top_k, BLOCK_T=TOKENS,
    )  # fmt: skip
