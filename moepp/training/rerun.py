"""Trains a run once more from its record."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from moepp import config as configs
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord
from moepp.training.run import train
from moepp.training.settings import RunConfig, TrainerConfig, run_directory

NAME = "rerun"
ENDED = ("done", "pruned", "failed")


@dataclass
class _AsFar:
    """Ends a repetition at the first validation from which on there is nothing to compare it with."""

    record: RunRecord
    last_step: int

    def verdict(self, step: int, loss: float) -> str:
        return f"the run that it repeats ended after step {self.last_step}" if step >= self.last_step else ""


def rerun(directory: Path) -> RunRecord:
    """The record of the repetition, `<runs>/rerun/<hash>/`, where `directory` is `<runs>/<name>/<hash>`.

    A run that was pruned or failed is repeated as far as it came; should it fail again, that is its repetition. An
    interrupted repetition continues; one that has ended is made anew, for the code may have changed since. Raises
    UsageError when the run has not ended, is a repetition itself, lacks a file, or its data changed.
    """
    original = RunRecord(directory.resolve())
    if original.status == "damaged":
        raise UsageError(original.damage)
    if original.status not in ENDED:
        raise UsageError(f"{directory} is no run that has ended; only what is done, pruned or failed can be repeated")
    folder = original.path.parent
    if folder.name == NAME:
        raise UsageError(f"{directory} is a repetition; name the run that it repeats")
    config = configs.load(RunConfig, original.path / "config.yaml")
    config = replace(
        config,
        name=NAME,
        runs=str(folder.parent),
        tags={"rerun_of": f"{folder.name}/{original.path.name}"},
        trainer=replace(config.trainer, threads=_threads(original, config.trainer), expert_timing=False),
    )
    again = RunRecord(run_directory(config))
    if again.status in (*ENDED, "damaged"):
        shutil.rmtree(again.path)
    return _repeat(original, again, config)


def _threads(original: RunRecord, trainer: TrainerConfig) -> int:
    """Sums depend on the number of threads. A sweep sets it from outside, and the provenance tells what it was."""
    threads = trainer.threads or original.read("provenance.json").get("hardware", {}).get("threads")
    if threads is None:
        raise UsageError(
            f"{original.path / 'provenance.json'} does not say with how many threads the run was trained; restore it,"
            " or set trainer.threads in config.yaml beside it"
        )
    return threads


def _repeat(original: RunRecord, again: RunRecord, config: RunConfig) -> RunRecord:
    if original.status == "done":
        return train(config, again.path)
    steps = [int(line["step"]) for line in original.metrics() if "train/loss" in line]
    if not steps:
        raise UsageError(f"{original.path} ended before it logged a loss: a repetition could not be compared with it")
    try:
        return train(config, again.path, _AsFar(again, steps[-1]))
    except RunError:
        if again.status != "failed":
            raise
        return again
