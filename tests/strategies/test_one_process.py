"""Strategies in this process: world size 1, refusals, names."""

import importlib
import multiprocessing
import os
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import scenarios
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from scenarios import STEPS, STRATEGIES, Scenario, SGDLanguageModel, run_scenario
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from moepp.errors import UsageError
from moepp.layers.dispatch import LocalDispatcher, SlotCounts
from moepp.layers.experts import FFNExperts
from moepp.layers.kernels.base import RoutedTokens
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.strategies import (
    ExpertParallelFSDPStrategy,
    ExpertParallelStrategy,
    MoEDDPStrategy,
    MoEFSDPStrategy,
    make_strategy,
)
from moepp.strategies.dispatch import AllToAllDispatcher, CountsOnTheWay, SharedBatchDispatcher
from moepp.strategies.groups import CopyGroups
from moepp.strategies.reduction import GradientReduction
from moepp.strategies.sharding import Sharding, dividing_dimension, slice_experts
from moepp.strategies.traffic import Traffic
from moepp.training import compiled
from moepp.training.settings import StrategyConfig


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


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_a_compiled_loss_trains_as_any_other(token_folder, tmp_path, one_process_group, monkeypatch, strategy):
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    one_layer = (str(token_folder), tmp_path, "cpu", "model.layers=1")
    wanted = run_scenario(Scenario(), *one_layer)
    found = run_scenario(Scenario(strategy=strategy), *one_layer, "trainer.compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(wanted["losses"]), rtol=0, atol=2e-6)
    assert found["validations"][-1] == pytest.approx(wanted["validations"][-1], abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "expert_parallel"])
def test_every_pass_through_ddp_has_an_input(token_folder, tmp_path, one_process_group, monkeypatch, strategy):
    """On a GPU it takes the first of those that it has moved there."""
    forward, seen = DistributedDataParallel.forward, []
    monkeypatch.setattr(
        DistributedDataParallel, "forward", lambda self, *inputs: seen.append(len(inputs)) or forward(self, *inputs)
    )
    run_scenario(Scenario(strategy=strategy), str(token_folder), tmp_path)
    assert seen and all(seen)


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


def import_strategies() -> None:
    """As in an interpreter that has loaded Lightning, and nothing of moepp."""
    StrategyRegistry.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "moepp"]:
        del sys.modules[name]
    importlib.import_module("moepp.strategies")
    assert {"moe_ddp", "moe_fsdp", "expert_parallel", "expert_parallel_fsdp"} <= set(StrategyRegistry)


