"""Routers of other methods, with the interface of router.Router: (x, what the previous layer handed on) -> (logits,
what this layer hands on).

Shape suffixes: T tokens, D model width, P router width, N all experts, M null (zero) experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedNullRouter(nn.Module):
    """One null logit stands for all M zero experts (arXiv 2601.15370): a token's null slots are whatever its real
    experts leave.
    """

    def __init__(self, dim: int, experts: int, null_experts: int):
        super().__init__()
        self.null_experts = null_experts
        self.weight = nn.Parameter(torch.empty(experts - null_experts + 1, dim))  # the last row is the null logit's

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        logits_TN = torch.cat([logits[:, :-1], logits[:, -1:].expand(-1, self.null_experts)], 1)
        return logits_TN, logits_TN


class RecurrentRouter(nn.Module):
    """x' = Proj_j x, h_j = GRU(x', h_(j-1)), logits = W_j h_j (RMoE, arXiv 2408.06793); h of the first layer's
    predecessor is 0.

    One GRU serves all layers. Its owner is the model, which has it once in its state dict.
    """

    def __init__(self, dim: int, experts: int, gru: nn.GRUCell):
        super().__init__()
        self.projection = nn.Parameter(torch.empty(gru.hidden_size, dim))
        self.weight = nn.Parameter(torch.empty(experts, gru.hidden_size))
        self.shared = (gru,)  # in a tuple, so that it is no submodule of every layer

    def forward(self, x_TD: Tensor, previous_TP: Tensor | None) -> tuple[Tensor, Tensor]:
        (gru,) = self.shared
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            input_TP = F.linear(x_TD.to(dtype), self.projection.to(dtype))
            state_TP = gru(input_TP, None if previous_TP is None else previous_TP.to(dtype))
            return F.linear(state_TP, self.weight.to(dtype)), state_TP


def shared_gru(width: int) -> nn.GRUCell:
    """The GRU of all recurrent routers; like every product of these models it has no bias."""
    return nn.GRUCell(width, width, bias=False)
