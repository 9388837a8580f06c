import itertools
import math

import pytest
import reference
import torch
from torch import nn

from moepp.layers.kernels.base import BackendError
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig

TOKENS, DIM = 17, 6
KINDS = [ExpertCounts(ffn=4, zero=z, copy=p, constant=c) for z, p, c in itertools.product((0, 1), (0, 1), (0, 2))]


def make_layer(dtype=torch.float64, first=False, seed=0, **changes) -> MoELayer:
    config = MoEConfig(**{"dim": DIM, "hidden": 5, "capacity_factor": None, "gate": "released"} | changes)
    layer = MoELayer(config, first).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return layer


def make_inputs(layer, tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, DIM, dtype=torch.float64, generator=generator)
    return x, torch.randn(tokens, layer.config.experts.total, dtype=torch.float64, generator=generator)


def assert_equals_reference(layer, tokens=TOKENS):
    x_TD, previous_TN = make_inputs(layer, tokens)
    ours, theirs = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    y, stats = layer(ours.unsqueeze(0), previous_TN)
    expected, logits, balance = reference.moe(layer, theirs, previous_TN)
    torch.testing.assert_close(y.squeeze(0), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.logits_TN, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.balance_loss, balance, rtol=0, atol=1e-12)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).squeeze(0)
    parameters = list(layer.parameters())
    ours_loss = (y.squeeze(0) * weights).sum() + stats.balance_loss + stats.logits_TN.square().sum()
    theirs_loss = (expected * weights).sum() + balance + logits.square().sum()
    found = torch.autograd.grad(ours_loss, [ours, *parameters], allow_unused=True)
    wanted = torch.autograd.grad(theirs_loss, [theirs, *parameters], allow_unused=True)
    for gradient, reference_gradient in zip(found, wanted, strict=True):
        if reference_gradient is None:  # the loop over tokens never met this parameter
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, reference_gradient, rtol=0, atol=1e-11)


@pytest.mark.parametrize("counts", KINDS, ids=str)
@pytest.mark.parametrize("gate", ["released", "softmax", "renormalized"])
def test_layer_equals_the_equations_for_every_combination_of_expert_types(counts, gate):
    assert_equals_reference(make_layer(experts=counts, gate=gate))


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 8, "experts": ExpertCounts(ffn=4, zero=1, copy=1, constant=2)},
        {"experts": ExpertCounts(ffn=2, zero=3, copy=2, constant=1)},
        {"logits_norm": 1.0},
        {"logits_norm": 0.3, "gate": "softmax"},
        {"balance": BalanceConfig(tau=0.1, form="paper")},
        {"gating_residual": False},
        {"router": "two_layer"},
        {"multiply_by_top_k": True},
    ],
    ids=str,
)
def test_layer_equals_the_equations_with_other_switches(changes):
    assert_equals_reference(make_layer(**changes))


def test_layer_equals_the_equations_for_one_token():
    assert_equals_reference(make_layer(), tokens=1)


def test_gradcheck():
    layer = make_layer(top_k=3, experts=ExpertCounts(ffn=3, zero=1, copy=1, constant=2), seed=3)
    x_TD, previous_TN = make_inputs(layer, tokens=5)
    names, values = zip(*layer.named_parameters(), strict=True)

    def outputs(x, previous, *parameters):
        y, stats = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, previous))
        return y, stats.logits_TN, stats.balance_loss

    inputs = [v.detach().clone().requires_grad_() for v in (x_TD.unsqueeze(0), previous_TN, *values)]
    assert torch.autograd.gradcheck(outputs, inputs)


