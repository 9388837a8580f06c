import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moepp.cli import main
from moepp.config import CONF, compose, save
from moepp.errors import Interrupted, RunError, UsageError
from moepp.records import RunRecord
from moepp.training import launch as launching
from moepp.training.launch import launch
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

TWO = ["strategy=ddp", "trainer.devices=2", "strategy.timeout_s=60"]


def children() -> list[int]:
    """Processes that this one started and that still run, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            arguments = (stat.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and b"trial" in arguments:
            found.append(int(stat.parent.name))
    return found


def frozen(overrides, *more):
    config = freeze(compose(RunConfig, [*overrides, *more]))
    return config, run_directory(config)


def at_step(record, step, act):
    """Calls `act` from another thread once the run has logged `step`."""

    def wait():
        while not any(line["step"] >= step for line in record.metrics()):
            time.sleep(0.02)
        act()

    threading.Thread(target=wait, daemon=True).start()


def losses(record):
    keys = ("train/loss", "train/grad_norm", "train/lr", "val/loss", "router/entropy", "final/val_loss")
    return [{key: line[key] for key in ("step", *keys) if key in line} for line in record.metrics()]


@pytest.fixture
def whole(overrides):
    """The run on one device."""
    return train(*frozen(overrides, "name=one"))


def test_two_devices_train_what_one_does_and_write_one_record(overrides, whole, capfd):
    assert main(["train", *overrides, "name=two", *TWO]) == 0
    directory = frozen(overrides, "name=two", *TWO)[1]
    assert directory.name == whole.path.name  # devices are no part of what a run is
    record = RunRecord(directory)
    assert record.status == "done" and not children()
    for ours, theirs in zip(losses(record), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    assert [path.name for path in record.checkpoints.iterdir()] == ["final.ckpt"]
    shown, errors = capfd.readouterr()
    assert shown.count("val_loss") == 1 and errors == ""


def test_a_stopped_launch_saves_and_continues_under_torchrun(overrides, whole):
    long = ["trainer.checkpoint_every=1000", "trainer.val_every=5"]
    config, directory = frozen(overrides, "name=stopped", *TWO, *long)
    record = RunRecord(directory)
    at_step(record, 4, lambda: os.kill(children()[-1], signal.SIGTERM))  # one rank alone: the others join it
    with pytest.raises(Interrupted, match="stopped; the same command continues from step"):
        train(config, directory)
    assert record.status == "started" and not children()
    (saved,) = record.checkpoints.iterdir()
    assert 4 <= int(saved.stem.removeprefix("step-")) < 12
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "run.py", "train",
        *overrides, "name=stopped", "strategy=ddp", *long,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run record:") == 1 and record.status == "done"
    for ours, theirs in zip(losses(record), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def test_a_killed_rank_ends_the_run_with_its_name(overrides):
    config, directory = frozen(overrides, "name=killed", *TWO, "trainer.steps=100000", "trainer.val_every=100000")
    record = RunRecord(directory)
    killed = []

    def kill():
        killed.append((time.monotonic(), os.kill(min(children()), signal.SIGKILL)))

    at_step(record, 6, kill)
    with pytest.raises(RunError, match=r"rank 0 of 2 .*SIGKILL.*the same command continues from step \d+") as caught:
        train(config, directory)
    assert time.monotonic() - killed[0][0] < 10 and not children()
    assert record.read("failed.json")["reason"] == str(caught.value)
    assert "rank 1 lost another rank" in (directory / "ranks" / "1.txt").read_text()


# What follows watches processes that only behave as ranks do, in a fraction of the time.
@pytest.fixture
def pretended(overrides, monkeypatch, tmp_path):
    """Launches two ranks that run the given lines of Python, with RANK, LOG and DONE set."""
    monkeypatch.setattr(launching, "SECONDS_TO_FOLLOW", 0.5)
    monkeypatch.setattr(launching, "POLL_SECONDS", 0.02)
    config, directory = frozen(overrides, *TWO)
    directory.mkdir(parents=True)
    save(config, directory / "config.yaml")

    def run(script, config=config):
        file = tmp_path / "rank.py"
        done = f"import os, sys, time, signal\nRANK, DONE = int(os.environ['RANK']), {str(directory / 'done')!r}\n"
        file.write_text(done + script)
        monkeypatch.setattr(launching, "RANK_COMMAND", (sys.executable, str(file), "trial"))
        begun = time.monotonic()
        try:
            launch(RunRecord(directory), config)
        finally:
            assert not children()
            assert time.monotonic() - begun < 50  # and not the 60 seconds that ranks sleep

    return run


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("time.sleep(RANK * 60)", RunError, "rank 0 of 2 left before the run was done, with exit code 0"),
        ("sys.exit('ValueError: a bug') if RANK else sys.exit(3)", RunError, "rank 1 .*code 1; ValueError: a bug"),
        ("sys.exit('error: the disk is full') if RANK else time.sleep(60)", RunError, "^the disk is full$"),
        ("time.sleep(60) if RANK else sys.exit(3)", RunError, r"rank 1 \(process \d+\) did not answer within"),
        ("os.kill(os.getpid(), signal.SIGSTOP) if RANK else sys.exit(3)", RunError, r"rank 1 \(.*did not answer"),
        ("sys.stderr.write('error: no such kernel'); sys.exit(2)", UsageError, "^no such kernel$"),
        ("sys.exit(130)", Interrupted, "stopped; the same command begins anew"),
    ],
)  # fmt: skip
def test_the_rank_that_failed_by_itself_is_named(pretended, script, error, message):
    with pytest.raises(error, match=message):
        pretended(script)


def test_a_finished_run_needs_no_exit_code(pretended):
    pretended("open(DONE, 'w').close(); time.sleep(60 * RANK)")


def test_sigterm_reaches_every_rank(pretended):
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(Interrupted, match="stopped"):
        pretended("signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); time.sleep(60)")
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_share_the_cores(pretended, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    config = compose(RunConfig, ["tracking=jsonl", *TWO])
    with pytest.raises(RunError, match="threads 3"):
        pretended("sys.exit('error: threads ' + os.environ['OMP_NUM_THREADS'])", config)


OTHER_NODE = """
import sys
from pathlib import Path
from moepp.config import load
from moepp.records import RunRecord
from moepp.training import launch
from moepp.training.settings import RunConfig

rank, config = sys.argv[1:]
launch.RANK_COMMAND, launch.SECONDS_TO_FOLLOW = (sys.executable, rank, "trial"), 0.1
launch.launch(RunRecord(Path(config).parent), load(RunConfig, Path(config)))
"""


def test_a_failure_on_another_node_arrives_with_its_reason(pretended, overrides, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config, directory = frozen(overrides, "strategy=ddp", "trainer.num_nodes=2")
    save(config, directory / "config.yaml")
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("NODE_RANK", "0")):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", OTHER_NODE, str(tmp_path / "rank.py"), str(directory / "config.yaml")]
    environment = {**os.environ, "NODE_RANK": "1", "PYTHONPATH": str(CONF.parent)}
    other = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    with pytest.raises(RunError, match=r"^node 1: rank 1 of 2 ended: exit code 1; ValueError: a bug .*begins anew$"):
        pretended("sys.exit('ValueError: a bug') if RANK else time.sleep(60)", config)
    assert other.wait(timeout=30) == 1
