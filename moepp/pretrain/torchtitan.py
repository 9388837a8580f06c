"""MoE++ inside torchtitan's MoE: our router, gates, capacity, zero-computation experts and balance loss around its
RoutedExperts, whose grouped products and all-to-alls see the slots of FFN experts alone. Written for torchtitan 0.3.

Shape suffixes as there: B batch, L sequence, D model width, T = B*L tokens, K slots of a token, E FFN experts, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config, make_router_config
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
from torchtitan.models.qwen3 import parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from moepp.errors import UsageError
from moepp.layers.balance import selection_counts
from moepp.layers.dispatch import LocalDispatcher, Meanwhile, SlotCounts
from moepp.layers.initial import uninitialized
from moepp.layers.kernels.base import RoutedTokens
from moepp.layers.moe import MoELayer
from moepp.layers.settings import MoEConfig
from moepp.models.settings import DecoderConfig
from moepp.strategies.dispatch import SharedBatchDispatcher


class FFNTokenDispatcher(AllToAllTokenDispatcher):
    """Sends the slots of FFN experts; ids from `num_experts` on are experts that need no rows, or dropped slots.
    Without an expert-parallel mesh nothing is sent, as by its base.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = int((topk_expert_ids_TK < self.num_experts).sum())
        slot_R = topk_expert_ids_TK.reshape(-1).argsort(stable=True)[:rows]
        token_R = slot_R // topk_expert_ids_TK.shape[1]
        return x_TD[token_R], token_R, topk_scores_TK.reshape(-1)[slot_R]


class RoutedFFN(nn.Module):
    """What a MoELayer has in place of its FFN experts: torchtitan's, which stay a part of its MoE, where its
    parallelisms look for them.
    """

    def __init__(self, routed_experts: RoutedExperts):
        super().__init__()
        self.dispatcher = SharedBatchDispatcher() if dist.is_initialized() else LocalDispatcher()
        self.experts, self.routed = routed_experts.token_dispatcher.num_experts, (routed_experts,)

    def forward(
        self, tokens: RoutedTokens, counts: SlotCounts | None = None, meanwhile: Meanwhile | None = None
    ) -> Tensor:
        count_E = selection_counts(tokens.expert_TK, self.experts).sum(0)
        routed_experts = self.routed[0]
        y_1TD = routed_experts(tokens.x_TD[None], tokens.gate_TK[None], tokens.expert_TK[None], count_E)
        return y_1TD[0] if tokens.others is None else y_1TD[0] + tokens.others(tokens.x_TD)


class AddLoss(torch.autograd.Function):
    """Gives `loss` the gradient `scale` and leaves the output as it is: torchtitan's losses see the logits alone."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


class MoEPlusPlus(MoE):
    """torchtitan's MoE with a `MoELayer` around its routed experts. The gating residual comes from `previous`, the MoE
    of the block before, which must lie on the same pipeline stage.

    `layers` MoE layers share the balance loss, and `parts` devices times accumulated micro-batches a step, whose
    gradients torchtitan adds up.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        layer: MoEConfig
        first: bool
        layers: int
        parts: int = 1

    def __init__(self, config: Config):
        Module.__init__(self)
        self.routed_experts = config.routed_experts.build()
        with uninitialized():
            self.layer = MoELayer(config.layer, config.first)
        self.layer.ffn = RoutedFFN(self.routed_experts)
        self.config = config
        self.previous: tuple[MoEPlusPlus, ...] = ()
        self.carried: Tensor | None = None
        self.balance_loss: Tensor | None = None  # of the last forward pass, weighted, this layer's share of it
        self.load_balance_coeff = self.expert_bias_E = self.shared_experts = None  # of torchtitan's own balancing

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD, stats = self.layer(x_BLD, self.previous[0].carried if self.previous else None)
        balance, layers = self.config.layer.balance, self.config.layers
        loss = balance.beta * stats.balance_loss / (1 if balance.form == "paper" else layers)
        loss = loss if stats.router_loss is None else loss + stats.router_loss / layers
        self.carried, self.balance_loss = stats.carried, loss.detach()
        return AddLoss.apply(y_BLD, loss, 1 / self.config.parts) if torch.is_grad_enabled() else y_BLD

    def _init_self_parameters(self) -> None:
        self.layer.reset_parameters()

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        """The layer's are reset with its parameters."""


