"""What training asks of a language model. The Decoder is one; any other `nn.Module` with these methods trains as well.

Shape suffixes: B batch, S sequence, V vocabulary, L MoE layers, N all experts of a layer.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moepp.layers.moe import MoEStats
from moepp.layers.settings import MoEConfig


@dataclass
class ModelOutput:
    """`stats` of every MoE layer, first to last, and `logits` [B, S, V]; in place of these the losses where there were
    targets, and `hidden_states` where they were asked for.
    """

    stats: list[MoEStats]
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None  # mean over the targets, in nats; without gradients also of each of them:
    nats_BS: Tensor | None = None
    right_BS: Tensor | None = None  # whether the target has the largest logit
    divergence: Tensor | None = None  # from another model, mean over tokens; in training what is learnt in their place
    hidden_states: list[Tensor] | None = None  # the embeddings, each block's output but the last, and the final norm's

    @property
    def router_logits(self) -> list[Tensor]:
        """Raw logits [T, N] of every MoE layer, gating residual included."""
        return [layer.logits_TN for layer in self.stats]


torch.export.register_dataclass(ModelOutput, serialized_type_name="moepp.ModelOutput")  # a pytree, as MoEStats


@runtime_checkable
class CausalLM(Protocol):
    """An `nn.Module` from token ids to the scores of the ids that come next."""

    @property
    def config(self) -> MoEConfig:
        """What experts its MoE layers have; a model without any has a plain `MoEConfig()`, and outputs no `stats`."""
        ...

    def __call__(self, ids_BS: Tensor, *, targets_BS: Tensor | None = None) -> ModelOutput:
        """Logits; with `targets_BS`, the ids that come next, `cross_entropy` in their place, and without gradients
        `nats_BS` and `right_BS`.
        """
        ...

    def balance_loss(self, output: ModelOutput) -> Tensor:
        """What is added to the cross-entropy (Eq. 9), weighted; 0 where nothing is."""
        ...

    def step_control(self, chosen_LN: Tensor, tokens: int) -> None:
        """Called after every optimizer step with the slots that chose each expert in it, and its tokens, where
        `config.balance.control` is set.
        """
        ...

    def active_parameters(self, ffn_per_token: float | None = None) -> int:
        """Parameters that one token uses with so many FFN experts in each MoE layer; None: the most it can."""
        ...

    def forward_flops(self, seq_len: int, ffn_per_token: float | None = None) -> dict[str, float]:
        """Forward FLOPs per token by part; None: as many FFN experts as a balanced layer uses."""
        ...

    def reset_parameters(self, seed: int = 0) -> Any:
        """Initial weights, the same for the same seed."""
        ...
