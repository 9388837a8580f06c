"""Every strategy against one device, on CPU processes. The runs are those of scenarios.py, in two processes and in
four; their references are made in this process.
"""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
import torch
from scenarios import (
    FOUR_DEVICES,
    ONE_DEVICE,
    RESUMED,
    SHARDED_EXPERTS,
    STEPS,
    TWO_DEVICES,
    Scenario,
    after,
    in_processes,
    run_scenario,
)

from moepp.models.checkpoint_parts import metadata
from moepp.training.weights import read_checkpoint

RUNS = [(devices, s) for devices, runs in (("two", TWO_DEVICES), ("four", FOUR_DEVICES)) for s in runs]
RUNS += [("one", scenario) for scenario in ONE_DEVICE]
EQUAL = [pytest.param(d, s, id=f"{d}-{s.name}") for d, s in RUNS if not s.wrong_scale]
BEGUN = (Scenario(), Scenario(optimizer="adamw"))  # what others continue from its middle
SAVED = [s for s in TWO_DEVICES if s.reference in BEGUN and not s.resume and not s.wrong_scale]
EXCHANGES = [
    pytest.param(d, s, id=f"{d}-{s.name}")
    for d, s in RUNS
    if s.strategy.startswith("expert_parallel") and s.model != "recomputed"  # which routes twice
]


class Results:
    """What the scenarios left in their folder."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, devices: str, scenario: Scenario) -> dict:
        return json.loads((self.root / devices / f"{scenario.name}.json").read_text())

    def weights(self, devices: str, scenario: Scenario) -> dict[str, torch.Tensor]:
        return read_checkpoint(self.root / devices / f"{scenario.name}.ckpt")["state_dict"]

    def worst(self, devices: str, scenario: Scenario) -> tuple[float, float]:
        """Largest difference to one device in any loss, and in any weight."""
        losses, wanted = (torch.tensor(r["losses"]) for r in self.pair(devices, scenario))
        found, reference = self.weights(devices, scenario), self.weights("one", scenario.reference)
        assert list(found) == list(reference)
        weights = max(float((found[name] - reference[name]).abs().max()) for name in found)
        return float((losses - wanted[-len(losses) :]).abs().max()), weights

    def pair(self, devices: str, scenario: Scenario) -> tuple[dict, dict]:
        return self(devices, scenario), self("one", scenario.reference)


@pytest.fixture(scope="module")
def results(token_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("strategies")
    for folder in ("one", "two", "four"):
        (root / folder).mkdir()

    def here(scenario: Scenario) -> None:
        if not (root / "one" / f"{scenario.name}.json").exists():
            result = run_scenario(scenario, str(token_folder), root / "one")
            (root / "one" / f"{scenario.name}.json").write_text(json.dumps(result))

    for begun in BEGUN:
        here(begun)
    others = multiprocessing.get_context("fork").Process(target=in_processes, args=(str(token_folder), root))
    others.start()
    try:
        for _, scenario in RUNS:
            here(scenario.reference)
        others.join(600)  # three minutes on two busy cores
    finally:
        others.kill()
    assert others.exitcode == 0
    for scenario in ONE_DEVICE:
        here(scenario)
    return Results(root)


@pytest.mark.parametrize(("devices", "scenario"), EQUAL)
def test_losses_and_weights_are_those_of_one_device(results, devices, scenario):
    losses, weights = results.worst(devices, scenario)
    if scenario.precision == "bf16-mixed":
        assert losses < 2e-3
    else:
        assert losses < 2e-6 and weights < 5e-6


@pytest.mark.parametrize(("devices", "scenario"), EQUAL)
def test_routing_and_what_capacity_drops_are_counted_over_all_devices(results, devices, scenario):
    found, wanted = results.pair(devices, scenario)
    exact = scenario.precision == "32-true"
    for counted, reference in zip(found["routing"], wanted["routing"][-len(found["routing"]) :], strict=True):
        assert counted == pytest.approx(reference, rel=1e-5, abs=1e-7) if exact else counted.keys() == reference.keys()
        assert counted.get("dropped_ffn_share", 0) > 0.05 or "tight" not in scenario.model


def differences(found, wanted, where=""):
    """Where two checkpoints differ, numbers beyond 5e-6; Adam divides by small ones, so its moments are compared."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in found.keys() | wanted.keys():
            yield from differences(found.get(key), wanted.get(key), f"{where}/{key}")
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from differences(*pair, f"{where}/{index}")
    elif isinstance(wanted, (torch.Tensor, float)) and type(found) is type(wanted):
        if not torch.allclose(torch.as_tensor(found), torch.as_tensor(wanted), rtol=0, atol=5e-6):
            yield where, found, wanted
    elif found != wanted:
        yield where, found, wanted


