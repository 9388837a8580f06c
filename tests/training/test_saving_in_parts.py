"""A checkpoint that devices write in the background bears its name once all of it is on the disk, and not before."""

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from moepp.models import checkpoint_parts as parts
from moepp.records import RunRecord
from moepp.strategies.single import CheckpointsOfAnyForm
from moepp.training.callbacks import ResumeCheckpoint
from moepp.training.states import PARTIAL, begin_saving, finish_saving, is_written, rewind_to_newest, states


class Trainer(SimpleNamespace):
    """Writes its step and one weight, as far as a checkpoint in parts is written when training goes on."""

    is_global_zero, should_stop, fit_loop = True, False, SimpleNamespace(_should_accumulate=lambda: False)

    def save_checkpoint(self, path, weights_only):
        parts.write_whole({"global_step": self.global_step, "state_dict": {"w": torch.full((4,), 1.0)}}, path)
        self.strategy.saving = Future()


@pytest.fixture
def record(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.checkpoints.mkdir(parents=True)
    return record


@pytest.fixture
def trainer():
    strategy = SimpleNamespace(saving=None, barrier=lambda: None)

    def finish_saving():
        assert strategy.saving.done(), "would wait"

    strategy.finish_saving = finish_saving
    return Trainer(strategy=strategy, global_step=4)


@pytest.fixture
def alone_in_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_is_not_yet_written_is_no_state_to_resume_from(trainer, record):
    begin_saving(trainer, record)
    assert not is_written(trainer) and states(record.checkpoints) == [] and (record.checkpoints / PARTIAL).is_dir()
    assert rewind_to_newest(record) is None  # as after a kill
    trainer.strategy.saving.set_result(None)
    finish_saving(trainer, record, "step-00000004.ckpt")
    assert rewind_to_newest(record) == record.checkpoints / "step-00000004.ckpt"


@pytest.fixture
def two_states(trainer, record):
    """Steps 4 and 8, written by begin_saving and finish_saving; returns the folders."""
    for step in (4, 8):
        trainer.global_step = step
        begin_saving(trainer, record)
        trainer.strategy.saving.set_result(None)
        finish_saving(trainer, record, f"step-{step:08d}.ckpt")
    return states(record.checkpoints)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "rest.pt"])
def test_a_state_that_lacks_anything_is_set_aside_for_an_older_one(two_states, record, capsys, damage, file):
    damage(two_states[1] / file)
    assert rewind_to_newest(record) == two_states[0]
    assert two_states[1].name in capsys.readouterr().err
    assert (record.checkpoints / f"damaged-{two_states[1].name}").is_dir()


@pytest.mark.parametrize("written", [[], ["rest.pt"], ["rest.pt", "__0_0.distcp"]], ids=len)
def test_a_kill_while_parts_are_written_leaves_the_former_state_and_nothing_in_the_way(
    two_states, trainer, record, written
):
    trainer.global_step = 12
    begin_saving(trainer, record)
    partial = record.checkpoints / PARTIAL
    for file in [file for file in partial.iterdir() if file.name not in written]:
        file.unlink()
    assert rewind_to_newest(record) == two_states[1]
    begin_saving(trainer, record)  # by the attempt that goes on
    trainer.strategy.saving.set_result(None)
    finish_saving(trainer, record, "step-00000012.ckpt")
    assert rewind_to_newest(record).name == "step-00000012.ckpt"


def test_a_write_that_fails_in_the_background_is_told_and_its_state_gets_no_name(two_states, trainer, record):
    begin_saving(trainer, record)
    trainer.strategy.saving.set_exception(OSError(28, "No space left on device"))
    trainer.strategy.finish_saving = lambda: trainer.strategy.saving.result()
    with pytest.raises(OSError, match="No space left"):
        finish_saving(trainer, record, "step-00000012.ckpt")
    assert rewind_to_newest(record) == two_states[1] and not (record.checkpoints / PARTIAL).exists()


def test_what_was_trained_meanwhile_is_not_in_the_state(tmp_path, monkeypatch, alone_in_a_group):
    """A state is copied before training goes on, however late it is written."""
    trained, may_write, write = torch.zeros(4), threading.Event(), FileSystemWriter.write_data
    monkeypatch.setattr(FileSystemWriter, "write_data", lambda *a, **k: may_write.wait(60) and write(*a, **k))
    saving = parts.save_parts(tmp_path / "state", {"state_dict": {"w": trained}}, alone_in_a_group)
    trained.fill_(7)
    may_write.set()
    parts.wait_for(saving)
    assert not parts.read_whole(tmp_path / "state")["state_dict"]["w"].any()


def test_training_goes_on_while_a_state_is_written_and_the_next_one_waits(trainer, record, monkeypatch):
    monkeypatch.setattr("moepp.training.callbacks.raise_if_not_finite", lambda *_: None)
    keeper = ResumeCheckpoint(record, every=4, val_every=1)

    def step(number):
        trainer.global_step = number
        keeper._save_where_due(trainer, None)
        return [state.name for state in states(record.checkpoints)]

    assert step(4) == step(5) == []  # written meanwhile
    with pytest.raises(AssertionError, match="would wait"):  # the next one, for the writers
        step(8)
    trainer.strategy.saving.set_result(None)
    assert step(9) == ["step-00000004.ckpt"]


def test_final_weights_become_one_file(trainer, record):
    begin_saving(trainer, record, weights_only=True)
    trainer.strategy.saving.set_result(None)
    finish_saving(trainer, record, "final.ckpt", weights_only=True)
    assert [path.name for path in record.checkpoints.iterdir()] == ["final.ckpt"]
    assert torch.equal(torch.load(record.checkpoints / "final.ckpt")["state_dict"]["w"], torch.full((4,), 1.0))


def test_a_strategy_of_lightnings_own_reads_parts_as_one_file(tmp_path):
    parts.write_whole({"global_step": 4, "state_dict": {"w": torch.arange(4.0)}}, tmp_path / "parts")
    parts.join(tmp_path / "parts", tmp_path / "one.ckpt")
    for form in ("parts", "one.ckpt"):
        found = CheckpointsOfAnyForm().load_checkpoint(tmp_path / form)
        assert found["global_step"] == 4 and found["state_dict"]["w"].tolist() == [0, 1, 2, 3]
