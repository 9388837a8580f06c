"""The schema of `strategy`: how one run is spread over devices."""

from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["single", "ddp", "fsdp", "expert_parallel", "expert_parallel_fsdp", "deepspeed"]


@dataclass
class StrategyConfig:
    """How parameters and tokens are spread over devices; docs/strategies.md says which is for what."""

    name: StrategyName = "single"
    expert_parallel_size: int = 0  # consecutive devices that share one copy of the experts; 0: all devices
    timeout_s: float = 600.0  # how long a device waits for the others before the run fails

    def __post_init__(self) -> None:
        if self.expert_parallel_size < 0:
            raise ValueError(f"strategy.expert_parallel_size={self.expert_parallel_size} must not be negative")
        if self.timeout_s <= 0:
            raise ValueError(f"strategy.timeout_s={self.timeout_s} must be positive")
