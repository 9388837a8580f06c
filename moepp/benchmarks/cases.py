"""The layers that are measured, and routings for them that are new at every call.

A benchmark that repeats one routing hides what routing costs: kernels compiled for new shapes, caches, allocation.
Shape suffixes: T tokens, K slots of a token, N all experts, S = T*K slots, R rows that FFN experts multiply, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepp.layers.dispatch import SlotCounts
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import ExpertCounts, MoEConfig
from moepp.training.throughput import balanced_routing

SETS = {
    8: ExpertCounts(8, 1, 1, 2), 16: ExpertCounts(16, 1, 1, 2), 32: ExpertCounts(32, 1, 1, 6),
    64: ExpertCounts(64, 1, 1, 6),
}  # fmt: skip
LOAD_SPREAD = 0.3  # standard deviation of the experts' log popularity: max over mean about 1.5, as trained routers show
ROW_BUCKET = 64  # on CPUs every new number of rows compiles bfloat16 kernels anew, at milliseconds each


@dataclass(frozen=True)
class Case:
    """One layer under one kind of routing. `tau` None is vanilla MoE."""

    ffn: int
    tau: float | None
    routing: str

    @property
    def counts(self) -> ExpertCounts:
        return SETS[self.ffn] if self.tau is not None else ExpertCounts(self.ffn, 0, 0, 0)


@dataclass
class Draw:
    """One routing: `chosen_TK` before, `routing` and `counts` after slots over capacity were dropped, and the rows that
    FFN experts have to multiply, which nobody has to ask the device for.
    """

    chosen_TK: Tensor
    routing: Routing
    counts: SlotCounts
    ffn_rows: int

    @property
    def ffn_share(self) -> float:
        return self.ffn_rows / self.chosen_TK.numel()

    @property
    def bucketed_rows(self) -> int:
        """`ffn_rows` to the nearest multiple of ROW_BUCKET."""
        return max(ROW_BUCKET, ROW_BUCKET * round(self.ffn_rows / ROW_BUCKET))


@dataclass
class Inputs:
    """What one call gets, tensors as leaves of its own. `x_RD` has as many rows as the FFN experts multiply."""

    x_TD: Tensor
    x_RD: Tensor
    routing: Routing
    counts: SlotCounts
    chosen_TK: Tensor

    @classmethod
    def of(cls, draw: Draw, x_SD: Tensor, backward: bool) -> "Inputs":
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(backward)

        routing = replace(draw.routing, gate_TK=leaf(draw.routing.gate_TK))
        x_TD, x_RD = leaf(x_SD[: len(draw.chosen_TK)]), leaf(x_SD[: draw.bucketed_rows])
        return cls(x_TD, x_RD, routing, draw.counts, draw.chosen_TK)


class RoutingSource:
    """Draws routings on `device`, the same ones for the same seed and kind of device."""

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.choices = torch.Generator(device).manual_seed(seed)

    def draw(self, layer: MoELayer, kind: str, tokens: int) -> Draw:
        """A new routing, `learned` or `balanced`, as the layer limits it in training."""
        if kind == "balanced":
            chosen = balanced_routing(layer.config, tokens, self.generator, self.device)
        else:
            chosen = learned_like_routing(layer.config, tokens, self.generator, self.device, self.choices)
        kept, counts = chosen, layer.count(chosen)
        if layer.config.capacity_factor is not None:
            kept, counts = layer.drop_over_capacity(chosen, counts)
        return Draw(chosen.expert_TK, kept, counts, int((kept.expert_TK < layer.config.experts.ffn).sum()))


def learned_like_routing(
    config: MoEConfig,
    tokens: int,
    generator: torch.Generator,
    device: torch.device,
    choices: torch.Generator | None = None,
) -> Routing:
    """Top-k of noisy popularities around the loads that the balance loss aims at: uneven, and new at every call.

    `choices` draws the tokens' noise, on its own device, where `generator`, which draws the popularities on the CPU, is
    the same on several devices.
    """
    choices = choices or generator
    popularity_N = LOAD_SPREAD * torch.randn(config.experts.total, generator=generator)
    popularity_N[config.experts.ffn :] -= torch.tensor(config.balance.tau).log()
    uniform_TN = torch.rand(tokens, config.experts.total, generator=choices, device=choices.device).to(device)
    logits_TN = popularity_N.to(device) - (-uniform_TN.log()).log()  # Gumbel noise: top-k samples by popularity
    gate_TK, expert_TK = logits_TN.softmax(-1).topk(config.top_k)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    return Routing(expert_TK, gate_TK, torch.empty(tokens, 0, device=device))
