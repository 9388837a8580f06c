"""Starts the processes of a run over several devices, watches them, and ends them together.

There is one starter per node, and a process (a rank) for each device. Lightning's own launcher makes rank 0 the parent
of the others: nobody watches rank 0, a frozen rank outlives it, every rank prints its own traceback, and on NCCL a dead
rank is noticed seconds or minutes later. torchrun watches well and may be used instead, but it knows neither the run
record nor a stop at the end of a step. The ranks are told where they stand by torchrun's variables either way.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.errors import Interrupted, PeerLost, RunError, UsageError
from moepp.process import cause_of_end, last_lines, start, stop_requests
from moepp.records import RunRecord
from moepp.training.ranks.rank import STARTER
from moepp.training.states import SECONDS_TO_ARRIVE, states, step_of

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from moepp.training.settings import TrainerConfig

RANK_COMMAND = (sys.executable, "-m", "moepp.cli", "trial")
POLL_SECONDS = 0.1
SECONDS_TO_FOLLOW = 3.0  # for the other ranks to end by themselves, and say why, once one has ended
SECONDS_TO_LOOK = 1.0  # between two looks at whether another node has failed
ERROR = "error: "  # how a command's last line begins when it says why it ended
FINISHED = ("done", "pruned")
FAILED = "failed"  # the key under which a starter tells those of other nodes


@dataclass
class _Process:
    """One rank, as its starter sees it."""

    rank: int
    world: int  # how many there are on all nodes
    process: subprocess.Popen
    log: Path
    ended_at: float | None = None  # in the order in which it was seen

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def lost_another(self) -> bool:
        """Whether it ended because another rank did, or did not answer: NCCL's watchdog aborts a rank that waits."""
        if self.code == -signal.SIGABRT:
            return any("ProcessGroupNCCL" in line or "atchdog" in line for line in last_lines(self.log, 100))
        return self.code == PeerLost.exit_code

    def signal(self, number: int) -> None:
        """Signals the rank and the processes that load its data."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def launch_ranks(record: RunRecord, trainer: "TrainerConfig", timeout_s: float) -> None:
    """Trains a run whose record is open on this node's `trainer.devices` devices, until it is done or pruned. A rank
    waits `timeout_s` for the others.

    On several nodes every starter is given NODE_RANK, and MASTER_ADDR and MASTER_PORT of the first. SIGTERM and Ctrl-C
    let the ranks save at the end of their step. Raises Interrupted then, UsageError for what a rank refuses, RunError
    with the rank that died and how; no process is left in any case.
    """
    store, variables = _rendezvous(trainer, timeout_s)
    node, devices = int(variables["GROUP_RANK"]), trainer.devices
    with stop_requests() as stop:
        processes = []
        try:
            for local in range(devices):
                place = {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
                processes.append(_start(record, variables | place, show=node == local == 0))
            others = store if trainer.num_nodes > 1 else None
            elsewhere = _watch(processes, stop, others, trainer.stop_s)
            if _done(record, processes, trainer.num_nodes):
                return
            error = _reason(processes, stop.is_set(), elsewhere, timeout_s, record)
            if others and not elsewhere and not isinstance(error, Interrupted):
                _tell(others, f"node {node}: {error}")
            raise error
        finally:
            for each in processes:
                each.signal(signal.SIGKILL)
                each.process.wait()


def _rendezvous(trainer: "TrainerConfig", timeout_s: float) -> tuple["TCPStore", dict[str, str]]:
    """The store in which ranks and starters find each other, and torchrun's variables that all ranks here share.

    The first node's starter keeps the store: its port is taken before a rank is told of it, and a rank that dies takes
    nothing with it.
    """
    from torch.distributed import TCPStore

    address, port, node = "127.0.0.1", 0, 0
    if trainer.num_nodes > 1:
        try:
            address, port, node = (
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                int(os.environ["NODE_RANK"]),
            )
        except (KeyError, ValueError):
            raise UsageError(
                f"trainer.num_nodes={trainer.num_nodes}: give the command on each node MASTER_ADDR and MASTER_PORT (of "
                "the first) and NODE_RANK (0, 1, ...), or start it with srun or torchrun"
            ) from None
        if not 0 <= node < trainer.num_nodes:
            raise UsageError(f"NODE_RANK={node} must lie between 0 and {trainer.num_nodes - 1}")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(address, port, is_master=node == 0, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise RunError(f"no meeting point at {address}:{port}: {str(error).splitlines()[0]}") from error
    variables = {
        STARTER: "1",
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(trainer.devices * trainer.num_nodes),
        "LOCAL_WORLD_SIZE": str(trainer.devices),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the ranks join the store instead of opening one
    }
    if not trainer.threads and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // trainer.devices))
    return store, variables


def _start(record: RunRecord, variables: dict[str, str], show: bool) -> _Process:
    log = record.path / "ranks" / f"{variables['RANK']}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    process = start([*RANK_COMMAND, str(record.path / "config.yaml")], log, variables, show)
    return _Process(int(variables["RANK"]), int(variables["WORLD_SIZE"]), process, log)


def _watch(processes: Sequence[_Process], stop: threading.Event, store: "TCPStore | None", stop_s: float) -> str:
    """Returns once all ranks have ended, or when it is time to end those that have not. Returns another node's failure,
    or nothing.

    Ranks that are asked to stop have `stop_s` to finish their step and save it.
    """
    deadline, asked, looked, elsewhere = float("inf"), False, time.monotonic(), ""
    while True:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        for each in processes:
            if each.ended_at is None and each.code is not None:
                each.ended_at = now
                deadline = min(deadline, now + SECONDS_TO_FOLLOW)
        if stop.is_set() and not asked:
            asked, deadline = True, min(deadline, now + stop_s)
            for each in processes:
                each.process.send_signal(signal.SIGTERM)
        ended = all(each.code is not None for each in processes)
        unexplained = ended and store is not None and all(each.lost_another for each in processes)
        # Where all ranks here lost one of another node, that node will say why.
        if now > deadline + (3 * SECONDS_TO_LOOK if unexplained else 0) or (ended and not unexplained):
            return elsewhere
        if store is not None and now > looked + SECONDS_TO_LOOK:
            looked = now
            try:
                if store.check([FAILED]):
                    return store.get(FAILED).decode()
            except RuntimeError:  # also where it finished its part of the run, as the ranks here are about to
                store, elsewhere = None, "node 0: its starter is gone"
                deadline = min(deadline, now + SECONDS_TO_FOLLOW)


def _done(record: RunRecord, processes: Sequence[_Process], nodes: int) -> bool:
    """Whether the run's marker is there. Where all ranks ended well, another node may have written it, and file systems
    that nodes share show such a file late.
    """
    patience = SECONDS_TO_ARRIVE if nodes > 1 and all(each.code == 0 for each in processes) else 0.0
    deadline = time.monotonic() + patience
    while record.status not in FINISHED and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return record.status in FINISHED


def _tell(store: "TCPStore", failure: str) -> None:
    with suppress(RuntimeError):  # the first node's starter, which keeps the store, may be gone
        store.set(FAILED, failure)
        time.sleep(3 * SECONDS_TO_LOOK)  # this may be the one that keeps it


def _reason(
    processes: Sequence[_Process], stopped: bool, elsewhere: str, timeout_s: float, record: RunRecord
) -> Exception:
    """Why the ranks ended without finishing the run: what the first of them to fail by itself died of."""
    next_time = f"the same command {_next(record)}"
    ended = sorted((each for each in processes if each.ended_at is not None), key=lambda each: each.ended_at)
    if stopped or any(each.code == Interrupted.exit_code for each in ended):
        return Interrupted(f"stopped; {next_time}")
    culprit = next((each for each in ended if not each.lost_another), None)
    if culprit is None and elsewhere:
        return RunError(elsewhere)
    if culprit is None:
        return RunError(f"{_silence(processes, timeout_s)}; all ranks were ended, and {next_time}")
    last = "".join(last_lines(culprit.log, 1))
    for kind in (UsageError, RunError):
        if culprit.code == kind.exit_code and last.startswith(ERROR):
            return kind(last.removeprefix(ERROR))
    how = f"ended: {cause_of_end(culprit.code, culprit.log)}"
    if culprit.code == 0:
        how = "left before the run was done, with exit code 0"
    place = os.path.relpath(culprit.log)
    return RunError(
        f"rank {culprit.rank} of {culprit.world} {how} (its output: {place}); all ranks were ended, and {next_time}"
    )


def _silence(processes: Sequence[_Process], timeout_s: float) -> str:
    """Which ranks the others, all of which report a lost connection, must have waited for."""
    silent = [f"rank {each.rank} (process {each.process.pid})" for each in processes if each.ended_at is None]
    if silent:
        return f"{' and '.join(silent)} did not answer within strategy.timeout_s={timeout_s:g}"
    return "the ranks of this node lost those of others: " + "".join(last_lines(processes[0].log, 1)).removeprefix(
        ERROR
    )


def _next(record: RunRecord) -> str:
    saved = states(record.checkpoints)
    return f"continues from step {step_of(saved[-1])}" if saved else "begins anew"
