"""The MoE++ layer: router -> gates -> capacity -> zero-computation experts + FFN experts.

Vanilla MoE is this layer with no zero-computation experts and no gating residual.
Shape suffixes: B batch, S sequence, T = B*S tokens, K top-k, D model width, N all experts (FFN, constant, copy, zero).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moepp.layers.balance import (
    BalanceConfig,
    capacities,
    load_balance_loss,
    selection_counts,
    within_capacity,
)
from moepp.layers.dispatch import Backend
from moepp.layers.experts import ExpertCounts, FFNExperts, ZeroComputationExperts
from moepp.layers.router import GateForm, Router, RouterForm, Routing, normalize_logits, route


@dataclass
class MoEConfig:
    """One MoE++ layer."""

    dim: int = 128
    hidden: int = 256  # of each FFN expert; a SwiGLU expert has 3 * dim * hidden parameters
    experts: ExpertCounts = field(default_factory=ExpertCounts)
    top_k: int = 2
    gate: GateForm = "released"
    logits_norm: float | None = (
        None  # standard deviation to which logits are scaled before the softmax; released 7B: 1.0
    )
    gating_residual: bool = True
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity_factor: float | None = 1.1  # in training only; null is dropless
    router: RouterForm = "linear"
    multiply_by_top_k: bool = False  # experts see top_k * x, as released code does without its no_mul_topk flag
    backend: Backend = "auto"  # kernel of the FFN experts; changes speed and rounding, nothing else

    def __post_init__(self) -> None:
        experts = self.experts
        if not 1 <= self.top_k <= experts.total:
            raise ValueError(
                f"top_k={self.top_k} must lie between 1 and the {experts.total} experts (ffn {experts.ffn}, "
                f"constant {experts.constant}, copy {experts.copy}, zero {experts.zero})"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive, or null for dropless")
        if self.logits_norm is not None and self.logits_norm <= 0:
            raise ValueError(f"logits_norm={self.logits_norm} must be positive, or null for plain logits")


@dataclass
class MoEStats:
    """What one layer reports. Only `balance_loss` and `logits_TN` carry gradients."""

    logits_TN: Tensor  # raw, gating residual included: the next layer's `previous_logits`
    balance_loss: Tensor  # Eq. 7, before beta
    chosen_N: Tensor  # tokens that chose each expert, before any were dropped
    dropped: Tensor  # slots over capacity
    entropy: Tensor  # of the router's distribution, mean over tokens, in nats


class MoELayer(nn.Module):
    """Routes every token to `top_k` of N experts; `first` marks the network's first MoE layer, which has no gating
    residual.
    """

    def __init__(self, config: MoEConfig, first: bool = False):
        super().__init__()
        self.config = config
        residual = config.gating_residual and not first
        self.router = Router(config.dim, config.experts.total, residual, config.router)
        self.ffn = FFNExperts(config.experts.ffn, config.dim, config.hidden, config.backend)
        self.zero_computation = (
            ZeroComputationExperts(config.experts, config.dim) if config.experts.zero_computation else None
        )

    def forward(self, x_BSD: Tensor, previous_logits: Tensor | None = None) -> tuple[Tensor, MoEStats]:
        x_TD = x_BSD.flatten(0, -2)
        logits_TN = self.router(x_TD, previous_logits)
        routing = self.route(logits_TN)
        stats = self.statistics(logits_TN, routing)
        if self.training and self.config.capacity_factor is not None:
            routing, stats.dropped = self.drop_over_capacity(routing)
        return self.expert_forward(x_TD, routing).view_as(x_BSD), stats

    def route(self, logits_TN: Tensor) -> Routing:
        config = self.config
        if config.logits_norm is not None:
            logits_TN = normalize_logits(logits_TN, config.logits_norm)
        return route(logits_TN, config.top_k, config.gate, config.experts.zero)

    def drop_over_capacity(self, routing: Routing) -> tuple[Routing, Tensor]:
        """Slots over capacity (Eq. 8) get gate 0 and id N, which no expert has; the token keeps its residual path."""
        config = self.config
        slots = routing.expert_TK.numel()
        limits = capacities(config.experts, config.balance.tau, slots, config.capacity_factor)
        kept_TK = within_capacity(routing.expert_TK, limits)
        expert_TK = routing.expert_TK.masked_fill(~kept_TK, config.experts.total)
        return Routing(expert_TK, routing.gate_TK * kept_TK, routing.probs_TN), slots - kept_TK.sum()

    def expert_forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The gated sum of the chosen experts, [T, D] in x_TD's dtype: all of the layer but the router."""
        if self.config.multiply_by_top_k:
            x_TD = x_TD * self.config.top_k
        others = None
        if self.zero_computation is not None:
            total, ffn = self.config.experts.total, self.config.experts.ffn
            gate_TN = routing.gate_TK.new_zeros(len(x_TD), total + 1)  # column N takes dropped slots
            gate_TN = gate_TN.scatter_add(1, routing.expert_TK, routing.gate_TK)
            with torch.autocast(x_TD.device.type, enabled=False):
                others = self.zero_computation(x_TD, gate_TN[:, ffn:total])
        return self.ffn(x_TD, routing.expert_TK, routing.gate_TK, others).to(x_TD.dtype)

    def statistics(self, logits_TN: Tensor, routing: Routing) -> MoEStats:
        config, probs_TN = self.config, routing.probs_TN
        chosen_N = selection_counts(routing.expert_TK, config.experts.total)
        loss = load_balance_loss(probs_TN, chosen_N, len(probs_TN), config.experts, config.balance)
        entropy = torch.special.entr(probs_TN.detach()).sum(-1).mean()
        return MoEStats(logits_TN, loss, chosen_N, chosen_N.new_zeros(()), entropy)
