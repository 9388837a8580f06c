"""The balance loss of a step of several micro-batches: what it would be of one batch."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moepp.errors import UsageError
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.module import LanguageModel

TOKENS = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(0))


class Stopped(Exception):
    pass


class Gradients(LanguageModel):
    def on_before_optimizer_step(self, optimizer):
        raise Stopped


class Micro(pl.LightningDataModule):
    def __init__(self, parts):
        super().__init__()
        self.parts = TOKENS.chunk(parts)

    def train_dataloader(self):
        return DataLoader(self.parts, batch_size=None)

    def micro_batches(self, step):
        return list(self.parts)


def make(parts, data=None, checkpointing=False, **balance):
    config = DecoderConfig(
        dim=16, hidden=24, layers=2, heads=2, vocab_size=64, capacity_factor=None, init_std=0.2,
        experts=ExpertCounts(ffn=6), balance=BalanceConfig(beta=10.0, **balance),
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    return gradient(Gradients(Decoder(config, 0).double()), parts, data)


def gradient(module, parts, data=None):
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=parts, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(Stopped):
        trainer.fit(module, data or Micro(parts))
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("form", ["switch", "null_averaged"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_micro_batches_is_that_of_one_batch(form, checkpointing):
    whole = make(1, form=form)
    torch.testing.assert_close(make(4, form=form, checkpointing=checkpointing), whole, rtol=1e-9, atol=1e-12)
    apart = make(4, form=form, over="global_batch")
    assert (apart - whole).norm() > 0.01 * whole.norm()


def test_data_that_cannot_look_ahead_is_refused_in_one_line():
    loader = DataLoader(TOKENS.chunk(2), batch_size=None)
    with pytest.raises(UsageError, match="needs a data module with micro_batches"):
        make(2, loader)
    make(2, loader, over="micro_batch")


def test_a_fit_that_was_interrupted_in_a_step_leaves_no_counts_to_the_next():
    config = DecoderConfig(dim=16, hidden=24, layers=2, heads=2, vocab_size=64, balance=BalanceConfig(beta=10.0))
    module = Gradients(Decoder(config, 0).double())
    whole = gradient(module, 1)
    module.zero_grad()
    gradient(module, 2)
    for layer in module.model.moe_layers():
        layer.step_counts[0].zero_()  # of another batch
    module.zero_grad()
    torch.testing.assert_close(gradient(module, 1), whole, rtol=1e-9, atol=1e-12)
