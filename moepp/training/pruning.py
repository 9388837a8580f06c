"""Stops a run at a validation when whoever compares it with others says so."""

from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from moepp.records import RunRecord
from moepp.training.module import LanguageModel


class Pruner(Protocol):
    record: RunRecord

    def verdict(self, step: int, loss: float) -> str: ...


class Pruning(Callback):
    """Asks `pruner` after every validation. Rank 0 asks and writes the outcome, all ranks stop at the same step."""

    def __init__(self, pruner: Pruner):
        self.pruner, self.reason = pruner, ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.global_step >= trainer.max_steps:
            return
        loss = pl_module.validation_metrics()["loss"]  # on every rank, for it is a sum over all
        reason = self.pruner.verdict(trainer.global_step, loss) if trainer.is_global_zero else ""
        self.reason = trainer.strategy.broadcast(reason)
        if self.reason and trainer.is_global_zero:
            self.pruner.record.prune(trainer.global_step, self.reason)
        trainer.should_stop = trainer.should_stop or bool(self.reason)


def was_pruned(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, Pruning) and callback.reason for callback in trainer.callbacks)
