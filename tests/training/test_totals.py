import csv

import pytest

from moepp.config import compose
from moepp.errors import UsageError
from moepp.reports.results import _finished
from moepp.training import callbacks
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.totals import phases

TIGHT = ["model.capacity_factor=0.8", "trainer.log_every=1"]


def run(overrides, *more):
    config = freeze(compose(RunConfig, [*overrides, *more]))
    return train(config, run_directory(config))


def test_phases_are_tenths_of_the_steps():
    assert phases(20) == {"early": slice(0, 2), "late": slice(18, 20)}
    assert phases(8) == {"early": slice(0, 1), "late": slice(7, 8)}


def test_drops_and_the_online_loss_are_those_of_all_steps_also_of_a_run_that_was_killed(overrides, monkeypatch):
    whole = run(overrides, *TIGHT, "name=whole")
    final = whole.final()
    steps = [line for line in whole.metrics() if "train/loss" in line]
    assert len(steps) == 12
    dropped = [line["router/dropped_share"] for line in steps]
    assert final["train_dropped_share"] == pytest.approx(sum(dropped) / 12) and final["train_dropped_share"] > 0.05
    assert final["train_dropped_share_early"] == pytest.approx(sum(dropped[:2]) / 2)
    assert final["train_dropped_share_late"] == pytest.approx(sum(dropped[-2:]) / 2)
    by_layer = [final[f"train_dropped_share_layer_{layer}"] for layer in (1, 2)]
    assert sum(by_layer) / 2 == pytest.approx(final["train_dropped_share"]) and by_layer[0] != by_layer[1]
    assert final["online_loss"] == pytest.approx(sum(line["train/loss"] for line in steps) / 12)
    assert final["dropped_share"] == 0  # validation drops nothing

    class Killed(BaseException):
        pass

    class Kill(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == 6:
                raise Killed

    monkeypatch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
    with pytest.raises(Killed):
        run(overrides, *TIGHT, "trainer.average_checkpoints=2", "name=killed")
    monkeypatch.undo()
    again = run(overrides, *TIGHT, "trainer.average_checkpoints=2", "name=killed").final()
    kept = [name for name in final if name.startswith("train_dropped") or name in ("online_loss", "val_loss")]
    assert {name: again[name] for name in kept} == {name: final[name] for name in kept}
    assert again["averaged_val_loss"] != again["val_loss"]
    assert abs(again["averaged_val_loss"] - again["val_loss"]) < 0.1


def test_a_step_of_several_micro_batches_counts_each_once(overrides):
    record = run(overrides, *TIGHT, "trainer.accumulate=4")
    steps = [line for line in record.metrics() if "train/loss" in line]
    final = record.final()
    assert final["train_dropped_share"] == pytest.approx(sum(line["router/dropped_share"] for line in steps) / 12)
    assert final["online_loss"] == pytest.approx(sum(line["train/loss"] for line in steps) / 12)


def test_a_run_that_ended_early_has_no_late_drops_and_counts_the_tokens_it_saw(overrides):
    stop = "trainer.callbacks.EarlyStopping"
    record = run(overrides, *TIGHT, f"{stop}.monitor=val/loss", f"{stop}.divergence_threshold=0.0")
    final, found = record.final(), _finished(record, "zero", 0)
    assert final["stopped_at_step"] == 5 and final["train_dropped_share_early"] > 0
    assert "train_dropped_share_late" not in final
    assert found.value("tokens") == 5 * 8 * 32 and [tokens for tokens, _ in found.curve] == [5 * 8 * 32]
    assert record.read("budget.json")["tokens"] == 12 * 8 * 32


def test_the_last_validation_may_take_the_whole_split_and_tells_every_window(overrides):
    part, whole = (run(overrides, "data.val_sequences=8", *more) for more in ([], ["data.final_val_sequences=0"]))
    windows = 3999 // 32
    for record, count in ((part, 8), (whole, windows)):
        with open(record.path / "tables" / "val_windows.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        mean = sum(float(row["nats"]) for row in rows) / count
        assert mean == pytest.approx(record.final()["val_loss"], abs=1e-4)
        assert [int(row["document"]) for row in rows] == sorted(int(row["document"]) for row in rows)
    curves = [[line["val/loss"] for line in record.metrics() if "val/loss" in line] for record in (part, whole)]
    assert curves[0] == curves[1] and part.path != whole.path


def test_an_average_needs_whole_weights(overrides):
    with pytest.raises(UsageError, match="average_checkpoints=2 averages whole weights"):
        compose(RunConfig, [*overrides, "trainer.average_checkpoints=2", "strategy=fsdp", "trainer.devices=2"])
