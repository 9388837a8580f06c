"""What `grouped` does between its products, in plain torch: runs everywhere, and torch.compile fuses it.

The same functions as in triton_rows.py. Shape suffixes as in experts.py; R rows.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Affine, SlotPlan


def gather(plan: SlotPlan, x_TD: Tensor) -> Tensor:
    """x of each row's token, [R, D]."""
    return x_TD[plan.token_R]


def swiglu(plan: SlotPlan, z_R2F: Tensor) -> Tensor:
    """h = silu(gate) * up of z = [gate, up], [R, F]."""
    gate_RF, up_RF = z_R2F.chunk(2, -1)
    return F.silu(gate_RF) * up_RF


def swiglu_backward(plan: SlotPlan, dh_RF: Tensor, z_R2F: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From dh = w_out^T grad: the gradient of z [R, 2F], each row's gate times h [R, F], the gates' gradient [T, K]."""
    a_RF, up_RF = z_R2F.chunk(2, -1)
    silu_RF = F.silu(a_RF)
    h_RF = silu_RF * up_RF
    dot_R = (dh_RF * h_RF).sum(-1, dtype=gate_TK.dtype)
    gate_R1 = gate_TK.reshape(-1)[plan.slot_R, None].to(dh_RF.dtype)
    dh_RF = dh_RF * gate_R1
    dz_R2F = torch.cat([torch.ops.aten.silu_backward(dh_RF * up_RF, a_RF), dh_RF * silu_RF], -1)
    return dz_R2F, h_RF * gate_R1, plan.of_slots(dot_R)


def combine(
    plan: SlotPlan, y_RD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
    mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """scale x + mix V + the sum of each token's rows, each times its gate if there are gates; [T, D] in `dtype`."""
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    parts = (served(plan, y_RD, k).to(wide) for k in range(plan.top_k))
    if gate_TK is not None:
        parts = (gate_TK[:, k, None] * part for k, part in enumerate(parts))
    y_TD = reduce(torch.add, parts)
    if scale_T is not None:
        y_TD = y_TD + Affine(scale_T, mix_TC, vectors_CD)(x_TD)
    # A cast to its own dtype would cost a compiled autograd function (torch 2.11) all its gradients.
    return y_TD if y_TD.dtype == dtype else y_TD.to(dtype)


def affine_backward(grad_TD: Tensor, x_TD: Tensor, vectors_CD: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of scale, <grad, x> [T], and of mix, <grad, V_c> [T, C]; None without vectors."""
    grad_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
    return (grad_TD * x_TD).sum(-1), None if vectors_CD is None else grad_TD @ vectors_CD.t()


def weighted_rows(weight_TC: Tensor, v_TD: Tensor) -> Tensor:
    """The sum over tokens of weight_tc v_t, [C, D] in the weights' dtype."""
    return weight_TC.t() @ v_TD.to(weight_TC.dtype)


def served(plan: SlotPlan, rows_RD: Tensor, k: int) -> Tensor:
    """The rows of every token's k-th choice, [T, D]; 0 where no FFN expert computed them."""
    if not rows_RD.shape[0]:
        return rows_RD.new_zeros(len(plan.row_TK), rows_RD.shape[1])
    row_T = plan.row_TK[:, k].clamp(max=rows_RD.shape[0] - 1)
    return torch.where(plan.served_TK[:, k, None], rows_RD[row_T], 0)
