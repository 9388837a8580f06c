"""What a sweep must survive: each fault ends with one line or is passed over, and what was computed is kept."""

import dataclasses
import errno
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import run_fake_sweep
from mlflow import MlflowClient
from run_fake_sweep import FAKE_TRIAL, sweep

from moepp.config import compose
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, UnreadableRecord, read_json
from moepp.sweeps.plan import read_plan
from moepp.sweeps.runner import run_sweep
from moepp.sweeps.status import read_status
from moepp.tracking.mirror import FolderMirror, sync_all
from moepp.tracking.settings import TrackingConfig
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("moepp.data.prepare.prepare", run_fake_sweep.no_preparation)
    return tmp_path / "runs"


def run(runs, toy=None):
    return run_sweep(toy or sweep(), "smoke", 1, [f"runs={runs}"], progress=False, command=FAKE_TRIAL)


def records(directory):
    return {
        trial["arm"]: RunRecord(directory / trial["path"]) for trial in read_json(directory / "sweep.json")["trials"]
    }


def losses(record):
    return [(line["step"], line.get("train/loss"), line.get("val/loss")) for line in record.metrics()]


@contextmanager
def files_end_at(size):
    """No file can grow beyond `size` bytes: what a full disk does to one that is being written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_at_the_second_checkpoint(monkeypatch):
    real, calls = pl.Trainer.save_checkpoint, []

    def save(self, *arguments, **options):
        calls.append(1)
        with files_end_at(4096 if len(calls) == 2 else resource.RLIM_INFINITY):
            real(self, *arguments, **options)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", save)


def full_within_a_line_of_metrics(monkeypatch):
    real = RunRecord.log

    def log(self, step, metrics):
        if step < 6:
            return real(self, step, metrics)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "ti')
        raise NO_SPACE

    monkeypatch.setattr(RunRecord, "log", log)


@pytest.mark.parametrize("fault", [full_at_the_second_checkpoint, full_within_a_line_of_metrics])
def test_a_disk_that_fills_up_costs_the_steps_since_the_last_checkpoint(overrides, monkeypatch, fault):
    config = freeze(compose(RunConfig, overrides))
    directory = run_directory(config)
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(RunError, match=r"cannot write the run record .*(too large|No space left)") as error:
            train(config, directory)
    assert "\n" not in str(error.value)
    record = RunRecord(directory)
    assert record.status == "started"
    assert [path.name for path in record.checkpoints.iterdir()] == ["step-00000004.ckpt"]
    train(config, directory)
    whole = freeze(compose(RunConfig, [*overrides, "name=whole"]))
    assert losses(record) == losses(train(whole, run_directory(whole)))


def test_a_disk_too_full_for_a_lease_ends_the_worker_in_one_line(runs, monkeypatch):
    directory = run(runs)
    for record in records(directory).values():
        (record.path / "done").unlink()

    def full(*_):
        raise NO_SPACE

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(RunError, match=r"cannot write .* \(No space left on device\); the same command continues"):
            run(runs)
    assert not list(directory.glob("*/leases/.*"))
    run(runs)
    assert {record.status for record in records(directory).values()} == {"done"}


def test_what_shutil_says_of_many_files_is_one_line(runs, monkeypatch):
    def full(trials):
        raise shutil.Error([("a/final.ckpt", "b/final.ckpt", "No space left on device"), ("c", "d", "e")])

    monkeypatch.setattr("moepp.sweeps.runner.share_finished_runs", full)
    with pytest.raises(RunError, match=r"toy-smoke \(a/final.ckpt: No space left on device\); the same command"):
        run(runs)


@pytest.fixture
def read_only(runs):
    """Makes a copy of a folder that this process can read and not write, root or not."""
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to all but their owner
    place.chmod(0o755)
    user = os.geteuid()

    def make(folder):
        copy = shutil.copytree(folder, place / folder.name)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if user == 0:
            os.seteuid(65534)
        return copy

    yield make
    os.seteuid(user)
    for path in (place, *(path for path in place.rglob("*") if path.is_dir())):
        path.chmod(0o755)
    shutil.rmtree(place)


def test_a_finished_sweep_can_be_read_where_nothing_can_be_written(runs, read_only):
    run(runs)
    copy = read_only(runs)
    assert run(copy) == run(copy, sweep(top1=["model.top_k=1"])) == copy / "toy-smoke"
    assert read_status(copy / "toy-smoke", read_plan(copy / "toy-smoke")).count("done") == 2


def test_an_unfinished_sweep_that_cannot_be_written_is_one_line(runs, read_only):
    directory = run(runs)
    next(directory.glob("*/done")).unlink()
    copy = read_only(runs)
    with pytest.raises(RunError, match=r"cannot write .*leases.* \(Permission denied\); the same command") as error:
        run(copy)
    assert "\n" not in str(error.value)


def test_a_config_edited_under_a_running_sweep_is_put_right(runs):
    directory = run(runs)
    done, edited = records(directory).values()
    before = edited.read("config.yaml")
    (edited.path / "done").unlink()
    for text in ("model: {top_k: 7}\n", "model: [\n", ""):
        (edited.path / "config.yaml").write_text(text)
        (edited.path / "done").unlink(missing_ok=True)
        run(runs)
        assert edited.read("config.yaml") == before and edited.status == "done"
    assert len((done.path / "attempts").read_text().splitlines()) == 1


def test_two_sweeps_of_one_name_are_kept_apart(runs):
    directory = run(runs)
    before = (directory / "sweep.json").read_text()
    other = sweep(wide=["model.hidden=64"], narrow=["model.hidden=16"])
    with pytest.raises(UsageError, match=r"holds another sweep of the same name \(Which\?\); rename one") as error:
        run(runs, other)
    assert "\n" not in str(error.value)
    assert (directory / "sweep.json").read_text() == before
    for change in ({"baseline": "top2"}, {"match": "none"}):
        other = dataclasses.replace(sweep(), **change)
        [(key, value)] = change.items()
        with pytest.raises(UsageError, match=rf"another sweep of the same name \({key}: \w+, not {value}\); rename"):
            run(runs, other)
    shares_an_arm = {"top1": ["model.top_k=1"], "wide": ["model.hidden=64"]}
    with pytest.raises(UsageError, match=r"another sweep of the same name \(Which\?\); rename"):
        run(runs, dataclasses.replace(sweep(**shares_an_arm), question="How wide?"))
    assert (directory / "sweep.json").read_text() == before
    run(runs, dataclasses.replace(sweep(), question="Which one?"))  # only worded anew
    with pytest.raises(UsageError, match="other settings of arm top1"):
        run(runs, sweep(top1=["model.top_k=1", "model.hidden=64"]))


DAMAGE = {
    "metrics.jsonl": b'{"step": 1, "time": 0}\n{"step": 2, "ti\n{"step": 3, "time": 0}\n',
    "config.yaml": b"model: [\n",
    "provenance.json": b"\xff\x00",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_record_that_cannot_be_read_does_not_keep_others_from_the_tracker(runs, name):
    directory = run(runs, sweep(**{arm: [f"model.hidden={size}"] for arm, size in (("a", 8), ("b", 16), ("c", 24))}))
    damaged = sorted(directory.glob("*/config.yaml"))[0].parent
    (damaged / name).write_bytes(DAMAGE[name])
    tracking = TrackingConfig(uri=f"sqlite:///{runs}/mlflow.db")
    with pytest.raises(UnreadableRecord, match=rf"{damaged.name}/{name} cannot be read"):
        FolderMirror(directory, tracking, runs).sync()
    with pytest.raises(UnreadableRecord) as error:
        sync_all(runs, tracking)
    assert "\n" not in str(error.value)
    client = MlflowClient(tracking_uri=tracking.uri)
    mirrored = [path for path in directory.glob("*/mlflow.json") if path.parent != damaged]
    statuses = [client.get_run(read_json(path)["run_id"]).info.status for path in mirrored]
    assert statuses == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize("name", ["crashes.json", "attempt.json", "failed.json"])
def test_a_trial_whose_books_cannot_be_read_fails_alone_until_it_is_forgiven(runs, name):
    directory = run(runs)
    damaged, other = records(directory).values()
    for record in (damaged, other):
        (record.path / "done").unlink()
    (damaged.path / name).write_text('{"from": ')
    with pytest.raises(RunError, match=rf"1 of 2 trials failed.*top1 s0: .*{name} cannot be read") as error:
        run(runs)
    assert "\n" not in str(error.value) and other.status == "done"
    [failed] = [t for t in read_status(directory, read_plan(directory)).trials if t.state == "failed"]
    assert failed.label == "top1 s0" and f"{name} cannot be read" in failed.note
    damaged.forgive()
    run(runs)
    assert damaged.status == "done"


def test_a_trial_whose_metrics_cannot_be_read_fails_alone(runs):
    directory = run(runs)
    damaged, other = records(directory).values()
    for record in (damaged, other):
        (record.path / "done").unlink()
    (damaged.path / "metrics.jsonl").write_bytes(DAMAGE["metrics.jsonl"])
    with pytest.raises(RunError, match=r"1 of 2 trials failed.*top1 s0: .*cannot be read; remove the line"):
        run(runs)
    assert other.status == "done"
    [failed] = [t for t in read_status(directory, read_plan(directory)).trials if t.state == "failed"]
    assert failed.label == "top1 s0" and "cannot be read" in failed.note
