import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
from torch.distributed.launcher import LaunchConfig, elastic_launch

from moepp.cli import main
from moepp.config import compose, load, save
from moepp.errors import Interrupted, RunError, UsageError
from moepp.records import RunRecord
from moepp.training.module import LanguageModel
from moepp.training.ranks import launch as launching
from moepp.training.ranks.launch import launch_ranks
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
        number = int(stat.parent.name)
        if int(parent) == os.getpid() and state != "Z" and (b"trial" in arguments or number in forked.started):
            found.append(number)
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


def test_a_stopped_launch_saves_and_continues_under_torchrun_which_restarts_it(
    overrides, whole, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(launching, "start", forked.start)
    words = [*(w for w in overrides if "checkpoint_every" not in w), "trainer.checkpoint_every=1000", "name=stopped"]
    config, directory = frozen(words, *TWO)
    record = RunRecord(directory)
    at_step(record, 4, lambda: os.kill(children()[-1], signal.SIGTERM))  # one rank alone: the others join it
    with pytest.raises(Interrupted, match="stopped; the same command continues from step"):
        train(config, directory)
    assert record.status == "started" and not children()
    (saved,) = record.checkpoints.iterdir()
    assert 4 <= int(saved.stem.removeprefix("step-")) < 12
    step = LanguageModel.training_step

    def dying_step(module, tokens):
        if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(module, tokens)

    monkeypatch.setattr(LanguageModel, "training_step", dying_step)
    capfd.readouterr()
    # What torchrun does with a command it does with a function, which its ranks, then forks, need not load.
    elastic_launch(
        LaunchConfig(
            1, 1, nproc_per_node=2, max_restarts=1, run_id="stopped", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            start_method="fork",
        ),
        lambda: sys.exit(main(["train", *words, "strategy=ddp", "strategy.timeout_s=20"])),
    )()  # fmt: skip
    assert (tmp_path / "died").exists()
    # One of each attempt's rank 0.
    assert capfd.readouterr().out.count("run record:") == 2 and record.status == "done"
    for ours, theirs in zip(losses(record), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


def raise_a_bug():
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("strategy", "die", "message"),
    [
        ("ddp", lambda: os.kill(os.getpid(), signal.SIGKILL), "ended: killed by SIGKILL"),
        ("expert_parallel", raise_a_bug, r"ended: exit code 1; (\[rank1\]: )?ValueError: a bug"),
        ("expert_parallel", lambda: os._exit(0), "left before the run was done, with exit code 0"),
    ],
    ids=["killed", "a_bug", "left"],
)
def test_a_rank_that_dies_while_training_ends_the_run_with_its_name(overrides, monkeypatch, strategy, die, message):
    step = LanguageModel.training_step

    def dying_step(module, tokens):
        if module.global_step == 6 and os.environ["RANK"] == "1":
            die()
        return step(module, tokens)

    monkeypatch.setattr(LanguageModel, "training_step", dying_step)
    monkeypatch.setattr(launching, "start", forked.start)
    more = ["trainer.steps=100000", "trainer.val_every=100000"]
    config, directory = frozen(overrides, *TWO, f"strategy={strategy}", *more)
    record, times = RunRecord(directory), []
    at_step(record, 6, lambda: times.append(time.monotonic()))
    with pytest.raises(RunError, match=rf"rank 1 of 2 {message}.*the same command continues from step 4") as caught:
        train(config, directory)
    assert time.monotonic() - times[0] < 10 and not children()
    assert record.read("failed.json")["reason"] == str(caught.value)
    assert "rank 0 lost another rank" in (directory / "ranks" / "0.txt").read_text()


# What follows watches processes that only behave as ranks do, in a fraction of the time.
BEFORE = """
import os, signal, sys, time
RANK, DONE = int(os.environ['RANK']), {done!r}
def abort(reason):
    print(reason, file=sys.stderr, flush=True)
    os.abort()
"""


@pytest.fixture
def pretended(overrides, monkeypatch, tmp_path):
    """Launches two ranks that run the given lines of Python, with RANK, LOG and DONE set."""
    monkeypatch.setattr(launching, "SECONDS_TO_FOLLOW", 0.5)
    monkeypatch.setattr(launching, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(launching, "SECONDS_TO_LOOK", 0.2)
    config, directory = frozen(overrides, *TWO)
    directory.mkdir(parents=True)
    save(config, directory / "config.yaml")
    RunRecord(directory).log(1, {"final/val_loss": 1.0})

    def run(script, config=config):
        file = tmp_path / "rank.py"
        file.write_text(BEFORE.format(done=str(directory / "done")) + script)
        monkeypatch.setattr(launching, "RANK_COMMAND", (sys.executable, str(file), "trial"))
        begun = time.monotonic()
        try:
            launch_ranks(RunRecord(directory), config.trainer, config.strategy.timeout_s)
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
        ("time.sleep(60) if RANK else abort('ProcessGroupNCCL timeout')", RunError, "rank 1 .*did not answer"),
        ("time.sleep(60) if RANK else abort('double free')", RunError, "rank 0 of 2 .*SIGABRT; .*: double free"),
    ],
)  # fmt: skip
def test_the_rank_that_failed_by_itself_is_named(pretended, script, error, message):
    with pytest.raises(error, match=message):
        pretended(script)


