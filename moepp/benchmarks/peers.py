"""What the expert layer is measured against: the GEMMs alone, a plain loop over experts, and Hugging Face transformers.

Every entry maps a MoELayer to a function that computes its experts' output [T, D] from `Inputs` with the layer's own
weights; one that is a module has parameters of its own, which lie in the same memory.
Shape suffixes as in cases.py; E FFN experts, F their hidden width.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moepp.benchmarks.cases import Inputs
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import Backend

Forward = Callable[[Inputs], Tensor]


def ours(backend: Backend) -> Callable[[MoELayer], Forward]:
    def build(layer: MoELayer) -> Forward:
        same = with_backend(layer, backend)
        return lambda inputs: same.expert_forward(inputs.x_TD, inputs.routing, inputs.counts)

    return build


def with_backend(layer: MoELayer, backend: Backend) -> MoELayer:
    """A layer that shares this one's parameters and computes them by another backend."""
    with torch.device("meta"):
        same = MoELayer(replace(layer.config, backend=backend), first=True)
    same.load_state_dict(dict(layer.named_parameters()), assign=True)
    return same


def whole_layer(layer: MoELayer) -> Forward:
    """Router, capacity and statistics too. The choices are the drawn ones, with the gates of the layer's own router."""
    same = with_backend(layer, layer.config.backend)

    def forward(inputs: Inputs) -> Tensor:
        same.route = lambda logits_TN: replace(MoELayer.route(same, logits_TN), expert_TK=inputs.chosen_TK)
        return same(inputs.x_TD)[0]

    return forward


class ReleasedLoop(nn.Module):
    """The released layer's pass: a Python loop over all experts, zero-computation ones too, with nonzero, index_select
    and index_add_. Each FFN expert has weights of its own, so that its gradients need no stack.
    """

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.counts = layer.config.experts
        self.w_in, self.w_out = (
            nn.ParameterList(weight.detach().unbind(0)) for weight in (layer.ffn.w_in, layer.ffn.w_out)
        )
        self.constants = layer.zero_computation if self.counts.constant else None

    def forward(self, inputs: Inputs) -> Tensor:
        return self.gated_sum(inputs.x_TD, inputs.routing)

    def gated_sum(self, x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.counts.total):
            token_R, slot_R = torch.where(routing.expert_TK == index)
            rows = self.expert(index, x_TD.index_select(0, token_R)) * routing.gate_TK[token_R, slot_R, None]
            y_TD.index_add_(0, token_R, rows.to(x_TD.dtype))
        return y_TD

    def expert(self, index: int, x_RD: Tensor) -> Tensor:
        if index < self.counts.ffn:
            gate_RF, up_RF = F.linear(x_RD, self.w_in[index]).chunk(2, -1)
            return F.linear(F.silu(gate_RF) * up_RF, self.w_out[index])
        constant = index - self.counts.ffn
        if constant < self.counts.constant:
            mix = F.linear(x_RD, self.constants.w_mix[2 * constant : 2 * constant + 2]).softmax(-1)
            return mix[:, :1] * x_RD + mix[:, 1:] * self.constants.vectors[constant]
        return x_RD if constant < self.counts.constant + self.counts.copy else torch.zeros_like(x_RD)


