"""What happens beside training: metrics to the loggers, checkpoints to resume from."""

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from moepp.errors import Interrupted, RunError
from moepp.process import STOP_SIGNALS
from moepp.records import RunRecord
from moepp.strategies.base import MoEStrategy
from moepp.training.module import LanguageModel, is_logged
from moepp.training.ranks.rank import largest
from moepp.training.recorded_trainer import RecordedTrainer, within_step
from moepp.training.states import begin_saving, finish_saving, is_written, remove_state, state_name, states
from moepp.training.system_metrics import SystemMeter
from moepp.training.throughput import StepTimer, peak_flops, peak_memory_gib

LOGGED = ("train/loss", "train/balance_loss", "router/")  # by the module itself


class MetricsReporter(Callback):
    """Logs losses, routing, speed and system load every `log_every_n_steps` of the Trainer, and each validation.

    A RecordedTrainer writes them to its loggers at once, under the number of finished steps. Any other gets them by
    `self.log`, counts steps from 0 and writes after checkpoints are saved; a resumed run would lose or shift lines.
    `tokens_per_step` are those of all devices in one optimizer step, in sequences of `seq_len`.

    `perf/tflops` and `perf/mfu` (model FLOPs utilisation) count what the model needs, forward and backward: FFN slots
    that were computed, not those that capacity dropped. What is computed again is left out, as is the forward pass that
    counts a step's slots (`balance.over=step` with several micro-batches).
    """

    def __init__(self, tokens_per_step: int, seq_len: int):
        self.tokens_per_step, self.seq_len = tokens_per_step, seq_len
        self.grad_norm: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.timer, self.timed_from = StepTimer(pl_module.device), trainer.global_step
        self.system = SystemMeter(pl_module.device)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, optimizer: Any) -> None:
        if is_logged(trainer, trainer.global_step + 1):
            parameters = [p for p in pl_module.parameters() if p.grad is not None]
            if isinstance(trainer.strategy, MoEStrategy):
                self.grad_norm = trainer.strategy.gradient_norm(parameters)
            else:
                self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        step = trainer.global_step
        if not is_logged(trainer, step) or within_step(trainer):
            return
        raise_if_not_finite(trainer, pl_module)
        losses = pl_module.mean_losses()
        values = trainer.strategy.reduce(
            torch.stack(list(losses.values())), reduce_op="mean"
        ).tolist()  # of all ranks, which have equally many tokens
        metrics = dict(zip(losses, values, strict=True))
        # Not by `self.log`, for which Lightning would fetch the loss from the device in every step.
        trainer.progress_bar_metrics["loss"] = metrics["train/loss"]
        if self.grad_norm is not None:
            metrics["train/grad_norm"] = float(self.grad_norm)
        metrics["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["train/tokens"] = step * self.tokens_per_step
        routing = {name: float(value) for name, value in pl_module.train_routing.compute().items()}
        metrics.update({f"router/{name}": value for name, value in routing.items()})
        computed = routing["ffn_per_token"] * (1 - routing.get("dropped_ffn_share", 0.0))
        flops = 3 * sum(pl_module.model.forward_flops(self.seq_len, computed).values())
        metrics.update(self._speed(step, pl_module.device, flops, trainer.world_size))
        if isinstance(trainer.strategy, MoEStrategy):
            metrics.update(trainer.strategy.metrics())
        metrics.update(self.system.read())
        if isinstance(trainer, RecordedTrainer):
            trainer.write(metrics)
        else:
            pl_module.log_dict({name: value for name, value in metrics.items() if not name.startswith(LOGGED)})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.timer.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if isinstance(trainer, RecordedTrainer):
            trainer.write({f"val/{name}": value for name, value in pl_module.validation_metrics().items()})
        self.timer.resume()

    def _speed(self, step: int, device: torch.device, flops: float, devices: int) -> dict[str, float]:
        """`flops` of a token, forward and backward."""
        seconds, steps = self.timer.lap(), step - self.timed_from
        self.timed_from = step
        tokens_per_s = steps * self.tokens_per_step / seconds
        speed = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/step_time_ms": seconds / steps * 1000,
            "perf/tflops": flops * tokens_per_s / 1e12,  # over all devices
            "perf/peak_mem_gib": peak_memory_gib(device),
        }
        peak = peak_flops(device)
        if peak is not None:
            speed["perf/mfu"] = flops * tokens_per_s / (peak * devices)
        return speed


