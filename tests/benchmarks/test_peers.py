from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moepp.benchmarks.cases import SETS, Inputs, RoutingSource
from moepp.benchmarks.peers import IMPLEMENTATIONS, GemmFloor
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig

CPU = torch.device("cpu")
VANILLA = ExpertCounts(8, 0, 0, 0)


def make_layer(counts=SETS[8], dtype=torch.float64, capacity_factor=None):
    config = MoEConfig(
        dim=16, hidden=24, experts=counts, balance=BalanceConfig(tau=0.75), capacity_factor=capacity_factor
    )
    layer, generator = MoELayer(config, first=True), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return layer.to(dtype)


def make_inputs(layer, tokens=96, backward=False):
    draw = RoutingSource(1, CPU).draw(layer, "learned", tokens)
    draw.routing.gate_TK = draw.routing.gate_TK.to(layer.ffn.w_in.dtype)
    x_SD = torch.randn(2 * tokens, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Inputs.of(draw, x_SD.to(layer.ffn.w_in.dtype), backward)


def computed(name, layer, inputs):
    return IMPLEMENTATIONS[name](layer)(inputs)


@pytest.mark.parametrize("capacity_factor", [None, 1.1])
@pytest.mark.parametrize("counts", [SETS[8], SETS[32], VANILLA], ids=str)
def test_the_reference_loop_computes_what_the_layer_does(counts, capacity_factor):
    layer = make_layer(counts, capacity_factor=capacity_factor)
    inputs = make_inputs(layer)
    dropped = (inputs.routing.expert_TK == counts.total).any()
    assert dropped == (capacity_factor is not None)
    expected = computed("moepp", layer, inputs)
    torch.testing.assert_close(computed("loop", layer, inputs), expected, rtol=0, atol=1e-12)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the package transformers")
@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
def test_the_transformers_path_computes_what_the_layer_does(kind):
    layer = make_layer(dtype=torch.float32, capacity_factor=1.1)
    inputs = make_inputs(layer)
    found = computed(f"transformers_{kind}", layer, inputs)
    torch.testing.assert_close(found, computed("moepp", layer, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["moepp", "sorted", "grouped"])
def test_a_backend_computes_with_the_weights_of_the_layer_itself(name):
    layer = make_layer(dtype=torch.float32)
    inputs = make_inputs(layer, backward=True)
    y_TD = computed(name, layer, inputs)
    expected = layer.expert_forward(inputs.x_TD, inputs.routing, inputs.counts)
    torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(y_TD.sum(), [layer.ffn.w_in])
    assert gradient.abs().sum() > 0


def test_the_whole_layer_limits_the_drawn_choices_and_computes_its_own_gates():
    layer = make_layer(capacity_factor=1.1)
    inputs = make_inputs(layer)
    logits_TN, _ = layer.router(inputs.x_TD, None)
    own = layer.route(logits_TN)
    own.expert_TK = inputs.chosen_TK
    kept, counts = layer.drop_over_capacity(own, layer.count(own))
    expected = layer.expert_forward(inputs.x_TD, kept, counts)
    torch.testing.assert_close(computed("whole_layer", layer, inputs), expected, rtol=0, atol=1e-12)


def flops(compute, inputs, weights):
    """Of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        y = compute(inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, [inputs.x_TD, inputs.x_RD, *weights], torch.ones_like(y), allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", ["floor", "expert_floor"])
def test_a_floor_has_the_flops_of_the_layers_products(name):
    layer = make_layer(VANILLA, torch.float32)
    inputs = make_inputs(layer, tokens=320, backward=True)
    found = flops(IMPLEMENTATIONS[name](layer), inputs, [])
    assert found == flops(IMPLEMENTATIONS["sorted"](layer), inputs, [layer.ffn.w_in, layer.ffn.w_out])
    assert found == (6 * 640 * 16 * 24, 12 * 640 * 16 * 24)


def test_the_floor_multiplies_the_rows_that_reach_ffn_experts():
    layer = make_layer(dtype=torch.float32, capacity_factor=1.1)
    inputs = make_inputs(layer, tokens=640)
    rows = int((inputs.routing.expert_TK < 8).sum())
    assert 0 <= abs(len(inputs.x_RD) - rows) <= 32 and len(inputs.x_RD) % 64 == 0
    assert all(len(computed(name, layer, inputs)) == len(inputs.x_RD) for name in ("floor", "expert_floor"))


def test_the_floor_never_asks_the_device():
    x_RD = torch.randn(128, 16, device="meta", requires_grad=True)  # tensors without values: nothing can be asked
    w_in, w_out = torch.randn(48, 16, device="meta"), torch.randn(16, 24, device="meta")
    y_RD = GemmFloor.apply(x_RD, w_in, w_out)
    (gradient,) = torch.autograd.grad(y_RD, [x_RD], torch.ones_like(y_RD))
    assert y_RD.shape == gradient.shape == x_RD.shape
