"""What a device holds of a model while it trains, whatever the batch: weights, gradients, AdamW's moments, and what the
strategy needs to have them where they are computed with.
"""

from dataclasses import dataclass

from moepp.models.budget import parameters
from moepp.models.settings import DecoderConfig
from moepp.training.settings import StrategyConfig

STATE_BYTES = 16  # per parameter: float32 weight, gradient and two AdamW moments
WIDE = 4  # bytes of a float32
PRESENT_BLOCKS = 2  # of FSDP: the one that is computed, and the next one, which is gathered meanwhile
EXPERTS = "ffn_experts"
FFN = (EXPERTS, "shared_experts", "dense_ffn")  # what FSDP gathers in the dtype of products
MATRICES = ("attention", *FFN)
NOT_IN_BLOCKS = ("embedding", "head")


@dataclass
class DeviceState:
    """Of one of `devices`, all of which hold as much. A step has `accumulate` micro-batches."""

    model: DecoderConfig
    strategy: StrategyConfig
    devices: int
    accumulate: int
    precision: str

    def __post_init__(self) -> None:
        name, own = self.strategy.name, dict(parameters(self.model))
        if name.startswith("expert_parallel"):
            own[EXPERTS] /= self.strategy.expert_parallel_size or self.devices
        self.own = own  # parameters that this device computes with, by part

    def bytes(self) -> dict[str, float]:
        """By part; only those that there are."""
        found = self._sharded() if self.strategy.name.endswith("fsdp") else self._whole()
        return {part: size for part, size in found.items() if size}

    def _whole(self) -> dict[str, float]:
        """DDP reduces the gradients of what all devices hold in buckets beside them."""
        alike = sum(self.own.values()) - (self.own[EXPERTS] if self.strategy.name == "expert_parallel" else 0)
        return {
            "of weights, gradients and AdamW": STATE_BYTES * sum(self.own.values()),
            "of DDP's buckets": 0 if self.strategy.name == "single" else WIDE * alike,
        }

    def _sharded(self) -> dict[str, float]:
        """What lies in no block is gathered for the whole of a step. Gradients are whole until they are reduced."""
        total = sum(self.own.values())
        outside = sum(self.own[part] for part in NOT_IN_BLOCKS)
        ffn = sum(self.own[part] for part in FFN)
        blocks = product_bytes(self.precision) * ffn + WIDE * (total - outside - ffn)
        waits = self.accumulate > 1 and not self.strategy.reduce_every_micro_batch
        block_gradients = total - outside if waits else (total - outside) / self.model.layers
        return {
            "of weights, gradients and AdamW": STATE_BYTES * sum(parameters(self.model).values()) / self.shards,
            "of gathered weights": WIDE * outside + PRESENT_BLOCKS * blocks / self.model.layers,
            "of whole gradients": WIDE * (outside + block_gradients),
        }

    @property
    def shards(self) -> int:
        return self.strategy.shard_size or self.devices

    @property
    def copied(self) -> tuple[str, ...]:
        """The parts of which autocast keeps copies in bfloat16: not what is gathered in it already."""
        return MATRICES if not self.strategy.name.endswith("fsdp") else ("attention",)


def product_bytes(precision: str) -> int:
    """Of a number in matrix products."""
    return 2 if precision == "bf16-mixed" else WIDE
