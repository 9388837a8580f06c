"""Which rows go to which FFN expert, and back.

A dispatcher maps the weights of FFN experts and `RoutedTokens` to the gated sum over each token's experts, by one of
the backends here (kernels/base.py). It also knows the rest of the batch: its `share` turns one device's slot counts
into those of all devices. Shape suffixes as in experts.py; W devices that share a batch, N all experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels import grouped, sorted_rows, triton_experts
from .kernels.base import BackendError, RoutedTokens
from .regions import region
from .settings import Backend

Kernel = Callable[[Tensor, Tensor, RoutedTokens], Tensor]
BACKENDS: dict[str, Kernel] = {
    "sorted": sorted_rows.dispatch,
    "grouped": grouped.dispatch,
    "triton": triton_experts.dispatch,
}
TRACEABLE = ("grouped",)  # the others leave torch.compile's graph: host-side sizes, kernels of their own


def choose_backend(w_out: Tensor) -> str:
    """The backend that `auto` stands for with these weights, [E, D, F] in the dtype they are multiplied in.

    `grouped` where grouped_mm has a kernel that takes the sizes from the device: bfloat16 on Hopper and on datacenter
    Blackwell. Elsewhere grouped_mm waits for the host and loops over the experts, as `sorted` does with less traffic,
    and is chosen where torch.export needs what it can trace.
    """
    if w_out.dtype != torch.bfloat16 or not grouped.aligned(w_out):
        return "sorted"
    waits = not w_out.is_cuda or torch.cuda.get_device_properties(w_out.device).major not in (9, 10)
    return "sorted" if waits and not torch.compiler.is_exporting() else "grouped"


@dataclass
class SlotCounts:
    """How many slots of a batch chose each expert, [W, K, N] by device, choice and expert.

    `device` is this device's row, and the only one where nobody needs those `of_others`. While `pending`, which has a
    `wait()`, the rows of the others are on their way. `sent` is kept while that may still read it: on GPUs a wait
    orders streams and returns before it is done.
    """

    count_WKN: Tensor
    device: int = 0
    pending: Any = None
    sent: Tensor | None = None
    of_others: bool = True

    def wait(self) -> Tensor:
        """`count_WKN`, complete."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        return self.count_WKN


class Meanwhile:
    """A part of a layer that needs no other device. A dispatcher that exchanges rows asks for it while they travel; it
    is computed once.
    """

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute, self.result = compute, None

    def __call__(self) -> Tensor:
        if self.result is None:
            self.result = self.compute()
        return self.result


class LocalDispatcher:
    """All experts and all tokens on this device."""

    def __init__(self, backend: Backend = "auto"):
        self.backend = backend

    def keeping(self) -> dict[str, Any]:
        """Options of `torch.utils.checkpoint.checkpoint` for a block, by which it keeps what is dear to make."""
        return {}

    def share(self, count_KN: Tensor) -> SlotCounts:
        """The counts of all devices, [W, K, N], from this device's own."""
        return SlotCounts(count_KN[None])

    def gather(self, of_this_T: Tensor) -> Tensor:
        """The same tensor of all devices, [W, T, ...], from this device's own [T, ...]."""
        return of_this_T[None]

    def __call__(
        self,
        w_in: Tensor,
        w_out: Tensor,
        tokens: RoutedTokens,
        counts: SlotCounts | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        """`counts` of the slots, where known, spare a dispatcher that exchanges rows its own; `meanwhile` gives it
        something to compute.
        """
        return self.compute(w_in, w_out, tokens)

    def compute(self, w_in: Tensor, w_out: Tensor, tokens: RoutedTokens) -> Tensor:
        """By the backend's kernel, in the dtype that autocast asks for."""
        dtype = compute_dtype(tokens.x_TD)
        w_in, w_out = w_in.to(dtype), w_out.to(dtype)
        backend = choose_backend(w_out) if self.backend == "auto" else self.backend
        kernel = BACKENDS[backend]
        if torch.compiler.is_exporting() and backend not in TRACEABLE:
            raise BackendError(
                f"torch.export cannot trace backend={backend}, whose sizes the host counts; choose backend=grouped and"
                " bfloat16 weights"
            )
        if torch.compiler.is_compiling() and backend not in TRACEABLE:
            kernel = torch.compiler.disable(kernel)  # here and not above: it imports the compiler, which takes seconds
        with region("ffn_experts"), torch.autocast(tokens.x_TD.device.type, enabled=False):
            return kernel(w_in, w_out, tokens)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products run: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
