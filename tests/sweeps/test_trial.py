import errno
import subprocess
import sys
import time

import lightning.pytorch as pl
import pytest

from moepp.cli import main
from moepp.config import CONF, compose, save
from moepp.errors import DiskFull, RunError
from moepp.records import RunRecord
from moepp.sweeps import trial
from moepp.sweeps.leases import NO_LEASE
from moepp.training.run import freeze
from moepp.training.settings import RunConfig, run_directory

HOLD = """
import sys, time
from moepp.records import RunRecord
with RunRecord(sys.argv[1]).lock():
    print("locked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def config_file(overrides):
    """The frozen config of a trial of 12 steps, as its worker has written it."""
    config = freeze(compose(RunConfig, overrides))
    path = run_directory(config) / "config.yaml"
    save(config, path)
    return path


@pytest.fixture
def hold():
    """Starts a process that holds the lock of a record for some seconds."""
    started = []

    def hold(record, seconds):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(record.path), str(seconds)],
            cwd=CONF.parent, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_config_edited_before_the_trial_reads_it_is_not_trained(config_file):
    config_file.write_text(config_file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(RunError, match=r"config\.yaml was changed: it describes run \w+, not the one of its folder$"):
        trial.run_trial(config_file)
    assert RunRecord(config_file.parent).status == "waiting"


def test_a_full_disk_has_an_exit_code_of_its_own(config_file, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    assert main(["trial", str(config_file)]) == DiskFull.exit_code
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write the run record ") and error.endswith("No space left on device\n")


def test_a_takeover_waits_for_the_lock_that_a_lost_machine_has_left(config_file, hold, monkeypatch):
    record = RunRecord(config_file.parent)
    hold(record, 0.5)
    monkeypatch.setattr(trial, "end_without_lease", lambda: 10.0)
    trial.run_trial(config_file)
    assert record.status == "done"


def test_a_lock_that_stays_is_no_crash(tmp_path, hold, capsys):
    record = RunRecord(tmp_path)
    hold(record, 60)
    started = time.monotonic()
    with pytest.raises(SystemExit) as end:
        trial._wait_for_lock(record, 0.3)
    assert end.value.code == NO_LEASE and time.monotonic() - started > 0.3
    assert "is in use by process" in capsys.readouterr().err
