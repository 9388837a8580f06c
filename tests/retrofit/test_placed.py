"""Models whose weights another library placed, wrapped or copied before or after a retrofit."""

from copy import deepcopy

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny, transformers
from safetensors.torch import load_file

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, observe, retrofit, strip
from moepp.retrofit.modeling import blocks, routers


def calibrated(family="mixtral"):
    """With gating residuals that matter."""
    torch.manual_seed(0)
    model = retrofit(tiny(family))
    for router in routers(model)[1:]:
        torch.nn.init.normal_(router.residual, std=0.1)
    return calibrate(model, [IDS], share=0.3)


@pytest.mark.parametrize("family", ["mixtral", "gemma4"])
def test_new_experts_join_a_model_that_a_device_map_placed(family):
    accelerate = pytest.importorskip("accelerate", reason="peft of the extra hf brings it")
    here = tiny(family)
    torch.manual_seed(0)
    want = calibrate(retrofit(here), [IDS], share=0.3)(IDS).logits
    model = accelerate.dispatch_model(tiny(family), {"": "cpu"}, force_hooks=True)
    plain = model(IDS).logits
    torch.manual_seed(0)
    assert torch.equal(retrofit(model)(IDS).logits, plain)
    with observe(calibrate(model, [IDS], share=0.3)) as rows:
        assert torch.equal(model(IDS).logits, want)
    assert all(sum(row["load"][8:]) == pytest.approx(0.3, abs=0.05) for row in rows.values())
    assert torch.equal(strip(model)(IDS).logits, plain)


def test_an_offloaded_model_is_refused(tmp_path):
    pytest.importorskip("accelerate", reason="peft of the extra hf brings it")
    tiny("mixtral").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest"
    )
    with pytest.raises(UsageError, match=r"model.layers.1.mlp of MixtralForCausalLM is offloaded: load it by a dev"):
        retrofit(model)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_experts_in_whole_numbers_or_eight_bits_are_refused(dtype):
    model = tiny("mixtral", num_hidden_layers=1)
    experts = next(iter(blocks(model).values()))[1]
    experts.down_proj = torch.nn.Parameter(experts.down_proj.data.to(dtype), requires_grad=False)
    with pytest.raises(UsageError, match=f"layers.0.mlp of MixtralForCausalLM has weights in {str(dtype)[6:]}"):
        retrofit(model)
    assert not hasattr(model.config, "moepp") and type(model).__name__ == "MixtralForCausalLM"


def test_experts_that_layers_share_are_refused():
    model = tiny("mixtral")
    model.model.layers[2].mlp.experts = model.model.layers[0].mlp.experts
    with pytest.raises(UsageError, match=r"layers.2.mlp of MixtralForCausalLM shares its experts with model.layers.0"):
        retrofit(model)
    assert torch.isfinite(model(IDS).logits).all() and type(model).__name__ == "MixtralForCausalLM"


def test_weights_of_a_class_of_their_own_are_refused():
    class Packed(torch.nn.Parameter):
        pass

    model = tiny("mixtral", num_hidden_layers=1)
    experts = next(iter(blocks(model).values()))[1]
    experts.down_proj = Packed(experts.down_proj.data)
    with pytest.raises(UsageError, match="has weights in Packed, and new experts are none"):
        retrofit(model)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_routers_learn_whole_beside_adapters(family, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra hf")
    model = calibrated(family).train()
    want, kept = model(IDS).logits, deepcopy(model)
    name = next(name for name in ("gate", "router") if hasattr(model.model.layers[0].mlp, name))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # forwards, of which none sees the one before
        assert torch.equal(adapted(input_ids=IDS).logits, want)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad.any() for name, p in adapted.named_parameters() if name.endswith("default.residual"))
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    learnt = adapted(input_ids=IDS).logits
    assert not torch.equal(learnt, want)
    assert torch.equal(peft.PeftModel.from_pretrained(kept, tmp_path).train()(input_ids=IDS).logits, learnt)


def test_copies_of_a_model_have_carries_of_their_own():
    model = calibrated()
    twin = deepcopy(model)
    first, second = ({id(router.carry) for router in routers(of)} for of in (model, twin))
    assert len(first) == len(second) == 1 and first != second
    assert deepcopy(routers(model)[1]).carry is routers(model)[0].carry


def test_another_engines_folder_without_safetensors_is_one_line(tmp_path):
    model = retrofit(tiny("mixtral"), constant=0, gating_residual=False, init="zeda")
    export(model, tmp_path, format="zeda")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no weights in \*.safetensors"):
        load(tmp_path)
