"""Strategies in which every device holds the dense part: DDP, with all experts or with its own."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from moepp.strategies.base import MoEStrategy
from moepp.strategies.reduction import GradientReduction
from moepp.strategies.sharding import broadcast_first


class MoEDDPStrategy(MoEStrategy, DDPStrategy):
    """Data parallel: every device holds the whole model and trains it on its part of the batch."""

    def __init__(self, timeout_s: float = 600.0, expert_parallel_size: int | None = None, **options: Any):
        # Buffers follow the whole batch's counts on every device; DDP would send the first device's in each forward.
        super().__init__(expert_parallel_size, timeout_s, broadcast_buffers=False, **options)

    def setup(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        self.shard_experts(module)
        self.take_parts(module)
        broadcast_first(module.buffers(), self.root_device)  # parameters DDP itself does
        experts = [name for name, parameter in module.named_parameters() if self.sharding.is_sharded(parameter)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, experts)
        super().setup(trainer)

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self._lay_out_buckets()

    def _lay_out_buckets(self) -> None:
        """Has DDP arrange its buckets before the first step: it does so after a first backward pass, by the order of
        the gradients, and what more than two devices add up depends on the arrangement by rounding. Else the first step
        of a resumed run would differ from the same step of one that went on. The pass here has no data, and gradients
        in reverse order of the parameters, about as real ones come.
        """
        module = self.lightning_module
        alike = [p for p in module.parameters() if p.requires_grad and not self.sharding.is_sharded(p)]
        module.forward = lambda nothing: sum(p.sum() for p in alike)
        self.model(None).backward()  # an input there must be: on a GPU, DDP unpacks the first that it has moved
        del module.forward
        for parameter in alike:
            parameter.grad = None


class ExpertParallelStrategy(MoEDDPStrategy):
    """Expert parallel: `expert_parallel_size` consecutive devices (0: all) divide the FFN experts among them; rows
    travel to their experts. All else is data parallel.
    """

    def __init__(self, expert_parallel_size: int = 0, timeout_s: float = 600.0, **options: Any):
        super().__init__(timeout_s, expert_parallel_size, **options)
        self.reduction: GradientReduction | None = None

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.reduction = GradientReduction(self.sharding.experts, self.groups, due=self._reduces)

    def _reduces(self) -> bool:
        """Whether this backward pass is a step's last: DDP knows, which reduces in the same."""
        return self.model.require_backward_grad_sync

    def reduce_expert_gradients(self) -> None:
        self.reduction.finish()

    def teardown(self) -> None:
        if self.reduction is not None:
            self.reduction.remove()
        super().teardown()
