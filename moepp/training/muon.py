"""Muon and AdamW as one optimizer, with one state and one learning-rate schedule, as a Trainer takes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, EPS
from torch.optim._muon import muon as orthogonal_update


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but torch.optim.Muon's update for the groups that hold its options under `muon`.

    A stack of matrices [E, ., .] is updated matrix by matrix, which torch.optim.Muon refuses.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        groups = self.param_groups
        for group in groups:
            if "muon" in group:
                self._orthogonal_step(group)
        self.param_groups = [group for group in groups if "muon" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        trained = [p for p in group["params"] if p.grad is not None]
        for p in trained:
            if not self.state[p]:
                # AdamW looks for a step in every state that it loads.
                self.state[p] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        buffers = [self.state[p]["momentum_buffer"] for p in trained]
        parameters, gradients, momenta = map(_matrices, (trained, [p.grad for p in trained], buffers))
        orthogonal_update(
            parameters,
            gradients,
            momenta,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            eps=EPS,
            has_complex=False,
            **group["muon"],
        )


def _matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Views of every matrix in these stacks and matrices."""
    return [matrix for tensor in tensors for matrix in (tensor.unbind() if tensor.ndim == 3 else [tensor])]
