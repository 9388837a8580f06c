"""LanguageModel by Lightning's own contract: in a plain Trainer, with plain DataLoaders and Lightning's callbacks."""

import csv
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from moepp.errors import UsageError
from moepp.layers.settings import BalanceConfig, MoEConfig
from moepp.models.decoder import Decoder
from moepp.models.protocol import CausalLM, ModelOutput
from moepp.models.settings import DecoderConfig
from moepp.training.callbacks import MetricsReporter, likely_cause
from moepp.training.module import LanguageModel
from moepp.training.optim import learning_rate_scale
from moepp.training.settings import OptimConfig

IDS = torch.randint(0, 61, (32, 9), generator=torch.Generator().manual_seed(0))
FAST = OptimConfig(warmup_steps=1, lr=1e-2)


def decoder(**options):
    return Decoder(DecoderConfig(dim=16, hidden=8, layers=2, heads=2, vocab_size=61, **options))


def fit(tmp_path, module, *callbacks, **options):
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=CSVLogger(tmp_path), log_every_n_steps=2, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(IDS, 8), DataLoader(IDS[:16], 8))
    return trainer


def test_metrics_reach_callbacks_and_loggers(tmp_path):
    trainer = fit(tmp_path, LanguageModel(decoder(), FAST), enable_checkpointing=False)
    names = {"train/loss", "train/balance_loss", "val/loss", "val/accuracy", "router/ffn_per_token", "router/entropy"}
    assert names <= trainer.callback_metrics.keys()
    assert "val/bits_per_byte" not in trainer.callback_metrics  # nobody says how long a token is
    [table] = tmp_path.rglob("metrics.csv")
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 6 and len([row for row in rows if row["val/loss"]]) == 3


def test_a_plain_trainer_logs_the_losses_and_routing_of_all_micro_batches_of_a_step(tmp_path):
    class Kept(LanguageModel):
        def training_step(self, tokens):
            loss = super().training_step(tokens)
            ffn = int(self.train_routing.chosen_LN[:, :8].sum())  # of the step so far
            self.kept.append((float(self.train_losses["train/loss"]), ffn))
            return loss

    module = Kept(decoder(balance=BalanceConfig(over="micro_batch")), FAST)
    module.kept = []
    fit(tmp_path, module, enable_checkpointing=False, accumulate_grad_batches=2)
    [table] = tmp_path.rglob("metrics.csv")
    with open(table) as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 3 and len(module.kept) == 12  # steps 2, 4 and 6, of two micro-batches
    for row, parts in zip(rows, (module.kept[2:4], module.kept[6:8], module.kept[10:12]), strict=True):
        (first, ffn_of_first), (second, ffn) = parts
        assert 0 < ffn_of_first < ffn
        assert float(row["train/loss"]) == pytest.approx((first + second) / 2) and first != second
        assert float(row["router/ffn_per_token"]) == pytest.approx(ffn / (2 * 2 * 64))


def test_bytes_give_bits_per_byte(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    lengths = torch.full((32, 8), 2)
    [found] = trainer.validate(LanguageModel(decoder()), DataLoader(TensorDataset(IDS, lengths), 8), verbose=False)
    assert found["val/bits_per_byte"] == pytest.approx(found["val/loss"] / 2 / torch.log(torch.tensor(2.0)).item())


def test_early_stopping_and_model_checkpoint_work_beside_the_reporter(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    stop = EarlyStopping("val/loss", divergence_threshold=0.0)  # at the first validation
    module = LanguageModel(decoder(), FAST)
    trainer = fit(tmp_path, module, best, stop, MetricsReporter(tokens_per_step=64, seq_len=8))
    assert trainer.global_step == 4 and best.best_model_score == pytest.approx(module.validation_metrics()["loss"])
    assert {"perf/tokens_per_s", "train/grad_norm"} <= trainer.callback_metrics.keys()


def test_a_loss_that_is_not_finite_stops_a_plain_trainer_too(tmp_path):
    module = LanguageModel(decoder(), FAST, losses=lambda model, ids: spoil(model, ids))
    with pytest.raises(Exception, match=r"not finite at step 1 .* no checkpoint was saved before it"):
        fit(tmp_path, module, MetricsReporter(64, 8), ModelCheckpoint(tmp_path, monitor="val/loss"))


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("weight", "No update was made yet, and .* is not finite: see model.init_std and init_from"),
        ("balance", "The cross-entropy is finite, the balance loss is not: lower model.balance.beta"),
        ("loss", "Lower optim.lr, lengthen optim.warmup_steps"),
    ],
)
def test_the_likely_cause_of_a_loss_that_is_not_finite_is_named(spoiled, message):
    module = LanguageModel(decoder(), FAST)
    nan, fine = torch.tensor(float("nan")), torch.tensor(1.0)
    module.step_losses = {"train/loss": nan if spoiled == "loss" else fine, "train/balance_loss": nan}
    module.step_parts = 1
    if spoiled == "weight":
        next(module.model.parameters()).data.fill_(float("inf"))
    assert re.match(message, likely_cause(module, bad=0 if spoiled == "weight" else 3))