@pytest.mark.parametrize("scenario", SAVED, ids=lambda s: s.name)
def test_a_checkpoint_is_the_one_of_one_device(results, scenario):
    found, wanted = (
        read_checkpoint(results.root / devices / f"{s.name}.middle.ckpt")
        for devices, s in (("two", scenario), ("one", scenario.reference))
    )
    for checkpoint in (found, wanted):
        del checkpoint["hyper_parameters"]["config"]["strategy"]  # how it was trained is no part of what was
    assert not list(differences(found, wanted))


def test_gradients_are_clipped_in_every_step(results):
    assert min(results("one", Scenario())["norms"]) > 0.3


@pytest.mark.parametrize(("devices", "scenario"), EQUAL)
def test_gradient_norms_and_validation_are_those_of_one_device(results, devices, scenario):
    found, wanted = results.pair(devices, scenario)
    tolerance = 5e-3 if scenario.precision == "bf16-mixed" else 1e-5
    assert found["norms"] == pytest.approx(wanted["norms"][-len(found["norms"]) :], abs=tolerance)
    if scenario.precision == "32-true":
        for metrics, reference in zip(
            found["validations"], wanted["validations"][-len(found["validations"]) :], strict=True
        ):
            assert metrics == pytest.approx(reference, abs=5e-6)


@pytest.mark.parametrize("scenario", [s for s in FOUR_DEVICES if s.model == "few_experts"], ids=lambda s: s.name)
def test_more_devices_than_experts_hold_equal_parts_of_them(results, scenario):
    layers, experts, width, hidden = 2, 2, 32, 48
    assert 4 * results("four", scenario)["least_held"] == layers * experts * 3 * width * hidden


