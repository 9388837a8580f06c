"""`retrofit`, `calibrate`, `wake` and `strip`: a model of another family with zero-computation experts, and back."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moepp.errors import UsageError
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
    routers,
    slots,
    stacks,
)
from moepp.retrofit.modeling_form import SILENT, Form
from moepp.retrofit.recognise import recognise, unknown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FAR = 64.0  # beyond which no offset is looked for
BISECTIONS = 32


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


def require(model: nn.Module) -> None:
    if isinstance(model, PlusPlusModel):
        return
    inside = any(isinstance(module, PlusPlusModel) for module in model.modules())
    hint = "pass the model that it wraps, adapters merged for an export" if inside else "retrofit(model) first"
    raise UsageError(f"{type(model).__name__} has no new experts of its own: {hint}")


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    share: float = 0.25,
    tolerance: float = 0.002,
    parallel: nn.Module | None = None,
) -> nn.Module:
    """Sets every layer's offset, one for all its new experts, so that this share of the batches' slots goes to them;
    no training. A batch is ids [B, S], or a mapping of a model's inputs whose `attention_mask` leaves padding out.
    Scaled copies whose factor is still 1 get the one that suits the experts they stand in for.

    Later layers see what earlier ones changed: passes are repeated until every layer is within `tolerance`. Offsets lie
    where no token's choice turns, so that a model routes alike on other devices and numbers of threads. `parallel` is
    the module around the model that is called in its place where all devices of a run calibrate together, each on
    batches of its own. Layers that no token reaches, such as those of images in a text, stay as they are.
    """
    require(model)
    found = routers(model)
    most = min(most_new(router) / slots(router) for router in found)
    if not 0 <= share <= most:
        raise UsageError(
            f"share={share} must lie between 0 and {most:g}: a token has {most * slots(found[0]):g} of"
            f" {slots(found[0])} slots for {len(found[0].offset)} new experts"
        )
    if share:
        batches = list(batches)
        fit_copies(model, batches, parallel)
        reach(model, batches, share, tolerance, parallel)
    for router in found:
        if not share:
            router.offset.fill_(SILENT)
        router.calibrated.copy_(router.offset)
    return model


def reach(model: nn.Module, batches: Sequence[Any], share: float, tolerance: float, parallel: nn.Module | None) -> None:
    """Sets the offsets that miss the share, until none does: the first layer's stand after one pass, the next one's
    after another.
    """
    for _ in range(len(routers(model)) + 3):
        found = {router: turns(router, *heard) for router, heard in listen(model, batches, parallel).items()}
        if parallel is not None:
            found = {router: of_all_devices(turn_M) for router, turn_M in found.items()}
        aims = {r: Aim(turn_M, slots(r) / most_new(r), share, tolerance) for r, turn_M in found.items()}
        missed = [router for router, aim in aims.items() if not aim.met_by(router.offset[0].item())]
        for router in missed:
            router.offset.fill_(aims[router].offset)
        if not missed:
            break


def of_all_devices(turn_M: Tensor) -> Tensor:
    """Ascending; those of every device's tokens, which may differ in number."""
    if not dist.is_initialized():
        return turn_M
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, turn_M.cpu())
    return torch.cat(found).sort().values


def most_new(router: nn.Module) -> int:
    """Of a token's slots, how many new experts can take."""
    return min(len(router.offset), slots(router))


