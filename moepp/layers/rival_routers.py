"""Routers of other methods, with the interface of router.Router: (x, what the previous layer handed on) -> (logits,
what this layer hands on).

Shape suffixes: T tokens, D model width, P router width, N all experts, M null (zero) experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from . import registry
from .initial import draw
from .settings import MoEConfig


@registry.router("shared_null")
class SharedNullRouter(nn.Module):
    """One null logit stands for all M zero experts (arXiv 2601.15370): a token's null slots are whatever its real
    experts leave.
    """

    def __init__(self, config: MoEConfig, first: bool):
        super().__init__()
        self.nulls = config.experts.ids("zero")
        rows = config.experts.total - len(self.nulls) + 1
        self.weight = nn.Parameter(torch.empty(rows, config.dim))  # the last row is the null logit's
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self)

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        real, start = logits[:, :-1], self.nulls.start
        null_TM = logits[:, -1:].expand(-1, len(self.nulls))
        logits_TN = torch.cat([real[:, :start], null_TM, real[:, start:]], 1)
        return logits_TN, logits_TN


@registry.router("recurrent")
class RecurrentRouter(nn.Module):
    """x' = Proj_j x, h_j = GRU(x', h_(j-1)), logits = W_j h_j (RMoE, arXiv 2408.06793); h of the first layer's
    predecessor is 0.

    One GRU serves all layers of a network. Its owner is the model, which has it once in its state dict, and `share`s it
    with each; a layer that stands alone has its own.
    """

    def __init__(self, config: MoEConfig, first: bool):
        super().__init__()
        self.projection = nn.Parameter(torch.empty(config.router_width, config.dim))
        self.weight = nn.Parameter(torch.empty(config.experts.total, config.router_width))
        self.gru = skip_init(nn.GRUCell, config.router_width, config.router_width, bias=False)
        self.shared: tuple[nn.GRUCell, ...] = ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self)

    def share(self, gru: nn.GRUCell) -> None:
        self.gru, self.shared = None, (gru,)  # in a tuple, so that it is no submodule of every layer

    def forward(self, x_TD: Tensor, previous_TP: Tensor | None) -> tuple[Tensor, Tensor]:
        gru = self.shared[0] if self.shared else self.gru
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            input_TP = F.linear(x_TD.to(dtype), self.projection.to(dtype))
            state_TP = torch.zeros_like(input_TP) if previous_TP is None else previous_TP.to(dtype)
            state_TP = torch.gru_cell(input_TP, state_TP, gru.weight_ih.to(dtype), gru.weight_hh.to(dtype))
            return F.linear(state_TP, self.weight.to(dtype)), state_TP


def shared_gru(width: int) -> nn.GRUCell:
    """The GRU of all recurrent routers; like every product of these models it has no bias."""
    return nn.GRUCell(width, width, bias=False)
