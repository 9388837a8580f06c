"""Checkpoints in the layout of the released code (SkyworkAI/MoE-plus-plus; `Chat-UniVi/MoE-Plus-Plus-7B`), in and out.

Every tensor of that layout is a slice of one of the decoder's parameters, so both directions share one mapping,
`official_tensors`.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp.errors import UsageError
from moepp.layers.moe import MoELayer
from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Block, Decoder
from moepp.models.settings import AttentionKernel, DecoderConfig
from moepp.models.weight_files import (
    CHECKPOINT_FILES,
    find_folder,
    find_weights,
    map_tensors,
    read_json_object,
    read_tensors,
    some,
    stored_dtype,
    write_tensors,
)
from moepp.records import write_json

RELEASED = "MoE++"  # model_type in config.json
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}
# What the released config class assumes for keys that config.json leaves out. Its code fixes the last two, which are no
# keys of its config.
DEFAULTS = {
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "moe_expert_interval": 1,
    "moe_use_mixtral_gating": False,
    "moe_2layer_gate": True,
    "moe_use_logits_norm": False,
    "moe_gate_norm_std": 1.0,
    "moe_feature_no_mul_topk": False,
    "top_k": 2,
    "num_constant_experts": 2,
}
SUPPORTED = {
    "hidden_act": "silu", "rope_scaling": None, "moe_expert_interval": 1, "rope_parameters": None,
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "use_sliding_window": False,
    "quantization_config": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "layer_types": None,
}  # fmt: skip
# Of the text that the model was made for: no part of the decoder, and kept from one checkpoint to the next.
TEXT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# What changes no output.
NOTES = (
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "use_cache", "note",
    "initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef", "head_dim",
)  # fmt: skip
# What changes no output of the models that a checkpoint can hold; kv_heads may be null for the number it says.
UNSAID = (
    "activation_checkpointing", "attention", "backend", "balance", "capacity_factor", "dense_hidden", "drop_order",
    "init_std", "kv_heads", "residual_detached", "residual_init", "router_width", "top_p",
)  # fmt: skip

UNUSED_GATE_MAP = "model.layers.0.mlp.moe.gate.gate_map.weight"  # layer 0 has no previous logits to map
SHARD_BYTES = 5 * 2**30


def load_official(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: AttentionKernel = "plain",
) -> Decoder:
    """The model of a checkpoint folder, or of a hub id `owner/name`, with parameters in `dtype`, that of the files
    where none is given, on `device`.

    Reads safetensors or .bin weights, whole or sharded, one tensor at a time, so that they are never held twice.
    `attention` is "plain" to round as the released code does; "fused" is faster. Raises UsageError for a checkpoint
    that cannot be reached or read, or that does not fit its own config.json.
    """
    folder = find_folder(source)
    keys = read_json_object(folder / "config.json")
    try:
        config = replace(decoder_config(keys), attention=attention)
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from None
    files = find_weights(folder)
    with torch.device("meta"):
        model = Decoder(config, seed=None).to(dtype or stored_dtype(files))
    _check(folder, {name: tensor.shape for file in files for name, tensor in map_tensors(file).items()}, model)
    tensors = official_tensors(model.to_empty(device=device))
    for file in files:
        for name, tensor in read_tensors(file, tensors):
            tensors[name].copy_(tensor)
    model.text_keys = {name: keys[name] for name in TEXT if name in keys}
    return model


def save_official(
    model: Decoder, folder: str | Path, shard_bytes: int = SHARD_BYTES, text_keys: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json and safetensors of at most `shard_bytes` each, as the released code reads them.

    `text_keys` are what config.json says of context and special tokens (TEXT), for a decoder knows neither; where they
    are not given, those that `load_official` has read.

    Layer 0's gate map, which that code has but never uses, is written as zeros. Raises UsageError for a model that the
    released code cannot compute, and for a folder that already holds a checkpoint.
    """
    folder = Path(folder)
    keys = official_config(model.config) | {"torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch.")}
    keys |= getattr(model, "text_keys", {}) if text_keys is None else text_keys
    if any(found for pattern in CHECKPOINT_FILES for found in folder.glob(pattern)):
        raise UsageError(f"{folder} already holds a checkpoint; choose another folder")
    tensors = official_tensors(model)
    kept = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    if lost := [n for n, tensor in model.state_dict().items() if tensor.untyped_storage().data_ptr() not in kept]:
        raise UsageError(f"the released layout has no place for {some(lost)}")
    folder.mkdir(parents=True, exist_ok=True)
    experts = model.config.experts.total
    tensors[UNUSED_GATE_MAP] = model.embedding.weight.new_zeros(experts, experts)
    write_tensors(folder, tensors, shard_bytes)
    write_json(folder / "config.json", keys)  # last: a save that was cut off does not load


