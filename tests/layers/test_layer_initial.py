import pytest
import torch
from torch import nn

from moepp.layers import registry
from moepp.layers.initial import INIT_STD, uninitialized
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig
from moepp.models.decoder import Decoder, InitialState
from moepp.models.settings import DecoderConfig

SIZES = {"dim": 64, "hidden": 128}
METHODS = {
    "moepp": {},
    "vanilla": {"experts": ExpertCounts(8, 0, 0, 0), "gating_residual": False},
    "shared": {"experts": ExpertCounts(shared=1)},
    "two_layer": {"router": "two_layer"},
    "shared_null": {"router": "shared_null", "gating_residual": False, "capacity_factor": None},
    "loss_free": {"balance": BalanceConfig(control="loss_free")},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_every_layer_initialises_itself_and_again_when_asked(changes):
    layer = MoELayer(MoEConfig(**SIZES, **changes))
    before = {name: value.clone() for name, value in layer.named_parameters()}
    assert layer(torch.randn(2, 8, 64))[0].isfinite().all()
    for name, value in before.items():
        assert 0.8 * INIT_STD < value.std() < 1.2 * INIT_STD, name
    layer.reset_parameters()
    assert not any(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    assert all(hasattr(module, "reset_parameters") for module in layer.children())


def test_a_controls_state_begins_anew():
    layer = MoELayer(MoEConfig(**SIZES, balance=BalanceConfig(control="loss_free")))
    layer.control.step(torch.arange(12.0), 33)
    assert layer.control.bias_N.any()
    layer.reset_parameters()
    assert not layer.control.bias_N.any() and layer.control.rate == layer.config.balance.control_rate


def test_nothing_is_drawn_for_weights_that_are_overwritten(monkeypatch):
    monkeypatch.setattr(nn.init, "normal_", lambda *_, **__: pytest.fail("drawn"))
    with uninitialized():
        MoELayer(MoEConfig(**SIZES))
    with pytest.raises(pytest.fail.Exception):
        MoELayer(MoEConfig(**SIZES))


class Own(nn.Module):
    """What somebody's router may set in its constructor, in `reset_parameters` and by torch's own layers."""

    def __init__(self, config, first):
        super().__init__()
        self.unset = nn.Parameter(torch.empty(config.experts.total, config.dim))
        self.temperature = nn.Parameter(torch.full((3,), 2.5))
        self.drawn = nn.Parameter(torch.empty(64))
        self.linear = nn.Linear(config.dim, config.experts.total)
        self.norm = nn.LayerNorm(config.dim)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.drawn, 5, 6)

    def forward(self, x_TD, previous):
        return self.linear(x_TD), None


@pytest.fixture
def own():
    registry.router("own")(Own)
    yield MoEConfig(**SIZES, router="own", gating_residual=False)
    del registry.router._parts["own"]


def keeps_its_own(router, std):
    bound = router.linear.in_features**-0.5  # torch's own
    assert router.temperature.eq(2.5).all() and router.drawn.min() >= 5 and not router.norm.bias.any()
    assert 0.9 * bound < router.linear.weight.abs().max() <= bound
    assert 0.8 * std < router.unset.std() < 1.2 * std


def test_a_part_of_ones_own_begins_as_it_sets_itself_and_the_rest_is_drawn(own):
    layer = MoELayer(own)
    keeps_its_own(layer.router, INIT_STD)
    before = {name: value.clone() for name, value in layer.router.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    layer.reset_parameters()
    keeps_its_own(layer.router, INIT_STD)
    assert not any(torch.equal(getattr(layer.router, name), before[name]) for name in ("drawn", "unset"))


def test_a_decoder_keeps_what_parts_set_and_draws_the_same_for_the_same_seed(own):
    config = DecoderConfig(**SIZES, heads=4, layers=2, vocab_size=64, router="own", gating_residual=False, init_std=0.1)
    first, other = Decoder(config, 3), Decoder(config, 4)
    torch.manual_seed(7)  # what was drawn before counts for nothing
    again = Decoder(config, 3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    for layer, another in zip(first.moe_layers(), other.moe_layers(), strict=True):
        keeps_its_own(layer.router, 0.1)
        assert not torch.equal(layer.router.drawn, another.router.drawn)
    with torch.device("meta"):
        state = InitialState(Decoder(config, None), 3)
    assert all(torch.equal(state[name], again[name]) for name in again)


class Projecting(Own):
    """With a matrix that nothing trains."""

    def __init__(self, config, first):
        super().__init__(config, first)
        self.register_buffer("projection", torch.randn(config.dim, 4))


def test_a_decoder_says_whether_parts_of_ones_own_have_buffers(own, monkeypatch):
    config = DecoderConfig(**SIZES, heads=4, vocab_size=64, router="own", gating_residual=False)
    assert not Decoder(config).has_buffers_of_others
    monkeypatch.setitem(registry.router._parts, "own", Projecting)
    assert Decoder(config).has_buffers_of_others


def test_buffers_that_a_part_draws_follow_the_seed_too(own, monkeypatch):
    monkeypatch.setitem(registry.router._parts, "own", Projecting)
    config = DecoderConfig(**SIZES, heads=4, layers=2, vocab_size=64, router="own", gating_residual=False)
    first, again, other = (
        torch.stack([layer.router.projection for layer in Decoder(config, seed).moe_layers()]) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(*first)
    layer = MoELayer(own)
    before = layer.router.projection.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.router.projection, before)
