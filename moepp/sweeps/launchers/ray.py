"""A Ray cluster: a task per worker. Ray finds the devices and starts a lost node's worker again elsewhere."""

import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moepp.errors import UsageError
from moepp.layers.bounds import Bounded, Count, Whole
from moepp.process import start
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.launchers.worker_pool import WORKER_MARGIN_SECONDS, begin_elsewhere, wait

if TYPE_CHECKING:
    from moepp.training.settings import TrainerConfig

SECONDS_TO_ANSWER = 10.0


@dataclass
class RayLauncher(Bounded, key="launcher"):
    """What each worker asks for. All nodes share a file system and find this checkout by the same path."""

    address: str = ""  # host:6379, ray://host:10001 or auto; empty: RAY_ADDRESS, else a new instance on this machine
    cpus: Count = 1
    gpus: Whole | None = None  # null: trainer.devices; none with trainer.accelerator=cpu or in a cluster without GPUs

    def run(self, call: SweepCall) -> Path:
        """Raises UsageError without Ray, where no cluster answers, or where none of its nodes could take a worker."""
        ray = _import()
        directory, trainer, left = begin_elsewhere(call)
        pool = RayPool(ray, directory / "ray", trainer.stop_s + WORKER_MARGIN_SECONDS)
        if not left:
            return wait(call, directory, pool)
        with self._connected(ray):
            cpus, gpus = self.cpus, self._gpus(ray, trainer)
            fitting = _fitting(ray.nodes(), {"CPU": cpus, "GPU": gpus})
            if not fitting:
                raise UsageError(
                    f"no node of the Ray cluster has {cpus} CPUs and {gpus} GPUs; set launcher.cpus and launcher.gpus"
                )
            workers = min(call.workers or fitting, left)
            pool.start(call.work(), call.environment(), workers, num_cpus=cpus, num_gpus=gpus)
            print(f"{pool.name}: {workers} workers, logs in {pool.logs}", flush=True)
            return wait(call, directory, pool)

    def _gpus(self, ray: ModuleType, trainer: "TrainerConfig") -> int:
        if self.gpus is not None:
            return self.gpus
        return 0 if trainer.accelerator == "cpu" or not ray.cluster_resources().get("GPU") else trainer.devices

    @contextmanager
    def _connected(self, ray: ModuleType) -> Iterator[None]:
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if host and _is_here(host.strip("[]"), int(port)):
                _show_token()
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"no Ray cluster answers at {address} ({str(error).splitlines()[0]})") from None
        try:
            yield
        finally:
            ray.shutdown()


class RayPool:
    """The tasks of one sweep; they end with this process."""

    name = "Ray"

    def __init__(self, ray: ModuleType, logs: Path, seconds_to_stop: float):
        self.logs, self._ray, self._seconds_to_stop = logs, ray, seconds_to_stop
        self._tasks: list[Any] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str], workers: int, **resources: int) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        task = self._ray.remote(max_retries=-1, **resources)(_work)
        logs = self.logs.resolve()
        self._tasks = [
            task.remote(command, environment, Path.cwd(), logs / f"worker-{n}.txt", self._seconds_to_stop)
            for n in range(workers)
        ]

    def alive(self) -> int:
        if not self._tasks:
            return 0
        return len(self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)[1])

    def dismiss(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)
        deadline = time.monotonic() + self._seconds_to_stop
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.5)

    def leave(self) -> str:
        self.dismiss()
        return "its workers have stopped"


def _work(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path, seconds_to_stop: float
) -> int:
    """Runs on a node, in the main thread of a process of Ray's; being cancelled is a KeyboardInterrupt."""
    os.chdir(folder)
    process = start(command, log, environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            return process.wait(seconds_to_stop)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _is_here(host: str, port: int) -> bool:
    """Whether this machine answers there. Raises OSError where nobody does; Ray itself would ask for minutes."""
    with socket.create_connection((host, port), SECONDS_TO_ANSWER) as connection:
        return connection.getsockname()[0] == connection.getpeername()[0]


def _show_token() -> None:
    """`ray start` asks for the token that lies on this machine, and `ray.init` with an address shows none unasked."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    if Path(token).exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _fitting(nodes: Sequence[dict[str, Any]], needed: dict[str, int]) -> int:
    """How many workers fit into the nodes at a time."""
    living = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(min(int(node.get(name, 0) // count) for name, count in needed.items() if count) for node in living)


def _import() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report to nobody
    try:
        import ray
    except ImportError:
        raise UsageError("launcher=ray needs Ray: pip install ray") from None
    return ray