def test_importing_the_package_registers_the_names():
    fresh = multiprocessing.get_context("fork").Process(target=import_strategies)
    fresh.start()
    fresh.join(60)
    assert fresh.exitcode == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_parallel_size": -1}, r"expert_parallel_size=-1 must not be negative"),
        ({"timeout_s": 0}, r"timeout_s=0 must be positive"),
        (
            {"name": "ddp", "reduce_every_micro_batch": True},
            r"strategy=ddp reduces gradients once .* leave strategy\.red",
        ),
        ({"name": "ddp", "shard_size": 2}, r"strategy=ddp has no groups that shard the weights: leave strategy\.shard"),
        ({"name": "expert_parallel_fsdp", "shard_size": 2}, r"no groups .* or strategy=expert_parallel, which divides"),
        ({"name": "ddp", "checkpoints_in_parts": True}, r"strategy=ddp holds whole weights .* leave strategy\.check"),
        ({"name": "ddp", "expert_parallel_size": 2}, r"strategy=ddp divides no experts: leave strategy\.expert"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StrategyConfig(**values)


def test_settings_make_the_strategy():
    assert make_strategy(StrategyConfig().name) == "auto"
    made = make_strategy("expert_parallel_fsdp", expert_parallel_size=4, timeout_s=60)
    assert type(made) is ExpertParallelFSDPStrategy
    assert made.expert_parallel_size == 4 and made._timeout.total_seconds() == 60


def test_devices_that_do_not_divide_into_groups_are_refused(one_process_group, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    with pytest.raises(UsageError, match=r"1 devices cannot be divided .* strategy\.expert_parallel_size=3"):
        CopyGroups.create(3, None)


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
    strategy._lightning_module = pl.LightningModule()
    strategy._lightning_module.automatic_optimization = automatic
    strategy._precision_plugin = SimpleNamespace(scaler=scaler)
    strategy.groups = SimpleNamespace(size=2, rank=0)
    with pytest.raises(UsageError, match=message):
        strategy.shard_experts(tiny(**decoder))


def test_a_clip_of_the_modules_own_is_refused():
    class Clipping(pl.LightningModule):
        def configure_gradient_clipping(self, *_):
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    strategy = ExpertParallelStrategy()
    strategy._lightning_module = Clipping()
    strategy.groups = SimpleNamespace(size=2, rank=0)
    with pytest.raises(UsageError, match="leave configure_gradient_clipping as it is"):
        strategy.shard_experts(tiny())


def test_parameters_of_the_module_itself_are_refused_where_they_would_drift_apart():
    module = pl.LightningModule()
    module.model, module.scale = tiny(), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UsageError, match="scale of LightningModule would drift apart"):
        MoEFSDPStrategy()._shard(module)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize(
    "callback", [StochasticWeightAveraging(0.1), EMAWeightAveraging()], ids=lambda c: type(c).__name__
)
def test_averages_of_divided_weights_are_refused_before_training(monkeypatch, callback, divided):
    strategy, module = ExpertParallelStrategy(), pl.LightningModule()
    module.model, module._trainer = tiny(), SimpleNamespace(callbacks=[callback])
    strategy._lightning_module = module
    strategy.groups, strategy.parallel_devices = None, [torch.device("cpu")]
    sharding = SimpleNamespace(is_sharded=lambda parameter: divided)
    monkeypatch.setattr("moepp.strategies.base.Sharding", lambda *_: sharding)
    refused = pytest.raises(UsageError, match=f"{type(callback).__name__} averages whole weights, and Expert")
    with refused if divided else nullcontext():
        strategy.take_parts(module)


class FrozenExperts(SGDLanguageModel):
    def configure_model(self):
        for layer in self.model.moe_layers():
            layer.ffn.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, weight_decay=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_experts_stay_as_they_are(token_folder, tmp_path, one_process_group, monkeypatch, strategy):
    monkeypatch.setattr(scenarios, "SGDLanguageModel", FrozenExperts)
    scenario = Scenario(strategy=strategy)
    run_scenario(scenario, str(token_folder), tmp_path)
    states = [torch.load(tmp_path / f"{scenario.name}{part}.ckpt")["state_dict"] for part in (".middle", "")]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed and not any(".ffn.w_" in name for name in changed)


def test_fsdp_trains_after_a_validation_in_inference_mode(token_folder, tmp_path, one_process_group, monkeypatch):
    # As on GPUs: with gloo Lightning validates without it.
    monkeypatch.setattr("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: False)
    points = ("cloze.points=2", f"trainer.steps={STEPS}", f"trainer.val_every={STEPS // 2}")
    found = run_scenario(Scenario(strategy="fsdp"), str(token_folder), tmp_path, "cpu", *points, first=validate)
    assert len(found["losses"]) == STEPS


def test_gathering_in_bfloat16_what_is_rounded_to_it_anyway_changes_no_digit(
    token_folder, tmp_path, one_process_group, monkeypatch
):
    seen, compute = set(), LocalDispatcher.compute
    monkeypatch.setattr(
        LocalDispatcher, "compute", lambda self, w_in, *others: (seen.add(w_in.dtype), compute(self, w_in, *others))[1]
    )
    scenario = Scenario(strategy="fsdp", precision="bf16-mixed", accumulate=2)
    narrow = run_scenario(scenario, str(token_folder), tmp_path)
    assert seen == {torch.bfloat16}  # as gathered
    monkeypatch.setattr(MoEFSDPStrategy, "_precision_of", lambda *_: MixedPrecisionPolicy(cast_forward_inputs=False))
    assert run_scenario(scenario, str(token_folder), tmp_path)["losses"] == narrow["losses"]
    assert seen == {torch.bfloat16, torch.float32}


def test_blocks_gather_their_neighbours(one_process_group, tmp_path, monkeypatch):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    asked = {"forward": [], "backward": []}
    for way, pairs in asked.items():
        set_one = getattr(FSDPModule, f"set_modules_to_{way}_prefetch")
        monkeypatch.setattr(
            FSDPModule,
            f"set_modules_to_{way}_prefetch",
            lambda part, parts, pairs=pairs, set_one=set_one: (pairs.append((part, parts)), set_one(part, parts))[1],
        )
    module, strategy = pl.LightningModule(), MoEFSDPStrategy()
    module.model = Decoder(DecoderConfig(dim=8, hidden=8, layers=3, heads=2, vocab_size=16), seed=0)
    strategy._lightning_module, strategy.parallel_devices = module, [torch.device("cpu")]
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    strategy._shard(module)
    first, second, third = module.model.blocks
    assert asked["forward"] == [(first, [second, second.ffn.ffn]), (second, [third, third.ffn.ffn])]
    assert asked["backward"] == [(second, [first, first.ffn.ffn]), (third, [second, second.ffn.ffn])]


@pytest.mark.parametrize(("reduce_every_micro_batch", "times"), [(False, 1), (True, 2)])
def test_fsdp_reduces_the_gradients_of_a_step_once(
    token_folder, tmp_path, one_process_group, monkeypatch, reduce_every_micro_batch, times
):
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    reduced, reduce = [], _fsdp_param_group.foreach_reduce
    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", lambda *args: (reduced.append(1), reduce(*args))[1])
    monkeypatch.setattr(
        scenarios, "make_strategy", partial(make_strategy, reduce_every_micro_batch=reduce_every_micro_batch)
    )
    run_scenario(Scenario(strategy="fsdp", accumulate=2), str(token_folder), tmp_path)
    parts = 5  # two blocks, the experts of each, and the rest
    assert len(reduced) == STEPS * parts * times


def validate(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> None:
    trainer.validate(module, data, verbose=False)


def test_parts_are_gathered_on_the_device_of_the_collectives(monkeypatch):
    """Lightning moves a finished module to the CPU, from which NCCL takes nothing."""
    bank, seen = FFNExperts(2, 8, 8), []
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "gather", lambda value, *_, group: seen.append(value.device.type))
    groups = SimpleNamespace(first=0, size=2, within=None)
    assert Sharding(bank, groups, torch.device("meta")).whole(bank.w_in, bank.w_in.detach()) is None
    assert seen == ["meta"]


def test_reductions_begin_in_one_order_whatever_order_gradients_come_in(monkeypatch):
    """Devices whose gradients come in other orders, or not at all, would otherwise wait for each other forever."""
    begun = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient, **_: (begun.append(gradient.clone()), mock.Mock())[1])
    first, second, third, frozen = (torch.nn.Parameter(torch.ones(1)) for _ in range(4))
    frozen.requires_grad_(False)
    last_pass = []
    groups = SimpleNamespace(size=2, across=None)
    reduction = GradientReduction([first, second, frozen, third], groups, due=lambda: bool(last_pass))
    for _ in range(2):  # steps
        last_pass.clear()
        (8 * third).backward()  # the first of two micro-batches
        last_pass.append(True)
        (4 * first).backward()
        assert begun == []  # the third comes first
        (8 * third).backward()
        assert begun == [4]
        reduction.finish()
        assert begun == [4, 0, 1] and [first.grad, second.grad, third.grad, frozen.grad] == [1, 0, 4, None]
        begun.clear()
        for parameter in (first, second, third):
            parameter.grad = None
    first.requires_grad_(False)  # by a callback, between two steps
    (4 * second + 8 * third).backward()
    reduction.finish()
    assert begun == [2, 1] and first.grad is None


def test_shared_counts_are_kept_until_they_have_left(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_gather", lambda *_, async_op: mock.Mock())
    count_KN = torch.ones(2, 3, dtype=torch.int64)
    counts = SharedBatchDispatcher().share(count_KN)
    counts.wait()
    assert counts.sent is count_KN and CountsOnTheWay(counts).counts is counts


def test_received_rows_are_not_counted_again(one_process_group, tmp_path, monkeypatch):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    bank, expert_TK = FFNExperts(4, 8, 8), torch.tensor([[0, 3], [5, 1], [3, 4]])
    torch.nn.init.normal_(bank.w_in), torch.nn.init.normal_(bank.w_out)
    tokens = RoutedTokens(torch.randn(3, 8), expert_TK, torch.rand(3, 2))
    wanted = bank(tokens)
    bank.dispatcher = AllToAllDispatcher("sorted", CopyGroups.create(0, None), Traffic())
    monkeypatch.setattr(torch, "bincount", None)  # which would wait for a GPU
    torch.testing.assert_close(bank(tokens), wanted)


def test_spawned_processes_are_refused():
    with pytest.raises(UsageError, match="cannot start processes by spawn"):
        ExpertParallelStrategy(start_method="spawn")


def test_traffic_counts_what_leaves_each_device():
    traffic = Traffic()
    # two devices, two experts on each: device 0 keeps 1 + 2 rows and sends 3 + 0; device 1 sends 4 + 0 and keeps 0 + 5
    sent = traffic.routed(torch.tensor([[1, 2, 3, 0], [4, 0, 0, 5]]), 2, slots=30)
    assert sent == 7
    rows = torch.zeros(3, 10, dtype=torch.bfloat16)
    traffic.sent(rows, sent)
    traffic.steps = 1
    metrics = traffic.read()
    assert metrics["ep/bytes_per_step"] == 7 * 10 * 2
    assert metrics["ep/rows_sent_share"] == pytest.approx(7 / 30)
    assert metrics["ep/device_load_max_over_mean"] == pytest.approx(8 / 7.5)
    assert traffic.read() == {}


def test_ended_exchanges_are_added_up_at_every_step():
    traffic, begin, end = Traffic(), mock.Mock(), mock.Mock()
    begin.elapsed_time.return_value, end.query.return_value = 5.0, True
    traffic.events.extend([(begin, end)] * 3 + [(begin, mock.Mock(**{"query.return_value": False}))])
    traffic.count_step()
    assert traffic.seconds == pytest.approx(0.015) and len(traffic.events) == 1
    traffic.layers = traffic.slots = 1
    assert traffic.read()["ep/all_to_all_ms"] == pytest.approx(20) and not traffic.events


@pytest.mark.parametrize(
    ("shape", "devices", "dimension"), [((8, 6), 4, 0), ((2, 6), 3, 1), ((2, 5, 8), 4, 2), ((2, 5), 4, 0)]
)
def test_experts_are_sharded_where_devices_divide_them(shape, devices, dimension):
    assert dividing_dimension(torch.Size(shape), devices) == dimension


def test_validation_passes_are_not_counted():
    traffic = Traffic()
    with torch.no_grad():
        traffic.routed(torch.tensor([[1, 0], [0, 1]]), 2, slots=4)
    with traffic.waiting(on_gpu=False, counted=False):
        pass
    assert (traffic.layers, traffic.bytes) == (0, 0)


def test_what_needs_no_counts_comes_before_the_wait_for_them(monkeypatch):
    layer, happened = tiny().train().moe_layers()[0], []
    pending, terms = SimpleNamespace(wait=lambda: happened.append("wait")), layer.zero_computation.terms
    monkeypatch.setattr(layer.ffn.dispatcher, "share", lambda count_KN: SlotCounts(count_KN[None], 0, pending))
    monkeypatch.setattr(layer.zero_computation, "terms", lambda *given: (happened.append("terms"), terms(*given))[1])
    assert layer.config.capacity_factor is not None
    layer(torch.randn(1, 4, 8))
    assert happened == ["terms", "wait"]
