"""`retrofit` and `strip`: a model of another family with zero-computation experts, and back."""

from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moepp.errors import UsageError
from moepp.retrofit.calibration import require, warm
from moepp.retrofit.modeling import (
    EXPERT_COUNTS,
    NEW_OF_EXPERTS,
    NEW_OF_ROUTER,
    PlusPlusMatrix,
    PlusPlusModel,
    PlusPlusRouter,
    accept_no_one,
    become,
    blocks,
    count_experts,
    family,
    install,
    own_experts,
    plus_plus,
    stacks,
)
from moepp.retrofit.modeling_form import SILENT, Form
from moepp.retrofit.recognise import recognise, unknown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def retrofit(
    model: nn.Module,
    zero: int = 1,
    copy: int = 1,
    constant: int = 2,
    gating_residual: bool = True,
    init: Literal["silent", "warm", "zeda"] = "silent",
    layers: Collection[int] | None = None,
    verify: bool = True,
    scaled_copy: bool = False,
) -> nn.Module:
    """Adds the experts and the gating residual to every MoE block, or to the `layers`-th ones, in place.

    `silent` computes what the model computed, bit for bit, until `calibrate` or `wake`; `warm` calibrates a quarter of
    the slots on random ids, fewer where fewer can be had; `zeda` draws rows with the old rows' mean and deviation
    (arXiv 2605.18643). `verify` compares each router with its form at its own weights too. `scaled_copy` gives copies a
    learnt factor. Raises UsageError, with the model as it was.
    """
    counts = {"constant": constant, "copy": copy, "zero": zero}
    if init not in ("silent", "warm", "zeda"):
        raise UsageError(f"init={init!r}: must be silent, warm or zeda")
    if bad := [f"{kind}={count!r}" for kind, count in counts.items() if type(count) is not int or count < 0]:
        raise UsageError(f"{bad[0]}: must be a whole number, 0 or more")
    chosen = choose_blocks(model, layers)
    joins = gating_residual and any(len(stack) > 1 for stack in stacks(chosen))
    if not any(counts.values()) and not joins:
        raise UsageError("nothing to add: set zero, copy or constant above 0, or gating_residual=True for two blocks")
    form, width = common_form(chosen)
    settings = {**counts, "gating_residual": gating_residual, "scaled_copy": scaled_copy, "layers": list(chosen)}
    model.config.moepp = {**settings, "form": asdict(form), "width": width}
    model.__class__ = plus_plus(type(model))
    expected = before(chosen) if verify else {}
    install(model, model.config.moepp)
    for router, experts in chosen.values():
        begin_new(router, experts, init)
    refuse_if_loud(model, chosen, expected)
    if init == "warm":
        warm(model, sum(counts.values()))
    return model


def choose_blocks(model: nn.Module, layers: Collection[int] | None) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The MoE blocks that get new experts; raises UsageError where they cannot have any."""
    name = type(model).__name__
    refuse_others(model)
    if isinstance(model, PlusPlusModel):
        raise UsageError(f"{name} has its new experts already: strip(model) first")
    if getattr(model, "is_quantized", False):
        raise UsageError(f"{name} is quantized, and new experts are not: load it in float32, bfloat16 or float16")
    if getattr(model, "use_kernels", False):
        raise UsageError(f"{name} was loaded with use_kernels=True, which replaces MoE blocks whole: load it without")
    found = blocks(model)
    if not found:
        raise UsageError(f"{name} has no MoE block of a router and stacked experts: {instead_of_blocks(model)}")
    if parallel := [path for path, (_, experts) in found.items() if getattr(experts, "_is_expert_parallel", False)]:
        raise UsageError(f"{parallel[0]} of {name} runs under transformers' expert parallelism: load it with ep_size=1")
    refuse_weights(name, found)
    refuse_shared(name, found)
    if layers is None:
        return found
    if not layers:
        raise UsageError(f"layers={layers!r} chooses no MoE block of {name}, which has {len(found)}, from 0")
    if bad := [layer for layer in layers if layer not in range(len(found))]:
        raise UsageError(f"layers: {bad[0]!r} is no MoE block of {name}, which has {len(found)}, from 0")
    return {path: block for i, (path, block) in enumerate(found.items()) if i in layers}


def refuse_weights(name: str, found: dict[str, tuple[nn.Module, nn.Module]]) -> None:
    """Of kinds that new experts cannot be made like, or that lie elsewhere than in the model."""
    for path, module in ((path, module) for path, block in found.items() for module in block):
        for weight in module.parameters():
            if weight.dtype not in FLOATS or type(weight) not in (nn.Parameter, DTensor):
                kind = str(weight.dtype).removeprefix("torch.") if weight.dtype not in FLOATS else type(weight).__name__
                raise UsageError(
                    f"{path} of {name} has weights in {kind}, and new experts are none:"
                    " load it in float32, bfloat16 or float16"
                )
            if weight.is_meta and hasattr(module, "_hf_hook"):
                raise UsageError(f"{path} of {name} is offloaded: load it by a device_map without cpu and disk offload")


def refuse_shared(name: str, found: dict[str, tuple[nn.Module, nn.Module]]) -> None:
    """Of a router or experts that two blocks share there would be one set of new ones, for two layers' inputs."""
    seen: dict[nn.Module, str] = {}
    for path, block in found.items():
        for what, module in zip(("router", "experts"), block, strict=True):
            if (other := seen.setdefault(module, path)) != path:
                raise UsageError(f"{path} of {name} shares its {what} with {other}: give it a copy of its own")


