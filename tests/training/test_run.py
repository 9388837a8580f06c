import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch

from moepp.config import compose, load, save
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord
from moepp.sweeps.trial import TRIAL_COMMAND
from moepp.training.run import _say_what_file, freeze, train
from moepp.training.settings import METRICS, RunConfig, run_directory
from moepp.training.weights import load_model


def run(overrides, *more):
    config = freeze(compose(RunConfig, [*overrides, *more]))
    return train(config, run_directory(config))


def losses(record):
    keys = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "router/entropy", "final/val_loss")
    return [{"step": line["step"], **{k: line[k] for k in keys if k in line}} for line in record.metrics()]


def test_a_run_learns_and_leaves_a_whole_record(overrides):
    record = run(overrides, "trainer.steps=40", "trainer.expert_timing=true")
    assert record.status == "done"
    lines = record.metrics()
    first, last = (next(line["val/loss"] for line in order if "val/loss" in line) for order in (lines, lines[::-1]))
    assert last < first - 0.2
    final = record.final()
    assert final["val_loss"] == last  # validated at step 40, not again
    assert final["val_bits_per_byte"] > 0 and 0 < final["val_accuracy"] < 1
    assert final["expert_forward_ms"] > 0 and final["expert_forward_ms_balanced"] > 0
    assert final["ffn_per_token"] == pytest.approx(2 * final["ffn_share"])
    shares = [final[f"{kind}_share"] for kind in ("ffn", "constant", "copy", "zero")]
    assert sum(shares) == pytest.approx(1)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(2, 41, 2))
    assert all(
        line["system/cpu_percent"] > 0 and line["system/memory_gib"] > 0 for line in lines if "train/loss" in line
    )
    known = {f"{group}/{name}" for group, names in METRICS.items() for name in names}
    logged = {name for line in lines for name in line if name.partition("/")[0] in METRICS}
    assert logged <= known | {f"router/{kind}_share" for kind in ("ffn", "constant", "copy", "zero")}
    budget = record.read("budget.json")
    assert budget["tokens"] == 40 * 8 * 32 and budget["total_params"] > budget["active_params"]
    assert record.read("provenance.json")["data"]["digest"] == "feedfacefeedface"
    table = (record.path / "tables" / "expert_load.csv").read_text().splitlines()
    assert table[0] == "layer,expert,kind,share" and len(table) == 1 + 2 * 8
    assert [p.name for p in record.checkpoints.iterdir()] == ["final.ckpt"]
    assert run(overrides, "trainer.steps=40", "trainer.expert_timing=true").metrics() == lines  # not trained again


def test_the_final_weights_are_those_that_were_validated(overrides):
    record = run(overrides)
    model, config = load_model(record.path)
    assert config.model.dim == 32 and not model.training
    from moepp.training.module import LanguageModel

    module = LanguageModel.of_run(config, 0)
    module.model.load_state_dict(model.state_dict())
    import lightning.pytorch as pl

    from moepp.data.batches import TokenDataModule

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
    trainer.validate(module, TokenDataModule(config.data, 0), verbose=False)
    assert module.validation_metrics()["loss"] == pytest.approx(record.final()["val_loss"], rel=1e-8)


def test_switching_everything_off_gives_the_vanilla_losses_bit_by_bit(overrides):
    off = ["model.experts.zero=0", "model.experts.copy=0", "model.experts.constant=0", "model.gating_residual=false"]
    vanilla = run(overrides, "model=vanilla", "name=a")
    switched = run(
        overrides, "model=moepp", *off, "model.balance.tau=0.5", "name=b"
    )  # tau weighs experts that are not there
    moepp = run(overrides, "name=c")
    assert losses(vanilla) == losses(switched)
    assert vanilla.final()["val_loss"] != moepp.final()["val_loss"]


