"""Which rows go to which FFN expert, and back.

A dispatcher maps `(w_in [E,2F,D], w_out [E,D,F], x [T,D], expert ids [T,K], gates [T,K], others)` to the gated sum over
each token's experts, [T,D] in the gates' dtype. Rows are multiplied in the weights' dtype. Slots whose id is E or more
(zero-computation experts, dropped rows) never reach an FFN expert; `others`, an `experts.Affine` or None, is what the
zero-computation experts add. Every backend is such a function. Shape suffixes as in experts.py.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from moepp.layers.kernels import sorted_rows

if TYPE_CHECKING:
    from moepp.layers.experts import Affine

Backend = Literal["auto", "sorted"]
BACKENDS = {"sorted": sorted_rows.dispatch}


def choose_backend(x_TD: Tensor) -> str:
    """The backend that `auto` stands for on this tensor."""
    return "sorted"


class LocalDispatcher:
    """All experts on this device."""

    def __init__(self, backend: Backend = "auto"):
        self.backend = backend

    def __call__(
        self,
        w_in: Tensor,
        w_out: Tensor,
        x_TD: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        others: "Affine | None",
    ) -> Tensor:
        backend = choose_backend(x_TD) if self.backend == "auto" else self.backend
        dtype = compute_dtype(x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return BACKENDS[backend](w_in.to(dtype), w_out.to(dtype), x_TD, expert_TK, gate_TK, others)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products run: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
