"""Every published method of conf/model/ against its equations in float64."""

import pytest
import reference_methods as methods
import torch
from torch import nn

from moepp.config import compose
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig
from moepp.training.settings import RunConfig

TOKENS = 23
SMALL = ["model.dim=8", "model.hidden=5", "model.heads=2", "model.capacity_factor=null"]


def make_layer(method, *overrides, gru=None) -> MoELayer:
    config = compose(RunConfig, ["size=tiny", f"model={method}", *SMALL, *overrides]).model
    layer = MoELayer(config, gru=gru).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return layer


def make_inputs(seed=1, tokens=TOKENS):
    return torch.randn(tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_close_with_gradients(found, wanted, parameters):
    """Values, and gradients of a random weighting of them."""
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(f.shape, dtype=torch.float64, generator=generator) for f in found]
    gradients = [
        torch.autograd.grad(
            sum((w * v).sum() for w, v in zip(weights, values, strict=True)), parameters, allow_unused=True
        )
        for values in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):  # None: the loop over tokens never met this parameter
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def run(layer, x_TD):
    y_BSD, stats = layer(x_TD[None])
    return y_BSD[0], stats


def test_switch():
    layer, x_TD = make_layer("switch"), make_inputs()
    y, stats = run(layer, x_TD)
    assert_close_with_gradients([y, stats.balance_loss], methods.switch(layer, x_TD), list(layer.parameters()))


def test_deepseek_moe():
    layer, x_TD = make_layer("deepseek_moe", "model.experts.shared=2", "model.top_k=3"), make_inputs()
    y, _ = run(layer, x_TD)
    assert_close_with_gradients([y], [methods.deepseek_moe(layer, x_TD)], list(layer.parameters()))


def test_a_shared_expert_beside_zero_computation_experts_adds_to_their_output():
    layer, x_TD = make_layer("shared_moepp"), make_inputs()
    shared = layer.shared
    whole, _ = run(layer, x_TD)
    layer.shared = None
    torch.testing.assert_close(whole, run(layer, x_TD)[0] + shared(x_TD), rtol=0, atol=1e-12)


def test_adamoe():
    layer, x_TD = make_layer("adamoe"), make_inputs()
    y, stats = run(layer, x_TD)
    assert stats.chosen_N[8:].sum() > 0 and stats.chosen_N[8:].unique().numel() > 1  # the mean differs from the counts
    assert_close_with_gradients([y, stats.balance_loss], methods.adamoe(layer, x_TD), list(layer.parameters()))


def test_shared_null():
    layer, x_TD = make_layer("shared_null"), make_inputs()
    y, stats = run(layer, x_TD)
    expected, loss, z_loss = methods.shared_null(layer, x_TD)
    found = [y, stats.balance_loss, stats.router_loss]
    assert_close_with_gradients(found, [expected, loss, 1e-3 * z_loss], list(layer.parameters()))
    assert layer.router.weight.shape == (8 + 1, 8)
    assert stats.chosen_N[8:].sum() > 0


def test_longcat():
    layer, x_TD = make_layer("longcat"), make_inputs()
    bias = torch.linspace(-0.3, 0.3, 12, dtype=torch.float64)
    layer.control.bias_N.copy_(bias)
    y, stats = run(layer, x_TD)
    assert_close_with_gradients(
        [y, stats.balance_loss], methods.longcat(layer, x_TD, bias, 1.2), list(layer.parameters())
    )
    layer.control.bias_N.zero_()
    assert not torch.equal(run(layer, x_TD)[1].chosen_N, stats.chosen_N)  # the bias had a say


def test_remoe():
    layer, x_TD = make_layer("remoe"), make_inputs()
    layer.control.multiplier.fill_(3.0)
    y, stats = run(layer, x_TD)
    expected, loss, active = methods.remoe(layer, x_TD)
    assert_close_with_gradients([y, stats.balance_loss], [expected, 3 * loss], list(layer.parameters()))
    assert stats.chosen_N.tolist() == [sum(i in a for a in active) for i in range(8)]
    assert len({len(a) for a in active}) > 2  # tokens differ in their number of experts


def test_a_token_without_a_positive_score_gets_nothing_and_finite_gradients():
    layer = make_layer("remoe")
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)
    y, stats = run(layer, torch.rand(4, 8, dtype=torch.float64))
    assert not y.any() and stats.chosen_N.sum() == 0 and stats.entropy == 0
    (y.sum() + stats.balance_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.9, 1.0])
def test_top_p(threshold):
    layer, x_TD = make_layer("top_p", f"model.top_p={threshold}"), make_inputs()
    y, stats = run(layer, x_TD)
    expected, entropy, sets = methods.top_p(layer, x_TD)
    assert_close_with_gradients([y, stats.router_loss], [expected, 1e-4 * entropy], list(layer.parameters()))
    assert stats.chosen_N.tolist() == [sum(i in chosen for chosen in sets) for i in range(8)]


