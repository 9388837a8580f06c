"""The plan's bytes against those of the collectives that strategies call, and its advice."""

import pytest

from moepp.config import compose
from moepp.training.plan import BETWEEN_NODES, PlannedTraffic, alternatives, plan
from moepp.training.settings import RunConfig

EIGHT_NODES = ["recipe=s1", "size=7b", "trainer.devices=8", "trainer.num_nodes=8"]
EXPERTS, ALL = 7_247_757_312, 7_676_619_248


def traffic(*more) -> PlannedTraffic:
    return PlannedTraffic(compose(RunConfig, [*EIGHT_NODES, *more]))


def test_fsdp_gathers_ffn_matrices_in_bfloat16_and_reduces_once_in_a_step():
    passes = 8 + 8 + 8  # forward, backward, and the forward pass that counts the load
    bytes_sent = (passes * (2 * EXPERTS + 4 * (ALL - EXPERTS)) + 4 * ALL) * 63 / 64
    found = traffic("strategy=fsdp")
    assert (found.within, found.between) == (0, pytest.approx(bytes_sent))
    more = traffic("strategy=fsdp", "strategy.reduce_every_micro_batch=true").between - found.between
    assert more == pytest.approx(7 * 4 * ALL * 63 / 64)


def test_hybrid_sharding_gathers_within_nodes():
    found = traffic("strategy=fsdp", "strategy.shard_size=8")
    assert found.between == pytest.approx(2 * 4 * ALL / 8 * 7 / 8)
    assert found.within > 20 * found.between


def test_expert_parallel_sends_the_rows_of_ffn_experts():
    once = traffic("strategy=expert_parallel", "strategy.expert_parallel_size=8", "model.balance.over=global_batch")
    rows = 4 * 2048 * 1.5 * 24  # of a micro-batch on a device, all layers
    assert once.within == pytest.approx(8 * 4 * rows * 1536 * 2 * 7 / 8)
    dense, own = 2 * 4 * (ALL - EXPERTS) * 63 / 64, 2 * 4 * EXPERTS / 8 * 7 / 8
    assert once.between == pytest.approx(dense + own)


def test_the_plan_of_a_small_model_says_what_a_device_holds():
    lines = plan(compose(RunConfig, ["size=tiny", "trainer.devices=4", "strategy=ddp"]))
    assert any("strategy=ddp" in line and "; 0.033 GiB per device" in line for line in lines)


def test_the_plan_names_what_fits_and_sends_least_first():
    lines = plan(compose(RunConfig, [*EIGHT_NODES, "strategy=fsdp"]))
    first, *others = [line.strip() for line in lines[2:]]
    assert first.startswith("strategy=expert_parallel strategy.expert_parallel_size=8 ")
    (ddp,) = [line for line in others if line.startswith("strategy=ddp")]
    assert ddp.endswith("too much for 80 GB") and "too much" not in first
    assert plan(compose(RunConfig, ["size=7b"])) == []


def test_experts_stay_within_a_node_and_every_choice_can_be_typed():
    for words, config in alternatives(compose(RunConfig, [*EIGHT_NODES, "strategy=fsdp"])):
        assert compose(RunConfig, [*EIGHT_NODES, *words.split()]).strategy == config.strategy
    assert traffic("strategy=ddp").seconds == pytest.approx(2 * 4 * ALL * 63 / 64 / BETWEEN_NODES)
