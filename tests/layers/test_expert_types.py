"""Registered expert types beside the package's own, against a loop over tokens and slots."""

import pytest
import torch
from torch import nn

from moepp.layers import registry
from moepp.layers.experts import AffineExperts
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import ExpertCounts, MoEConfig

TOKENS, DIM = 19, 6


class Mixed(AffineExperts):
    """x w_j + 2 v_j."""

    def __init__(self, config, count):
        super().__init__(config, count)
        self.weight, self.vectors = (nn.Parameter(torch.empty(count, config.dim)) for _ in range(2))

    def terms(self, x_TD, dtype):
        a_TC = x_TD.to(dtype) @ self.weight.t()
        return a_TC, torch.full_like(a_TC, 2)

    def vectors_CD(self):
        return self.vectors


class Tripled(AffineExperts):
    def terms(self, x_TD, dtype):
        return 3.0, None


class Diagonal(nn.Module):
    def __init__(self, config, count):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, config.dim))

    def forward(self, x_RD, expert_R):
        return x_RD * self.weight[expert_R]


@pytest.fixture
def layer(monkeypatch):
    parts = {"mixed": Mixed, "tripled": Tripled, "diagonal": Diagonal}
    monkeypatch.setattr(registry.expert, "_parts", registry.expert._parts | parts)
    others = {"mixed": 2, "diagonal": 2, "tripled": 1}
    counts = ExpertCounts(ffn=2, zero=1, copy=1, constant=2, others=others)
    layer = MoELayer(MoEConfig(dim=DIM, hidden=5, experts=counts, top_k=3)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return layer


def expected(layer, kind, index, x):
    """What the expert `index` of a type makes of one token."""
    if kind == "ffn":
        gate, up = (layer.ffn.w_in[index] @ x).chunk(2)
        return layer.ffn.w_out[index] @ (nn.functional.silu(gate) * up)
    if kind == "constant":
        a1, a2 = (layer.zero_computation.w_mix[2 * index : 2 * index + 2] @ x).softmax(0)
        return a1 * x + a2 * layer.zero_computation.vectors[index]
    if kind == "mixed":
        own = layer.mixed_experts
        return (own.weight[index] @ x) * x + 2 * own.vectors[index]
    if kind == "diagonal":
        return layer.diagonal_experts.weight[index] * x
    return {"copy": 1, "zero": 0, "tripled": 3}[kind] * x


def test_every_type_adds_what_its_definition_says(layer):
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=generator)
    kinds = layer.config.experts.kinds()
    expert_TK = torch.stack([torch.randperm(len(kinds) + 1, generator=generator)[:3] for _ in range(TOKENS)])
    gate_TK = torch.rand(TOKENS, 3, dtype=torch.float64, generator=generator) * (expert_TK < len(kinds))
    wanted = torch.zeros_like(x_TD)
    for t in range(TOKENS):
        for k, e in enumerate(expert_TK[t].tolist()):
            if e < len(kinds):  # the id beyond them is a dropped slot's
                wanted[t] += gate_TK[t, k] * expected(layer, kinds[e], e - kinds.index(kinds[e]), x_TD[t])
    found = layer.expert_forward(x_TD, Routing(expert_TK, gate_TK, gate_TK))
    torch.testing.assert_close(found, wanted)
    parameters = [parameter for name, parameter in layer.named_parameters() if not name.startswith("router")]
    gradients = (torch.autograd.grad(y_TD.square().sum(), parameters) for y_TD in (found, wanted))
    torch.testing.assert_close(*gradients)


def test_a_type_whose_rows_no_token_chose_has_gradients_of_zero(layer):
    x_TD, expert_TK = torch.randn(4, DIM, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.int64)
    y_TD = layer.expert_forward(x_TD, Routing(expert_TK, torch.ones_like(x_TD[:, :1]), x_TD))
    y_TD.sum().backward()
    assert not layer.diagonal_experts.weight.grad.any() and layer.ffn.w_in.grad[0].any()


def test_of_registered_types_only_the_zero_experts_lose_their_gate(layer):
    kinds = layer.config.experts.kinds()
    expert_TK = torch.tensor([[0, kinds.index("zero")], [kinds.index("zero"), kinds.index("mixed")]])
    gate_TK = torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    routing = Routing(expert_TK, gate_TK, torch.zeros(2, len(kinds)))
    assert registry.gate["released"](routing, layer.config).tolist() == [[1, 0], [0, 1]]


def test_null_logits_stand_where_the_zero_experts_are(layer):
    config = MoEConfig(
        dim=DIM, experts=layer.config.experts, router="shared_null", gating_residual=False, capacity_factor=None
    )
    router, ids = registry.router["shared_null"](config, True), layer.config.experts.ids("zero")
    x_TD = torch.randn(3, DIM)
    logits_TN, _ = router(x_TD, None)
    own = x_TD @ router.weight.t()
    assert logits_TN.shape[1] == layer.config.experts.total
    torch.testing.assert_close(logits_TN[:, ids.start], own[:, -1])
    torch.testing.assert_close(logits_TN[:, ids.stop :], own[:, ids.start : -1])