# The process dies before the first checkpoint, at and after one, at and after a validation, at the last step.
@pytest.mark.parametrize("step", [3, 4, 5, 6, 9, 12])
def test_a_run_that_is_killed_continues_to_the_same_losses(overrides, step, monkeypatch):
    whole = run(overrides, "name=whole")
    from moepp.training import callbacks

    class Killed(BaseException):
        pass

    class Kill(callbacks.ResumeCheckpoint):
        """Ends the run after the step's own checkpoint, if any, has been saved."""

        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == step:
                raise Killed

    config = freeze(compose(RunConfig, [*overrides, "name=cut"]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
        train(config, run_directory(config))
    cut = train(config, run_directory(config))
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sigterm_saves_at_the_end_of_the_batch_and_the_next_call_continues(overrides, accumulate):
    more = [
        "trainer.steps=60",
        "trainer.checkpoint_every=1000",
        "trainer.val_every=1000",
        f"trainer.accumulate={accumulate}",
    ]
    config = freeze(compose(RunConfig, [*overrides, *more]))
    directory = run_directory(config)
    directory.mkdir(parents=True)
    save(config, directory / "config.yaml")
    record = RunRecord(directory)
    log = directory.parent / "log.txt"
    process = forked.start([*TRIAL_COMMAND, str(directory / "config.yaml")], log, {})
    while process.poll() is None and not any(line["step"] >= 6 for line in record.metrics()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.wait()
    errors = log.read_text()
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert record.status == "started"
    (saved,) = record.checkpoints.glob("step-*.ckpt")
    reached = int(saved.stem.removeprefix("step-"))
    assert 6 <= reached < 60
    assert record.metrics()[-1]["step"] in (reached, reached - 1)
    train(config, directory)
    whole = run(overrides, *more, "name=whole")
    assert losses(record) == losses(whole)


def test_a_loss_that_is_not_finite_stops_with_step_rate_and_checkpoint(overrides, monkeypatch):
    import torch.nn.functional as F

    from moepp.models import cross_entropy

    real, calls = F.cross_entropy, []

    def explode(*arguments, **options):
        calls.append(1)
        loss = real(*arguments, **options)
        return loss * float("nan") if len(calls) == 7 else loss

    monkeypatch.setattr(cross_entropy.F, "cross_entropy", explode)
    with pytest.raises(RunError) as caught:
        run(overrides, "trainer.val_every=100")
    message = str(caught.value)
    assert "not finite at step 7" in message and "learning rate" in message and "step-00000004.ckpt" in message
    record = RunRecord(next((p for p in (os.scandir(overrides[4].removeprefix("runs=") + "/train"))), None))
    assert record.status == "failed" and "step 7" in record.read("failed.json")["reason"]


class Killed(BaseException):
    pass


def cut_at(step, config, monkeypatch):
    """The record of a run that was killed after `step`."""
    from moepp.training import callbacks

    class Kill(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == step:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
        train(config, run_directory(config))
    return RunRecord(run_directory(config))


def test_damaged_checkpoints_are_set_aside_and_the_run_goes_on_from_the_newest_whole_one(
    overrides, monkeypatch, capsys
):
    whole = run(overrides, "name=whole")
    config = freeze(compose(RunConfig, [*overrides, "name=cut"]))
    record = cut_at(6, config, monkeypatch)
    for step in (5, 6):
        (record.checkpoints / f"step-{step:08d}.ckpt").write_bytes(b"half a check")
    train(config, record.path)
    assert losses(record) == losses(whole)
    assert sorted(path.name for path in record.checkpoints.iterdir()) == [
        "damaged-step-00000005.ckpt", "damaged-step-00000006.ckpt", "final.ckpt",
    ]  # fmt: skip
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "step-00000006.ckpt cannot be read" in warnings[0]
    assert record.metrics()[0]["time"] < record.metrics()[-1]["time"]


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(overrides, monkeypatch, capsys):
    whole = run(overrides, "name=whole")
    record = cut_at(10, freeze(compose(RunConfig, [*overrides, "name=cut"])), monkeypatch)
    before = record.metrics()
    older, newest = sorted(record.checkpoints.iterdir())
    assert (older.name, newest.name) == ("step-00000004.ckpt", "step-00000008.ckpt")
    newest.write_bytes(newest.read_bytes()[:100])
    train(load(RunConfig, record.path / "config.yaml"), record.path)
    assert losses(record) == losses(whole) and "step-00000008.ckpt cannot be read" in capsys.readouterr().err
    assert record.metrics()[1] == before[1] and record.metrics()[2]["time"] > before[-1]["time"]  # from step 4 on


def test_a_record_that_was_begun_with_other_settings_is_refused(overrides):
    """As after a default has changed: a key at its default is no part of the identity."""
    config = freeze(compose(RunConfig, [*overrides, "trainer.steps=2"]))
    record = train(config, run_directory(config))
    later = dataclasses.replace(config, optim=dataclasses.replace(config.optim, eps=1e-5))
    with pytest.raises(UsageError, match=r"begun with other settings \(optim.eps: 1e-08 then, 1e-05 now\)"):
        train(later, record.path)


def test_a_finished_run_whose_metrics_are_damaged_is_not_trained_over(overrides):
    config = freeze(compose(RunConfig, [*overrides, "trainer.steps=2"]))
    record = train(config, run_directory(config))
    (record.path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunError, match=r"metrics\.jsonl is cut off"):
        train(config, record.path)
    assert record.status == "damaged" and (record.checkpoints / "final.ckpt").exists()


def test_a_run_whose_only_checkpoint_is_damaged_begins_anew(overrides, capsys):
    config = freeze(compose(RunConfig, overrides))
    folder = RunRecord(run_directory(config)).checkpoints
    folder.mkdir(parents=True)
    (folder / "step-00000004.ckpt").write_bytes(b"half a check")
    record = train(config, run_directory(config))
    assert losses(record) == losses(run(overrides, "name=whole"))
    assert "step-00000004.ckpt cannot be read" in capsys.readouterr().err


def test_a_checkpoint_gets_its_name_when_it_and_the_metrics_before_it_are_on_the_disk(overrides, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def name(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(name(descriptor)), fsync(descriptor)))
    monkeypatch.setattr(
        os, "replace", lambda old, new: (events.append(f"-> {os.path.basename(new)}"), replace(old, new))
    )
    run(overrides, "trainer.steps=4")
    for checkpoint in ("step-00000004.ckpt", "final.ckpt"):
        place = events.index(f"-> {checkpoint}")
        assert events[place - 2 : place + 2] == ["metrics.jsonl", "saving.ckpt", f"-> {checkpoint}", "checkpoints"]


def test_a_resumed_run_counts_the_seconds_before_its_checkpoint(overrides, monkeypatch):
    from moepp.training import callbacks

    config = freeze(compose(RunConfig, overrides))
    with monkeypatch.context() as patch:
        real = callbacks.ResumeCheckpoint.state_dict
        patch.setattr(callbacks.ResumeCheckpoint, "state_dict", lambda self: {"seconds": real(self)["seconds"] + 1000})
        record = cut_at(6, config, monkeypatch)
    assert 1000 < train(config, record.path).final()["train_seconds"] < 1600


def test_a_resumed_run_keeps_what_its_earlier_attempts_were_made_with(overrides, monkeypatch):
    config = freeze(compose(RunConfig, overrides))
    with monkeypatch.context() as patch:
        patch.setattr("moepp.training.provenance.git", lambda root: {"sha": "abc", "dirty": False})
        record = cut_at(3, config, monkeypatch)  # nothing of this attempt is kept
        patch.setattr("moepp.training.provenance.git", lambda root: {"sha": "def", "dirty": False})
        record = cut_at(6, config, monkeypatch)
        patch.setattr("moepp.training.provenance.git", lambda root: {"sha": "0123", "dirty": False})
        train(config, record.path)
    found = record.read("provenance.json")
    assert found["git"]["sha"] == "0123"
    assert [attempt["git"]["sha"] for attempt in found["earlier"]] == ["def"]


def test_a_file_that_is_missing_is_named(overrides, token_folder, tmp_path):
    shutil.copytree(token_folder, tmp_path / "tokens")
    config = freeze(compose(RunConfig, [*overrides, f"data.path={tmp_path / 'tokens'}"]))
    (tmp_path / "tokens" / "train.bin").unlink()
    with pytest.raises((RunError, UsageError), match=r"tokens/train\.bin") as error:
        train(config, run_directory(config))
    assert "cannot write" not in str(error.value)


def test_an_error_names_the_file_and_whether_it_is_of_the_record(tmp_path):
    record = tmp_path / "runs" / "name" / "0123"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert _say_what_file(full, record) == f"cannot write the run record {record}: No space left on device"
    for file in (record / "lock", record.parent):
        denied = PermissionError(errno.EACCES, "Permission denied", str(file))
        assert _say_what_file(denied, record) == f"cannot write the run record {file}: Permission denied"
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/train.bin")
    assert _say_what_file(missing, record).startswith("cannot read or write /data/train.bin: No such file")


HOLD_LOCK = """
import sys
from moepp.records import RunRecord
with RunRecord(sys.argv[1]).lock():
    print("held", flush=True)
    input()
"""


def test_two_processes_never_train_in_one_record(overrides):
    config = freeze(compose(RunConfig, overrides))
    directory = run_directory(config)
    directory.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(directory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    holder.stdout.readline()
    with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
        train(config, directory)
    assert RunRecord(directory).status == "waiting"  # the one that was refused leaves no mark
    holder.communicate(b"\n")
    assert train(config, directory).status == "done"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulation_equals_one_large_batch(overrides, precision):
    records = [
        run(
            overrides,
            f"trainer.accumulate={n}",
            f"trainer.precision={precision}",
            "model.capacity_factor=null",
            "model.balance.beta=0.1",
        )
        for n in (1, 2)
    ]
    one, two = (record.final()["val_loss"] for record in records)
    assert one == pytest.approx(two, abs=1e-5 if precision == "32-true" else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu(overrides):
    record = run(overrides, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "trainer.expert_timing=true")
    assert record.status == "done" and record.final()["peak_mem_gib"] > 0
