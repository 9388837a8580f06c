"""Load-balance loss (Eq. 7) with the forms of other methods, router losses, and expert capacity (Eq. 8).

Shape suffixes: T tokens, K slots of a token, N all experts (FFN, constant, copy, zero), W devices that share a batch.
"""

import math
from collections.abc import Mapping
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry
from .settings import BalanceConfig, ExpertCounts, load_weights, total_weight


def load_targets(counts: ExpertCounts, tau: float, tau_of: Mapping[str, float] | None = None) -> Tensor:
    """The share of all slots that each expert gets in a balanced layer, [N]: in the ratio of 1 to 1 / tau."""
    weights = load_weights(counts, tau, tau_of)
    weight_N = torch.tensor([weights[kind] for kind in counts.kinds()])
    return weight_N / weight_N.sum()


def selection_counts(expert_TK: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert first, second, ..., [K, N] int64; ids of N or more are not counted.

    Not bincount: on a GPU that waits for the host, which must know the result's size.
    """
    return (expert_TK.t()[..., None] == torch.arange(experts, device=expert_TK.device)).sum(1)


def token_mean(value_T: Tensor) -> Tensor:
    """Over the first dimension; 0 where there are no tokens, of which torch's mean is NaN."""
    return value_T.mean(0) if value_T.shape[0] else value_T.sum(0)


def load_balance_loss(
    probs_TN: Tensor, count_N: Tensor, tokens: int, counts: ExpertCounts, config: BalanceConfig
) -> Tensor:
    """One layer's loss in the config's form, not yet multiplied by beta.

    A form sees each expert's mean probability P_i, and f_i = count_i / tokens, which carries no gradient. 0 without
    tokens. Raises PartError where the form, somebody's own, gives no scalar.
    """
    share_N = count_N.to(probs_TN.dtype) / (tokens or 1)
    form = registry.balance[config.form]
    loss = form(token_mean(probs_TN), share_N, counts, config, **config.options)
    if not (isinstance(loss, Tensor) and loss.ndim == 0):
        raise registry.balance.unusable(config.form, loss, "a tensor of one number, []")
    return loss


@registry.balance("paper")
def weighted_loss(mean_probs_N: Tensor, share_N: Tensor, counts: ExpertCounts, config: BalanceConfig) -> Tensor:
    """sum_i eta_i f_i P_i (Eq. 7); eta is 1 for FFN experts and tau, or its type's own, for the others."""
    eta_N = torch.ones_like(mean_probs_N)
    eta_N[counts.ffn :] = config.tau
    for kind, tau in config.tau_of.items():
        ids = counts.ids(kind)
        eta_N[ids.start : ids.stop] = tau
    return (eta_N * share_N * mean_probs_N).sum()


@registry.balance("switch")
def scaled_loss(mean_probs_N: Tensor, share_N: Tensor, counts: ExpertCounts, config: BalanceConfig) -> Tensor:
    """Eq. 7 times N."""
    return weighted_loss(mean_probs_N, share_N, counts, config) * counts.total


@registry.balance("null_averaged")
def null_averaged_loss(mean_probs_N: Tensor, share_N: Tensor, counts: ExpertCounts, config: BalanceConfig) -> Tensor:
    """Every zero-computation expert has the mean f of all of them (AdaMoE, arXiv 2406.13233); times N."""
    share_N[counts.ffn :] = share_N[counts.ffn :].mean()
    return scaled_loss(mean_probs_N, share_N, counts, config)


@registry.balance("grouped")
def group_loss(mean_probs_N: Tensor, share_N: Tensor, counts: ExpertCounts, config: BalanceConfig) -> Tensor:
    """LongCat-Flash's device loss with one device (arXiv 2509.01322): f_1 P_1 + f_2 P_2 for the FFN experts and the
    zero-computation experts, each f a group's slots over those it should get, K_e T and (K - K_e) T.
    """
    ffn_share, other_share = share_N[: counts.ffn].sum(), share_N[counts.ffn :].sum()
    expected_other = ffn_share + other_share - config.expected_ffn
    ffn_probs, other_probs = mean_probs_N[: counts.ffn].sum(), mean_probs_N[counts.ffn :].sum()
    return ffn_share / config.expected_ffn * ffn_probs + other_share / expected_other * other_probs


def router_losses(logits_TN: Tensor, probs_TN: Tensor, config: BalanceConfig) -> Tensor:
    """One layer's z-loss and entropy loss, already weighted."""
    z_loss = token_mean(logits_TN.logsumexp(-1).square())
    entropy = token_mean(torch.special.entr(probs_TN).sum(-1))
    return config.z_loss * z_loss + config.entropy_loss * entropy


def combine_layers(losses: list[Tensor], config: BalanceConfig) -> Tensor:
    """beta times the layers' losses: their sum in the `paper` form (Eq. 9 read layer by layer), their mean in the
    others.
    """
    total = torch.stack(losses).sum() * config.beta
    return total if config.form == "paper" else total / len(losses)


def expert_capacities(counts: ExpertCounts, config: BalanceConfig, slots: int, factor: float) -> dict[str, int]:
    """Rows that an expert of each type accepts, rounded up (Eq. 8): factor * slots * w / sum w, with the weights of
    `load_weights`: tau for FFN experts, and 1 for the others where they have none of their own.

    `slots` = K * T assignments. Eq. 8 prints T, which would drop 45 % of all top-2 assignments even under perfect
    balance.
    """
    weights = load_weights(counts, config.tau, config.tau_of)
    share = factor * slots / total_weight(counts, weights)
    return {kind: math.ceil(share * weight) for kind, weight in weights.items()}


def capacity_of_each(counts: ExpertCounts, limits: Mapping[str, int], device: torch.device) -> Tensor:
    """`expert_capacities` expert by expert, [N]: filled run by run of equal ones, for a tensor made from a list is
    copied from the host, which a CUDA graph cannot replay.
    """
    runs = [(limit, len(list(run))) for limit, run in groupby([limits[kind] for kind in counts.kinds()])]
    limit_N = torch.full((counts.total,), runs[-1][0], device=device)
    begin = 0
    for limit, length in runs[:-1]:
        limit_N[begin : begin + length] = limit
        begin += length
    return limit_N


def accepted_counts(count_WKN: Tensor, capacity_N: Tensor) -> Tensor:
    """How many of these slots the experts accept, [W, K, N]: first choices of all tokens come before second choices,
    then batch order decides, in which device follows device.
    """
    count_RN = count_WKN.transpose(0, 1).flatten(0, 1)  # R: choices, and the devices within each
    earlier_RN = count_RN.cumsum(0) - count_RN
    accepted_RN = (capacity_N - earlier_RN).clamp(min=0).minimum(count_RN)
    return accepted_RN.unflatten(0, (count_WKN.shape[1], len(count_WKN))).transpose(0, 1)


def accepted_slots(expert_TK: Tensor, accepted_KN: Tensor) -> Tensor:
    """True for the slots an expert accepts, [T, K]: the first `accepted_KN` of those with one choice and expert. Slots
    whose id is N, which no expert has, are never accepted.
    """
    accepted_KN = F.pad(accepted_KN, (0, 1))
    choices, ids = accepted_KN.shape
    choice_K = torch.arange(choices, device=expert_TK.device)
    sorted_S, order_S = (choice_K * ids + expert_TK).t().reshape(-1).sort(stable=True)
    start_S = torch.searchsorted(sorted_S, sorted_S)
    kept_S = torch.empty_like(order_S, dtype=torch.bool)
    kept_S[order_S] = torch.arange(len(order_S), device=order_S.device) - start_S < accepted_KN.reshape(-1)[sorted_S]
    return kept_S.view(choices, -1).t()


def accepted_in_runs(expert_TK: Tensor, capacity_N: Tensor, runs: int, score_TK: Tensor | None = None) -> Tensor:
    """True for the slots an expert accepts, [T, K], where each of so many equal `runs` of tokens is a batch of its own:
    the first of them, or those with the highest scores.
    """
    ids, run_T = len(capacity_N) + 1, torch.arange(len(expert_TK), device=expert_TK.device) * runs // len(expert_TK)
    apart_TK = expert_TK + ids * run_T[:, None]  # as if each run had experts of its own, and an id of no expert
    apart_N = F.pad(capacity_N, (0, 1)).repeat(runs)
    if score_TK is not None:
        return likeliest_slots(apart_TK, score_TK, apart_N)
    count_RKN = torch.stack([selection_counts(expert_SK, ids) for expert_SK in expert_TK.chunk(runs)])
    count_KN = count_RKN.transpose(0, 1).flatten(1)
    return accepted_slots(apart_TK, accepted_counts(count_KN[None], apart_N)[0])


def likeliest_slots(expert_WTK: Tensor, score_WTK: Tensor, capacity_N: Tensor) -> Tensor:
    """True for the slots an expert accepts by score: the `capacity_N` highest of its own, earlier slots first among
    equals. Of any shape; slots whose id is N or more are never accepted.
    """
    expert_S, experts = expert_WTK.reshape(-1), len(capacity_N)
    order_S = score_WTK.reshape(-1).argsort(descending=True, stable=True)
    order_S = order_S[expert_S[order_S].argsort(stable=True)]  # by expert, the highest score first
    sorted_S = expert_S[order_S]
    rank_S = torch.arange(len(sorted_S), device=sorted_S.device) - torch.searchsorted(sorted_S, sorted_S)
    limit_N = torch.cat([capacity_N, capacity_N.new_zeros(1)])
    kept_S = torch.empty_like(order_S, dtype=torch.bool)
    kept_S[order_S] = rank_S < limit_N[sorted_S.clamp(max=experts)]
    return kept_S.view_as(expert_WTK)
