from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moepp.config import compose
from moepp.models.budget import expected_ffn_per_token
from moepp.models.decoder import Decoder
from moepp.training.settings import RunConfig
from moepp.training.throughput import (
    autocast_of,
    balanced_routing,
    expert_forward_times,
    peak_flops,
    training_batch,
    training_times,
)

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
    layers = len(models["vanilla"].moe_layers())
    for routing in ("learned", "balanced"):
        assert rows["vanilla", routing]["ffn_width"] == rows["dense", routing]["ffn_width"] == layers * 2 * 8
        assert rows["deepseek_moe", routing]["ffn_width"] == layers * 3 * 8
        assert rows["remoe", routing]["ffn_share"] == 1
    assert rows["remoe", "balanced"]["ffn_width"] == pytest.approx(layers * 1.2 * 8, abs=0.4)


def test_training_times_leave_models_as_they_were():
    models = {m: Decoder(model_config(m), seed=0) for m in ("vanilla", "moepp", "dense")}
    before = {name: {key: value.clone() for key, value in model.state_dict().items()} for name, model in models.items()}
    ids = torch.randint(0, 2048, (2, 33), generator=torch.Generator().manual_seed(0))
    batches = {"vanilla": ids, "moepp": ids[:1], "dense": ids}
    rows = training_times(models, batches, nullcontext, repeats=3, warmup=1)
    assert [(row["arm"], row["tokens"]) for row in rows] == [("vanilla", 64), ("moepp", 32), ("dense", 64)]
    assert all(row["median_ms"] >= row["min_ms"] > 0 for row in rows)
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_training_times_are_of_all_that_training_does(monkeypatch):
    passed = []
    model = Decoder(model_config("moepp"), seed=0)
    real = model.balance_loss
    monkeypatch.setattr(model, "balance_loss", lambda output: passed.append("balance") or real(output))
    model.embedding.weight.register_hook(lambda grad: passed.append("last") if grad.any() else None)
    training_times({"arm": model}, {"arm": torch.arange(34).view(2, 17)}, nullcontext, repeats=1, warmup=0)
    assert passed.count("balance") == 1 and "last" in passed and model.training


def test_a_training_batch_is_that_of_one_device():
    overrides = ["size=smoke", "data.batch_size=8", "data.seq_len=4", "trainer.accumulate=2", "trainer.devices=2"]
    config = compose(RunConfig, [*overrides, "strategy=ddp"])

    class Tokens:
        train = np.arange(100, dtype=np.uint16)

    assert training_batch(Tokens, config).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("Unknown", None),
    ],
)
def test_forms_of_a_gpu_have_peaks_of_their_own(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_a_model_is_timed_and_scored_in_the_precision_of_its_run(precision, dtype):
    config = compose(RunConfig, [f"trainer.precision={precision}"])
    with autocast_of(config.trainer.precision, torch.device("cpu"))():
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == dtype
