"""Zero-computation experts and gating residuals inside other people's MoE blocks, by two class swaps per block.

This file and modeling_form.py stand alone beside torch and transformers: an exported folder carries both, as its one
file of code. A block's router and its experts become instances of generated subclasses of their own classes, so that
whatever selects modules by class still finds them, and the weights that were there stay where they were.
Shape suffixes: T tokens, K slots of a token, D model width, E the family's own experts, Z new ones (constant, copy,
zero), N = E + Z, R rows of slots.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moepp.retrofit.modeling_form import SILENT, Form

ROUTER_NAMES = ("gate", "router")
NEW_OF_ROUTER = ("new_rows", "offset", "calibrated", "residual")
NEW_OF_EXPERTS = ("w_mix", "vectors", "copy_scale")
ROWS = 0.01  # standard deviation of new rows, as a share of the old ones': enough to tell two equal experts apart
SKIPPING = ("grouped_mm", "deepgemm", "sonicmoe")  # experts implementations that never multiply the rows of id E
EXPERT_COUNTS = ("n_routed_experts", "num_experts")
SLOT_COUNTS = ("top_k", "top_k_experts")


class Carry:
    """The logits that one MoE layer hands to the next (Eq. 6), and whether a recomputation may trust them."""

    def __init__(self) -> None:
        self.previous: Tensor | None = None
        self.restored = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Carry":
        """A model's copy has one of its own; a router's stays in its model, where adapters put it (modules_to_save)."""
        whole = any(isinstance(made, PlusPlusModel) for made in memo.values())
        return memo.setdefault(id(self), Carry() if whole else self)

    def __reduce__(self) -> tuple[type["Carry"], tuple[()]]:
        return Carry, ()

    def before(self, first: bool) -> Tensor | None:
        """What the router before this one said; raises where a recomputation would find another forward's."""
        if first:
            return None
        recomputing = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if recomputing and not self.restored:
            raise RuntimeError(
                "activation checkpointing of a model with gating residuals: switch it on by"
                " model.activation_checkpointing_enable() after the retrofit, which recomputes them exactly"
            )
        return self.previous

    @contextmanager
    def at(self, previous: Tensor | None) -> Iterator[None]:
        """Whatever runs in here finds `previous`, however many forwards came in between."""
        kept, was_restored = self.previous, self.restored
        self.previous, self.restored = previous, True
        try:
            yield
        finally:
            self.restored = was_restored
            if torch._C._current_graph_task_id() != -1:
                self.previous = kept


