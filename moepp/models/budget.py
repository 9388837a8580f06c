"""Parameters and forward FLOPs of a decoder by part, computed from its config alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from moepp.layers import registry
from moepp.layers.settings import TOP_K_SELECTIONS, MoEConfig, ffn_share
from moepp.models.settings import DecoderConfig


def expected_ffn_per_token(config: MoEConfig) -> float:
    """Routed FFN experts per token of a perfectly balanced layer; of a decoder, the mean over its MoE layers."""
    own = config.per_layer if isinstance(config, DecoderConfig) else {}
    return mean(map(_expected_ffn, config.moe_configs)) if own else _expected_ffn(config)


def _expected_ffn(config: MoEConfig) -> float:
    """Routed FFN experts per token of a perfectly balanced layer: K tau N_FFN / (tau N_FFN + N_ZC) (Table 1), or what
    the method's own control aims at. With `top_p` it is the most that p can need, which a router that knows nothing
    does; training decides the rest.
    """
    experts = config.experts
    if config.balance.aims_at_expected_ffn:
        return config.balance.expected_ffn
    if config.selection == "top_p":
        return math.ceil(config.top_p * experts.total) * experts.ffn / experts.total
    if config.selection == "relu":
        return experts.ffn / 2  # scores start symmetric around 0, and nothing steers their number
    return config.top_k * ffn_share(experts, config.balance.tau, config.balance.tau_of)


def _ffn_experts(config: DecoderConfig) -> float:
    """Of an MoE layer, the mean over them."""
    return mean(layer.experts.ffn for layer in config.moe_configs) if config.per_layer else config.experts.ffn


def parameters(config: DecoderConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's size."""
    layers = config.moe_configs
    dim, experts, moe = config.dim, config.experts, len(layers)
    return {
        "embedding": config.vocab_size * dim,
        "head": 0 if config.tie_embeddings else config.vocab_size * dim,
        "attention": config.layers * 2 * dim * config.head_dim * (config.heads + config.num_kv_heads),
        "norms": (2 * config.layers + 1) * dim,
        "router": _router_parameters(config, layers),
        "router_gru": 6 * config.router_width**2 if config.router == "recurrent" else 0,  # one for all layers
        "gating_residual": sum(o.experts.total**2 for o in layers[1:]) if _has_gating_residual(config) else 0,
        "constant_experts": sum(o.experts.constant for o in layers) * 3 * dim,
        **{f"{kind}_experts": moe * count for kind, count in _parameters_of_others(config).items()},
        "ffn_experts": sum(o.experts.ffn for o in layers) * 3 * dim * config.hidden,
        "shared_experts": moe * experts.shared * 3 * dim * config.hidden,
        "dense_ffn": (config.layers - moe) * 3 * dim * config.dense_width,
    }


def _has_gating_residual(config: DecoderConfig) -> bool:
    """A registered router carries what it likes, among its own parameters."""
    return config.gating_residual and config.router in registry.router.defined


def _router_parameters(config: DecoderConfig, layers: list[MoEConfig]) -> int:
    if config.router in registry.router.defined:
        return sum(map(_own_router_parameters, layers))
    router, options = registry.router[config.router], config.router_options
    return sum(_counted(router, layer, index == 0, **options) for index, layer in enumerate(layers))


def _own_router_parameters(config: MoEConfig) -> int:
    experts, dim = config.experts.total, config.dim
    return {
        "linear": experts * dim,
        "two_layer": 8 * experts * (dim + experts),
        "shared_null": (experts - config.experts.zero + 1) * dim,
        "recurrent": config.router_width * (dim + experts),
    }[config.router]


def _parameters_of_others(config: DecoderConfig) -> dict[str, int]:
    options, own = config.expert_options, {"vector": config.dim, "scaled_copy": 1}
    return {
        kind: own[kind] * count
        if kind in own
        else _counted(registry.expert[kind], config, count, **options.get(kind, {}))
        for kind, count in config.experts.others.items()
        if count
    }


def _counted(part: Callable[..., Any], *given: Any, **options: Any) -> int:
    """Parameters of a registered part, which states no number; whoever registers one has imported torch."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in part(*given, **options).parameters())


def active_parameters(config: DecoderConfig, ffn_per_token: float | None = None) -> int:
    """Parameters one token uses, both embeddings included, with `ffn_per_token` FFN experts in each MoE layer.

    None means top_k, the upper bound that the paper's "activated parameters" states (Table 2); with a variable number
    of experts, all of them.
    """
    part = parameters(config)
    experts = _ffn_experts(config)
    most = config.top_k if config.selection in TOP_K_SELECTIONS else experts
    used = most if ffn_per_token is None else ffn_per_token
    return round(sum(part.values()) - part["ffn_experts"] * (1 - min(1.0, used / experts)))


def forward_flops(config: DecoderConfig, seq_len: int, ffn_per_token: float | None = None) -> dict[str, float]:
    """Forward FLOPs per token by part; a multiply-add counts two, attention scores count the causal half.

    `ffn_per_token` is measured; None takes the balanced layer's expectation. A registered router or expert type is
    taken to use every parameter once per token. Training costs three times as much.
    """
    part = parameters(config)
    used = expected_ffn_per_token(config) if ffn_per_token is None else ffn_per_token
    moe = len(config.moe_blocks)
    return {
        "attention": 2 * part["attention"] + 2 * config.layers * seq_len * config.dim,
        "router": 2 * (part["router"] + moe * part["router_gru"] + part["gating_residual"]),
        "constant_experts": 2 * part["constant_experts"],
        **{f"{kind}_experts": 2 * part[f"{kind}_experts"] for kind, count in config.experts.others.items() if count},
        "ffn_experts": 2 * part["ffn_experts"] * used / _ffn_experts(config),
        "shared_experts": 2 * part["shared_experts"],
        "dense_ffn": 2 * part["dense_ffn"],
        "head": 2 * config.vocab_size * config.dim,
    }


@dataclass
class Budget:
    """The quantities that arms may be matched on, before training."""

    total_params: int
    active_params: int  # upper bound
    flops_per_token: float  # forward, at the balanced layer's FFN share
    tokens: int

    @classmethod
    def of(cls, config: DecoderConfig, seq_len: int, tokens: int) -> "Budget":
        if config.name != "decoder":
            return cls._of_registered(config, seq_len, tokens)
        return cls(
            sum(parameters(config).values()),
            active_parameters(config),
            sum(forward_flops(config, seq_len).values()),
            tokens,
        )

    @classmethod
    def _of_registered(cls, config: DecoderConfig, seq_len: int, tokens: int) -> "Budget":
        """As the model itself says, built without weights; whoever registers one has imported torch."""
        import torch

        from moepp.models.build import build_model

        with torch.device("meta"):
            model = build_model(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        return cls(total, model.active_parameters(), sum(model.forward_flops(seq_len).values()), tokens)
