"""Parameters and forward FLOPs of a decoder by part, computed from its config alone."""

from dataclasses import dataclass

from moepp.layers.balance import ffn_share
from moepp.models.decoder import DecoderConfig


def expected_ffn_per_token(config: DecoderConfig) -> float:
    """FFN experts per token of a perfectly balanced layer: K tau N_FFN / (tau N_FFN + N_ZC) (Table 1)."""
    return config.top_k * ffn_share(config.experts, config.balance.tau)


def parameters(config: DecoderConfig) -> dict[str, int]:
    """Parameters by part; their sum is the model's size."""
    moe = sum(config.is_moe(block) for block in range(config.layers))
    dim, experts = config.dim, config.experts
    return {
        "embedding": config.vocab_size * dim,
        "head": 0 if config.tie_embeddings else config.vocab_size * dim,
        "attention": config.layers * 2 * dim * config.head_dim * (config.heads + config.num_kv_heads),
        "norms": (2 * config.layers + 1) * dim,
        "router": moe * _router_parameters(config),
        "gating_residual": (moe - 1) * experts.total**2 if config.gating_residual else 0,
        "constant_experts": moe * experts.constant * 3 * dim,
        "ffn_experts": moe * experts.ffn * 3 * dim * config.hidden,
        "dense_ffn": (config.layers - moe) * 3 * dim * config.dense_width,
    }


def _router_parameters(config: DecoderConfig) -> int:
    experts, dim = config.experts.total, config.dim
    return experts * dim if config.router == "linear" else 8 * experts * (dim + experts)


def active_parameters(config: DecoderConfig, ffn_per_token: float | None = None) -> int:
    """Parameters one token uses, both embeddings included, with `ffn_per_token` FFN experts in each MoE layer.

    None means top_k, the upper bound that the paper's "activated parameters" states (Table 2).
    """
    part = parameters(config)
    used = config.top_k if ffn_per_token is None else ffn_per_token
    return round(sum(part.values()) - part["ffn_experts"] * (1 - min(1.0, used / config.experts.ffn)))


def forward_flops(config: DecoderConfig, seq_len: int, ffn_per_token: float | None = None) -> dict[str, float]:
    """Forward FLOPs per token by part; a multiply-add counts two, attention scores count the causal half.

    `ffn_per_token` is measured; None takes the balanced layer's expectation. Training costs three times as much.
    """
    part = parameters(config)
    used = expected_ffn_per_token(config) if ffn_per_token is None else ffn_per_token
    return {
        "attention": 2 * part["attention"] + 2 * config.layers * seq_len * config.dim,
        "router": 2 * (part["router"] + part["gating_residual"]),
        "constant_experts": 2 * part["constant_experts"],
        "ffn_experts": 2 * part["ffn_experts"] * used / config.experts.ffn,
        "dense_ffn": 2 * part["dense_ffn"],
        "head": 2 * config.vocab_size * config.dim,
    }


@dataclass
class Budget:
    """The quantities that arms may be matched on, before training."""

    total_params: int
    active_params: int  # upper bound: top_k FFN experts
    flops_per_token: float  # forward, at the balanced layer's FFN share
    tokens: int

    @classmethod
    def of(cls, config: DecoderConfig, seq_len: int, tokens: int) -> "Budget":
        return cls(
            sum(parameters(config).values()),
            active_parameters(config),
            sum(forward_flops(config, seq_len).values()),
            tokens,
        )
