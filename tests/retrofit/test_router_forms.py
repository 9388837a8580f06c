"""Routers that scale their input and their gates and answer with probabilities (Gemma 4), and scores of DeepSeek V4."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, OWN_SIZES, SIZES, tiny, transformers

from moepp.config import compose
from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, observe, retrofit, strip
from moepp.retrofit.model import TransformersModel, without_adapters
from moepp.retrofit.modeling import blocks, routers
from moepp.training.settings import RunConfig

TEXT_SIZES = {key: SIZES[key] for key in SIZES if "expert" not in key} | OWN_SIZES["gemma4"]
VISION_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
X = torch.randn(14, 32, generator=torch.Generator().manual_seed(2))


def gemma():
    """With factors that are not all 1."""
    model = tiny("gemma4")
    with torch.no_grad():
        for router, _ in blocks(model).values():
            router.scale.normal_(1, 0.5)
            router.per_expert_scale.uniform_(0.5, 2)
    return model


def awake():
    return calibrate(retrofit(gemma()), [IDS], share=0.4)


def test_a_router_that_answers_with_probabilities_does_so_for_all_experts():
    model = gemma()
    want = model(IDS, output_router_logits=True).router_logits
    silent = retrofit(model)(IDS, output_router_logits=True).router_logits
    assert all(torch.equal(F.pad(old, (0, 4)), new) for old, new in zip(want, silent, strict=True))
    for probs_TN in calibrate(model, [IDS], share=0.4)(IDS, output_router_logits=True).router_logits:
        assert probs_TN.shape == (14, 12) and probs_TN[:, 8:].any()
        torch.testing.assert_close(probs_TN.sum(-1), torch.ones(14))


def test_new_rows_see_what_the_familys_matrix_sees():
    router, heard = routers(awake())[0], []
    router.proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    router.logits.register_forward_hook(lambda _, args, logits_TN: heard.append(logits_TN))
    router(3 * X)
    x_TD, logits_TN = heard[-2:]
    assert not torch.allclose(x_TD, 3 * X)
    torch.testing.assert_close(logits_TN[:, 8:], F.linear(x_TD, router.new_rows) + router.offset)
    assert router.proj.seen is None  # no activation outlives its forward


def test_a_factor_for_each_experts_gate_leaves_new_experts_theirs():
    router = routers(awake())[0]
    probs_TN, gate_TK, expert_TK = router(X)
    probs_TK = probs_TN.gather(1, expert_TK)
    factor_N = torch.cat([router.per_expert_scale, torch.ones(4)])
    assert (expert_TK >= 8).any() and (expert_TK < 8).any()
    torch.testing.assert_close(gate_TK, probs_TK / probs_TK.sum(-1, keepdim=True) * factor_N[expert_TK])


def test_a_router_with_a_matrix_of_its_own_compiles_in_one_graph():
    router = routers(awake())[0]
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    assert all(torch.equal(*pair) for pair in zip(compiled(X), router(X), strict=True))


def test_adapters_around_a_routers_matrix_route_and_learn():
    peft = pytest.importorskip("peft", reason="needs the extra hf")
    model = awake()
    want = model(IDS).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["proj"], init_lora_weights=False))
    said = adapted(input_ids=IDS).logits
    assert not torch.equal(said, want)
    said.square().mean().backward()
    learnt = [p.grad.any() for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(learnt) == 6 and all(learnt)
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, said, rtol=0, atol=1e-4)


def test_probabilities_are_observed_as_such():
    model, found = gemma(), []
    for change in (lambda model: model, retrofit):
        with observe(change(model)) as rows:
            model(IDS)
        found.append([number for row in rows.values() for number in (row["entropy"], row["top_score"])])
    probs_LTE = torch.stack(strip(model)(IDS, output_router_logits=True).router_logits)
    want_L2 = torch.stack([torch.special.entr(probs_LTE).sum(-1).mean(1), probs_LTE.amax(-1).mean(1)], 1)
    assert found[0] == pytest.approx(want_L2.flatten().tolist())
    assert found[1] == pytest.approx(found[0])


def asked(overrides, folder, *more):
    words = [*overrides, "model=hf", f"model.path={folder}", "model.balance.beta=0.01", *more]
    return compose(RunConfig, words).model


@pytest.mark.parametrize("zero", [0, 2])
def test_a_balance_loss_takes_a_routers_probabilities(overrides, tmp_path, zero):
    gemma().save_pretrained(tmp_path)
    model = TransformersModel(asked(overrides, tmp_path, f"model.retrofit.zero={zero}"))
    if zero:
        model.calibrate([IDS])
    output = model(IDS[:, :-1], targets_BS=IDS[:, 1:])
    probs = model.hf(IDS[:, :-1], output_router_logits=True).router_logits
    for layer, probs_TN in zip(output.stats, probs, strict=True):
        torch.testing.assert_close(layer.entropy, torch.special.entr(probs_TN).sum(-1).mean())
    model.balance_loss(output).backward()
    assert all(router.proj.weight.grad.isfinite().all() for router, _ in blocks(model.hf).values())


def test_a_z_loss_of_a_router_that_answers_with_probabilities_is_refused(overrides, tmp_path):
    gemma().save_pretrained(tmp_path)
    more = "model.balance.z_loss=0.001"
    with pytest.raises(UsageError, match="Gemma4TextRouter answers with probabilities, not logits"):
        TransformersModel(asked(overrides, tmp_path, more))(IDS)
    model = TransformersModel(asked(overrides, tmp_path, more, "model.retrofit.zero=1"))
    assert all(layer.router_loss > 0 for layer in model(IDS).stats)


def test_a_layer_that_is_a_moe_block_has_adapters_on_its_attention(overrides, tmp_path):
    pytest.importorskip("peft", reason="needs the extra hf")
    gemma().save_pretrained(tmp_path)
    model = TransformersModel(asked(overrides, tmp_path, "model.retrofit.zero=1", "model.retrofit.train=lora"))
    adapted = {name for name, p in model.hf.named_parameters() if "lora_" in name}
    assert any("self_attn.q_proj" in name for name in adapted) and any("mlp.up_proj" in name for name in adapted)
    assert not any("router" in name or "experts" in name for name in adapted)
    assert not any("lora_" in name for name in without_adapters(model.hf).state_dict())


def test_a_familys_own_kind_of_linear_layer_has_no_adapters(overrides, tmp_path):
    pytest.importorskip("peft", reason="needs the extra hf")
    tiny("deepseek_v4").save_pretrained(tmp_path)
    model = TransformersModel(asked(overrides, tmp_path, "model.retrofit.zero=1", "model.retrofit.train=lora"))
    adapted = {name for name, p in model.hf.named_parameters() if "lora_" in name}
    assert any("q_b_proj" in name for name in adapted) and not any("o_a_proj" in name for name in adapted)
    assert model(IDS).logits.isfinite().all()


def test_what_a_zeda_folder_has_no_place_for_is_refused(tmp_path):
    model = retrofit(gemma(), constant=0, gating_residual=False, init="zeda")
    with pytest.raises(UsageError, match="format=zeda has no place for a factor for each expert's gate"):
        export(model, tmp_path, format="zeda")


def test_a_multimodal_gemma_is_retrofitted_in_its_text_model(plain, tmp_path):
    config = transformers.Gemma4Config(text_config=TEXT_SIZES, vision_config=VISION_SIZES, audio_config=None)
    model = transformers.Gemma4ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    want = model(input_ids=IDS).logits
    assert torch.equal(retrofit(model)(input_ids=IDS).logits, want)
    want = calibrate(model, [IDS], share=0.3)(input_ids=IDS).logits
    for again in (load(export(model, tmp_path)).eval(), plain(tmp_path)):
        torch.testing.assert_close(again(input_ids=IDS).logits, want, rtol=0, atol=5e-6)


def test_both_stacks_of_a_diffusion_model_are_retrofitted(tmp_path):
    config = transformers.DiffusionGemmaConfig(text_config=TEXT_SIZES, vision_config=VISION_SIZES, canvas_length=8)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    want = model(**batch).logits
    assert torch.equal(retrofit(model)(**batch).logits, want)
    assert len(routers(model)) == 6 and len({id(router.carry) for router in routers(model)}) == 2
    want = calibrate(model, [batch], share=0.3)(**batch).logits
    torch.testing.assert_close(load(export(model, tmp_path)).eval()(**batch).logits, want, rtol=0, atol=5e-6)


def test_a_layer_that_routes_by_a_table_is_left_out():
    kinds = ["hash_moe", "moe", "moe"]
    model = tiny("deepseek_v4", mlp_layer_types=kinds)
    with pytest.raises(UsageError, match=r"DeepseekV4HashRouter .* leave model\.layers\.0\.mlp out by `layers`"):
        retrofit(model)
    want = model(IDS).logits
    twin = deepcopy(model)
    assert torch.equal(retrofit(model, layers=[1, 2])(IDS).logits, want)
    assert routers(model)[0].form.score == "sqrt_softplus"
    calibrate(model, [IDS], share=0.3)
    assert not torch.equal(model(IDS).logits, want) and torch.equal(strip(model)(IDS).logits, twin(IDS).logits)


def test_a_balance_loss_takes_shares_of_scores_by_sqrt_softplus(overrides, tmp_path):
    tiny("deepseek_v4").save_pretrained(tmp_path)
    model = TransformersModel(asked(overrides, tmp_path, "model.retrofit.zero=1"))
    layer = model(IDS).stats[0]
    shares_TN = F.normalize(F.softplus(layer.logits_TN).sqrt(), p=1, dim=-1)
    torch.testing.assert_close(layer.entropy, torch.special.entr(shares_TN).sum(-1).mean())