class CollectTogether(Callback):
    """Python's garbage collector every so many steps, in all processes at once: a process that stops by itself for it
    makes all others wait.
    """

    def __init__(self, every: int):
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        gc.disable()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if not within_step(trainer) and trainer.global_step % self.every == 0:
            gc.collect()

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        gc.enable()

    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        gc.enable()


class ResumeCheckpoint(Checkpoint):
    """Keeps the two newest full training states in the record, for a disk may damage one: every `every` steps and when
    the process is asked to stop.

    A stop signal to any of the run's processes ends the run after the step in progress, with Interrupted. Saved is
    always between two steps, and after the validation where one is due: a resumed run neither repeats nor skips
    anything.
    """

    state_key = "ResumeCheckpoint"

    def __init__(self, record: RunRecord, every: int, val_every: int, keep_at: Collection[int] = ()):
        self.record, self.every, self.val_every, self.keep_at = record, every, val_every, keep_at
        self.stopping = False
        self.saved = ""  # the state that is on its way to the disk
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
        self._finish(trainer)
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._restore()

    def _finish(self, trainer: pl.Trainer) -> None:
        """Names the state that was saved last, and removes all others but one."""
        if self.saved:
            finish_saving(trainer, self.record, self.saved)
            self.saved = ""
            if trainer.is_global_zero:
                for older in states(self.record.checkpoints, but=self.keep_at)[:-2]:
                    remove_state(older)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if not within_step(trainer) and trainer.global_step % self.val_every:
            self._save_where_due(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_where_due(trainer, pl_module)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _save_where_due(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        step = trainer.global_step
        if trainer.is_global_zero and is_written(trainer):
            self._finish(trainer)
        stopping = largest(self.stopping)  # the ranks agree here, once in every step, for all must save the same one
        if trainer.should_stop or (not stopping and step % self.every and step not in self.keep_at):
            return  # a run that is continued comes to the same end by itself
        raise_if_not_finite(trainer, pl_module)
        self._finish(trainer)
        begin_saving(trainer, self.record)
        self.saved = state_name(step)
        if stopping or is_written(trainer):
            self._finish(trainer)
        if stopping:
            raise Interrupted(f"stopped at step {step}; the same command continues")


def raise_if_not_finite(trainer: pl.Trainer, module: LanguageModel) -> None:
    """Stops a run whose loss became NaN or infinite on any rank, before anything of it is saved. All ranks call it."""
    bad = largest(int(module.first_bad_step))
    if bad < 0:
        return
    lr = module.optim.lr
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ResumeCheckpoint)]
    saved = [point for keeper in keepers for point in states(keeper.record.checkpoints)]
    kept = f"the last good checkpoint is {os.path.relpath(saved[-1])}" if saved else "no checkpoint was saved before it"
    scheduled = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
    raise RunError(
        f"the loss is not finite at step {bad + 1} (learning rate {scheduled:.3g}, peak {lr:.3g}); {kept}. "
        f"{likely_cause(module, bad)}"
    )


def likely_cause(module: LanguageModel, bad: int) -> str:
    """What to change: a rate has done nothing yet before the first update."""
    losses = {name: bool(loss.isfinite()) for name, loss in module.mean_losses().items()}
    if bad == 0:
        weights = [name for name, weight in module.model.named_parameters() if not weight.isfinite().all()]
        if weights:
            return f"No update was made yet, and {weights[0]} is not finite: see model.init_std and init_from"
        return "No update was made yet: see model.init_std, model.norm_eps, model.logits_norm and model.rope_theta"
    if losses.get("train/loss") and not losses.get("train/balance_loss", True):
        return "The cross-entropy is finite, the balance loss is not: lower model.balance.beta or its other weights"
    return "Lower optim.lr, lengthen optim.warmup_steps or lower optim.grad_clip"
