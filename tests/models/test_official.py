import json
from pathlib import Path

import official_reference as reference
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moepp.errors import UsageError
from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.official import load_official, official_tensors, save_official
from moepp.models.settings import DecoderConfig

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ["released_7b_flags", "plain_softmax", "mixtral_gating", "two_layer_gate_mul_topk"]
# The last folder's router logits reach 21, where a step of float32 is 2e-6, and one token amplifies the rounding of its
# attention scores: the released code's own float32 logits lie 4e-5 from float64's.
TOLERANCE = dict.fromkeys(FOLDERS, 1e-5) | {"two_layer_gate_mul_topk": 1.5e-5}
TOLERANCE_OF_FLOAT64 = dict.fromkeys(FOLDERS, 1e-5) | {"two_layer_gate_mul_topk": 5e-5}
FLAGS = {
    "grouped keys": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1, "moe_use_logits_norm": True},
    "other theta and eps": {"rope_theta": 500, "rms_norm_eps": 1e-3},
    "norm to 0.5": {"moe_use_logits_norm": True, "moe_gate_norm_std": 0.5},
    "norm to 3": {"moe_use_logits_norm": True, "moe_gate_norm_std": 3},
    "two layers and norm": {"moe_2layer_gate": True, "moe_use_logits_norm": True},
    "mixtral and norm": {"moe_use_mixtral_gating": True, "moe_use_logits_norm": True, "moe_gate_norm_std": 2.0},
    "mixtral never multiplies": {"moe_use_mixtral_gating": True, "moe_feature_no_mul_topk": False},
    "multiplied and norm": {"moe_feature_no_mul_topk": False, "moe_use_logits_norm": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "all defaults of the released code": {"moe_2layer_gate": True, "moe_feature_no_mul_topk": False},
    "per-layer list": {"num_experts": [7, 7, 7]},
}


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def cross_entropy(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    """The parameters' gradients under their official names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    shadow = Decoder(model.config)
    shadow.load_state_dict({name: parameter.grad for parameter, name in names.items()})
    return official_tensors(shadow)


def random_ids(batch=2, length=13):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_of_the_released_code_is_reproduced(name):
    expected, model = load_file(GOLDEN / name / "expected.safetensors"), load_official(GOLDEN / name)
    seen, atol = {}, TOLERANCE[name]
    for i, layer in enumerate(model.moe_layers()):
        layer.register_forward_hook(lambda _, inputs, outputs, i=i: seen.update({i: (inputs[0], outputs[0])}))
    output = model(expected["input_ids"], hidden_states=True)
    close(output.logits, expected["logits"], atol)
    for i, states in enumerate(output.hidden_states):
        close(states, expected[f"hidden_states.{i}"], atol)
    for i, (layer, logits_TN) in enumerate(zip(model.moe_layers(), output.router_logits, strict=True)):
        close(logits_TN, expected[f"router_logits.{i}"], atol)
        routing = layer.route(logits_TN)
        close(torch.zeros_like(logits_TN).scatter(1, routing.expert_TK, routing.gate_TK), expected[f"gates.{i}"], atol)
        close(seen[i][0], expected[f"moe_in.{i}"], atol)
        close(seen[i][1], expected[f"moe_out.{i}"], atol)
    loss = cross_entropy(output.logits, expected["input_ids"])
    close(loss[None], expected["loss"])
    loss.backward()
    found, wanted = gradients(model), [key for key in expected if key.startswith("grad.")]
    assert len(wanted) == (0 if name == "two_layer_gate_mul_topk" else 24)  # there, the released code has none
    for key in wanted:
        close(found[key.removeprefix("grad.")], expected[key])


@pytest.mark.parametrize("name", FOLDERS)
def test_cached_greedy_decoding_continues_as_the_released_code(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    generated = load_official(GOLDEN / name).generate(expected["input_ids"][:1, :4], 12)
    assert torch.equal(generated, expected["greedy_ids"])  # the prompt included


@pytest.mark.parametrize("name", FOLDERS)
def test_the_reference_equals_the_released_code(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    keys = json.loads((GOLDEN / name / "config.json").read_text())
    tensors = {key: tensor.double() for key, tensor in load_file(GOLDEN / name / "model.safetensors").items()}
    logits, router_logits = reference.forward(keys, tensors, expected["input_ids"])
    close(logits.float(), expected["logits"], TOLERANCE_OF_FLOAT64[name])
    for i, logits_TN in enumerate(router_logits):
        close(logits_TN.float(), expected[f"router_logits.{i}"], TOLERANCE_OF_FLOAT64[name])


@pytest.mark.parametrize("changes", FLAGS.values(), ids=FLAGS)
def test_other_flags_equal_the_reference_and_survive_a_round_trip(changes, tmp_path):
    keys, tensors = reference.write_checkpoint(tmp_path / "first", **changes)
    model, ids = load_official(tmp_path / "first"), random_ids()
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    logits, router_logits = reference.forward(keys, exact, ids)
    output = model(ids)
    close(output.logits, logits.float())
    for found, wanted in zip(output.router_logits, router_logits, strict=True):
        close(found, wanted.float())
    cross_entropy(output.logits, ids).backward()
    cross_entropy(logits, ids).backward()
    for name, gradient in gradients(model).items():
        wanted = exact[name].grad  # None where the reference met no such token
        close(gradient, torch.zeros_like(gradient) if wanted is None else wanted.float())
    save_official(model, tmp_path / "second")
    again = load_official(tmp_path / "second")
    assert again.config.gate == model.config.gate and again.config.logits_norm == model.config.logits_norm
    assert torch.equal(again(ids).logits, output.logits)


def test_keys_left_out_have_the_released_codes_defaults(tmp_path):
    keys, _ = reference.write_checkpoint(tmp_path, moe_2layer_gate=True, moe_feature_no_mul_topk=False)
    named = load_official(tmp_path)
    for name in ("moe_2layer_gate", "moe_feature_no_mul_topk"):
        del keys[name]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert load_official(tmp_path).config == named.config


def test_multiplied_inputs_leave_the_callers_tensor_alone():
    layer = load_official(GOLDEN / "two_layer_gate_mul_topk").moe_layers()[0]
    x_BSD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    given = x_BSD.clone().requires_grad_()
    layer(given)[0].square().sum().backward()
    assert torch.equal(given, x_BSD) and given.grad.any()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 100_000, 1])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_checkpoint_holds_the_same_tensors_and_flags(name, shard_bytes, tmp_path):
    model = load_official(GOLDEN / name)
    save_official(model, tmp_path / "saved", shard_bytes)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert {safe_open(file, "pt").metadata()["format"] for file in files} == {"pt"}  # transformers insists on it
    saved = {key: tensor for file in files for key, tensor in load_file(file).items()}
    golden = load_file(GOLDEN / name / "model.safetensors")
    assert not saved.pop("model.layers.0.mlp.moe.gate.gate_map.weight").any()
    del golden["model.layers.0.mlp.moe.gate.gate_map.weight"]
    assert saved.keys() == golden.keys() and all(torch.equal(saved[key], golden[key]) for key in golden)
    keys, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "saved", GOLDEN / name))
    assert {key: original[key] for key in keys if key in original} == {k: v for k, v in keys.items() if k in original}
    assert not {"top_k", "num_constant_experts"} & keys.keys()  # to a reader of released configs, top_k means sampling
    index = tmp_path / "saved/model.safetensors.index.json"
    if shard_bytes == 5 * 2**30:
        assert [file.name for file in files] == ["model.safetensors"] and not index.exists()
        return
    weight_map = json.loads(index.read_text())["weight_map"]
    assert all(key in load_file(tmp_path / "saved" / weight_map[key]) for key in list(golden)[::7])
    assert all(len(load_file(file)) == 1 or file.stat().st_size < shard_bytes + 10_000 for file in files)
    again = load_official(tmp_path / "saved")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_dtype_is_the_callers_or_that_of_the_files(tmp_path):
    model = load_official(GOLDEN / "released_7b_flags", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save_official(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in load_official(tmp_path).parameters()} == {torch.bfloat16}
    exact, ids = load_official(GOLDEN / "released_7b_flags"), random_ids()
    agreement = F.cosine_similarity(model(ids).logits.float(), exact(ids).logits, dim=-1)
    assert agreement.median() > 0.999  # a few tokens may choose other experts


def test_tied_checkpoints_may_repeat_the_embedding_as_head(tmp_path):
    _, tensors = reference.write_checkpoint(tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_official(tmp_path).head is None


def test_keys_of_the_released_codes_constants_are_honoured(tmp_path):
    reference.write_checkpoint(tmp_path, top_k=3)
    assert load_official(tmp_path).config.top_k == 3
    keys, tensors = reference.write_checkpoint(tmp_path / "one", num_experts=[8])
    for name in [name for name in tensors if "experts.experts.4." in name]:  # constant experts: 4, 5; now 5 alone
        tensors.pop(name)
    for layer in range(3):
        for part, shape in (("up_proj", (48, 32)), ("down_proj", (32, 24))):
            tensors[f"model.layers.{layer}.mlp.moe.experts.experts.4.{part}.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "one/model.safetensors")
    (tmp_path / "one/config.json").write_text(json.dumps(keys | {"num_constant_experts": 1}))
    assert load_official(tmp_path / "one").config.experts == ExpertCounts(ffn=5, zero=1, copy=1, constant=1)


def refused_config(folder, keys):
    """The one line with which a config.json is refused."""
    (folder / "config.json").write_text(json.dumps(keys))
    with pytest.raises(UsageError) as error:
        load_official(folder)
    assert str(error.value).startswith(f"{folder / 'config.json'}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"moe_expert_interval": 2}, "moe_expert_interval=2"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"num_experts": [9, 8, 9]}, "num_experts=[9, 8, 9]"),
        ({"num_experts": []}, "num_experts=[]"),
        ({"num_experts": "9"}, 'num_experts="9"'),
        ({"num_experts": [4]}, "experts.ffn"),
        ({"hidden_size": "32"}, 'hidden_size="32"'),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 5}, "heads=5"),
        ({"num_key_value_heads": 3}, "kv_heads=3"),
        ({"moe_use_logits_norm": 1}, "moe_use_logits_norm=1"),
        ({"moe_use_logits_norm": True, "moe_gate_norm_std": 0.0}, "logits_norm=0.0"),
        ({"top_k": 50}, "top_k=50"),
    ],
    ids=str,
)
def test_configs_the_decoder_cannot_have_are_refused_in_one_line(changes, part, tmp_path):
    assert part in refused_config(tmp_path, reference.SMALL | changes)


def test_another_models_config_is_named(tmp_path):
    keys = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32}
    line = refused_config(tmp_path, keys)
    assert "intermediate_size, num_hidden_layers, num_attention_heads, num_experts missing" in line


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"gate": "softmax"}, "gate=softmax"),
        ({"gating_residual": False}, "gating_residual=False"),
        ({"top_k": 1}, "top_k=1"),
        ({"moe_every": 2}, "moe_every=2"),
        ({"experts": ExpertCounts(ffn=4, zero=1, copy=1, constant=6)}, "constant=6"),
        ({"experts": ExpertCounts(ffn=4, zero=0, copy=0, constant=0)}, "cannot compute this model"),
        ({"gate": "renormalized", "multiply_by_top_k": True}, "multiply_by_top_k=True"),
    ],
    ids=str,
)
def test_models_beyond_the_released_code_are_not_saved(changes, part, tmp_path):
    small = {"dim": 32, "hidden": 24, "layers": 2, "heads": 4, "vocab_size": 61}
    model = Decoder(DecoderConfig(**small | changes), seed=0)
    with pytest.raises(UsageError) as error:
        save_official(model, tmp_path / "saved")
    assert part in str(error.value) and not (tmp_path / "saved").exists()


def test_state_beside_the_parameters_is_not_dropped_silently(tmp_path):
    model = load_official(GOLDEN / "plain_softmax")
    model.blocks[1].ffn.register_buffer("bias_N", torch.zeros(12))
    with pytest.raises(UsageError, match=r"no place for blocks\.1\.ffn\.bias_N"):
        save_official(model, tmp_path)


def test_a_model_trained_here_can_be_saved_and_loaded(tmp_path):
    model = Decoder(DecoderConfig(dim=32, hidden=24, layers=2, heads=4, vocab_size=64), seed=0).eval()
    save_official(model, tmp_path)
    again = load_official(tmp_path, attention="fused")
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    with pytest.raises(UsageError, match="already holds a checkpoint"):
        save_official(model, tmp_path)


def test_what_is_said_of_the_text_is_kept_from_checkpoint_to_checkpoint(tmp_path):
    keys, _ = reference.write_checkpoint(tmp_path / "a")
    said = {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "a/config.json").write_text(json.dumps(keys | said))
    model = load_official(tmp_path / "a")
    save_official(model, tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text()).items() >= said.items()
    save_official(model, tmp_path / "c", text_keys={"max_position_embeddings": 64})
    assert json.loads((tmp_path / "c/config.json").read_text())["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    "key", [{"rope_parameters": {"rope_type": "yarn"}}, {"attention_bias": True}, {"sliding_window": 64},
            {"quantization_config": {}}, {"head_dim": 5}, {"moe_new_switch": False}],
)  # fmt: skip
def test_no_key_is_passed_over_in_silence(tmp_path, key):
    keys, _ = reference.write_checkpoint(tmp_path)
    assert next(iter(key)) in refused_config(tmp_path, keys | key)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_is_no_weights(tmp_path, name):
    reference.write_checkpoint(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 123\n")
    with pytest.raises(UsageError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_official(tmp_path)
