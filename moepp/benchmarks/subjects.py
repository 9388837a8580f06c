"""The language models whose training is timed: ours, the released layer in our decoder, and Hugging Face transformers'
Mixtral and Qwen3-MoE of the same sizes.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepp.benchmarks.peers import ReleasedLoop
from moepp.layers.moe import MoELayer, MoEStats
from moepp.models.decoder import Decoder
from moepp.training.compiled import losses_of
from moepp.training.loss import training_losses
from moepp.training.optim import build_optimizer
from moepp.training.settings import RunConfig
from moepp.training.throughput import autocast_of


@dataclass
class Subject:
    """A model in training mode, what it minimises of tokens [B, S+1] and the cross-entropy in it, its optimizer, and
    how many routed FFN experts a token passes in a layer.
    """

    model: nn.Module
    losses: Callable[[Tensor], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    ffn_per_token: Callable[[Tensor], float]
    precision: Callable[[], AbstractContextManager]

    def step(self, tokens: Tensor, grad_clip: float) -> Tensor:
        """One optimizer step; the cross-entropy before it."""
        with self.precision():
            loss, cross_entropy = self.losses(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return cross_entropy.detach()


def decoder(config: RunConfig, device: torch.device, released: bool = False) -> Subject:
    """Ours as the suite trains it: float32 weights, autocast, its optimizer; compiled where `config` says so. Or the
    same with the `released` layer's loop in place of our experts.
    """
    with device:
        model = Decoder(config.model, config.seed)
    for layer in model.moe_layers() if released else ():
        _compute_as_released(layer)
    parts, precision = losses_of(config), autocast_of(config.trainer.precision, device)

    def losses(tokens: Tensor) -> tuple[Tensor, Tensor]:
        cross_entropy, balance, _ = parts(model, tokens)
        return cross_entropy + balance, cross_entropy

    def measured(tokens: Tensor) -> float:
        with torch.no_grad(), precision():
            stats = training_losses(model, tokens)[2].stats
            return statistics.fmean(map(_ffn_per_token, model.moe_layers(), stats))

    return Subject(model, losses, build_optimizer(model, config.optim), measured, precision)


def _compute_as_released(layer: MoELayer) -> None:
    """Each FFN expert becomes a parameter of its own, in the same memory."""
    layer.loop = loop = ReleasedLoop(layer)
    del layer.ffn.w_in, layer.ffn.w_out
    layer.terms = lambda x_TD, routing: []  # of our fused pass
    layer.expert_forward = lambda x_TD, routing, counts, terms: loop.gated_sum(layer.expert_input(x_TD), routing)


def _ffn_per_token(layer: MoELayer, stats: MoEStats) -> float:
    """Without the slots that were dropped, which cost nothing."""
    return int(stats.chosen_N[: layer.layout.ffn].sum() - stats.dropped_ffn) / len(stats.logits_TN)


def mixtral(config: RunConfig, device: torch.device) -> Subject:
    """transformers' Mixtral, as `_in_a_bare_loop` has it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = config.model
    described = MixtralConfig(
        **_same_sizes(config), intermediate_size=sizes.hidden, num_local_experts=sizes.experts.ffn, sliding_window=None
    )
    return _in_a_bare_loop(MixtralForCausalLM, described, config, device)


def qwen3_moe(config: RunConfig, device: torch.device) -> Subject:
    """transformers' Qwen3-MoE, which also normalises queries and keys."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = config.model
    described = Qwen3MoeConfig(
        **_same_sizes(config), moe_intermediate_size=sizes.hidden, num_experts=sizes.experts.ffn, norm_topk_prob=True,
        head_dim=sizes.head_dim, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    return _in_a_bare_loop(Qwen3MoeForCausalLM, described, config, device)


def _same_sizes(config: RunConfig) -> dict[str, Any]:
    sizes = config.model
    return dict(
        vocab_size=sizes.vocab_size, hidden_size=sizes.dim, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.num_kv_heads, num_experts_per_tok=sizes.top_k,
        tie_word_embeddings=sizes.tie_embeddings, max_position_embeddings=config.data.seq_len,
        initializer_range=sizes.init_std, output_router_logits=True, use_cache=False,
        router_aux_loss_coef=sizes.balance.beta,
    )  # fmt: skip


def _in_a_bare_loop(kind: Any, described: Any, config: RunConfig, device: torch.device) -> Subject:
    """A transformers model with the width, layers, heads, experts, vocabulary and context of `config`, its balance loss
    included: grouped_mm experts, sdpa attention, dropless, fused AdamW.

    Where ours runs under autocast its weights are bfloat16 themselves, as are AdamW's moments: grouped_mm takes part in
    no autocast. This is less work than ours, not more.
    """
    optim, mixed = config.optim, config.trainer.precision == "bf16-mixed"
    with device:
        model = kind._from_config(
            described,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
            dtype=torch.bfloat16 if mixed else torch.float32,
        )
    model.train()
    called = torch.compile(model, dynamic=False) if config.trainer.compile else model
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, fused=True
    )

    def losses(tokens: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS = tokens[:, :-1].contiguous()  # the model shifts the labels itself
        output = called(input_ids=ids_BS, labels=ids_BS)
        return output.loss, output.loss - described.router_aux_loss_coef * output.aux_loss

    return Subject(model, losses, optimizer, lambda _: float(config.model.top_k), nullcontext)
