"""How a layer's weights begin when nobody says otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

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
    """N(0, INIT_STD) into all of the module's parameters, but those with a beginning of their own. A layer that stands
    alone has no depth by which to scale down what it writes, as a decoder does.
    """
    if not _left_to_others.get():
        own = own_beginnings(module)
        for name, parameter in module.named_parameters():
            own.get(name, _normal)(parameter)


def _normal(parameter: Tensor) -> None:
    nn.init.normal_(parameter, std=INIT_STD)


def own_beginnings(module: nn.Module) -> dict[str, Callable[[Tensor], Any]]:
    """By name, how the parameters begin that are not drawn: each module's `initial` names its own."""
    return {
        f"{path}.{name}".removeprefix("."): begin
        for path, part in module.named_modules()
        for name, begin in getattr(part, "initial", {}).items()
    }
