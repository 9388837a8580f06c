"""The parts of a layer that a trace shows by name (`trainer.profiler=pytorch`)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def region(name: str) -> AbstractContextManager:
    """Nothing unless somebody profiles: it would cost a dispatch at either end. Nor under torch.compile, which gives
    names of its own to what it makes of several parts.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return record_function(name)
