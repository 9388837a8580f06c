"""Trains a finished run once more from its record."""

import shutil
from dataclasses import replace
from pathlib import Path

from moepp import config as configs
from moepp.errors import UsageError
from moepp.records import RunRecord
from moepp.training.run import train
from moepp.training.settings import RunConfig, run_directory

NAME = "rerun"


def rerun(directory: Path) -> RunRecord:
    """The record of the repetition, `<runs>/rerun/<hash>/`, where `directory` is `<runs>/<name>/<hash>`.

    An interrupted repetition continues; a finished one is made anew, for the code may have changed since. Raises
    UsageError when the run is not finished, is a repetition itself, or its data changed.
    """
    original = RunRecord(directory.resolve())
    if original.status != "done":
        raise UsageError(f"{directory} is no finished run; only a finished run can be repeated")
    folder = original.path.parent
    if folder.name == NAME:
        raise UsageError(f"{directory} is a repetition; name the run that it repeats")
    config = configs.load(RunConfig, original.path / "config.yaml")
    # Sums depend on the number of threads. A sweep sets it from outside, and the provenance tells what it was.
    threads = config.trainer.threads or original.read("provenance.json")["hardware"]["threads"]
    config = replace(
        config,
        name=NAME,
        runs=str(folder.parent),
        tags={"rerun_of": f"{folder.name}/{original.path.name}"},
        trainer=replace(config.trainer, threads=threads, expert_timing=False),
    )
    again = RunRecord(run_directory(config))
    if again.status == "done":
        shutil.rmtree(again.path)
    return train(config, again.path)
