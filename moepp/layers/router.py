"""Router logits with the gating residual (Eq. 6), and what turns logits into each token's experts and gates.

Shape suffixes: T tokens, K slots of a token, D model width, N all experts (FFN, constant, copy, zero), G groups of FFN
experts, E experts of a group or FFN experts, L groups that a token may choose from.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import registry
from .bounds import Positive
from .initial import draw
from .registry import PartError, Registry
from .settings import MoEConfig


@registry.router("linear")
@registry.router("two_layer")
class Router(nn.Module):
    """logits^j = W^j x^j + W_g^j logits^(j-1), in at least float32 (Eq. 6).

    The carried logits are pre-softmax and contain every earlier layer's residual; no detach, no bias. The network's
    first MoE layer has no W_g: an unused parameter would break DDP. The `two_layer` form (released code) replaces W^j x
    by W tanh(W_hidden x) with 8 N hidden units.
    """

    def __init__(self, config: MoEConfig, first: bool):
        super().__init__()
        experts = config.experts.total
        hidden = 8 * experts if config.router == "two_layer" else None
        residual = config.gating_residual and not first
        self.hidden = nn.Parameter(torch.empty(hidden, config.dim)) if hidden else None
        self.weight = nn.Parameter(torch.empty(experts, hidden or config.dim))
        self.residual = nn.Parameter(torch.empty(experts, experts)) if residual else None
        self.detached = config.residual_detached
        self.is_first = config.gating_residual and first
        if config.residual_init == "identity":
            self.initial = {"residual": nn.init.eye_}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self)

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Raw logits [T, N], and what the next MoE layer's router receives: the same logits.

        Raises ValueError for a gating residual that is left out, or of other tokens.
        """
        self._refuse_others(x_TD, previous_TN)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if self.hidden is not None:
                x_TD = F.linear(x_TD, self.hidden.to(dtype)).tanh()
            logits_TN = F.linear(x_TD, self.weight.to(dtype))
            if self.residual is not None:
                previous_TN = previous_TN.detach() if self.detached else previous_TN
                logits_TN = logits_TN + F.linear(previous_TN.to(dtype), self.residual.to(dtype))
        return logits_TN, logits_TN

    def _refuse_others(self, x_TD: Tensor, previous_TN: Tensor | None) -> None:
        if self.is_first and previous_TN is not None:
            raise ValueError(
                "a network's first MoE layer has no gating residual to take the logits of another: make this one with"
                " first=False, or pass no `previous`"
            )
        if self.residual is None:
            return
        needed = [x_TD.shape[0], len(self.weight)]
        if previous_TN is None or list(previous_TN.shape) != needed:
            given = "nothing" if previous_TN is None else list(previous_TN.shape)
            raise ValueError(
                f"the gating residual needs the `carried` of the MoE layer before, {needed}, and got {given}; a layer"
                " that has none before it is made with first=True"
            )


@dataclass
class Routing:
    """Where each token goes. `expert_TK` int64, with id N in slots that are not used; `gate_TK` its weights; `probs_TN`
    the router's scores, which the balance loss reads: they sum to 1 over the experts unless `unnormalized`. At most
    `most_ffn_slots` slots choose FFN experts, where capacity limits them.
    """

    expert_TK: Tensor
    gate_TK: Tensor
    probs_TN: Tensor
    unnormalized: bool = False
    most_ffn_slots: int | None = None


def route(logits_TN: Tensor, config: MoEConfig, bias_N: Tensor | None = None) -> Routing:
    """Logits to each token's experts and gates, by the config's selection and gate form. A control's bias counts in a
    top-k choice. Raises PartError where either, somebody's own, gives what no layer can use.
    """
    if config.logits_norm is not None:
        logits_TN = normalize_logits(logits_TN, config.logits_norm)
    if config.zero_computation_bias:
        ffn, bias = config.experts.ffn, config.zero_computation_bias
        logits_TN = torch.cat([logits_TN[:, :ffn], logits_TN[:, ffn:] + bias], 1)
    routing = registry.selection[config.selection](logits_TN, config, bias_N, **config.selection_options)
    _refuse_selection(config.selection, routing, logits_TN)
    gate_TK = registry.gate[config.gate](routing, config, **config.gate_options)
    _refuse_gates(registry.gate, config.gate, gate_TK, routing.expert_TK)
    return replace(routing, gate_TK=gate_TK)


