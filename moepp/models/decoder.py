"""LLaMA-style decoder language model: pre-RMSNorm, rotary attention, and an MoE++ layer in every k-th block.

Shape suffixes: B batch, S sequence, T = B*S tokens, D model width, H query heads, G key-value heads, A head width, V
vocabulary, N experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp import register
from moepp.layers.balance import combine_layers
from moepp.layers.dense import DenseFFN
from moepp.layers.initial import begin_buffers, own_beginnings, seed_of, uninitialized
from moepp.layers.moe import MoELayer, MoEStats
from moepp.layers.others import buffers_of_others, repeatable
from moepp.layers.rival_routers import shared_gru
from moepp.layers.settings import MoEConfig
from moepp.models.attention import Attention, KeyValueCache, rotary_table
from moepp.models.budget import active_parameters, forward_flops
from moepp.models.cross_entropy import linear_cross_entropy, target_scores
from moepp.models.protocol import ModelOutput
from moepp.models.sampling import continue_ids
from moepp.models.settings import DecoderConfig


class Block(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)); hands what its router carries to the next block."""

    def __init__(self, config: DecoderConfig, index: int, gru: nn.GRUCell | None, moe: MoEConfig | None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.heads, config.num_kv_heads, config.attention)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        first = config.moe_blocks[:1] == [index]
        self.ffn = MoELayer(moe, first, gru, config.experts) if moe else DenseFFN(config.dim, config.dense_width)

    def forward(
        self, x_BSD: Tensor, rotary: Tensor, previous: Tensor | None, cache: KeyValueCache | None
    ) -> tuple[Tensor, MoEStats | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary, cache)
        h_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, DenseFFN):
            return x_BSD + self.ffn(h_BSD), None
        y_BSD, stats = self.ffn(h_BSD, previous)
        return x_BSD + y_BSD, stats


