"""What every kernel of the FFN experts is given, and how slots become rows.

A kernel maps `(w_in [E,2F,D], w_out [E,D,F], RoutedTokens)` to the gated sum over each token's experts, [T,D] in the
gates' dtype. Rows are multiplied in the weights' dtype. Slots whose id is E or more (zero-computation experts, dropped
slots) never reach an FFN expert. Shape suffixes as in experts.py; S = T*K slots, R rows of FFN experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class BackendError(ValueError):
    """A backend that was asked for cannot run with these weights or on this machine; the message says what can."""


@dataclass
class Affine:
    """What all zero-computation experts add, c x + M V, not yet evaluated: a kernel may fuse it with its combine.

    `scale_T` is c; `mix_TC` and `vectors_CD` are M and V, None without constant experts. All in at least float32.
    """

    scale_T: Tensor
    mix_TC: Tensor | None = None
    vectors_CD: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] in scale_T's dtype."""
        scaled_TD = self.scale_T[:, None] * x_TD
        if self.mix_TC is None:
            return scaled_TD
        return torch.addmm(scaled_TD, self.mix_TC, self.vectors_CD)


@dataclass
class RoutedTokens:
    """Tokens with the expert and the gate of each of their slots, and what the host knows of the load.

    `expert_TK` int64, E or more in slots of no FFN expert; `others` is what the zero-computation experts add. At most
    `most_rows` slots choose FFN experts: known where capacity limits them, else T*K. What rows beyond `kept_rows` need
    for the backward pass is not to be kept. `sizes`, the slots of each FFN expert, spare a kernel that needs them its
    wait for the device. A kernel may return the sum in `dtype` in place of the gates'.
    """

    x_TD: Tensor
    expert_TK: Tensor
    gate_TK: Tensor
    others: Affine | None = None
    most_rows: int | None = None
    kept_rows: int | None = None
    sizes: list[int] | None = None
    dtype: torch.dtype | None = None

    @property
    def rows(self) -> int:
        """How many rows a kernel provides for without asking the device."""
        slots = self.expert_TK.numel()
        if self.sizes is not None:
            return sum(self.sizes)
        return slots if self.most_rows is None else min(slots, self.most_rows)

    def affine(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """c, M and V of `others`, as an autograd function takes them."""
        others = self.others
        return (None, None, None) if others is None else (others.scale_T, others.mix_TC, others.vectors_CD)


@dataclass
class SlotPlan:
    """Slots t*K+k sorted by expert, in token order within each; row r computes slot `slot_R[r]`.

    Slots of no FFN expert come last, and beyond the rows there are. Slot (t, k) lies in row `row_TK[t, k]`, which an
    FFN expert computes where `served_TK`. Expert e's rows end before row `end_E[e]` (int32).
    """

    slot_R: Tensor
    row_TK: Tensor
    served_TK: Tensor
    end_E: Tensor

    @property
    def top_k(self) -> int:
        return self.row_TK.shape[1]

    @property
    def token_R(self) -> Tensor:
        return self.slot_R // self.top_k

    def of_slots(self, value_R: Tensor) -> Tensor:
        """Each slot's value from its row's, [T, K]; 0 where no FFN expert computed it."""
        if not value_R.shape[0]:
            return value_R.new_zeros(self.row_TK.shape)
        return torch.where(self.served_TK, value_R[self.row_TK.clamp(max=value_R.shape[0] - 1)], 0)


def plan_slots(tokens: RoutedTokens, experts: int) -> SlotPlan:
    """Never waits for the device: the number of rows is what the host knows, and their owners stay there."""
    expert_TK = tokens.expert_TK
    expert_S, slot_S = expert_TK.reshape(-1).int().clamp(max=experts).sort(stable=True)
    row_S = torch.empty_like(slot_S).scatter_(0, slot_S, torch.arange(slot_S.shape[0], device=slot_S.device))
    ids = torch.arange(experts, device=expert_S.device, dtype=torch.int32)
    end_E = torch.searchsorted(expert_S, ids, right=True, out_int32=True)
    return SlotPlan(slot_S[: tokens.rows], row_S.view_as(expert_TK), expert_TK < experts, end_E)


def takes_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels are for this tensor: on a GPU, but not inside torch.compile, which fuses plain torch."""
    on_gpu = tensor.is_cuda and tensor.dtype != torch.float64 and not torch.compiler.is_compiling()
    return on_gpu and has_triton()


@cache
def has_triton() -> bool:
    """CUDA builds of torch bring it."""
    return find_spec("triton") is not None


def taken_from(ctx: Any) -> tuple[Tensor | None, ...]:
    """What an autograd function saved, which its context no longer holds unless the graph is kept: the backward pass
    frees each as soon as it is done with it.
    """
    saved = ctx.saved_tensors
    if not torch.compiler.is_compiling():  # which frees what it saves itself
        ctx.maybe_clear_saved_tensors()
    return saved


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that has none itself: who differentiates what it gives gets torch's error for that. By itself
    torch raises it only where the gradient that comes in has a derivative, which that of a sum has not, and only where
    all leaves are asked for (`backward()`): elsewhere a second derivative would lack what goes through the function.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def marked(ctx: Any, *gradients: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return once(ctx, *gradients)
        inputs = ctx.saved_tensors  # before they are freed
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        return _Underivable.apply(outputs, *gradients, *inputs)  # create_graph=True

    return marked


class _Underivable(torch.autograd.Function):
    """`outputs`, as if they followed from the other arguments, but by no derivative."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Tensor | None, ...], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("trying to differentiate twice a function that has a first derivative only")
