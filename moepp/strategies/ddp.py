"""Strategies in which every device holds the dense part: DDP, with all experts or with its own."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moepp.strategies.base import MoEStrategy


class MoEDDPStrategy(MoEStrategy, DDPStrategy):
    """Data parallel: every device holds the whole model and trains it on its part of the batch."""

    def __init__(self, timeout_s: float = 600.0, expert_parallel_size: int | None = None, **options: Any):
        # Buffers follow the whole batch's counts on every device; DDP would send the first device's in each forward.
        super().__init__(expert_parallel_size, timeout_s, broadcast_buffers=False, **options)

    def setup(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        self.shard_experts(module)
        self.take_parts(module)
        experts = [name for name, parameter in module.named_parameters() if self.sharding.is_sharded(parameter)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, experts)
        super().setup(trainer)


class ExpertParallelStrategy(MoEDDPStrategy):
    """Expert parallel: `expert_parallel_size` consecutive devices (0: all) divide the FFN experts among them; rows
    travel to their experts. All else is data parallel.
    """

    def __init__(self, expert_parallel_size: int = 0, timeout_s: float = 600.0, **options: Any):
        super().__init__(timeout_s, expert_parallel_size, **options)
