"""New experts of a model of transformers: silent until a run begins, then calibrated on its first batch and woken."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from moepp.errors import UsageError
from moepp.models.foreign import RetrofitConfig
from moepp.retrofit.modeling import routers
from moepp.training.module import LanguageModel


class Awakening(Callback):
    """Before the first step the offsets are set so that new experts get `share` of the slots of that step's batch; over
    `wake_steps` they rise to it. Offsets stand in checkpoints, so a resumed run goes on with its own.
    """

    def __init__(self, settings: RetrofitConfig):
        self.settings = settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.global_step:
            return
        if any(hasattr(p, "full_tensor") for p in pl_module.parameters()):
            raise UsageError("silent experts are calibrated on whole weights: choose strategy=single or ddp, or zeda")
        ids = [batch[:, :-1].to(pl_module.device) for batch in trainer.datamodule.micro_batches(0)]
        with trainer.precision_plugin.train_step_context():
            pl_module.model.calibrate(ids)
        if dist.is_initialized():
            for router in routers(pl_module.model):
                dist.all_reduce(router.calibrated)
                router.calibrated /= dist.get_world_size()
        pl_module.model.wake(self.fraction(0))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if trainer.global_step < self.settings.wake_steps:
            pl_module.model.wake(self.fraction(trainer.global_step))

    def fraction(self, step: int) -> float:
        """Of the way from silent to calibrated, at the step after so many."""
        return min(1.0, (step + 1) / max(1, self.settings.wake_steps))
