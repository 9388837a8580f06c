"""Strategies in this process: world size 1, refusals, names."""

import os
import sys
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from scenarios import STRATEGIES, Scenario, run_scenario

from moepp.errors import UsageError
from moepp.layers.experts import FFNExperts
from moepp.models.decoder import Decoder, DecoderConfig
from moepp.strategies import (
    ExpertParallelFSDPStrategy,
    ExpertParallelStrategy,
    MoEDDPStrategy,
    MoEFSDPStrategy,
    make_strategy,
)
from moepp.strategies.groups import ExpertGroups
from moepp.strategies.settings import StrategyConfig
from moepp.strategies.sharding import slice_experts
from moepp.strategies.traffic import Traffic


@pytest.fixture
def one_process_group():
    """Leaves neither a process group nor the variables that Lightning sets for one."""
    with mock.patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_equals_no_strategy(token_folder, tmp_path, one_process_group, strategy):
    wanted = run_scenario(Scenario(), str(token_folder), tmp_path)
    found = run_scenario(Scenario(strategy=strategy), str(token_folder), tmp_path)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["sorted", "grouped"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_equals_no_strategy(token_folder, tmp_path, one_process_group, strategy, backend):
    more = ("gpu", f"model.backend={backend}")
    wanted = run_scenario(Scenario(precision="bf16-mixed"), str(token_folder), tmp_path, *more)
    found = run_scenario(Scenario(strategy=strategy, precision="bf16-mixed"), str(token_folder), tmp_path, *more)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("moe_ddp", MoEDDPStrategy),
        ("moe_fsdp", MoEFSDPStrategy),
        ("expert_parallel", ExpertParallelStrategy),
        ("expert_parallel_fsdp", ExpertParallelFSDPStrategy),
    ],
)
def test_names_work_in_any_trainer(name, strategy):
    trainer = pl.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False)
    assert type(trainer.strategy) is strategy
    assert trainer.strategy._timeout.total_seconds() == 600


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_parallel_size": -1}, r"expert_parallel_size=-1 must not be negative"),
        ({"timeout_s": 0}, r"timeout_s=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StrategyConfig(**values)


def test_settings_make_the_strategy():
    assert make_strategy(StrategyConfig()) == "auto"
    made = make_strategy(StrategyConfig("expert_parallel_fsdp", expert_parallel_size=4, timeout_s=60))
    assert type(made) is ExpertParallelFSDPStrategy
    assert made.expert_parallel_size == 4 and made._timeout.total_seconds() == 60


def test_devices_that_do_not_divide_into_groups_are_refused(one_process_group, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    with pytest.raises(UsageError, match=r"1 devices cannot be divided .* strategy\.expert_parallel_size=3"):
        ExpertGroups.create(3, None)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"experts\.ffn=4 cannot be divided among 3 devices"):
        slice_experts(FFNExperts(4, 8, 8), SimpleNamespace(size=3, rank=0))


def tiny(**changes) -> Decoder:
    return Decoder(DecoderConfig(dim=8, hidden=8, layers=1, heads=2, vocab_size=16, **changes), seed=0)


@pytest.mark.parametrize(
    ("decoder", "automatic", "scaler", "message"),
    [
        ({"moe_every": 0}, True, None, "needs a model with MoE layers"),
        ({}, False, None, "no manual optimization"),
        ({}, True, object(), "cannot scale a float16 loss.*bf16-mixed"),
    ],
    ids=["dense", "manual", "float16"],
)
def test_what_sharded_experts_cannot_do_is_refused(decoder, automatic, scaler, message):
    strategy = ExpertParallelStrategy()
    strategy._lightning_module = SimpleNamespace(automatic_optimization=automatic)
    strategy._precision_plugin = SimpleNamespace(scaler=scaler)
    strategy.groups = SimpleNamespace(size=2, rank=0)
    with pytest.raises(UsageError, match=message):
        strategy.shard_experts(tiny(**decoder))


def test_spawned_processes_are_refused():
    with pytest.raises(UsageError, match="cannot start processes by spawn"):
        ExpertParallelStrategy(start_method="spawn")


def test_deepspeed_needs_its_package_and_cuda(monkeypatch):
    monkeypatch.setattr("moepp.strategies.deepspeed.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install deepspeed"):
        make_strategy(StrategyConfig("deepspeed"))
    monkeypatch.setattr("moepp.strategies.deepspeed.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="needs CUDA devices"):
        make_strategy(StrategyConfig("deepspeed"))


def test_deepspeed_is_configured_for_whole_experts(monkeypatch):
    from lightning.pytorch.strategies import deepspeed

    monkeypatch.setattr("moepp.strategies.deepspeed.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_GREATER_EQUAL_0_16", True)
    monkeypatch.setitem(sys.modules, "deepspeed", mock.MagicMock())
    made = make_strategy(StrategyConfig("deepspeed", timeout_s=60))
    assert made.config["zero_optimization"]["stage"] == 2
    assert made._timeout.total_seconds() == 60


def test_traffic_counts_what_leaves_each_device():
    traffic = Traffic()
    # two devices, two experts on each: device 0 keeps 1 + 2 rows and sends 3 + 0; device 1 sends 4 + 0 and keeps 0 + 5
    sent = traffic.routed(torch.tensor([[1, 2, 3, 0], [4, 0, 0, 5]]), 2, slots=30)
    assert sent == 7
    rows = torch.zeros(3, 10, dtype=torch.bfloat16)
    with traffic.exchange(rows, sent, counted=True):
        pass
    traffic.steps = 1
    metrics = traffic.read()
    assert metrics["ep/bytes_per_step"] == 7 * 10 * 2
    assert metrics["ep/rows_sent_share"] == pytest.approx(7 / 30)
    assert metrics["ep/device_load_max_over_mean"] == pytest.approx(8 / 7.5)
    assert traffic.read() == {}


def test_validation_passes_are_not_counted():
    traffic = Traffic()
    with torch.no_grad():
        traffic.routed(torch.tensor([[1, 0], [0, 1]]), 2, slots=4)
    with traffic.exchange(torch.zeros(1, 4), 1, counted=False):
        pass
    assert (traffic.layers, traffic.bytes) == (0, 0)
