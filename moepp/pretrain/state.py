"""The weights of a decoder by the names and in the shapes of torchtitan's models, and back."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moepp.models.settings import DecoderConfig

TOP = {"embedding.weight": "tok_embeddings.weight", "norm.weight": "norm.weight", "head.weight": "lm_head.weight"}
BLOCK = {
    "attention_norm.weight": "attention_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "attention.w_out.weight": "attention.wo.weight",
}
EXPERTS = "moe.routed_experts.inner_experts"


def to_torchtitan(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """The state of `moepp.pretrain.torchtitan`'s model. Tensors share memory where their shapes do not change."""
    return dict(pair for name, value in state.items() for pair in _theirs(name, value, config))


def _theirs(name: str, value: Tensor, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    if name in TOP:
        yield TOP[name], value
        return
    block, part = re.fullmatch(r"blocks\.(\d+)\.(.+)", name).groups()
    at = f"layers.{block}."
    if part in BLOCK:
        yield at + BLOCK[part], value
    elif part == "attention.w_qkv.weight":
        heads = [config.heads, config.num_kv_heads, config.num_kv_heads]
        pieces = value.split([n * config.head_dim for n in heads])
        yield from (
            (f"{at}attention.qkv_linear.{to}.weight", p) for to, p in zip(("wq", "wk", "wv"), pieces, strict=True)
        )
    elif part in ("ffn.ffn.w_in", "ffn.w_in.weight"):
        gate, up = value.chunk(2, -2)
        yield at + _ffn(part, "w1", "EFD"), gate
        yield at + _ffn(part, "w3", "EFD"), up
    elif part in ("ffn.ffn.w_out", "ffn.w_out.weight"):
        yield at + _ffn(part, "w2", "EDF"), value
    else:
        yield f"{at}moe.layer.{part.removeprefix('ffn.')}", value


def _ffn(part: str, weight: str, dims: str) -> str:
    return f"feed_forward.{weight}.weight" if part.endswith(".weight") else f"{EXPERTS}.{weight}_{dims}"


def from_torchtitan(
    theirs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: DecoderConfig
) -> dict[str, Tensor]:
    """The state of a decoder whose own, `wanted`, says names and shapes; it may lie on the meta device. Raises KeyError
    for what is not there.
    """
    return {name: _ours(name, value, theirs, config) for name, value in wanted.items()}


def _ours(name: str, value: Tensor, theirs: Mapping[str, Tensor], config: DecoderConfig) -> Tensor:
    pieces = [theirs[of] for of, _ in _theirs(name, value, config)]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces, 0 if "w_qkv" in name else -2)
