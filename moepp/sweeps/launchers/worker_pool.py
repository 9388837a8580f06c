"""Workers on other machines: started, watched through the records of their trials, and dismissed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moepp.errors import Interrupted, RunError, UsageError
from moepp.process import stop_requests
from moepp.sweeps.hints import sweep_command
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.plan import read_plan
from moepp.sweeps.progress import step_bar
from moepp.sweeps.status import SweepStatus, read_status

if TYPE_CHECKING:
    from tqdm import tqdm

    from moepp.training.settings import TrainerConfig

LOOK_SECONDS = 2.0
WORKER_MARGIN_SECONDS = 15.0  # beyond trainer.stop_s, which a worker gives its trial
SECONDS_TO_LEAVE = 45.0  # after the last trial workers mirror what is left and end


class WorkerPool(Protocol):
    name: str  # what people look for, such as "Slurm job 1234"
    logs: Path  # what the workers print

    def alive(self) -> int:
        """How many workers run or wait for a machine."""

    def dismiss(self) -> None:
        """Ends those that are left."""

    def leave(self) -> str:
        """What becomes of the workers when this process is stopped: ends them or lets them go on, and says which."""


def begin_elsewhere(call: SweepCall, nodes: int = 1) -> tuple[Path, "TrainerConfig", int]:
    """Promises the trials, none over more than `nodes`; returns the sweep's directory, how its trials are trained, and
    how many are left.

    The same checks as in a worker, so that what is refused is refused here and now.
    """
    from moepp.sweeps.runner import begin

    if call.arms:
        raise UsageError(
            f"only {', '.join(call.arms)} of sweep {call.sweep} are needed, and workers elsewhere run whole sweeps;"
            " leave launcher= out, or `sweep run` the whole sweep with it first"
        )
    prepared = begin(call.load(), call.scale, call.overrides, call.seeds, call.workers or 2, nodes=nodes)
    return prepared.directory, prepared.config.trainer, look(prepared.directory)[1]


def wait(call: SweepCall, directory: Path, pool: WorkerPool) -> Path:
    """Shows the progress of all trials until none is left or no worker is; returns the directory.

    Raises RunError when trials failed or are left over, Interrupted after a stop signal.
    """
    status, left = look(directory)
    with stop_requests() as stop, step_bar(0, _steps(status)) as bar:
        while not stop.is_set() and pool.alive() and left:
            _show(bar, status)
            stop.wait(LOOK_SECONDS)
            status, left = look(directory)
        _show(bar, status)
        if stop.is_set():
            done = f"{status.count('done')} of {len(status.trials)} trials are finished"
            raise Interrupted(f"interrupted: {done}; {pool.leave()}; the same command continues")
    if not left:
        _until(lambda: not pool.alive(), SECONDS_TO_LEAVE)
    pool.dismiss()
    return _outcome(call, directory, pool)


def look(directory: Path) -> tuple[SweepStatus, int]:
    """Where the sweep stands, and how many trials are left."""
    status = read_status(directory, read_plan(directory) or {"trials": []})
    return status, status.left


def _outcome(call: SweepCall, directory: Path, pool: WorkerPool) -> Path:
    from moepp.sweeps.runner import raise_failures

    status, left = look(directory)
    failures = [f"{trial.label}: {trial.note}" for trial in status.trials if trial.state in ("failed", "damaged")]
    retry = sweep_command("retry", call.load(), call.scale, call.overrides)
    raise_failures(retry, failures, len(status.trials))
    if left:
        raise RunError(f"{pool.name} ended with {left} trials unfinished; see {pool.logs}; the same command continues")
    return directory


def _steps(status: SweepStatus) -> int:
    return sum(trial.step for trial in status.trials)


def _show(bar: "tqdm", status: SweepStatus) -> None:
    """How many trials run says what a job in a queue does not: that somebody works."""
    done, running = status.count("done"), status.count("running")
    bar.set_description(f"{done}/{len(status.trials)} trials, {running} running", refresh=False)
    bar.total = sum(trial.steps for trial in status.trials)
    bar.update(_steps(status) - bar.n)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.5)
