"""A dense model of transformers as a MoE that computes the same (arXiv 2212.05055): every expert is the dense FFN."""

import torch
from torch import nn

from moepp.errors import UsageError
from moepp.retrofit.modeling import blocks

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe", "olmo2": "flex_olmo"}
ROUTER_STD = 0.02


def upcycle(dense_model: nn.Module, experts: int = 4, top_k: int = 2) -> nn.Module:
    """A new model with `experts` copies of each FFN, gates that sum to 1, and a random router. Its outputs are the
    dense model's up to rounding. Raises UsageError for a family without a MoE of the same blocks.
    """
    import transformers

    config = dense_model.config
    if config.model_type not in FAMILIES:
        raise UsageError(f"{type(dense_model).__name__} has no MoE of its blocks: must be one of {', '.join(FAMILIES)}")
    if biased := [name for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]:
        raise UsageError(f"{type(dense_model).__name__} with {biased[0]}=True has no MoE of its blocks")
    if not 1 <= top_k <= experts:
        raise UsageError(f"top_k={top_k} must lie between 1 and experts={experts}")
    kept = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        kept.pop(name, None)
    counts = {
        "num_experts_per_tok": top_k,
        "num_experts": experts,
        "num_local_experts": experts,
        "norm_topk_prob": True,
    }
    sizes = {"moe_intermediate_size": config.intermediate_size, "decoder_sparse_step": 1}
    family = transformers.CONFIG_MAPPING[FAMILIES[config.model_type]]
    model = transformers.AutoModelForCausalLM.from_config(family(**kept | counts | sizes), dtype=dense_model.dtype)
    model.load_state_dict(stacked(dense_model.state_dict(), model.state_dict(), experts))
    return aligned(model.to(dense_model.device).train(dense_model.training))


def aligned(model: nn.Module) -> nn.Module:
    """With the eager experts where their matrices have rows of no multiple of 16 bytes: grouped_mm refuses these."""
    matrices = [p for _, experts in blocks(model).values() for p in experts.parameters() if p.dim() == 3]
    if any(size * p.element_size() % 16 for p in matrices for size in p.shape[1:]):
        model.set_experts_implementation("eager")
    return model


def stacked(dense: dict[str, torch.Tensor], sparse: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """The MoE's state: what both have, E copies of each FFN, a router drawn with `ROUTER_STD`."""
    state = {}
    for name, old in sparse.items():
        stem, _, last = name.rpartition(".")
        ffn = stem.removesuffix(".experts").removesuffix(".gate")
        if last == "gate_up_proj":
            both = torch.cat([dense[f"{ffn}.gate_proj.weight"], dense[f"{ffn}.up_proj.weight"]])
            state[name] = both.expand(experts, -1, -1)
        elif last == "down_proj":
            state[name] = dense[f"{ffn}.down_proj.weight"].expand(experts, -1, -1)
        elif stem.endswith(".gate"):
            state[name] = torch.randn_like(old) * ROUTER_STD
        else:
            state[name] = dense[name]
    return state
