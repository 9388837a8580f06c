"""Which form a family's router has: found by what it computes on random input, never by its name.

Candidates are made of what stands in the router (numbers, tensors of E elements) and of what families are known to do;
the one that gives the router's own gates and ids, bit for bit in float32 and in bfloat16, is it.
"""

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moepp.errors import UsageError
from moepp.retrofit.modeling import own_experts, slots
from moepp.retrofit.modeling_form import INDEPENDENT, Form

TOKENS = 61  # odd: elementwise kernels round the ends of rows otherwise than their vectorised middle
BIAS = 1.0  # large enough that a score with its bias is negative here and there, which tells fills of 0 and -inf apart
DTYPES = (torch.float32, torch.bfloat16)
EPSILONS = (0.0, 1e-20, 1e-6, 1e-9, 1e-12, 1e-15)


class Sample(NamedTuple):
    """What a router with random weights said to random input in `dtype`, first as its first answer, and its logits."""

    first: Tensor
    gates: Tensor
    ids: Tensor
    logits: Tensor
    dtype: torch.dtype
    router: nn.Module
    extra: tuple[Tensor, ...]


def recognise(router: nn.Module, width: int) -> Form:
    """The router's form; raises UsageError, naming its class, where none fits."""
    with torch.device("cpu"):  # a model may be made on the meta device, which computes nothing
        for matrix in (*matrices(router), None):
            try:
                samples = [sample(router, width, dtype, matrix) for dtype in DTYPES]
            except Exception as error:
                raise unknown(router, f"it cannot be asked on its own: {str(error).splitlines()[0]}") from None
            if matrix is not None and torch.equal(samples[0].first, samples[0].logits):
                continue  # these are its logits, which need no other place to be heard
            for form in candidates(router, samples[0]):
                form = replace(form, matrix=matrix, says="logits" if matrix is None else "scores")
                if all(agrees(form, found) for found in samples):
                    return form
    raise unknown(router, "what it computes is none of softmax, top-k then softmax, sigmoid and sqrt softplus")


def matrices(router: nn.Module) -> list[str]:
    """Paths of linear layers inside with a row per expert: where to hear logits of a router that answers with none."""
    linear = ((path, module) for path, module in router.named_modules() if path and isinstance(module, nn.Linear))
    return [path for path, module in linear if module.out_features == own_experts(router)]


def unknown(router: nn.Module, why: str) -> UsageError:
    return UsageError(f"{type(router).__name__} is a router of unknown form: {why}; nothing was changed")


def sample(router: nn.Module, width: int, dtype: torch.dtype, matrix: str | None) -> Sample:
    """Of a copy of the router with random weights and biases; these are in float32 where the family keeps them in that.
    The logits are its first answer, or what the module at `matrix` says.
    """
    try:
        return sample_with(router, width, dtype, dtype, matrix)
    except RuntimeError:
        return sample_with(router, width, dtype, torch.float32, matrix)


def sample_with(
    router: nn.Module, width: int, dtype: torch.dtype, of_weights: torch.dtype, matrix: str | None
) -> Sample:
    generator = torch.Generator().manual_seed(0)
    copy = deepcopy(router).to_empty(device="cpu").eval()
    for tensor in (*copy.parameters(), *copy.buffers()):
        if tensor.is_floating_point():
            deviation = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else BIAS
            tensor.data = (torch.randn(tensor.shape, generator=generator) * deviation).to(of_weights)
    x_1TD = torch.randn(1, TOKENS, width, generator=generator).to(dtype)
    extra = tuple(torch.randn(own_experts(router), generator=generator) * BIAS for _ in range(arguments(router)))
    heard: list[Tensor] = []
    if matrix is not None:
        copy.get_submodule(matrix).register_forward_hook(lambda module, args, said: heard.append(said.flatten(0, -2)))
    with torch.no_grad():
        try:
            answer = copy(x_1TD[0].clone(), *extra)
        except ValueError:  # some unpack batch, sequence and width
            answer = copy(x_1TD.clone(), *extra)
    shapes = [(TOKENS, own_experts(router)), (TOKENS, slots(router)), (TOKENS, slots(router))]
    if [tuple(found.shape) for found in answer] != shapes or answer[2].is_floating_point():
        raise ValueError("it does not answer with logits, gates and ids")
    return Sample(*answer, heard[-1] if heard else answer[0], dtype, copy, extra)