def _refuse_selection(name: str, routing: Any, logits_TN: Tensor) -> None:
    """Raises PartError where a selection, somebody's own, gives what no layer can use."""
    parts, (tokens, experts) = registry.selection, logits_TN.shape
    if name in parts.defined:
        return
    if not isinstance(routing, Routing):
        raise parts.unusable(name, routing, "a Routing (moepp.layers.router)")
    expert_TK = routing.expert_TK
    if expert_TK.ndim != 2 or expert_TK.shape[0] != tokens:
        raise parts.unusable(name, expert_TK, f"[{tokens}, slots]", "gave expert_TK")
    if expert_TK.dtype != torch.int64:
        raise PartError(f"{parts.described(name)} gave expert_TK of {expert_TK.dtype}; torch.int64 is needed")
    _refuse_gates(parts, name, routing.gate_TK, expert_TK)
    if routing.probs_TN.shape != logits_TN.shape:
        raise parts.unusable(name, routing.probs_TN, f"{list(logits_TN.shape)}", "gave probs_TN")
    # Not on a GPU, which would wait at every layer.
    if expert_TK.device.type == "cpu" and expert_TK.numel() and not torch.compiler.is_compiling():
        least, most = map(int, expert_TK.aminmax())
        if least < 0 or most > experts:
            found = least if least < 0 else most
            raise PartError(
                f"{parts.described(name)} gave the id {found}; 0 to {experts - 1} are experts, and {experts} a slot"
                " that is not used"
            )


def _refuse_gates(parts: Registry, name: str, gate_TK: Any, expert_TK: Tensor) -> None:
    if not isinstance(gate_TK, Tensor) or gate_TK.shape != expert_TK.shape:
        raise parts.unusable(name, gate_TK, f"{list(expert_TK.shape)}", "gave gates")


def normalize_logits(logits_TN: Tensor, std: float) -> Tensor:
    """Each token's logits scaled to the standard deviation `std` over the experts (unbiased), as in the released 7B
    (`logits_norm`). Equal logits, such as those of an input of zeros, stay as they are.
    """
    least = torch.finfo(logits_TN.dtype).tiny ** 0.5  # whose square is still a number to divide by
    equal_T1 = logits_TN.amax(-1, keepdim=True) - logits_TN.amin(-1, keepdim=True) <= least
    ramp_N = torch.arange(logits_TN.shape[1], dtype=logits_TN.dtype, device=logits_TN.device)
    return logits_TN * (std / torch.where(equal_T1, ramp_N, logits_TN).std(dim=-1, keepdim=True))


@registry.selection("top_k")
def select_top_k(logits_TN: Tensor, config: MoEConfig, bias_N: Tensor | None) -> Routing:
    """The `top_k` experts with the highest probability; a bias counts in the choice, not in the gate."""
    probs_TN = logits_TN.softmax(-1)
    if bias_N is None and config.expert_groups == 1:
        gate_TK, expert_TK = probs_TN.topk(config.top_k, dim=-1)
    else:
        ranked_TN = probs_TN if bias_N is None else probs_TN + bias_N
        expert_TK = within_groups(ranked_TN, config).topk(config.top_k, dim=-1).indices
        gate_TK = probs_TN.gather(1, expert_TK)
    return Routing(expert_TK, gate_TK, probs_TN)


