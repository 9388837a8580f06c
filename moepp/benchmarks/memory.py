"""The most memory that a call held above what stood there before it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moepp.training.allocator import give_back_freed_memory
from moepp.training.interleaved import Call

FORGET = Path("/proc/self/clear_refs")


def peak_bytes(call: Call, device: torch.device) -> int:
    """As CUDA's allocator counts it; on a CPU the tensors of all operators, not what these need for themselves."""
    return _on_gpu(call, device) if device.type == "cuda" else _on_cpu(call)


def _on_gpu(call: Call, device: torch.device) -> int:
    grown = memory_growth(device)
    call()
    torch.cuda.synchronize(device)  # so that what goes wrong on the device is not taken for the next one's
    return grown()


def _on_cpu(call: Call) -> int:
    with Storages() as storages:
        call()
    return storages.peak


def counts_pages() -> bool:
    """Whether this system tells how large the process was at most since it was last asked: Linux does."""
    return os.access(FORGET, os.W_OK)


def resident_bytes(call: Call) -> int:
    """By how much the process grew during the call, at most, once it has given back what it had freed: with the holes
    that its allocator leaves and what libraries need for themselves.
    """
    grown = memory_growth(torch.device("cpu"))
    call()
    return grown()


def memory_growth(device: torch.device) -> Callable[[], int | None]:
    """Watches from now on: the returned call says how many bytes the most that stood there since was above what stands
    there now, as CUDA's allocator counts it, or by how much the process grew. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    if not counts_pages():
        return lambda: None
    give_back_freed_memory()
    FORGET.write_text("5")  # proc(5): VmHWM is VmRSS from here on
    before = _status("VmRSS")
    return lambda: _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Storages(TorchDispatchMode):
    """Watches those that operators make, for as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        for storage in _storages(result):
            if storage._cdata not in given and storage.device.type != "meta":
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
