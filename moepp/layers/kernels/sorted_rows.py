"""Rows sorted once by expert and multiplied in contiguous slices, one expert after the other. Runs everywhere.

The default on CPUs, and the reference for the other kernels. Shape suffixes as in experts.py; S = T*K slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import RoutedTokens, taken_from
from .cpu import multiplies_bfloat16

# oneDNN compiles one bf16 kernel per new (M, N, K), at milliseconds each, and routing gives every expert a new M at
# every step. Rounding M up to a multiple of this keeps the number of shapes small; the rows added have gate 0 and
# change neither values nor gradients.
ROW_BUCKET = 64
# Consecutive experts are taken together while their z has at most this many numbers: small ones share their passes, and
# what large ones need for a moment is little and stays in the cache.
BLOCK_NUMBERS = 2**18


@dataclass
class RowPlan:
    """FFN slots sorted by expert: expert e owns `sizes[e]` consecutive entries of `slot_R`.

    An entry is the slot's index t*K+k; T*K marks a padding row.
    """

    slot_R: Tensor
    sizes: list[int]

    def blocks(self, most_rows: int) -> Iterator[tuple[slice, slice, list[int]]]:
        """Consecutive experts with at most `most_rows` rows, or one with more: the rows, the experts, their sizes."""
        expert = row = 0
        while expert < len(self.sizes):
            last, rows = expert + 1, self.sizes[expert]
            while last < len(self.sizes) and rows + self.sizes[last] <= most_rows:
                rows, last = rows + self.sizes[last], last + 1
            yield slice(row, row + rows), slice(expert, last), self.sizes[expert:last]
            expert, row = last, row + rows


def plan_rows(expert_TK: Tensor, experts: int, bucket: int = 1, sizes: list[int] | None = None) -> RowPlan:
    """Sorts the FFN experts' slots, in token order within each, and pads each share to a multiple of `bucket`.

    Waits for the device where the `sizes` of the shares are not given.
    """
    expert_S = expert_TK.reshape(-1).clamp(max=experts)
    order_S = expert_S.argsort(stable=True)
    if sizes is None:
        sizes = torch.bincount(expert_S, minlength=experts + 1)[:experts].tolist()
    kept_R = order_S[: sum(sizes)]
    if bucket == 1:
        return RowPlan(kept_R, sizes)
    count_E = torch.tensor(sizes, device=kept_R.device)
    padded_E = (count_E + bucket - 1) // bucket * bucket
    shift_E = (padded_E.cumsum(0) - padded_E) - (count_E.cumsum(0) - count_E)  # how far each expert's rows move
    rows = torch.arange(len(kept_R), device=kept_R.device) + shift_E.repeat_interleave(count_E)
    slot_R = torch.full((int(padded_E.sum()),), expert_S.numel(), dtype=kept_R.dtype, device=kept_R.device)
    slot_R[rows] = kept_R
    return RowPlan(slot_R, padded_E.tolist())


def dispatch(w_in: Tensor, w_out: Tensor, tokens: RoutedTokens) -> Tensor:
    """The map of base.py, expert by expert."""
    x_TD, gate_TK = tokens.x_TD, tokens.gate_TK
    bucket = ROW_BUCKET if w_in.dtype == torch.bfloat16 and x_TD.is_cpu else 1
    plan = plan_rows(tokens.expert_TK, len(w_in), bucket, tokens.sizes)
    x_rows_TD = x_TD.to(w_in.dtype).view_as(x_TD)  # before `others`, in whose order autograd adds up x's gradient
    y_TD = tokens.others(x_TD) if tokens.others is not None else gate_TK.new_zeros(x_TD.shape)
    return SortedExperts.apply(y_TD, x_rows_TD, gate_TK, w_in, w_out, plan, torch.is_grad_enabled())


class SortedExperts(torch.autograd.Function):
    """Adds each token's gated experts to `y_TD`, in place. Kept for the backward pass are z = [gate, up] and y of every
    row: inputs are gathered and h = silu(gate) * up computed again, and the gradient of each expert's weights goes
    straight to its place in the stack.
    """

    @staticmethod
    def forward(
        ctx: Any, y_TD: Tensor, x_TD: Tensor, gate_TK: Tensor, w_in: Tensor, w_out: Tensor, plan: RowPlan, keep: bool
    ) -> Tensor:
        token_R = (plan.slot_R // gate_TK.shape[1]).remainder(len(x_TD))  # padding rows read token 0
        gate_R1 = F.pad(gate_TK.reshape(-1), (0, 1))[plan.slot_R, None]  # padding rows weigh 0
        ctx.blocks = list(plan.blocks(BLOCK_NUMBERS // w_in.shape[1]))
        kept = []
        for rows, experts, sizes in ctx.blocks:
            z_R2F = multiply(x_TD.index_select(0, token_R[rows]), w_in[experts].mT, sizes)
            y_RD = multiply(swiglu(z_R2F), w_out[experts].mT, sizes)
            y_TD.index_add_(0, token_R[rows], y_RD * gate_R1[rows])
            if keep:
                kept += [z_R2F, y_RD]
        ctx.mark_dirty(y_TD)
        ctx.save_for_backward(x_TD, gate_TK, w_in, w_out, plan.slot_R, token_R, gate_R1, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_TK, w_in, w_out, slot_R, token_R, gate_R1, *kept = taken_from(ctx)
        kept.reverse()
        dw_in, dw_out = (
            torch.empty_like(w) if needed else None
            for w, needed in zip((w_in, w_out), ctx.needs_input_grad[3:5], strict=True)
        )
        dx_TD, dgate_R1 = torch.zeros_like(x_TD), torch.empty_like(gate_R1)
        for rows, experts, sizes in ctx.blocks:
            z_R2F, y_RD = kept.pop(), kept.pop()  # freed with the block
            grad_RD = grad_TD.index_select(0, token_R[rows])
            dgate_R1[rows] = (grad_RD * y_RD).sum(1, keepdim=True)
            dy_RD = (grad_RD * gate_R1[rows]).to(w_in.dtype)
            h_RF, dz_R2F = swiglu_backward(z_R2F, multiply(dy_RD, w_out[experts], sizes))
            if dw_out is not None:
                outer(dy_RD, h_RF, sizes, out=dw_out[experts])
            if dw_in is not None:
                outer(dz_R2F, x_TD.index_select(0, token_R[rows]), sizes, out=dw_in[experts])
            dx_TD.index_add_(0, token_R[rows], multiply(dz_R2F, w_in[experts], sizes))
        dgate_S = F.pad(torch.zeros_like(gate_TK).reshape(-1), (0, 1)).index_copy_(0, slot_R, dgate_R1[:, 0])
        return grad_TD, dx_TD, dgate_S[:-1].view_as(gate_TK), dw_in, dw_out, None, None


def multiply(a_RK: Tensor, b_EKN: Tensor, sizes: list[int]) -> Tensor:
    """a[r] b[e] for every row r of every expert e, [R, N]."""
    y_RN = a_RK.new_empty(len(a_RK), b_EKN.shape[2])
    for a, b, y in zip(a_RK.split(sizes), b_EKN.unbind(0), y_RN.split(sizes), strict=True):
        product(a, b, out=y)
    return y_RN


def outer(a_RM: Tensor, b_RN: Tensor, sizes: list[int], out: Tensor) -> None:
    """Each expert's sum over its rows of a^T b into `out` [E, M, N]; 0 for an expert without rows."""
    for a, b, dw in zip(a_RM.split(sizes), b_RN.split(sizes), out.unbind(0), strict=True):
        product(a.t(), b, out=dw)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b, in float32 where a CPU multiplies nothing narrower itself."""
    if a.dtype == torch.bfloat16 and a.is_cpu and not multiplies_bfloat16():
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def swiglu(z_R2F: Tensor) -> Tensor:
    """h = silu(gate) * up of z = [gate, up]."""
    gate_RF, up_RF = z_R2F.chunk(2, -1)
    return F.silu(gate_RF).mul_(up_RF)


def swiglu_backward(z_R2F: Tensor, dh_RF: Tensor) -> tuple[Tensor, Tensor]:
    """h, and the gradient of z; overwrites that of h."""
    gate_RF, up_RF = z_R2F.chunk(2, -1)
    silu_RF, dz_R2F = F.silu(gate_RF), torch.empty_like(z_R2F)
    dgate_RF, dup_RF = dz_R2F.chunk(2, -1)
    torch.mul(dh_RF, silu_RF, out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(dh_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
    return silu_RF.mul_(up_RF), dz_R2F