def within_groups(ranked_TN: Tensor, config: MoEConfig) -> Tensor:
    """Scores, -inf for FFN experts outside the token's `groups_per_token` groups: those whose top_k / groups_per_token
    highest scores have the largest sum.
    """
    if config.expert_groups == 1:
        return ranked_TN
    ffn = config.experts.ffn
    ffn_TGE = ranked_TN[:, :ffn].unflatten(1, (config.expert_groups, -1))
    counted = min(ffn_TGE.shape[2], -(-config.top_k // config.groups_per_token))
    best_TL = ffn_TGE.topk(counted, dim=-1).values.sum(-1).topk(config.groups_per_token, dim=-1).indices
    open_TG = torch.zeros_like(ffn_TGE[..., 0], dtype=torch.bool).scatter(1, best_TL, True)
    ffn_TE = ffn_TGE.masked_fill(~open_TG[..., None], -torch.inf).flatten(1)
    return torch.cat([ffn_TE, ranked_TN[:, ffn:]], 1)


@registry.selection("sigmoid")
def select_by_sigmoid(logits_TN: Tensor, config: MoEConfig, bias_N: Tensor | None) -> Routing:
    """The `top_k` experts with the highest sigmoid(logit) + bias, the gates without it (DeepSeek-V3, arXiv 2412.19437).
    The balance loss reads the scores over their sum.
    """
    score_TN = logits_TN.sigmoid()
    ranked_TN = score_TN if bias_N is None else score_TN + bias_N
    expert_TK = within_groups(ranked_TN, config).topk(config.top_k, dim=-1).indices
    return Routing(expert_TK, score_TN.gather(1, expert_TK), _shares(score_TN))


@registry.selection("top_p")
def select_top_p(logits_TN: Tensor, config: MoEConfig, bias_N: Tensor | None) -> Routing:
    """The smallest set of experts whose probabilities sum to `top_p` or more, in N slots."""
    probs_TN = logits_TN.softmax(-1)
    gate_TK, expert_TK = probs_TN.sort(dim=-1, descending=True, stable=True)
    unused_TK = gate_TK.cumsum(-1) - gate_TK >= config.top_p  # what stands before it is enough
    return Routing(expert_TK.masked_fill(unused_TK, probs_TN.shape[1]), gate_TK.masked_fill(unused_TK, 0), probs_TN)


@registry.selection("relu")
def select_positive(logits_TN: Tensor, config: MoEConfig, bias_N: Tensor | None) -> Routing:
    """Every expert with a positive score, in N slots: any number per token, none included."""
    scores_TN, (tokens, experts) = logits_TN.relu(), logits_TN.shape
    expert_TN = torch.arange(experts, device=scores_TN.device).expand(tokens, experts)
    return Routing(expert_TN.masked_fill(scores_TN <= 0, experts), scores_TN, scores_TN, unnormalized=True)


@registry.gate("softmax")
def scores_as_gates(routing: Routing, config: MoEConfig, scale: Positive = 1.0) -> Tensor:
    """The scores themselves, not renormalised (Eq. 1), times `scale` (DeepSeek's routed scaling factor)."""
    return routing.gate_TK if scale == 1 else routing.gate_TK * scale


@registry.gate("renormalized")
def renormalized_gates(routing: Routing, config: MoEConfig, scale: Positive = 1.0) -> Tensor:
    """The scores divided by their sum over the chosen, times `scale`."""
    gate_TK = _shares(routing.gate_TK)
    return gate_TK if scale == 1 else gate_TK * scale


@registry.gate("released")
def released_gates(routing: Routing, config: MoEConfig) -> Tensor:
    """Renormalised after the zero experts' gates are set to 0, so {FFN, zero} gives the FFN weight 1; a token that
    chose zero experts only gets gates 0.
    """
    gate_TK, expert_TK, zeros = routing.gate_TK, routing.expert_TK, config.experts.ids("zero")
    if zeros:
        is_zero_TK = expert_TK >= zeros.start
        if zeros.stop < config.experts.total:  # where registered types follow
            is_zero_TK = is_zero_TK & (expert_TK < zeros.stop)
        gate_TK = gate_TK.masked_fill(is_zero_TK, 0)
    return _shares(gate_TK)


def _shares(gate_TK: Tensor) -> Tensor:
    total_T1 = gate_TK.sum(-1, keepdim=True)
    return gate_TK / torch.where(total_T1 > 0, total_T1, 1)