def test_rmoe_through_two_layers():
    gru = nn.GRUCell(6, 6, bias=False).double()
    layers = [make_layer("rmoe", "model.router_width=6", gru=gru) for _ in range(2)]
    nn.init.normal_(layers[1].router.projection, generator=torch.Generator().manual_seed(1))
    x_TD, carried, h = make_inputs(), None, torch.zeros(TOKENS, 6, dtype=torch.float64)
    found, wanted = [], []
    for layer in layers:
        _, stats = layer(x_TD[None], carried)
        carried = stats.carried
        pairs = [
            methods.recurrent_logits(layer.router.projection, layer.router.weight, gru, x, before)
            for x, before in zip(x_TD, h, strict=True)
        ]
        logits, h = (torch.stack(column) for column in zip(*pairs, strict=True))
        found += [stats.logits_TN, carried]
        wanted += [logits, h]
    routers = [parameter for layer in layers for parameter in layer.router.parameters()]
    assert_close_with_gradients(found, wanted, [*routers, *gru.parameters()])
    assert "gru" not in "".join(layers[0].state_dict())


def ffn_per_token(layer, x_TD):
    return layer.route(layer.router(x_TD, None)[0]).expert_TK.lt(layer.config.experts.ffn).sum().item() / len(x_TD)


@pytest.mark.parametrize("target", [0.6, 1.0])
def test_longcats_bias_brings_ffn_experts_per_token_to_the_target(target):
    faster = ["model.balance.control_rate=0.2", "model.balance.control_decay=1.0"]
    layer, x_TD = make_layer("longcat", f"model.balance.expected_ffn={target}", *faster), make_inputs(tokens=400)
    assert ffn_per_token(layer, x_TD) != pytest.approx(target, abs=0.1)
    for _ in range(400):
        _, stats = run(layer, x_TD)
        layer.control.step(stats.chosen_N, len(x_TD))
    assert ffn_per_token(layer, x_TD) == pytest.approx(target, abs=0.02)
    assert not layer.control.bias_N[8:].any()


def test_loss_free_bias_brings_loads_to_one_and_one_over_tau():
    layer, x_TD = make_layer("loss_free", "model.balance.tau=0.5"), make_inputs(tokens=400)
    for _ in range(400):
        _, stats = run(layer, x_TD)
        layer.control.step(stats.chosen_N, len(x_TD))
    load_N = stats.chosen_N / stats.chosen_N.sum()
    torch.testing.assert_close(load_N, torch.tensor([1 / 16] * 8 + [1 / 8] * 4), rtol=0, atol=0.01)


MOEPP, COPIES = ExpertCounts(4, 1, 1, 2), ExpertCounts(4, 0, 4, 0)
VANILLA = ExpertCounts(4, 0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"router": "recurrent"}, "gating_residual=false"),
        ({"router": "shared_null", "gating_residual": True}, "gating_residual=false"),
        ({"router": "shared_null", "gating_residual": False, "experts": COPIES}, "experts.zero above 0"),
        ({"router": "shared_null", "gating_residual": False, "capacity_factor": 1.1}, "capacity_factor=null"),
        ({"selection": "relu", "capacity_factor": 1.1}, "selection=relu .*capacity_factor=null"),
        ({"selection": "top_p", "capacity_factor": 1.1}, "selection=top_p .*capacity_factor=null"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"router_width": 0}, "router_width=0"),
        ({"experts": VANILLA, "balance": BalanceConfig(form="null_averaged")}, "zero-computation"),
        ({"experts": VANILLA, "balance": BalanceConfig(form="grouped", expected_ffn=1.0)}, "zero-computation"),
        ({"experts": VANILLA, "balance": BalanceConfig(control="longcat", expected_ffn=1.0)}, "zero-computation"),
        ({"balance": BalanceConfig(form="grouped", expected_ffn=2.0)}, "expected_ffn=2.0 must be less than top_k=2"),
        ({"selection": "top_p", "balance": BalanceConfig(control="loss_free")}, "selection=top_k"),
        ({"selection": "relu", "balance": BalanceConfig(form="grouped", expected_ffn=1.0)}, "selection=top_k"),
        ({"balance": BalanceConfig(control="remoe", expected_ffn=1.0)}, "selection=relu"),
        ({"selection": "relu", "balance": BalanceConfig(entropy_loss=0.1)}, "entropy_loss=0"),
    ],
    ids=str,
)
def test_combinations_without_meaning_are_refused_in_one_line(changes, part):
    with pytest.raises(ValueError, match=part) as caught:
        MoEConfig(**{"experts": MOEPP, "capacity_factor": None} | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_recurrent_router_computes_in_float32_or_more_whatever_its_weights_are_in(dtype):
    layer = make_layer("rmoe", "model.router_width=6").to(dtype)
    y, stats = layer(make_inputs()[None].to(dtype))
    assert y.dtype == dtype and stats.logits_TN.dtype == torch.promote_types(dtype, torch.float32)