def test_both_choices_zero_gives_zero_output_and_finite_gradients():
    layer = make_layer(first=True, experts=ExpertCounts(ffn=2, zero=2, copy=0, constant=0))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2:, 0] = 1.0
    x_TD = torch.randn(TOKENS, DIM, dtype=torch.float64)
    x_TD[:, 0] = 9.0
    x_TD.requires_grad_()
    y, stats = layer(x_TD.unsqueeze(0))
    assert stats.chosen_N.tolist() == [0, 0, TOKENS, TOKENS]
    assert not y.any()
    (y.sum() + stats.balance_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_ffn_and_zero_expert_give_the_ffn_weight_one():
    layer = make_layer(experts=ExpertCounts(ffn=1, zero=1, copy=0, constant=0))
    x_TD, previous_TN = make_inputs(layer)
    y, _ = layer(x_TD.unsqueeze(0), previous_TN)
    alone = torch.stack([reference.swiglu(x, layer.ffn.w_in[0], layer.ffn.w_out[0]) for x in x_TD])
    torch.testing.assert_close(y.squeeze(0), alone, rtol=0, atol=1e-12)


def test_first_layer_has_no_residual_parameter():
    first, later = make_layer(first=True), make_layer()
    assert first.router.residual is None and later.router.residual.shape == (8 + 4, 8 + 4)


def test_capacity_drops_in_training_only_and_dropped_rows_give_nothing():
    experts = ExpertCounts(ffn=2, zero=0, copy=1, constant=0)
    layer = make_layer(experts=experts, capacity_factor=0.5, top_k=1, gate="softmax", gating_residual=False)
    x_TD, _ = make_inputs(layer, tokens=40)
    kept = layer.train()(x_TD.unsqueeze(0))
    whole = layer.eval()(x_TD.unsqueeze(0))
    assert whole[1].dropped == 0
    limits = [-(-40 * 0.5 * w // 2.5) for w in (0.75, 0.75, 1.0)]  # gamma K T w_i / (tau N_FFN + N_ZC), rounded up
    expected = sum(max(0, n - c) for n, c in zip(whole[1].chosen_N.tolist(), limits, strict=True))
    assert kept[1].dropped == expected > 0
    torch.testing.assert_close(kept[1].chosen_N, whole[1].chosen_N)
    dropped_T = (kept[0] == 0).all(-1).squeeze(0)
    assert dropped_T.sum() == expected
    torch.testing.assert_close(kept[0][0, ~dropped_T], whole[0][0, ~dropped_T])


def test_no_gradient_reaches_parameters_of_experts_without_tokens_but_it_is_zero_not_none():
    layer = make_layer(experts=ExpertCounts(ffn=4, zero=1, copy=0, constant=0), top_k=1, gating_residual=False)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1, 0] = 1.0
    x_TD = torch.rand(TOKENS, DIM, dtype=torch.float64) + 0.1
    layer(x_TD.unsqueeze(0))[0].sum().backward()
    assert layer.ffn.w_in.grad[1].any()
    for expert in (0, 2, 3):
        assert not layer.ffn.w_in.grad[expert].any() and not layer.ffn.w_out.grad[expert].any()


def test_a_layer_in_which_no_token_chooses_an_ffn_expert_still_trains():
    layer = make_layer(experts=ExpertCounts(ffn=2, zero=0, copy=1, constant=1), gating_residual=False)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2:, 0] = 1.0
    x_TD = torch.rand(TOKENS, DIM, dtype=torch.float64) + 0.5
    y, stats = layer(x_TD.unsqueeze(0))
    assert stats.chosen_N.tolist() == [0, 0, TOKENS, TOKENS]
    y.sum().backward()
    assert layer.ffn.w_in.grad is not None and not layer.ffn.w_in.grad.any()
    assert layer.zero_computation.vectors.grad.any()


def test_router_stays_in_float32_under_autocast():
    layer = make_layer(torch.float32)
    x_TD, previous_TN = (t.float() for t in make_inputs(layer))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, stats = layer(x_TD.unsqueeze(0), previous_TN)
    exact, exact_stats = layer(x_TD.unsqueeze(0), previous_TN)
    assert torch.equal(stats.logits_TN, exact_stats.logits_TN)
    assert torch.equal(stats.chosen_N, exact_stats.chosen_N)
    assert mixed.dtype == torch.float32
    relative = (mixed - exact).norm() / exact.norm()
    assert 1e-4 < relative < 2e-2  # bf16 products, so neither equal nor far off


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"top_k": 13}, "top_k=13"),
        ({"top_k": 0}, "top_k=0"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"logits_norm": -1.0}, "logits_norm"),
    ],
)
def test_impossible_layers_are_refused(changes, part):
    with pytest.raises(ValueError, match=part):
        MoEConfig(**changes)


@pytest.mark.parametrize("per_token", [0.5, 12.0])
def test_ffn_rows_change_nothing_but_what_is_kept_in_training(per_token):
    sizes = {"dim": 8, "hidden": 8, "backend": "grouped"}
    limited, plain = (make_layer(torch.float32, first=True, **sizes, ffn_rows=rows) for rows in (per_token, None))
    x_BSD = torch.randn(1, TOKENS, 8, generator=torch.Generator().manual_seed(1))
    y, stats = limited(x_BSD)
    wanted, whole = plain(x_BSD)
    torch.testing.assert_close(y, wanted)
    for found, expected in zip(*(torch.autograd.grad(v.sum(), layer.ffn.parameters()) for v, layer in (
        (y, limited), (wanted, plain)
    )), strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected)
    rows = int(stats.chosen_N[: limited.config.experts.ffn].sum())
    assert stats.recomputed == max(0, rows - math.ceil(per_token * TOKENS)) and whole.recomputed is None
    assert limited.eval()(x_BSD)[1].recomputed is None


