"""Strategies in which every device holds a part of the dense part too: FSDP2, with the experts sharded likewise or
divided among devices first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moepp.errors import UsageError
from moepp.layers.dense import DenseFFN
from moepp.layers.experts import FFNExperts
from moepp.layers.others import parts_of_others
from moepp.strategies.base import MoEStrategy
from moepp.strategies.groups import CopyGroups
from moepp.strategies.sharding import broadcast_first, dividing_dimension, expert_banks, local

FFN = (FFNExperts, DenseFFN)  # modules whose parameters are read by matrix products alone, which autocast rounds


class MoEFSDPStrategy(MoEStrategy, ModelParallelStrategy):
    """Fully sharded data parallel: every parameter is sharded over `shard_size` consecutive devices (0: all), which
    hold one copy between them, and gathered where a block needs it.

    The blocks are the elements of the model's ModuleLists, and within them what computes an FFN. Experts are sharded on
    a dimension that the devices divide evenly, for there may be fewer experts than devices. Where products run in
    bfloat16 FFN matrices are gathered in it; all else is gathered, and all gradients are reduced, in float32.

    Of several micro-batches the last alone reduces the gradients, which are whole on every device until then, unless
    `reduce_every_micro_batch`.
    """

    def __init__(
        self,
        timeout_s: float = 600.0,
        expert_parallel_size: int | None = None,
        reduce_every_micro_batch: bool = False,
        shard_size: int = 0,
        **options: Any,
    ):
        super().__init__(expert_parallel_size, timeout_s, save_distributed_checkpoint=False, **options)
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.shard_size = shard_size
        self.copies: CopyGroups | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        if self.shard_size and self.copies is None:
            self.copies = CopyGroups.create(self.shard_size, self._timeout, "strategy.shard_size")

    def setup(self, trainer: pl.Trainer) -> None:
        """As the base's, which demands that the module shard itself in `configure_model`."""
        module = self.lightning_module
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(module)
        if not any(isinstance(m, FSDPModule) for m in module.modules()):
            self._shard(module)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # in which FSDP would gather what training can then not use
        self.take_parts(module)
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
        if scalars := [name for name, parameter in module.named_parameters() if not parameter.ndim]:
            raise UsageError(
                f"{type(self).__name__} shards no parameter of shape []: give {', '.join(scalars)} the shape [1]"
            )
        broadcast_first([*module.parameters(), *module.buffers()], self.root_device)
        self.shard_experts(module)
        world = self._mesh()
        experts = world if self.groups is None else DeviceMesh.from_group(self.groups.across, self.root_device.type)
        # A part of somebody else may call what it is made of for some tokens alone, and not on all devices.
        within = {id(m) for part in parts_of_others(module).values() for m in part.modules()}
        apart = [m for m in module.modules() if id(m) not in within]
        for part in apart:  # before the blocks, which would take their parameters into their own groups
            if isinstance(part, FFN):
                self._shard_part(part, experts if isinstance(part, FFNExperts) else world)
        lists = [list(m) for m in apart if isinstance(m, nn.ModuleList)]
        for part in [*reversed([block for blocks in lists for block in blocks]), *module.children()]:
            if any(True for _ in part.parameters()) and not isinstance(part, FSDPModule):
                self._shard_part(part, world)  # inner lists come later in modules()
        for blocks in lists:
            prefetch_neighbours(blocks)

    def _mesh(self) -> DeviceMesh:
        device = self.root_device.type
        return DeviceMesh.from_group(dist.group.WORLD, device) if self.copies is None else self.copies.mesh(device)

    def _shard_part(self, part: nn.Module, mesh: DeviceMesh) -> None:
        experts = {id(p) for bank in expert_banks(part) for p in bank.parameters()}
        devices = mesh.size(-1)

        def placement(parameter: nn.Parameter) -> Shard | None:
            return Shard(dividing_dimension(parameter.shape, devices)) if id(parameter) in experts else None

        fully_shard(part, mesh=mesh, mp_policy=self._precision_of(part), shard_placement_fn=placement)

    def _precision_of(self, part: nn.Module) -> MixedPrecisionPolicy:
        """What autocast would round anyway travels rounded: the same products from half the bytes."""
        if self.precision_plugin.precision == "bf16-mixed" and isinstance(part, FFN):
            return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(cast_forward_inputs=False)

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
        return None if self.copies is None else self.copies.within  # None: all devices

    def reduce_expert_gradients(self) -> None:
        """FSDP has averaged them over the copies of the experts, but not over the devices of an expert group."""
        for parameter in self.sharding.experts:
            if parameter.grad is not None:  # frozen experts have none
                local(parameter.grad).div_(self.groups.size)


def prefetch_neighbours(blocks: list[nn.Module]) -> None:
    """Has each block gather the next one while it runs, and in the backward pass the one before. By itself FSDP gathers
    ahead only as far as the host runs ahead, and the host stops in every MoE layer for the experts' counts (so does
    torchtitan: parallelize.py of its MoE models).
    """
    parts = [[m for m in block.modules() if isinstance(m, FSDPModule)] for block in blocks]
    for (before, after), (first, second) in zip(pairwise(blocks), pairwise(parts), strict=True):
        if first and second:
            before.set_modules_to_forward_prefetch(second)
            after.set_modules_to_backward_prefetch(first)


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
