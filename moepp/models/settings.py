"""What a decoder can be told. Read without torch, as layers/settings.py."""

from dataclasses import dataclass, field
from typing import Any, Literal

from moepp import register
from moepp.layers.settings import MoEConfig

AttentionKernel = Literal["fused", "plain"]


@dataclass
class DecoderConfig(MoEConfig):
    """The whole model; the MoE layers' keys are inherited."""

    name: str = "decoder"  # or a registered one
    options: dict[str, Any] = field(default_factory=dict)  # of a registered one
    vocab_size: int = 2048
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # grouped-query attention; null: as many as heads
    moe_every: int = 1  # blocks moe_every, 2*moe_every, ... (counted from 1) hold an MoE layer, the others a dense
    # FFN; 0: all blocks are dense
    dense_hidden: int | None = (
        None  # hidden width of those dense FFNs; null: top_k * hidden, the MoE layer's largest compute
    )
    tie_embeddings: bool = False
    attention: AttentionKernel = "fused"  # plain: slower, with the rounding of the released code
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        register.model.check(self.name, self.options)
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must divide into heads={self.heads} of even width")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if not 0 <= self.moe_every <= self.layers:
            raise ValueError(f"moe_every={self.moe_every} must lie between 0 and layers={self.layers}")

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def dense_width(self) -> int:
        return self.top_k * self.hidden if self.dense_hidden is None else self.dense_hidden

    def is_moe(self, block: int) -> bool:
        """Whether block `block`, counted from 0, holds an MoE layer."""
        return self.moe_every > 0 and (block + 1) % self.moe_every == 0