@register.model("decoder")
class Decoder(nn.Module):
    """The language model (a `CausalLM`, protocol.py). `seed` fixes the initial weights; None leaves them unset, for
    loading a checkpoint. On the meta device there are none.
    """

    def __init__(self, config: DecoderConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        with uninitialized():
            self._build(config)
        if seed is not None:
            self.reset_parameters(seed)

    def _build(self, config: DecoderConfig) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.router_gru = shared_gru(config.router_width) if config.router == "recurrent" else None
        moe = dict(zip(config.moe_blocks, config.moe_configs, strict=True))
        self.blocks = nn.ModuleList(
            Block(config, index, self.router_gru, moe.get(index)) for index in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def reset_parameters(self, seed: int = 0) -> None:
        """Every matrix, embedding and constant vector from N(0, init_std); projections that write into the residual
        stream from N(0, init_std / sqrt(2 * layers)) (Megatron's scaled init; the paper states none); norms at 1; what
        has a beginning of its own (layers/initial.py), there.

        Each parameter has its own generator, seeded by `seed` and its name: arms of an ablation share the initial value
        of every parameter they have in common.
        """
        for layer in self.moe_layers():
            if layer.control is not None:
                layer.control.reset_parameters()
        own = own_beginnings(self, seed)
        for name, parameter in self.named_parameters():
            self._begin(name, parameter, seed, own)
        begin_buffers(self, own)

    def _begin(self, name: str, parameter: Tensor, seed: int, own: Mapping[str, Callable[[Tensor], Any]]) -> None:
        std, scaled = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.layers)
        if name in own:
            own[name](parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        elif not parameter.is_meta:
            generator = torch.Generator(parameter.device).manual_seed(seed_of(seed, name))
            nn.init.normal_(parameter, 0, scaled if "w_out" in name else std, generator)

    def forward(
        self,
        ids_BS: Tensor,
        caches: list[KeyValueCache] | None = None,
        hidden_states: bool = False,
        targets_BS: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> ModelOutput:
        """`ids_BS` int64 token ids; with `caches`, the tokens that follow those already cached. `targets_BS`, the ids
        that come next, are scored here, so that many logits need never exist at once (cross_entropy.py); neither need
        they where only those of some rows and positions, `at`, are wanted: [Q, V].
        """
        offset = caches[0].length if caches else 0
        positions = torch.arange(offset, offset + ids_BS.shape[1], device=ids_BS.device)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x_BSD, carried, stats = self.embedding(ids_BS), None, []
        states = []
        for index, block in enumerate(self.blocks):
            if hidden_states:
                states.append(x_BSD)
            inputs = (x_BSD, rotary, carried, caches[index] if caches else None)
            if self.config.activation_checkpointing and self.training:
                x_BSD, layer = checkpoint(repeatable(block), *inputs, use_reentrant=False, **keeping(block))
            else:
                x_BSD, layer = block(*inputs)
            if layer is not None:
                carried = layer.carried
                stats.append(layer)
        x_BSD = self.norm(x_BSD)
        output = ModelOutput(stats, hidden_states=[*states, x_BSD] if hidden_states else None)
        self._read(x_BSD if at is None else x_BSD[at], targets_BS, output)
        return output

    def _read(self, x_BSD: Tensor, targets_BS: Tensor | None, output: ModelOutput) -> None:
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        if targets_BS is None:
            output.logits = F.linear(x_BSD, weight_VD)
        elif torch.is_grad_enabled():
            output.cross_entropy = linear_cross_entropy(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())
        else:
            nats_T, right_T = target_scores(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())
            output.cross_entropy = nats_T.mean()
            output.nats_BS, output.right_BS = nats_T.view_as(targets_BS), right_T.view_as(targets_BS)

    def balance_loss(self, output: ModelOutput) -> Tensor:
        """beta * L_b over all layers (Eq. 9), and the mean of their z-loss and entropy loss; 0 without MoE layers."""
        if not output.stats:
            return torch.zeros((), device=self.embedding.weight.device)
        balance = combine_layers([layer.balance_loss for layer in output.stats], self.config.balance)
        router_losses = [layer.router_loss for layer in output.stats if layer.router_loss is not None]
        return balance + torch.stack(router_losses).mean() if router_losses else balance

    def step_control(self, chosen_LN: Tensor, tokens: int) -> None:
        """Updates every MoE layer's control by the counts of one optimizer step: `chosen_N` of all layers, summed over
        its micro-batches, and the number of their tokens.
        """
        for layer, chosen_N in zip(self.moe_layers(), chosen_LN, strict=True):
            if layer.control is not None:
                layer.control.step(layer.own_counts(chosen_N), tokens)

    def active_parameters(self, ffn_per_token: float | None = None) -> int:
        return active_parameters(self.config, ffn_per_token)

    def forward_flops(self, seq_len: int, ffn_per_token: float | None = None) -> dict[str, float]:
        return forward_flops(self.config, seq_len, ffn_per_token)

    @property
    def has_buffers_of_others(self) -> bool:
        """Whether parts that are not the package's own have any."""
        return bool(buffers_of_others(self))

    def moe_layers(self) -> list[MoELayer]:
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer)]

    def generate(
        self,
        ids_BS: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`ids_BS` with `max_new_tokens` more ids, [B, S + max_new_tokens]; greedy at temperature 0, else sampled."""
        caches = [KeyValueCache() for _ in self.blocks]

        def last_logits(ids_BS: Tensor) -> Tensor:
            return self(ids_BS, caches).logits[:, -1]

        return continue_ids(self, last_logits, ids_BS, max_new_tokens, temperature, generator)


def keeping(block: Block) -> dict[str, Any]:
    """Options of `checkpoint`: rows that have come from other devices are kept, not sent again."""
    return block.ffn.ffn.dispatcher.keeping() if isinstance(block.ffn, MoELayer) else {}


class InitialState(Mapping[str, Tensor]):
    """The state that a decoder begins with by `seed`: whole, on the CPU, and each tensor drawn when it is read, so that
    a decoder on the meta device may take it in parts. Made before the decoder is divided.
    """

    def __init__(self, decoder: Decoder, seed: int):
        self.decoder, self.seed, self.own = decoder, seed, own_beginnings(decoder, seed)
        self.shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        self.controls: dict[str, Tensor] = {}
        for path, layer in decoder.named_modules():
            if isinstance(layer, MoELayer) and layer.control is not None:
                control = deepcopy(layer.control).to_empty(device="cpu")
                control.reset_parameters()
                self.controls |= control.state_dict(prefix=f"{path}.control.")

    def __getitem__(self, name: str) -> Tensor:
        if name in self.controls:
            return self.controls[name]
        drawn = torch.empty(self.shapes[name], device="cpu")
        with torch.no_grad():
            self.decoder._begin(name, drawn, self.seed, self.own)
        return drawn

    def __iter__(self) -> Iterator[str]:
        return iter([*self.shapes, *self.controls])

    def __len__(self) -> int:
        return len(self.shapes) + len(self.controls)
