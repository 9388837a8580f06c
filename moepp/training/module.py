"""The LightningModule: next-token cross-entropy plus the balance loss, and validation that is exact over devices."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric

from moepp.errors import UsageError
from moepp.layers.moe import MoEStats
from moepp.layers.others import without_trace
from moepp.models.build import build_model, describe_model
from moepp.models.decoder import InitialState
from moepp.models.protocol import CausalLM
from moepp.training.batch import TokenBatch, read_batch
from moepp.training.compiled import losses_of
from moepp.training.loss import LossFunction, training_losses
from moepp.training.optim import build_optimizer, learning_rate_scale
from moepp.training.recorded_trainer import within_step
from moepp.training.routing_stats import RoutingStatistics
from moepp.training.settings import OptimConfig, RunConfig


class BitsPerByte(Metric):
    """Total nats over total UTF-8 bytes of the predicted text, in bits. Targets that stand for no text (end-of-text)
    are left out.
    """

    def __init__(self, end_of_text: int | None):
        super().__init__()
        self.end_of_text = end_of_text
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, targets: Tensor, lengths: Tensor) -> None:
        """`nats` of every target, the target ids, and the bytes each target stands for; all [B, S]."""
        no_text = -1 if self.end_of_text is None else self.end_of_text
        self.nats += nats.double().masked_fill(targets == no_text, 0).sum()
        self.bytes += lengths.sum()

    def compute(self) -> Tensor:
        return self.nats / self.bytes / math.log(2)


class LanguageModel(pl.LightningModule):
    """Trains a model on token ids, by any Lightning Trainer.

    `model` is a `CausalLM`, or the description of one that a checkpoint holds. A batch is ids [B, S+1], each predicted
    from those before it; or a pair of these and the UTF-8 bytes [B, S] that each target stands for, which validation
    reads; or a mapping as transformers' collators make: the ids as `input_ids`, and with them, if need be, `labels` of
    the same shape, not shifted, which are predicted in their place (-100: not at all), and an `attention_mask` of ones.
    Padding and other keys are refused in one line.

    The schedule has `steps` optimizer steps, None: as many as the trainer takes. `end_of_text` is the id that separates
    documents, None: no id does. `losses` may be a compiled form of `training_losses`, with `cuda_graphs` one whose
    replays write where those before did; labels are its third argument where a batch has some.

    Logs train/loss, train/balance_loss, router/*, each of all micro-batches of a step, and val/loss, val/accuracy,
    val/bits_per_byte (where bytes are known), val/divergence (of a model that has another beside it); these four as
    test/* of `Trainer.test`. `Trainer.predict` gives the logits [B, S+1, V] of each batch.
    """

    def __init__(
        self,
        model: CausalLM | Mapping[str, Any],
        optim: OptimConfig | Mapping[str, Any] | None = None,
        steps: int | None = None,
        end_of_text: int | None = None,
        losses: LossFunction = training_losses,
        cuda_graphs: bool = False,
    ):
        super().__init__()
        self.model = build_model(model) if isinstance(model, Mapping) else model
        self.optim = OptimConfig(**optim) if isinstance(optim, Mapping) else optim or OptimConfig()
        self.steps, self.losses, self.cuda_graphs = steps, losses, cuda_graphs
        parts = {"optim": asdict(self.optim), "steps": steps, "end_of_text": end_of_text}
        self.save_hyperparameters(describe_model(self.model) | parts)
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()
        self.val_bits_per_byte = BitsPerByte(end_of_text)
        self.val_divergence = MeanMetric()
        self.val_window_nats = CatMetric(nan_strategy="disable")  # means of windows, in the order of their batches
        self.val_routing = RoutingStatistics(self.model.config)
        self.train_losses: dict[str, Tensor] = {}  # of the last micro-batch
        # Of the last step only, so that a resumed run logs the same: of its micro-batches so far.
        self.train_routing = RoutingStatistics(self.model.config)
        self.step_losses: dict[str, Tensor] = {}  # summed
        self.step_parts = 0
        # Counts of the micro-batches since the last optimizer step. Checkpoints are saved right after a step, where
        # there are none, so these need no buffer.
        self.step_chosen_LN: Tensor | None = None
        self.step_tokens = 0
        self.validated_step = -1  # finished steps at the last validation
        # Step of the first loss that was not finite, -1 while there is none; kept on the device, so that watching costs
        # no synchronisation.
        self.first_bad_step: Tensor
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)

    @classmethod
    def of_run(cls, config: RunConfig, end_of_text: int) -> "LanguageModel":
        """As `config` says. Its checkpoints hold all of the config, as plain values."""
        trainer, divided = config.trainer, config.strategy.divides_weights and config.model.name == "decoder"
        with torch.device("meta") if divided else nullcontext():
            model = build_model(config.model, None if divided else config.seed)
        if divided and model.has_buffers_of_others:  # which are set where they are built
            divided, model = False, build_model(config.model, config.seed)
        module = cls(model, config.optim, trainer.steps, end_of_text, losses_of(config), trainer.cuda_graphs)
        if divided:
            module.begin_with(InitialState(model, config.seed))
        module.save_hyperparameters({"config": asdict(config)})
        return module

    @property
    def lr(self) -> float:
        """`optim.lr`, by the name under which Lightning's learning rate finder looks for it and sets it."""
        return self.optim.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.optim = replace(self.optim, lr=float(value))
        self.hparams["optim"] = asdict(self.optim)
        for schedule in self._trainer.lr_scheduler_configs if self._trainer else ():  # which begin with the old one
            schedule.scheduler.base_lrs = [self.optim.lr for _ in schedule.scheduler.base_lrs]

    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Sets the model's state; that of a model on the meta device is left to the strategy, which divides it."""
        if any(parameter.is_meta for parameter in self.model.parameters()):
            self.initial = {"model": state}
        else:
            self.model.load_state_dict(state)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Where a step has several micro-batches, the balance loss of each needs the counts of all (`balance.over`)."""
        parts, balance = self.trainer.accumulate_grad_batches, self.model.config.balance
        if batch_idx % parts:
            return
        self.train_routing.reset()
        self.step_losses, self.step_parts = {}, 0
        if parts > 1 and balance.over == "step" and balance.beta:
            self._count_step(self._micro_batches())

    def _micro_batches(self) -> list[Tensor]:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "micro_batches"):
            raise UsageError(
                f"balance.over=step with accumulate_grad_batches={self.trainer.accumulate_grad_batches} needs a data"
                " module with micro_batches(step), such as TokenDataModule; or set balance.over=global_batch"
            )
        return data.micro_batches(self.global_step)

    def _count_step(self, batches: list[Tensor]) -> None:
        """Hands every MoE layer the step's counts, from a forward pass of its micro-batches without gradients: they
        need memory for one at a time, and the routers do not change before the update. What a pass writes into buffers
        counts for nothing: the step's own passes write it again.
        """
        layers = self._counted_layers()
        if not layers:
            return
        chosen, state = [], dict(self.model.named_buffers())
        with torch.no_grad(), self.trainer.precision_plugin.train_step_context():
            for ids in batches:
                ids = ids.to(self.device, non_blocking=True)
                stats = without_trace(self.model, state, ids[:, :-1], targets_BS=ids[:, 1:]).stats
                chosen.append([layer.chosen_N for layer in stats])
        tokens = len(stats[0].logits_TN) * len(batches) * self.trainer.world_size
        for layer, counts in zip(layers, zip(*chosen, strict=True), strict=True):
            count_N = torch.stack(counts).sum(0)
            if dist.is_initialized():
                dist.all_reduce(count_N)
            layer.step_counts = (count_N, tokens)

    def on_train_end(self) -> None:
        self._forget_step()

    def _forget_step(self) -> None:
        for layer in self._counted_layers():
            layer.step_counts = None
        self.step_chosen_LN, self.step_tokens = None, 0

    def _counted_layers(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if hasattr(module, "step_counts")]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_logged(self.trainer, self.global_step) and not within_step(self.trainer):
            self.log_dict({f"router/{name}": value for name, value in self.train_routing.compute().items()})

    def on_train_start(self) -> None:
        """Without the counts that a fit which was interrupted in a step has left. With CUDA graphs gradients are summed
        into buffers of their own: else the first would lie where replays write.
        """
        self._forget_step()
        if self.cuda_graphs:
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.cuda_graphs)

    def training_step(self, batch: Any) -> Tensor:
        """Returns cross-entropy + beta * L_b (Eq. 9)."""
        read = self._read(batch)
        asked = (read.ids,) if read.labels is None else (read.ids, read.labels)
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # replays overwrite what the step before put out
        cross_entropy, balance, output = self.losses(self.model, *asked)
        loss = cross_entropy + balance
        losses = {"train/loss": cross_entropy, "train/balance_loss": balance}
        self.train_losses = {name: value.detach().clone() for name, value in losses.items()}
        self._add_to_step(output.stats)
        self.log_dict(self.mean_losses())
        self._count(output.stats)
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.global_step, self.first_bad_step)
        return loss

    def _add_to_step(self, stats: list[MoEStats]) -> None:
        """Sums on the device: nothing here waits for it."""
        before = self.step_losses or dict.fromkeys(self.train_losses, 0)
        self.step_losses = {name: before[name] + loss for name, loss in self.train_losses.items()}
        self.step_parts += 1
        self.train_routing.update(stats)

    def mean_losses(self) -> dict[str, Tensor]:
        """Those of the step, as far as it came: its gradient is that of the mean over its micro-batches."""
        return {name: total / self.step_parts for name, total in self.step_losses.items()}

    def _count(self, stats: list[MoEStats]) -> None:
        """Adds a micro-batch to the counts of its step: here and not in the layers, which activation checkpointing runs
        twice.
        """
        if self.model.config.balance.control is None or not stats:
            return
        chosen_LN = torch.stack([layer.chosen_N for layer in stats])
        self.step_chosen_LN = chosen_LN if self.step_chosen_LN is None else self.step_chosen_LN + chosen_LN
        self.step_tokens += len(stats[0].logits_TN)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer, optimizer_closure: Callable[[], Any]
    ) -> None:
        """The update, which runs the step's last micro-batch first, then that of the layers' control. Raises UsageError
        where the optimizer, somebody's own, does not run it.
        """
        ran = False

        def closure() -> Any:
            nonlocal ran
            ran = True
            return optimizer_closure()

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if not ran:
            raise UsageError(
                f"{type(self.trainer.optimizers[0]).__name__} has a step() that does not call its closure, which "
                "computes the loss and its gradients"
            )
        if self.step_chosen_LN is not None:
            if dist.is_initialized():  # without the barrier of Lightning's `reduce`
                dist.all_reduce(self.step_chosen_LN)
            self.model.step_control(self.step_chosen_LN, self.step_tokens * self.trainer.world_size)
            self.step_chosen_LN, self.step_tokens = None, 0

    def validation_step(self, batch: Any) -> None:
        read = self._read(batch)
        targets, counted = (read.ids[:, 1:], ...) if read.labels is None else read.counted_labels()
        output = self.model(read.ids[:, :-1], targets_BS=targets)
        self.val_loss.update(output.nats_BS[counted])
        if read.labels is None:
            self.val_window_nats.update(output.nats_BS.mean(1))
        self.val_accuracy.update(output.right_BS.float()[counted])
        if read.lengths is not None:
            self.val_bits_per_byte.update(output.nats_BS, targets, read.lengths)
        if output.divergence is not None:
            self.val_divergence.update(output.divergence, weight=len(read.ids))
        self.val_routing.update(output.stats)

    def _read(self, batch: Any) -> TokenBatch:
        read, retrofit = read_batch(batch), getattr(self.model.config, "retrofit", None)
        if read.labels is not None and retrofit is not None and retrofit.loss != "cross_entropy":
            raise UsageError(
                f"a batch's labels are not its input_ids, and model.retrofit.loss={retrofit.loss} learns no labels:"
                " leave them out"
            )
        return read

    def test_step(self, batch: Any) -> None:
        self.validation_step(batch)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of what follows each id."""
        return self.model(ids_BS).logits

    def predict_step(self, batch: Any) -> Tensor:
        return self(read_batch(batch).ids)

    def on_validation_epoch_start(self) -> None:
        for metric in (
            self.val_loss, self.val_accuracy, self.val_bits_per_byte, self.val_divergence, self.val_window_nats,
            self.val_routing,
        ):  # fmt: skip
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.trainer.global_step
        self.log_dict({f"val/{name}": value for name, value in self.validation_metrics().items()})

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.validation_metrics().items()})

    def validation_metrics(self) -> dict[str, float]:
        """`loss`, `bits_per_byte`, `divergence`, `accuracy` of the last validation."""
        metrics = {"loss": float(self.val_loss.compute())}
        if self.val_bits_per_byte.update_called:
            metrics["bits_per_byte"] = float(self.val_bits_per_byte.compute())
        if self.val_divergence.update_called:
            metrics["divergence"] = float(self.val_divergence.compute())
        return metrics | {"accuracy": float(self.val_accuracy.compute())}

    def configure_optimizers(self) -> dict[str, Any]:
        steps = self.steps or _whole(self.trainer.estimated_stepping_batches)
        optimizer = build_optimizer(self, self.optim)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_scale(step, steps, self.optim)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def is_logged(trainer: pl.Trainer, step: int) -> bool:
    """Whether metrics of the step, counted from 1, are wanted."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def _whole(steps: float) -> int:
    if not 0 <= steps < math.inf:  # -1 over a loader without a length
        raise UsageError(
            "the learning rate's schedule has no end where the Trainer has none: give LanguageModel(..., steps=N), or"
            " the Trainer max_steps, or max_epochs over a loader that has a length"
        )
    return int(steps)
