"""Which share of this machine each of the trials that run at the same time may use."""

import fcntl
import glob
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.errors import RunError

if TYPE_CHECKING:
    from moepp.training.settings import TrainerConfig

Allocation = dict[str, str]  # environment variables of a trial
GPU_NODES = ("nvidia*", "nvhost*", "kfd", "dxg")  # in /dev; where there is none, torch need not be loaded to be asked


def allocate(workers: int, trainer: "TrainerConfig", one_share: bool = False) -> list[Allocation]:
    """One per worker; `workers` 0 makes as many as trials fit on the GPUs, or on the cores where they use none. A
    process that takes only `one_share` then has all cores: it cannot know of others.

    A trial takes `trainer.devices` GPUs (shared in turn when there are too few), or as many cores; over several nodes
    it takes everything. OMP_NUM_THREADS is the share of each of its processes, for torch would otherwise give all
    cores to every one.
    """
    gpus = _gpus() if trainer.accelerator != "cpu" else []
    devices = max(1, trainer.devices)
    cores = _cores()
    if trainer.num_nodes > 1:
        workers = 1  # such a trial has all that its job has
    workers = workers or max(1, (len(gpus) or (devices if one_share else cores)) // devices)
    threads = str(max(1, cores // (workers * devices)))
    allocations = []
    for worker in range(workers):
        allocation: Allocation = {}
        if not trainer.threads and "OMP_NUM_THREADS" not in os.environ:
            allocation |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if gpus:
            allocation["CUDA_VISIBLE_DEVICES"] = ",".join(
                dict.fromkeys(gpus[(worker * devices + i) % len(gpus)] for i in range(devices))
            )
        allocations.append(allocation)
    return allocations


@contextmanager
def own_share(allocations: list[Allocation]) -> Iterator[list[Allocation]]:
    """The one of `allocations` that is this process's while the block runs, and at most until it ends: each process of
    this user on this machine has a number that no other has, and those beyond the last share in turn.
    """
    folder = _private_folder()
    for number in itertools.count():
        with open(folder / f"worker-{number}", "a", opener=_no_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield [allocations[number % len(allocations)]]
            return


def _private_folder() -> Path:
    """This user's on this machine: file systems may have no locks. In the folder of all users anybody may have put
    something in its place. Raises RunError.
    """
    folder = Path(tempfile.gettempdir()) / f"moepp-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RunError(f"{folder} is no folder of this user's: remove it, or set TMPDIR to a folder of your own")
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def _no_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, 0o600)


def threads(allocation: Allocation) -> int:
    """CPU threads that a trial in `allocation` gets."""
    return int(allocation.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or _cores())


def _cores() -> int:
    """Those this process may use: a job of a cluster gets fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if not any(glob.glob(f"/dev/{node}") for node in GPU_NODES):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]
