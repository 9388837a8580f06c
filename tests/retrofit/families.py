"""Tiny random models of other families."""

import pytest
import torch

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
    "lfm2_moe": {"layer_types": ["full_attention"] * 3},
    "longcat_flash": {"num_hidden_layers": 6},  # two attentions each
}
FAMILIES = (
    "mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "jamba", "deepseek_v2", "deepseek_v3", "glm4_moe",
    "lfm2_moe", "gpt_oss", "granitemoe", "longcat_flash",
)  # fmt: skip
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def tiny(family: str, seed: int = 0, **changes):
    """In eval mode, with weights large enough that logits differ."""
    config = transformers.CONFIG_MAPPING[family]
    sizes = SIZES | OWN_SIZES.get(family, {})
    known = config()
    config = config(**{key: value for key, value in sizes.items() if hasattr(known, key)} | changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model
