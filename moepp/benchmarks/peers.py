"""What the expert layer is measured against: the GEMMs alone, a plain loop over experts, and Hugging Face transformers.

Every entry maps a MoELayer to a function (x [T, D], Routing) -> y [T, D] that uses the layer's own weights.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from moepp.layers.kernels.sorted_rows import swiglu
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing

Forward = Callable[[Tensor, Routing], Tensor]


def ours(layer: MoELayer) -> Forward:
    return layer.expert_forward


def reference_loop(layer: MoELayer) -> Forward:
    """One pass of a Python loop over all experts, zero-computation ones too, with index_select and index_add."""
    counts, others = layer.config.experts, layer.zero_computation

    def expert(index: int, x_RD: Tensor) -> Tensor:
        if index < counts.ffn:
            return swiglu(x_RD, layer.ffn.w_in[index], layer.ffn.w_out[index])
        constant = index - counts.ffn
        if constant < counts.constant:
            mix = F.linear(x_RD, others.w_mix[2 * constant : 2 * constant + 2]).softmax(-1)
            return mix[:, :1] * x_RD + mix[:, 1:] * others.vectors[constant]
        return x_RD if constant < counts.constant + counts.copy else torch.zeros_like(x_RD)

    def forward(x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for index in range(counts.total):
            token_R, slot_R = torch.where(routing.expert_TK == index)
            rows = expert(index, x_TD.index_select(0, token_R)) * routing.gate_TK[token_R, slot_R, None]
            y_TD = y_TD.index_add(0, token_R, rows.to(x_TD.dtype))
        return y_TD

    return forward


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

        def forward(x_TD: Tensor, routing: Routing) -> Tensor:
            expert_TK = routing.expert_TK.clamp(max=counts.ffn)
            gate_TK = routing.gate_TK.masked_fill(expert_TK == counts.ffn, 0).to(x_TD.dtype)
            y_TD = experts(x_TD, expert_TK, gate_TK)
            others = layer.zero_computation_terms(x_TD, routing)
            return y_TD if others is None else y_TD + others(x_TD).to(x_TD.dtype)

        return forward

    return build


class GemmFloor(torch.autograd.Function):
    """The matrix products of one expert, forward and backward, on rows that are already in place; nothing else."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        hidden = F.linear(x_RD, w_in)
        ctx.save_for_backward(x_RD, w_in, w_out, hidden)
        return F.linear(hidden[:, : w_out.shape[1]], w_out)

    @staticmethod
    def backward(ctx, dy_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_RD, w_in, w_out, hidden = ctx.saved_tensors
        inner = hidden[:, : w_out.shape[1]]
        dy_RD @ w_out  # d inner; the SwiGLU's backward would widen it to the width of `hidden`
        return hidden @ w_in, hidden.t() @ x_RD, dy_RD.t() @ inner


def gemm_floor(layer: MoELayer) -> Forward:
    """The least work that any per-expert implementation has: two products per expert forward, four more backward.

    Rows are rounded to the nearest 64, so that bf16 kernels are compiled once (see sorted_rows.ROW_BUCKET).
    """

    def forward(x_TD: Tensor, routing: Routing) -> Tensor:
        sizes = torch.bincount(routing.expert_TK.reshape(-1), minlength=layer.config.experts.total)
        total = torch.zeros((), dtype=x_TD.dtype)
        weights = zip(layer.ffn.w_in.unbind(0), layer.ffn.w_out.unbind(0), strict=True)
        for size, (w_in, w_out) in zip(sizes.tolist(), weights, strict=False):
            rows = min(len(x_TD), max(64 * round(size / 64), 64 if size else 0))
            if rows:
                total = total + GemmFloor.apply(x_TD[:rows], w_in, w_out)[0, 0]
        return total

    return forward


def zero_computation_pass(layer: MoELayer) -> Forward:
    """The part of our layer that the zero-computation experts cost."""

    def forward(x_TD: Tensor, routing: Routing) -> Tensor:
        others = layer.zero_computation_terms(x_TD, routing)
        return x_TD if others is None else others(x_TD)

    return forward


def available() -> dict[str, Callable[[MoELayer], Forward]]:
    """The implementations that can be measured here, ours first."""
    found = {"moepp": ours, "floor": gemm_floor, "zero_computation": zero_computation_pass, "loop": reference_loop}
    if find_spec("transformers"):
        found |= {f"transformers_{kind}": transformers_experts(kind) for kind in ("eager", "grouped_mm")}
    return found
