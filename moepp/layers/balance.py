"""Load-balance loss (Eq. 7) and expert capacity (Eq. 8).

Shape suffixes: T tokens, K top-k, N all experts (FFN, constant, copy, zero).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moepp.layers.experts import ExpertCounts


@dataclass
class BalanceConfig:
    """The load-balance loss: `tau` in (0, 1] is the weight of a zero-computation expert against 1 for an FFN expert."""

    tau: float = 0.75
    beta: float = 0.01
    form: Literal["paper", "switch"] = "switch"

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"balance.tau={self.tau} must lie in (0, 1]")
        if self.beta < 0:
            raise ValueError(f"balance.beta={self.beta} must not be negative")


def ffn_share(counts: ExpertCounts, tau: float) -> float:
    """The share of all routed slots that a balanced layer sends to FFN experts: tau N_FFN / (tau N_FFN + N_ZC) (Table
    1).
    """
    return tau * counts.ffn / (tau * counts.ffn + counts.zero_computation)


def selection_counts(expert_TK: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert, [N] int64; ids of N or more are not counted."""
    return torch.bincount(expert_TK.reshape(-1).clamp(max=experts), minlength=experts + 1)[:experts]


def load_balance_loss(
    probs_TN: Tensor, count_N: Tensor, tokens: int, counts: ExpertCounts, config: BalanceConfig
) -> Tensor:
    """One layer's sum_i eta_i f_i P_i (Eq. 7), times N in the `switch` form. Not yet multiplied by beta.

    f_i = count_i / tokens carries no gradient; P_i is the mean probability. eta is 1 for FFN experts and tau for the
    others.
    """
    eta_N = torch.ones_like(probs_TN[0])
    eta_N[counts.ffn :] = config.tau
    loss = (eta_N * (count_N.to(eta_N.dtype) / tokens) * probs_TN.mean(0)).sum()
    return loss * counts.total if config.form == "switch" else loss


def combine_layers(losses: list[Tensor], config: BalanceConfig) -> Tensor:
    """beta times the layers' losses: their mean in the `switch` form, their sum in the `paper` form (Eq. 9 read layer
    by layer).
    """
    total = torch.stack(losses).sum() * config.beta
    return total / len(losses) if config.form == "switch" else total


def capacities(counts: ExpertCounts, tau: float, slots: int, factor: float) -> list[int]:
    """Rows each expert accepts, rounded up (Eq. 8): factor * slots * w_i / sum w, with w = tau for FFN experts and 1
    for the others.

    `slots` = K * T assignments. Eq. 8 prints T, which would drop 45 % of all top-2 assignments even under perfect
    balance.
    """
    total = tau * counts.ffn + counts.zero_computation
    share = factor * slots / total
    ffn, other = -int(-share * tau // 1), -int(-share // 1)
    return [ffn] * counts.ffn + [other] * counts.zero_computation


def within_capacity(expert_TK: Tensor, capacity: list[int]) -> Tensor:
    """True for the slots an expert accepts, [T, K]: first choices of all tokens come before second choices, then batch
    order decides.
    """
    expert_S = expert_TK.t().reshape(-1)  # k-major
    order_S = expert_S.argsort(stable=True)
    count_N = torch.bincount(expert_S, minlength=len(capacity))
    start_N = count_N.cumsum(0) - count_N
    sorted_S = expert_S[order_S]
    position_S = torch.arange(len(order_S), device=order_S.device) - start_N[sorted_S]
    limit_N = torch.tensor(capacity, device=order_S.device)
    kept_S = torch.empty_like(order_S, dtype=torch.bool)
    kept_S[order_S] = position_S < limit_N[sorted_S]
    return kept_S.view(expert_TK.shape[1], expert_TK.shape[0]).t()
