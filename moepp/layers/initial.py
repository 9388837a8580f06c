"""How a layer's weights begin when nobody says otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

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
    """N(0, INIT_STD) into all of the module's parameters. A layer that stands alone has no depth by which to scale down
    what it writes, as a decoder does.
    """
    if not _left_to_others.get():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=INIT_STD)
