"""What is summed over the steps of training and cannot be read off its logged steps: slots that were dropped, by layer
and phase, and the loss of every batch of the first epoch before the model had seen it.

Shape suffixes: P phases (the first tenth of the steps, those between, the last tenth), L MoE layers.
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from moepp.training.module import LanguageModel
from moepp.training.recorded_trainer import within_step

PHASES = ("early", "middle", "late")
END_SHARE = 0.1  # of all steps: how long `early` and `late` last


def phase_of(step: int, steps: int) -> int:
    """The place in `PHASES` of a step, counted from 1."""
    end = math.ceil(END_SHARE * steps)
    return 0 if step <= end else 2 if step > steps - end else 1


class TrainingTotals(Callback):
    """Sums on the device, without a synchronisation; they are saved with every checkpoint that training resumes from.

    `steps` are those of the schedule, `epoch_steps` whole batches in which the model sees only new windows.
    """

    state_key = "TrainingTotals"

    def __init__(self, steps: int, epoch_steps: int | None = None):
        self.steps, self.epoch_steps = steps, epoch_steps
        self.slots_PL: Tensor | None = None  # None without MoE layers
        self.dropped_PL: Tensor | None = None
        self.nats: Tensor | None = None  # summed over micro-batches
        self.batches = 0
        self.resumed = False
        self.whole = True  # no step is missing, as it would be after a checkpoint without sums

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step + within_step(trainer)  # the one that this micro-batch is part of
        routing = pl_module.train_routing
        if len(routing.chosen_LN):
            self._count(phase_of(step, self.steps), routing.chosen_LN.sum(1), routing.dropped_L)
        if self.epoch_steps is None or step <= self.epoch_steps:
            loss = pl_module.train_losses["train/loss"].double()
            self.nats = loss if self.nats is None else self.nats + loss
            self.batches += 1

    def _count(self, phase: int, slots_L: Tensor, dropped_L: Tensor) -> None:
        if self.slots_PL is None:
            self.slots_PL = torch.zeros(len(PHASES), len(slots_L), dtype=torch.int64, device=slots_L.device)
            self.dropped_PL = torch.zeros_like(self.slots_PL)
        self.slots_PL[phase] += slots_L
        self.dropped_PL[phase] += dropped_L

    def metrics(self) -> dict[str, float]:
        """Of all devices: `online_loss`, and the share of slots dropped in training, in all, by phase and by layer. All
        ranks call it.
        """
        state = self.state_dict()
        if not self.whole:
            return {}
        found = {} if not state["batches"] else {"online_loss": float(state["nats"] / state["batches"])}
        if state["slots_PL"] is None:
            return found
        slots_PL, dropped_PL = state["slots_PL"], state["dropped_PL"]
        found["train_dropped_share"] = _share(dropped_PL, slots_PL)
        for phase in (0, 2):
            found[f"train_dropped_share_{PHASES[phase]}"] = _share(dropped_PL[phase], slots_PL[phase])
        for layer in range(slots_PL.shape[1]):
            found[f"train_dropped_share_layer_{layer + 1}"] = _share(dropped_PL[:, layer], slots_PL[:, layer])
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums over all ranks, which save together."""
        sums = {name: getattr(self, name) for name in ("slots_PL", "dropped_PL", "nats")}
        return {name: None if value is None else _summed(value) for name, value in sums.items()} | {
            "batches": self.batches * (dist.get_world_size() if dist.is_initialized() else 1),
            "whole": self.whole,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The saved sums are of all ranks, so that one of them goes on with these and the others from 0."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.resumed, self.whole = True, state_dict["whole"]
        for name in ("slots_PL", "dropped_PL", "nats", "batches"):
            value = state_dict[name]
            setattr(self, name, value if first or value is None else value * 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.whole = self.whole and (self.resumed or trainer.global_step == 0)
        for name in ("slots_PL", "dropped_PL", "nats"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(pl_module.device))


def _share(dropped: Tensor, slots: Tensor) -> float:
    return float(dropped.sum() / slots.sum().clamp(min=1))


def _summed(value: Tensor) -> Tensor:
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.cpu()
