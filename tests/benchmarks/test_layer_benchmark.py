import csv
import json
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moepp.benchmarks import peers
from moepp.benchmarks.layer import SETS, LayerBenchmark, learned_like_routing, run
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig, ffn_share

CPU = torch.device("cpu")


def make_layer(counts=SETS[8], dtype=torch.float64):
    layer = MoELayer(MoEConfig(dim=16, hidden=24, experts=counts, balance=BalanceConfig(tau=0.75)), first=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer.to(dtype)


def make_inputs(layer, tokens=96, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    routing = learned_like_routing(layer.config, tokens, generator, CPU)
    routing.gate_TK = routing.gate_TK.to(dtype)
    return torch.randn(tokens, 16, generator=generator, dtype=torch.float64).to(dtype), routing


@pytest.mark.parametrize("counts", [SETS[8], SETS[32], ExpertCounts(8, 0, 0, 0)], ids=str)
def test_the_reference_loop_computes_what_the_layer_does(counts):
    layer = make_layer(counts)
    x_TD, routing = make_inputs(layer)
    found, expected = peers.reference_loop(layer)(x_TD, routing), layer.expert_forward(x_TD, routing)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the package transformers")
@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
def test_the_transformers_path_computes_what_the_layer_does(kind):
    layer = make_layer(dtype=torch.float32)
    x_TD, routing = make_inputs(layer, dtype=torch.float32)
    found = peers.transformers_experts(kind)(layer)(x_TD, routing)
    torch.testing.assert_close(found, layer.expert_forward(x_TD, routing), rtol=1e-4, atol=1e-5)


def test_the_floor_is_the_products_of_the_ffn_rows_and_nothing_else():
    layer = make_layer(dtype=torch.float32)
    x_TD, routing = make_inputs(layer, tokens=640, dtype=torch.float32)
    counts = torch.bincount(routing.expert_TK.reshape(-1), minlength=12)[:8].tolist()
    rows = sum(max(64, 64 * round(count / 64)) for count in counts)
    with FlopCounterMode(display=False) as forward:
        y = peers.gemm_floor(layer)(x_TD.requires_grad_(), routing)
    with FlopCounterMode(display=False) as backward:
        y.backward()
    assert forward.get_total_flops() == 2 * rows * 3 * 16 * 24
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_learned_like_routing_is_new_every_time_uneven_and_near_its_target():
    config, generator = MoEConfig(experts=SETS[8], balance=BalanceConfig(tau=0.25)), torch.Generator().manual_seed(0)
    shares, spreads, seen = [], [], set()
    for _ in range(30):
        routing = learned_like_routing(config, 500, generator, CPU)
        assert (routing.expert_TK[:, 0] != routing.expert_TK[:, 1]).all()
        torch.testing.assert_close(routing.gate_TK.sum(-1), torch.ones(500))
        shares.append((routing.expert_TK < 8).float().mean().item())
        load = torch.bincount(routing.expert_TK.reshape(-1), minlength=12)[:8].float()
        spreads.append((load.max() / load.mean()).item())
        seen.add(tuple(routing.expert_TK.reshape(-1).tolist()))
    assert len(seen) == 30
    assert sum(shares) / 30 == pytest.approx(ffn_share(SETS[8], 0.25), abs=0.04)
    assert 1.2 < sum(spreads) / 30 < 2.2


def test_a_benchmark_writes_a_table_whose_ratios_are_those_of_its_times(tmp_path):
    benchmark = LayerBenchmark(tokens=64, dim=16, hidden=24, sets=[8], taus=[0.25, 1.0], repeats=2, warmup=0)
    rows = run(benchmark, tmp_path, progress=False)
    assert len(rows) == 4 * 2 * 3  # passes, routings, vanilla and two values of tau
    for row in rows:
        vanilla = next(
            r for r in rows
            if r["tau"] == "vanilla" and all(r[k] == row[k] for k in ("dtype", "direction", "routing"))
        )  # fmt: skip
        assert row["speedup"] == pytest.approx(vanilla["moepp_ms"] / row["moepp_ms"])
        assert row["over_floor"] == pytest.approx(row["moepp_ms"] / row["floor_ms"])
        assert row["moepp_min_ms"] <= row["moepp_ms"]
        if row["tau"] == "vanilla":
            assert row["zero_computation_share"] is None
        else:
            assert row["zero_computation_share"] == pytest.approx(row["zero_computation_ms"] / row["moepp_ms"])
        assert row["ideal_speedup"] == pytest.approx(1 / row["ffn_share"])
    assert {row["ffn_share"] for row in rows if row["tau"] == "vanilla"} == {1.0}
    balanced = [row for row in rows if row["routing"] == "balanced" and row["tau"] == 0.25]
    assert all(row["ffn_share"] == pytest.approx(row["target_share"], abs=0.07) for row in balanced)
    with open(tmp_path / "table.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["benchmark"]["tokens"] == 64 and provenance["hardware"]["cores"]
    report = (tmp_path / "report.md").read_text()
    assert report.count("\n| 8") == len(rows)
    assert [row["paper_speedup"] for row in rows[:3]] == [None, 1.927, 1.191]
