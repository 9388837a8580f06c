"""A Slurm cluster: a job array of workers, by submitit.

Time limits and preemption are part of the walk: trainer.stop_s and half a minute before its end a job gets SIGUSR2, and
SIGTERM when another job shall have its nodes. A trial then saves at the end of its batch, its worker gives the lease
back, and the job has itself queued again, which frees the nodes at once. Any worker continues any trial, so it does not
matter which one starts first.
"""

import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepp.errors import Interrupted, RunError, UsageError
from moepp.layers.bounds import LARGEST, Bounded, Count, Whole
from moepp.names import check_line
from moepp.process import python_path, start
from moepp.records import read_json, write_json
from moepp.sweeps.hints import sweep_command
from moepp.sweeps.job import ASKED_TO_STOP
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.launchers.worker_pool import WORKER_MARGIN_SECONDS, begin_elsewhere, wait

if TYPE_CHECKING:
    from submitit import Executor, Job
    from submitit.helpers import DelayedSubmission

    from moepp.training.settings import TrainerConfig

PARAMETER = re.compile("[a-z][a-z0-9_-]*", re.ASCII)
MOST_WORKERS = 32  # unless --workers says more: a job that finds no trial left was queued in vain
JOB_MARGIN_SECONDS = 30.0  # from the signal to the end, beyond trainer.stop_s
REQUEUES = 1000  # after time limits: each job goes on where it stopped, so only the end of the sweep ends it
SECONDS_TO_TRAIN = 60.0  # at least, of a job's time, from its start to the signal
SECONDS_BETWEEN_LOOKS = 5.0  # into the queue
SECONDS_TO_ANSWER = 30.0
NO_GPUS = re.compile("gres|gpu|node configuration", re.IGNORECASE)  # in what sbatch says where there are none
# The end of a job's script. A stop signal may come before the worker can answer it, even before Python runs: srun
# says so. A job that is being cancelled or queued again by Slurm runs no longer. The number of an array's last job is
# that of the array too.
QUEUE_AGAIN = r"""
code=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
case $code in
  129|130|138|140|143)
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
      scontrol requeue "$job"
    fi ;;
esac
exit $code
"""


@dataclass
class SlurmLauncher(Bounded, key="launcher"):
    """What each job asks for. Everything lies on a file system that all nodes share, and is found by the same path."""

    partition: str = ""  # empty: the cluster's default
    minutes: Count = 240  # time limit; what is not done by then is queued again
    cpus: Count = 4
    gpus: Whole | None = None  # null: trainer.devices, and none with trainer.accelerator=cpu
    parameters: dict[str, str] = field(default_factory=dict)  # more of sbatch's: parameters.account=mine
    wait: bool = True  # show progress until the sweep is done; false: submit and return
    cluster: Literal["slurm", "local"] = "slurm"  # local: submitit's processes on this machine, to try it out

    def __post_init__(self) -> None:
        """All of it becomes lines of a batch script, which a shell reads."""
        super().__post_init__()
        for name, value in {"partition": self.partition, **self.parameters}.items():
            if not PARAMETER.fullmatch(name):
                raise ValueError(f"launcher.parameters.{name}: sbatch has parameters of letters, digits, - and _ alone")
            check_line(f"launcher.{'' if name == 'partition' else 'parameters.'}{name}", value)

    def run(self, call: SweepCall) -> Path | None:
        """Raises UsageError without submitit or sbatch, or for jobs that end before they train; RunError when sbatch
        refuses them.
        """
        self._require()
        self._refuse_jobs_without_time(max(trial.config.trainer.stop_s for trial in call.trials()))
        directory, trainer, left = begin_elsewhere(call, LARGEST if self.cluster == "slurm" else 1)
        pool = SlurmPool(directory, self.cluster)
        if (missing := min(call.workers or MOST_WORKERS, left) - pool.alive()) > 0:
            worker = Worker(call.work(), Path.cwd(), trainer.stop_s + WORKER_MARGIN_SECONDS)
            gpus = self._gpus(trainer)
            with _refusal(gpus):
                pool.add(self._executor(directory, trainer, gpus), [worker] * missing, call.environment())
        if left and not self.wait:
            shows = sweep_command("status", call.load(), call.scale, call.overrides)
            print(f"{pool.name}: {pool.workers()}; `{shows}` shows")
            return None
        if left:
            print(f"{pool.name}: {pool.workers()}, logs in {pool.logs}", flush=True)
        return wait(call, directory, pool)

    def _require(self) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UsageError("launcher=slurm needs submitit: pip install submitit") from None
        logging.getLogger("submitit").setLevel(logging.ERROR)  # its warnings would come through the progress bar
        if self.cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise UsageError("there is no sbatch on the PATH: call this where Slurm jobs are submitted")

    def _refuse_jobs_without_time(self, stop_s: float) -> None:
        needed = math.ceil((stop_s + JOB_MARGIN_SECONDS + SECONDS_TO_TRAIN) / 60)
        if self.minutes < needed:
            raise UsageError(
                f"launcher.minutes={self.minutes}: a job is asked to stop {stop_s + JOB_MARGIN_SECONDS:g} s before its"
                f" end (trainer.stop_s={stop_s:g} and {JOB_MARGIN_SECONDS:g} more); set it to {needed} at least, or"
                " trainer.stop_s lower"
            )

    def _gpus(self, trainer: "TrainerConfig") -> int:
        if self.gpus is not None:
            return self.gpus
        return 0 if trainer.accelerator == "cpu" else trainer.devices

    def _executor(self, directory: Path, trainer: "TrainerConfig", gpus: int) -> "Executor":
        import submitit

        executor = submitit.AutoExecutor(
            directory / "slurm", self.cluster, slurm_max_num_timeout=REQUEUES, local_max_num_timeout=REQUEUES
        )
        executor.update_parameters(
            name=directory.name,
            timeout_min=self.minutes,
            nodes=trainer.num_nodes,
            tasks_per_node=1,
            cpus_per_task=self.cpus,
            gpus_per_node=gpus or None,  # a cluster without GPUs takes not even 0
            slurm_partition=self.partition or None,
            slurm_signal_delay_s=math.ceil(trainer.stop_s + JOB_MARGIN_SECONDS),
            slurm_srun_args=["--nodes=1", "--ntasks=1", "--overlap"],  # the worker; its trials may take all nodes
            slurm_teardown=QUEUE_AGAIN.strip().splitlines(),
            slurm_additional_parameters={"requeue": True, **self.parameters},
        )
        return executor


