"""What `grouped` does between its products, in Triton: reads and writes no row behind the last expert's.

The same functions as in torch_rows.py; float32 between load and store. Importing this module needs the package
`triton`. Shape suffixes as in experts.py; R rows.
"""

import torch
from torch import Tensor

from . import triton_kernels as kernels
from .base import SlotPlan

ROWS = 16  # of a program
COLUMNS = 256
CHUNK = 512  # tokens that one program sums


def gather(plan: SlotPlan, x_TD: Tensor) -> Tensor:
    """x of each row's token, [R, D]."""
    x_TD = x_TD.contiguous()
    rows, dim = len(plan.slot_R), x_TD.shape[1]
    x_RD = x_TD.new_empty(rows, dim)
    kernels.gather_kernel[(_blocks(dim, COLUMNS) * _blocks(rows, ROWS),)](
        x_TD, plan.slot_R, plan.end_E, x_RD, dim, EXPERTS=len(plan.end_E), TOP_K=plan.top_k,
        BLOCK_R=ROWS, BLOCK_D=COLUMNS,
    )  # fmt: skip
    return x_RD


def swiglu(plan: SlotPlan, z_R2F: Tensor) -> Tensor:
    """h = silu(gate) * up of z = [gate, up], [R, F]."""
    rows, hidden = len(z_R2F), z_R2F.shape[1] // 2
    h_RF = z_R2F.new_empty(rows, hidden)
    kernels.swiglu_kernel[(_blocks(hidden, COLUMNS) * _blocks(rows, ROWS),)](
        z_R2F, plan.end_E, h_RF, hidden, EXPERTS=len(plan.end_E), BLOCK_R=ROWS, BLOCK_F=COLUMNS
    )
    return h_RF


def swiglu_backward(plan: SlotPlan, dh_RF: Tensor, z_R2F: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From dh = w_out^T grad: the gradient of z [R, 2F], each row's gate times h [R, F], the gates' gradient [T, K]."""
    rows, hidden = dh_RF.shape
    dz_R2F, gated_h_RF, dgate_R = torch.empty_like(z_R2F), torch.empty_like(dh_RF), gate_TK.new_empty(rows)
    kernels.swiglu_backward_kernel[_blocks(rows, ROWS),](
        dh_RF, z_R2F, gate_TK.contiguous(), plan.slot_R, plan.end_E, dz_R2F, gated_h_RF, dgate_R, hidden,
        EXPERTS=len(plan.end_E), BLOCK_R=ROWS, BLOCK_F=COLUMNS,
    )  # fmt: skip
    return dz_R2F, gated_h_RF, plan.of_slots(dgate_R)


def combine(
    plan: SlotPlan, y_RD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
    mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """scale x + mix V + the sum of each token's rows, each times its gate if there are gates; [T, D] in `dtype`."""
    tokens, dim = x_TD.shape
    out_TD = x_TD.new_empty(tokens, dim, dtype=dtype)
    inputs = [None if t is None else t.contiguous() for t in (gate_TK, x_TD, scale_T, mix_TC, vectors_CD)]
    kernels.combine_kernel[(_blocks(dim, COLUMNS) * _blocks(tokens, ROWS),)](
        y_RD, plan.row_TK, plan.end_E, *inputs, out_TD, tokens, dim,
        EXPERTS=len(plan.end_E), TOP_K=plan.top_k, C=0 if mix_TC is None else mix_TC.shape[1],
        GATED=gate_TK is not None, SCALED=scale_T is not None, BLOCK_T=ROWS, BLOCK_D=COLUMNS,
    )  # fmt: skip
    return out_TD


def affine_backward(grad_TD: Tensor, x_TD: Tensor, vectors_CD: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of scale, <grad, x> [T], and of mix, <grad, V_c> [T, C]; None without vectors."""
    tokens, dim = x_TD.shape
    dscale_T = grad_TD.new_empty(tokens, dtype=torch.float32)
    dmix_TC = None if vectors_CD is None else dscale_T.new_empty(tokens, len(vectors_CD))
    vectors_CD = None if vectors_CD is None else vectors_CD.contiguous()
    kernels.affine_backward_kernel[_blocks(tokens, ROWS),](
        grad_TD, x_TD.contiguous(), vectors_CD, dscale_T, dmix_TC, tokens, dim,
        C=0 if vectors_CD is None else len(vectors_CD), BLOCK_T=ROWS, BLOCK_D=COLUMNS,
    )  # fmt: skip
    return dscale_T, dmix_TC


def weighted_rows(weight_TM: Tensor, v_TD: Tensor) -> Tensor:
    """The sum over tokens of weight_tm v_t, [M, D] in float32: by chunks, then over them. What weighs 0 is not read."""
    (tokens, columns), dim = weight_TM.shape, v_TD.shape[1]
    chunks = _blocks(tokens, CHUNK)
    sum_PMD = weight_TM.new_empty(chunks, columns, dim)
    kernels.weighted_rows_kernel[_blocks(dim, COLUMNS), chunks, columns](
        weight_TM.contiguous(), v_TD.contiguous(), sum_PMD, tokens, CHUNK, dim, columns, BLOCK_T=ROWS, BLOCK_D=COLUMNS
    )
    return sum_PMD.sum(0)


def mixed_rows(weight_TM: Tensor, v_MD: Tensor, like_TD: Tensor) -> Tensor:
    """The sum over m of weight_tm v_m, [T, D] as `like_TD` is."""
    (tokens, dim), out_TD = like_TD.shape, torch.empty_like(like_TD)
    kernels.mixed_rows_kernel[(_blocks(dim, COLUMNS) * _blocks(tokens, ROWS),)](
        weight_TM, v_MD, out_TD, tokens, dim, weight_TM.shape[1], BLOCK_T=ROWS, BLOCK_D=COLUMNS
    )
    return out_TD


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
