"""The FFN experts over rows sorted by expert, with a backward pass by hand that keeps little.

One function for all kernels that sort slots into rows of a static number (base.py) and never wait for the host. They
differ in `Products`: who multiplies, and whether rows are gathered into memory. Kept for the backward pass is z =
[gate, up] of every row, 2F numbers; inputs are gathered again, h = silu(gate) up is computed again, and outputs are
not needed: with dh = w_out^T grad, the gate's gradient <grad, w_out h> is <dh, h>.

Shape suffixes as in experts.py; R rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import RoutedTokens, SlotPlan, first_derivative_only, plan_slots, taken_from


class Products(Protocol):
    """The passes over the rows of one plan. `end_E[-1]` of R rows belong to FFN experts; what lies behind them holds
    anything, and reaches no result. Every output has one writer and every sum one order: two runs give the same bits.
    """

    def gather(self, x_TD: Tensor) -> Tensor:
        """What the other passes take as rows of x: x of each row's token, or x itself where they find them there."""

    def swiglu_in(self, x_RD: Tensor, w_in: Tensor, keep_z: bool) -> tuple[Tensor | None, Tensor]:
        """z = w_in x, [R, 2F], or None unless kept, and h = silu(gate) * up, [R, F]."""

    def matmul(self, a_RK: Tensor, b_EKN: Tensor) -> Tensor:
        """a[r] b[e] for every row r of every expert e, [R, N]; b is contiguous, or the transpose of such a tensor."""

    def swiglu_out_backward(
        self, grad_RD: Tensor, w_out: Tensor, z_R2F: Tensor, gate_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of z [R, 2F], gate * h [R, F], and the gates' gradient [T, K]."""

    def outer(self, a: Tensor, b: Tensor, like: Tensor, gathered: str) -> Tensor:
        """Each expert's sum over its rows of a^T b, a weight's gradient, in the shape [E, A, B] of `like`; 0 for an
        expert without rows. `gathered`, "a" or "b", is the operand that came from `gather`.
        """

    def combine(
        self, y_RD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
        mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """scale x + mix V + the sum of each token's rows, each times its gate if there are gates; [T, D] in `dtype`."""

    def affine_backward(self, grad_TD: Tensor, x_TD: Tensor, vectors_CD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradients of scale, <grad, x> [T], and of mix, <grad, V_c> [T, C]; None without vectors."""

    def weighted_rows(self, weight_TC: Tensor, v_TD: Tensor) -> Tensor:
        """The sum over tokens of weight_tc v_t, [C, D], in the weights' dtype."""


class PlannedExperts(torch.autograd.Function):
    """scale x + mix V + sum over k of gate_k expert_k(x), [T, D] in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, w_in: Tensor, w_out: Tensor, x_TD: Tensor, gate_TK: Tensor,
        scale_T: Tensor | None, mix_TC: Tensor | None, vectors_CD: Tensor | None, products: Products,
        dtype: torch.dtype, with_backward: bool,
    ) -> Tensor:  # fmt: skip
        w_in, w_out, x_rows_TD = w_in.contiguous(), w_out.contiguous(), x_TD.to(w_in.dtype).contiguous()
        z_R2F, h_RF = products.swiglu_in(
            products.gather(x_rows_TD), w_in, keep_z=with_backward and any(ctx.needs_input_grad)
        )
        y_RD = products.matmul(h_RF, w_out.transpose(1, 2))
        ctx.save_for_backward(w_in, w_out, x_TD, x_rows_TD, gate_TK, scale_T, mix_TC, vectors_CD, z_R2F)
        ctx.products = products
        return products.combine(y_RD, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        w_in, w_out, x_TD, x_rows_TD, gate_TK, scale_T, mix_TC, vectors_CD, z_R2F = taken_from(ctx)
        products, grad_TD = ctx.products, grad_TD.contiguous()
        grad_RD = products.gather(grad_TD.to(w_in.dtype))
        dz_R2F, gated_h_RF, dgate_TK = products.swiglu_out_backward(grad_RD, w_out, z_R2F, gate_TK)
        dw_out = products.outer(grad_RD, gated_h_RF, like=w_out, gathered="a")
        del z_R2F, grad_RD, gated_h_RF
        dx_RD = products.matmul(dz_R2F, w_in)
        dx_TD = products.combine(dx_RD, None, grad_TD, scale_T, None, None, x_TD.dtype)
        dw_in = products.outer(dz_R2F, products.gather(x_rows_TD), like=w_in, gathered="b")
        dscale_T, dmix_TC = (None, None) if scale_T is None else products.affine_backward(grad_TD, x_TD, vectors_CD)
        dvectors_CD = None if mix_TC is None else products.weighted_rows(mix_TC, grad_TD)
        return dw_in, dw_out, dx_TD, dgate_TK, dscale_T, dmix_TC, dvectors_CD, None, None, None


def planned_experts(
    w_in: Tensor, w_out: Tensor, tokens: RoutedTokens, products: Callable[[SlotPlan], Products]
) -> Tensor:
    """The map of base.py. Where the batch may need more rows than it is to keep, the rest goes through a second pass
    that keeps nothing: mostly it has no rows, and costs little more than its launches.
    """

    def run(w_in: Tensor, w_out: Tensor, tokens: RoutedTokens) -> Tensor:
        made = products(plan_slots(tokens, len(w_in)))
        dtype = tokens.dtype or tokens.gate_TK.dtype
        with_backward = torch.is_grad_enabled()  # which autograd does not tell its functions
        inputs = w_in, w_out, tokens.x_TD, tokens.gate_TK, *tokens.affine()
        return PlannedExperts.apply(*inputs, made, dtype, with_backward)

    if tokens.kept_rows is None or tokens.kept_rows >= tokens.rows:
        return run(w_in, w_out, tokens)
    first, rest = split_rows(replace(tokens, dtype=None), len(w_in), tokens.kept_rows)
    rest_TD = checkpoint(run, w_in, w_out, rest, use_reentrant=False, preserve_rng_state=False)
    return run(w_in, w_out, first) + rest_TD


def split_rows(tokens: RoutedTokens, experts: int, kept: int) -> tuple[RoutedTokens, RoutedTokens]:
    """The first `kept` FFN slots, with what the other experts add, and those that remain."""
    ffn_TK = tokens.expert_TK < experts
    first_TK = (ffn_TK.reshape(-1).cumsum(0) <= kept).view_as(ffn_TK)
    first, rest = (tokens.expert_TK.masked_fill(~chosen_TK, experts) for chosen_TK in (first_TK, ~first_TK))
    return (
        replace(tokens, expert_TK=first, most_rows=kept),
        replace(tokens, expert_TK=rest, most_rows=tokens.rows - kept, others=None),
    )