class SlurmPool:
    """The jobs of one sweep. Their numbers are kept beside it, so that a second call finds them queued or running."""

    def __init__(self, directory: Path, cluster: str):
        self.logs, self._cluster = directory / "slurm", cluster
        self._path = self.logs / "jobs.json"
        self._looked = -math.inf
        self._queue: dict[str, str] | None = None
        self._ids: list[str] = (read_json(self._path) or {}).get(cluster, [])

    @property
    def name(self) -> str:
        return f"job {', '.join(dict.fromkeys(job.split('_')[0] for job in self._ids))}"

    @cached_property
    def _jobs(self) -> "list[Job[int]]":
        from submitit import LocalJob, SlurmJob

        kind = SlurmJob if self._cluster == "slurm" else LocalJob
        return [kind(self.logs, job) for job in self._ids]

    def add(self, executor: "Executor", workers: "Sequence[Worker]", environment: Mapping[str, str]) -> None:
        from submitit.helpers import environment_variables

        jobs = self._living()
        with environment_variables(PYTHONPATH=python_path(), **environment), executor.batch():
            jobs += [executor.submit(worker) for worker in workers]
        self._jobs, self._ids = jobs, [job.job_id for job in jobs]
        self._looked = -math.inf  # the queue as it was known holds none of them
        write_json(self._path, {self._cluster: self._ids})

    def alive(self) -> int:
        return len(self._living())

    def workers(self) -> str:
        """How many there are, for people; a job that waits does not work yet."""
        living = self._living()
        if self._queue is None:
            return f"{len(living)} workers queued or running"
        running = sum(self._queue[job.job_id] == "RUNNING" for job in living)
        return f"{running} workers running, {len(living) - running} queued"

    def dismiss(self) -> None:
        for job in self._living():
            job.cancel(check=False)

    def leave(self) -> str:
        return f"{self.name} goes on, `scancel` ends it"

    def _living(self) -> "list[Job[int]]":
        """As the queue says, which is there without accounting and never late; submitit asks sacct, which is."""
        if self._cluster == "slurm" and time.monotonic() > self._looked + SECONDS_BETWEEN_LOOKS:
            self._looked, self._queue = time.monotonic(), _queue()
        if self._cluster == "local" or self._queue is None:
            return [job for job in self._jobs if not job.done()]
        return [job for job in self._jobs if job.job_id in self._queue]


class Worker:
    """What a job runs: `sweep work`, in the folder from which it was submitted."""

    def __init__(self, command: Sequence[str], folder: Path, seconds_to_stop: float):
        self.command, self.folder, self.seconds_to_stop = command, folder, seconds_to_stop
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        from submitit import JobEnvironment

        os.chdir(self.folder)
        paths = JobEnvironment().paths
        self._process = start(self.command, paths.folder / f"{JobEnvironment().job_id}_worker.txt", {})
        # No lock is held here, unlike in Popen.wait: `checkpoint` interrupts this line and waits for the same process.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        code = self._process.wait()
        if code in ASKED_TO_STOP:
            sys.exit(Interrupted.exit_code)  # for the script to see
        return code

    def checkpoint(self) -> "DelayedSubmission":
        """What submitit calls before it has the job queued again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(self.seconds_to_stop)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return DelayedSubmission(Worker(self.command, self.folder, self.seconds_to_stop))


def _queue() -> dict[str, str] | None:
    """The jobs of this user that wait or run, and which of the two; None where Slurm does not answer."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %T"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # filters, for people
    try:
        said = subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=SECONDS_TO_ANSWER, env=own
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(line.split() for line in said.splitlines())


@contextmanager
def _refusal(gpus: int) -> Iterator[None]:
    """One line in place of submitit's traceback with sbatch's words inside."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except (FailedJobError, subprocess.CalledProcessError) as error:
        words: Any = getattr(error, "stderr", None) or str(error)
        lines = [line.strip() for line in str(words).splitlines() if line.strip()]
        said = lines[-1] if lines else str(error)
        way_out = "; on a cluster without GPUs set launcher.gpus=0" if gpus and NO_GPUS.search(said) else ""
        raise RunError(f"sbatch refused the workers: {said}{way_out}") from None
