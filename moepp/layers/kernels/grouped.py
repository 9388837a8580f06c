"""Rows sorted by expert and multiplied by one grouped matrix product per projection. Never waits for the host.

`grouped_mm` does not touch rows behind the last expert's: they cost no product, and hold uninitialised memory in its
outputs (never multiplied by 0: they may hold NaN). All that is no product is done by Triton kernels that stop at the
last expert's row (triton_rows.py); on CPUs and inside torch.compile by plain torch over all rows (torch_rows.py).

Shape suffixes as in experts.py; R rows.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_rows
from .base import BackendError, RoutedTokens, SlotPlan, takes_triton
from .planned import planned_experts


def dispatch(w_in: Tensor, w_out: Tensor, tokens: RoutedTokens) -> Tensor:
    """The map of base.py. Raises BackendError for dtypes and widths that grouped_mm does not take."""
    _refuse_unsupported(w_out)
    return planned_experts(w_in, w_out, tokens, partial(GroupedProducts, passes=_row_passes(w_in)))


def aligned(w_out: Tensor) -> bool:
    """Whether every row of both projections starts at a multiple of 16 bytes, as grouped_mm demands."""
    return all(size * w_out.element_size() % 16 == 0 for size in w_out.shape[1:])


def _refuse_unsupported(w_out: Tensor) -> None:
    _, dim, hidden = w_out.shape
    if w_out.dtype == torch.float64:
        raise BackendError("backend=grouped does not compute in float64; choose backend=sorted")
    if not aligned(w_out):
        multiple = 16 // w_out.element_size()
        raise BackendError(
            f"backend=grouped needs dim={dim} and hidden={hidden} to be multiples of {multiple} in {w_out.dtype}; "
            "change them or choose backend=sorted"
        )


def _row_passes(weights: Tensor) -> ModuleType:
    if not takes_triton(weights):
        return torch_rows
    from . import triton_rows

    return triton_rows


@dataclass
class GroupedProducts:
    """`planned.Products` by grouped_mm; `passes` is torch_rows or triton_rows."""

    plan: SlotPlan
    passes: ModuleType

    def gather(self, x_TD: Tensor) -> Tensor:
        return self.passes.gather(self.plan, x_TD)

    def swiglu_in(self, x_RD: Tensor, w_in: Tensor, keep_z: bool) -> tuple[Tensor | None, Tensor]:
        z_R2F = self.matmul(x_RD, w_in.transpose(1, 2))
        return z_R2F if keep_z else None, self.passes.swiglu(self.plan, z_R2F)

    def matmul(self, a_RK: Tensor, b_EKN: Tensor) -> Tensor:
        return F.grouped_mm(a_RK, b_EKN, offs=self.plan.end_E)

    def swiglu_out_backward(
        self, grad_RD: Tensor, w_out: Tensor, z_R2F: Tensor, gate_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.passes.swiglu_backward(self.plan, self.matmul(grad_RD, w_out), z_R2F, gate_TK)

    def outer(self, a: Tensor, b: Tensor, like: Tensor, gathered: str) -> Tensor:
        return F.grouped_mm(a.t(), b, offs=self.plan.end_E)

    def combine(
        self, y_RD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
        mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return self.passes.combine(self.plan, y_RD, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, dtype)

    def affine_backward(self, grad_TD: Tensor, x_TD: Tensor, vectors_CD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.passes.affine_backward(grad_TD, x_TD, vectors_CD)

    def weighted_rows(self, weight_TC: Tensor, v_TD: Tensor) -> Tensor:
        return self.passes.weighted_rows(weight_TC, v_TD)
