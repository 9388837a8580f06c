"""Rows sorted by expert and multiplied by one grouped matrix product per projection. Never waits for the host.

Every size is static: all T*K slots get a row, and the number of rows of each expert stays on the device. Slots of no
FFN expert sort to the tail, which `grouped_mm` does not touch: those rows cost no product, but hold uninitialised
memory in its outputs and in its gradients. They are replaced by 0 where rows return to tokens (never multiplied by 0:
they may hold NaN). Nothing is summed with atomics, so two runs give the same bits.

Shape suffixes as in experts.py; S = T*K slots, which is also the number of rows.
"""

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from moepp.layers.experts import Affine


class BackendError(ValueError):
    """A backend that was asked for cannot run with these weights or on this machine; the message says what can."""


@dataclass
class SlotPlan:
    """All slots t*K+k sorted by expert, in token order within each; the slots of no FFN expert come last.

    Row r computes slot `slot_S[r]`; slot (t, k) lies in row `row_TK[t, k]`, which an FFN expert computes where
    `served_TK`. Expert e's rows end before row `end_E[e]` (int32).
    """

    slot_S: Tensor
    row_TK: Tensor
    served_TK: Tensor
    end_E: Tensor


def plan_slots(expert_TK: Tensor, experts: int) -> SlotPlan:
    """Ids of `experts` or more belong to no FFN expert."""
    expert_S, slot_S = expert_TK.reshape(-1).int().clamp(max=experts).sort(stable=True)
    row_S = torch.empty_like(slot_S).scatter_(0, slot_S, torch.arange(len(slot_S), device=slot_S.device))
    ids = torch.arange(experts, device=expert_S.device, dtype=torch.int32)
    end_E = torch.searchsorted(expert_S, ids, right=True, out_int32=True)
    return SlotPlan(slot_S, row_S.view_as(expert_TK), expert_TK < experts, end_E)


def dispatch(
    w_in: Tensor, w_out: Tensor, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, others: "Affine | None",
    sizes: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The dispatcher's map (dispatch.py); rows are multiplied in the weights' dtype, summed in the gates'."""
    refuse_unsupported(w_out)
    plan = plan_slots(expert_TK, len(w_in))
    x_SD = SpreadTokens.apply(x_TD.to(w_in.dtype), plan.slot_S, plan.row_TK, plan.served_TK)
    gate_SF, up_SF = F.grouped_mm(x_SD, w_in.transpose(1, 2), offs=plan.end_E).chunk(2, -1)
    y_SD = F.grouped_mm(F.silu(gate_SF) * up_SF, w_out.transpose(1, 2), offs=plan.end_E)
    y_TD = CombineRows.apply(y_SD, gate_TK, plan.slot_S, plan.row_TK, plan.served_TK)
    return y_TD if others is None else y_TD + others(x_TD)


def aligned(w_out: Tensor) -> bool:
    """Whether every row of both projections starts at a multiple of 16 bytes, as grouped_mm demands."""
    return all(size * w_out.element_size() % 16 == 0 for size in w_out.shape[1:])


def refuse_unsupported(w_out: Tensor) -> None:
    """BackendError for dtypes and widths that grouped_mm does not take."""
    _, dim, hidden = w_out.shape
    if w_out.dtype == torch.float64:
        raise BackendError("backend=grouped does not compute in float64; choose backend=sorted")
    if not aligned(w_out):
        multiple = 16 // w_out.element_size()
        raise BackendError(
            f"backend=grouped needs dim={dim} and hidden={hidden} to be multiples of {multiple} in {w_out.dtype}; "
            "change them or choose backend=sorted"
        )


class SpreadTokens(torch.autograd.Function):
    """Rows in expert order: x[slot // K].

    Its gradient sums each token's rows in the order of k. Autograd's own would add them with atomics, tail included.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slot_S: Tensor, row_TK: Tensor, served_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK, served_TK)
        return x_TD[slot_S // row_TK.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        row_TK, served_TK = ctx.saved_tensors
        wide = torch.promote_types(grad_SD.dtype, torch.float32)
        parts = (served_rows(grad_SD, row_TK, served_TK, k).to(wide) for k in range(row_TK.shape[1]))
        return reduce(torch.add, parts).to(grad_SD.dtype), None, None, None


class CombineRows(torch.autograd.Function):
    """Each token's gated sum over its served rows, [T, D] in the gates' dtype; the tail is left out of both passes."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, gate_TK: Tensor, slot_S: Tensor, row_TK: Tensor, served_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_SD, gate_TK, slot_S, row_TK, served_TK)
        parts = (gate_TK[:, k, None] * served_rows(y_SD, row_TK, served_TK, k) for k in range(row_TK.shape[1]))
        return reduce(torch.add, parts)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_SD, gate_TK, slot_S, row_TK, served_TK = ctx.saved_tensors
        top_k = row_TK.shape[1]
        gate_S = gate_TK.reshape(-1)[slot_S]
        grad_SD = (gate_S[:, None] * grad_TD[slot_S // top_k]).to(y_SD.dtype)
        dots = [(grad_TD * served_rows(y_SD, row_TK, served_TK, k)).sum(-1) for k in range(top_k)]
        return grad_SD, torch.stack(dots, 1).to(gate_TK.dtype), None, None, None


def served_rows(rows_SD: Tensor, row_TK: Tensor, served_TK: Tensor, k: int) -> Tensor:
    """The rows of every token's k-th choice, [T, D]; 0 where no FFN expert computed them."""
    return torch.where(served_TK[:, k, None], rows_SD[row_TK[:, k]], 0)
