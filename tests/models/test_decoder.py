import math
import weakref

import pytest
import torch

from moepp.errors import UsageError
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig

SMALL = {"dim": 32, "hidden": 24, "layers": 3, "heads": 4, "vocab_size": 61, "experts": ExpertCounts(ffn=4)}


def make(seed=0, **changes) -> Decoder:
    return Decoder(DecoderConfig(**SMALL | changes), seed)


def ids(batch=2, length=12, seed=0):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2}, {"kv_heads": 1, "moe_every": 2}, {"tie_embeddings": True}, {"attention": "plain"}],
    ids=str,
)
def test_cached_decoding_equals_the_whole_sequence(changes):
    model = make(**changes, init_std=0.2).eval()
    prompt = ids()
    whole = model(prompt).logits
    torch.testing.assert_close(model(prompt[:, :5]).logits, whole[:, :5], rtol=0, atol=1e-5)  # causal
    generated = model.generate(prompt, 6)
    assert torch.equal(generated[:, :12], prompt)
    expected = prompt
    for _ in range(6):  # without a cache
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}], ids=str)
def test_the_plain_attention_equals_the_fused_one_with_gradients(changes):
    outcomes = []
    for kernel in ("fused", "plain"):
        model = make(**changes, init_std=0.2, attention=kernel)
        logits = model(ids()).logits
        outcomes.append([logits, *torch.autograd.grad(logits.square().mean(), model.blocks[0].attention.parameters())])
    for fused, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


def test_sampling_follows_its_generator_and_its_temperature():
    model = make(init_std=0.3)
    draw = [model.generate(ids(), 8, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    cold = model.generate(ids(), 8, 1e-4, torch.Generator().manual_seed(3))
    assert torch.equal(cold, model.generate(ids(), 8))
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "temperature", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), 0.0, "one id or more"),
        (torch.zeros(3, dtype=torch.int64), 0.0, "one id or more"),
        (torch.zeros(1, 3, dtype=torch.int64), -1.0, "temperature=-1.0 must not be negative"),
        (torch.zeros(1, 3, dtype=torch.int64), math.nan, "temperature=nan must not be negative"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompt, temperature, message):
    with pytest.raises(UsageError, match=message):
        make().generate(prompt, 2, temperature)


def test_a_model_trains_on_after_a_continuation_that_failed():
    model = make().train()
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 3), model.config.vocab_size), 2)
    assert model.training


def test_rotary_attention_sees_distances_only():
    from moepp.models.attention import rotary_table, rotate

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, generator=generator)

    def at(position, x):
        return rotate(x[None], rotary_table(torch.tensor([position]), 8, 10_000.0))[0]

    assert torch.dot(at(7, q), at(3, k)).item() == pytest.approx(torch.dot(at(104, q), at(100, k)).item(), abs=1e-4)
    assert torch.dot(at(7, q), at(3, k)).item() != pytest.approx(torch.dot(at(9, q), at(3, k)).item(), abs=1e-3)


def test_grouped_keys_equal_repeated_keys():
    grouped = make(kv_heads=2, init_std=0.2).eval()
    full = make(init_std=0.2).eval()
    state = grouped.state_dict()
    for name in [n for n in state if n.endswith("w_qkv.weight")]:
        q, k, v = state[name].split([32, 16, 16])
        k, v = (w.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for w in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(ids()).logits, full(ids()).logits, rtol=0, atol=1e-5)