def transformers_experts(implementation: str) -> Callable[[MoELayer], Forward]:
    """transformers' Mixtral experts on the FFN slots (others go to its expert-parallel sentinel) plus our fused pass.

    transformers has no zero-computation experts: this is the best that its users could put together.
    """

    def build(layer: MoELayer) -> Forward:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        counts = layer.config.experts
        config = MixtralConfig(
            hidden_size=layer.config.dim, intermediate_size=layer.config.hidden, num_local_experts=counts.ffn
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = layer.ffn.w_in, layer.ffn.w_out
        experts._is_expert_parallel = True  # ids equal to the number of experts are skipped

        def forward(inputs: Inputs) -> Tensor:
            x_TD, routing = inputs.x_TD, inputs.routing
            expert_TK = routing.expert_TK.clamp(max=counts.ffn)
            gate_TK = routing.gate_TK.masked_fill(expert_TK == counts.ffn, 0).to(x_TD.dtype)
            y_TD = experts(x_TD, expert_TK, gate_TK)
            others = layer.affine_map(x_TD, routing)
            return y_TD if others is None else y_TD + others(x_TD).to(x_TD.dtype)

        return forward

    return build


class GemmFloor(torch.autograd.Function):
    """The matrix products of an expert, forward and backward, on rows that are already in place; nothing else.

    The gradients of the weights are computed and not handed on: nobody would do more with them.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        hidden_R2F = F.linear(x_RD, w_in)
        ctx.save_for_backward(x_RD, w_in, w_out, hidden_R2F)
        return F.linear(hidden_R2F[:, : w_out.shape[1]], w_out)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        x_RD, w_in, w_out, hidden_R2F = ctx.saved_tensors
        dy_RD @ w_out  # d inner; the SwiGLU's backward would widen it to the width of `hidden_R2F`
        dy_RD.t() @ hidden_R2F[:, : w_out.shape[1]]
        hidden_R2F.t() @ x_RD
        return hidden_R2F @ w_in, None, None


def gemm_floor(layer: MoELayer) -> Forward:
    """The least that the FLOPs of the FFN experts take: all rows in one dense product per projection, as if there were
    one expert. No loop, no wait for the host; the gating is left out.

    One big product can be faster than those of E experts with the same rows, and reads one expert's weights instead of
    E: nothing that has the experts can be expected to reach it.
    """
    w_in, w_out = layer.ffn.w_in[0].detach(), layer.ffn.w_out[0].detach()
    return lambda inputs: GemmFloor.apply(inputs.x_RD, w_in, w_out)


class ExpertFloor(torch.autograd.Function):
    """`GemmFloor` of every expert with weights of its own, on rows that are already sorted."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_in: Tensor, w_out: Tensor, sizes: list[int]) -> Tensor:
        z_R2F = x_RD.new_empty(len(x_RD), w_in.shape[1])
        y_RD = torch.empty_like(x_RD)
        for into, out, x, z, y in zip(w_in, w_out, *(rows.split(sizes) for rows in (x_RD, z_R2F, y_RD)), strict=True):
            torch.mm(x, into.t(), out=z)
            torch.mm(z[:, : out.shape[1]], out.t(), out=y)
        ctx.save_for_backward(x_RD, w_in, w_out, z_R2F)
        ctx.sizes = sizes
        return y_RD

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None, None]:
        x_RD, w_in, w_out, z_R2F = ctx.saved_tensors
        dw_in, dw_out, dx_RD = (torch.empty_like(of) for of in (w_in, w_out, x_RD))
        rows = (of_R.split(ctx.sizes) for of_R in (x_RD, z_R2F, dy_RD, dx_RD))
        for into, out, dinto, dout, x, z, dy, dx in zip(w_in, w_out, dw_in, dw_out, *rows, strict=True):
            torch.mm(dy, out)
            torch.mm(dy.t(), z[:, : out.shape[1]], out=dout)
            torch.mm(z.t(), x, out=dinto)
            torch.mm(z, into, out=dx)
        return dx_RD, None, None, None


def expert_floor(layer: MoELayer) -> Forward:
    """The least that the products of E experts take where each is one by itself: a loop over them and nothing else.
    Waits for the device to learn their shares of the rows.
    """
    w_in, w_out = layer.ffn.w_in.detach(), layer.ffn.w_out.detach()

    def forward(inputs: Inputs) -> Tensor:
        load_E = torch.bincount(inputs.routing.expert_TK.reshape(-1), minlength=len(w_in))[: len(w_in)]
        ends = [round(end * len(inputs.x_RD)) for end in (load_E.cumsum(0) / load_E.sum().clamp(min=1)).tolist()]
        sizes = [end - start for start, end in pairwise([0, *ends[:-1], len(inputs.x_RD)])]
        return ExpertFloor.apply(inputs.x_RD, w_in, w_out, sizes)

    return forward


def zero_computation_pass(layer: MoELayer) -> Forward:
    """The part of our layer that the zero-computation experts cost."""

    def forward(inputs: Inputs) -> Tensor:
        others = layer.affine_map(inputs.x_TD, inputs.routing)
        return inputs.x_TD if others is None else others(inputs.x_TD)

    return forward


IMPLEMENTATIONS: dict[str, Callable[[MoELayer], Forward]] = {
    "moepp": ours("auto"),
    **{backend: ours(backend) for backend in ("triton", "grouped", "sorted")},
    "floor": gemm_floor,
    "expert_floor": expert_floor,
    "zero_computation": zero_computation_pass,
    "loop": ReleasedLoop,
    "transformers_eager": transformers_experts("eager"),
    "transformers_grouped_mm": transformers_experts("grouped_mm"),
    "whole_layer": whole_layer,
}
