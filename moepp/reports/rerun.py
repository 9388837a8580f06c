"""The command that repeats a report."""

import shlex

from moepp.experiments import discover
from moepp.reports.experiment import Context, Experiment


def rerun_command(experiment: Experiment, context: Context) -> str:
    """`python run.py reproduce ...` as a shell takes it: what runs were trained with is found in their records."""
    what = experiment.name if experiment.name in discover() else experiment.runs[0].sweep
    words, options, overrides = ["python", "run.py", "reproduce", what, "--scale", context.scale], {}, ()
    if context.directories:
        trained = context.results(experiment.runs[0].sweep)
        words += ["--seeds", *map(str, trained.seeds)] if trained.seeds else []
        options, overrides = trained.scored if "tasks" in experiment.options else {}, trained.overrides
    return shlex.join(
        [*words, *(f"{key}={value}" for key, value in {**options, **context.options}.items()), *overrides]
    )
