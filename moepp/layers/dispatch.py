"""Which rows go to which FFN expert, and back.

A dispatcher maps `(w_in [E,2F,D], w_out [E,D,F], x [T,D], expert ids [T,K], gates [T,K])` to the gated sum over each
token's FFN experts, [T,D] in at least float32. Slots whose id is E or more (zero-computation experts, dropped rows)
never reach an expert. Shape suffixes as in experts.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN compiles one bf16 kernel per new (M, N, K), at milliseconds each, and routing gives every expert a new M at
# every step. Rounding M up to a multiple of this keeps the number of shapes small; the rows added have gate 0 and
# change neither values nor gradients.
ROW_BUCKET = 64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products run: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@dataclass
class RowPlan:
    """FFN slots sorted by expert: expert e owns `sizes[e]` consecutive entries of `slot_R` (index t*K+k; T*K marks a
    padding row).
    """

    slot_R: Tensor
    sizes: list[int]


def plan_rows(expert_TK: Tensor, experts: int, bucket: int = 1) -> RowPlan:
    """Sorts the slots by expert, keeps those of FFN experts in token order, and pads each expert's share to a multiple
    of `bucket`.
    """
    expert_S = expert_TK.reshape(-1).clamp(max=experts)
    order_S = expert_S.argsort(stable=True)
    count_E = torch.bincount(expert_S, minlength=experts + 1)[:experts]
    kept_R = order_S[: int(count_E.sum())]
    if bucket == 1:
        return RowPlan(kept_R, count_E.tolist())
    padded_E = (count_E + bucket - 1) // bucket * bucket
    shift_E = (padded_E.cumsum(0) - padded_E) - (count_E.cumsum(0) - count_E)  # how far each expert's rows move
    rows = torch.arange(len(kept_R), device=kept_R.device) + shift_E.repeat_interleave(count_E)
    slot_R = torch.full((int(padded_E.sum()),), expert_S.numel(), dtype=kept_R.dtype, device=kept_R.device)
    slot_R[rows] = kept_R
    return RowPlan(slot_R, padded_E.tolist())


class LocalDispatcher:
    """All experts on this device: rows sorted once and multiplied in contiguous slices."""

    def __call__(self, w_in: Tensor, w_out: Tensor, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        dtype = compute_dtype(x_TD)
        plan = plan_rows(expert_TK, len(w_in), ROW_BUCKET if dtype == torch.bfloat16 and x_TD.is_cpu else 1)
        top_k, tokens = expert_TK.shape[1], len(x_TD)
        token_R = (plan.slot_R // top_k).remainder(tokens)  # padding rows read token 0
        gate_R = F.pad(gate_TK.reshape(-1), (0, 1))[plan.slot_R]  # padding rows weigh 0
        x_RD = x_TD.to(dtype)[token_R]
        # unbind, not indexing: its backward stacks the experts' gradients instead of adding E full-size ones
        weights = zip(x_RD.split(plan.sizes), w_in.to(dtype).unbind(0), w_out.to(dtype).unbind(0), strict=True)
        with torch.autocast(x_TD.device.type, enabled=False):
            y_RD = torch.cat([swiglu(rows, w_in_e, w_out_e) for rows, w_in_e, w_out_e in weights])
        y_TD = torch.zeros(x_TD.shape, dtype=gate_TK.dtype, device=x_TD.device)
        return y_TD.index_add(0, token_R, y_RD * gate_R[:, None])


def swiglu(x_RD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """w_out (silu(gate) * up), where w_in x = [gate, up]. An expert without rows stays in the graph, so its gradient is
    0 and not None.
    """
    gate_RF, up_RF = F.linear(x_RD, w_in).chunk(2, -1)
    return F.linear(F.silu(gate_RF) * up_RF, w_out)
