"""The language models whose training is timed: ours, and Hugging Face transformers' Mixtral of the same sizes."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moepp.layers.moe import MoELayer, MoEStats
from moepp.models.decoder import Decoder
from moepp.training.compiled import losses_of
from moepp.training.loss import training_losses
from moepp.training.optim import build_optimizer
from moepp.training.settings import RunConfig
from moepp.training.throughput import autocast_of


@dataclass
class Subject:
    """A model in training mode, the loss of tokens [B, S+1], its optimizer, and how many routed FFN experts a token
    passes in a layer.
    """

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    ffn_per_token: Callable[[Tensor], float]
    precision: Callable[[], AbstractContextManager]

    def step(self, tokens: Tensor, grad_clip: float) -> None:
        """One optimizer step."""
        with self.precision():
            loss = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def decoder(config: RunConfig, device: torch.device) -> Subject:
    """Ours as the suite trains it: float32 weights, autocast, its optimizer; compiled where `config` says so."""
    with device:
        model = Decoder(config.model, config.seed)
    losses, precision = losses_of(config), autocast_of(config, device)

    def loss(tokens: Tensor) -> Tensor:
        cross_entropy, balance, _ = losses(model, tokens)
        return cross_entropy + balance

    def measured(tokens: Tensor) -> float:
        with torch.no_grad(), precision():
            stats = training_losses(model, tokens)[2].stats
            return statistics.fmean(map(_ffn_per_token, model.moe_layers(), stats))

    return Subject(model, loss, build_optimizer(model, config.optim), measured, precision)


def _ffn_per_token(layer: MoELayer, stats: MoEStats) -> float:
    """Without the slots that were dropped, which cost nothing."""
    routing = layer.route(stats.logits_TN)
    if layer.config.capacity_factor is not None:
        routing, _ = layer.drop_over_capacity(routing, layer.count(routing))
    return int((routing.expert_TK < layer.config.experts.ffn).sum()) / len(stats.logits_TN)


def mixtral(config: RunConfig, device: torch.device) -> Subject:
    """transformers' Mixtral with the width, layers, heads, experts, vocabulary and context of `config`, its balance
    loss included, in a bare loop: grouped_mm experts, sdpa attention, dropless, fused AdamW.

    Where ours runs under autocast its weights are bfloat16 themselves, as are AdamW's moments: grouped_mm takes part in
    no autocast. This is less work than ours, not more.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes, optim = config.model, config.optim
    mixed = config.trainer.precision == "bf16-mixed"
    described = MixtralConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.dim, intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.num_kv_heads,
        num_local_experts=sizes.experts.ffn, num_experts_per_tok=sizes.top_k, tie_word_embeddings=sizes.tie_embeddings,
        max_position_embeddings=config.data.seq_len, output_router_logits=True, use_cache=False, sliding_window=None,
        router_aux_loss_coef=sizes.balance.beta,
    )  # fmt: skip
    with device:
        model = MixtralForCausalLM._from_config(
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

    def loss(tokens: Tensor) -> Tensor:
        ids_BS = tokens[:, :-1].contiguous()  # Mixtral shifts the labels itself
        return called(input_ids=ids_BS, labels=ids_BS).loss

    return Subject(model, loss, optimizer, lambda _: float(sizes.top_k), nullcontext)
