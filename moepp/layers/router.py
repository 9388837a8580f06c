"""Router logits with the gating residual (Eq. 6), and what turns logits into each token's experts and gates.

Shape suffixes: T tokens, K slots of a token, D model width, N all experts (FFN, constant, copy, zero).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.layers.settings import GateForm, RouterForm


class Router(nn.Module):
    """logits^j = W^j x^j + W_g^j logits^(j-1), in at least float32 (Eq. 6).

    The carried logits are pre-softmax and contain every earlier layer's residual; no detach, no bias. The first layer
    has no W_g: an unused parameter would break DDP. The `two_layer` form (released code) replaces W^j x by
    W tanh(W_hidden x) with 8 N hidden units.
    """

    def __init__(self, dim: int, experts: int, gating_residual: bool, form: RouterForm = "linear"):
        super().__init__()
        hidden = 8 * experts if form == "two_layer" else None
        self.hidden = nn.Parameter(torch.empty(hidden, dim)) if hidden else None
        self.weight = nn.Parameter(torch.empty(experts, hidden or dim))
        self.residual = nn.Parameter(torch.empty(experts, experts)) if gating_residual else None

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw logits [T, N], and what the next MoE layer's router receives: the same logits."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if self.hidden is not None:
                x_TD = F.linear(x_TD, self.hidden.to(dtype)).tanh()
            logits_TN = F.linear(x_TD, self.weight.to(dtype))
            if self.residual is not None and previous_TN is not None:
                logits_TN = logits_TN + F.linear(previous_TN.to(dtype), self.residual.to(dtype))
        return logits_TN, logits_TN


@dataclass
class Routing:
    """Where each token goes. `expert_TK` int64, with id N in slots that are not used; `gate_TK` its weights; `probs_TN`
    the router's scores, which the balance loss reads: the softmax, or the ReLU where that selects. At most
    `most_ffn_slots` slots choose FFN experts, where capacity limits them.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    probs_TN: Tensor
    most_ffn_slots: int | None = None


def normalize_logits(logits_TN: Tensor, std: float) -> Tensor:
    """Each token's logits scaled to the standard deviation `std` over the experts (unbiased), as in the released 7B
    (`logits_norm`).
    """
    return logits_TN * (std / logits_TN.std(dim=-1, keepdim=True))


def select_top_k(probs_TN: Tensor, top_k: int, bias_N: Tensor | None) -> Routing:
    """The `top_k` experts with the highest score; a bias counts in the choice, not in the gate."""
    if bias_N is None:
        gate_TK, expert_TK = probs_TN.topk(top_k, dim=-1)
    else:
        expert_TK = (probs_TN + bias_N).topk(top_k, dim=-1).indices
        gate_TK = probs_TN.gather(1, expert_TK)
    return Routing(expert_TK, gate_TK, probs_TN)


def select_top_p(probs_TN: Tensor, threshold: float) -> Routing:
    """The smallest set of experts whose probabilities sum to `threshold` or more, in N slots."""
    gate_TK, expert_TK = probs_TN.sort(dim=-1, descending=True, stable=True)
    unused_TK = gate_TK.cumsum(-1) - gate_TK >= threshold  # what stands before it is enough
    return Routing(expert_TK.masked_fill(unused_TK, probs_TN.shape[1]), gate_TK.masked_fill(unused_TK, 0), probs_TN)


def select_positive(scores_TN: Tensor) -> Routing:
    """Every expert with a positive score, in N slots: any number per token, none included."""
    tokens, experts = scores_TN.shape
    expert_TN = torch.arange(experts, device=scores_TN.device).expand(tokens, experts)
    return Routing(expert_TN.masked_fill(scores_TN <= 0, experts), scores_TN, scores_TN)


def form_gates(routing: Routing, form: GateForm, zero_experts: int) -> Routing:
    """The gates of the chosen experts from their scores.

    `softmax`: the scores themselves, not renormalised (Eq. 1). `renormalized`: divided by their sum over the chosen.
    `released`: the zero experts' (the last `zero_experts` ids) gates are set to 0 first, so {FFN, zero} gives the FFN
    weight 1; a token that chose zero experts only gets gates 0.
    """
    gate_TK, experts = routing.gate_TK, routing.probs_TN.shape[1]
    if form == "released" and zero_experts:
        gate_TK = gate_TK.masked_fill(routing.expert_TK >= experts - zero_experts, 0)
    if form != "softmax":
        total_T1 = gate_TK.sum(-1, keepdim=True)
        gate_TK = gate_TK / torch.where(total_T1 > 0, total_T1, 1)
    return Routing(routing.expert_TK, gate_TK, routing.probs_TN)
