"""Rotary self-attention with grouped keys and an optional key-value cache.

Shape suffixes: B batch, S new tokens, L cached and new tokens, D model width, H query heads, G key-value heads, A head
width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.models.settings import AttentionKernel


class KeyValueCache:
    """Keys and values [B, G, L, A] of one layer, after rotation."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values

    def select(self, row_B: Tensor) -> None:
        """Goes on with these rows, which may be there several times."""
        self.keys, self.values = self.keys[row_B], self.values[row_B]


def rotary_table(positions_S: Tensor, head_dim: int, theta: float) -> Tensor:
    """cos and sin of every position's angles, [2, S, A], float32; the two halves of a head share their angles (LLaMA's
    layout).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    angles = torch.outer(positions_S.float(), theta**-exponents).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotates [..., S, A] by its positions' angles."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Causal attention; `w_qkv` holds the queries' rows, then the keys', then the values'."""

    def __init__(self, dim: int, heads: int, kv_heads: int, kernel: AttentionKernel = "fused"):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.kernel = heads, kv_heads, dim // heads, kernel
        self.w_qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.w_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, rotary: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        qkv = self.w_qkv(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        queries, keys, values = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        cached = cache.length if cache is not None else 0
        if cache is not None:
            keys, values = cache.append(keys, values)
        attend = plain_attention if self.kernel == "plain" else fused_attention
        return self.w_out(attend(queries, keys, values, cached).transpose(1, 2).flatten(2))


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
    """torch's fused kernels, [B, H, S, A]; the first `cached` of the keys precede all queries."""
    mask = causal_mask(queries.shape[2], keys.shape[2], queries.device) if cached else None
    grouped = keys.shape[1] != queries.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=not cached, enable_gqa=grouped)


def plain_attention(queries: Tensor, keys: Tensor, values: Tensor, cached: int) -> Tensor:
    """The same, as the released code computes it: scores whole, softmax in float32. Slower, and rounds as that does."""
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[-1])
    scores = scores.masked_fill(~causal_mask(queries.shape[2], keys.shape[2], queries.device), -math.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values


def causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """True where one of the last `new` tokens may look, [new, total]."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
