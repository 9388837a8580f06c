import pickle
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from synthetic_corpus import write_token_folder

from moepp.data.batches import StepSampler, TokenDataModule, TrainWindows
from moepp.data.settings import DataConfig
from moepp.data.token_files import TokenFiles
from moepp.data.windows import epoch_order, visited
from moepp.errors import UsageError

SEQ_LEN = 4


@pytest.fixture
def config(tmp_path):
    """45 training tokens are 11 windows, 30 held-out tokens are 7."""
    path = write_token_folder(tmp_path / "tokens", train=45, val=30)
    return DataConfig(
        corpus="tokens", path=str(path), vocab_size=20_000, seq_len=SEQ_LEN, batch_size=4, val_sequences=0
    )


def set_up(config, rank=0, world=1, step=0, accumulate=1):
    module = TokenDataModule(config, seed=3, accumulate=accumulate)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, global_step=step)
    module.setup("fit")
    return module


def take(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


class Recorder(pl.LightningModule):
    """Trains one number and keeps every batch it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch):
        self.seen.append(batch.clone())
        return self.weight * batch.float().mean()

    def validation_step(self, batch):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(config, folder, accumulate, checkpoint=None):
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=8, max_epochs=-1, accumulate_grad_batches=accumulate,
        val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False,
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(recorder, TokenDataModule(config, seed=3, accumulate=accumulate), ckpt_path=checkpoint)
    return recorder


def test_windows_overlap_by_the_one_token_that_is_only_input(config):
    windows = TrainWindows(TokenFiles.open(Path(config.path)), SEQ_LEN)
    batch = windows[np.arange(len(windows))]
    assert batch.dtype == torch.int64
    assert batch[:, 1:].flatten().tolist() == list(range(1, 45))  # every token but the first is a target exactly once
    assert batch[:, 0].tolist() == list(range(0, 44, SEQ_LEN))


def test_no_window_is_left_out_when_batches_straddle_epochs():
    steps = 11  # of 4 windows: exactly 4 epochs of 11
    seen = np.concatenate([w for w, _ in zip(StepSampler(11, 4, seed=0), range(steps), strict=False)])
    epochs = seen.reshape(4, 11)
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_corpus_spans_several_epochs():
    batch = next(iter(StepSampler(3, 8, seed=0)))
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_order_depends_on_the_seed():
    first, same, other = (next(iter(StepSampler(1000, 16, seed))).tolist() for seed in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("windows", [1, 2, 3, 16, 17, 1000])
def test_a_keyed_order_visits_every_window_once(windows):
    assert sorted(epoch_order(windows, 0, 0, "keyed")[np.arange(windows)]) == list(range(windows))


def test_a_keyed_order_looks_random_and_depends_on_seed_and_epoch():
    drawn = [epoch_order(4096, *key, "keyed")[np.arange(4096)] for key in ((0, 0), (0, 1), (1, 0))]
    pairs = np.corrcoef([np.arange(4096), *drawn, np.roll(drawn[0], 1)])
    assert abs(pairs - np.eye(5)).max() < 0.06  # four standard deviations of 1 / sqrt(4096)


def test_a_keyed_order_of_a_trillion_tokens_takes_no_memory():
    order = epoch_order(488_281_250, 0, 2, "keyed")  # windows of 2,048 tokens
    first = order[np.arange(2048)]
    assert len(np.unique(first)) == 2048 and first.min() >= 0 and first.max() < 488_281_250
    assert first[:2].tolist() == [23477957, 209662966]  # on every machine and for good


@pytest.mark.parametrize("order", ["permuted", "keyed"])
def test_what_was_visited_is_what_was_served(order):
    served = np.concatenate([w for w, _ in zip(StepSampler(100, 8, 3, order=order), range(4), strict=False)])
    assert visited(100, 32, 3, order).tolist() == sorted(served)


@pytest.mark.parametrize("order", ["permuted", "keyed"])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_holds_the_same_sequences_however_it_is_divided(config, world, accumulate, order):
    config.order = order
    whole = take(set_up(config, step=5).train_dataloader(), 3)
    ranks = [
        take(set_up(config, rank, world, step=5, accumulate=accumulate).train_dataloader(), 3 * accumulate)
        for rank in range(world)
    ]
    joined = torch.cat([ranks[rank][micro] for micro in range(3 * accumulate) for rank in range(world)])
    assert torch.equal(joined, torch.cat(whole))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_sees_the_batches_of_an_uninterrupted_one(config, tmp_path, accumulate):
    whole = fit(config, tmp_path / "whole", accumulate)
    resumed = fit(config, tmp_path / "resumed", accumulate, tmp_path / "whole" / "step=3.ckpt")
    assert len(whole.seen) == 8 * accumulate
    assert len(resumed.seen) == 5 * accumulate
    assert torch.equal(torch.stack(resumed.seen), torch.stack(whole.seen[3 * accumulate :]))
    assert torch.equal(resumed.weight, whole.weight)


def test_validation_reads_every_window_with_the_bytes_of_its_targets(config, monkeypatch):
    monkeypatch.setattr("moepp.data.batches.VALIDATED_TOKENS", 1)
    batches = list(set_up(config).val_dataloader())
    tokens, lengths = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert [len(batch[0]) for batch in batches] == [4, 3]
    assert tokens[:, 1:].flatten().tolist() == list(range(10_001, 10_029))
    assert torch.equal(lengths, (tokens[:, 1:] - 10_000) % 7)


def test_limited_validation_is_spread_over_the_split(config):
    config.val_sequences = 3
    ((tokens, _),) = set_up(config).val_dataloader()
    assert ((tokens[:, 0] - 10_000) // SEQ_LEN).tolist() == [0, 2, 4]


@pytest.mark.parametrize(("together", "sizes"), [(1, [1] * 7), (4, [4, 3]), (9, [7])])
def test_small_micro_batches_are_validated_together(config, monkeypatch, together, sizes):
    monkeypatch.setattr("moepp.data.batches.VALIDATED_TOKENS", together * SEQ_LEN + 1)
    config.batch_size = 1
    found = [tokens for tokens, _ in set_up(config).val_dataloader()]
    assert [len(tokens) for tokens in found] == sizes
    assert torch.cat([tokens[:, 1:].flatten() for tokens in found]).tolist() == list(range(10_001, 10_029))


@pytest.mark.parametrize(("world", "batch_size"), [(2, 2), (2, 4), (4, 4), (5, 10), (7, 7)])
def test_validation_sees_the_same_windows_on_any_number_of_devices(config, monkeypatch, world, batch_size):
    monkeypatch.setattr("moepp.data.batches.VALIDATED_TOKENS", 1)
    config.batch_size = batch_size
    ranks = [[tokens for tokens, _ in set_up(config, rank, world).val_dataloader()] for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1 and min(len(b) for batches in ranks for b in batches) > 0
    whole = torch.cat([tokens for tokens, _ in set_up(config).val_dataloader()])
    assert len(whole) == 7
    for rank, batches in enumerate(ranks):
        assert torch.equal(torch.cat(batches), whole[rank::world])


def test_more_devices_than_validation_windows_are_refused(config):
    config.batch_size = 8
    with pytest.raises(UsageError, match="8 devices need at least as many validation sequences"):
        set_up(config, world=8).val_dataloader()


def test_a_batch_that_cannot_be_divided_is_refused(config):
    with pytest.raises(UsageError, match=r"data.batch_size=4 .* 3 devices .* use a multiple of 3"):
        set_up(config, world=3)


def test_worker_processes_serve_the_same_batches_and_pickles_stay_small(config):
    here = take(set_up(config).train_dataloader(), 3)
    config.workers = 1
    loader = set_up(config).train_dataloader()
    assert len(pickle.dumps(loader.dataset)) < 2000  # the tokens stay on disk
    loader.multiprocessing_context = "spawn"
    assert torch.equal(torch.stack(take(loader, 3)), torch.stack(here))
