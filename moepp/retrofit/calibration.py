"""`calibrate` and `wake`: what share of the slots a model's new experts get, by their offsets alone.

Shape suffixes: T tokens, N experts, D width, M turns, G gaps between them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moepp.errors import UsageError
from moepp.retrofit.modeling import PlusPlusModel, blocks, own_experts, routers, slots
from moepp.retrofit.modeling_form import SILENT

FAR = 64.0  # beyond which no offset is looked for
BISECTIONS = 32


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
