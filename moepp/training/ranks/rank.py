"""Which process of its run this one is, and what the processes agree on."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from moepp.errors import Interrupted, UsageError
from moepp.process import STOP_SIGNALS
from moepp.training.ranks.meeting import name_of_attempt

if TYPE_CHECKING:
    from moepp.training.settings import RunConfig

STARTER = "MOEPP_STARTER"  # set in the ranks that launch.py starts
SLURM_PORTS = 15000  # the port is this plus the last four digits of the job's number, the same for every rank


@dataclass(frozen=True)
class Rank:
    """A process's place among those that train one run. Alone, and rank 0, where nobody started several."""

    rank: int = 0
    local_rank: int = 0  # on this node
    world_size: int = 1
    local_world_size: int = 1
    started_by: Literal["", "launch", "torchrun", "srun"] = ""

    @classmethod
    def here(cls) -> "Rank":
        """As the environment says. Raises UsageError for srun with a different number of tasks on each node, and where
        a launcher has left only some of its variables.
        """
        if os.environ.get(STARTER):
            return cls._of(os.environ, "launch")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return cls._of(os.environ, "torchrun")
        if os.environ.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "0", "1"):
            os.environ.update(_torchrun_variables(os.environ))
            return cls._of(os.environ, "srun")
        return cls()

    @classmethod
    def _of(cls, variables: Mapping[str, str], started_by: str) -> "Rank":
        return cls(*_numbers(variables, "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), started_by)

    def keeps_record(self, num_nodes: int) -> bool:
        """Whether this process writes the record of a run on that many nodes: rank 0 or the starter watching it."""
        if self.started_by:
            return self.rank == 0 and self.started_by != "launch"
        return num_nodes == 1 or os.environ.get("NODE_RANK", "0") == "0"

    def spread(self, config: "RunConfig") -> "RunConfig":
        """The config with as many devices and nodes as were started from outside, where it does not ask for any.

        Raises UsageError where it asks for others.
        """
        from dataclasses import replace

        nodes = self.world_size // self.local_world_size
        asked = (config.trainer.devices, config.trainer.num_nodes)
        if not self.started_by or asked == (self.local_world_size, nodes):
            return config
        if asked != (1, 1):
            raise UsageError(
                f"{self.started_by} started {self.local_world_size} processes on each of {nodes} nodes, but "
                f"trainer.devices={asked[0]} and trainer.num_nodes={asked[1]}; leave them out or make them agree"
            )
        trainer = replace(config.trainer, devices=self.local_world_size, num_nodes=nodes)
        try:
            return replace(config, trainer=trainer)
        except ValueError as error:
            raise UsageError(f"{error} ({self.started_by} started {self.world_size} processes)") from None


def _numbers(variables: Mapping[str, str], *names: str) -> list[int]:
    """Raises UsageError, in one line, where a launcher has set only some of its variables."""
    if missing := [name for name in names if not variables.get(name, "").isdecimal()]:
        raise UsageError(
            f"{missing[0]}={variables.get(missing[0], '')} is no number, although a launcher seems to have started this"
            " process; where that is another one's shell, unset TORCHELASTIC_RUN_ID and SLURM_STEP_NUM_TASKS"
        )
    return [int(variables[name]) for name in names]


def _torchrun_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what srun has."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    tasks, nodes, *_ = _numbers(
        slurm, "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"
    )
    if not nodes or tasks % nodes:
        raise UsageError(f"srun started {tasks} tasks on {nodes} nodes; give every node as many: --ntasks-per-node")
    job = slurm.get("SLURM_JOB_ID", "0")[-4:]
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": slurm.get("MASTER_ADDR")
        or SLURMEnvironment.resolve_root_node_address(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(SLURM_PORTS + int(job)),
    }


@contextmanager
def process_group(rank: Rank, timeout_s: float, cuda: bool) -> Iterator[None]:
    """Joins the ranks before Lightning does, so that they can agree on where to resume; nothing to do for one alone.

    The timeout bounds the joining too. What ranks tell each other goes over gloo also on GPUs: no agreement waits for
    a GPU, and a rank that dies is noticed at once.
    """
    if not rank.started_by:
        yield
        return
    import torch
    import torch.distributed as dist

    device = None
    if cuda:
        device = torch.device("cuda", rank.local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, device_id=device, **_meeting(timeout)
    )
    try:
        yield
    except Interrupted:  # all have saved; srun and torchrun end the others by a signal as soon as one has left
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise
    largest(0)  # nobody leaves with success before everybody has it
    dist.destroy_process_group()


def _meeting(timeout: timedelta) -> dict[str, Any]:
    """Where ranks meet, unless as the environment says: torchrun starts them several times with one store."""
    import torch.distributed as dist

    if not (restarts := os.environ.get("TORCHELASTIC_RESTART_COUNT")):
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = name_of_attempt(store, rank, world_size, restarts, timeout.total_seconds())
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world_size}


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, in every rank; all must call it."""
    if not _together():
        return value
    import torch
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def largest(value: int) -> int:
    """The largest of the ranks' values, in every rank; all must call it."""
    if not _together():
        return value
    import torch
    import torch.distributed as dist

    found = torch.tensor(value)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed, so that the reason lies with another rank."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _together() -> bool:
    """Whether this process has joined others; without importing torch where nobody has."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