class Generated:
    """Of a class that no module holds: pickled as what it is made of."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return remake, (*type(self).__bases__, type(self).__name__), self.__getstate__()


def remake(mixin: type, cls: type, name: str) -> Any:
    """An instance without its state."""
    made = mixed(mixin, cls, name)
    return made.__new__(made)


class PlusPlusRouter(Generated):
    """Mixed into a family's router: its own logits, those of the new experts, the gating residual."""

    def plus_plus(self, form: Form, counts: dict[str, int], width: int, residual: bool, carry: Carry) -> None:
        """Adds `new_rows` [Z, D], the offsets [Z] and `residual` [N, N], which only a later layer has."""
        own = next(self.parameters())
        new, total = sum(counts.values()), sum(counts.values()) + own_experts(self)
        self.form, self.carry, self.first, self.last = form, carry, not residual, False
        self.new_rows = nn.Parameter(own.new_empty(new, width))
        self.register_buffer("offset", own.new_full((new,), SILENT, dtype=torch.float32))
        self.register_buffer("calibrated", own.new_zeros(new, dtype=torch.float32))
        self.residual = nn.Parameter(own.new_zeros(total, total)) if residual else None
        self.logits = nn.Identity()  # through which they pass, for whoever hooks it
        if form.matrix is not None:
            matrix = self.get_submodule(form.matrix)
            become(matrix, mixed(PlusPlusMatrix, type(matrix), f"PlusPlus{type(matrix).__name__}"))

    def begin(self) -> None:
        """Silent, and rows that tell two equal experts apart, but for what a checkpoint gave."""
        from transformers import initialization

        own = next(p for name, p in self.named_parameters() if p.dim() == 2 and name not in NEW_OF_ROUTER)
        if own.is_meta:
            return
        initialization.normal_(self.new_rows, std=ROWS * own.float().std().item())
        initialization.constant_(self.offset, SILENT)
        for begins_at_0 in (self.calibrated, self.residual):
            if begins_at_0 is not None:
                initialization.zeros_(begins_at_0)

    def _apply(self, *args: Any, **kwargs: Any) -> "PlusPlusRouter":
        """Offsets stay in float32 whatever the weights are cast to: rounded ones would turn tokens' choices."""
        kept = self.offset, self.calibrated
        super()._apply(*args, **kwargs)
        if self.offset.dtype != torch.float32:
            self.offset, self.calibrated = (buffer.to(self.offset.device) for buffer in kept)
        return self

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What the family's says first, [T, N], where logits have the offsets that softmaxes see; gates, ids [T, K]."""
        x, logits_TE = self.own_logits(hidden_states, *args, **kwargs)
        logits_TN = self.all_logits(logits_TE, x)
        own, self.own_dtype = logits_TE.shape[1], logits_TE.dtype
        scale_E = self.tensor(self.form.expert_scale) if self.form.expert_scale else None
        routed = logits_TN, self.offset, self.bias_of(args, kwargs), slots(self), self.own_dtype, scale_E
        gates_TK, expert_TK = self.form.route(*routed)
        if self.form.out != "scores":
            gates_TK = gates_TK.to(self.own_dtype if self.form.out == "logits" else hidden_states.dtype)
        if self.form.offset_in_logits:
            logits_TN = logits_TN + F.pad(self.offset, (own, 0))
        return self.form.answer(self.logits(logits_TN), own, self.own_dtype), gates_TK, expert_TK

    def own_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the family's matrix sees, and makes of it [T, E]."""
        said = super().forward(hidden_states, *args, **kwargs)[0]
        if self.form.matrix is None:
            return hidden_states, said
        matrix = next(module for module in self.modules() if isinstance(module, PlusPlusMatrix))
        x, matrix.seen = matrix.seen, None
        logits_TE = self.get_submodule(self.form.matrix)(x)  # asked again, as adapters may lie around it
        matrix.seen = None
        return x, logits_TE.flatten(0, -2)

    def all_logits(self, logits_TE: Tensor, x: Tensor) -> Tensor:
        """Before any offset, in float32; the next router's `previous`."""
        with torch.autocast(x.device.type, enabled=False):
            logits_TZ = F.linear(x.reshape(-1, x.shape[-1]).float(), self.new_rows.float())
            logits_TN = torch.cat([logits_TE.float(), logits_TZ], 1)
            if self.residual is not None and (previous_TN := self.carry.before(self.first)) is not None:
                logits_TN = logits_TN + F.linear(previous_TN.to(logits_TN), self.residual.float())
        self.carry.previous = None if self.last else logits_TN
        return logits_TN

    def bias_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The family's own bias on the choice, [E]."""
        name = self.form.bias
        if name is None:
            return None
        if name == "argument":
            return next(iter((*args, *kwargs.values())), None)
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One of the family's own, [E]."""
        *path, leaf = name.split(".")
        return getattr(self.get_submodule(".".join(path)), leaf).reshape(-1)


