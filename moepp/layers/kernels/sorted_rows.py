"""Rows sorted once by expert and multiplied in contiguous slices, one expert after the other. Runs everywhere.

The default on CPUs, and the reference for the other kernels. Shape suffixes as in experts.py; S = T*K slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RoutedTokens

# oneDNN compiles one bf16 kernel per new (M, N, K), at milliseconds each, and routing gives every expert a new M at
# every step. Rounding M up to a multiple of this keeps the number of shapes small; the rows added have gate 0 and
# change neither values nor gradients.
ROW_BUCKET = 64


@dataclass
class RowPlan:
    """FFN slots sorted by expert: expert e owns `sizes[e]` consecutive entries of `slot_R`.

    An entry is the slot's index t*K+k; T*K marks a padding row.
    """

    slot_R: Tensor
    sizes: list[int]


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
    dtype, x_TD, gate_TK = w_in.dtype, tokens.x_TD, tokens.gate_TK
    bucket = ROW_BUCKET if dtype == torch.bfloat16 and x_TD.is_cpu else 1
    plan = plan_rows(tokens.expert_TK, len(w_in), bucket, tokens.sizes)
    token_R = (plan.slot_R // gate_TK.shape[1]).remainder(len(x_TD))  # padding rows read token 0
    gate_R = F.pad(gate_TK.reshape(-1), (0, 1))[plan.slot_R]  # padding rows weigh 0
    # unbind, not indexing: its backward stacks the experts' gradients instead of adding E full-size ones
    weights = zip(x_TD.to(dtype)[token_R].split(plan.sizes), w_in.unbind(0), w_out.unbind(0), strict=True)
    y_RD = torch.cat([swiglu(x_rows, w_in_e, w_out_e) for x_rows, w_in_e, w_out_e in weights])
    y_TD = tokens.others(x_TD) if tokens.others is not None else gate_TK.new_zeros(x_TD.shape)
    return y_TD.index_add_(0, token_R, y_RD * gate_R[:, None])


def swiglu(x_RD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """w_out (silu(gate) * up), where w_in x = [gate, up].

    An expert without rows stays in the graph, so its gradient is 0 and not None.
    """
    gate_RF, up_RF = F.linear(x_RD, w_in).chunk(2, -1)
    return F.linear(F.silu(gate_RF) * up_RF, w_out)
