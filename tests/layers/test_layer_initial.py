import pytest
import torch
from torch import nn

from moepp.layers.initial import INIT_STD, uninitialized
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig

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
