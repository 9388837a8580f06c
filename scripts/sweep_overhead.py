"""What a sweep costs beside its trials, and what sharing a machine brings: `python scripts/sweep_overhead.py`.

Trains the same laptop-like trials three ways, interleaved: one new Python after another, a sweep of one worker that has
the whole machine, and a sweep of one worker per core. The sweeps mirror into MLflow unless `--tracking jsonl`.
Prints medians over rounds; about three minutes a round on two cores, and nobody else may use them meanwhile.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moepp.config import CONF, save
from moepp.sweeps.runner import DataFreezer, run_sweep
from moepp.sweeps.spec import Scale, Sweep, Trial
from moepp.sweeps.trial import TRIAL_COMMAND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120, help="of each trial, at size=tiny")
    parser.add_argument("--tracking", choices=("mlflow", "jsonl"), default="mlflow")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    ways = {"bare processes": 0, "sweep, 1 worker": 1, f"sweep, {cores} workers": cores}
    rounds = []
    for number in range(options.rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        rounds.append({way: _timed(options, ways[way], cores) for way in order})
    print(f"{options.trials} trials of {options.steps} steps at size=tiny on {cores} cores, {options.tracking};")
    print(f"medians of {options.rounds} rounds (least to most)")
    for way in ways:
        print(f"{way:<18} {_spread([found[way].wall for found in rounds], '8.1f')} s")
    bare, alone, shared = ([found[way] for found in rounds] for way in ways)
    beside = [(found.wall - found.inside) / found.inside for found in alone]
    print(f"a sweep of one worker, beside its trials: {_spread(beside, '.1%')} of their time")
    longer = [one.wall / other.wall - 1 for one, other in zip(alone, bare, strict=True)]
    print(f"the same against bare processes: {_spread(longer, '+.1%')}")
    rates = [one.wall / other.wall for one, other in zip(alone, shared, strict=True)]
    print(f"{cores} workers on one core each over one worker on all: {_spread(rates, '.2f')} times the trials per hour")


@dataclass
class Timed:
    wall: float  # seconds from the call to its end
    inside: float  # seconds of the trials, summed: from the start of each to its `done`


def _timed(options: argparse.Namespace, workers: int, cores: int) -> Timed:
    """One way once, in a folder that holds prepared data and nothing else."""
    with tempfile.TemporaryDirectory(prefix="sweep_overhead_") as folder:
        sweep = _sweep(options.trials, options.steps, options.tracking)
        if workers:
            return _swept(sweep, Path(folder), workers)
        trials, freeze = sweep.trials("laptop", [f"runs={folder}"]), DataFreezer()
        for trial in trials:
            freeze(trial)
        return _bare(trials, cores)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _sweep(trials: int, steps: int, tracking: str) -> Sweep:
    base = ["size=tiny", "data=sotu", "model=moepp", f"trainer.steps={steps}", f"tracking={tracking}"]
    arms = {f"lr{number}": [f"optim.lr={number + 1}e-3"] for number in range(trials)}
    return Sweep(name="overhead", base=base, scales={"laptop": Scale()}, baseline="lr0", arms=arms, seeds=[0])


def _bare(trials: list[Trial], cores: int) -> Timed:
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores), "PYTHONPATH": str(CONF.parent)}
    started = time.perf_counter()
    for trial in trials:
        trial.config.trainer.progress = False
        save(trial.config, trial.directory / "config.yaml")
        command = [*TRIAL_COMMAND, str(trial.directory / "config.yaml")]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    return Timed(seconds, seconds)


def _swept(sweep: Sweep, folder: Path, workers: int) -> Timed:
    os.environ.pop("OMP_NUM_THREADS", None)  # the sweep divides the cores itself
    started = time.perf_counter()
    directory = run_sweep(sweep, "laptop", workers, [f"runs={folder}"], progress=False)
    wall = time.perf_counter() - started
    return Timed(wall, sum(_life(done.parent) for done in directory.glob("*/done")))


def _life(record: Path) -> float:
    return (record / "done").stat().st_mtime - (record / "attempt.json").stat().st_mtime  # written at the start


if __name__ == "__main__":
    main()
