import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist

from moepp.cli import main
from moepp.config import compose
from moepp.errors import Interrupted, UsageError
from moepp.process import RANK_VARIABLES, STOP_SIGNALS
from moepp.training import machine
from moepp.training.ranks.rank import STARTER, Rank, from_rank_zero, largest, process_group
from moepp.training.settings import RunConfig, run_directory

TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "gpu[07-09,11],other",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*RANK_VARIABLES, *TORCHRUN, *SRUN, STARTER, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # remembered, so that what `here` sets is undone
        monkeypatch.delenv(name)


def environment(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_nobody_started_is_alone():
    rank = Rank.here()
    assert rank == Rank(0, 0, 1, 1, "") and rank.keeps_record(1)
    assert largest(7) == 7 and from_rank_zero("x") == "x"


def test_torchrun_is_recognised(monkeypatch):
    environment(monkeypatch, TORCHRUN)
    assert Rank.here() == Rank(3, 1, 4, 2, "torchrun")


def test_srun_is_recognised_and_told_to_torch_as_torchrun_would(monkeypatch):
    environment(monkeypatch, SRUN)
    assert Rank.here() == Rank(3, 1, 4, 2, "srun")
    import os

    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "19567")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["GROUP_RANK"]) == ("3", "4", "1")


def test_each_attempt_of_torchrun_meets_in_a_place_of_its_own(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "job"}
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment(monkeypatch, {**started, **agent, "TORCHELASTIC_RESTART_COUNT": "2"})
    with process_group(Rank.here(), 10.0, cuda=False):
        assert largest(7) == 7
    assert store.list_keys() and all(key.startswith("attempt-2/") for key in store.list_keys())


def test_a_rank_that_leaves_after_a_stop_is_not_killed_on_its_way(monkeypatch, tmp_path):
    """Slurm signals the others when one has left with another code than 0."""
    joined = {"init_method": f"file://{tmp_path / 'meeting'}", "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", partial(dist.init_process_group, **joined))
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(Interrupted), process_group(Rank(0, 0, 1, 1, "srun"), 60, cuda=False):
            raise Interrupted("stopped")
        assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}
    finally:
        dist.destroy_process_group()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_one_task_of_srun_is_alone(monkeypatch):
    environment(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"})
    assert Rank.here() == Rank()


def test_unequal_nodes_are_refused(monkeypatch):
    environment(monkeypatch, {**SRUN, "SLURM_STEP_NUM_TASKS": "3"})
    with pytest.raises(UsageError, match=r"3 tasks on 2 nodes; .*--ntasks-per-node"):
        Rank.here()


def test_devices_and_nodes_come_from_whoever_started_the_ranks(monkeypatch):
    environment(monkeypatch, TORCHRUN)
    rank, config = Rank.here(), compose(RunConfig, ["strategy=ddp"])
    spread = rank.spread(config)
    assert (spread.trainer.devices, spread.trainer.num_nodes) == (2, 2)
    assert run_directory(spread) == run_directory(config)
    assert rank.spread(spread) == spread
    with pytest.raises(UsageError, match=r"torchrun started 2 processes on each of 2 nodes, but trainer\.devices=4"):
        rank.spread(compose(RunConfig, ["strategy=ddp", "trainer.devices=4"]))
    with pytest.raises(UsageError, match=r"strategy=single .* strategy=ddp \(torchrun started 4 processes\)"):
        rank.spread(compose(RunConfig, []))


def test_of_all_processes_one_keeps_the_record(monkeypatch):
    config = compose(RunConfig, ["strategy=ddp", "trainer.num_nodes=2"])
    assert Rank(0, 0, 4, 2, "torchrun").keeps_record(config.trainer.num_nodes)
    assert not Rank(1, 1, 4, 2, "torchrun").keeps_record(config.trainer.num_nodes)
    assert not Rank(0, 0, 4, 2, "launch").keeps_record(config.trainer.num_nodes)  # its starter does
    monkeypatch.setenv("NODE_RANK", "1")
    assert not Rank().keeps_record(config.trainer.num_nodes)  # the starter of the second node
    assert Rank().keeps_record(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=2"], "strategy=single trains on one device, not on trainer.devices=2"),
        (["trainer.num_nodes=2"], "choose another, such as strategy=ddp"),
        (["trainer.devices=0"], "trainer.devices=0 must be at least 1"),
        (["strategy=ddp", "trainer.devices=3"], "data.batch_size=4 cannot be divided among 3 devices"),
        (["strategy=ddp", "trainer.num_nodes=2", "trainer.accumulate=4"], "use a multiple of 8"),
        (
            ["strategy=expert_parallel", "model.ffn_rows=1.4"],
            "computes the rows that arrive, however many: leave model.ffn_rows",
        ),
        (["strategy=dpp"], "strategy=dpp: no such fragment; choose from"),
        (["strategy.timeout=3"], "unknown key strategy.timeout; did you mean strategy.timeout_s?"),
    ],
    ids=str,
)
def test_impossible_combinations_are_refused_in_one_line(overrides, message, capsys):
    assert main(["train", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_devices_that_do_not_exist_are_refused(overrides, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    words = [word for word in overrides if not word.startswith("trainer.accelerator=")]
    assert main(["train", *words, "trainer.accelerator=gpu"]) == 2
    assert "no GPU is visible; use cpu or auto" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "uses_gpus", lambda _: True)
    assert main(["train", *overrides, "strategy=ddp", "trainer.devices=2"]) == 2
    assert "trainer.devices=2, but 1 GPUs are visible" in capsys.readouterr().err


def test_several_nodes_need_to_know_each_other(overrides, capsys):
    assert main(["train", *overrides, "strategy=ddp", "trainer.num_nodes=2"]) == 2
    assert "MASTER_ADDR and MASTER_PORT (of the first) and NODE_RANK" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "RANK= is no number"),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK=x is no number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_NODES= is no number"),
        ({"SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS=four is no number"),
    ],
)
def test_what_another_launcher_left_behind_is_named(variables, missing, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=missing):
        Rank.here()


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "")
    assert Rank.here() == Rank()