def instead_of_blocks(model: nn.Module) -> str:
    """What lies where a MoE block would, and what is to be done about it."""
    named = (*EXPERT_COUNTS, "experts")
    lying = ((path, m) for path, m in model.named_modules() if path and any(getattr(m, name, None) for name in named))
    if found := next(lying, None):
        return f"{type(found[1]).__name__} at {found[0]} holds its experts otherwise, and gets no new ones"
    return "a dense model is to be upcycled first"


def refuse_others(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        wraps = hasattr(model, "get_base_model")
        hint = ": retrofit the model that it wraps, and put adapters around that" if wraps else ""
        raise UsageError(f"{type(model).__name__} is no model of transformers{hint}")


def common_form(chosen: dict[str, tuple[nn.Module, nn.Module]]) -> tuple[Form, int]:
    """Form and input width of all these routers; raises UsageError where they have no common one."""
    found = {}
    for path, (router, _) in chosen.items():
        try:
            width = router_width(router)
            found[path] = recognise(router, width), width
        except UsageError as error:
            alike = [path for path, (other, _) in chosen.items() if type(other) is type(router)]
            hint = f"; leave {', '.join(alike)} out by `layers`" if len(alike) < len(chosen) else ""
            raise UsageError(f"{error}{hint}") from None
    if len(set(found.values())) > 1:
        paths = [path for path in found if found[path] != next(iter(found.values()))]
        raise UsageError(f"{paths[0]} routes otherwise than {next(iter(found))}: choose `layers` of one form")
    return next(iter(found.values()))


def router_width(router: nn.Module) -> int:
    """D, from the one matrix with a row per expert."""
    experts = own_experts(router)
    if experts is None:
        raise unknown(router, "it says neither num_experts nor n_routed_experts")
    matrices = [p for p in router.parameters() if p.dim() == 2 and p.shape[0] == experts]
    if len(matrices) != 1:
        raise unknown(
            router, f"{len(matrices) or 'none'} of its matrices has a row for each of {experts} experts alone"
        )
    return matrices[0].shape[1]


@torch.no_grad()
def begin_new(router: nn.Module, experts: nn.Module, init: str) -> None:
    """Initial values of one block's new parameters."""
    if init == "zeda":
        matrix = next(p for name, p in router.named_parameters() if p.dim() == 2 and name not in NEW_OF_ROUTER)
        mean_D, std_D = matrix.float().mean(0), matrix.float().std(0)
        router.new_rows.copy_(mean_D + std_D * torch.randn_like(router.new_rows, dtype=torch.float32))
        router.offset.zero_()
    else:
        router.begin()
    experts.begin()


def probe(router: nn.Module) -> tuple[Tensor, ...]:
    """Random input for a router with its own weights."""
    generator = torch.Generator().manual_seed(1)
    weight = next(iter(router.parameters()))
    x_1TD = torch.randn(1, 64, router_width(router), generator=generator).to(weight.device, weight.dtype)
    extra = [torch.zeros(own_experts(router), device=weight.device)] if "bias" in str(argument_names(router)) else []
    return x_1TD, *extra


def argument_names(router: nn.Module) -> tuple[str, ...]:
    return type(router).forward.__code__.co_varnames[1 : type(router).forward.__code__.co_argcount]


@torch.no_grad()
def before(chosen: dict[str, tuple[nn.Module, nn.Module]]) -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """What each router says to random input before anything is changed; of none on the meta device."""
    found = {}
    for path, (router, _) in chosen.items():
        if not next(router.parameters()).is_meta:
            given = probe(router)
            found[path] = given, ask(router, given)
    return found


def ask(router: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    training = router.training
    try:
        return router.eval()(given[0][0].clone(), *given[1:])
    except ValueError:
        return router(given[0].clone(), *given[1:])
    finally:
        router.train(training)


@torch.no_grad()
def refuse_if_loud(model: nn.Module, chosen: dict[str, tuple[nn.Module, nn.Module]], expected: dict[str, Any]) -> None:
    """Raises UsageError, with the model stripped, where a silent router says anything else than it did."""
    for path, (given, (_, gates, ids)) in expected.items():
        router = chosen[path][0]
        offset = router.offset.clone()
        router.offset.fill_(SILENT)
        _, new_gates, new_ids = ask(router, given)
        router.offset.copy_(offset)
        if not (torch.equal(gates, new_gates) and torch.equal(ids, new_ids)):
            name = type(router).__name__.removeprefix("PlusPlus")
            strip(model)
            raise UsageError(f"{name} at {path} does not compute its form with its own weights; nothing was changed")


def strip(model: nn.Module) -> nn.Module:
    """The model as it was before `retrofit`, in place: classes, parameters and config; returns it."""
    require(model)
    new = sum(model.config.moepp[kind] for kind in ("constant", "copy", "zero"))
    for router, experts in blocks(model).values():
        if isinstance(router, PlusPlusRouter):
            for matrix in [module for module in router.modules() if isinstance(module, PlusPlusMatrix)]:
                remove(matrix, ("seen",))
            remove(router, (*NEW_OF_ROUTER, "form", "carry", "first", "last", "logits", "own_dtype"))
            remove(experts, (*NEW_OF_EXPERTS, "own", "counts"))
            accept_no_one(experts, False)
    model.__class__ = family(type(model))
    del model.config.moepp
    count_experts(model, -new)
    if getattr(model, "is_activation_checkpointing", False):
        model.activation_checkpointing_disable()
    return model


def remove(module: nn.Module, names: Iterable[str]) -> None:
    become(module, type(module).__bases__[1])
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
