"""What a run would take, from its config alone: nothing is read, tokenised or trained."""

from moepp.models.budget import Budget, active_parameters, expected_ffn_per_token, forward_flops, parameters
from moepp.models.settings import DecoderConfig
from moepp.training.settings import RunConfig

MFU = 0.3  # assumed share of the peak; mixtures of this size reach 0.15 (learned routing) to 0.4
PEAKS = {"A100": 312e12, "H100 or H200": 989e12}  # dense bf16 FLOP/s, vendors' data sheets
STATE_BYTES = 18  # per parameter: float32 weight, gradient and two AdamW moments, and the bfloat16 copy of autocast


def estimate(config: RunConfig) -> list[str]:
    """Lines that name parameters, tokens, FLOPs, GPU hours and memory, each with what it assumes."""
    model, data, trainer = config.model, config.data, config.trainer
    tokens = trainer.steps * data.batch_size * data.seq_len
    budget = Budget.of(model, data.seq_len, tokens)
    used = expected_ffn_per_token(model)
    part = parameters(model)
    training = 3 * sum(forward_flops(model, data.seq_len).values()) * tokens
    hours = ", ".join(f"{_short(training / (MFU * peak) / 3600)} on {name}" for name, peak in PEAKS.items())
    shown = {
        "parameters": f"{budget.total_params:,} ({part['ffn_experts']:,} in FFN experts)",
        "activated with top-k": f"{budget.active_params:,}; without the input embedding"
        f" {budget.active_params - part['embedding']:,}",
        "activated when balanced": f"{active_parameters(model, used):,} ({used:.3g} FFN experts per token and layer)",
        "tokens": f"{tokens:,} ({trainer.steps:,} steps of {data.batch_size:,} sequences of {data.seq_len:,})",
        "corpus": data.corpus + (f" ({', '.join(data.sources)})" if data.corpus == "mixture" else ""),
        "training FLOPs": f"{training:.3g} (three times the forward pass)",
        "GPU hours": f"{hours}, at an assumed {MFU:.0%} of the dense bf16 peak",
        "memory per device": _memory(config, budget.total_params),
    }
    width = max(map(len, shown))
    return [f"{name:<{width}}  {value}" for name, value in shown.items()]


def _memory(config: RunConfig, count: int) -> str:
    sequences = config.data.batch_size / config.trainer.accumulate / (config.trainer.devices * config.trainer.num_nodes)
    state = count * STATE_BYTES
    activations = sequences * config.data.seq_len * activation_bytes(config.model)
    return (
        f"about {_short((state + activations) / 2**30)} GiB unsharded: {_short(state / 2**30)} of weights, gradients"
        f" and AdamW, {_short(activations / 2**30)} of activations ({sequences:g} sequences at a time; a rough count)"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def activation_bytes(config: DecoderConfig) -> float:
    """Bytes per token that a training step keeps in bfloat16 for the backward pass.

    A block keeps its float32 input and sum and some eight vectors of the attention; every FFN row its input, two hidden
    halves, their product and its output. The head keeps logits and their float32 softmax. With activation checkpointing
    a block keeps its input, and one block at a time the rest.
    """
    used = expected_ffn_per_token(config)
    block = config.dim * (2 * 4 + 8 * 2) + used * 2 * (2 * config.dim + 3 * config.hidden)
    head = config.vocab_size * (2 + 4)
    if config.activation_checkpointing:
        return config.layers * config.dim * 4 + block + head
    return config.layers * block + head