class PlusPlusMatrix(Generated):
    """Mixed into the module that turns what a router makes of its input into logits: keeps what it last saw."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


class PlusPlusExperts(Generated):
    """Mixed into a family's experts: its own for their slots, and one affine map a x + b V for all the others."""

    no_weight_decay = ("vectors", "copy_scale")

    def plus_plus(self, own: int, counts: dict[str, int], scaled_copy: bool) -> None:
        down, width = self.down_proj, experts_width(self)
        constant, copy = counts["constant"], counts["copy"]
        self.own, self.counts = own, counts
        self.w_mix = nn.Parameter(down.new_empty(2 * constant, width)) if constant else None
        self.vectors = nn.Parameter(down.new_empty(constant, width)) if constant else None
        self.copy_scale = nn.Parameter(down.new_ones(copy)) if copy and scaled_copy else None

    def begin(self) -> None:
        """Random constants, but for what a checkpoint gave."""
        from transformers import initialization

        if self.w_mix is not None:
            initialization.normal_(self.w_mix, std=0.02)
            initialization.normal_(self.vectors, std=0.02)
        if self.copy_scale is not None:
            initialization.ones_(self.copy_scale)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`(x [T, D], ids [T, K], gates [T, K])`, by position or by the family's own names."""
        expert_TK, gate_TK, *_ = *args, *kwargs.values()
        y_TD = self.own_forward(hidden_states, expert_TK, gate_TK)
        return y_TD + self.affine(hidden_states, expert_TK, gate_TK).to(y_TD.dtype)

    def own_forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """Slots of new experts are never multiplied: skipped by implementations that can, left out for the others."""
        new_TK = expert_TK >= self.own
        if self.takes_no_one():
            return super().forward(x_TD, expert_TK.clamp(max=self.own), gate_TK.masked_fill(new_TK, 0))
        if not new_TK.any():
            return super().forward(x_TD, expert_TK, gate_TK)
        token_R, slot_R = (~new_TK).nonzero(as_tuple=True)
        if not len(token_R):
            return torch.zeros_like(x_TD)
        y_RD = super().forward(x_TD[token_R], expert_TK[token_R, slot_R, None], gate_TK[token_R, slot_R, None])
        return torch.zeros_like(x_TD, dtype=y_RD.dtype).index_add(0, token_R, y_RD)

    def takes_no_one(self) -> bool:
        """Whether the family's own forward is handed slots of id E, with a gate of 0."""
        if hasattr(self, "total_experts"):  # LongCat's, where such an id is one more identity expert
            return True
        implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
        skips = implementation in SKIPPING or torch.compiler.is_compiling()
        return skips and hasattr(self, "_is_expert_parallel")

    def affine(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """Constant experts (Eq. 5), copies (Eq. 4) and zeros (Eq. 3) by their gates, in float32."""
        constant, copy = self.counts["constant"], self.counts["copy"]
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, gate_TK = x_TD.float(), gate_TK.float()
            ids = torch.arange(self.own, self.own + constant + copy, device=expert_TK.device)
            gate_TZ = torch.where(expert_TK[..., None] == ids, gate_TK[..., None], 0).sum(1)
            constant_TC, copy_TC = gate_TZ.split([constant, copy], 1)
            if self.copy_scale is not None:
                copy_TC = copy_TC * self.copy_scale.float()
            scale_T = copy_TC.sum(1)
            if self.w_mix is None:
                return scale_T[:, None] * x_TD
            mix_TC2 = F.linear(x_TD, self.w_mix.float()).unflatten(1, (constant, 2)).softmax(-1)
            scale_T = scale_T + (constant_TC * mix_TC2[..., 0]).sum(1)
            return torch.addmm(scale_T[:, None] * x_TD, constant_TC * mix_TC2[..., 1], self.vectors.float())


class PlusPlusModel(Generated):
    """Mixed into a family's model: installs what `config.moepp` says, and refuses what would go around it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, config.moepp)
        begin_silent(self)

    def initialize_weights(self) -> None:
        """Of what a checkpoint lacks."""
        super().initialize_weights()
        begin_silent(self)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **options: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True cuts the gating residual off its gradient: pass use_reentrant=False")
        carries = list({id(router.carry): router.carry for router in routers(self)}.values())
        exact = partial(checkpoint_with, carries, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, exact, **options)

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        if use_kernels:
            raise ValueError("use_kernels=True replaces MoE blocks whole, their new experts included: set it to False")
        super().set_use_kernels(use_kernels, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """As the family is, whose checkpoints transformers renames and stacks as it reads them."""
        return family(cls).is_custom_code()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """As the family can: transformers reads this and the next off the file that a class is of."""
        return family(cls)._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return family(cls)._can_set_experts_implementation()

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        given = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config or object)
        if (given.get("ep_size") or 1) > 1 or given.get("enable_expert_parallel"):
            raise ValueError("transformers' expert parallelism renumbers experts before the new ones: set ep_size=1")
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)


def checkpoint_with(carries: Sequence[Carry], function: Callable, layer: Callable, *args: Any) -> Any:
    """Activation checkpointing that gives a recomputed layer the logits that it had in its own forward."""
    found = [carry.previous for carry in carries]

    def run(*inputs: Any) -> Any:
        with ExitStack() as stack:
            for carry, previous in zip(carries, found, strict=True):
                stack.enter_context(carry.at(previous))
            return layer(*inputs)

    return function(run, *args)


def become(module: nn.Module, cls: type) -> None:
    """Of another class, what accelerate calls of a module that a `device_map` placed included."""
    module.__class__ = cls
    if "_old_forward" in vars(module):
        module._old_forward = cls.forward.__get__(module)


@cache
def mixed(mixin: type, cls: type, name: str) -> type:
    return type(name, (mixin, cls), {"__module__": cls.__module__})


def plus_plus_name(cls: type) -> str:
    name = cls.__name__
    return name.replace("For", "PlusPlusFor") if "For" in name else f"{name}PlusPlus"


def plus_plus(cls: type) -> type:
    """The class whose models are made with the experts and residuals that `config.moepp` names."""
    name = plus_plus_name(cls)
    introduce(name, cls.__name__)
    return mixed(PlusPlusModel, cls, name)


def introduce(name: str, known: str) -> None:
    """To transformers, which goes by names: its checkpoints are laid out as those of `known`, and what is said of its
    labels (the Trainer shifts a causal model's where it smoothes them) and of its use (pipelines) is said of it too.
    """
    from transformers import conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (layout := conversion_mapping.get_checkpoint_conversion_mapping(known)) is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, layout, overwrite=True)
    if known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = name


def family(cls: type) -> type:
    """The class that a `plus_plus` one was made of."""
    return cls.__mro__[cls.__mro__.index(Generated) + 1]


def blocks(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Router and experts of every MoE block, by the block's path."""
    found = {}
    for path, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[name] for name in ROUTER_NAMES if name in children), None)
        if router is not None and isinstance(getattr(children.get("experts"), "down_proj", None), nn.Parameter):
            found[path] = router, children["experts"]
    return found


