"""New experts of a model of transformers: silent until a run begins, then calibrated on its first batch and woken."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback

from moepp.models.foreign import RetrofitConfig
from moepp.training.module import LanguageModel
from moepp.training.recorded_trainer import within_step


class Awakening(Callback):
    """Before the first step the offsets are set so that new experts get `share` of the slots of that step's batch, and
    the model is validated, untrained as it is; over `wake_steps` the offsets rise to what was set. Set anew every
    `recalibrate_every` steps they hold the share. They stand in checkpoints, so a resumed run goes on with its own.
    """

    def __init__(self, settings: RetrofitConfig):
        self.settings = settings

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.global_step:
            return
        self.calibrate(trainer, pl_module)
        self.validate(trainer, pl_module)
        pl_module.model.wake(self.fraction(0))

    def calibrate(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """On the batch of the step to come, of which each device has a part."""
        ids = [batch[:, :-1].to(pl_module.device) for batch in trainer.datamodule.micro_batches(trainer.global_step)]
        with trainer.precision_plugin.train_step_context():
            pl_module.model.calibrate(ids)

    @torch.no_grad()
    def validate(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        """Awake and untrained: the record's validation at step 0, router/ffn_share on the same text beside it."""
        pl_module.model.wake(1.0)
        pl_module.eval()
        pl_module.on_validation_epoch_start()
        with trainer.precision_plugin.val_step_context():
            for batch in trainer.datamodule.val_dataloader():
                pl_module.validation_step(move_data_to_device(batch, pl_module.device))
        pl_module.train()
        found = {f"val/{name}": value for name, value in pl_module.validation_metrics().items()}
        trainer.write(found | {"router/ffn_share": float(pl_module.val_routing.compute()["ffn_share"])})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if trainer.global_step < self.settings.wake_steps:
            pl_module.model.wake(self.fraction(trainer.global_step))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        every, step = self.settings.recalibrate_every, trainer.global_step
        if every and step % every == 0 and not within_step(trainer):
            self.calibrate(trainer, pl_module)
            pl_module.model.wake(self.fraction(step))

    def fraction(self, step: int) -> float:
        """Of the way from silent to calibrated, at the step after so many."""
        return min(1.0, (step + 1) / max(1, self.settings.wake_steps))
