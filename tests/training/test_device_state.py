import pytest

from moepp.config import compose
from moepp.models.budget import parameters
from moepp.training.device_state import STATE_BYTES, DeviceState
from moepp.training.settings import RunConfig

SIZE = ["size=tiny", "model.experts.ffn=8", "model.layers=4"]


def state(strategy, devices, accumulate=1, precision="bf16-mixed", **options):
    words = [*SIZE, f"strategy={strategy}", f"trainer.devices={devices}", "data.batch_size=64"]
    config = compose(RunConfig, [*words, *(f"strategy.{key}={value}" for key, value in options.items())])
    return DeviceState(config.model, config.strategy, devices, accumulate, precision)


def test_whole_weights_are_held_by_every_device():
    single, ddp = state("single", 1).bytes(), state("ddp", 8).bytes()
    total = sum(parameters(state("ddp", 8).model).values())
    assert single == {"of weights, gradients and AdamW": STATE_BYTES * total}
    assert ddp == single | {"of DDP's buckets": 4 * total}


@pytest.mark.parametrize(("size", "share"), [(0, 8), (2, 2)])
def test_expert_parallel_divides_the_experts_alone(size, share):
    found = state("expert_parallel", 8, expert_parallel_size=size)
    part = parameters(found.model)
    rest = sum(part.values()) - part["ffn_experts"]
    assert found.bytes()["of weights, gradients and AdamW"] == STATE_BYTES * (rest + part["ffn_experts"] / share)
    assert found.bytes()["of DDP's buckets"] == 4 * rest


def test_fsdp_divides_all_and_gathers_what_it_computes_with():
    one, all_of_it = state("fsdp", 8), sum(parameters(state("fsdp", 8).model).values())
    assert one.bytes()["of weights, gradients and AdamW"] == STATE_BYTES * all_of_it / 8
    assert state("fsdp", 8, shard_size=4).bytes()["of weights, gradients and AdamW"] == STATE_BYTES * all_of_it / 4
    part = parameters(one.model)
    outside = part["embedding"] + part.get("head", 0)
    block = (2 * part["ffn_experts"] + 4 * (all_of_it - outside - part["ffn_experts"])) / 4  # of the four, in bytes
    assert one.bytes()["of gathered weights"] == 4 * outside + 2 * block  # the one at work and the next
    assert one.bytes()["of gathered weights"] < state("fsdp", 8, precision="32-true").bytes()["of gathered weights"]
    assert one.copied == ("attention",)


def test_gradients_of_several_micro_batches_are_whole_until_the_last():
    part = parameters(state("fsdp", 8).model)
    waits, reduces = state("fsdp", 8, accumulate=2), state("fsdp", 8, accumulate=2, reduce_every_micro_batch="true")
    assert waits.bytes()["of whole gradients"] == 4 * sum(part.values())
    at_once = state("fsdp", 8).bytes()["of whole gradients"]
    assert reduces.bytes()["of whole gradients"] == at_once < 2 * sum(part.values())


def test_experts_divided_first_are_gathered_in_parts():
    both = state("expert_parallel_fsdp", 8, expert_parallel_size=8).bytes()
    plain = state("fsdp", 8).bytes()
    assert both["of weights, gradients and AdamW"] == plain["of weights, gradients and AdamW"]
    assert both["of gathered weights"] < plain["of gathered weights"]
