import pytest
import torch

from moepp.benchmarks.cases import SETS, Case, RoutingSource, learned_like_routing
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, MoEConfig, ffn_share

CPU = torch.device("cpu")


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


def test_a_draw_is_limited_as_the_layer_limits_it_in_training():
    config = MoEConfig(dim=16, hidden=24, experts=SETS[8], balance=BalanceConfig(tau=0.25))
    draw = RoutingSource(0, CPU).draw(MoELayer(config, first=True), "learned", 400)
    load = torch.bincount(draw.routing.expert_TK.reshape(-1), minlength=13)
    capacity = 1.1 * 800 * 0.25 / (0.25 * 8 + 4)
    assert load[:8].max() <= capacity + 1 < torch.bincount(draw.chosen_TK.reshape(-1))[:8].max()
    assert draw.ffn_rows == load[:8].sum() and draw.ffn_share == draw.ffn_rows / 800
    torch.testing.assert_close(draw.counts.count_WKN.sum((0, 1)), load[:12])


def test_vanilla_moe_is_the_set_without_its_zero_computation_experts():
    assert (Case(64, None, "learned").counts.total, Case(64, 0.75, "learned").counts.total) == (64, 72)