@pytest.mark.parametrize("begun", RESUMED, ids=lambda s: s.name)
def test_a_resumed_run_equals_one_that_went_on_in_every_digit(results, begun):
    resumed = after("four", begun, begun.strategy, begun.expert_parallel_size)
    assert results("four", resumed)["losses"] == results("four", begun)["losses"][STEPS // 2 :]
    found, wanted = results.weights("four", resumed), results.weights("four", begun)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_trace_shows_that_experts_gradients_are_reduced_while_the_backward_pass_runs(results):
    (traced,) = (s for s in FOUR_DEVICES if s.traced)
    began = results("four", traced)["trace"]
    forward = [
        "zero_computation", "wait_for_counts", "dispatch", "shared_experts", "wait_for_rows", "ffn_experts", "combine",
    ]  # fmt: skip
    places = [began.index(name) for name in forward]
    assert places == sorted(places)
    backward = [name for name in began if name in ("EndExchangeBackward", "SiluBackward0", "BeginExchangeBackward")]
    combine, shared_and_dispatch = ["EndExchangeBackward", "BeginExchangeBackward"], backward[2:5]
    assert shared_and_dispatch == ["EndExchangeBackward", "SiluBackward0", "BeginExchangeBackward"]
    assert backward == 2 * (combine + shared_and_dispatch)
    reductions = [place for place, name in enumerate(began) if name == "gradient_reduction"]
    assert len(reductions) == 2 * 2  # layers, tensors of an expert
    assert reductions[1] < max(place for place, name in enumerate(began) if name == "BeginExchangeBackward")


def test_a_wrong_gradient_scale_is_seen(results):
    losses, weights = results.worst("two", next(s for s in TWO_DEVICES if s.wrong_scale))
    assert losses > 1e-4 and weights > 1e-3


@pytest.mark.parametrize("strategy", SHARDED_EXPERTS)
def test_experts_without_tokens_get_none(results, strategy):
    scenario = next(s for s in TWO_DEVICES if s.strategy == strategy and s.banned)
    assert results("two", scenario)["validations"][-1]["ffn_per_token"] < 0.75  # of one layer in two


@pytest.mark.parametrize(("devices", "scenario"), EXCHANGES)
def test_only_rows_of_ffn_experts_on_other_devices_cross(results, devices, scenario):
    found = results(devices, scenario)
    width, bytes_per_number = 32, 2 if scenario.precision == "bf16-mixed" else 4
    # To the expert and back, forward and backward; where a pass counts the load, half of the rows go forward alone.
    passes, reported = (4, 1) if scenario.accumulate == 1 else (3, 2 / 3)
    assert found["wire"] == found["remote"] * width * bytes_per_number * passes > 0
    steps = [metrics["ep/bytes_per_step"] for metrics in found["communication"] if metrics]
    assert sum(steps) == pytest.approx(found["wire"] * reported, rel=1e-12)


def test_moepp_sends_the_ffn_share_of_what_vanilla_moe_sends(results):
    moepp, vanilla = (results("two", Scenario(model, "expert_parallel")) for model in ("dropless", "vanilla"))
    slots = vanilla["local"] + vanilla["remote"]
    assert slots == STEPS * 2 * 8 * 32 * 2  # steps, layers, sequences, their length, top-k
    share = (moepp["local"] + moepp["remote"]) / slots
    assert share < 0.8
    assert moepp["wire"] / vanilla["wire"] == pytest.approx(share, rel=0.1)  # as far as half of all rows leave


def test_communication_is_reported_per_step(results):
    metrics = results("two", Scenario("dropless", "expert_parallel"))["communication"][-1]
    assert 0 < metrics["ep/rows_sent_share"] < 0.5
    assert 1 <= metrics["ep/device_load_max_over_mean"] <= 2
    assert metrics["ep/all_to_all_ms"] > 0
    assert results("two", Scenario(strategy="ddp"))["communication"][-1] == {}


@pytest.mark.parametrize("strategy", SHARDED_EXPERTS)
def test_rows_that_have_arrived_are_not_sent_again_where_blocks_are_recomputed(results, strategy):
    recomputed, kept = (results("two", Scenario(model, strategy)) for model in ("recomputed", "moepp"))
    assert recomputed["wire"] == kept["wire"] > 0


@pytest.mark.parametrize("strategy", ["fsdp", "expert_parallel"])
def test_every_device_writes_the_part_of_a_checkpoint_that_it_holds(results, strategy):
    folder = results.root / "two" / f"{Scenario(strategy=strategy, optimizer='adamw', in_parts=True).name}.middle.ckpt"
    found = metadata(folder)
    numbers = {
        (name, chunk.offsets): chunk.sizes.numel()
        for name, tensor in found.state_dict_metadata.items()
        for chunk in tensor.chunks
    }
    written = Counter()
    for index, where in found.storage_data.items():
        written[where.relative_path.split("_")[2]] += numbers[index.fqn, index.offset]
    whole = sum(value.numel() for value in read_checkpoint(folder)["state_dict"].values()) * 3  # with both moments
    assert sum(written.values()) == whole  # nothing twice
    # Half of what is divided, and of what every device holds whole tensors, each by one of them.
    assert sorted(written) == ["0", "1"] and max(written.values()) < 0.65 * whole
