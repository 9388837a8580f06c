from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import FAMILIES, IDS, tiny, transformers

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, observe, retrofit, strip, upcycle, wake
from moepp.retrofit.calibration import Aim
from moepp.retrofit.model import skeleton
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


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "longcat_flash"])
def test_a_calibrated_model_routes_alike_where_it_is_rounded_otherwise(family):
    model = calibrate(retrofit(tiny(family)), [IDS], share=0.3)
    offsets = [router.offset.clone() for router in routers(model)]
    with observe(model) as here:
        model(IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 1e-6 * torch.randn_like(parameter)
    with observe(model) as elsewhere:
        model(IDS)
    assert [row["load"] for row in here.values()] == [row["load"] for row in elsewhere.values()]
    wake(calibrate(model, [IDS], share=0.3, tolerance=0.1), 1.0)
    assert same([router.offset for router in routers(model)], offsets)  # within the tolerance already


@pytest.mark.parametrize(
    ("turns", "share", "offset"),
    [
        ([0.0, 1.0, 2.0, 4.0], 0.25, 0.5),
        ([0.0, 1.0, 2.0, 4.0], 0.3, 0.5),
        ([0.0, 1.0, 1.0 + 1e-7, 1.0 + 2e-7, 4.0, 5.0, 6.0, 7.0], 0.25, 0.5),  # not between equal tokens
        ([0.0, 1.0, 2.0, 4.0], 1.0, 5.0),  # all of them: beyond the last by the mean distance
        ([3.0, 3.0, 3.0, 3.0], 0.9, 3.001),
    ],
)
def test_an_offset_lies_in_the_middle_of_a_gap(turns, share, offset):
    aim = Aim(torch.tensor(turns), 1, share, tolerance=0.01)
    assert aim.offset == pytest.approx(offset)
    assert not aim.met_by(turns[1])
    assert aim.met_by(aim.offset) == (share in (0.25, 1.0) and turns[2] == 2)


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


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])  # whose files call its blocks otherwise
def test_a_zeda_folder_reads_back_equal(family, tmp_path):
    model = retrofit(tiny(family), constant=0, gating_residual=False, init="zeda")
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
    for given, said in (
        ({"zero": "1"}, "zero='1': must be a whole number, 0 or more"),
        ({"copy": 1.0}, "copy=1.0: must be a whole number"),
        ({"constant": -1}, "constant=-1: must be a whole number"),
        ({"layers": []}, "chooses no MoE block of MixtralForCausalLM, which has 3"),
        ({"layers": ["0"]}, "layers: '0' is no MoE block"),
        ({"zero": 0, "copy": 0, "constant": 0, "gating_residual": False}, "nothing to add"),
        ({"zero": 0, "copy": 0, "constant": 0, "layers": [1]}, "nothing to add"),
    ):
        model = tiny("mixtral")
        with pytest.raises(UsageError, match=said):
            retrofit(model, **given)
        assert not hasattr(model.config, "moepp") and type(model).__name__ == "MixtralForCausalLM"
    model = retrofit(tiny("mixtral"))
    with pytest.raises(UsageError, match="already"):
        retrofit(model)
    with pytest.raises(ValueError, match="use_kernels"):
        model.use_kernels = True
    with pytest.raises(ValueError, match="use_reentrant"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="must lie between 0 and"):
        calibrate(retrofit(tiny("mixtral"), zero=1, copy=0, constant=0), [IDS], share=0.9)


def test_a_router_that_does_not_say_how_many_experts_it_has_is_refused():
    model = tiny("mixtral")
    for router, _ in blocks(model).values():
        del router.num_experts
    with pytest.raises(UsageError, match="MixtralTopKRouter is a router of unknown form: it says neither num_experts"):
        retrofit(model)


def test_what_goes_around_new_experts_is_refused(tmp_path):
    from transformers.distributed import DistributedConfig

    model = retrofit(tiny("mixtral"))
    model.save_pretrained(tmp_path)
    for asked in (DistributedConfig(tp_size=2, ep_size=2), {"tp_size": 2, "enable_expert_parallel": True}):
        with pytest.raises(ValueError, match="ep_size=1"):
            type(model).from_pretrained(tmp_path, distributed_config=asked)
    with pytest.raises(ValueError, match="use_kernels"):
        type(model).from_pretrained(tmp_path, use_kernels=True)
    model = tiny("mixtral")
    model._use_kernels = True
    with pytest.raises(UsageError, match="use_kernels=True"):
        retrofit(model)
    model = tiny("mixtral")
    next(iter(blocks(model).values()))[1]._is_expert_parallel = True
    with pytest.raises(UsageError, match="ep_size=1"):
        retrofit(model)


