"""The LightningModule: next-token cross-entropy plus the balance loss, and validation that is exact over devices."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from moepp.layers.moe import MoEStats
from moepp.models.decoder import Decoder
from moepp.training.compiled import losses_of
from moepp.training.optim import build_optimizer, learning_rate_scale
from moepp.training.routing_stats import RoutingStatistics
from moepp.training.settings import RunConfig


class BitsPerByte(Metric):
    """Total nats over total UTF-8 bytes of the predicted text, in bits. Targets that stand for no text (end-of-text)
    are left out.
    """

    def __init__(self, end_of_text: int):
        super().__init__()
        self.end_of_text = end_of_text
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, targets: Tensor, lengths: Tensor) -> None:
        """`nats` of every target, the target ids, and the bytes each target stands for; all [B, S]."""
        self.nats += nats.double().masked_fill(targets == self.end_of_text, 0).sum()
        self.bytes += lengths.sum()

    def compute(self) -> Tensor:
        return self.nats / self.bytes / math.log(2)


class LanguageModel(pl.LightningModule):
    """Trains a Decoder as `config` says. `end_of_text` is the token id that separates documents."""

    def __init__(self, config: RunConfig, end_of_text: int):
        super().__init__()
        self.config = config
        self.model = Decoder(config.model, config.seed)
        self.losses = losses_of(config)
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()
        self.val_bits_per_byte = BitsPerByte(end_of_text)
        self.val_routing = RoutingStatistics(config.model)
        # Of the last step only, so that a resumed run logs the same.
        self.train_routing = RoutingStatistics(config.model)
        self.train_losses: dict[str, Tensor] = {}
        # Counts of the micro-batches since the last optimizer step. Checkpoints are saved right after a step, where
        # there are none, so these need no buffer.
        self.step_chosen_LN: Tensor | None = None
        self.step_tokens = 0
        self.validated_step = -1  # finished steps at the last validation
        # Step of the first loss that was not finite, -1 while there is none; kept on the device, so that watching costs
        # no synchronisation.
        self.register_buffer("first_bad_step", torch.tensor(-1), persistent=False)

    def on_train_start(self) -> None:
        """With CUDA graphs gradients are summed into buffers of their own: else the first would lie where replays
        write.
        """
        if self.config.trainer.cuda_graphs:
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self.config.trainer.cuda_graphs)

    def training_step(self, tokens: Tensor) -> Tensor:
        """`tokens` [B, S+1]; returns cross-entropy + beta * L_b (Eq. 9)."""
        if self.config.trainer.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # replays overwrite what the step before put out
        cross_entropy, balance, output = self.losses(self.model, tokens)
        loss = cross_entropy + balance
        losses = {"train/loss": cross_entropy, "train/balance_loss": balance}
        self.train_losses = {name: value.detach().clone() for name, value in losses.items()}
        self.train_routing.reset()
        self.train_routing.update(output.stats)
        self._count(output.stats)
        bad = ~torch.isfinite(loss.detach()) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.global_step, self.first_bad_step)
        return loss

    def _count(self, stats: list[MoEStats]) -> None:
        """Adds a micro-batch to the counts of its step: here and not in the layers, which activation checkpointing runs
        twice.
        """
        if self.config.model.balance.control is None or not stats:
            return
        chosen_LN = torch.stack([layer.chosen_N for layer in stats])
        self.step_chosen_LN = chosen_LN if self.step_chosen_LN is None else self.step_chosen_LN + chosen_LN
        self.step_tokens += len(stats[0].logits_TN)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """The update, which runs the step's last micro-batch first, then that of the layers' control."""
        super().optimizer_step(*arguments, **options)
        if self.step_chosen_LN is not None:
            if dist.is_initialized():  # without the barrier of Lightning's `reduce`
                dist.all_reduce(self.step_chosen_LN)
            self.model.step_control(self.step_chosen_LN, self.step_tokens * self.trainer.world_size)
            self.step_chosen_LN, self.step_tokens = None, 0

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """`batch`: tokens [B, S+1] and the bytes [B, S] that each target stands for."""
        tokens, lengths = batch
        targets = tokens[:, 1:]
        output = self.model(tokens[:, :-1], targets_BS=targets)
        self.val_loss.update(output.nats_BS)
        self.val_accuracy.update(output.right_BS.float())
        self.val_bits_per_byte.update(output.nats_BS, targets, lengths)
        self.val_routing.update(output.stats)

    def on_validation_epoch_start(self) -> None:
        for metric in (self.val_loss, self.val_accuracy, self.val_bits_per_byte, self.val_routing):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        self.validated_step = self.trainer.global_step

    def validation_metrics(self) -> dict[str, float]:
        """`loss`, `bits_per_byte`, `accuracy` of the last validation."""
        return {
            "loss": float(self.val_loss.compute()),
            "bits_per_byte": float(self.val_bits_per_byte.compute()),
            "accuracy": float(self.val_accuracy.compute()),
        }

    def configure_optimizers(self) -> dict:
        optim, steps = self.config.optim, self.config.trainer.steps
        optimizer = build_optimizer(self, optim)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, steps, optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
