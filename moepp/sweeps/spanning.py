"""A trial over several nodes: in a Slurm job of as many, srun starts a process for each of its devices."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.errors import UsageError
from moepp.process import PARENT_PID, start

if TYPE_CHECKING:
    from moepp.sweeps.spec import Trial
    from moepp.training.settings import TrainerConfig

STEP_VARIABLE = "SLURM_STEP_NUM_TASKS"


def refuse_too_many_nodes(trials: "Sequence[Trial]", nodes: int | None = None) -> None:
    """Raises UsageError for a trial over more than `nodes`; without a number, than those of the Slurm job that this
    process runs in.
    """
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1) if nodes is None else nodes
    for trial in trials:
        if (needed := trial.config.trainer.num_nodes) > nodes:
            raise UsageError(
                f"trainer.num_nodes={needed} (arm {trial.arm}): this trial needs a Slurm job of {needed} nodes; add"
                " launcher=slurm, or give `sweep work` in a job of your own (docs/clusters.md)"
            )


def is_far_from_worker() -> bool:
    """Whether this process trains on another node than its worker's, which is a step's first. There network file
    systems show the worker's beats too late. It is enough that the first node's processes end without them: srun ends
    all.
    """
    in_step = STEP_VARIABLE in os.environ  # which `start` takes from any other child of a worker
    return in_step and os.environ.get("SLURM_NODEID", "0") != "0"


class StepProcess:
    """srun, as the process of a trial: its tasks are what is asked to stop."""

    def __init__(self, srun: subprocess.Popen):
        self._srun = srun
        self.poll, self.wait = srun.poll, srun.wait

    @property
    def returncode(self) -> int | None:
        """The highest of the tasks'."""
        return self._srun.returncode

    def terminate(self) -> None:
        self._srun.send_signal(signal.SIGUSR2)  # srun passes it on; at SIGTERM it would kill them

    def kill(self) -> None:
        self._srun.terminate()


def start_step(
    command: Sequence[str], trainer: "TrainerConfig", config: Path, log: Path, environment: Mapping[str, str]
) -> StepProcess:
    """The trial at `config`, over the nodes of the job, which its worker's own step shares with it."""
    cpus = max(1, len(os.sched_getaffinity(0)) // trainer.devices)
    srun = [
        "srun", "--overlap", "--unbuffered", "--kill-on-bad-exit=1", "--cpu-bind=none", f"--nodes={trainer.num_nodes}",
        f"--ntasks={trainer.num_nodes * trainer.devices}", f"--ntasks-per-node={trainer.devices}",
        f"--cpus-per-task={cpus}",
    ]  # fmt: skip
    # The tasks are children of Slurm's, whose end is no reason to end; that of the worker shows in its lease.
    tasks = ["env", f"--unset={PARENT_PID}", *command, str(config)]
    return StepProcess(start([*srun, *tasks], log, environment))
