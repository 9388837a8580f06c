"""Which of transformers' MoE families take new experts: a tiny random model of each is retrofitted, calibrated, trained
for a step, saved, loaded by moepp and by transformers alone, and stripped; docs/retrofit.md gets the table.

    python scripts/retrofit_families.py [FAMILY ...]   # those alone
"""

import json
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, retrofit, strip
from moepp.retrofit.modeling import blocks, routers

PAGE = Path(__file__).parents[1] / "docs/retrofit.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
EXPERTS = re.compile(r"class \w*(Experts|MoE|Moe|MoeBlock|ExpertLayer)\w*\(")
CHOICE = re.compile(r"(topk|argmax)\(")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "first_k_dense_replace": 0,
    "moe_layer_start_index": 0, "n_group": 4, "topk_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "mamba_d_state": 4, "mamba_expand": 2, "mamba_d_head": 16,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 2,
    "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0,
    "num_dense_layers": 0, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 48, "zero_expert_num": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "decoder_sparse_step": 1, "num_layers": 2, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "depth": 1,
    "num_decoder_layers": 2, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
GEMMA = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 16}
OWN_SIZES = {  # of families that take no such sizes, or have no default where they need one
    "dbrx": {
        "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 4, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * 3, "n_group": None, "topk_group": None},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 3},
    "diffusion_gemma": GEMMA,
    "doge": {"is_moe": True},
    "dots3_note": {
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"], "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "shared_experts_intermediate_size": 32,
    },
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 32], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "gemma4": GEMMA | {
        "enable_moe_block": True, "num_experts": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    },
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4, "head_dim": 0},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"]},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "inkling2": {"unpadded_vocab_size": 64},
    "inkling2_loop": {"unpadded_vocab_size": 64},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "qwen4_exp": {
        "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "step3p7": {"sliding_window": 4, "share_expert_dim": 32},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def families() -> list[str]:
    """Every folder of transformers with a class of experts, and a choice among them, in its code."""
    root = Path(transformers.__file__).parent / "models"
    files = {file: file.read_text() for file in sorted(root.glob("*/modeling_*.py"))}
    return list(
        dict.fromkeys(f.parent.name for f, code in files.items() if EXPERTS.search(code) and CHOICE.search(code))
    )


def text_config(family: str) -> Any:
    """The default one; of a multimodal family that of its text model."""
    mapping = transformers.CONFIG_MAPPING
    name = next(name for name in (family, family.replace("_", "-"), f"{family}_text") if name in mapping)
    return mapping[name]().get_text_config(decoder=True)


def made(config: Any) -> torch.nn.Module:
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    return own_class(type(config))._from_config(config).eval()


def own_class(config: type) -> Any:
    """Of a text model that is always a part of another: the first class of its file that takes its config."""
    code = import_module(config.__module__.replace(".configuration_", ".modeling_"))
    return next(
        found
        for name, found in vars(code).items()
        if name.endswith("Model") and "PreTrained" not in name and getattr(found, "config_class", None) is config
    )


def tiny(family: str) -> torch.nn.Module:
    config = text_config(family)
    config.allow_global_per_layer_attribute_access = True
    known = {key: value for key, value in SIZES.items() if hasattr(config, key)}
    if hasattr(config, "layer_types") and not isinstance(getattr(type(config), "layer_types", None), property):
        kinds = list(dict.fromkeys(config.layer_types or ["full_attention"]))[-3:]
        known["layer_types"] = [*kinds, *(3 - len(kinds)) * kinds[-1:]]
    if getattr(config, "mlp_layer_types", None):
        known["mlp_layer_types"] = ["sparse"] * 3
    if getattr(config, "n_shared_experts", 0) is None:
        known["n_shared_experts"] = 1
    torch.manual_seed(0)
    model = made(type(config)(**known | OWN_SIZES.get(family, {})))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def said(router: torch.nn.Module, form: Any) -> str:
    name = type(router).__name__.removeprefix("PlusPlus")
    return f"{name}, {form.score.replace('_', ' ')}" + (", groups" if form.groups else "")


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    return states(model(input_ids=IDS, use_cache=False))


def states(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def outcome(family: str) -> str:
    """`works` with what it is, or the line that refuses it."""
    model = tiny(family)
    twin = deepcopy(model)
    try:
        retrofit(model)
    except UsageError as error:
        return f"refused: {error}"
    before = outputs(twin)
    router = next(iter(blocks(model).values()))[0]
    works = f"works: {said(router, router.form)}"
    assert torch.equal(outputs(model), before), f"{family} is not silent"
    calibrate(model, [IDS], share=0.3)
    assert not torch.equal(outputs(model), before), f"{family} does not wake"
    learns(model)
    for dtype in (torch.float32, torch.bfloat16):
        reads_back(model, dtype)
    if model.can_generate():
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(outputs(strip(model)), before), f"{family} does not strip"
    return works


def learns(model: torch.nn.Module) -> None:
    """Its routers' new rows get a gradient, the same with activation checkpointing where the family has that."""
    checkpoints = any(hasattr(module, "gradient_checkpointing") for module in model.modules())
    found = []
    for checkpointed in (False, True) if checkpoints else (False,):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        states(model(input_ids=IDS, use_cache=False)).float().square().mean().backward()
        found.append([router.new_rows.grad.clone() for router in routers(model) if router.new_rows.grad is not None])
        model.zero_grad()
    if checkpoints:
        model.activation_checkpointing_disable()
    model.eval()
    assert found[0] and any(gradient.any() for gradient in found[0]), "new rows do not learn"
    assert all(torch.equal(*pair) for pair in zip(found[0], found[-1], strict=True)), "checkpointing changes gradients"


def reads_back(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """What is loaded in this dtype, saved and loaded again, by moepp or by transformers alone, computes the same."""
    with TemporaryDirectory() as first, TemporaryDirectory() as folder:
        loaded = load(export(model, first), dtype=dtype).eval()
        export(loaded, folder)
        auto = getattr(transformers, next(iter(json.loads((Path(folder) / "config.json").read_text())["auto_map"])))
        for again in (load(folder, dtype=dtype), auto.from_pretrained(folder, trust_remote_code=True, dtype=dtype)):
            torch.testing.assert_close(outputs(again.eval()), outputs(loaded), rtol=0, atol=5e-6)


def rows(names: list[str]) -> Iterator[tuple[str, str]]:
    for family in names:
        found = outcome(family)
        print(f"{family:28} {found}", flush=True)
        yield family, found


def table(found: dict[str, str]) -> str:
    return "\n".join(["| family | |", "|---|---|", *(f"| {name} | {said} |" for name, said in sorted(found.items()))])


def main(names: list[str]) -> None:
    """Rows of other families stay."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    known, _, rest = rest.partition(END)
    found = dict(re.findall(r"^\| (\w+) \| (.+) \|$", known, flags=re.MULTILINE)) | dict(rows(names or families()))
    PAGE.write_text(f"{head}{BEGIN}{table(found)}\n{END}{rest}")


if __name__ == "__main__":
    main(sys.argv[1:])
