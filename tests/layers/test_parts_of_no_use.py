"""Parts of one's own that give what no layer can use: one line names the part, what it gave and what is needed."""

from dataclasses import replace

import pytest
import torch
from registered import forgotten
from torch import nn

from moepp import register
from moepp.layers import AffineExperts, BalanceConfig, ExpertCounts, MoEConfig, MoELayer
from moepp.layers.registry import PartError
from moepp.layers.router import Routing

TOKENS, DIM = 6, 16


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


def layer(**values):
    return MoELayer(MoEConfig(dim=DIM, hidden=32, **values))


def top(logits_TN, config):
    probs_TN = logits_TN.softmax(-1)
    gate_TK, expert_TK = probs_TN.topk(config.top_k)
    return Routing(expert_TK, gate_TK, probs_TN)


SELECTIONS = {
    "returned NoneType; a Routing": lambda found: None,
    "returned tuple; a Routing": lambda found: (found.gate_TK, found.expert_TK),
    r"gave expert_TK \[5, 2\]; \[6, slots\]": lambda found: replace(found, expert_TK=found.expert_TK[1:]),
    "gave expert_TK of torch.int32; torch.int64": lambda found: replace(found, expert_TK=found.expert_TK.int()),
    r"gave gates \[6, 1\]; \[6, 2\]": lambda found: replace(found, gate_TK=found.gate_TK[:, :1]),
    r"gave probs_TN \[6, 3\]; \[6, 12\]": lambda found: replace(found, probs_TN=found.probs_TN[:, :3]),
    "gave the id -1; 0 to 11 are": lambda found: replace(found, expert_TK=torch.full_like(found.expert_TK, -1)),
    "gave the id 13; 0 to 11 are": lambda found: replace(found, expert_TK=torch.full_like(found.expert_TK, 13)),
}


@pytest.mark.parametrize(("said", "change"), SELECTIONS.items())
def test_a_selection(said, change):
    register.selection("mine")(lambda logits_TN, config, bias_N: change(top(logits_TN, config)))
    with pytest.raises(PartError, match=rf"selection 'mine' \(.*\.py\) {said}"):
        layer(selection="mine")(torch.randn(TOKENS, DIM))


@pytest.mark.parametrize(
    ("said", "gate"), [("NoneType", lambda found: None), (r"\[6, 1\]", lambda found: found.gate_TK[:, :1])]
)
def test_a_gate(said, gate):
    register.gate("mine")(lambda routing, config: gate(routing))
    with pytest.raises(PartError, match=rf"gate 'mine' \(.*\.py\) gave gates {said}; \[6, 2\] is needed"):
        layer(gate="mine")(torch.randn(TOKENS, DIM))


@pytest.mark.parametrize(
    ("said", "form"),
    [(r"\[12\]", lambda probs: probs), ("float", lambda probs: 1.0), ("NoneType", lambda probs: None)],
)
def test_a_balance_form(said, form):
    register.balance("mine")(lambda mean_probs_N, share_N, counts, config: form(mean_probs_N))
    with pytest.raises(PartError, match=rf"balance form 'mine' \(.*\.py\) returned {said}; a tensor of one number"):
        layer(balance=BalanceConfig(form="mine"))(torch.randn(TOKENS, DIM))


class WithoutForward(nn.Module):
    def __init__(self, config, count):
        super().__init__()


class WithoutTerms(AffineExperts):
    pass


class OneTerm(AffineExperts):
    def terms(self, x_TD, dtype):
        return -1.0


class WithoutVectors(AffineExperts):
    def terms(self, x_TD, dtype):
        return 0.0, torch.ones(len(x_TD), self.count, dtype=dtype)


class NarrowVectors(WithoutVectors):
    def vectors_CD(self):
        return torch.ones(self.count, 3)


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("returned int; an nn.Module is needed", lambda config, count: 3),
        (r"has no forward\(\)", WithoutForward),
        (r"has no terms\(\)", WithoutTerms),
        ("gave terms float; a pair, a and b is needed", OneTerm),
        (r"gave a term b; vectors_CD\(\) is needed for it", WithoutVectors),
        (r"gave vectors \[2, 3\]; \[2, 16\] is needed", NarrowVectors),
    ],
)
def test_an_expert_type(said, part):
    register.expert("mine")(part)
    with pytest.raises(PartError, match=rf"expert type 'mine' \(.*\.py\) {said}"):
        layer(experts=ExpertCounts(others={"mine": 2}))(torch.randn(TOKENS, DIM))


class WithoutStep(nn.Module):
    def reset_parameters(self):
        pass


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ("returned NoneType; an nn.Module is needed", lambda config, counts: None),
        (r"has no step\(\)", lambda config, counts: WithoutStep()),
        (r"has no step\(\)", lambda config, counts: nn.Module()),
    ],
)
def test_a_control(said, part):
    register.control("mine")(part)
    with pytest.raises(PartError, match=rf"control 'mine' \(.*\.py\) {said}"):
        layer(balance=BalanceConfig(control="mine"))


def test_a_part_that_takes_less_than_it_is_called_with():
    register.router("mine")(lambda: nn.Identity())
    with pytest.raises(ValueError, match=r"router 'mine' \(.*\.py\) takes nothing; it is called with config, first"):
        register.router.check("mine", {})
    register.router("anything")(lambda *given: nn.Identity())
    register.router.check("anything", {})


class Plain(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.weight_ND = nn.Parameter(torch.empty(config.experts.total, config.dim))

    def forward(self, x_TD, previous):
        logits_TN = x_TD @ self.weight_ND.t()
        return logits_TN, logits_TN


def test_a_router_that_follows_autocast_has_its_logits_read_in_float32():
    register.router("mine")(Plain)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, stats = layer(router="mine")(torch.randn(TOKENS, DIM))
    (y_TD.sum() + stats.balance_loss).backward()
    assert stats.logits_TN.dtype == torch.float32
