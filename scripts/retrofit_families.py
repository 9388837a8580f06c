"""Which of transformers' MoE families take new experts: a tiny random model of each is retrofitted, silent and awake,
and docs/retrofit.md gets the table.

    python scripts/retrofit_families.py [FAMILY ...]   # those alone
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from moepp.errors import UsageError
from moepp.retrofit import calibrate, retrofit, strip
from moepp.retrofit.modeling import blocks
from moepp.retrofit.recognise import recognise
from moepp.retrofit.surgery import router_width

PAGE = Path(__file__).parents[1] / "docs/retrofit.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
EXPERTS = re.compile(r"class \w*(Experts|MoE|Moe|MoeBlock|ExpertLayer)\w*\(")
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
OWN_SIZES = {  # of families that take no such sizes, or have no default where they need one
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"] * 3, "n_group": None, "topk_group": None},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 32], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "mistral4": {"head_dim": 16},
    "qwen4_exp": {
        "layer_types": ["indexed_attention", "linear_attention", "indexed_attention"], "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def families() -> list[str]:
    """Every folder of transformers with a class of experts in its code."""
    root = Path(transformers.__file__).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return list(dict.fromkeys(f.parent.name for f in files if EXPERTS.search(f.read_text())))


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


def router_alone(family: str) -> str:
    """What is said of its router where no tiny model runs: of the default config, without weights."""
    config = text_config(family)
    for layers in ("num_hidden_layers", "num_layers"):
        if hasattr(config, layers) and not getattr(config, "layer_types", None):
            setattr(config, layers, min(6, getattr(config, layers)))
    with torch.device("meta"):
        found = blocks(made(config))
    if not found:
        return "refused: no block of a router and stacked experts"
    router = next(reversed(found.values()))[0]
    try:
        form = recognise(router, router_width(router))
    except UsageError as error:
        return f"refused: {error}"
    return f"recognised: {said(router, form)}"


def said(router: torch.nn.Module, form: Any) -> str:
    name = type(router).__name__.removeprefix("PlusPlus")
    return f"{name}, {form.score.replace('_', ' ')}" + (", groups" if form.groups else "")


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    out = model(input_ids=IDS, use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def outcome(family: str) -> str:
    """`works` with what it is, `recognised` where a tiny model cannot be made, or the line that refuses it."""
    try:
        model = tiny(family)
        before = outputs(model)
    except Exception:  # of a config that fits no such sizes
        return router_alone(family)
    try:
        retrofit(model)
    except UsageError as error:
        return f"refused: {error}"
    router = next(iter(blocks(model).values()))[0]
    works = f"works: {said(router, router.form)}"
    assert torch.equal(outputs(model), before), f"{family} is not silent"
    calibrate(model, [IDS], share=0.3)
    assert not torch.equal(outputs(model), before), f"{family} does not wake"
    assert torch.equal(outputs(strip(model)), before), f"{family} does not strip"
    return works


def rows(names: list[str]) -> Iterator[tuple[str, str]]:
    for family in names:
        try:
            found = outcome(family)
        except AssertionError:
            raise
        except Exception as error:  # transformers cannot make its default model
            found = f"not tried: {type(error).__name__}: {(str(error) or 'no reason').splitlines()[0]}"
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