def test_the_gating_residual_carries_logits_through_every_moe_layer():
    model = make(init_std=0.2, moe_every=1).eval()
    output = model(ids())
    assert [logits.shape for logits in output.router_logits] == [(24, 8)] * 3
    with torch.no_grad():
        model.blocks[0].ffn.router.weight.mul_(3)  # may reach layer 2 only through what layer 0 hands on
        before = output.router_logits[2]
        model.blocks[1].ffn.router.residual.zero_()
        without = model(ids()).router_logits[2]
    assert not torch.allclose(before, without)
    assert model.blocks[0].ffn.router.residual is None


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for switch in (False, True):
        model = make(activation_checkpointing=switch)
        output = model(ids())
        (output.logits.square().mean() + model.balance_loss(output)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


METHODS = {
    "dense": {"moe_every": 0},
    "shared": {"experts": ExpertCounts(ffn=4, shared=1)},
    "shared_null": {"router": "shared_null", "gating_residual": False, "capacity_factor": None},
    "recurrent": {"router": "recurrent", "router_width": 8, "gating_residual": False},
    "relu": {"selection": "relu", "capacity_factor": None, "init_std": 0.2},
    "top_p": {"selection": "top_p", "capacity_factor": None, "balance": BalanceConfig(z_loss=0.1, entropy_loss=0.1)},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_activation_checkpointing_changes_no_gradient_of_other_methods(changes):
    gradients = []
    for switch in (False, True):
        model = make(activation_checkpointing=switch, **changes)
        output = model(ids())
        (output.logits.square().mean() + model.balance_loss(output)).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_recurrent_routers_gru_is_one_and_carries_its_state_from_layer_to_layer():
    model = make(router="recurrent", router_width=8, gating_residual=False, init_std=0.5).eval()
    assert [name for name in model.state_dict() if "gru" in name] == ["router_gru.weight_ih", "router_gru.weight_hh"]
    grus = {id(block.ffn.router.shared[0]) for block in model.blocks}
    assert grus == {id(model.router_gru)}
    before = model(ids()).router_logits
    with torch.no_grad():
        model.router_gru.weight_hh.zero_()  # the first layer's state before is 0 in any case
    after = model(ids()).router_logits
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


def test_router_losses_are_averaged_over_layers_and_added_to_the_balance_loss():
    plain, with_losses = make(), make(balance=BalanceConfig(z_loss=0.5, entropy_loss=0.25))
    output = with_losses(ids())
    expected = plain.balance_loss(plain(ids()))
    for logits in output.router_logits:
        p = logits.softmax(-1)
        loss = 0.5 * logits.exp().sum(-1).log().square().mean() - 0.25 * (p * p.log()).sum(-1).mean()
        expected = expected + loss / 3
    torch.testing.assert_close(with_losses.balance_loss(output), expected)


def test_a_dense_model_has_no_moe_layer_and_no_balance_loss():
    model = make(moe_every=0)
    output = model(ids())
    assert model.moe_layers() == output.stats == [] and model.balance_loss(output) == 0
    assert {block.ffn.w_out.in_features for block in model.blocks} == {2 * 24}


def test_targets_are_scored_in_place_of_logits():
    model, tokens = make(init_std=0.2), ids(length=13)
    given, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(given).logits
    trained, nats = (
        model(given, targets_BS=targets),
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"),
    )
    with torch.no_grad():
        scored = model(given, targets_BS=targets)
    assert trained.logits is scored.logits is trained.nats_BS is None
    torch.testing.assert_close(scored.nats_BS, nats.detach())
    assert torch.equal(scored.right_BS, logits.argmax(-1) == targets)
    for output in (trained, scored):
        torch.testing.assert_close(output.cross_entropy, nats.mean())
    assert trained.cross_entropy.requires_grad
    assert torch.equal(model.balance_loss(trained), model.balance_loss(scored))


def test_a_blocks_input_is_kept_only_where_hidden_states_are_asked_for():
    model, embedded, alive = make(), [], []
    model.embedding.register_forward_hook(lambda *call: embedded.append(weakref.ref(call[2])))
    model.blocks[2].register_forward_pre_hook(lambda *_: alive.append(embedded[-1]() is not None))
    with torch.no_grad():
        for asked in (False, True):
            states = model(ids(), hidden_states=asked).hidden_states
            assert (states is not None and len(states) == 4) if asked else states is None
    assert alive == [False, True]


def test_every_parameter_gets_a_gradient():
    model = make()
    output = model(ids())
    (output.logits.square().mean() + model.balance_loss(output)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_arms_share_the_initial_value_of_every_parameter_they_share():
    full, vanilla = make(), make(experts=ExpertCounts(4, 0, 0, 0), gating_residual=False)
    state, other = full.state_dict(), vanilla.state_dict()
    shared = [name for name in other if state[name].shape == other[name].shape]
    assert all(torch.equal(state[name], other[name]) for name in shared)
    assert sorted(set(other) - set(shared)) == [f"blocks.{i}.ffn.router.weight" for i in range(3)]
    assert not torch.equal(make(seed=1).embedding.weight, full.embedding.weight)
    experts = state["blocks.0.ffn.ffn.w_in"]
    assert not torch.equal(experts[0], experts[1])  # no two experts start alike


def test_residual_projections_start_smaller():
    model = make(dim=128, hidden=128, layers=8)
    assert model.blocks[0].ffn.ffn.w_in.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].ffn.ffn.w_out.std().item() == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8)
    assert model.blocks[0].attention.w_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"heads": 5}, "heads=5"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"moe_every": 4}, "moe_every=4"),
        ({"moe_every": -1}, "moe_every=-1"),
        ({"dim": 4}, "dim=4"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(changes, part):
    with pytest.raises(ValueError, match=part):
        DecoderConfig(**SMALL | changes)
