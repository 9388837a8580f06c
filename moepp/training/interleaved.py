"""Times several calls in one process, in turn and in shuffled order: what slows the machine for a while slows all."""

import random
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Key = TypeVar("Key")
Call = Callable[[], object]
SPIN_CYCLES = 20_000_000  # 10 ms at 2 GHz: longer than a host needs to queue a layer's forward and backward pass


def interleaved_times(
    keys: Iterable[Key],
    prepare: Callable[[Key, int], Call],
    device: torch.device,
    repeats: int,
    warmup: int,
    seed: int,
    ahead: bool = False,
) -> dict[Key, list[float]]:
    """Milliseconds of each key's calls, `repeats` of them after `warmup` that do not count.

    `prepare(key, repeat)` returns the call that is timed; what it does itself is not. On a GPU the time is that between
    two events around the call, so that it contains what the host needs where that is slower. `ahead`: the GPU spins
    first while the host queues the call, so that the time is the GPU's alone, unless the call waits for it. On a CPU
    with one thread it is the time that the process had, else that of the clock.
    """
    order, shuffle = list(keys), random.Random(seed)
    times: dict[Key, list[float]] = {key: [] for key in order}
    for repeat in range(warmup + repeats):
        shuffle.shuffle(order)
        for key in order:
            milliseconds = _time_ms(prepare(key, repeat), device, ahead)
            if repeat >= warmup:
                times[key].append(milliseconds)
    return times


def _time_ms(call: Call, device: torch.device, ahead: bool) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if ahead:
            torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    call()
    return (clock() - begin) * 1000
