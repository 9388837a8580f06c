"""The SwiGLU FFN that every token passes: of blocks without an MoE layer, and the shared experts of one."""

import torch.nn.functional as F
from torch import Tensor, nn

from .initial import draw


class DenseFFN(nn.Module):
    """w_out (silu(gate) * up), where w_in x = [gate, up]. Of width n * hidden it is the sum of n ungated experts."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(F.silu(gate) * up)
