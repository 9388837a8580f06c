"""Which devices hold one copy of something between them, and which hold the same part of it."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moepp.errors import UsageError


@dataclass(frozen=True)
class CopyGroups:
    """This device's process groups: world = copies x `size` devices that hold one copy, of the experts or of all
    weights.

    The group `within` a copy is `size` consecutive ranks, so it stays inside a node while a node has that many devices;
    this is its `rank`-th. The group `across` copies has the same part as this device. All devices have tokens of their
    own.
    """

    size: int
    rank: int
    within: dist.ProcessGroup
    across: dist.ProcessGroup

    @classmethod
    def create(cls, size: int, timeout: timedelta, key: str = "strategy.expert_parallel_size") -> "CopyGroups":
        """`size` 0 takes all devices. Raises UsageError where the devices cannot be divided so; all ranks must call."""
        world, rank = dist.get_world_size(), dist.get_rank()
        size = size or world
        if world % size:
            raise UsageError(
                f"{world} devices cannot be divided into groups of {key}={size}; choose a divisor of the number of "
                "devices"
            )
        by_copy = [list(range(first, first + size)) for first in range(0, world, size)]
        by_part = [list(range(first, world, size)) for first in range(size)]
        within, _ = dist.new_subgroups_by_enumeration(by_copy, timeout=timeout)
        across, _ = dist.new_subgroups_by_enumeration(by_part, timeout=timeout)
        return cls(size, rank % size, within, across)

    @property
    def first(self) -> int:
        """Global rank of the first device within this copy."""
        return dist.get_rank() - self.rank

    def mesh(self, device_type: str, outer: str = "across") -> DeviceMesh:
        """Both groups as dimensions `across` and `within` of a mesh, the `outer` one first."""
        ranks = torch.arange(dist.get_world_size()).view(-1, self.size)
        if outer == "across":
            return DeviceMesh.from_group(
                [self.across, self.within], device_type, ranks, mesh_dim_names=("across", "within")
            )
        return DeviceMesh.from_group(
            [self.within, self.across], device_type, ranks.t(), mesh_dim_names=("within", "across")
        )
