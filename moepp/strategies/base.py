"""What all strategies for MoE++ share, as a mixin for those of Lightning: gradients, clipping and checkpoints of one
device.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from moepp.errors import UsageError
from moepp.models import checkpoint_parts as parts
from moepp.strategies.dispatch import AllToAllDispatcher, SharedBatchDispatcher
from moepp.strategies.groups import CopyGroups
from moepp.strategies.sharding import Sharding, broadcast_first, expert_banks, local, slice_experts
from moepp.strategies.traffic import Traffic

AVERAGING = (StochasticWeightAveraging, WeightAveraging)  # and EMAWeightAveraging, one of the latter


class MoEStrategy:
    """Mixed into a Lightning strategy that starts one process per device, each with its own part of every batch.

    `expert_parallel_size` consecutive devices hold one copy of the FFN experts between them; 0: all devices; None:
    every device holds them all. The batch's statistics (load-balance loss, capacity, control) are those of all devices.
    With `checkpoints_in_parts` every device writes its own part of a checkpoint, in the background
    (checkpoint_parts.py).
    """

    def __init__(
        self,
        expert_parallel_size: int | None,
        timeout_s: float,
        checkpoints_in_parts: bool = False,
        **options: Any,
    ):
        if options.get("start_method", "popen") != "popen":
            raise UsageError(
                f"{type(self).__name__} cannot start processes by {options['start_method']}, which hands weights back "
                "from a device that holds a part of them; start a script"
            )
        super().__init__(timeout=timedelta(seconds=timeout_s), **options)
        self.expert_parallel_size = expert_parallel_size
        self.groups: CopyGroups | None = None
        self.sharding: Sharding | None = None
        self.traffic = Traffic()
        self.checkpoints_in_parts = checkpoints_in_parts
        self.saving: Future | None = None  # of the newest checkpoint in parts
        self.loaded_from: Path | None = None  # the folder of parts whose tensors are to be read
        self.host_group: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.host_group is None:  # for checkpoints in parts, whose writing may go on beside all else
            self.host_group = dist.new_group(backend="gloo", timeout=self._timeout)
        if self.expert_parallel_size is not None and self.groups is None:
            self.groups = CopyGroups.create(self.expert_parallel_size, self._timeout)

    def teardown(self) -> None:
        self.finish_saving()
        super().teardown()

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
        return self.groups.within

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
        """After a step's last backward pass: makes means over all devices of the gradients of divided experts."""

    def metrics(self) -> dict[str, float]:
        """Communication since the last call, see `Traffic.read`."""
        return self.traffic.read()

    def take_parts(self, module: nn.Module) -> None:
        """Knows from here on how the module lies over devices. Parameters on the meta device get memory, and their
        parts of the module's `initial` state (by child), of which one whole tensor exists at a time: no device ever
        holds the model.
        """
        absent = [child for child in module.children() if any(p.is_meta for p in child.parameters())]
        for child in absent:
            child.to_empty(device=self.root_device)
        self.sharding = Sharding(module, self.groups, self.root_device)
        self._refuse_averages(module)
        if absent:
            self._load((f"{of}.{name}", value) for of, state in module.initial.items() for name, value in state.items())

    def _refuse_averages(self, module: nn.Module) -> None:
        """Lightning's callbacks copy the module before it is divided, and fail when they first meet its parts."""
        averaging = [c for c in self.lightning_module.trainer.callbacks if isinstance(c, AVERAGING)]
        if averaging and any(self.sharding.is_sharded(parameter) for parameter in module.parameters()):
            raise UsageError(
                f"{type(averaging[0]).__name__} averages whole weights, and {type(self).__name__} divides them: leave"
                " it out, or choose strategy=moe_ddp"
            )

    restore_checkpoint_after_setup = True  # into the parts that devices then hold
    lightning_restore_optimizer = True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """In parts it returns when `checkpoint` may change, and `saving` is done when this device's part is written."""
        if not self.checkpoints_in_parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        self.finish_saving()
        self.saving = parts.save_parts(Path(filepath), checkpoint, self.host_group)

    def finish_saving(self) -> None:
        """Waits until this device's part of the newest checkpoint is written. Raises what went wrong."""
        if self.saving is not None:
            parts.wait_for(self.saving)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The whole file, mapped: devices of one host share its memory. Of a folder of parts all but the tensors, which
        are read where they belong.
        """
        self.loaded_from = Path(checkpoint_path) if Path(checkpoint_path).is_dir() else None
        if self.loaded_from is not None:
            return parts.read_rest(self.loaded_from)
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the first device, nothing on the others; for a checkpoint in parts what each holds."""
        state = self.lightning_module.state_dict(keep_vars=True)
        if self.checkpoints_in_parts:
            return {name: self.sharding.spread(value, value.detach()) for name, value in state.items()}
        whole = {name: self.sharding.whole(value, value.detach()) for name, value in state.items()}
        return whole if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self.loaded_from is not None:
            targets = self.lightning_module.state_dict(keep_vars=True)
            spread = {name: self.sharding.spread(value, value.detach()) for name, value in targets.items()}
            parts.read_into(self.loaded_from, parts.named_tensors({"state_dict": spread}), self.host_group)
        else:
            self._load(checkpoint["state_dict"].items(), strict)

    def _load(self, state: Iterable[tuple[str, Tensor]], strict: bool = True) -> None:
        """This device's parts of whole tensors, which are read one at a time."""
        targets = self.lightning_module.state_dict(keep_vars=True)
        values = {name: self.sharding.part(targets[name], v) if name in targets else v for name, v in state}
        self.lightning_module.load_state_dict(values, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = _plain(optimizer).state_dict()
        convert = self.sharding.spread if self.checkpoints_in_parts else self.sharding.whole
        state["state"] = _map_state(_plain(optimizer), state["state"], convert)
        return state if self.checkpoints_in_parts or self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self.loaded_from is not None:
            checkpoint = self._optimizer_states_in_parts(checkpoint)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            values = state["state"]
            if self.loaded_from is None:
                values = _map_state(_plain(optimizer), values, self.sharding.part)
            _plain(optimizer).load_state_dict({**state, "state": values})

    def _optimizer_states_in_parts(self, rest: Mapping[str, Any]) -> dict[str, Any]:
        """As the folder holds them, in the parts of this device."""
        parameters = [_parameters(_plain(optimizer)) for optimizer in self.optimizers]
        owners = {
            name: parameters[int(number)][int(index)]
            for name in parts.stored_tensors(self.loaded_from, "optimizer.")
            for _, number, index, _ in [name.split(".", 3)]
        }
        empty = {name: torch.empty_like(owner.detach()) for name, owner in owners.items()}
        spread = {name: self.sharding.spread(owners[name], value) for name, value in empty.items()}
        parts.read_into(self.loaded_from, spread, self.host_group)
        return parts.joined(rest, empty)


def _plain(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """In the order in which its state numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _map_state(
    optimizer: Optimizer, state: dict[int, dict[str, Any]], convert: Callable[[nn.Parameter, Tensor], Tensor | None]
) -> dict[int, dict[str, Any]]:
    """Converts every tensor that belongs to the elements of a parameter; steps and the like stay as they are."""
    parameters = _parameters(optimizer)
    return {
        index: {
            name: convert(parameters[index], value) if torch.is_tensor(value) and value.dim() else value
            for name, value in state[index].items()
        }
        for index in sorted(state)
    }
