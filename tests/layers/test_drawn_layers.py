"""The layer against loops over tokens and slots, in float64, at switches drawn at random: each of them beside all the
others, capacity included.
"""

import math
import random

import pytest
import torch
from reference import expert_output

from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig

DIM = 5


def draw_config(rng: random.Random) -> MoEConfig:
    others = {kind: rng.randint(1, 2) for kind in ("vector", "scaled_copy") if rng.random() < 0.25}
    counts = ExpertCounts(*(rng.randint(*ends) for ends in ((1, 5), (0, 2), (0, 2), (0, 3), (0, 1))), others)
    selection = rng.choice(["top_k", "top_k", "sigmoid", "top_p", "relu"])
    fixed, free = selection in ("top_k", "sigmoid"), counts.zero_computation > 0
    balance = BalanceConfig(
        tau=rng.choice([0.05, 0.3, 0.75, 1.0]),
        tau_of={kind: 0.9 for kind, n in counts.by_kind().items() if n and kind != "ffn" and rng.random() < 0.3},
        over=rng.choice(["sequence", "micro_batch", "global_batch", "step"]),
        form=rng.choice(["paper", "switch", "null_averaged"][: 3 if free else 2]),
        z_loss=rng.choice([0, 0.1]),
        entropy_loss=0 if selection == "relu" else rng.choice([0, 0.1]),
        control=rng.choice([None, "loss_free"]) if fixed else None,
    )
    groups = rng.choice([g for g in range(1, counts.ffn + 1) if counts.ffn % g == 0]) if fixed else 1
    per_token = rng.randint(1, groups)
    capacity = rng.choice([None, 0.2, 0.6, 1.1, 30.0]) if fixed else None
    limits = {}
    if capacity is not None:
        limits = {
            "capacity_over": rng.choice(["sequence", "micro_batch", "global_batch"]),
            "drop_order": rng.choice(["position", "probability"]),
        }
    gate = rng.choice(["released", "softmax", "renormalized"])
    return MoEConfig(
        DIM, 4, counts, selection=selection, expert_groups=groups, groups_per_token=per_token,
        top_k=rng.randint(1, per_token * counts.ffn // groups + counts.zero_computation), top_p=rng.choice([0.1, 0.5]),
        gate=gate, gate_options={} if gate == "released" else {"scale": rng.choice([1, 1.7])},
        logits_norm=rng.choice([None, 0.7]) if counts.total > 1 else None,
        zero_computation_bias=rng.choice([0.0, 0.8]) if free else 0.0, gating_residual=rng.random() < 0.7,
        balance=balance, capacity_factor=capacity, router=rng.choice(["linear", "two_layer"]),
        multiply_by_top_k=rng.random() < 0.3, **limits,
    )  # fmt: skip


def eta(config, kind):
    return 1.0 if kind == "ffn" else config.balance.tau_of.get(kind, config.balance.tau)


def routed(layer, x, previous):
    """One token's raw logits, its scores, and its experts in their order with the gate of each."""
    config, kinds = layer.config, layer.config.experts.kinds()
    logits = layer.router.weight @ (x if layer.router.hidden is None else torch.tanh(layer.router.hidden @ x))
    if layer.router.residual is not None:
        logits = logits + layer.router.residual @ previous
    seen = logits if config.logits_norm is None else logits * (config.logits_norm / logits.std())
    seen = seen + seen.new_tensor([0.0 if kind == "ffn" else config.zero_computation_bias for kind in kinds])
    scores = {"sigmoid": seen.sigmoid(), "relu": seen.relu()}.get(config.selection, seen.exp() / seen.exp().sum())
    gates = {i: scores[i] for i in chosen(config, scores.tolist(), layer.control)}
    if config.gate == "released":
        gates = {i: gate * (kinds[i] != "zero") for i, gate in gates.items()}
    if config.gate != "softmax" and (total := sum(gates.values())) > 0:
        gates = {i: gate / total for i, gate in gates.items()}
    gates = {i: gate * config.gate_options.get("scale", 1) for i, gate in gates.items()}
    return logits, scores / scores.sum() if config.selection == "sigmoid" else scores, gates


def chosen(config, scores, control):
    ranks = [s + b for s, b in zip(scores, control.bias_N.tolist(), strict=True)] if control else list(scores)
    if config.expert_groups > 1:
        size = config.experts.ffn // config.expert_groups
        best = min(size, math.ceil(config.top_k / config.groups_per_token))
        groups = [ranks[g * size : (g + 1) * size] for g in range(config.expert_groups)]
        order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-best:]))
        for group in order[config.groups_per_token :]:
            ranks[group * size : (group + 1) * size] = [-math.inf] * size
    order = sorted(range(len(ranks)), key=lambda i: -ranks[i])
    if config.selection == "relu":
        return [i for i in range(len(scores)) if scores[i] > 0]
    if config.selection == "top_p":
        return [i for k, i in enumerate(order) if sum(scores[j] for j in order[:k]) < config.top_p]
    return order[: config.top_k]


