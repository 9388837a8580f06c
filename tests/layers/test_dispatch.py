import pytest
import torch
from reference import swiglu

from moepp.layers.dispatch import LocalDispatcher, Meanwhile
from moepp.layers.kernels.base import RoutedTokens
from moepp.layers.kernels.sorted_rows import ROW_BUCKET, plan_rows

EXPERTS, TOKENS, DIM, HIDDEN = 4, 50, 8, 6
ASSIGNMENTS = {
    "random": torch.stack([torch.randperm(EXPERTS + 2, generator=torch.Generator().manual_seed(t))[:2] for t in
    range(TOKENS)]), "all to one": torch.tensor([[2, EXPERTS]]).repeat(TOKENS, 1), "none to an FFN":
    torch.tensor([[EXPERTS, EXPERTS + 1]]).repeat(TOKENS, 1), "empty experts": torch.tensor([[0, 3]]).repeat(TOKENS, 1),
    "one token": torch.tensor([[1, 3]]),
}  # fmt: skip


def make_case(expert_TK, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(EXPERTS, 2 * HIDDEN, DIM), (EXPERTS, DIM, HIDDEN), (len(expert_TK), DIM)]
    w_in, w_out, x = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    gate = torch.rand(expert_TK.shape, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (w_in, w_out, x)] + [gate.requires_grad_()]


def loop(w_in, w_out, x_TD, expert_TK, gate_TK):
    rows = []
    for t, x in enumerate(x_TD):
        row = torch.zeros_like(x)
        for e, g in zip(expert_TK[t].tolist(), gate_TK[t], strict=True):
            if e < EXPERTS:
                row = row + g * swiglu(x, w_in[e], w_out[e])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("expert_TK", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
def test_equals_a_loop_over_tokens_with_gradients(expert_TK):
    case = make_case(expert_TK, torch.float64)
    w_in, w_out, x, gate = case
    ours = LocalDispatcher()(w_in, w_out, RoutedTokens(x, expert_TK, gate))
    expected = loop(w_in, w_out, x, expert_TK, gate)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    found = torch.autograd.grad((ours * weights).sum(), case)
    if expected.requires_grad:
        wanted = torch.autograd.grad((expected * weights).sum(), case, allow_unused=True)
    else:
        wanted = [None] * len(case)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient) if reference is None else reference, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("expert_TK", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
def test_padded_plan_keeps_every_row_once_in_buckets(expert_TK):
    plain, padded = plan_rows(expert_TK, EXPERTS), plan_rows(expert_TK, EXPERTS, ROW_BUCKET)
    assert all(size % ROW_BUCKET == 0 for size in padded.sizes)
    sentinel = expert_TK.numel()
    start = 0
    for expert, (size, bucketed) in enumerate(zip(plain.sizes, padded.sizes, strict=True)):
        share = padded.slot_R[sum(padded.sizes[:expert]) :][:bucketed]
        assert torch.equal(share[share != sentinel], plain.slot_R[start : start + size])
        assert (expert_TK.reshape(-1)[share[share != sentinel]] == expert).all()
        start += size
    assert len(plain.slot_R) == int((expert_TK < EXPERTS).sum())


@pytest.mark.parametrize("expert_TK", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
def test_padding_changes_neither_values_nor_gradients(expert_TK, monkeypatch):
    outcomes = []
    for bucket in (1, ROW_BUCKET):
        monkeypatch.setattr("moepp.layers.kernels.sorted_rows.ROW_BUCKET", bucket)
        case = make_case(expert_TK, torch.bfloat16)
        y = LocalDispatcher()(*case[:2], RoutedTokens(case[2], expert_TK, case[3].float()))
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), case[:3])])
    for unpadded, padded in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            padded.double(), unpadded.double(), rtol=2e-2, atol=2e-2 * float(unpadded.detach().abs().max() + 1e-9)
        )


def test_a_large_pad_row_gradient_never_leaks_into_token_zero():
    expert_TK = torch.tensor([[EXPERTS, EXPERTS]] + [[0, 1]] * 9)  # token 0 reaches no FFN expert, pads read it
    case = make_case(expert_TK, torch.bfloat16)
    y = LocalDispatcher()(*case[:2], RoutedTokens(case[2], expert_TK, case[3].float()))
    (gradient,) = torch.autograd.grad((y * 1e3).sum(), [case[2]])
    assert not y[0].any() and not gradient[0].any() and gradient[1:].any()


def test_what_is_computed_meanwhile_is_computed_once():
    calls = []
    meanwhile = Meanwhile(lambda: calls.append(1) or torch.ones(1))
    assert meanwhile() is meanwhile() and calls == [1]
