"""The gradients of experts that several expert groups hold copies of."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from moepp.layers.regions import region
from moepp.strategies.groups import CopyGroups


class GradientReduction:
    """Turns the experts' gradients, sums over the tokens of their expert group, into means over all devices, each while
    the backward pass still runs.

    `due` says whether the pass is a step's last. The weights of all of a device's experts are one tensor, and its
    gradient is a bucket by itself. Reductions begin in the reverse order of `parameters`, in whatever order their
    gradients come: all devices must begin them in the same.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: CopyGroups, due: Callable[[], bool]):
        self.parameters, self.groups, self.due = parameters, groups, due
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in parameters if p.requires_grad]
        self._await_all()

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _await_all(self) -> None:
        self.awaited = [p for p in self.parameters if p.requires_grad]  # the last one's reduction is the next to begin
        self.ready: set[int] = set()
        self.pending: list[dist.Work] = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self.due():
            return
        self.ready.add(id(parameter))
        while self.awaited and id(self.awaited[-1]) in self.ready:
            self._begin(self.awaited.pop())

    def _begin(self, parameter: nn.Parameter) -> None:
        world = dist.get_world_size()
        with region("gradient_reduction"):
            parameter.grad.div_(world)
            if self.groups.size < world:
                self.pending.append(dist.all_reduce(parameter.grad, group=self.groups.across, async_op=True))

    def finish(self) -> None:
        """After a step's last backward pass; all gradients are means when it returns."""
        while self.awaited:
            parameter = self.awaited.pop()
            if not parameter.requires_grad:  # frozen since the last step
                continue
            if parameter.grad is None:  # one device would have taken a step with gradient 0
                parameter.grad = torch.zeros_like(parameter)
            self._begin(parameter)
        for reduction in self.pending:
            reduction.wait()
        self._await_all()
