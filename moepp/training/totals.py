"""What is summed over the steps of training and cannot be read off its logged steps: slots that were dropped, by layer
and by step, and the loss of every batch of the first epoch before the model had seen it.

Shape suffixes: C counts (slots, and those of them that were dropped), S steps, L MoE layers.
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from moepp.training.module import LanguageModel
from moepp.training.recorded_trainer import within_step

SUMS = ("by_step_CS", "by_layer_CL", "nats")
END_SHARE = 0.1  # of all steps: how long `early` and `late` last


def phases(steps: int) -> dict[str, slice]:
    """The first and the last tenth of the steps, counted from 0."""
    end = math.ceil(END_SHARE * steps)
    return {"early": slice(0, end), "late": slice(steps - end, steps)}


class TrainingTotals(Callback):
    """Sums on the device, without a synchronisation; they are saved with every checkpoint that training resumes from.
    Drops are kept by step: in a run that branches off from one of another length, phases lie elsewhere.

    `steps` are those of the schedule, `epoch_steps` whole batches in which the model sees only new windows.
    """

    state_key = "TrainingTotals by step"

    def __init__(self, steps: int, epoch_steps: int | None = None):
        self.steps, self.epoch_steps = steps, epoch_steps
        self.by_step_CS: Tensor | None = None  # of all layers, with room for steps to come; None without MoE layers
        self.by_layer_CL: Tensor | None = None
        self.nats: Tensor | None = None  # summed over micro-batches
        self.batches = 0
        self.resumed = False
        self.whole = True  # no step is missing, as it would be after a checkpoint without sums

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step + within_step(trainer)  # the one that this micro-batch is part of
        routing = pl_module.train_routing  # of the whole step, at its last micro-batch
        if len(routing.chosen_LN) and not within_step(trainer):
            self._count(step, torch.stack([routing.chosen_LN.sum(1), routing.dropped_L]))
        if self.epoch_steps is None or step <= self.epoch_steps:
            loss = pl_module.train_losses["train/loss"].double()
            self.nats = loss if self.nats is None else self.nats + loss
            self.batches += 1

    def _count(self, step: int, counts_CL: Tensor) -> None:
        if self.by_step_CS is None:
            self.by_layer_CL = torch.zeros_like(counts_CL)
            self.by_step_CS = counts_CL.new_zeros(len(counts_CL), 1)
        if step > self.by_step_CS.shape[1]:
            self.by_step_CS = F.pad(self.by_step_CS, (0, step))  # doubled, so that this is rare
        self.by_layer_CL += counts_CL
        self.by_step_CS[:, step - 1] += counts_CL.sum(1)

    def metrics(self) -> dict[str, float]:
        """Of all devices: `online_loss`, and the share of slots dropped in training, in all, by phase and by layer. A
        phase that a run ended before is left out. All ranks call it.
        """
        state = self.state_dict()
        if not self.whole:
            return {}
        found = {} if not state["batches"] else {"online_loss": float(state["nats"] / state["batches"])}
        if state["by_step_CS"] is None:
            return found
        counts = {"": state["by_step_CS"].sum(1)}
        counts |= {f"_{name}": state["by_step_CS"][:, steps].sum(1) for name, steps in phases(self.steps).items()}
        counts |= {f"_layer_{layer}": counts_C for layer, counts_C in enumerate(state["by_layer_CL"].T, 1)}
        return found | {
            f"train_dropped_share{of}": float(dropped / slots) for of, (slots, dropped) in counts.items() if slots
        }

    def state_dict(self) -> dict[str, Any]:
        """The sums over all ranks, which save together."""
        sums = {name: getattr(self, name) for name in SUMS}
        return {name: None if value is None else _summed(value) for name, value in sums.items()} | {
            "batches": self.batches * (dist.get_world_size() if dist.is_initialized() else 1),
            "whole": self.whole,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The saved sums are of all ranks, so that one of them goes on with these and the others from 0."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.resumed, self.whole = True, state_dict["whole"]
        for name in (*SUMS, "batches"):
            value = state_dict[name]
            setattr(self, name, value if first or value is None else value * 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.whole = self.whole and (self.resumed or trainer.global_step == 0)
        for name in SUMS:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(pl_module.device))


def _summed(value: Tensor) -> Tensor:
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.cpu()
