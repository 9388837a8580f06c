import os
import tempfile

import pytest

from moepp.sweeps import allocations
from moepp.sweeps.allocations import allocate
from moepp.training.settings import TrainerConfig

ask_for_gpus = allocations._gpus


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(allocations, "_gpus", lambda: [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def threads(found):
    return [allocation["OMP_NUM_THREADS"] for allocation in found]


def test_workers_share_the_cores():
    assert allocate(3, TrainerConfig()) == [{"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}] * 3


def test_without_gpus_there_is_one_worker_per_core():
    assert threads(allocate(0, TrainerConfig())) == ["1"] * 8


def test_a_worker_that_is_started_alone_has_all_cores_or_one_gpu_of_all(monkeypatch):
    assert threads(allocate(0, TrainerConfig(), one_share=True)) == ["8"]
    assert threads(allocate(0, TrainerConfig(devices=2), one_share=True)) == ["4"]
    monkeypatch.setattr(allocations, "_gpus", lambda: ["0", "1"])
    found = allocate(0, TrainerConfig(), one_share=True)
    assert [allocation["CUDA_VISIBLE_DEVICES"] for allocation in found] == ["0", "1"]


def test_processes_have_shares_of_their_own_while_they_last(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shares = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    with allocations.own_share(shares) as first:
        with allocations.own_share(shares) as second, allocations.own_share(shares) as third:
            assert [first, second, third] == [shares[:1], shares[1:], shares[:1]]
        with allocations.own_share(shares) as again:
            assert again == shares[1:]


def test_a_trial_of_several_processes_takes_several_cores():
    assert threads(allocate(0, TrainerConfig(devices=4))) == ["1"] * 2
    assert threads(allocate(1, TrainerConfig(devices=2))) == ["4"]


def test_threads_that_were_asked_for_stay(monkeypatch):
    assert allocate(2, TrainerConfig(threads=4)) == [{}, {}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert allocate(2, TrainerConfig()) == [{}, {}]


def test_each_worker_gets_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(allocations, "_gpus", lambda: ["0", "1", "2", "3"])

    def given(*arguments):
        return [allocation["CUDA_VISIBLE_DEVICES"] for allocation in allocate(*arguments)]

    assert given(0, TrainerConfig()) == ["0", "1", "2", "3"]
    assert given(0, TrainerConfig(devices=2)) == ["0,1", "2,3"]
    assert given(6, TrainerConfig()) == ["0", "1", "2", "3", "0", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in allocate(1, TrainerConfig(accelerator="cpu"))[0]


@pytest.mark.parametrize(("nodes", "gpus"), [(("null",), ["3", "5"]), (("no-such-node",), [])])
def test_torch_is_asked_for_gpus_where_a_driver_is(nodes, gpus, monkeypatch):
    monkeypatch.setattr(allocations, "GPU_NODES", nodes)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert ask_for_gpus() == gpus
