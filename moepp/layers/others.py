"""Parts that are not the package's own, as layers keep them (`foreign`), and the state that they may have: buffers that
a forward pass writes into, as a router's running mean. The package's own change in no forward pass.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def parts_of_others(module: nn.Module) -> dict[str, nn.Module]:
    """All of them by their names within the module."""
    return {
        f"{path}.{name}".lstrip("."): getattr(layer, name)
        for path, layer in module.named_modules()
        for name in getattr(layer, "foreign", {})
    }


def buffers_of_others(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, part in parts_of_others(module).items()
        for key, buffer in part.named_buffers()
    }


def without_trace(module: nn.Module, buffers: dict[str, Tensor], *arguments: Any, **options: Any) -> Any:
    """`module(*arguments, **options)`, begun with these buffers and with nothing written into them or its own."""
    return functional_call(module, {name: buffer.clone() for name, buffer in buffers.items()}, arguments, options)


def repeatable(module: nn.Module) -> Callable[..., Any]:
    """The module, for `torch.utils.checkpoint`: once called, it is called again with the buffers that it found."""
    if not (buffers := buffers_of_others(module)):
        return module
    found = {name: buffer.clone() for name, buffer in buffers.items()}
    again = False

    def call(*arguments: Any) -> Any:
        nonlocal again
        if again:
            return without_trace(module, found, *arguments)
        again = True
        return module(*arguments)

    return call