def spoil(model, ids):
    output = model(ids[:, :-1], targets_BS=ids[:, 1:])
    return output.cross_entropy * float("nan"), model.balance_loss(output), output


def test_a_checkpoint_gives_the_model_back_from_plain_values(tmp_path):
    module = LanguageModel(decoder(), FAST, steps=12, end_of_text=0)
    trainer = fit(tmp_path, module, ModelCheckpoint(tmp_path))
    path = trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"]["optim"]["lr"] == FAST.lr
    loaded = LanguageModel.load_from_checkpoint(path)
    assert loaded.optim == FAST and loaded.steps == 12 and loaded.val_bits_per_byte.end_of_text == 0
    ours, theirs = loaded.state_dict(), module.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def silent(tmp_path, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


def test_a_plain_trainer_tests_and_predicts(tmp_path):
    trainer, module, ids = silent(tmp_path), LanguageModel(decoder()), DataLoader(TensorDataset(IDS), 8)
    [tested], [validated] = trainer.test(module, ids, verbose=False), trainer.validate(module, ids, verbose=False)
    assert tested == {name.replace("val/", "test/"): value for name, value in validated.items()} and len(tested) == 2
    logits = torch.cat(trainer.predict(module, ids))
    assert logits.shape == (32, 9, 61)
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), IDS[:, 1:])
    assert float(nats) == pytest.approx(tested["test/loss"], rel=1e-5)


def test_a_rate_that_lightning_has_found_is_the_schedules_at_once(tmp_path):
    module = LanguageModel(decoder(), FAST, steps=8)
    trainer = silent(tmp_path, max_epochs=1)
    trainer.fit(module, DataLoader(IDS, 8))
    module.lr = 0.5
    assert module.optim.lr == module.hparams["optim"]["lr"] == 0.5
    [schedule] = trainer.lr_scheduler_configs
    schedule.scheduler.step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * learning_rate_scale(5, 8, module.optim))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(IDS)


@pytest.mark.parametrize(
    ("data", "options"), [(IDS, {"max_epochs": -1, "max_time": "00:00:01:00"}), (Endless(), {"max_epochs": 1})]
)
def test_a_schedule_without_an_end_is_refused_and_steps_are_one(data, options, tmp_path):
    with pytest.raises(UsageError, match=r"schedule has no end .* give LanguageModel\(..., steps=N\)"):
        silent(tmp_path, **options).fit(LanguageModel(decoder()), DataLoader(data, 8))
    given = {**options, "max_epochs": 1}
    silent(tmp_path, **given).fit(module := LanguageModel(decoder(), FAST, steps=4), DataLoader(data, 8))
    assert module.trainer.global_step == 4


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"ids": IDS}, "dict"),
        ([], "list"),
        ({"input_ids": IDS.tolist()}, "list"),
        (IDS.float(), r"torch.float32 \[32, 9\]"),
        (IDS[0], r"torch.int64 \[9\]"),
        (IDS[:, :1], r"torch.int64 \[32, 1\]"),
    ],
    ids=["other mapping", "empty", "lists", "fractions", "one sequence", "nothing to predict"],
)
def test_what_is_no_batch_of_ids_is_refused_in_one_line(batch, found):
    for step in (LanguageModel.training_step, LanguageModel.validation_step):
        with pytest.raises(UsageError, match=f"^a batch is {found}; token ids"):
            step(LanguageModel(decoder()), batch)


MASK = torch.ones_like(IDS)
PROMPT = IDS.clone()
PROMPT[:, :4], PROMPT[0, :7] = -100, -100  # of the first sequence two tokens are to be predicted, of the others five


def test_a_mapping_of_ids_is_a_batch_of_ids(tmp_path):
    """As the collators of transformers make it, with labels that repeat the ids and nothing padded."""
    rows = [{"input_ids": ids, "labels": ids.clone(), "attention_mask": MASK[0]} for ids in IDS]
    losses = []
    for data in (IDS, rows, [{"input_ids": ids} for ids in IDS]):
        trainer, module = silent(tmp_path, max_epochs=1), LanguageModel(decoder(), FAST)
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 8))
        found = [trainer.callback_metrics[name] for name in ("train/loss", "val/loss")]
        losses.append([*found, torch.cat(trainer.predict(module, DataLoader(data, 8))).sum()])
    assert losses[0] == losses[1] == losses[2]


