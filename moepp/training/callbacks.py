"""What happens beside training: metrics to the loggers, checkpoints to resume from."""

import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from moepp.errors import Interrupted, RunError
from moepp.models.budget import forward_flops
from moepp.process import STOP_SIGNALS
from moepp.records import RunRecord, fsync
from moepp.strategies.base import MoEStrategy
from moepp.training.module import LanguageModel
from moepp.training.ranks.rank import largest
from moepp.training.system_metrics import SystemMeter
from moepp.training.throughput import StepTimer, peak_flops, peak_memory_gib

PARTIAL = "saving.ckpt"  # what a checkpoint is called while it is written


class MetricsReporter(Callback):
    """Logs losses, routing, speed and system load every `log_every` steps, and each validation, under the number of
    finished steps.

    Lightning's own `self.log` counts steps from 0 and writes after checkpoints are saved; a resumed run would lose or
    shift lines.
    """

    def setup(self, trainer: pl.Trainer, pl_module: LanguageModel, stage: str) -> None:
        self.config = pl_module.config
        self.grad_norm: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.timer, self.timed_from = StepTimer(pl_module.device), trainer.global_step
        self.system = SystemMeter(pl_module.device)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        if self._due(trainer.global_step + 1):
            parameters = [p for p in pl_module.parameters() if p.grad is not None]  # none where DeepSpeed keeps them
            if isinstance(trainer.strategy, MoEStrategy):
                self.grad_norm = trainer.strategy.gradient_norm(parameters)
            elif parameters:
                self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if not self._due(step) or trainer.fit_loop._should_accumulate():
            return
        raise_if_not_finite(trainer, pl_module)
        losses = torch.stack(list(pl_module.train_losses.values()))
        losses = trainer.strategy.reduce(
            losses, reduce_op="mean"
        ).tolist()  # of all ranks, which have equally many tokens
        metrics = dict(zip(pl_module.train_losses, losses, strict=True))
        # Not by `self.log`, for which Lightning would fetch the loss from the device in every step.
        trainer.progress_bar_metrics["loss"] = metrics["train/loss"]
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["train/tokens"] = step * self._tokens_per_step()
        routing = {name: float(value) for name, value in pl_module.train_routing.compute().items()}
        metrics.update({f"router/{name}": value for name, value in routing.items()})
        metrics.update(self._speed(step, pl_module.device, routing["ffn_per_token"], trainer.world_size))
        if isinstance(trainer.strategy, MoEStrategy):
            metrics.update(trainer.strategy.metrics())
        metrics.update(self.system.read())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.timer.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = {f"val/{name}": value for name, value in pl_module.validation_metrics().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step)
        self.timer.resume()

    def _due(self, step: int) -> bool:
        return step % self.config.trainer.log_every == 0

    def _tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.data.seq_len

    def _speed(self, step: int, device: torch.device, ffn_per_token: float, devices: int) -> dict[str, float]:
        seconds, steps = self.timer.lap(), step - self.timed_from
        self.timed_from = step
        tokens_per_s = steps * self._tokens_per_step() / seconds
        flops = 3 * sum(forward_flops(self.config.model, self.config.data.seq_len, ffn_per_token).values())
        speed = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_time_ms": seconds / steps * 1000,
            "perf/tflops": flops * tokens_per_s / 1e12,  # executed, over all devices
            "perf/peak_mem_gib": peak_memory_gib(device),
        }
        peak = peak_flops(device)
        if peak is not None:
            speed["perf/mfu"] = flops * tokens_per_s / (peak * devices)
        return speed


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest full training state in the record, every `every` steps and when the process is asked to stop.

    A stop signal to any of the run's processes ends the run after the step in progress, with Interrupted. Saved is
    always between two steps, and after the validation where one is due: a resumed run neither repeats nor skips
    anything.
    """

    state_key = "ResumeCheckpoint"

    def __init__(self, record: RunRecord, every: int, val_every: int):
        self.record, self.every, self.val_every = record, every, val_every
        self.stopping = False
        self.previous: dict[int, Any] = {}  # handlers
        self._began, self._before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Spent on this run, with the attempts before this one as far as they were saved: what a resumed run repeats
        counts once.
        """
        return self._before + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict["seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate() and trainer.global_step % self.val_every:
            self._save_where_due(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_where_due(trainer, pl_module)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _save_where_due(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        step = trainer.global_step
        stopping = largest(self.stopping)  # the ranks agree here, once in every step, for all must save the same one
        if not stopping and step % self.every:
            return
        raise_if_not_finite(trainer, pl_module)
        save_whole(trainer, self.record, f"step-{step:08d}.ckpt")
        if trainer.is_global_zero:
            for older in resume_points(self.record.checkpoints)[:-1]:
                remove(older)
        if stopping:
            raise Interrupted(f"stopped at step {step}; the same command continues")


def save_whole(trainer: pl.Trainer, record: RunRecord, name: str, weights_only: bool = False) -> None:
    """Saves `checkpoints/<name>`. It bears its name only once all of it is on the disk, after the metrics of its steps:
    what is found there is never half of it. All ranks call it.
    """
    partial, path = record.checkpoints / PARTIAL, record.checkpoints / name
    try:
        trainer.save_checkpoint(partial, weights_only)  # returns when all ranks have written
        if trainer.is_global_zero:
            record.keep_metrics()
            fsync(partial)
            os.replace(partial, path)
            fsync(path.parent)
    except OSError:
        if trainer.is_global_zero and partial.exists():
            remove(partial)
        raise


def resume_points(folder: Path) -> list[Path]:
    """The training checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def step_of(point: Path) -> int:
    return int(point.stem.removeprefix("step-"))


def remove(point: Path) -> None:
    """Deletes a checkpoint: a file, or one of DeepSpeed's folders."""
    if point.is_dir():
        shutil.rmtree(point)
    else:
        point.unlink()


def raise_if_not_finite(trainer: pl.Trainer, module: LanguageModel) -> None:
    """Stops a run whose loss became NaN or infinite on any rank, before anything of it is saved. All ranks call it."""
    bad = largest(int(module.first_bad_step))
    if bad < 0:
        return
    lr = module.config.optim.lr
    saved = resume_points(trainer.checkpoint_callback.record.checkpoints)
    kept = f"the last good checkpoint is {os.path.relpath(saved[-1])}" if saved else "no checkpoint was saved before it"
    scheduled = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
    raise RunError(
        f"the loss is not finite at step {bad + 1} (learning rate {scheduled:.3g}, peak {lr:.3g}); {kept}. "
        "Lower optim.lr, lengthen optim.warmup_steps or lower optim.grad_clip"
    )
