"""Layers that differ from one another: dense ones at the start, and values of their own."""

import pytest
import torch

from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.models.budget import active_parameters, expected_ffn_per_token, forward_flops, parameters
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.routing_stats import RoutingStatistics

SIZES = {"dim": 16, "hidden": 12, "layers": 4, "heads": 2, "vocab_size": 32, "capacity_factor": None}
UNEQUAL = {"experts": {"ffn": [2, 8, 5], "zero": [1, 0, 1]}, "balance": {"tau": [0.25, 0.5, 1.0]}}
APART = {**SIZES, "dense_first": 1, "gating_residual": False, "per_layer": UNEQUAL}
FORMS = [
    {"dense_first": 2},
    {"dense_first": 2, "moe_every": 2},
    APART,
    {"per_layer": {"experts": {"ffn": [8, 7, 6, 5], "constant": [1, 2, 3, 4]}}, "experts": ExpertCounts(constant=4)},
    {"experts": ExpertCounts(others={"scaled_copy": 2, "vector": 3})},
    {"selection": "sigmoid", "gate": "renormalized"},
]


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_the_budget_counts_what_the_model_has(changes):
    config = DecoderConfig(**{**SIZES, **changes})
    with torch.device("meta"):
        model = Decoder(config, None)
    counted = parameters(config)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    layers = model.moe_layers()
    one = 3 * config.dim * config.hidden
    assert counted["ffn_experts"] == one * sum(layer.config.experts.ffn for layer in layers)
    used = 1.5
    assert forward_flops(config, 8, used)["ffn_experts"] == pytest.approx(2 * one * used * len(layers))
    idle = sum(layer.config.experts.ffn for layer in layers) - used * len(layers)
    assert active_parameters(config, used) == pytest.approx(sum(counted.values()) - one * idle, abs=1)


@pytest.mark.parametrize("every", [1, 2])
def test_the_first_blocks_may_be_dense(every):
    config = DecoderConfig(**{**SIZES, "layers": 6, "moe_every": every, "dense_first": 3})
    assert config.moe_blocks == ([3, 4, 5] if every == 1 else [3, 5])
    model = Decoder(config)
    assert [isinstance(block.ffn, MoELayer) for block in model.blocks] == [b in config.moe_blocks for b in range(6)]
    first, *others = model.moe_layers()
    assert first.router.residual is None and all(layer.router.residual is not None for layer in others)


def test_layers_have_their_own_counts_and_tau():
    config = DecoderConfig(**APART, balance=BalanceConfig(form="paper", control="loss_free"))
    model, ids = Decoder(config).double(), torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    stats = model(ids).stats
    assert [layer.config.experts.ffn for layer in model.moe_layers()] == [2, 8, 5]
    statistics = RoutingStatistics(config)
    statistics.update(stats)
    assert statistics.chosen_LN.sum(1).tolist() == [36] * 3
    assert (
        not statistics.chosen_LN[0, 2:8].any() and not statistics.chosen_LN[1, -1].any()
    )  # experts that are not there
    for layer, own, tau in zip(stats, model.moe_layers(), [0.25, 0.5, 1.0], strict=True):
        probs_TN, counts = layer.logits_TN.softmax(-1), own.config.experts
        eta = [1.0] * counts.ffn + [tau] * counts.zero_computation
        chosen = own.own_counts(layer.chosen_N)
        expected = sum(e * int(c) / 18 * p for e, c, p in zip(eta, chosen, probs_TN.mean(0), strict=True))
        torch.testing.assert_close(layer.balance_loss, expected)
    model.step_control(statistics.chosen_LN, 18)
    assert all(layer.control.bias_N.any() for layer in model.moe_layers())


def test_the_expected_compute_is_the_mean_of_the_layers():
    config = DecoderConfig(**APART)
    shares = [0.25 * 2 / (0.25 * 2 + 4), 0.5 * 8 / (0.5 * 8 + 3), 5 / (5 + 4)]
    assert expected_ffn_per_token(config) == pytest.approx(2 * sum(shares) / 3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dense_first": 4}, "dense_first=4 leaves none of layers=4"),
        ({"per_layer": {"balance": {"tau": [0.5]}}}, r"per_layer.balance.tau=\[0.5\] must list 4 values"),
        ({"per_layer": {"balance": {"tau": [0.5, 0.5, 0.5, 1.5]}}}, "balance.tau=1.5"),
        ({"per_layer": {"balance": {"beta": [1, 1, 1, 1]}}}, "per_layer.balance.beta: choose from tau"),
        ({"per_layer": {"balance": {"tau": ["a", 1, 1, 1]}}}, "per_layer.balance.tau: a is no float"),
        ({"per_layer": {"optim": {}}}, "per_layer.optim: choose from experts and balance"),
        ({"per_layer": {"experts": {"ffn": [9, 8, 8, 8]}}}, "must not exceed experts.ffn=8"),
        ({"per_layer": {"experts": {"ffn": [7, 8, 8, 8]}}}, "set gating_residual=false"),
    ],
    ids=str,
)
def test_values_that_fit_no_layer_are_refused_in_one_line(changes, line):
    with pytest.raises(ValueError, match=line) as error:
        DecoderConfig(**SIZES, **changes)
    assert "\n" not in str(error.value)


def test_a_residual_begins_as_the_identity_in_a_model_too():
    model = Decoder(DecoderConfig(**SIZES, residual_init="identity", experts=ExpertCounts(others={"scaled_copy": 1})))
    eye = torch.eye(13)
    assert all(torch.equal(layer.router.residual, eye) for layer in model.moe_layers()[1:])
    assert all(layer.scaled_copy_experts.factors.tolist() == [1] for layer in model.moe_layers())