def arguments(router: nn.Module) -> int:
    """How many more tensors its forward takes; one, where it is a bias per expert."""
    names = list(inspect.signature(router.forward).parameters)[1:]
    if len(names) > 1 or (names and "bias" not in names[0]):
        raise ValueError(f"its forward also takes {', '.join(names)}")
    return len(names)


def candidates(router: nn.Module, found: Sample) -> Iterator[Form]:
    """Plain forms first: where two agree on everything, the one that says less is the form."""
    numbers = {float(value) for value in vars(router).values() if type(value) in (int, float) and value == value}
    scales = [1.0, *sorted(numbers - {1.0}), 1 / slots(router)]
    norms = [
        (False, 0.0, False),
        *((True, e, False) for e in EPSILONS + tuple(sorted(n for n in numbers if 0 < n < 1))),
    ]
    norms += [(True, number, True) for number in sorted(numbers) if 0 < number < 1]
    choices = product(("scores", "logits"), biases(router, found), groupings(router), (True, False))
    for score, (chooses, bias, groups, is_sorted) in product(("softmax", "top_k_softmax", *INDEPENDENT), choices):
        chosen = Form(score, chooses=chooses, bias=bias, sorted=is_sorted, **groups)
        if (score == "softmax" and chooses == "logits") or not same_choice(chosen, found):
            continue
        factors = [None, *(name for name in per_expert(router) if name != bias)]
        for factor, (normed, epsilon, clamped), scale, float_scores, out in product(
            factors, norms, scales, (True, False), ("scores", "logits", "input")
        ):
            gates = {"normed": normed, "epsilon": epsilon, "clamped": clamped, "scale": scale, "expert_scale": factor}
            yield replace(chosen, **gates, float_scores=float_scores, out=out)


def per_expert(router: nn.Module) -> list[str]:
    """Names of tensors with a number for each expert."""
    experts = own_experts(router)
    tensors = (*router.named_parameters(), *router.named_buffers())
    return [name for name, tensor in tensors if tensor.numel() == experts and tensor.is_floating_point()]


def biases(router: nn.Module, found: Sample) -> list[str | None]:
    return [None, *per_expert(router), *(["argument"] if found.extra else [])]


def groupings(router: nn.Module) -> list[dict[str, Any]]:
    groups = getattr(router, "num_group", None) or getattr(router, "n_group", None)
    kept = getattr(router, "topk_group", None)
    if not groups or not kept or groups == 1:
        return [{}]
    fills = (0.0, float("-inf"))
    return [
        {},
        *({"groups": (groups, kept), "group_score": s, "group_fill": f} for s, f in product(("max", "sum"), fills)),
    ]


def route_as(form: Form, found: Sample) -> tuple[Tensor, Tensor]:
    logits, router = found.logits, found.router
    bias = None if form.bias is None else found.extra[0] if form.bias == "argument" else named(router, form.bias)
    scale = None if form.expert_scale is None else named(router, form.expert_scale)
    gates, ids = form.route(logits.float(), torch.zeros(0), bias, slots(router), logits.dtype, scale)
    return gates.to({"scores": gates.dtype, "logits": logits.dtype, "input": found.dtype}[form.out]), ids


def named(router: nn.Module, name: str) -> Tensor:
    return {**dict(router.named_parameters()), **dict(router.named_buffers())}[name].detach().reshape(-1)


def same_choice(form: Form, found: Sample) -> bool:
    try:
        return torch.equal(route_as(form, found)[1], found.ids)
    except RuntimeError:  # groups of one expert have no second
        return False


def agrees(form: Form, found: Sample) -> bool:
    first = form.answer(found.logits, found.logits.shape[1], found.logits.dtype)
    said = zip((first, *route_as(form, found)), (found.first, found.gates, found.ids), strict=True)
    return all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in said)
