"""The bar of a run on the terminal: steps, time left, loss, bits per byte, tokens/s; batches of a validation."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SHOWN = {
    "loss": ("train/loss", ".3f"),
    "bits/byte": ("val/bits_per_byte", ".3f"),
    "tokens/s": ("perf/tokens_per_s", ",.0f"),
}
FORM = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
SECONDS = 1.0  # between two looks at a validation


class StepBar(ProgressBar):
    """Counts optimizer steps; the newest loss, validation and speed stand behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = True

    def disable(self) -> None:
        self.shown = False

    def enable(self) -> None:
        self.shown = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar = self._open("step", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # to read a metric is to wait for the device
            self._say(trainer.callback_metrics)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":  # after training: the bar of the steps is closed
            self.bar = self._open("validating", trainer.num_val_batches[0])

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "validate":
            self.bar.update()
        elif self.shown and time.time() - self.bar.last_print_t > SECONDS:
            self.bar.set_description_str(f"validating {batch_idx + 1}/{trainer.num_val_batches[0]}, step")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.bar.close()
        else:
            self.bar.set_description_str("step", refresh=False)

    def on_train_end(self, *_: Any) -> None:
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        if hasattr(self, "bar"):
            self.bar.close()

    def _open(self, what: str, total: int, done: int = 0) -> tqdm:
        return tqdm(
            desc=what, total=total, initial=done, bar_format=FORM, dynamic_ncols=True, file=sys.stderr,
            disable=not self.shown,
        )  # fmt: skip

    def _say(self, known: Mapping[str, Any]) -> None:
        said = {name: format(float(known[key]), form) for name, (key, form) in SHOWN.items() if key in known}
        self.bar.set_postfix(said, refresh=False)