@pytest.mark.parametrize("drop_order", ["position", "probability"])
@pytest.mark.parametrize("form", ["switch", "null_averaged"])
def test_sequences_that_are_balanced_and_limited_alone_are_layers_of_one_sequence(drop_order, form):
    balance = BalanceConfig(over="sequence", form=form)
    limits = {"capacity_factor": 0.7, "capacity_over": "sequence", "drop_order": drop_order}
    layer = make_layer(first=True, balance=balance, **limits).train()
    x_BSD = torch.randn(3, 12, DIM, dtype=torch.float64)
    together, stats = layer(x_BSD)
    alone = [layer(x_1SD) for x_1SD in x_BSD.split(1)]
    torch.testing.assert_close(together, torch.cat([y_1SD for y_1SD, _ in alone]))
    torch.testing.assert_close(stats.balance_loss, torch.stack([one.balance_loss for _, one in alone]).mean())
    assert stats.dropped == sum(one.dropped for _, one in alone) > 0


@pytest.mark.parametrize("over", ["sequence", "micro_batch", "global_batch", "step"])
@pytest.mark.parametrize("capacity_over", ["sequence", "micro_batch", "global_batch"])
def test_a_layer_asks_other_devices_for_counts_only_where_it_needs_them(over, capacity_over, monkeypatch):
    balance = BalanceConfig(over=over)
    layer = make_layer(first=True, capacity_factor=1.1, capacity_over=capacity_over, balance=balance).train()
    asked, share = [], layer.ffn.dispatcher.share
    monkeypatch.setattr(layer.ffn.dispatcher, "share", lambda count_KN: (asked.append(1), share(count_KN))[1])
    layer(torch.randn(2, 4, DIM, dtype=torch.float64))
    assert bool(asked) == (over in ("global_batch", "step") or capacity_over == "global_batch")


def test_a_layer_that_stands_alone_has_no_weight_without_a_gradient():
    """DDP waits for one that never comes."""
    layer = MoELayer(MoEConfig(dim=DIM, hidden=5))
    y, stats = layer(torch.randn(2, TOKENS, DIM))
    (y.sum() + stats.balance_loss).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((DIM,), torch.float32), ((2, 4, DIM + 1), torch.float32), ((2, 4, DIM), torch.int64)]
)
def test_an_input_of_another_form_is_refused(shape, dtype):
    with pytest.raises(ValueError, match=f"takes floating-point numbers .*, tokens, {DIM}], not .* of {dtype}"):
        MoELayer(MoEConfig(dim=DIM, hidden=5))(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("first", "shape", "message"),
    [
        (True, (TOKENS, 12), "first MoE layer has no gating residual.* first=False"),
        (False, None, "needs the `carried` of the MoE layer before, .* got nothing"),
        (False, (1, 12), r"got \[1, 12\]"),  # which would be added to all tokens
    ],
)
def test_carried_logits_that_would_be_left_out_or_are_of_other_tokens_are_refused(first, shape, message):
    layer = make_layer(first=first)
    x_TD, _ = make_inputs(layer)
    with pytest.raises(ValueError, match=message):
        layer(x_TD, None if shape is None else torch.ones(shape, dtype=torch.float64))
    without = make_layer(first=first, gating_residual=False)
    without(x_TD, torch.ones(TOKENS, 12, dtype=torch.float64))  # such layers may be handed it


@pytest.mark.parametrize("shape", [(0, DIM), (2, 0, DIM), (0, 4, DIM)])
@pytest.mark.parametrize("over", ["sequence", "micro_batch", "global_batch"])
def test_an_input_without_tokens_costs_nothing(shape, over):
    limits = {"capacity_factor": 1.0, "capacity_over": over}
    layer = make_layer(first=True, balance=BalanceConfig(over=over, z_loss=1.0, entropy_loss=1.0), **limits).train()
    y, stats = layer(torch.zeros(shape, dtype=torch.float64))
    (y.sum() + stats.balance_loss + stats.router_loss).backward()
    assert y.shape == shape and stats.balance_loss == stats.router_loss == stats.entropy == stats.dropped == 0
    assert not any(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("backend", ["sorted", "grouped"])
def test_a_second_derivative_is_an_error_and_not_one_without_the_experts(backend):
    layer = make_layer(torch.float32, first=True, dim=8, hidden=8, backend=backend)
    x_BSD = torch.randn(1, TOKENS, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x_BSD)[0].sum(), x_BSD, create_graph=True)
    loss = gradient.square().sum()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(loss, x_BSD, retain_graph=True)  # torch skips what does not lead to this leaf
    with pytest.raises(RuntimeError, match="differentiate twice"):
        loss.backward()


def test_a_backend_that_cannot_be_exported_says_so(monkeypatch):
    layer = make_layer(torch.float32, first=True, backend="sorted")
    for state in ("is_compiling", "is_exporting"):
        monkeypatch.setattr(torch.compiler, state, lambda: True)
    with pytest.raises(BackendError, match=r"torch.export cannot trace backend=sorted, .* choose backend=grouped"):
        layer(torch.randn(2, 4, DIM))
