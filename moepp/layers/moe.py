"""The MoE++ layer: router -> gates -> capacity -> affine (zero-computation) experts + FFN experts.

Vanilla MoE is this layer with no zero-computation experts and no gating residual.
Shape suffixes: B batch, S sequence, T = B*S tokens, K slots of a token (top-k), D model width, N all experts (FFN,
constant, copy, zero, registered types), W devices that share a batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import registry
from .balance import (
    accepted_counts,
    accepted_in_runs,
    accepted_slots,
    capacity_of_each,
    expert_capacities,
    likeliest_slots,
    load_balance_loss,
    router_losses,
    selection_counts,
    token_mean,
)
from .control import build_control
from .dense import DenseFFN
from .dispatch import Meanwhile, SlotCounts
from .experts import (
    AffineExperts,
    FFNExperts,
    Terms,
    add_rows,
    fused_affine,
    fusible,
    module_name,
    one_affine,
)
from .initial import built, draw
from .kernels.base import Affine, RoutedTokens
from .regions import region
from .registry import PartError, Registry
from .router import Routing, route
from .settings import ExpertCounts, MoEConfig


@dataclass
class MoEStats:
    """What one layer reports of this device's tokens. Only `balance_loss`, `router_loss`, `logits_TN` and `carried`
    carry gradients.
    """

    logits_TN: Tensor  # raw, gating residual included
    balance_loss: Tensor  # Eq. 7, before beta; with the f of all devices, so that its mean over them is the batch's
    chosen_N: Tensor  # tokens that chose each expert, before any were dropped
    dropped: Tensor  # slots over capacity
    dropped_ffn: Tensor  # those of them that had chosen FFN experts
    recomputed: Tensor | None  # FFN slots beyond the rows that `ffn_rows` keeps; None where it limits nothing
    entropy: Tensor  # of the router's distribution, mean over tokens, in nats
    router_loss: Tensor | None  # z-loss and entropy loss, weighted; None where neither has a weight
    carried: Tensor  # what the next layer's router receives: the logits, or a recurrent router's state


# A pytree, so that layers can be exported (torch.export), and function transforms see its tensors.
torch.export.register_dataclass(MoEStats, serialized_type_name="moepp.MoEStats")


class MoELayer(nn.Module):
    """Routes every token to `top_k` of N experts (or as `selection` says).

    `first` marks the network's first MoE layer, or one that stands alone, which has no gating residual; any other gets
    the `carried` of the layer before. `gru` is the recurrent routers' common one, where there is more than this layer.
    `layout` has the most experts of each type that any of the network's layers has: counts are reported, and taken, in
    its order. Whoever trains on several micro-batches to a step puts the step's counts of each expert and its tokens
    into `step_counts`, for the balance loss.
    """

    def __init__(
        self,
        config: MoEConfig,
        first: bool = True,
        gru: nn.GRUCell | None = None,
        layout: ExpertCounts | None = None,
    ):
        super().__init__()
        self.config, self.layout = config, layout or config.experts
        experts = config.experts
        self.foreign: dict[str, Callable[[], nn.Module]] = {}  # how parts that are not the package's own are built
        self.router = self._part("router", registry.router, config.router, first, **config.router_options)
        if gru is not None:
            self.router.share(gru)
        self.ffn = FFNExperts(experts.ffn, config.dim, config.hidden, config.backend)
        self.ids = {kind: experts.ids(kind) for kind, count in experts.by_kind().items() if count and kind != "ffn"}
        for kind, ids in self.ids.items():
            options = config.expert_options.get(kind, {})
            name = module_name(kind)
            self.add_module(name, self._part(name, registry.expert, kind, len(ids), **options))
        self.shared = DenseFFN(config.dim, experts.shared * config.hidden) if experts.shared else None
        self.control = build_control(config.balance, experts)
        self.step_counts: tuple[Tensor, int] | None = None

    def _part(self, name: str, parts: Registry, kind: str, *given: Any, **options: Any) -> nn.Module:
        build = partial(parts[kind], self.config, *given, **options)
        if kind in parts.defined:
            return build()
        self.foreign[name] = build
        return built(lambda: self._usable(parts, kind, build()))

    def _usable(self, parts: Registry, kind: str, module: Any) -> nn.Module:
        """A part of somebody else. Raises PartError where it is none that a layer can call."""
        if not isinstance(module, nn.Module):
            raise parts.unusable(kind, module, "an nn.Module")
        base, method = (AffineExperts, "terms") if isinstance(module, AffineExperts) else (nn.Module, "forward")
        if getattr(getattr(module, method), "__func__", None) is getattr(base, method):
            raise PartError(f"{parts.described(kind)} has no {method}()")
        vectors_CD = module.vectors_CD() if isinstance(module, AffineExperts) else None
        needed = [self.config.experts.by_kind()[kind], self.config.dim] if vectors_CD is not None else None
        if needed and list(vectors_CD.shape) != needed:
            raise parts.unusable(kind, vectors_CD, f"{needed}", "gave vectors")
        return module

    def with_parts_of_others(self, y_TD: Tensor) -> Tensor:
        """`y_TD`, with every parameter of theirs in its graph: one that no token has reached gets a gradient of 0, as
        FFN experts do, for devices on which some have reached it wait for this one's.
        """
        for name in self.foreign:
            for parameter in getattr(self, name).parameters():
                y_TD = y_TD + parameter.flatten()[:0].sum().to(y_TD.dtype)
        return y_TD

    def reset_parameters(self) -> None:
        draw(self)
        if self.control is not None:
            self.control.reset_parameters()

    def of_kind(self, kind: str) -> nn.Module:
        """The experts of a type that the layer has, all but the FFN experts'."""
        return getattr(self, module_name(kind))

    @property
    def affine(self) -> dict[str, AffineExperts]:
        """The types whose experts are affine maps of the input."""
        parts = {kind: self.of_kind(kind) for kind in self.ids}
        return {kind: experts for kind, experts in parts.items() if isinstance(experts, AffineExperts)}

    def forward(self, x_BSD: Tensor, previous: Tensor | None = None) -> tuple[Tensor, MoEStats]:
        """`previous` is the previous MoE layer's `MoEStats.carried`. Raises ValueError for an input of another form."""
        self._refuse_input(x_BSD)
        x_TD = x_BSD.flatten(0, -2)
        logits_TN, carried = self.routed(x_TD, previous)
        routing = self.route(logits_TN)
        counts = self.count(routing)
        terms = self.terms(self.expert_input(x_TD), routing)  # before the wait for counts of other devices
        kept, accepted = routing, counts
        sequences = math.prod(x_BSD.shape[:-2]) or 1  # an empty batch is one sequence without tokens
        if self.training and self.config.capacity_factor is not None:
            kept, accepted = self.drop_over_capacity(routing, counts, sequences)
        y_TD = self.with_parts_of_others(self.expert_forward(x_TD, kept, accepted, terms))
        # After the experts: where counts come from other devices, nothing before this needs to wait for them.
        return y_TD.view_as(x_BSD), self.statistics(logits_TN, carried, routing, counts, accepted, sequences)

    def _refuse_input(self, x_BSD: Tensor) -> None:
        dim = self.config.dim
        if x_BSD.ndim < 2 or x_BSD.shape[-1] != dim or not x_BSD.is_floating_point():
            raise ValueError(
                f"an MoE layer of dim={dim} takes floating-point numbers [..., tokens, {dim}], not"
                f" {list(x_BSD.shape)} of {x_BSD.dtype}"
            )

    def routed(self, x_TD: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """The router's logits [T, N], in at least float32 whatever autocast made of them, and what it hands on. Raises
        PartError where it, somebody's own, gives others.
        """
        # No len(): it makes a number of the tokens, which torch.export may have left open.
        given, needed = self.router(x_TD, previous), [x_TD.shape[0], self.config.experts.total]
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
            raise PartError(
                f"{registry.router.described(self.config.router)} returned {type(given).__name__}; a pair is needed, "
                f"logits {needed} and what the next layer's router receives"
            )
        if list(given[0].shape) != needed:
            raise PartError(
                f"{registry.router.described(self.config.router)} returned logits {list(given[0].shape)}; "
                f"{needed} is needed, tokens and experts"
            )
        logits_TN, carried = given
        return logits_TN.to(torch.promote_types(logits_TN.dtype, torch.float32)), carried

    def route(self, logits_TN: Tensor) -> Routing:
        return route(logits_TN, self.config, getattr(self.control, "bias_N", None))

    def count(self, routing: Routing) -> SlotCounts:
        """How many slots chose each expert: of the whole batch, where anything is limited or balanced by that."""
        count_KN = selection_counts(routing.expert_TK, self.config.experts.total)
        if self.needs_others:
            return self.ffn.dispatcher.share(count_KN)
        return SlotCounts(count_KN[None], of_others=False)

    @property
    def needs_others(self) -> bool:
        """Whether capacity or balance count the slots of other devices."""
        config, over = self.config, self.config.balance.over
        limited = self.training and config.capacity_factor is not None and config.capacity_over == "global_batch"
        counted = over == "step" and self.training and self.step_counts is not None
        return limited or (over in ("global_batch", "step") and not counted)

    def drop_over_capacity(
        self, routing: Routing, counts: SlotCounts, sequences: int = 1
    ) -> tuple[Routing, SlotCounts]:
        """Slots over capacity (Eq. 8) get gate 0 and id N, which no expert has; the token keeps its residual path. Also
        the counts of those that are kept.
        """
        config, experts, slots = self.config, self.config.experts, routing.expert_TK.numel()
        whole = config.capacity_over == "global_batch"
        runs = sequences if config.capacity_over == "sequence" else 1
        slots = slots * len(counts.count_WKN) if whole else slots // runs
        limits = expert_capacities(experts, config.balance, slots, config.capacity_factor)
        limit_N = capacity_of_each(experts, limits, routing.expert_TK.device)
        keep = self.keep_of_whole_batch if whole else partial(self.keep_of_own, runs=runs)
        kept_TK, accepted = keep(routing, counts, limit_N)
        expert_TK = routing.expert_TK.masked_fill(~kept_TK, experts.total)
        gate_TK, most = routing.gate_TK * kept_TK, runs * experts.ffn * limits["ffn"]
        return replace(routing, expert_TK=expert_TK, gate_TK=gate_TK, most_ffn_slots=most), accepted

    def keep_of_whole_batch(self, routing: Routing, counts: SlotCounts, limit_N: Tensor) -> tuple[Tensor, SlotCounts]:
        """The slots that stay where a limit is of all devices' tokens, [T, K], and the counts of all that do."""
        if self.config.drop_order == "probability":
            kept_TK, accepted_WKN = self.keep_likeliest(routing, limit_N, counts.device)
        else:
            accepted_WKN = accepted_counts(counts.wait(), limit_N)
            kept_TK = accepted_slots(routing.expert_TK, accepted_WKN[counts.device])
        return kept_TK, SlotCounts(accepted_WKN, counts.device)

    def keep_of_own(
        self, routing: Routing, counts: SlotCounts, limit_N: Tensor, runs: int
    ) -> tuple[Tensor, SlotCounts]:
        """The same where it is of each of this device's `runs` of tokens."""
        likeliest = self.config.drop_order == "probability"
        score_TK = score_of_slots(routing) if likeliest else None
        kept_TK = accepted_in_runs(routing.expert_TK, limit_N, runs, score_TK)
        kept_ids_TK = routing.expert_TK.masked_fill(~kept_TK, len(limit_N))
        return kept_TK, SlotCounts(selection_counts(kept_ids_TK, len(limit_N))[None], of_others=False)

    def keep_likeliest(self, routing: Routing, limit_N: Tensor, device: int) -> tuple[Tensor, Tensor]:
        """The slots whose scores are the highest of the whole batch's: those of this device that stay [T, K], and the
        counts of all that do, [W, K, N].
        """
        score_TK = score_of_slots(routing)
        expert_WTK, score_WTK = (self.ffn.dispatcher.gather(of) for of in (routing.expert_TK, score_TK))
        kept_WTK = likeliest_slots(expert_WTK, score_WTK, limit_N)
        kept_ids_WTK = expert_WTK.masked_fill(~kept_WTK, len(limit_N))
        return kept_WTK[device], torch.stack([selection_counts(ids_TK, len(limit_N)) for ids_TK in kept_ids_WTK])

    def expert_input(self, x_TD: Tensor) -> Tensor:
        return x_TD * self.config.top_k if self.config.multiply_by_top_k else x_TD

    def terms(self, x_TD: Tensor, routing: Routing) -> list[Terms] | None:
        """`AffineExperts.terms` of every affine type, in the gates' dtype; the same whichever slots are kept. None
        where a kernel makes them of the slots that it needs.
        """
        types = self.affine
        if fusible(types, routing.gate_TK):
            return None
        with region("zero_computation"), torch.autocast(x_TD.device.type, enabled=False):
            return [experts.terms(x_TD, routing.gate_TK.dtype) for experts in types.values()]

    def expert_forward(
        self, x_TD: Tensor, routing: Routing, counts: SlotCounts | None = None, terms: list[Terms] | None = None
    ) -> Tensor:
        """The gated sum of the chosen experts, and the shared ones, [T, D] in x_TD's dtype: all of the layer but the
        router. `counts` and `terms` are the routing's, where they are known.
        """
        x_TD = self.expert_input(x_TD)
        others = self.affine_map(x_TD, routing, terms)
        tokens = RoutedTokens(
            x_TD, routing.expert_TK, routing.gate_TK, others, routing.most_ffn_slots, self.kept_rows(x_TD.shape[0]),
            dtype=x_TD.dtype,
        )  # fmt: skip
        shared = None if self.shared is None else Meanwhile(partial(self.shared_forward, x_TD))
        y_TD = self.ffn(tokens, counts, shared).to(x_TD.dtype)
        for kind in self.ids.keys() - self.affine.keys():
            y_TD = add_rows(y_TD, x_TD, routing, self.ids[kind], kind, self.of_kind(kind))
        return y_TD if shared is None else y_TD + shared()

    def shared_forward(self, x_TD: Tensor) -> Tensor:
        with region("shared_experts"):
            return self.shared(x_TD)

    def kept_rows(self, tokens: int) -> int | None:
        """FFN rows whose intermediates a training step keeps; None for all there can be."""
        per_token = self.config.ffn_rows
        return math.ceil(per_token * tokens) if self.training and per_token is not None else None

    def affine_map(self, x_TD: Tensor, routing: Routing, terms: list[Terms] | None = None) -> Affine | None:
        """What the affine experts add for these tokens, not yet evaluated; None where there are none."""
        if not (types := self.affine):
            return None
        if terms is None:
            terms = self.terms(x_TD, routing)
        with torch.autocast(x_TD.device.type, enabled=False):
            if terms is None:
                return fused_affine(types, self.ids, routing, x_TD)
            return one_affine(types, self.ids, routing, terms)

    def balanced_counts(self, counts: SlotCounts, tokens: int) -> tuple[Tensor, int]:
        """Tokens that chose each expert in the batch that is balanced (`balance.over`), [N], and its tokens."""
        count_WKN, over = counts.wait(), self.config.balance.over
        if over == "micro_batch":
            return count_WKN[counts.device].sum(0), tokens
        if over == "step" and self.training and self.step_counts is not None:
            count_N, tokens = self.step_counts
            return self.own_counts(count_N), tokens
        return count_WKN.sum((0, 1)), tokens * len(count_WKN)

    def balance_loss(self, routing: Routing, counts: SlotCounts, sequences: int) -> Tensor:
        """Eq. 7 before beta, over the batch that is balanced; over `sequence` the mean of each one's own."""
        config, balance, probs_TN = self.config, self.config.balance, routing.probs_TN
        if balance.over != "sequence":
            balanced = self.balanced_counts(counts, probs_TN.shape[0])
            return load_balance_loss(probs_TN, *balanced, config.experts, balance)
        losses = []
        for probs_SN, ids_SK in zip(probs_TN.chunk(sequences), routing.expert_TK.chunk(sequences), strict=True):
            count_N = selection_counts(ids_SK, config.experts.total).sum(0)
            losses.append(load_balance_loss(probs_SN, count_N, ids_SK.shape[0], config.experts, balance))
        return torch.stack(losses).mean()

    def reported_counts(self, count_N: Tensor) -> Tensor:
        """Counts of this layer's experts in the places that they have in the layout."""
        if self.layout == self.config.experts:
            return count_N
        most, own = self.layout.by_kind(), self.config.experts.by_kind()
        parts = zip(count_N.split(list(own.values())), most.values(), strict=True)
        return torch.cat([F.pad(part, (0, places - len(part))) for part, places in parts])

    def own_counts(self, count_N: Tensor) -> Tensor:
        """`reported_counts` undone."""
        if self.layout == self.config.experts:
            return count_N
        most, own = self.layout.by_kind(), self.config.experts.by_kind()
        parts = zip(count_N.split(list(most.values())), own.values(), strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def statistics(
        self,
        logits_TN: Tensor,
        carried: Tensor,
        routing: Routing,
        counts: SlotCounts,
        accepted: SlotCounts,
        sequences: int,
    ) -> MoEStats:
        """`routing` and `counts` are those before any slots were dropped."""
        config, balance, probs_TN = self.config, self.config.balance, routing.probs_TN
        loss = self.balance_loss(routing, counts, sequences)
        if (multiplier := getattr(self.control, "multiplier", None)) is not None:
            loss = loss * multiplier
        weighted = balance.z_loss or balance.entropy_loss
        router_loss = router_losses(logits_TN, probs_TN, balance) if weighted else None
        if routing.unnormalized:
            probs_TN = F.normalize(probs_TN, p=1, dim=-1)
        entropy = token_mean(torch.special.entr(probs_TN.detach()).sum(-1))
        chosen_N, accepted_N = (c.wait()[c.device].sum(0) for c in (counts, accepted))
        dropped_N, kept_rows = chosen_N - accepted_N, self.kept_rows(probs_TN.shape[0])
        recomputed = None if kept_rows is None else (accepted_N[: config.experts.ffn].sum() - kept_rows).clamp(min=0)
        return MoEStats(
            logits_TN,
            loss,
            self.reported_counts(chosen_N),
            dropped=dropped_N.sum(),
            dropped_ffn=dropped_N[: config.experts.ffn].sum(),
            recomputed=recomputed,
            entropy=entropy,
            router_loss=router_loss,
            carried=carried,
        )


def score_of_slots(routing: Routing) -> Tensor:
    """The router's score for each slot's expert, [T, K], without gradients; anything in slots that are not used."""
    last = routing.probs_TN.shape[1] - 1
    return routing.probs_TN.detach().gather(1, routing.expert_TK.clamp(max=last))
