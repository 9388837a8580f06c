from contextlib import nullcontext

import pytest
import torch

from moepp.config import compose
from moepp.models.budget import expected_ffn_per_token
from moepp.models.decoder import Decoder
from moepp.training.settings import RunConfig
from moepp.training.throughput import autocast_of, balanced_routing, expert_forward_times

METHODS = ["vanilla", "moepp", "adamoe", "longcat", "remoe", "top_p"]


def model_config(method):
    return compose(RunConfig, ["size=tiny", f"model={method}", "model.hidden=8"]).model


@pytest.mark.parametrize("method", METHODS)
def test_balanced_routing_reaches_the_methods_ffn_experts_per_token_evenly(method):
    config, tokens = model_config(method), 1000
    routing = balanced_routing(config, tokens, torch.Generator().manual_seed(0), torch.device("cpu"))
    total, ffn = config.experts.total, config.experts.ffn
    count = torch.bincount(routing.expert_TK.flatten(), minlength=total + 1)
    assert count[:ffn].sum().item() / tokens == pytest.approx(expected_ffn_per_token(config), abs=0.01)
    for kind in (count[:ffn], count[ffn:total]):
        assert kind.numel() == 0 or kind.max() - kind.min() <= 1
    used = [row[row < total] for row in routing.expert_TK]
    assert all(len(row.unique()) == len(row) for row in used)  # a token picks an expert once
    if config.selection == "top_k":
        assert count[total] == 0


def test_expert_times_say_how_much_ffn_a_token_passes():
    models = {m: Decoder(model_config(m), seed=0) for m in ("vanilla", "dense", "deepseek_moe", "remoe")}
    ids = torch.randint(0, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    rows = {
        (row["arm"], row["routing"]): row for row in expert_forward_times(models, ids, nullcontext, repeats=2, warmup=1)
    }
    assert set(rows) == {(arm, routing) for arm in models for routing in ("learned", "balanced")}
    assert all(row["median_ms"] >= row["min_ms"] > 0 for row in rows.values())
    for routing in ("learned", "balanced"):
        assert rows["vanilla", routing]["ffn_width"] == rows["dense", routing]["ffn_width"] == 2 * 8
        assert rows["deepseek_moe", routing]["ffn_width"] == 3 * 8
        assert rows["remoe", routing]["ffn_share"] == 1
    assert rows["remoe", "balanced"]["ffn_width"] == pytest.approx(1.2 * 8, abs=0.1)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_model_is_timed_and_scored_in_the_precision_of_its_run(precision, dtype):
    config = compose(RunConfig, [f"trainer.precision={precision}"])
    with autocast_of(config, torch.device("cpu"))():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