def test_adapters_go_around_new_experts_not_inside():
    peft = pytest.importorskip("peft", reason="needs the extra hf")
    adapted = peft.get_peft_model(tiny("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="PeftModel is no model of transformers: retrofit the model that it wraps"):
        retrofit(adapted)
    model = calibrate(retrofit(tiny("mixtral")), [IDS], share=0.3)
    want = model(IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert torch.equal(adapted(input_ids=IDS).logits, want)
    assert same([adapted.merge_and_unload()(IDS).logits], [want])


def test_a_multimodal_model_is_retrofitted_in_its_text_model(tmp_path):
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    want = model(input_ids=IDS).logits
    assert torch.equal(retrofit(model)(input_ids=IDS).logits, want)
    want = calibrate(model, [IDS], share=0.3)(input_ids=IDS).logits
    torch.testing.assert_close(load(export(model, tmp_path)).eval()(input_ids=IDS).logits, want, rtol=0, atol=2e-6)
    with pytest.raises(UsageError, match="model_type=qwen3_vl_moe has no causal language model"):
        skeleton(model.config.to_dict())


def test_experts_of_images_are_a_stack_of_their_own_and_stay_silent_in_a_text():
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": [32, 32],
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_num_experts": 8, "moe_k": 2,
        "moe_layer_start_index": 0, "pad_token_id": 0, "mlp_layer_types": ["sparse"] * 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    model = transformers.Ernie4_5_VLMoeTextModel(transformers.Ernie4_5_VLMoeTextConfig(**sizes)).eval()
    want = model(input_ids=IDS).last_hidden_state
    assert torch.equal(retrofit(model, scaled_copy=True)(input_ids=IDS).last_hidden_state, want)
    calibrate(model, [IDS], share=0.3)
    silent = {path: bool(router.offset[0] == -1e4) for path, (router, _) in blocks(model).items()}
    assert silent == {path: "vision" in path for path in silent} and len(silent) == 6
    text, images = ([r for p, (r, _) in blocks(model).items() if kind in p] for kind in ("text", "vision"))
    assert [router.residual is None for router in text] == [router.residual is None for router in images]
    assert text[0].carry is text[1].carry is not images[0].carry


def test_a_scaled_copy_gets_the_factor_nearest_to_what_experts_give():
    model = retrofit(tiny("mixtral"), zero=0, copy=1, constant=0, scaled_copy=True)
    heard = []
    banks = [experts for _, experts in blocks(model).values()]
    hook = banks[0].register_forward_hook(lambda _, args, y: heard.append((args[0], y)))
    model(IDS)
    hook.remove()
    (x, y), *_ = heard
    calibrate(model, [IDS], share=0.3)
    best = torch.linalg.lstsq(x.reshape(-1, 1), y.reshape(-1, 1)).solution  # Mixtral's gates sum to 1
    assert banks[0].copy_scale.item() == pytest.approx(best.item(), rel=1e-3)
    banks[0].copy_scale.data.fill_(0.5)
    calibrate(model, [IDS], share=0.3)
    assert banks[0].copy_scale.item() == 0.5  # learnt, or set


def test_padding_counts_in_no_statistic():
    padded = torch.cat([IDS, IDS.new_zeros(2, 64)], 1)
    batches = [{"input_ids": IDS}, {"input_ids": padded, "attention_mask": (padded > 0).long()}]
    found = []
    for batch in batches:
        model = calibrate(retrofit(tiny("mixtral"), copy=2, scaled_copy=True), [batch], share=0.3)
        with observe(model) as rows:
            model(**batch)
        factors = [experts.copy_scale[0].item() for _, experts in blocks(model).values()]
        offsets = [router.offset[0].item() for router in routers(model)]
        found.append([*factors, *offsets, *(number for row in rows.values() for number in row["load"])])
        found[-1] += [row[name] for row in rows.values() for name in ("entropy", "top_score")]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_padding_before_a_prompt_is_not_observed_as_text_goes_on():
    model, found = tiny("mixtral"), []
    for padding in (0, 5):
        ids = torch.nn.functional.pad(IDS[:1], (padding, 0))
        with observe(model) as rows:
            model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        found.append([row["load"] for row in rows.values()])
    assert found[0] == found[1]


def test_models_with_rows_of_odd_length_run():
    assert torch.isfinite(upcycle(tiny("llama", intermediate_size=51))(IDS).logits).all()


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
