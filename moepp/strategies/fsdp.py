"""Strategies in which every device holds a part of the dense part too: FSDP2, with the experts sharded likewise or
divided among devices first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from moepp.errors import UsageError
from moepp.strategies.base import MoEStrategy
from moepp.strategies.sharding import Sharding, broadcast_first, dividing_dimension, expert_banks, local


class MoEFSDPStrategy(MoEStrategy, ModelParallelStrategy):
    """Fully sharded data parallel: every parameter is sharded over all devices and gathered where a block needs it.

    The blocks are the elements of the model's ModuleLists. Experts are sharded on a dimension that the devices divide
    evenly, for there may be fewer experts than devices. Gathered and reduced in float32.

    Of several micro-batches the last alone reduces the gradients, which are whole on every device until then, unless
    `reduce_every_micro_batch`.
    """

    def __init__(
        self,
        timeout_s: float = 600.0,
        expert_parallel_size: int | None = None,
        reduce_every_micro_batch: bool = False,
        **options: Any,
    ):
        super().__init__(expert_parallel_size, timeout_s, save_distributed_checkpoint=False, **options)
        self.reduce_every_micro_batch = reduce_every_micro_batch

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """As the base's, which demands that the module shard itself in `configure_model`."""
        module = self.lightning_module
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        if not any(isinstance(m, FSDPModule) for m in module.modules()):
            self._shard(module)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # in which FSDP would gather what training can then not use
        self.sharding = Sharding(module, self.groups, self.root_device)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: nn.Module) -> None:
        loose = [name for name, _ in module.named_parameters(recurse=False)]
        if loose:
            raise UsageError(
                f"{type(self).__name__} shards the parts of a module: {', '.join(loose)} of {type(module).__name__} "
                "would drift apart; put parameters into a child module"
            )
        broadcast_first([*module.parameters(), *module.buffers()], self.root_device)
        self.shard_experts(module)
        if self.groups is not None:  # before the blocks, which would shard the experts over all devices
            mesh = DeviceMesh.from_group(self.groups.expert_data, self.root_device.type)
            for bank in expert_banks(module):
                fully_shard(bank, mesh=mesh, shard_placement_fn=self._placements(module, mesh))
        world = DeviceMesh.from_group(dist.group.WORLD, self.root_device.type)
        blocks = [block for m in module.modules() if isinstance(m, nn.ModuleList) for block in m]
        for part in [*reversed(blocks), *module.children()]:  # inner lists come later in modules()
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=world, shard_placement_fn=self._placements(module, world))

    def _placements(self, module: nn.Module, mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
        experts = {id(p) for bank in expert_banks(module) for p in bank.parameters()}

        def placement(parameter: nn.Parameter) -> Shard | None:
            return Shard(dividing_dimension(parameter.shape, mesh.size())) if id(parameter) in experts else None

        return placement

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but its last."""
        self._reduce_gradients(self.reduce_every_micro_batch)
        yield
        self._reduce_gradients(True)

    def _reduce_gradients(self, reduced: bool) -> None:
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(reduced, recurse=False)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        return None  # all devices

    def reduce_expert_gradients(self) -> None:
        """FSDP has averaged them over the copies of the experts, but not over the devices of an expert group."""
        for parameter in self.sharding.experts:
            if parameter.grad is not None:  # frozen experts have none
                local(parameter.grad).div_(self.groups.size)


class ExpertParallelFSDPStrategy(MoEFSDPStrategy):
    """Expert parallel, with FSDP for all else and over the copies of the experts."""

    def __init__(
        self,
        expert_parallel_size: int = 0,
        timeout_s: float = 600.0,
        reduce_every_micro_batch: bool = False,
        **options: Any,
    ):
        super().__init__(timeout_s, expert_parallel_size, reduce_every_micro_batch, **options)