def own_experts(router: nn.Module) -> int | None:
    """Columns of the family's own logits, E; None of a router that does not say."""
    return first_of(router, EXPERT_COUNTS)


def slots(router: nn.Module) -> int | None:
    """K; None of a router that does not say."""
    return first_of(router, SLOT_COUNTS)


def first_of(router: nn.Module, names: Sequence[str]) -> int | None:
    """Of these numbers the first that a router has, or its config."""
    holders = router, getattr(router, "config", None)
    return next((n for holder in holders for name in names if (n := getattr(holder, name, None))), None)


def experts_width(experts: nn.Module) -> int:
    """D, which is the model's width unless experts work in a space of their own."""
    down = experts.down_proj
    return down.shape[2 if getattr(experts, "is_transposed", False) else 1]


def experts_hidden(experts: nn.Module) -> int:
    """F, the inner width of each expert."""
    down = experts.down_proj
    return down.shape[1 if getattr(experts, "is_transposed", False) else 2]


def routers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PlusPlusRouter)]


def stacks(found: dict[str, tuple[nn.Module, nn.Module]]) -> list[list[tuple[nn.Module, nn.Module]]]:
    """Blocks whose paths differ in numbers alone, in their order: experts of images, which see other tokens than those
    of the text, are a stack of their own.
    """
    by_name: dict[str, list[tuple[nn.Module, nn.Module]]] = {}
    for path, block in found.items():
        by_name.setdefault(re.sub(r"\d+", "", path), []).append(block)
    return list(by_name.values())


def install(model: nn.Module, settings: dict[str, Any]) -> None:
    """The class swaps and new members, without initial values."""
    form = Form(**settings["form"] | {"groups": settings["form"]["groups"] and tuple(settings["form"]["groups"])})
    counts = {kind: settings[kind] for kind in ("constant", "copy", "zero")}
    whole = model.base_model_prefix  # a family's other models hold its base model there, or are it
    named = {*settings["layers"], *(path.removeprefix(f"{whole}.") for path in settings["layers"])}
    chosen = {path: block for path, block in blocks(model).items() if path.removeprefix(f"{whole}.") in named}
    for stack in stacks(chosen):
        carry = Carry()
        previous = None
        for router, experts in stack:
            own = own_experts(router)
            become(router, mixed(PlusPlusRouter, type(router), f"PlusPlus{type(router).__name__}"))
            become(experts, mixed(PlusPlusExperts, type(experts), f"PlusPlus{type(experts).__name__}"))
            residual = settings["gating_residual"] and previous is not None
            router.plus_plus(form, counts, settings["width"], residual, carry)
            experts.plus_plus(own, counts, settings["scaled_copy"])
            accept_no_one(experts, True)
            previous = router
        previous.last = True
    count_experts(model, sum(counts.values()))


@torch.no_grad()
def begin_silent(model: nn.Module) -> None:
    """Initial values of all new members."""
    for module in model.modules():
        if isinstance(module, (PlusPlusRouter, PlusPlusExperts)):
            module.begin()


def accept_no_one(experts: nn.Module, accept: bool) -> None:
    """Whether the family's own forward knows slots of id E."""
    if hasattr(experts, "_is_expert_parallel"):
        experts._is_expert_parallel = accept
    elif hasattr(experts, "total_experts"):
        experts.total_experts += 1 if accept else -1


def count_experts(model: nn.Module, change: int) -> None:
    """A family's own balance loss reads the number of columns of its routers from the model."""
    for module in model.modules():
        if hasattr(type(module), "loss_function") and isinstance(getattr(module, "num_experts", None), int):
            module.num_experts += change
