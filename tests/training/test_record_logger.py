import math

import pytest

pytest.importorskip("lightning")
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from moepp.records import RunRecord
from moepp.training.record_logger import RecordLogger


class OneWeight(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch).mean()
        self.log_dict({"train/loss": loss, "train/a": 1.0})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.weight * batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_what_lightning_logs_is_in_the_record(tmp_path):
    record = RunRecord(tmp_path)
    trainer = pl.Trainer(
        max_steps=4, val_check_interval=2, check_val_every_n_epoch=None, log_every_n_steps=1, accelerator="cpu",
        logger=RecordLogger(record), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(OneWeight(), DataLoader(torch.ones(8, 1)), DataLoader(torch.ones(2, 1)))

    lines = record.metrics()
    assert [line["train/loss"] for line in lines if "train/loss" in line] == [1.0] * 4
    assert [line["val/loss"] for line in lines if "val/loss" in line] == [1.0, 1.0]
    assert not any("epoch" in line for line in lines)
    assert list(lines[0]) == ["step", "time", "train/a", "train/loss"]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_line_is_on_disk_before_the_call_returns(tmp_path):
    logger = RecordLogger(RunRecord(tmp_path))
    logger.log_metrics({"val/loss": torch.tensor(0.5), "epoch": 0}, step=3)
    logger.log_metrics({"epoch": 1}, step=4)
    assert [(line["step"], line["val/loss"]) for line in RunRecord(tmp_path).metrics()] == [(3, 0.5)]


def test_clocks_and_counters_are_kept_to_six_digits_and_losses_whole(tmp_path):
    loss, seconds = 1 / 3, 123456.789 / 7
    RecordLogger(RunRecord(tmp_path)).log_metrics({"train/loss": loss, "perf/step_time_ms": seconds}, step=1)
    (line,) = RunRecord(tmp_path).metrics()
    assert line["train/loss"] == loss and line["perf/step_time_ms"] == 17636.7


def test_a_float32_keeps_what_tells_it_from_its_neighbours_and_a_count_every_digit(tmp_path):
    loss, tokens = torch.tensor(1 / 3), 2.0**34 + 2048  # a float32 of eleven digits
    odd = {"train/huge": 1e300 / 3, "val/loss": math.nan, "val/z": math.inf}
    RecordLogger(RunRecord(tmp_path)).log_metrics({"train/loss": loss, "train/tokens": tokens, **odd}, step=1)
    (line,) = RunRecord(tmp_path).metrics()
    assert line["train/loss"] == 0.333333343 and torch.tensor(line["train/loss"]) == loss
    assert line["train/tokens"] == tokens and line["train/huge"] == 1e300 / 3
    assert math.isnan(line["val/loss"]) and line["val/z"] == math.inf


def test_it_is_named_after_the_record(tmp_path):
    logger = RecordLogger(RunRecord(tmp_path / "sweep-smoke" / "0123abcd"))
    assert (logger.name, logger.version) == ("sweep-smoke", "0123abcd")
    assert logger.save_dir == str(tmp_path / "sweep-smoke" / "0123abcd")
