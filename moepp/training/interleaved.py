"""Times several calls in one process, in turn and in shuffled order: what slows the machine for a while slows all."""

import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Key = TypeVar("Key")
Call = Callable[[], object]


def interleaved_times(
    keys: Iterable[Key], prepare: Callable[[Key, int], Call], device: torch.device, repeats: int, warmup: int, seed: int
) -> dict[Key, list[float]]:
    """Milliseconds of each key's calls, `repeats` of them after `warmup` that do not count.

    `prepare(key, repeat)` returns the call that is timed; what it does itself is not. On a GPU the time is that between
    two events around the call, so that it contains what the host needs where that is slower.
    """
    order, shuffle = list(keys), random.Random(seed)
    times: dict[Key, list[float]] = {key: [] for key in order}
    for repeat in range(warmup + repeats):
        shuffle.shuffle(order)
        for key in order:
            milliseconds = _time_ms(prepare(key, repeat), device)
            if repeat >= warmup:
                times[key].append(milliseconds)
    return times


def _time_ms(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000
