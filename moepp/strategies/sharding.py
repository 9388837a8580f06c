"""Which part of every tensor this device holds, and back to the whole: all strategies write the same checkpoint."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moepp.errors import UsageError
from moepp.layers.experts import FFNExperts
from moepp.strategies.groups import CopyGroups


def expert_banks(module: nn.Module) -> list[FFNExperts]:
    return [m for m in module.modules() if isinstance(m, FFNExperts)]


def broadcast_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Gives all devices the first one's values, one tensor at a time on `device`; on the meta device there are none."""
    for tensor in tensors:
        if not tensor.is_meta:
            moved = tensor.detach().to(device)
            dist.broadcast(moved, 0)
            with torch.no_grad():
                tensor.copy_(moved)


def slice_experts(module: nn.Module, groups: CopyGroups) -> None:
    """Keeps this device's experts: every parameter of an FFNExperts is stacked on dimension 0.

    Raises UsageError where the experts cannot be divided evenly.
    """
    for bank in expert_banks(module):
        experts = len(bank.w_in)
        if experts % groups.size:
            raise UsageError(
                f"experts.ffn={experts} cannot be divided among {groups.size} devices; choose a multiple, or a "
                "strategy.expert_parallel_size that divides it"
            )
        for parameter in bank.parameters():
            parameter.data = parameter.data.chunk(groups.size)[groups.rank].clone()  # a view would keep the whole


def dividing_dimension(shape: torch.Size, devices: int) -> int:
    """The first dimension that `devices` divide evenly; 0, where some hold less than others, if none is."""
    return next((dimension for dimension, size in enumerate(shape) if size % devices == 0), 0)


def local(tensor: Tensor) -> Tensor:
    """What this device holds of it; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharding:
    """How the parameters of a module lie over devices: `experts` are sliced over the groups within a copy, where there
    are groups, and DTensors as FSDP sharded them. Collectives run on `device`.
    """

    def __init__(self, module: nn.Module, groups: CopyGroups | None, device: torch.device):
        self.groups, self.device = groups, device
        self.experts = [p for bank in expert_banks(module) for p in bank.parameters()] if groups else []
        self.sliced = {id(p) for p in self.experts}

    def is_sharded(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.sliced or isinstance(parameter, DTensor)

    def whole(self, parameter: nn.Parameter, value: Tensor) -> Tensor | None:
        """`value`, which lies over devices like `parameter`: whole on the first device, None on the others.

        All devices must call. Sharded values arrive on the CPU.
        """
        first = dist.get_rank() == 0
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if id(parameter) in self.sliced and self.groups.first == 0:
            value = value.to(self.device).contiguous()  # from the CPU, where Lightning leaves a finished model
            parts = [torch.empty_like(value) for _ in range(self.groups.size)] if first else None
            dist.gather(value, parts, 0, group=self.groups.within)
            value = torch.cat([part.cpu() for part in parts]) if first else value
        if not first:
            return None
        return value.cpu() if self.is_sharded(parameter) else value

    def part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """A copy of what this device holds of a whole tensor that belongs to `parameter`."""
        if id(parameter) in self.sliced:
            whole = whole.chunk(self.groups.size)[self.groups.rank]
        if not isinstance(parameter, DTensor):
            return whole.to(parameter.device, copy=True)
        mesh, placement = parameter.device_mesh, parameter.placements[-1]  # hybrid: a dimension of copies comes before
        pieces = whole.chunk(mesh.size(-1), placement.dim)  # as FSDP shards: the last devices may hold less, or nothing
        rank = mesh.get_local_rank(mesh.ndim - 1)
        piece = pieces[rank] if rank < len(pieces) else whole.narrow(placement.dim, 0, 0)
        piece = piece.to(parameter.device, copy=True, memory_format=torch.contiguous_format)
        return DTensor.from_local(
            piece, mesh, parameter.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def spread(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """`value`, which lies over devices like `parameter`, as one tensor over all of them: a DTensor that shares its
        memory, or itself where every device holds it all.
        """
        if id(parameter) not in self.sliced:
            return value
        inner = value.placements[-1] if isinstance(value, DTensor) else Replicate()
        shape = torch.Size([value.shape[0] * self.groups.size, *value.shape[1:]])
        mesh = self.groups.mesh(self.device.type, outer="within")
        return DTensor.from_local(
            local(value), mesh, (Shard(0), inner), run_check=False, shape=shape, stride=contiguous_stride(shape)
        )


def contiguous_stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