def decoder_config(keys: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes. Raises ValueError for values it cannot have."""
    if missing := [name for name in (*SIZES, "num_experts") if name not in keys]:
        raise ValueError(f"{', '.join(missing)} missing; this is no config of an MoE++ checkpoint")
    known = {*SIZES, *DEFAULTS, *SUPPORTED, *TEXT, *NOTES, "num_experts"}
    if unknown := [name for name in keys if name not in known and not name.startswith("_")]:
        raise ValueError(
            f"{unknown[0]}={json.dumps(keys[unknown[0]])} is unknown and may change what the model computes; remove it"
            " if it does not"
        )
    keys = SUPPORTED | DEFAULTS | dict(keys)
    if "head_dim" in keys and keys["head_dim"] not in (None, _quotient(keys)):
        raise ValueError(f"head_dim={keys['head_dim']} is not hidden_size / num_attention_heads={_quotient(keys)}")
    for name, only in SUPPORTED.items():
        if keys[name] != only:
            raise ValueError(f"{name}={keys[name]} is not supported, only {json.dumps(only)}")
    sizes = {field: _typed(keys, name, int, least=1) for name, field in SIZES.items()}
    constant = _typed(keys, "num_constant_experts", int)
    mixtral = _typed(keys, "moe_use_mixtral_gating", bool)
    return DecoderConfig(
        **sizes,
        kv_heads=None if keys["num_key_value_heads"] is None else _typed(keys, "num_key_value_heads", int, least=1),
        experts=ExpertCounts(ffn=_experts(keys["num_experts"]) - constant - 2, zero=1, copy=1, constant=constant),
        top_k=_typed(keys, "top_k", int),
        gate="renormalized" if mixtral else "released",
        logits_norm=_typed(keys, "moe_gate_norm_std", float) if _typed(keys, "moe_use_logits_norm", bool) else None,
        router="two_layer" if _typed(keys, "moe_2layer_gate", bool) else "linear",
        multiply_by_top_k=not (_typed(keys, "moe_feature_no_mul_topk", bool) or mixtral),
        capacity_factor=None,
        tie_embeddings=_typed(keys, "tie_word_embeddings", bool),
        rope_theta=_typed(keys, "rope_theta", float),
        norm_eps=_typed(keys, "rms_norm_eps", float),
    )


def official_config(config: DecoderConfig) -> dict[str, Any]:
    """The keys of config.json. Raises UsageError for a model that they cannot describe."""
    keys = {
        "architectures": ["MoeForCausalLM"],
        "model_type": RELEASED,
        **{name: getattr(config, field) for name, field in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": [config.experts.total],
        "moe_expert_interval": 1,
        "moe_use_mixtral_gating": config.gate == "renormalized",
        "moe_2layer_gate": config.router == "two_layer",
        "moe_use_logits_norm": config.logits_norm is not None,
        "moe_gate_norm_std": 1.0 if config.logits_norm is None else config.logits_norm,
        "moe_feature_no_mul_topk": not config.multiply_by_top_k,
    }
    try:
        described = decoder_config(keys)
    except ValueError as error:
        raise UsageError(f"the released code cannot compute this model: {error}") from None
    names = [field.name for field in fields(config) if field.name not in UNSAID]
    if lost := [name for name in names if getattr(config, name) != getattr(described, name)]:
        values = "; ".join(f"{name}={getattr(config, name)}, there {getattr(described, name)}" for name in lost)
        raise UsageError(f"the released code cannot compute this model: {values}")
    return keys


def official_tensors(model: Decoder) -> dict[str, Tensor]:
    """The tensors of the released layout by name, as views of the model's parameters.

    Layer 0's gate map is not among them: the decoder has none.
    """
    tensors = {"model.embed_tokens.weight": model.embedding.weight}
    for index, block in enumerate(model.blocks):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in _block_tensors(block).items()}
    tensors["model.norm.weight"] = model.norm.weight
    if model.head is not None:
        tensors["lm_head.weight"] = model.head.weight
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _block_tensors(block: Block) -> dict[str, Tensor]:
    attention = block.attention
    heads = [attention.heads, attention.kv_heads, attention.kv_heads]
    rows = attention.w_qkv.weight.split([count * attention.head_dim for count in heads])
    return {
        "input_layernorm.weight": block.attention_norm.weight,
        **{f"self_attn.{letter}_proj.weight": part for letter, part in zip("qkv", rows, strict=True)},
        "self_attn.o_proj.weight": attention.w_out.weight,
        "post_attention_layernorm.weight": block.ffn_norm.weight,
        **{f"mlp.moe.{name}": tensor for name, tensor in _moe_tensors(block.ffn).items()},
    }


def _moe_tensors(layer: MoELayer) -> dict[str, Tensor]:
    tensors, router, counts = {}, layer.router, layer.config.experts
    if router.hidden is None:
        tensors["gate.wg.weight"] = router.weight
    else:
        tensors |= {"gate.wg.0.weight": router.hidden, "gate.wg.2.weight": router.weight}
    if router.residual is not None:
        tensors["gate.gate_map.weight"] = router.residual
    for expert, (w_in, w_out) in enumerate(zip(layer.ffn.w_in, layer.ffn.w_out, strict=True)):
        tensors[f"experts.experts.{expert}.up_proj.weight"] = w_in
        tensors[f"experts.experts.{expert}.down_proj.weight"] = w_out
    for constant in range(counts.constant):
        name, zero_computation = f"experts.experts.{counts.ffn + constant}", layer.zero_computation
        tensors[f"{name}.wg.weight"] = zero_computation.w_mix[2 * constant : 2 * constant + 2]
        tensors[f"{name}.constant"] = zero_computation.vectors[constant]
    return tensors


def _typed(keys: Mapping[str, Any], name: str, kind: type, least: int | None = None) -> Any:
    value = keys[name]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (least is not None and value < least):
        raise ValueError(
            f"{name}={json.dumps(keys[name])} must be {'positive, ' if least else ''}of type {kind.__name__}"
        )
    return value


def _quotient(keys: Mapping[str, Any]) -> float | None:
    sizes = [keys["hidden_size"], keys["num_attention_heads"]]
    return sizes[0] / sizes[1] if all(type(size) is int and size > 0 for size in sizes) else None


def _experts(value: Any) -> int:
    """`num_experts` is one number or one for every layer, which must agree: the gating residual maps N logits to N."""
    counts = value if isinstance(value, list) else [value]
    if not counts or any(type(count) is not int or count != counts[0] for count in counts):
        raise ValueError(f"num_experts={json.dumps(value)} must be one number, the same for every layer")
    return counts[0]


def _check(folder: Path, found: Mapping[str, torch.Size], model: Decoder) -> None:
    """Raises UsageError unless the checkpoint has the model's tensors and no others."""
    expected = {name: tensor.shape for name, tensor in official_tensors(model).items()}
    unused = {UNUSED_GATE_MAP} | ({"lm_head.weight"} if model.head is None else set())
    reshaped = [
        f"{name} {list(found[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    wrong = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected and name not in unused],
        "of another shape": reshaped,
    }
    if problems := [f"{len(names)} {kind} ({some(names)})" for kind, names in wrong.items() if names]:
        raise UsageError(f"the tensors in {folder} do not fit its config.json: {', '.join(problems)}")
