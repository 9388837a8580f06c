"""What a decoder can be told. Read without torch, as layers/settings.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from moepp import register
from moepp.layers.bounds import Count, Range, Whole
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig
from moepp.models.foreign import RetrofitConfig

AttentionKernel = Literal["fused", "plain"]
# What MoE layers may have values of their own for, by section.
LAYERED_KEYS = {"experts": ("ffn", "constant", "copy", "zero"), "balance": ("tau",)}


@dataclass
class DecoderConfig(MoEConfig):
    """The whole model; the MoE layers' keys are inherited."""

    name: str = "decoder"  # or a registered one
    options: dict[str, Any] = field(default_factory=dict)  # of a registered one
    vocab_size: Count = 2048  # rows of the embedding
    layers: Annotated[int, Range(1, 2**16)] = 4  # blocks of attention and MoE layer or dense FFN
    heads: Count = 4  # attention heads
    kv_heads: Count | None = None  # grouped-query attention; null: as many as heads
    moe_every: Whole = 1  # blocks moe_every, 2*moe_every, ... (counted from 1) hold an MoE layer, the others a dense
    # FFN; 0: all blocks are dense
    dense_hidden: Count | None = (
        None  # hidden width of those dense FFNs; null: top_k * hidden, the MoE layer's largest compute
    )
    dense_first: Whole = 0  # so many blocks at the start are dense, whatever moe_every says (DeepSeek-V3: 3)
    # values of each MoE layer, first to last, in place of the one of all: {balance: {tau: [0.5, 0.75]}, experts: {ffn:
    # [6, 8]}}; tau, and counts of at most those of all
    per_layer: dict[str, Any] = field(default_factory=dict)
    tie_embeddings: bool = False  # the head is the embedding
    attention: AttentionKernel = "fused"  # plain: slower, with the rounding of the released code
    rope_theta: Annotated[float, Range(above=1, most=10**12)] = 10_000.0  # base of the rotary embedding
    norm_eps: Annotated[float, Range(above=0, most=0.1)] = 1e-6  # in the RMS norms
    init_std: Annotated[float, Range(above=0, most=10)] = 0.02  # of the initial weights
    activation_checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more FLOPs
    path: str = ""  # of name=hf: a folder of transformers with weights and tokenizer, or a hub id
    retrofit: RetrofitConfig = field(default_factory=RetrofitConfig)  # of name=hf
    architecture: dict[str, Any] = field(default_factory=dict)  # its config.json, once a run is frozen

    def __post_init__(self) -> None:
        super().__post_init__()
        register.model.check(self.name, self.options)
        if self.name != "hf" and (self.path or self.retrofit != RetrofitConfig()):
            raise ValueError(f"path and retrofit are of models of transformers, not of name={self.name}: set model=hf")
        if self.name == "hf" and not (self.path or self.architecture):
            raise ValueError("name=hf needs path: a folder of transformers, or a hub id")
        if self.name == "hf" and self.balance.over == "sequence":
            raise ValueError("balance.over=sequence is of this package's own layers: choose another with name=hf")
        if self.name == "hf" and self.balance.control:
            raise ValueError(f"balance.control={self.balance.control} steers this package's routers: unset it with hf")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim={self.dim} must divide into heads={self.heads} of even width")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if not 0 <= self.moe_every <= self.layers:
            raise ValueError(f"moe_every={self.moe_every} must lie between 0 and layers={self.layers}")
        if self.dense_first and not self.moe_blocks:
            raise ValueError(
                f"dense_first={self.dense_first} leaves none of layers={self.layers} blocks with"
                f" moe_every={self.moe_every} an MoE layer; for a dense model set moe_every=0"
            )
        self._check_per_layer()

    def _check_per_layer(self) -> None:
        for section, values in self.per_layer.items():
            if section not in LAYERED_KEYS or not isinstance(values, Mapping):
                raise ValueError(f"per_layer.{section}: choose from experts and balance, each a mapping of lists")
            for name, listed in values.items():
                self._check_listed(f"{section}.{name}", section, name, listed)
        if self.per_layer:
            totals = [layer.experts.total for layer in self.moe_configs]
            if self.gating_residual and len(set(totals)) > 1:
                raise ValueError(
                    f"per_layer.experts gives layers {totals} experts, and the gating residual needs as many in all:"
                    " set gating_residual=false"
                )

    def _check_listed(self, key: str, section: str, name: str, listed: Any) -> None:
        if name not in LAYERED_KEYS[section]:
            raise ValueError(f"per_layer.{key}: choose from {', '.join(LAYERED_KEYS[section])}")
        if not isinstance(listed, list) or len(listed) != len(self.moe_blocks):
            raise ValueError(f"per_layer.{key}={listed} must list {len(self.moe_blocks)} values, one per MoE layer")
        kinds = (int,) if section == "experts" else (int, float)
        if wrong := [value for value in listed if type(value) not in kinds]:
            raise ValueError(f"per_layer.{key}: {wrong[0]} is no {kinds[-1].__name__}")
        most = getattr(self.experts, name) if section == "experts" else None
        if most is not None and max(listed) > most:
            raise ValueError(f"per_layer.{key}={listed} must not exceed experts.{name}={most}, the most of any layer")

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
        return self.moe_every > 0 and (block + 1) % self.moe_every == 0 and block >= self.dense_first

    @property
    def moe_blocks(self) -> list[int]:
        """The blocks that hold an MoE layer."""
        return [block for block in range(self.layers) if self.is_moe(block)]

    @property
    def moe_configs(self) -> list[MoEConfig]:
        """What each MoE layer is told: this config, with the layer's own values (`per_layer`)."""
        if not self.per_layer:
            return [self] * len(self.moe_blocks)
        shared = {part.name: getattr(self, part.name) for part in fields(MoEConfig)}
        return [MoEConfig(**shared | self._own_of(layer)) for layer in range(len(self.moe_blocks))]

    def _own_of(self, layer: int) -> dict[str, ExpertCounts | BalanceConfig]:
        return {
            section: replace(getattr(self, section), **{name: listed[layer] for name, listed in values.items()})
            for section, values in self.per_layer.items()
        }