def kept(config, run, slots, scores):
    """Those slots (t, k) of one run of tokens that their experts accept."""
    kinds = config.experts.kinds()
    weights = [config.balance.tau / (1 if kind == "ffn" else eta(config, kind)) for kind in kinds]
    accepted = set()
    for expert, weight in enumerate(weights):
        most = math.ceil(config.capacity_factor * len(run) * config.top_k * weight / sum(weights) - 1e-9)
        mine = [(t, k) for k in range(config.top_k) for t in run if slots[t][k] == expert]
        if config.drop_order == "probability":
            mine.sort(key=lambda slot: -float(scores[slot[0]][slots[slot[0]][slot[1]]].detach()))
        accepted |= set(mine[:most])
    return accepted


def output(layer, expert, x):
    kind, counts = layer.config.experts.kinds()[expert], layer.config.experts
    if kind in counts.built_in:
        return expert_output(layer, expert, x)
    index = expert - counts.ids(kind).start
    experts = layer.of_kind(kind)
    return experts.vectors[index] if kind == "vector" else experts.factors[index] * x


def balance_loss(config, run, slots, scores):
    counts = config.experts
    share = [sum(i in slots[t] for t in run) / len(run) for i in range(counts.total)]
    if config.balance.form == "null_averaged":
        share[counts.ffn :] = [sum(share[counts.ffn :]) / counts.zero_computation] * counts.zero_computation
    probs = torch.stack([scores[t] for t in run]).mean(0)
    loss = sum(eta(config, kind) * f * p for kind, f, p in zip(counts.kinds(), share, probs, strict=True))
    return loss if config.balance.form == "paper" else loss * counts.total


def in_loops(layer, x_BSD, previous_TN):
    """Output, logits, balance loss, router losses, and how many slots were dropped."""
    config, (batch, length, _) = layer.config, x_BSD.shape
    x_TD = x_BSD.flatten(0, 1)
    logits, scores, gates = zip(*(routed(layer, *pair) for pair in zip(x_TD, previous_TN, strict=True)), strict=True)
    slots = [list(gate) for gate in gates]
    whole, sequences = range(len(x_TD)), [range(b * length, (b + 1) * length) for b in range(batch)]
    accepted = {(t, k) for t in whole for k in range(len(slots[t]))}
    every = len(accepted)
    if layer.training and config.capacity_factor is not None:
        runs = sequences if config.capacity_over == "sequence" else [whole]
        accepted = set().union(*(kept(config, run, slots, scores) for run in runs))
    rows = []
    for t, x in enumerate(x_TD):
        x = x * config.top_k if config.multiply_by_top_k else x
        parts = [gates[t][e] * output(layer, e, x) for k, e in enumerate(slots[t]) if (t, k) in accepted]
        parts += [] if layer.shared is None else [layer.shared(x)]
        rows.append(sum(parts, torch.zeros_like(x)))
    runs = sequences if config.balance.over == "sequence" else [whole]
    balance = sum(balance_loss(config, run, slots, scores) for run in runs) / len(runs)
    logits, probs = torch.stack(logits), torch.stack(scores)
    router = config.balance.z_loss * logits.exp().sum(1).log().square().mean()
    if config.balance.entropy_loss:
        router = router - config.balance.entropy_loss * (probs * probs.log()).sum(1).mean()
    return torch.stack(rows).view_as(x_BSD), logits, balance, router, every - len(accepted)


@pytest.mark.parametrize("seed", range(0, 120, 20))
def test_the_layer_is_what_loops_say_with_gradients(seed):
    for drawn in range(seed, seed + 20):
        rng, generator = random.Random(drawn), torch.Generator().manual_seed(drawn)
        layer = MoELayer(draw_config(rng), first=False).double().train(rng.random() < 0.8)
        for tensor in [*layer.parameters(), *([layer.control.bias_N] if layer.control else [])]:
            torch.nn.init.normal_(tensor, std=0.7, generator=generator)
        batch, length = rng.choice([(1, 1), (2, 4), (3, 2)])
        x_BSD = torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator).requires_grad_()
        experts = layer.config.experts.total
        previous_TN = torch.randn(batch * length, experts, dtype=torch.float64, generator=generator).requires_grad_()
        y_BSD, stats = layer(x_BSD, previous_TN)
        router = torch.zeros(()) if stats.router_loss is None else stats.router_loss
        found = y_BSD, stats.logits_TN, stats.balance_loss, router
        *wanted, dropped = in_loops(layer, x_BSD, previous_TN)
        assert stats.dropped == dropped, layer.config
        weights = [torch.randn(v.shape, dtype=torch.float64, generator=generator) for v in wanted]
        inputs = [x_BSD, previous_TN, *layer.parameters()]
        pairs = [(f, w) for f, w in zip(found, wanted, strict=True)]
        gradients = (
            torch.autograd.grad(sum((v * w).sum() for v, w in zip(values, weights, strict=True)), inputs,
                                allow_unused=True, materialize_grads=True)
            for values in (found, wanted)
        )  # fmt: skip
        for value, reference in [*pairs, *zip(*gradients, strict=True)]:
            assert torch.allclose(value.double(), reference, rtol=1e-9, atol=1e-10), (drawn, layer.config)
