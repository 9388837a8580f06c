"""Forms that an ablation crosses, each against its equation in a loop over tokens, in float64."""

import math

import pytest
import torch

from moepp.layers.balance import expert_capacities, likeliest_slots, load_balance_loss, load_targets
from moepp.layers.moe import MoELayer
from moepp.layers.router import normalize_logits, route
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig, ffn_share

DIM, COUNTS = 6, ExpertCounts(ffn=4, zero=1, copy=1, constant=2)


def make(first=True, **changes):
    config = MoEConfig(dim=DIM, hidden=5, **{"experts": COUNTS, "capacity_factor": None, **changes})
    layer, generator = MoELayer(config, first).double(), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def inputs(tokens=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, DIM, dtype=torch.float64, generator=generator)


def ffn(layer, index, x):
    gate, up = (layer.ffn.w_in[index] @ x).chunk(2)
    return layer.ffn.w_out[index] @ (gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sigmoid_scores_are_normalised_over_the_chosen_and_scaled(scale):
    more = {"balance": BalanceConfig(control="loss_free", form="paper", tau=1.0), "gate_options": {"scale": scale}}
    layer = make(experts=ExpertCounts(5, 0, 0, 0), selection="sigmoid", gate="renormalized", top_k=3, **more)
    layer.control.bias_N += torch.tensor([0.0, 0.4, 0.0, -0.4, 0.0])
    x_TD = inputs()
    y_TD, stats = layer(x_TD)
    expected, shares, chosen = [], [], torch.zeros(5, dtype=torch.float64)
    for x in x_TD:
        score = [1 / (1 + math.exp(-float(w @ x))) for w in layer.router.weight.detach()]
        best = sorted(range(5), key=lambda i: -(score[i] + float(layer.control.bias_N[i])))[:3]
        total = sum(score[i] for i in best)
        expected.append(sum(scale * score[i] / total * ffn(layer, i, x) for i in best))
        shares.append([s / sum(score) for s in score])
        chosen[best] += 1
    torch.testing.assert_close(y_TD, torch.stack(expected))
    balance = (chosen / len(x_TD) * torch.tensor(shares, dtype=torch.float64).mean(0)).sum()
    torch.testing.assert_close(stats.balance_loss, balance)


def test_a_scaled_copy_and_a_vector_alone():
    counts = ExpertCounts(2, 0, 0, 0, others={"scaled_copy": 2, "vector": 2})
    layer, x_TD = make(experts=counts, gate="softmax", top_k=3), inputs()
    expected = []
    for x in x_TD:
        probs = torch.softmax(layer.router.weight @ x, 0)
        y = torch.zeros_like(x)
        for i in probs.argsort(descending=True)[:3].tolist():
            if i < 2:
                out = ffn(layer, i, x)
            elif i < 4:
                out = layer.scaled_copy_experts.factors[i - 2] * x
            else:
                out = layer.vector_experts.vectors[i - 4]
            y = y + probs[i] * out
        expected.append(y)
    torch.testing.assert_close(layer(x_TD)[0], torch.stack(expected))


def test_a_scaled_copy_starts_as_a_copy():
    layer = MoELayer(MoEConfig(dim=DIM, hidden=5, experts=ExpertCounts(2, 0, 0, 0, others={"scaled_copy": 3})))
    assert layer.scaled_copy_experts.factors.tolist() == [1, 1, 1]


def test_tau_of_a_type_weighs_its_loss_its_target_and_its_capacity():
    config, eta = (
        BalanceConfig(tau=0.5, tau_of={"zero": 0.25, "copy": 1.0}, form="paper"),
        [1] * 4 + [0.5, 0.5, 1, 0.25],
    )
    probs_TN = inputs().new_tensor(torch.rand(9, 8, generator=torch.Generator().manual_seed(2)).tolist()).softmax(1)
    count_N = torch.arange(8)
    expected = sum(eta[i] * i / 9 * float(probs_TN[:, i].sum()) / 9 for i in range(8))
    assert float(load_balance_loss(probs_TN, count_N, 9, COUNTS, config)) == pytest.approx(expected, rel=1e-12)
    targets = [1 / e / sum(1 / other for other in eta) for e in eta]
    assert load_targets(COUNTS, 0.5, config.tau_of).tolist() == pytest.approx(targets)
    assert ffn_share(COUNTS, 0.5, config.tau_of) == pytest.approx(sum(targets[:4]))
    capacities = expert_capacities(COUNTS, config, slots=800, factor=1.1)
    rows = [capacities[kind] for kind in COUNTS.kinds()]
    assert rows == [math.ceil(round(880 * target, 9)) for target in targets]


@pytest.mark.parametrize("tau_of", [{"ffn": 0.5}, {"zeros": 0.5}, {"zero": 1.5}])
def test_a_tau_of_no_type_is_refused(tau_of):
    with pytest.raises(ValueError, match=r"balance.tau_of"):
        MoEConfig(balance=BalanceConfig(tau_of=tau_of))


def test_the_likeliest_slots_stay():
    layer = make(capacity_factor=0.6, drop_order="probability").train()
    routing = layer.route(layer.router(inputs(), None)[0])
    kept, counts = layer.drop_over_capacity(routing, layer.count(routing))
    limits = expert_capacities(COUNTS, layer.config.balance, 80, 0.6)
    dropped = 0
    for expert, kind in enumerate(COUNTS.kinds()):
        slots = [(t, k) for t in range(40) for k in range(2) if routing.expert_TK[t, k] == expert]
        best = sorted(slots, key=lambda slot: -float(routing.probs_TN[slot[0], expert]))[: limits[kind]]
        stayed = {(t, k) for t, k in slots if kept.expert_TK[t, k] == expert}
        assert stayed == set(best) and int(counts.count_WKN[0, :, expert].sum()) == len(best)
        dropped += len(slots) - len(best)
    assert 0 < dropped == int((kept.expert_TK == 8).sum())


def test_devices_drop_by_the_scores_of_their_whole_batch():
    generator = torch.Generator().manual_seed(3)
    expert_TK, score_TK = torch.randint(5, (24, 2), generator=generator), torch.rand(24, 2, generator=generator)
    limit_N = torch.tensor([3, 5, 4, 2])  # id 4 is an unused slot's
    whole = likeliest_slots(expert_TK[None], score_TK[None], limit_N)[0]
    parts = likeliest_slots(expert_TK.view(3, 8, 2), score_TK.view(3, 8, 2), limit_N).reshape(24, 2)
    assert torch.equal(whole, parts) and not whole[expert_TK == 4].any()


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_equal_logits_have_no_spread_and_give_no_nan(std):
    logits = torch.tensor([[0.0, 0, 0], [0.1, 0.1, 0.1], [1, 2, 4]], requires_grad=True)
    scaled = normalize_logits(logits, std)
    torch.testing.assert_close(scaled[2].std(), torch.tensor(std))
    assert torch.equal(scaled[2], logits[2] * (std / logits[2].std()))
    scaled.softmax(-1)[:, 0].sum().backward()
    assert torch.isfinite(scaled).all() and torch.isfinite(logits.grad).all()
    assert scaled[1].softmax(-1).tolist() == pytest.approx([1 / 3] * 3)


def test_logits_norm_of_one_expert_is_refused():
    with pytest.raises(ValueError, match=r"logits_norm=1.0 needs two experts"):
        MoEConfig(experts=ExpertCounts(1, 0, 0, 0), top_k=1, logits_norm=1.0)


def test_a_detached_residual_carries_no_gradient_and_the_same_logits():
    x_TD, previous = inputs(), inputs(40 * 8 // DIM + 1).flatten()[: 40 * 8].view(40, 8).requires_grad_()
    for detached in (False, True):
        layer = make(first=False, residual_detached=detached)
        logits = layer(x_TD, previous)[1].logits_TN
        expected = torch.stack(
            [layer.router.weight @ x + layer.router.residual @ g for x, g in zip(x_TD, previous, strict=True)]
        )
        torch.testing.assert_close(logits, expected)
        found = torch.autograd.grad(logits.sum(), previous, allow_unused=True)[0]
        assert (found is None) == detached


def test_a_residual_may_begin_as_the_identity():
    layer = MoELayer(MoEConfig(dim=DIM, hidden=5, experts=COUNTS, residual_init="identity"), first=False)
    assert torch.equal(layer.router.residual, torch.eye(8))


@pytest.mark.parametrize("bias", [-1.5, 0.0, 2.0])
def test_a_bias_on_zero_computation_logits_is_a_dial_of_compute(bias):
    layer, x_TD = make(zero_computation_bias=bias), inputs()
    routing = layer.route(layer.router(x_TD, None)[0])
    for t, x in enumerate(x_TD):
        weight = layer.router.weight.detach()
        logits = [float(w @ x) + (bias if i >= 4 else 0) for i, w in enumerate(weight)]
        best = sorted(range(8), key=lambda i: -logits[i])[:2]
        assert routing.expert_TK[t].tolist() == best
        assert float(routing.probs_TN[t, best[0]]) == pytest.approx(
            math.exp(logits[best[0]]) / sum(map(math.exp, logits)), rel=1e-12
        )


def test_a_micro_batch_may_be_balanced_alone():
    layer, x_TD = make(balance=BalanceConfig(over="micro_batch")), inputs()
    routing = layer.route(layer.router(x_TD, None)[0])
    counts = layer.count(routing)
    whole = torch.cat([counts.count_WKN, counts.count_WKN + 1])  # of two devices
    counts.count_WKN = whole
    count_N, tokens = layer.balanced_counts(counts, 40)
    assert tokens == 40 and torch.equal(count_N, whole[0].sum(0))
    layer.config.balance.over = "global_batch"
    count_N, tokens = layer.balanced_counts(counts, 40)
    assert tokens == 80 and torch.equal(count_N, whole.sum((0, 1)))


@pytest.mark.parametrize("selection", ["top_k", "sigmoid"])
def test_a_token_chooses_ffn_experts_of_few_groups_and_any_zero_computation_expert(selection):
    counts = ExpertCounts(ffn=8, zero=1, copy=1, constant=0)
    config = MoEConfig(experts=counts, top_k=3, expert_groups=4, groups_per_token=2, selection=selection)
    logits_TN = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    routing = route(logits_TN, config)
    scores_TN = logits_TN.softmax(-1) if selection == "top_k" else logits_TN.sigmoid()
    for token, chosen in enumerate(routing.expert_TK.tolist()):
        by_group = scores_TN[token, :8].view(4, 2).sum(1)  # 3 choices of 2 groups: the 2 highest of each count
        opened = set(by_group.topk(2).indices.tolist())
        allowed = [e for e in range(10) if e >= 8 or e // 2 in opened]
        assert set(chosen) == set(sorted(allowed, key=lambda e: -float(scores_TN[token, e]))[:3])
    whole = route(
        logits_TN, MoEConfig(experts=counts, top_k=3, expert_groups=4, groups_per_token=4, selection=selection)
    )
    assert torch.equal(
        whole.expert_TK, route(logits_TN, MoEConfig(experts=counts, top_k=3, selection=selection)).expert_TK
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_groups": 3}, r"expert_groups=3 must divide experts\.ffn=8"),
        ({"groups_per_token": 2}, "groups_per_token=2 must not exceed expert_groups=1"),
        ({"expert_groups": 2, "selection": "top_p", "capacity_factor": None}, "expert_groups=2 limits a top-k choice"),
        ({"expert_groups": 8, "top_k": 6}, "top_k=6 needs more experts than the 1 of groups_per_token=1 and 4"),
    ],
)
def test_impossible_groups_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)