@torch.no_grad()
def fit_copies(model: nn.Module, batches: Iterable[Any], parallel: nn.Module | None) -> None:
    """Scaled copies get the factor c with which c x is nearest to what a slot of the experts gives (least squares):
    the sum of x y over that of x x and the gates, y being the sum of the experts by their gates.
    """
    banks = [experts for _, experts in blocks(model).values() if getattr(experts, "copy_scale", None) is not None]
    heard: dict[nn.Module, list[Tensor]] = {bank: [] for bank in banks if (whole(bank.copy_scale) == 1).all()}

    def hook(bank: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        x_TD, _, gate_TK = (given.flatten(0, -2).double() for given in (*args, *kwargs.values())[:3])
        product_T = (x_TD * y.reshape(x_TD.shape)).sum(1)
        heard[bank].append(torch.stack([product_T, x_TD.square().sum(1) * gate_TK.sum(1)], 1))

    if not heard:
        return
    wake(model, 0.0)
    hooks = [bank.register_forward_hook(hook, with_kwargs=True) for bank in heard]
    for inputs in passes(model, batches, parallel):
        leave_padding_out(heard, inputs)
    for handle in hooks:
        handle.remove()
    for bank, sums in heard.items():
        none = torch.zeros(2, dtype=torch.float64, device=model.device)
        found = sum((terms_T2.sum(0).to(none.device) for terms_T2 in sums), none)
        if parallel is not None and dist.is_initialized():
            dist.all_reduce(found)
        product, square = found.tolist()
        if square:
            bank.copy_scale.fill_(product / square)


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def passes(model: nn.Module, batches: Iterable[Any], parallel: nn.Module | None) -> Iterator[dict[str, Any]]:
    """The inputs of each batch, once the model has seen them in eval mode."""
    training = model.training
    model.eval()
    for batch in batches:
        inputs = as_inputs(batch, model)
        if parallel is None:
            model(**{"use_cache": False} | inputs)  # which a model without attention has none of
        else:
            parallel(inputs["input_ids"])
        yield inputs
    model.train(training)


Heard = tuple[Tensor, Tensor | None, torch.dtype]


@torch.no_grad()
def listen(model: nn.Module, batches: Iterable[Any], parallel: nn.Module | None) -> dict[nn.Module, Heard]:
    """Each router's logits [T, N] before offsets, the bias on its choice and the family's dtype of logits, over all
    batches.
    """
    heard: dict[nn.Module, list[Tensor]] = {router: [] for router in routers(model)}
    biases: dict[nn.Module, tuple[Tensor | None, torch.dtype]] = {}
    with hearing(heard, biases):
        for inputs in passes(model, batches, parallel):
            leave_padding_out(heard, inputs)
    return {router: (torch.cat(logits), *biases[router]) for router, logits in heard.items() if logits}


def leave_padding_out(heard: dict[nn.Module, list[Tensor]], inputs: dict[str, Any]) -> None:
    """Keeps, of what each module was heard to say last, [T, ...], the rows of tokens that are text."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        for rows in filter(None, heard.values()):
            rows[-1] = rows[-1][mask.flatten().bool().to(rows[-1].device)]


@contextmanager
def hearing(heard: dict[nn.Module, list[Tensor]], biases: dict[nn.Module, Any]) -> Iterator[None]:
    def hear(router: nn.Module, module: nn.Module, args: tuple[Any, ...], said_TN: Tensor) -> None:
        logits_TN = said_TN.detach().clone()
        if router.form.offset_in_logits:
            logits_TN[:, own_experts(router) :] -= router.offset
        heard[router].append(logits_TN)

    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        biases[router] = router.bias_of(args[1:], kwargs), router.own_dtype

    hooks = [router.register_forward_hook(hook, with_kwargs=True) for router in heard]
    hooks += [router.logits.register_forward_hook(partial(hear, router)) for router in heard]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def as_inputs(batch: Any, model: nn.Module) -> dict[str, Any]:
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    inputs.pop("labels", None)
    return {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}


@torch.no_grad()
def turns(router: nn.Module, logits_TN: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The offsets at which a slot turns to a new expert, ascending [M], by bisection: each token has as many as it can
    have new experts, the j-th being the least that gives it j of them.
    """
    new, tokens, most = len(router.offset), len(logits_TN), most_new(router)
    logits_MN = logits_TN.repeat(most, 1)
    wanted_M1 = torch.arange(1, most + 1, device=logits_TN.device).repeat_interleave(tokens)[:, None]
    low_M1, high_M1 = (logits_MN.new_full((len(logits_MN), 1), end) for end in (-FAR, FAR))
    for _ in range(BISECTIONS):
        middle_M1 = (low_M1 + high_M1) / 2
        _, ids = router.form.route(logits_MN, middle_M1.expand(-1, new), bias, slots(router), dtype)
        turned_M1 = (ids >= own_experts(router)).sum(1, keepdim=True) >= wanted_M1
        low_M1, high_M1 = low_M1.where(turned_M1, middle_M1), middle_M1.where(turned_M1, high_M1)
    return high_M1[:, 0].sort().values


class Aim:
    """The offset that gives new experts a share of the slots, in the middle of a gap between two at which a slot turns:
    another device or number of threads, which rounds otherwise, routes every token alike. Of the gaps that meet the
    share within the tolerance it is the widest; where slots turn together, as those of equal tokens do, the nearest.
    """

    def __init__(self, turn_M: Tensor, slots_per_turn: float, share: float, tolerance: float):
        self.turn_M, self.share, self.tolerance = turn_M, share, tolerance
        self.slots = len(turn_M) * slots_per_turn
        typical = max((turn_M[-1] - turn_M[0]).item() / len(turn_M), 1e-3)
        self.least = typical / 100  # a narrower gap is one that rounding may close
        ends_G = torch.cat([turn_M[:1] - 2 * typical, turn_M, turn_M[-1:] + 2 * typical])
        gap_G = ends_G.diff()
        error_G = (torch.arange(len(gap_G), device=gap_G.device) / self.slots - share).abs()
        near_G = error_G <= max(tolerance, error_G[gap_G >= self.least].min().item())
        best = gap_G.where(near_G, -1).argmax()
        self.offset = (ends_G[best] + ends_G[best + 1]).item() / 2

    def met_by(self, offset: float) -> bool:
        """Whether it is near enough to the share, and not so near to a turn that rounding reaches it."""
        error = abs((self.turn_M < offset).sum().item() / self.slots - self.share)
        return error <= self.tolerance and (self.turn_M - offset).abs().min().item() >= self.least


@torch.no_grad()
def wake(model: nn.Module, fraction: float) -> nn.Module:
    """Moves the offsets from silent, at 0, to calibrated, at 1: their odds of being chosen grow with the fraction in a
    softmax, else what is added to their score. Uncalibrated offsets are 0.
    """
    require(model)
    if not 0 <= fraction <= 1:
        raise UsageError(f"fraction={fraction} must lie in [0, 1]")
    for router in routers(model):
        if fraction == 0:
            router.offset.fill_(SILENT)
        else:
            step = torch.tensor(fraction).log() if router.form.offset_in_logits else fraction - 1
            router.offset.copy_((router.calibrated + step).clamp(min=SILENT))
    return model


def warm(model: nn.Module, new: int) -> None:
    """Calibrated on random ids."""
    if new:
        ids = torch.randint(
            model.config.get_text_config().vocab_size, (4, 64), generator=torch.Generator().manual_seed(0)
        )
        calibrate(model, [ids], share=min([0.25, *(most_new(r) / slots(r) for r in routers(model))]))
