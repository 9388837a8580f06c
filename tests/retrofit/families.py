"""Tiny random models of other families, and a tiny text."""

import pytest
import torch

from moepp.config import compose
from moepp.training.run import train
from moepp.training.settings import RunConfig

transformers = pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_topk": 2,
    "first_k_dense_replace": 0, "n_group": 4, "topk_group": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "shared_expert_intermediate_size": 32, "mamba_d_state": 4, "mamba_expand": 2,
    "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0,
    "num_dense_layers": 0, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 48, "zero_expert_num": 2,
}  # fmt: skip
OWN_SIZES = {
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 3, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
    "gemma4": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "moe_intermediate_size": 32,
    },
    "lfm2_moe": {"layer_types": ["full_attention"] * 3},
    "longcat_flash": {"num_hidden_layers": 6},  # two attentions each
}
FAMILIES = (
    "mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "jamba", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "lfm2_moe", "gpt_oss", "granitemoe", "longcat_flash", "gemma4", "deepseek_v4",
)  # fmt: skip
TEXT = "the state of our union is strong and people work hard for peace in this land every day"
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def tiny(family: str, seed: int = 0, **changes):
    """In eval mode, with weights large enough that logits differ."""
    mapping = transformers.CONFIG_MAPPING
    config = mapping[family if f"{family}_text" not in mapping else f"{family}_text"]
    sizes = SIZES | OWN_SIZES.get(family, {})
    known = config()
    known.allow_global_per_layer_attribute_access = True
    config = config(**{key: value for key, value in sizes.items() if hasattr(known, key)} | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_data(tmp_path):
    """Two steps on a text."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{TEXT} {i}." for i in range(400)))
    return [
        "data=text", f"data.path={text}", "data.separator=\\n\\s*\\n", f"data.cache={tmp_path / 'cache'}",
        "data.seq_len=32", "data.batch_size=4", "trainer.steps=2", "trainer.val_every=2", "optim.warmup_steps=1",
    ]  # fmt: skip


def text_run(overrides, tmp_path, *words):
    return train(compose(RunConfig, [*overrides, *text_data(tmp_path), *words])).path
