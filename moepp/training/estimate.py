"""What a run would take, from its config alone: nothing is read, tokenised or trained.

Letters in comments as everywhere: T tokens of a micro-batch, D model width, V vocabulary, N experts, K top-k, F hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moepp.layers.balance import expert_capacities
from moepp.layers.settings import TOP_K_SELECTIONS
from moepp.models.budget import Budget, active_parameters, expected_ffn_per_token, parameters
from moepp.models.build import build_model
from moepp.models.cross_entropy import WHOLE
from moepp.models.settings import DecoderConfig
from moepp.training.device_state import MATRICES, STATE_BYTES, WIDE, DeviceState, product_bytes
from moepp.training.settings import RunConfig

MFU = 0.3  # assumed share of the peak; mixtures of this size reach 0.15 (learned routing) to 0.4
PEAKS = {"A100": 312e12, "H100 or H200": 989e12}  # dense bf16 FLOP/s, vendors' data sheets


def estimate(config: RunConfig) -> list[str]:
    """Lines that name parameters, tokens, FLOPs, GPU hours and memory, each with what it assumes."""
    data, trainer = config.data, config.trainer
    tokens = trainer.steps * data.batch_size * data.seq_len
    budget = Budget.of(config.model, data.seq_len, tokens)
    training = 3 * budget.flops_per_token * tokens
    hours = ", ".join(f"{two_digits(training / (MFU * peak) / 3600)} on {name}" for name, peak in PEAKS.items())
    foreign = config.model.name == "hf"
    shown = {
        **(_foreign_size if foreign else _size)(config.model, budget),
        "tokens": f"{tokens:,} ({trainer.steps:,} steps of {data.batch_size:,} sequences of {data.seq_len:,})",
        "corpus": data.corpus + (f" ({', '.join(data.sources)})" if data.corpus == "mixture" else ""),
        "training FLOPs": f"{training:.3g} (three times the forward pass)",
        "GPU hours": f"{hours}, at an assumed {MFU:.0%} of the dense bf16 peak",
        "memory per device": _foreign_memory(config.model) if foreign else _memory(config),
    }
    width = max(map(len, shown))
    return [f"{name:<{width}}  {value}" for name, value in shown.items()]


def _size(model: DecoderConfig, budget: Budget) -> dict[str, str]:
    used, part = expected_ffn_per_token(model), parameters(model)
    return {
        "parameters": f"{budget.total_params:,} ({part['ffn_experts']:,} in FFN experts)",
        "activated with top-k": f"{budget.active_params:,}; without the input embedding"
        f" {budget.active_params - part['embedding']:,}",
        "activated when balanced": f"{active_parameters(model, used):,} ({used:.3g} FFN experts per token and layer)",
    }


def _foreign_size(model: DecoderConfig, budget: Budget) -> dict[str, str]:
    """Of a model of transformers, new experts included."""
    return {"parameters": f"{budget.total_params:,}", "activated with top-k": f"{budget.active_params:,}"}


def _foreign_memory(model: DecoderConfig) -> str:
    """Of weights, of gradients and moments of what is trained, and of the model that is learnt from."""
    import torch

    with torch.device("meta"):
        parameters = list(build_model(model).parameters())
    total, trained = (sum(p.numel() for p in kept) for kept in (parameters, [p for p in parameters if p.requires_grad]))
    size = WIDE * total + (STATE_BYTES - WIDE) * trained
    size += WIDE * total if model.retrofit.loss != "cross_entropy" else 0
    return f"about {two_digits(size / 2**30)} GiB unsharded, without activations, with {trained:,} parameters trained"


def _memory(config: RunConfig) -> str:
    trainer, strategy = config.trainer, config.strategy
    devices = trainer.devices * trainer.num_nodes
    parts, sequences = device_memory(config), config.data.batch_size / trainer.accumulate / devices
    named = ", ".join(f"{two_digits(size / 2**30)} {name}" for name, size in parts.items())
    where = f"strategy={strategy.name}" + (f" on {devices} devices" if devices > 1 else "")
    total = two_digits(sum(parts.values()) / 2**30)
    return f"about {total} GiB under {where}, with {sequences:g} sequences at a time: {named}"


def device_memory(config: RunConfig) -> dict[str, float]:
    """Bytes that a device holds at the peak of a step, by part."""
    trainer, devices = config.trainer, config.trainer.devices * config.trainer.num_nodes
    tokens = config.data.batch_size * config.data.seq_len / trainer.accumulate / devices
    state = DeviceState(config.model, config.strategy, devices, trainer.accumulate, trainer.precision)
    step = StepMemory(config.model, tokens, trainer.precision, state.own, state.copied)
    return state.bytes() | step.peak()


def two_digits(value: float) -> str:
    """At least: all of a number's digits before the point are said."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


