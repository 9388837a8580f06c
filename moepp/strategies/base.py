"""What all strategies for MoE++ share, as a mixin for those of Lightning: gradients, clipping and checkpoints of one
device.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from moepp.errors import UsageError
from moepp.strategies.dispatch import AllToAllDispatcher, SharedBatchDispatcher
from moepp.strategies.groups import ExpertGroups
from moepp.strategies.sharding import Sharding, broadcast_first, expert_banks, local, slice_experts
from moepp.strategies.traffic import Traffic


class MoEStrategy:
    """Mixed into a Lightning strategy that starts one process per device, each with its own part of every batch.

    `expert_parallel_size` consecutive devices hold one copy of the FFN experts between them; 0: all devices; None:
    every device holds them all. The batch's statistics (load-balance loss, capacity, control) are those of all devices.
    """

    def __init__(self, expert_parallel_size: int | None, timeout_s: float, **options: Any):
        if options.get("start_method", "popen") != "popen":
            raise UsageError(
                f"{type(self).__name__} cannot start processes by {options['start_method']}, which hands weights back "
                "from a device that holds a part of them; start a script"
            )
        super().__init__(timeout=timedelta(seconds=timeout_s), **options)
        self.expert_parallel_size = expert_parallel_size
        self.groups: ExpertGroups | None = None
        self.sharding: Sharding | None = None
        self.traffic = Traffic()

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.expert_parallel_size is not None and self.groups is None:
            self.groups = ExpertGroups.create(self.expert_parallel_size, self._timeout)

    def shard_experts(self, module: nn.Module) -> None:
        """Gives the layers their dispatchers, and this device its experts; a second call changes nothing."""
        banks = expert_banks(module)
        if self.groups is None:
            for bank in banks:
                bank.dispatcher = SharedBatchDispatcher(bank.dispatcher.backend)
        elif not any(isinstance(bank.dispatcher, AllToAllDispatcher) for bank in banks):
            self._refuse_what_cannot_be_sharded(banks)
            broadcast_first((p for bank in banks for p in bank.parameters()), self.root_device)
            slice_experts(module, self.groups)
            for bank in banks:
                bank.dispatcher = AllToAllDispatcher(bank.dispatcher.backend, self.groups, self.traffic)

    def _refuse_what_cannot_be_sharded(self, banks: list[nn.Module]) -> None:
        name = type(self).__name__
        if not banks:
            raise UsageError(f"{name} needs a model with MoE layers; strategy=ddp or fsdp train others")
        if not self.lightning_module.automatic_optimization:
            raise UsageError(f"{name} reduces the experts' gradients in the optimizer's step: no manual optimization")
        if is_overridden("configure_gradient_clipping", self.lightning_module, pl.LightningModule):
            raise UsageError(
                f"{name} clips by the norm of all devices: leave configure_gradient_clipping as it is, and give the "
                "Trainer a gradient_clip_val"
            )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise UsageError(
                f"{name} cannot scale a float16 loss, for devices with other experts would skip other steps; "
                "use trainer.precision=bf16-mixed"
            )

    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        # Each device's own norm would let the parameters that all of them hold drift apart.
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = [p for p in self.precision_plugin.main_params(optimizer) if p.grad is not None]
        coefficient = (clip_val / (self.gradient_norm(parameters) + 1e-6)).clamp(max=1)
        torch._foreach_mul_([local(p.grad) for p in parameters], coefficient)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of the gradient of all these parameters, as one device would see it. All devices must call."""
        replicated, sharded = [], []
        for parameter in parameters:
            if parameter.grad is not None:
                gradients = sharded if self.sharding.is_sharded(parameter) else replicated
                gradients.append(local(parameter.grad))
        square = get_total_norm(sharded).to(self.root_device).square()
        if sharded:
            dist.all_reduce(square, group=self.shard_group)
        return (square + get_total_norm(replicated).to(self.root_device).square()).sqrt()

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The devices that hold different parts of the sharded parameters."""
        return self.groups.expert

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: pl.LightningModule | None = None, **options: Any
    ) -> Any:
        def closure_with_all_gradients() -> Any:
            loss = closure()
            self.reduce_expert_gradients()
            return loss

        self.traffic.count_step()
        return super().optimizer_step(optimizer, closure_with_all_gradients, model, **options)

    def reduce_expert_gradients(self) -> None:
        """Turns the experts' gradients, sums over the tokens of their expert group, into means over all devices."""
        world, pending = dist.get_world_size(), []
        for parameter in self.sharding.experts:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # one device would have taken a step with gradient 0
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(world)
            if self.groups.size < world:
                pending.append(dist.all_reduce(parameter.grad, group=self.groups.expert_data, async_op=True))
        for reduction in pending:
            reduction.wait()

    def metrics(self) -> dict[str, float]:
        """Communication since the last call, see `Traffic.read`."""
        return self.traffic.read()

    restore_checkpoint_after_setup = True  # into the parts that devices then hold
    lightning_restore_optimizer = True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole file, mapped: devices of one host share its memory."""
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the first device, nothing on the others."""
        state = self.lightning_module.state_dict(keep_vars=True)
        whole = {name: self.sharding.whole(value, value.detach()) for name, value in state.items()}
        return whole if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        targets = self.lightning_module.state_dict(keep_vars=True)
        parts = {
            name: self.sharding.part(targets[name], value) if name in targets else value
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(parts, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = _plain(optimizer).state_dict()
        state["state"] = _map_state(_plain(optimizer), state["state"], self.sharding.whole)
        return state if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            values = _map_state(_plain(optimizer), state["state"], self.sharding.part)
            _plain(optimizer).load_state_dict({**state, "state": values})


def _plain(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _map_state(
    optimizer: Optimizer, state: dict[int, dict[str, Any]], convert: Callable[[nn.Parameter, Tensor], Tensor | None]
) -> dict[int, dict[str, Any]]:
    """Converts every tensor that belongs to the elements of a parameter; steps and the like stay as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        index: {
            name: convert(parameters[index], value) if torch.is_tensor(value) and value.dim() else value
            for name, value in state[index].items()
        }
        for index in sorted(state)
    }
