"""The decoder in plain transformers: an exported folder carries this as its one file of code, which needs nothing else.

It computes what the run's own model does when nothing is dropped, as in validation, with the same parameter names.
Shape suffixes: B batch, S sequence, P cached and new positions, T = B*S tokens, K slots of a token, D model width,
N experts of a layer, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


class MoEPlusPlusConfig(PreTrainedConfig):
    """`layers` has an entry per block: the number of `ffn`, `constant`, `copy` and `zero` experts, or the width of a
    dense FFN, as `dense`.
    """

    model_type = "moepp"

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 128,
        intermediate_size: int = 256,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        layers: list[dict[str, int]] | None = None,
        shared_experts: int = 0,
        num_experts_per_tok: int = 2,
        router: str = "linear",
        selection: str = "top_k",
        gate: str = "released",
        gate_scale: float = 1.0,
        logits_norm: float | None = None,
        zero_computation_bias: float = 0.0,
        gating_residual: bool = True,
        choice_bias: bool = False,
        multiply_by_top_k: bool = False,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = False,
        **options: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "options", "__class__")}
        for name, value in given.items():
            setattr(self, name, value)
        self.layers = layers or []
        self.num_hidden_layers = len(self.layers)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)


class Router(nn.Module):
    """logits^j = W^j x^j + W_g^j logits^(j-1), in float32."""

    def __init__(self, config: MoEPlusPlusConfig, experts: int, first: bool):
        super().__init__()
        hidden = 8 * experts if config.router == "two_layer" else None
        residual = config.gating_residual and not first
        self.hidden = nn.Parameter(torch.empty(hidden, config.hidden_size)) if hidden else None
        self.weight = nn.Parameter(torch.empty(experts, hidden or config.hidden_size))
        self.residual = nn.Parameter(torch.empty(experts, experts)) if residual else None

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> Tensor:
        x_TD = x_TD.float()
        if self.hidden is not None:
            x_TD = F.linear(x_TD, self.hidden.float()).tanh()
        logits_TN = F.linear(x_TD, self.weight.float())
        return logits_TN if self.residual is None else logits_TN + F.linear(previous_TN, self.residual.float())


class FFNExperts(nn.Module):
    """Stacked SwiGLU experts: `w_in` [E, 2F, D], the gate's rows first, `w_out` [E, D, F]."""

    def __init__(self, experts: int, dim: int, hidden: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.w_out = nn.Parameter(torch.empty(experts, dim, hidden))

    def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        y_TD = torch.zeros(x_TD.shape, dtype=gate_TK.dtype, device=x_TD.device)
        for expert, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out, strict=True)):
            token_R, slot_R = (expert_TK == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x_TD[token_R], w_in).chunk(2, -1)
            y_RD = F.linear(F.silu(gate) * up, w_out)
            y_TD = y_TD.index_add(0, token_R, gate_TK[token_R, slot_R, None] * y_RD)
        return y_TD


