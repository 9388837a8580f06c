"""Which share of this machine each of the trials that run at the same time may use."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moepp.training.settings import TrainerConfig

Slot = dict[str, str]  # environment variables of a trial


def divide(workers: int, trainer: "TrainerConfig") -> list[Slot]:
    """One slot per worker; `workers` 0 makes as many as trials fit on the GPUs, or on the cores where they use none.

    A trial takes `trainer.devices` GPUs (shared in turn when there are too few), or as many cores. OMP_NUM_THREADS is
    the share of each of its processes, for torch would otherwise give all cores to every one.
    """
    gpus = _gpus() if trainer.accelerator != "cpu" else []
    devices = max(1, trainer.devices)
    cores = _cores()
    workers = workers or max(1, (len(gpus) or cores) // devices)
    threads = str(max(1, cores // (workers * devices)))
    slots = []
    for worker in range(workers):
        slot: Slot = {}
        if not trainer.threads and "OMP_NUM_THREADS" not in os.environ:
            slot |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if gpus:
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(
                dict.fromkeys(gpus[(worker * devices + i) % len(gpus)] for i in range(devices))
            )
        slots.append(slot)
    return slots


def threads(slot: Slot) -> int:
    """CPU threads that a trial in `slot` gets."""
    return int(slot.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or _cores())


def _cores() -> int:
    """Those this process may use: a job of a cluster gets fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
