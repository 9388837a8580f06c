"""Rows sorted once by expert and multiplied in contiguous slices, one expert after the other. Runs everywhere.

The default on CPUs, and the reference for the other kernels. Shape suffixes as in experts.py; S = T*K slots, R rows, B
rows of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RoutedTokens, first_derivative_only, taken_from
from .cpu import multiplies_bfloat16

# oneDNN compiles one bf16 kernel per new (M, N, K), at milliseconds each, and routing gives every expert a new M at
# every step. Rounding M up to a multiple of this keeps the number of shapes small; the rows added have gate 0 and
# change neither values nor gradients.
ROW_BUCKET = 64
# Consecutive experts are taken together while their z has at most this many numbers: small ones share their passes, and
# what large ones need for a moment is little and stays in the cache.
BLOCK_NUMBERS = 2**18


@dataclass
class Block:
    """Consecutive experts, their rows, and how many each of them has."""

    experts: slice
    rows: slice
    sizes: list[int]

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass
class RowPlan:
    """FFN slots sorted by expert: expert e owns `sizes[e]` consecutive entries of `slot_R`.

    An entry is the slot's index t*K+k; T*K marks a padding row.
    """

    slot_R: Tensor
    sizes: list[int]

    def blocks(self, most_rows: int) -> Iterator[Block]:
        """Consecutive experts with at most `most_rows` rows, or one with more."""
        expert = row = 0
        while expert < len(self.sizes):
            last, rows = expert + 1, self.sizes[expert]
            while last < len(self.sizes) and rows + self.sizes[last] <= most_rows:
                rows, last = rows + self.sizes[last], last + 1
            yield Block(slice(expert, last), slice(row, row + rows), self.sizes[expert:last])
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
    """Adds each token's gated experts to `y_TD`, in place. Kept for the backward pass is z = [gate, up] of every row:
    inputs are gathered and h = silu(gate) * up computed again, the gradient of a row's weight, <grad, w_out h>, is
    <w_out^T grad, h>, and that of each expert's weights goes straight to its place in the stack.
    """

    @staticmethod
    def forward(
        ctx: Any, y_TD: Tensor, x_TD: Tensor, gate_TK: Tensor, w_in: Tensor, w_out: Tensor, plan: RowPlan, keep: bool
    ) -> Tensor:
        _, dim, hidden = w_out.shape
        token_R = (plan.slot_R // gate_TK.shape[1]).remainder(len(x_TD))  # padding rows read token 0
        gate_R1 = F.pad(gate_TK.reshape(-1), (0, 1))[plan.slot_R, None]  # padding rows weigh 0
        ctx.blocks = list(plan.blocks(BLOCK_NUMBERS // (2 * hidden)))
        z_R2F = w_in.new_empty(len(token_R), 2 * hidden) if keep else None
        for block, (z_B2F, h_BF, row_BD) in with_scratch(ctx.blocks, w_in, 0 if keep else 2 * hidden, hidden, dim):
            token_B, z_B2F = token_R[block.rows], z_B2F if z_R2F is None else z_R2F[block.rows]
            torch.index_select(x_TD, 0, token_B, out=row_BD)
            multiply(row_BD, w_in[block.experts].mT, block, out=z_B2F)
            multiply(swiglu(z_B2F, out=h_BF), w_out[block.experts].mT, block, out=row_BD)
            y_TD.index_add_(0, token_B, row_BD * gate_R1[block.rows])
        ctx.mark_dirty(y_TD)
        ctx.save_for_backward(x_TD, gate_TK, w_in, w_out, plan.slot_R, token_R, gate_R1, z_R2F)
        return y_TD

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_TK, w_in, w_out, slot_R, token_R, gate_R1, z_R2F = taken_from(ctx)
        _, dim, hidden = w_out.shape
        dw_in, dw_out = (
            torch.empty_like(w) if needed else None
            for w, needed in zip((w_in, w_out), ctx.needs_input_grad[3:5], strict=True)
        )
        dy_TD, dx_TD, dgate_R1 = grad_TD.to(w_in.dtype), torch.zeros_like(x_TD), torch.empty_like(gate_R1)
        widths = 2 * hidden, hidden, hidden, dim
        for block, (dz_B2F, dh_BF, h_BF, row_BD) in with_scratch(ctx.blocks, w_in, *widths):
            experts, token_B = block.experts, token_R[block.rows]
            torch.index_select(dy_TD, 0, token_B, out=row_BD)
            multiply(row_BD, w_out[experts], block, out=dh_BF)
            dgate_R1[block.rows] = swiglu_backward(z_R2F[block.rows], dh_BF, gate_R1[block.rows], h_BF, dz_B2F)
            if dw_out is not None:
                outer(row_BD, h_BF, block, out=dw_out[experts])
            if dw_in is not None:
                outer(dz_B2F, torch.index_select(x_TD, 0, token_B, out=row_BD), block, out=dw_in[experts])
            multiply(dz_B2F, w_in[experts], block, out=row_BD)
            dx_TD.index_add_(0, token_B, row_BD)
        dgate_S = F.pad(torch.zeros_like(gate_TK).reshape(-1), (0, 1)).index_copy_(0, slot_R, dgate_R1[:, 0])
        return grad_TD, dx_TD, dgate_S[:-1].view_as(gate_TK), dw_in, dw_out, None, None


def with_scratch(blocks: list[Block], like: Tensor, *widths: int) -> Iterator[tuple[Block, list[Tensor]]]:
    """Each block, with tensors of its rows and of these widths. All blocks write to the same memory: new memory for
    each, of a new size, would leave the allocator with as many holes.
    """
    scratch = [like.new_empty(max(map(len, blocks), default=0), width) for width in widths]
    for block in blocks:
        yield block, [memory[: len(block)] for memory in scratch]


def multiply(a_BK: Tensor, b_EKN: Tensor, block: Block, out: Tensor) -> None:
    """a[r] b[e] for every row r of every expert e, into `out` [B, N]."""
    for a, b, y in zip(a_BK.split(block.sizes), b_EKN.unbind(0), out.split(block.sizes), strict=True):
        product(a, b, out=y)


def outer(a_BM: Tensor, b_BN: Tensor, block: Block, out: Tensor) -> None:
    """Each expert's sum over its rows of a^T b into `out` [E, M, N]; 0 for an expert without rows."""
    for a, b, dw in zip(a_BM.t().split(block.sizes, 1), b_BN.split(block.sizes), out.unbind(0), strict=True):
        product(a, b, out=dw)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b, in float32 where a CPU multiplies nothing narrower itself."""
    if a.dtype == torch.bfloat16 and a.is_cpu and not multiplies_bfloat16():
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def swiglu(z_B2F: Tensor, out: Tensor) -> Tensor:
    """h = silu(gate) * up of z = [gate, up], into `out` [B, F]."""
    gate_BF, up_BF = z_B2F.chunk(2, -1)
    return torch.ops.aten.silu.out(gate_BF, out=out).mul_(up_BF)


def swiglu_backward(z_B2F: Tensor, dh_BF: Tensor, weight_B1: Tensor, h_BF: Tensor, dz_B2F: Tensor) -> Tensor:
    """The gradient of the rows' weights, [B, 1], from w_out^T grad, which is overwritten; writes h times its weight and
    the gradient of z.
    """
    gate_BF, up_BF = z_B2F.chunk(2, -1)
    dgate_BF, dup_BF = dz_B2F.chunk(2, -1)
    silu_BF = torch.ops.aten.silu.out(gate_BF, out=dup_BF)
    torch.mul(silu_BF, up_BF, out=h_BF)
    dweight_B1 = torch.mul(dh_BF, h_BF, out=dgate_BF).sum(1, keepdim=True, dtype=weight_B1.dtype)
    dup_BF.mul_(dh_BF.mul_(weight_B1))
    torch.ops.aten.silu_backward.grad_input(dh_BF.mul_(up_BF), gate_BF, grad_input=dgate_BF)
    h_BF.mul_(weight_B1)
    return dweight_B1