class MoEPlusPlusModel(Qwen3Model):
    """torchtitan's Qwen3 without norms of queries and keys, which is our decoder, with MoEPlusPlus in its blocks."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3Model.Config):
        pass

    def __init__(self, config: Config):
        super().__init__(config)
        layers = [block.moe for block in self.layers.values() if block.moe_enabled]
        for earlier, later in pairwise(layers):
            later.previous = (earlier,)


def model_config(
    config: DecoderConfig, seq_len: int, parts: int = 1, inner_attention: Module.Config | None = None
) -> MoEPlusPlusModel.Config:
    """Our decoder as torchtitan's model. Raises UsageError for what has no counterpart there."""
    for impossible, reason in (
        (config.router == "recurrent", "model.router=recurrent shares one module among all layers"),
        (config.balance.control is not None, f"model.balance.control={config.balance.control} acts after a step"),
        (bool(config.per_layer), "model.per_layer gives layers experts of their own"),
    ):
        if impossible:
            raise UsageError(f"{reason}, and the torchtitan adapter has no place for that: leave it out")
    std, scaled = config.init_std, config.init_std / (2 * config.layers) ** 0.5
    drawn, written = ({"weight": partial(nn.init.normal_, std=of)} for of in (std, scaled))
    norm = RMSNorm.Config(normalized_shape=config.dim, eps=config.norm_eps, param_init={"weight": nn.init.ones_})
    attention = make_gqa_config(
        dim=config.dim, n_heads=config.heads, n_kv_heads=config.num_kv_heads, wqkv_param_init=drawn,
        wo_param_init=written, inner_attention=inner_attention or FlexAttention.Config(),
        rope=CosSinRoPE.Config(dim=config.head_dim, max_seq_len=seq_len, theta=config.rope_theta),
    )  # fmt: skip
    dense = make_ffn_config(dim=config.dim, hidden_dim=config.dense_width, w1_param_init=drawn, w2w3_param_init=drawn)
    blocks = [
        Qwen3TransformerBlock.Config(
            attention_norm=norm,
            ffn_norm=norm,
            attention=attention,
            moe=moe_config(config, block, parts, drawn["weight"], written["weight"]) if config.is_moe(block) else None,
            feed_forward=None if config.is_moe(block) else dense,
        )
        for block in range(config.layers)
    ]
    return MoEPlusPlusModel.Config(
        dim=config.dim, vocab_size=config.vocab_size, norm=norm, layers=blocks,
        tok_embeddings=Embedding.Config(
            num_embeddings=config.vocab_size, embedding_dim=config.dim, param_init=drawn
        ),
        lm_head=Linear.Config(in_features=config.dim, out_features=config.vocab_size, param_init=drawn),
        enable_weight_tying=config.tie_embeddings,
    )  # fmt: skip


def moe_config(
    config: DecoderConfig, block: int, parts: int, drawn: Callable[[Tensor], Any], written: Callable[[Tensor], Any]
) -> MoEPlusPlus.Config:
    experts, top_k = config.experts.ffn, config.top_k
    return MoEPlusPlus.Config(
        num_experts=experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=config.dim, hidden_dim=config.hidden, num_experts=experts,
                param_init={"w1_EFD": drawn, "w2_EDF": written, "w3_EFD": drawn},
            ),
            token_dispatcher=FFNTokenDispatcher.Config(num_experts=experts, top_k=top_k),
        ),
        # Never built: torchtitan's parallelisms look at it.
        router=make_router_config(
            dim=config.dim, num_experts=experts, top_k=top_k, gate_param_init={"weight": drawn}
        ),
        load_balance_coeff=None,
        layer=config,
        first=config.moe_blocks[0] == block,
        layers=len(config.moe_blocks),
        parts=parts,
    )  # fmt: skip


def model_spec(config: DecoderConfig, seq_len: int, parts: int) -> ModelSpec:
    """For a torchtitan `Trainer.Config(model_spec=...)`: data and expert parallel, no pipeline, whose stages would cut
    the gating residual.
    """
    return ModelSpec(
        name="moepp", flavor=config.name, model=model_config(config, seq_len, parts),
        parallelize_fn=parallelize_qwen3, pipelining_fn=None, post_optimizer_build_fn=None, state_dict_adapter=None,
    )  # fmt: skip
