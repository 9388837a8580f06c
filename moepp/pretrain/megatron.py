"""MoE++ inside Megatron-Core's MoE layer: our router gates over all N experts, the columns of the FFN experts go on as
its boolean routing map, and zero-computation experts are added where the tokens are. Written for megatron-core 0.16.

Shape suffixes: B batch, S sequence, D model width, T = B*S tokens, K slots of a token, N all experts, E FFN experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moepp.layers.dispatch import LocalDispatcher, Meanwhile, SlotCounts
from moepp.layers.initial import uninitialized
from moepp.layers.kernels.base import RoutedTokens
from moepp.layers.moe import MoELayer
from moepp.models.settings import DecoderConfig
from moepp.strategies.dispatch import SharedBatchDispatcher


def ffn_columns(tokens: RoutedTokens, experts: int) -> tuple[Tensor, Tensor]:
    """Gates [T, E] and the boolean routing map [T, E] of the FFN experts: slots of other experts, and dropped ones, are
    in neither.
    """
    ids_TK = tokens.expert_TK.clamp(max=experts)
    gate_TE = tokens.gate_TK.new_zeros(len(ids_TK), experts + 1).scatter_add(1, ids_TK, tokens.gate_TK)
    map_TE = torch.zeros_like(gate_TE, dtype=torch.bool).scatter(1, ids_TK, True)
    return gate_TE[:, :experts], map_TE[:, :experts]


class NoRouter(nn.Module):
    """Where Megatron builds its router: MoE++ routes by its own layer's."""

    def __init__(self, config: TransformerConfig, **_: Any):
        super().__init__()

    def set_layer_number(self, layer_number: int) -> None:
        """A router of Megatron counts its losses by it."""


class RoutedFFN(nn.Module):
    """What a MoELayer has in place of its FFN experts: dispatcher and experts of Megatron's layer, which owns them."""

    def __init__(self, layer: "MoEPlusPlus"):
        super().__init__()
        self.dispatcher = SharedBatchDispatcher() if dist.is_initialized() else LocalDispatcher()
        self.owner = (layer,)  # not a part of this

    def forward(
        self, tokens: RoutedTokens, counts: SlotCounts | None = None, meanwhile: Meanwhile | None = None
    ) -> Tensor:
        theirs = self.owner[0]
        gate_TE, map_TE = ffn_columns(tokens, theirs.config.num_moe_experts)
        rows, gates = theirs.preprocess(tokens.x_TD[:, None], gate_TE, map_TE)
        output, _ = theirs.routed_experts_compute(*theirs.dispatch(rows, gates))
        y_TD = theirs.postprocess(theirs.combine(output), None)[:, 0]
        return y_TD if tokens.others is None else y_TD + tokens.others(tokens.x_TD)


class MoEPlusPlus(MegatronMoELayer):
    """Megatron's MoE layer with a `MoELayer` of `decoder` around its experts; `previous` is the one of the block
    before, on the same pipeline stage, None for the network's first.

    Set `moe_expert_capacity_factor` in Megatron's config, to any number: its all-to-all then counts the rows of each
    step rather than taking them for top-k of every token. The capacity itself is the decoder's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        decoder: DecoderConfig,
        previous: "MoEPlusPlus | None" = None,
        layer_number: int | None = None,
        **options: Any,
    ):
        submodules = MoESubmodules(experts=submodules.experts, router=NoRouter)
        super().__init__(config, submodules, layer_number, **options)
        self.decoder, self.previous = decoder, (previous,)
        with uninitialized():
            self.layer = MoELayer(decoder, first=previous is None)
        self.layer.ffn = RoutedFFN(self)
        self.layer.reset_parameters()
        self.carried: Tensor | None = None
        self.balance_loss: Tensor | None = None  # of the last forward pass, weighted, this layer's share of it

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[S, B, D] to [S, B, D]; the balance loss gets its gradient beside it, as Megatron's own."""
        previous, balance = self.previous[0], self.decoder.balance
        y_BSD, stats = self.layer(hidden_states.transpose(0, 1), previous.carried if previous else None)
        layers = len(self.decoder.moe_blocks)
        loss = balance.beta * stats.balance_loss / (1 if balance.form == "paper" else layers)
        loss = loss if stats.router_loss is None else loss + stats.router_loss / layers
        self.carried, self.balance_loss = stats.carried, loss.detach()
        return MoEAuxLossAutoScaler.apply(y_BSD.transpose(0, 1), loss), None


def to_megatron(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One of our MoE layers' state by the names of MoEPlusPlus with Megatron's SequentialMLP."""
    w_in, w_out = state["ffn.w_in"], state["ffn.w_out"]
    experts = {
        f"experts.local_experts.{expert}.linear_fc{number}.weight": weight[expert]
        for number, weight in ((1, w_in), (2, w_out))
        for expert in range(len(weight))
    }
    return experts | {f"layer.{name}": value for name, value in state.items() if not name.startswith("ffn.")}


def from_megatron(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`to_megatron` undone."""
    experts = sum(".linear_fc1." in name for name in theirs)
    stacked = {
        name: torch.stack([theirs[f"experts.local_experts.{e}.linear_fc{n}.weight"] for e in range(experts)])
        for n, name in ((1, "ffn.w_in"), (2, "ffn.w_out"))
    }
    return {name.removeprefix("layer."): v for name, v in theirs.items() if name.startswith("layer.")} | stacked
