"""Which devices share the experts, and which hold the same ones."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from moepp.errors import UsageError


@dataclass(frozen=True)
class ExpertGroups:
    """This device's process groups: world = copies of the experts x `size` devices that hold one copy.

    The `expert` group is `size` consecutive ranks, so it stays inside a node while a node has that many devices; this
    is its `rank`-th. The `expert_data` group has the same experts as this device. Every device has tokens of its own.
    """

    size: int
    rank: int
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup

    @classmethod
    def create(cls, size: int, timeout: timedelta) -> "ExpertGroups":
        """`size` 0 takes all devices. Raises UsageError where the devices cannot be divided so; all ranks must call."""
        world, rank = dist.get_world_size(), dist.get_rank()
        size = size or world
        if world % size:
            raise UsageError(
                f"{world} devices cannot be divided into groups of strategy.expert_parallel_size={size}; "
                "choose a divisor of the number of devices"
            )
        by_copy = [list(range(first, first + size)) for first in range(0, world, size)]
        by_slice = [list(range(first, world, size)) for first in range(size)]
        expert, _ = dist.new_subgroups_by_enumeration(by_copy, timeout=timeout)
        expert_data, _ = dist.new_subgroups_by_enumeration(by_slice, timeout=timeout)
        return cls(size, rank % size, expert, expert_data)

    @property
    def first(self) -> int:
        """Global rank of the expert group's first device."""
        return dist.get_rank() - self.rank
