from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import FAMILIES, IDS, tiny

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, observe, retrofit, strip, upcycle, wake
from moepp.retrofit.modeling import blocks, routers


def answers(model, ids=IDS):
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        tokens = model.generate(ids[:1], max_new_tokens=3, do_sample=False)
    return [out.logits, *out.hidden_states, tokens]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def force(model):
    """New experts of rows as large as the old ones' take about half of the slots, each of them some."""
    torch.manual_seed(1)
    for router in routers(model):
        router.new_rows.data.normal_(std=0.2)
        router.calibrated.fill_(1 if router.form.offset_in_logits else 0.2)
    return wake(model, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silent_model_computes_what_the_original_did(family):
    model = tiny(family)
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        want = {}
        backends = ("eager",) if family == "longcat_flash" else ("eager", "grouped_mm", "batched_mm")
        for backend in backends:
            model.set_experts_implementation(backend)
            want[backend] = answers(model)
        retrofit(model)
        for backend in backends:
            model.set_experts_implementation(backend)
            assert same(answers(model), want[backend]), backend
        strip(model)
        assert same(answers(model), want[backend])
        assert not hasattr(model.config, "moepp")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_new_parameter_learns_and_checkpointing_changes_nothing(family):
    model = force(retrofit(tiny(family), scaled_copy=True)).train()
    names = ("new_rows", "residual", "w_mix", "vectors", "copy_scale")
    new = [name for name, _ in model.named_parameters() if name.endswith(names)]
    assert len(new) == 3 * 4 + 2
    ids = torch.randint(3, 64, (2, 2, 24))

    def gradients():
        model.zero_grad()
        first, second = (model(half, labels=half).loss for half in ids)  # two forwards, then the backward
        (first + 2 * second).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert [name for name in new if name not in plain or not plain[name].any()] == []
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_reads_back_equal(family, tmp_path):
    model = force(retrofit(tiny(family)))
    export(model, tmp_path)
    again, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jamba"])
def test_the_familys_own_balance_loss_sees_all_columns(family):
    model = force(retrofit(tiny(family)))
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert {logits.shape[-1] for logits in out.router_logits} == {12}
    assert torch.isfinite(out.aux_loss) and out.aux_loss > 0


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "longcat_flash"])
def test_calibration_reaches_its_share_in_every_layer(family):
    model = retrofit(tiny(family))
    ids = torch.randint(3, 64, (4, 50))
    calibrate(model, [ids], share=0.3)
    with observe(model) as rows:
        model(ids)
    for row in rows.values():
        assert sum(row["load"][-4:]) == pytest.approx(0.3, abs=0.01)
    wake(model, 0)
    with observe(model) as rows:
        model(ids)
    assert all(sum(row["load"][-4:]) == 0 for row in rows.values())


def test_new_experts_slots_are_never_multiplied(monkeypatch):
    model = retrofit(tiny("gpt_oss"))
    calibrate(model, [IDS], share=0.5)
    (_, experts), rows = next(iter(blocks(model).values())), []
    gate = type(experts)._apply_gate
    monkeypatch.setattr(type(experts), "_apply_gate", lambda self, x: rows.append(len(x)) or gate(self, x))
    for backend in ("eager", "batched_mm"):
        rows.clear()
        model.set_experts_implementation(backend)
        model(IDS)
        assert sum(rows) == pytest.approx(3 * IDS.numel() * 2 / 2, abs=3), backend


def test_an_upcycled_model_computes_what_the_dense_one_did():
    dense = tiny("llama")
    torch.testing.assert_close(upcycle(dense)(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-4)


def test_zeda_draws_new_rows_around_the_old_ones():
    model = tiny("qwen3_moe")
    router = next(iter(blocks(model).values()))[0]
    with torch.no_grad():
        router.weight.add_(5)
    retrofit(model, init="zeda")
    assert (router.new_rows.mean() - router.weight.mean()).abs() < 0.1


def test_a_zeda_folder_reads_back_equal(tmp_path):
    model = retrofit(tiny("qwen3_moe"), constant=0, gating_residual=False, init="zeda")
    export(model, tmp_path, format="zeda")
    torch.testing.assert_close(load(tmp_path).eval()(IDS).logits, model(IDS).logits, rtol=0, atol=2e-6)
    with pytest.raises(UsageError, match="offsets"):
        export(wake(calibrate(model, [IDS], share=0.2), 0.5), tmp_path, format="zeda")


def test_a_longcat_folder_reads_back_equal_in_plain_transformers(tmp_path):
    model = retrofit(tiny("longcat_flash"), zero=0, constant=0, copy=2, gating_residual=False, init="zeda")
    export(model, tmp_path, format="longcat")
    again = load(tmp_path).eval()
    assert type(again).__name__ == "LongcatFlashForCausalLM" and again.config.zero_expert_num == 4
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_what_cannot_be_done_is_refused_in_one_line():
    model = tiny("phimoe")
    with pytest.raises(UsageError, match="PhimoeTopKRouter is a router of unknown form"):
        retrofit(model)
    assert not hasattr(model.config, "moepp") and type(model).__name__ == "PhimoeForCausalLM"
    with pytest.raises(UsageError, match="LlamaForCausalLM has no MoE block"):
        retrofit(tiny("llama"))
    model = retrofit(tiny("mixtral"))
    with pytest.raises(UsageError, match="already"):
        retrofit(model)
    with pytest.raises(ValueError, match="use_kernels"):
        model.use_kernels = True
    with pytest.raises(ValueError, match="use_reentrant"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="must lie between 0 and"):
        calibrate(retrofit(tiny("mixtral"), zero=1, copy=0, constant=0), [IDS], share=0.9)


def test_a_foreign_recomputation_is_refused():
    from torch.utils.checkpoint import checkpoint

    model = force(retrofit(tiny("mixtral")))
    loss = checkpoint(lambda ids: model(ids, labels=ids).loss, IDS, use_reentrant=False)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss.backward()


def test_copies_are_independent():
    model = retrofit(tiny("mixtral"))
    twin = deepcopy(model)
    assert same(answers(twin), answers(model))
