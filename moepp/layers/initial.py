"""How a layer's weights begin when nobody says otherwise."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

INIT_STD = 0.02  # also DecoderConfig.init_std's default
_left_to_others = ContextVar("left_to_others", default=False)


@contextmanager
def uninitialized() -> Iterator[None]:
    """Layers made in here leave their weights unset, for whoever overwrites all of them: a seeded initialisation, or
    a checkpoint.
    """
    token = _left_to_others.set(True)
    try:
        yield
    finally:
        _left_to_others.reset(token)


def draw(module: nn.Module) -> None:
    """N(0, INIT_STD) into all of the module's parameters, but those with a beginning of their own, as buffers too may
    have. A layer that stands alone has no depth by which to scale down what it writes, as a decoder does.
    """
    if not _left_to_others.get():
        own = own_beginnings(module)
        for name, parameter in module.named_parameters():
            own.get(name, _normal)(parameter)
        begin_buffers(module, own)


def begin_buffers(module: nn.Module, own: Mapping[str, Callable[[Tensor], Any]]) -> None:
    """Those that `own_beginnings` found; others are set where they are built, by no random number."""
    for name, buffer in module.named_buffers():
        if name in own:
            own[name](buffer)


def _normal(parameter: Tensor) -> None:
    nn.init.normal_(parameter, std=INIT_STD)


def own_beginnings(module: nn.Module, seed: int | None = None) -> dict[str, Callable[[Tensor], Any]]:
    """By name, how the parameters begin that are not drawn: what each module's `initial` names, and what parts of other
    people (`foreign`) set when they are built, their buffers included, each of them anew by `seed` and its name.
    """
    found: dict[str, Callable[[Tensor], Any]] = {}
    for path, part in module.named_modules():
        found |= {_inside(path, name): begin for name, begin in getattr(part, "initial", {}).items()}
        for name, build in getattr(part, "foreign", {}).items():
            built = _built_on_cpu(build, None if seed is None else seed_of(seed, _inside(path, name)))
            found |= {_inside(path, name, key): _copied(value) for key, value in _set(built)}
    return found


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """A part of somebody else. What it sets stays as it is, what it leaves unset (`torch.empty`) is drawn."""
    with _UnsetIsNaN():
        module = build()
    if not _left_to_others.get():
        for parameter in module.parameters():
            if _is_unset(parameter):
                _normal(parameter)
    return module


def seed_of(seed: int, name: str) -> int:
    """For each parameter or part its own, whatever else a model has."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])


class _UnsetIsNaN(TorchFunctionMode):
    """Tells memory that nobody has set from what somebody has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        unset = func in (torch.empty, torch.empty_like, Tensor.new_empty)
        return result.fill_(torch.nan) if unset and result.is_floating_point() else result


def _is_unset(value: Tensor) -> bool:
    return not value.is_meta and bool(value.isnan().any())


def _set(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return ((name, value.detach()) for name, value in tensors if not _is_unset(value))


def _built_on_cpu(build: Callable[[], nn.Module], seed: int | None) -> nn.Module:
    with torch.device("cpu"), nullcontext() if seed is None else torch.random.fork_rng(devices=[]), uninitialized():
        if seed is not None:
            torch.manual_seed(seed)
        return built(build)


def _copied(value: Tensor) -> Callable[[Tensor], Any]:
    def copy(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)

    return copy


def _inside(*names: str) -> str:
    return ".".join(filter(None, names))