@dataclass
class StepMemory:
    """Bytes that a training step of `tokens` holds beside the state (device_state.py), as the backends `grouped` and
    `triton` compute it, not compiled.

    Forward keeps `kept()` for backward. On top come, one after the other, the head with the loss, and the backward pass
    of each block; the larger one makes the peak.
    """

    config: DecoderConfig
    tokens: float
    precision: str
    weights: Mapping[str, float] = field(default_factory=dict)  # parameters that the device has, by part; empty: all
    copied: Sequence[str] = MATRICES  # those of which there are copies in bfloat16

    def __post_init__(self) -> None:
        self.weights = self.weights or parameters(self.config)
        self.narrow = product_bytes(self.precision)
        self.cast = self.narrow if self.narrow < WIDE else 0  # of a copy for them, which float32 needs not
        blocks = range(self.config.layers)
        self.moe_layers = sum(self.config.is_moe(block) for block in blocks)

    def peak(self) -> dict[str, float]:
        """By part, their sum being the peak."""
        kept = self.kept()
        del kept["of the loss"]  # a part of the head's peak, and gone when the blocks follow
        on_top = {
            "of the head and the loss at their peak": self.head_peak(),
            "of a block's backward pass at its peak": self.block_peak(),
        }
        largest = max(on_top, key=on_top.get)
        return {name: size for name, size in kept.items() if size} | {largest: on_top[largest]}

    def kept(self) -> dict[str, float]:
        """What is kept from the forward pass for the backward pass, by part."""
        blocks = self.block_inputs() if self.config.activation_checkpointing else self.whole_blocks()
        return {"of weights in bfloat16": self.weight_copies(), **blocks, "of the loss": self.head_kept()}

    def block_inputs(self) -> dict[str, float]:
        carried = self.moe_layers * self.config.experts.total
        return {"of block inputs": self.tokens * WIDE * (self.config.layers * self.config.dim + carried)}

    def whole_blocks(self) -> dict[str, float]:
        dense = self.config.layers - self.moe_layers
        return {
            "of attention and norms": self.config.layers * self.attention(),
            "of routers": self.moe_layers * self.router(),
            "of FFN rows": self.moe_layers * self.expert_rows() + dense * self.dense_ffn(self.config.dense_width),
        }

    def weight_copies(self) -> float:
        """Of the blocks' matrices but the routers'; those of a block that is recomputed come and go with it."""
        return 0 if self.config.activation_checkpointing else self.cast * self.block_weights()

    def block_weights(self) -> float:
        return sum(self.weights[part] for part in self.copied)

    def attention(self) -> float:
        """A block's two norms keep their float32 inputs; the attention its input, queries, keys and values before and
        after rotation (the values are a part of the former), its output, and a float32 for every head.
        """
        dim, rotated = self.config.dim, self.config.head_dim * (self.config.heads + self.config.num_kv_heads)
        projected = rotated + self.config.head_dim * self.config.num_kv_heads
        return self.tokens * (WIDE * (2 * dim + self.config.heads) + self.narrow * (2 * dim + projected + rotated))

    def router(self) -> float:
        """The float32 input, about three numbers per expert (logits, scores, gates), and per slot some five ids, gates
        and flags.
        """
        return self.tokens * (WIDE * (self.config.dim + 3 * self.config.experts.total) + 32 * self.config.top_k)

    def expert_rows(self) -> float:
        """Every token's input, and [gate, up] of every row (kernels/planned.py); shared experts as a dense FFN."""
        config = self.config
        inputs = self.cast * self.tokens * config.dim  # float32 ones are the router's
        shared = self.dense_ffn(config.experts.shared * config.hidden) if config.experts.shared else 0
        return inputs + self.narrow * 2 * config.hidden * self.rows() + shared

    def rows(self) -> float:
        """FFN rows of a layer: as many as its capacities allow, or the config keeps, and at most all slots."""
        config, slots = self.config, self.tokens * self.slots_per_token()
        bounds = [slots]
        if config.capacity_factor is not None:
            limits = expert_capacities(config.experts, config.balance, slots, config.capacity_factor)
            bounds.append(config.experts.ffn * limits["ffn"])
        if config.ffn_rows is not None:
            bounds.append(config.ffn_rows * self.tokens)
        return min(bounds)

    def slots_per_token(self) -> int:
        return self.config.top_k if self.config.selection in TOP_K_SELECTIONS else self.config.experts.total

    def dense_ffn(self, width: int) -> float:
        """The input, [gate, up], silu(gate) and the product."""
        return self.tokens * self.narrow * (self.config.dim + 4 * width)

    def head_kept(self) -> float:
        """The last norm's input, and the gradients of its output and of the head (cross_entropy.py)."""
        return WIDE * self.config.dim * (2 * self.tokens + self.config.vocab_size)

    def head_peak(self) -> float:
        """What is kept, the head's input, also as it is multiplied, a chunk's logits, whose gradient takes their place,
        and the head's weight as it is multiplied, with a summand of its gradient.
        """
        dim, vocabulary = self.config.dim, self.config.vocab_size
        weights = vocabulary * dim * (self.cast + self.narrow)
        logits = self.narrow * min(WHOLE, self.tokens * vocabulary)
        return self.head_kept() + weights + self.tokens * dim * (WIDE + self.cast) + logits

    def block_peak(self) -> float:
        """Float32 gradients of a block's output and input and of the experts' input; per FFN row the gradients of its
        output and of [gate, up], and h. With activation checkpointing the block is there as well.
        """
        dim, width = self.config.dim, self.config.hidden
        rows, each = (self.rows(), dim + 3 * width) if self.moe_layers else (self.tokens, 4 * self.config.dense_width)
        backward = self.tokens * dim * 3 * WIDE + self.narrow * rows * each
        if not self.config.activation_checkpointing:
            return backward
        ffn = self.router() + self.expert_rows() if self.moe_layers else self.dense_ffn(self.config.dense_width)
        return backward + self.attention() + ffn + self.cast * self.block_weights() / self.config.layers
