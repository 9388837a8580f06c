"""What a sweep costs beside its trials, and what sharing a machine brings: `python scripts/sweep_overhead.py`.

Trains the same laptop-like trials three ways: one bare process after another, a sweep of one worker that has the whole
machine, and a sweep of one worker per core. Prints the table that results/LOG.md quotes; about two minutes on two
cores, and nobody else may use them meanwhile.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from moepp.config import CONF, save
from moepp.process import start
from moepp.sweeps import job
from moepp.sweeps.runner import TRIAL_COMMAND, DataFreezer, run_sweep
from moepp.sweeps.spec import Scale, Sweep, Trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120, help="of each trial, at size=tiny")
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    folder = Path(tempfile.mkdtemp(prefix="sweep_overhead_"))
    try:
        sweep = _sweep(options.trials, options.steps)
        trials = sweep.trials("laptop", [f"runs={folder / 'bare'}"])
        freeze = DataFreezer()
        for trial in trials:
            freeze(trial)  # the data are ready before anything is timed
        rows = {
            "bare processes": _bare(trials, cores),
            "sweep, 1 worker": _swept(sweep, folder, 1),
            f"sweep, {cores} workers": _swept(sweep, folder, cores),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.trials} trials of {options.steps} steps at size=tiny on {cores} cores")
    print(f"{'':<18}{'wall':>9}{'in trials':>11}{'beside them':>13}{'trials per hour':>17}")
    for name, (wall, inside) in rows.items():
        rate = options.trials / wall * 3600
        beside = f"{wall - inside:11.2f} s" if "workers" not in name else f"{'–':>13}"
        print(f"{name:<18}{wall:7.1f} s{inside:9.1f} s{beside}{rate:17.0f}")
    (bare, _), (alone, inside), (shared, _) = rows.values()
    print(f"overhead of the sweep: {(alone - inside) / inside:.1%} of the time in its trials")
    print(f"the same trials without a sweep took {bare / alone:.3f} times as long")
    print(f"{cores} workers on one core each over one worker on all: {alone / shared:.2f} times the trials per hour")


def _sweep(trials: int, steps: int) -> Sweep:
    base = ["size=tiny", "data=sotu", "model=moepp", f"trainer.steps={steps}", "tracking=jsonl"]
    arms = {f"lr{number}": [f"optim.lr={number + 1}e-3"] for number in range(trials)}
    return Sweep(name="overhead", base=base, scales={"laptop": Scale()}, baseline="lr0", arms=arms, seeds=[0])


def _bare(trials: list[Trial], cores: int) -> tuple[float, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "PYTHONPATH": str(CONF.parent)}
    started = time.perf_counter()
    for trial in trials:
        trial.config.trainer.progress = False
        save(trial.config, trial.directory / "config.yaml")
        command = [*TRIAL_COMMAND, str(trial.directory / "config.yaml")]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    return seconds, seconds


def _swept(sweep: Sweep, folder: Path, workers: int) -> tuple[float, float]:
    """Seconds from the call of the sweep to its end, and those of its trials' processes."""
    os.environ.pop("OMP_NUM_THREADS", None)  # the sweep divides the cores itself
    lives: list[float] = []

    def timed(*arguments: Any) -> subprocess.Popen:
        began = time.perf_counter()
        process = start(*arguments)
        threading.Thread(target=lambda: (process.wait(), lives.append(time.perf_counter() - began))).start()
        return process

    job.start = timed
    started = time.perf_counter()
    run_sweep(sweep, "laptop", workers, [f"runs={folder / str(workers)}"], progress=False)
    return time.perf_counter() - started, sum(lives)


if __name__ == "__main__":
    main()