def test_a_finished_run_needs_no_exit_code(pretended):
    pretended("open(DONE, 'w').close(); time.sleep(60 * RANK)")


def two_nodes(monkeypatch, node):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port)), ("NODE_RANK", str(node))):
        monkeypatch.setenv(name, value)


def test_another_nodes_file_system_may_show_the_end_late(pretended, overrides, monkeypatch):
    two_nodes(monkeypatch, 0)
    config, _ = frozen(overrides, "strategy=ddp", "trainer.num_nodes=2")
    pretended("if os.fork() == 0: time.sleep(1); open(DONE, 'w').close()", config)


def test_ranks_that_are_stopped_have_their_time_to_save(pretended, overrides):
    config, _ = frozen(overrides, *TWO, "trainer.stop_s=2")
    signals = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted, match="stopped"):
        pretended(signals, config)
    assert 3 <= time.monotonic() - begun < 20


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


TOGETHER = """
open(f"{DONE}.{RANK}", "w").close()
while not os.path.exists(f"{DONE}.{1 - RANK}"):
    time.sleep(0.05)
if RANK == FAILING:
    sys.exit("ValueError: a bug")
time.sleep(60)
"""


def other_node(script, config, said):
    """The starter of the second node, which `two_nodes` has told where the first is."""
    os.environ["NODE_RANK"] = "1"
    launching.RANK_COMMAND = (sys.executable, str(script), "trial")
    launching.SECONDS_TO_FOLLOW, launching.SECONDS_TO_LOOK = 0.1, 0.2
    loaded = load(RunConfig, config)
    try:
        launch_ranks(RunRecord(config.parent), loaded.trainer, loaded.strategy.timeout_s)
    except RunError as error:
        said.put(str(error))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_node_arrives_on_the_other_with_its_reason(
    pretended, overrides, monkeypatch, tmp_path, failing
):
    two_nodes(monkeypatch, 0)
    config, directory = frozen(overrides, "strategy=ddp", "trainer.num_nodes=2")
    save(config, directory / "config.yaml")
    forks = multiprocessing.get_context("fork")
    said = forks.SimpleQueue()
    other = forks.Process(target=other_node, args=(tmp_path / "rank.py", directory / "config.yaml", said))
    other.start()
    reason = rf"rank {failing} of 2 ended: exit code 1; ValueError: a bug .*begins anew$"
    with pytest.raises(RunError, match=rf"^node 1: {reason}" if failing else f"^{reason}"):
        pretended(f"FAILING = {failing}\n{TOGETHER}", config)
    other.join(30)
    assert other.exitcode == 0
    assert re.search(f"^{reason}" if failing else f"^node 0: {reason}", said.get())