class ConstantExperts(nn.Module):
    """a_1 x + a_2 v, [a_1, a_2] = softmax(W_c x)."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.w_mix = nn.Parameter(torch.empty(2 * count, dim))
        self.vectors = nn.Parameter(torch.empty(count, dim))

    def forward(self, x_TD: Tensor, gate_TC: Tensor) -> Tensor:
        mix_TC2 = F.linear(x_TD, self.w_mix.float()).unflatten(1, (-1, 2)).softmax(-1)
        scale_T1 = (gate_TC * mix_TC2[..., 0]).sum(1, keepdim=True)
        return scale_T1 * x_TD + (gate_TC * mix_TC2[..., 1]) @ self.vectors.float()


class DenseFFN(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.w_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w_in(x).chunk(2, -1)
        return self.w_out(F.silu(gate) * up)


class Control(nn.Module):
    """A bias per expert, which counts in the choice alone."""

    def __init__(self, experts: int):
        super().__init__()
        self.register_buffer("bias_N", torch.zeros(experts))


class MoELayer(nn.Module):
    def __init__(self, config: MoEPlusPlusConfig, counts: dict[str, int], first: bool):
        super().__init__()
        self.config, self.counts = config, counts
        total = sum(counts.values())
        self.router = Router(config, total, first)
        self.ffn = FFNExperts(counts["ffn"], config.hidden_size, config.intermediate_size)
        if counts["constant"]:
            self.zero_computation = ConstantExperts(counts["constant"], config.hidden_size)
        shared = config.shared_experts * config.intermediate_size
        self.shared = DenseFFN(config.hidden_size, shared) if shared else None
        self.control = Control(total) if config.choice_bias else None

    def forward(self, x_TD: Tensor, previous_TN: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_TN = self.router(x_TD, previous_TN)
        expert_TK, gate_TK = self.route(logits_TN)
        if self.config.multiply_by_top_k:
            x_TD = x_TD * self.config.num_experts_per_tok
        y_TD = self.ffn(x_TD, expert_TK, gate_TK) + self.affine(x_TD.float(), expert_TK, gate_TK)
        y_TD = y_TD.to(x_TD.dtype)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD), logits_TN

    def route(self, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of every token and their gates, [T, K]."""
        config, ffn = self.config, self.counts["ffn"]
        if config.logits_norm is not None:
            logits_TN = logits_TN * (config.logits_norm / logits_TN.std(-1, keepdim=True).clamp(min=1e-19))
        logits_TN = torch.cat([logits_TN[:, :ffn], logits_TN[:, ffn:] + config.zero_computation_bias], 1)
        score_TN = logits_TN.sigmoid() if config.selection == "sigmoid" else logits_TN.softmax(-1)
        ranked_TN = score_TN if self.control is None else score_TN + self.control.bias_N
        expert_TK = ranked_TN.topk(config.num_experts_per_tok, dim=-1).indices
        return expert_TK, self.gates(score_TN.gather(1, expert_TK), expert_TK)

    def gates(self, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """`softmax`: the scores themselves; `renormalized`: over their sum; `released`: that without zero experts'."""
        if self.config.gate == "released":
            first_zero = sum(self.counts.values()) - self.counts["zero"]
            gate_TK = gate_TK.masked_fill(expert_TK >= first_zero, 0)
        if self.config.gate != "softmax":
            total_T1 = gate_TK.sum(-1, keepdim=True)
            gate_TK = gate_TK / torch.where(total_T1 > 0, total_T1, 1)
        return gate_TK * self.config.gate_scale

    def affine(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """What constant and copy experts add; zero experts add nothing."""
        sizes = [self.counts[kind] for kind in ("ffn", "constant", "copy", "zero")]
        gate_TN = gate_TK.new_zeros(len(x_TD), sum(sizes)).scatter_add(1, expert_TK, gate_TK)
        _, constant_TC, copy_TC, _ = gate_TN.split(sizes, 1)
        y_TD = copy_TC.sum(1, keepdim=True) * x_TD
        return y_TD + self.zero_computation(x_TD, constant_TC) if self.counts["constant"] else y_TD


class Attention(nn.Module):
    """Rotary attention; `w_qkv` holds the queries' rows, then the keys', then the values'."""

    def __init__(self, config: MoEPlusPlusConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.layer = config.num_attention_heads, config.num_key_value_heads, layer
        self.head_dim = config.hidden_size // self.heads
        self.w_qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.w_out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, rotary: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        qkv = self.w_qkv(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        queries, keys, values = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        grouped = self.heads != self.kv_heads
        attend = F.scaled_dot_product_attention
        y = attend(queries, keys, values, mask, is_causal=mask is None, enable_gqa=grouped)
        return self.w_out(y.transpose(1, 2).flatten(2))


def rotary_table(position_BS: Tensor, head_dim: int, theta: float) -> Tensor:
    """cos and sin, [2, B, 1, S, A]."""
    exponents = torch.arange(0, head_dim, 2, device=position_BS.device, dtype=torch.float32) / head_dim
    angles = (position_BS[..., None].float() * theta**-exponents).repeat(1, 1, 2)[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Block(GradientCheckpointingLayer):
    def __init__(self, config: MoEPlusPlusConfig, layer: int):
        super().__init__()
        kinds = config.layers[layer]
        first = all("dense" in before for before in config.layers[:layer])
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        dense = "dense" in kinds
        self.ffn = DenseFFN(config.hidden_size, kinds["dense"]) if dense else MoELayer(config, kinds, first)

    def forward(
        self, x_BSD: Tensor, rotary: Tensor, mask: Tensor | None, previous_TN: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, mask, cache)
        h_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, DenseFFN):
            return x_BSD + self.ffn(h_BSD), previous_TN
        y_TD, logits_TN = self.ffn(h_BSD.flatten(0, 1), previous_TN)
        return x_BSD + y_TD.view_as(x_BSD), logits_TN


# The Trainer smoothes shifted labels, and pipelines generate, for those named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoEPlusPlusConfig.model_type] = "MoEPlusPlusForCausalLM"


class MoEPlusPlusForCausalLM(PreTrainedModel, GenerationMixin):
    """With `labels`, the cross-entropy of the ids that come next; -100 is left out.

    It is the mean over a batch's ids, and over those of all micro-batches of a step where a trainer that accumulates
    says how many they are, as `num_items_in_batch`. No balance loss is added to it.
    """

    config_class = MoEPlusPlusConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MoEPlusPlusConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Parameters that are no layer's of torch, as its linear layers' are; gating residuals begin at 0."""
        super()._init_weights(module)
        if isinstance(module, (Router, FFNExperts, ConstantExperts)):
            for name, parameter in module.named_parameters(recurse=False):
                initialization.normal_(parameter, std=0.0 if name == "residual" else 0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        self.embedding = embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, head: nn.Module) -> None:
        self.head = head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        cached, new = cache.get_seq_length() if cache is not None else 0, input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(cached, cached + new, device=input_ids.device)[None]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rotary = rotary_table(position_ids, head_dim, self.config.rope_theta)
        length = cache.get_mask_sizes(new, 0)[0] if cache is not None else new
        mask = visible(attention_mask, cached, new, length, input_ids.device)
        x_BSD, previous_TN = self.embedding(input_ids), None
        for block in self.blocks:
            x_BSD, previous_TN = block(x_BSD, rotary, mask, previous_TN, cache=cache)
        logits_BSV = self.head(self.norm(x_BSD[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, self.config.vocab_size, **options)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, cache=cache)


def visible(attention_mask: Tensor | None, cached: int, new: int, length: int, device: torch.device) -> Tensor | None:
    """True where a new token may look, [B, 1, S, P]; None where each sees all that stand before it. P is the cache's
    `length`, which one of a fixed size has before it is full; for such a one `generate` brings the whole mask.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    padded = attention_mask is not None and not attention_mask.all()
    if length == new and not padded:
        return None
    position_S1, place_P = torch.arange(new, device=device)[:, None] + cached, torch.arange(length, device=device)
    mask = (place_P <= position_S1)[None, None]
    if padded:
        kept_BP = F.pad(attention_mask.bool(), (0, length - attention_mask.shape[1]))
        mask = mask & kept_BP[:, None, None] | (place_P == position_S1)  # padding sees itself: no softmax of nothing
    return mask