def test_labels_are_predicted_in_place_of_the_ids_and_ignored_ones_not_at_all():
    module, batch = LanguageModel(decoder(balance=BalanceConfig(beta=0.0))), {"input_ids": IDS, "labels": PROMPT}
    module.log_dict = lambda metrics: None
    logits = module(IDS[:, :-1]).detach()
    nats = F.cross_entropy(logits.transpose(1, 2), PROMPT[:, 1:], reduction="none")
    counted = PROMPT[:, 1:] != -100
    assert int(counted.sum()) == 2 + 31 * 5
    torch.testing.assert_close(module.training_step(batch), nats.sum() / counted.sum())
    with torch.no_grad():
        module.validation_step({name: rows[:1] for name, rows in batch.items()})
        module.validation_step({name: rows[1:] for name, rows in batch.items()})
    found = module.validation_metrics()
    assert found["loss"] == pytest.approx(float(nats.sum() / counted.sum()), rel=1e-5)
    right = (logits.argmax(-1) == PROMPT[:, 1:])[counted]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attention_mask": MASK.index_fill(1, torch.tensor([0]), 0)}, "attention_mask has zeros, .* one length$"),
        ({"attention_mask": MASK.index_fill(1, torch.tensor([8]), 0)}, "attention_mask has zeros, .* one length$"),
        ({"position_ids": IDS}, "has position_ids, .* leave it out beside input_ids, labels, attention_mask$"),
        ({"labels": IDS[:, 1:]}, r"labels are \[32, 8\]; they must be \[32, 9\], as its input_ids$"),
        ({"labels": IDS.new_full(IDS.shape, -100)}, "labels are all -100 .*: nothing is to be predicted$"),
    ],
    ids=["padded on the left", "padded on the right", "other keys", "shifted labels", "nothing to predict"],
)
def test_what_a_mapping_asks_in_vain_is_refused_in_one_line(more, said):
    for step in (LanguageModel.training_step, LanguageModel.validation_step, LanguageModel.predict_step):
        with pytest.raises(UsageError, match=f"^a batch(?:'s)? {said}"):
            step(LanguageModel(decoder()), {"input_ids": IDS, **more})


def test_labels_are_refused_of_a_model_that_learns_from_another():
    module = LanguageModel(decoder())
    module.model.config.retrofit.loss = "forward_kl"
    with pytest.raises(UsageError, match=r"labels are not its input_ids, and model\.retrofit\.loss=forward_kl "):
        module.training_step({"input_ids": IDS, "labels": PROMPT})


def test_ids_of_any_integers_are_taken(tmp_path):
    [long], [short] = (
        silent(tmp_path).validate(LanguageModel(decoder()), DataLoader(ids, 8), verbose=False)
        for ids in (IDS, IDS.to(torch.int16))
    )
    assert long == short


class Bigram(nn.Module):
    """A model without experts, of somebody who knows the protocol alone."""

    def __init__(self):
        super().__init__()
        self.config, self.table = MoEConfig(), nn.Embedding(61, 61)

    def forward(self, ids_BS, *, targets_BS=None):
        logits = self.table(ids_BS)
        if targets_BS is None:
            return ModelOutput([], logits)
        nats = F.cross_entropy(logits.transpose(1, 2), targets_BS, reduction="none")
        return ModelOutput([], None, nats.mean(), nats.detach(), logits.argmax(-1) == targets_BS)

    def balance_loss(self, output):
        return output.cross_entropy.new_zeros(())

    def step_control(self, chosen_LN, tokens):
        raise AssertionError("there is nothing to control")

    def active_parameters(self, ffn_per_token=None):
        return 61

    def forward_flops(self, seq_len, ffn_per_token=None):
        return {"table": 0.0}

    def reset_parameters(self, seed=0):
        self.table.reset_parameters()


def test_any_model_that_fulfils_the_protocol_trains_and_comes_back(tmp_path):
    model = Bigram()
    assert isinstance(model, CausalLM)
    module = LanguageModel(model, FAST)
    before = module.model.table.weight.detach().clone()
    trainer = fit(tmp_path, module, ModelCheckpoint(tmp_path), MetricsReporter(64, 8))
    assert not torch.equal(before, model.table.weight) and trainer.callback_metrics["val/loss"] > 0
    path = trainer.checkpoint_callback.best_model_path
    loaded = LanguageModel.load_from_checkpoint(path, model=Bigram())
    assert torch.equal(loaded.model.table.weight, model.table.weight)
