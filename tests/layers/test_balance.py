import pytest
import torch

from moepp.layers.balance import (
    accepted_counts,
    accepted_in_runs,
    accepted_slots,
    capacity_of_each,
    combine_layers,
    expert_capacities,
    load_balance_loss,
    selection_counts,
)
from moepp.layers.settings import BalanceConfig, ExpertCounts, ffn_share

COUNTS = ExpertCounts(ffn=8, zero=1, copy=1, constant=2)


def test_uniform_routing_costs_k_over_n_as_printed_and_k_in_the_switch_form():
    tokens, experts, top_k = 60, COUNTS.total, 2
    probs = torch.full((tokens, experts), 1 / experts, dtype=torch.float64)
    chosen = torch.full((experts,), tokens * top_k // experts)
    for form, expected in (("paper", top_k / experts), ("switch", top_k)):
        loss = load_balance_loss(probs, chosen, tokens, COUNTS, BalanceConfig(tau=1.0, form=form))
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_the_loss_is_least_where_a_zero_computation_expert_has_one_over_tau_of_an_ffn_experts_load():
    config = BalanceConfig(tau=0.25)
    logits = torch.zeros(COUNTS.total, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=3.0)
    for _ in range(300):  # f follows P here, as it does when routing is sampled from the router
        optimizer.zero_grad()
        p = logits.softmax(0)
        # half the gradient of sum eta p^2: the counts carry none, by Eq. 7's one-hot f
        load_balance_loss(p[None], p.detach(), 1, COUNTS, config).backward()
        optimizer.step()
    p = logits.detach().softmax(0)
    torch.testing.assert_close(p[8:] / p[:8].mean(), torch.full((4,), 4.0, dtype=torch.float64), rtol=1e-3, atol=0)
    assert p[:8].sum().item() == pytest.approx(ffn_share(COUNTS, 0.25), abs=1e-4) == pytest.approx(1 / 3, abs=1e-4)


def test_counts_carry_no_gradient():
    logits = torch.randn(9, COUNTS.total, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(-1)
    chosen = selection_counts(probs.topk(2).indices, COUNTS.total).sum(0)
    assert not chosen.requires_grad
    load_balance_loss(probs, chosen, 9, COUNTS, BalanceConfig()).backward()
    eta = torch.tensor([1.0] * 8 + [0.75] * 4, dtype=torch.float64)
    p = probs.detach()
    weight = eta * chosen / 9 * COUNTS.total / 9  # d loss / d probs
    expected = p * (weight - (p * weight).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_layers_are_averaged_in_the_switch_form_and_summed_in_the_papers():
    losses = [torch.tensor(2.0), torch.tensor(4.0)]
    assert combine_layers(losses, BalanceConfig(beta=0.1)).item() == pytest.approx(0.3)
    assert combine_layers(losses, BalanceConfig(beta=0.1, form="paper")).item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("ffn", "zero_computation", "shares"),
    [  # Table 3's grid of tau; the shares are printed in the paper's analysis of Table 1
        (8, 4, {0.10: 0.167, 0.25: 0.333, 0.50: 0.500, 0.75: 0.600, 1.0: 0.667}),
        (16, 4, {0.10: 0.286, 0.25: 0.500, 0.50: 0.667, 0.75: 0.750, 1.0: 0.800}),
        (32, 8, {0.10: 0.286, 0.25: 0.500, 0.50: 0.667, 0.75: 0.750, 1.0: 0.800}),
    ],
)
def test_ffn_share_of_a_balanced_layer(ffn, zero_computation, shares):
    for tau, share in shares.items():
        counts = ExpertCounts(ffn=ffn, zero=1, copy=1, constant=zero_computation - 2)
        assert ffn_share(counts, tau) == pytest.approx(share, abs=6e-4)


def test_capacity_counts_all_assignments():
    limits = expert_capacities(COUNTS, BalanceConfig(tau=0.75), slots=2 * 1000, factor=1.1)
    of_ffn, of_other = limits["ffn"], limits["zero"]
    assert (of_ffn, of_other) == (165, 220)  # 1.1 * 2000 * (0.75, 1) / 10
    assert 8 * of_ffn + 4 * of_other >= 2000  # Eq. 8 as printed, with T for K*T, would hold 1100


UNUSED = 4  # the id of no expert, of four


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("by_score", [False, True])
def test_slots_that_are_not_used_take_nobodys_place(runs, by_score):
    ids_TK = torch.tensor([[0, 4], [1, 4], [4, 0], [4, 0], [2, 0], [3, 0], [1, 0], [2, 4]])
    score_TK = torch.linspace(1, 0, 16).view(8, 2) if by_score else None
    kept_TK = accepted_in_runs(ids_TK, torch.full((4,), 10), runs, score_TK)
    assert torch.equal(kept_TK, ids_TK != UNUSED)
    few_TK = accepted_in_runs(ids_TK, torch.tensor([2, 1, 1, 1]), runs, score_TK)
    assert few_TK[ids_TK == 0].sum() == 2 * runs and not few_TK[ids_TK == UNUSED].any()


def test_every_expert_has_its_types_capacity():
    limits = {"ffn": 3, "constant": 5, "copy": 7, "zero": 5}
    of_each = capacity_of_each(ExpertCounts(ffn=2, zero=1, copy=2, constant=2), limits, torch.device("cpu"))
    assert of_each.tolist() == [3, 3, 5, 5, 7, 7, 5] and of_each.dtype == torch.int64


def within_capacity(expert_TK, capacity_N, devices=1):
    """The accepted slots of a batch whose tokens lie on one device after the other."""
    shares = expert_TK.chunk(devices)
    count_WKN = torch.stack([selection_counts(share, len(capacity_N)) for share in shares])
    accepted_WKN = accepted_counts(count_WKN, capacity_N)
    return torch.cat([accepted_slots(share, accepted) for share, accepted in zip(shares, accepted_WKN, strict=True)])


def test_over_capacity_first_choices_come_before_second_choices():
    expert_TK = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1]])
    kept = within_capacity(expert_TK, torch.tensor([2, 2]))
    # expert 0: first choices of tokens 0, 2, 3, then the second choice of 1; expert 1: first choice of 1, then second
    # of 0, 2, 3
    assert kept.tolist() == [[True, True], [True, False], [True, False], [False, False]]


def test_capacity_keeps_everything_it_can_hold():
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.stack([torch.randperm(12, generator=generator)[:2] for _ in range(500)])
    counts = selection_counts(expert_TK, 12).sum(0)
    limits = torch.full((12,), 70)
    kept = within_capacity(expert_TK, limits)
    assert torch.equal(expert_TK[kept].bincount(minlength=12), counts.clamp(max=70))
    assert counts.max() > 70


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_that_share_a_batch_accept_what_one_would(devices):
    generator = torch.Generator().manual_seed(1)
    expert_TK = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(64)])
    limits = torch.tensor([30, 12, 5, 0, 21, 64])
    alone = within_capacity(expert_TK, limits)
    assert torch.equal(within_capacity(expert_TK, limits, devices), alone)
    assert not torch.equal(torch.cat([within_capacity(s, limits // 2) for s in expert_TK.chunk(2)]), alone)


@pytest.mark.parametrize("changes", [{"tau": 0.0}, {"tau": 1.5}, {"beta": -0.1}], ids=str)
def test_impossible_balance_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        BalanceConfig(**changes)
