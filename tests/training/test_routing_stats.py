from dataclasses import replace

import pytest
import torch

from moepp.config import compose
from moepp.layers.moe import MoEStats
from moepp.layers.settings import ExpertCounts, MoEConfig
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.routing_stats import RoutingStatistics
from moepp.training.settings import RunConfig

CONFIG = MoEConfig(experts=ExpertCounts(ffn=2, zero=1, copy=1, constant=0))


def layer(chosen, tokens=10, dropped=0, dropped_ffn=0, recomputed=0):
    zero, logits = torch.zeros(()), torch.zeros(tokens, 4)
    counts = (torch.tensor(value) for value in (chosen, dropped, dropped_ffn, recomputed))
    return MoEStats(logits, zero, *counts, torch.tensor(0.5), zero, logits)


def test_ffn_experts_per_token_are_counted_over_batches_and_layers():
    statistics = RoutingStatistics(CONFIG)
    statistics.update([layer([5, 5, 4, 6]), layer([10, 8, 1, 1])])
    statistics.update([layer([7, 3, 5, 5], dropped=3), layer([10, 10, 0, 0])])
    found = {name: value.item() for name, value in statistics.compute().items()}
    assert found["ffn_per_token"] == pytest.approx((20 / 20 + 38 / 20) / 2)
    assert found["ffn_share"] == pytest.approx((20 / 40 + 38 / 40) / 2)
    assert found["zero_share"] == pytest.approx((11 / 40 + 1 / 40) / 2)
    assert found["load_max_over_mean"] == pytest.approx((12 / 10 + 20 / 19) / 2)
    assert found["dropped_share"] == pytest.approx(3 / 80) and found["entropy"] == pytest.approx(0.5)


def test_ffn_experts_per_token_do_not_need_a_fixed_number_of_slots():
    statistics = RoutingStatistics(CONFIG)
    statistics.update([layer([3, 1, 0, 0]), layer([0, 0, 0, 0])])  # the second layer used no slot at all
    found = statistics.compute()
    assert found["ffn_per_token"].item() == pytest.approx((0.4 + 0.0) / 2)
    assert all(torch.isfinite(value) for value in found.values())


def test_a_model_without_moe_layers_routes_nothing(tmp_path):
    statistics = RoutingStatistics(CONFIG)
    statistics.update([])
    assert {name: value.item() for name, value in statistics.compute().items()} == {"ffn_per_token": 0, "entropy": 0}
    statistics.write_table(tmp_path / "load.csv")
    assert (tmp_path / "load.csv").read_text().split() == ["layer,expert,kind,share"]


def test_slots_beyond_the_kept_rows_are_counted_where_rows_are_limited():
    statistics = RoutingStatistics(replace(CONFIG, ffn_rows=0.5))
    statistics.update([layer([5, 5, 4, 6], recomputed=5), layer([10, 8, 1, 1], recomputed=13)])
    assert statistics.compute()["recomputed_share"] == pytest.approx(18 / 28)  # of the slots of FFN experts
    assert "recomputed_share" not in RoutingStatistics(CONFIG).compute()


def test_validation_keeps_no_rows_and_so_computes_none_again():
    model = Decoder(DecoderConfig(dim=16, hidden=8, layers=2, heads=2, vocab_size=9, ffn_rows=0.1))
    ids_BS = torch.arange(8)[None]
    for training, again in ((False, False), (True, True)):
        statistics = RoutingStatistics(model.config)
        statistics.update(model.train(training)(ids_BS).stats)
        assert bool(statistics.compute()["recomputed_share"] > 0) == again


TAUS = "model.per_layer={balance: {tau: [0.1, 0.5, 0.75, 1.0]}}"


@pytest.mark.parametrize(
    "more",
    [
        ["model=vanilla"],
        ["model=vanilla", "model.capacity_over=sequence"],
        [],
        ["model.capacity_over=sequence"],
        ["model.capacity_factor=0.8"],
        [TAUS],
    ],
    ids=str,
)
def test_dropped_ffn_slots_are_those_that_experts_do_not_compute(more):
    """Of two batches, by the rows that the FFN experts get."""
    config = compose(RunConfig, ["size=tiny", *more]).model
    model, statistics, rows = Decoder(config, seed=0), RoutingStatistics(config), []
    for layer in model.moe_layers():
        layer.ffn.register_forward_pre_hook(
            lambda ffn, inputs: rows.append(int((inputs[0].expert_TK < config.experts.ffn).sum()))
        )
    for ids_BS in torch.randint(0, 2048, (2, 4, 128), generator=torch.Generator().manual_seed(0)):
        statistics.update(model(ids_BS).stats)
    found = statistics.compute()
    computed = found["ffn_per_token"] * (1 - found["dropped_ffn_share"])
    assert float(computed) == pytest.approx(sum(rows) / (4 * 2 * 512)) and found["dropped_ffn_share"] > 0.01
    if "model=vanilla" in more:
        assert found["dropped_ffn_share"] == found["dropped_share"]


def test_dropped_ffn_slots_are_a_share_of_the_ffn_slots_and_absent_without_a_capacity():
    statistics = RoutingStatistics(CONFIG)
    statistics.update([layer([5, 5, 5, 5], dropped=4, dropped_ffn=2)])
    assert statistics.compute()["dropped_ffn_share"] == pytest.approx(4 * 0.5 / 10)
    assert "dropped_ffn_share" not in RoutingStatistics(replace(CONFIG, capacity_factor=None)).compute()
