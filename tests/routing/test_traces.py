import numpy as np
import pytest
import torch

from moepp.errors import UsageError
from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.routing import traces as routing
from moepp.routing.texts import Text

END, CONTEXT = 0, 16


def decoder(**changes) -> Decoder:
    size = {"dim": 16, "hidden": 16, "layers": 3, "heads": 2, "vocab_size": 50, "init_std": 0.3}
    return Decoder(DecoderConfig(**size, experts=ExpertCounts(ffn=4), **changes), seed=0).eval()


@pytest.fixture(scope="module")
def model():
    return decoder()


@pytest.fixture(scope="module")
def texts():
    """Texts shorter and longer than the context, one of a single token."""
    generator = np.random.default_rng(1)
    lengths = [5, 1, 40, 15, 9, 31]
    return [
        Text(generator.integers(1, 50, n), np.full(n, 2), f"g{i % 2}", answer=n // 2) for i, n in enumerate(lengths)
    ]


def one_by_one(model, texts):
    """Expert ids [S, L, K], the two highest scores [S, L, 2] and nats [S] of each text, window by window, unbatched."""
    found = []
    for text in texts:
        experts, scores, nats = [], [], []
        for start in range(0, len(text.ids), CONTEXT - 1):
            ids = np.concatenate([[text.ids[start - 1] if start else END], text.ids[start : start + CONTEXT - 1]])
            with torch.inference_mode():
                output = model(torch.from_numpy(ids)[None])
            probs = torch.stack([layer.logits_TN.softmax(-1)[1:] for layer in output.stats], dim=1)
            top = probs.topk(2, dim=-1)
            experts.append(top.indices)
            scores.append(top.values)
            log_probs = output.logits[0, :-1].log_softmax(-1)
            nats.append(-log_probs[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])])
        found.append([torch.cat(parts).numpy() for parts in (experts, scores, nats)])
    return found


@pytest.fixture(scope="module")
def expected(model, texts):
    return one_by_one(model, texts)


def trace(model, texts, **more):
    return routing.trace(model, texts, END, CONTEXT, **more)


@pytest.mark.parametrize("batch_tokens", [CONTEXT, 60, 4096])
def test_every_token_is_traced_once_and_as_without_batches(model, texts, expected, batch_tokens, monkeypatch):
    monkeypatch.setattr(routing, "BATCH_TOKENS", batch_tokens)
    seen = set()
    for batch in trace(model, texts):
        for t, (text, position) in enumerate(zip(batch.text_T, batch.position_T, strict=True)):
            assert (text, position) not in seen
            seen.add((text, position))
            experts, scores, nats = (side[position] for side in expected[text])
            assert (batch.expert_LTK[:, t] == experts).all()
            assert np.sort(batch.probs_LTN[:, t])[:, :-3:-1] == pytest.approx(scores, abs=1e-5)
            assert batch.nats_T[t] == pytest.approx(nats, abs=1e-4)
    assert len(seen) == sum(len(text.ids) for text in texts)


def test_load_counts_experts_by_text_and_layer_and_scores_answers_only(model, texts, expected):
    load = routing.expert_load(model, texts, trace(model, texts))
    assert load.kinds == ("ffn",) * 4 + ("constant",) * 2 + ("copy", "zero")
    for index, (text, (experts, _, nats)) in enumerate(zip(texts, expected, strict=True)):
        for layer in range(3):
            counts = np.bincount(experts[:, layer].ravel(), minlength=8)
            assert (load.chosen_XLN[index, layer] == counts).all()
        assert load.nats_X[index] == pytest.approx(nats[text.answer :].sum(), rel=1e-4)
        assert load.bytes_X[index] == 2 * (len(text.ids) - text.answer)
    assert load.chosen_XLN.sum() == 2 * 3 * load.tokens_X.sum()
    assert load.groups == ("g0", "g1")


def test_scores_hold_the_moments_of_all_tokens(model, texts, expected):
    found = routing.routing_scores(model, trace(model, texts))
    scores = np.concatenate([side[1] for side in expected]).astype(float)  # [T, L, 2]
    statistics = found.statistics()
    assert found.tokens == len(scores)
    assert statistics["mean"] == pytest.approx(scores.mean(0), abs=1e-6)
    assert statistics["variance"] == pytest.approx(scores.var(0), abs=1e-6)
    assert statistics["range"] == pytest.approx(np.ptp(scores, axis=0), abs=1e-6)
    pooled = found.pooled().statistics()
    flat = scores.reshape(-1, 2)
    assert pooled["variance"][0] == pytest.approx(flat.var(0), abs=1e-6)
    low, high = np.quantile(flat, (0.01, 0.99), axis=0)
    assert pooled["range98"][0] == pytest.approx(high - low, abs=0.05)


def test_ffn_experts_of_every_token_are_the_mean_over_layers(model, texts, expected):
    found, _ = routing.ffn_and_nats(model, texts, trace(model, texts))
    for ours, (experts, *_) in zip(found, expected, strict=True):
        assert ours == pytest.approx((experts < 4).sum(-1).mean(-1))


def test_slots_that_are_not_used_are_not_counted(texts):
    model = decoder(selection="top_p", top_p=0.3, capacity_factor=None)
    load = routing.expert_load(model, texts, trace(model, texts))
    slots = load.chosen_XLN.sum(-1) / load.tokens_X[:, None]
    assert (slots >= 1).all() and slots.mean() < 7


def test_a_dense_model_is_refused(texts):
    with pytest.raises(UsageError, match="a dense model routes nothing"):
        next(trace(decoder(moe_every=0), texts))
