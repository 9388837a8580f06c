"""What every experiment is: a question, the runs that answer it, and a function from these to findings.

    def measure(context: Context) -> Findings: ...

    EXPERIMENT = Experiment(name="fig6", ..., measure=measure, runs=(Runs("gating_residual", arms=("moepp",)),))

A sweep is one by itself (moepp/reports/arms.py). A file of experiments/ holds what a sweep file cannot say: numbers of
the paper to stand beside ours, or something else that is measured. Imports that cost time belong inside `measure`: the
file itself is read for every listing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.records import RunRecord, read_json
from moepp.reports.results import SweepResults, load_sweep_results
from moepp.reports.standing import Standing
from moepp.statistics.claims import Claim
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table
from moepp.tracking.arm_runs import ArmRun

SCALES = ("smoke", "laptop", "desk", "gpu", "paper")
PATHS, AMOUNTS = ("tasks_dir", "pos", "weights"), ("limit", "subject_limit", "words", "devices")  # options of several
USUAL = ("smoke", "laptop", "gpu", "paper")


@dataclass(frozen=True)
class Runs:
    """Trained runs that an experiment needs: arms of a sweep, all of them unless named, and the sweep's seeds."""

    sweep: str  # a file of sweeps/ or the path of one
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()  # instead of the sweep's
    timed: bool = False  # whether all arms are timed together once they are trained


@dataclass(frozen=True)
class Context:
    """What `measure` may use. `options` holds only keys that the experiment declares."""

    scale: str
    directories: Mapping[str, Path] = field(default_factory=dict)  # `Runs.sweep` -> `runs/<sweep>-<scale>/`
    options: Mapping[str, str] = field(default_factory=dict)

    def results(self, sweep: str) -> SweepResults:
        return load_sweep_results(self.directories[sweep])

    def run_directories(self, sweep: str, arm: str) -> dict[int, Path]:
        """The finished runs of an arm by seed. Raises UsageError when there is none."""
        directory = self.directories[sweep]
        trials = (read_json(directory / "sweep.json") or {"trials": []})["trials"]
        found = {trial["seed"]: directory / trial["path"] for trial in trials if trial["arm"] == arm}
        done = {seed: path for seed, path in sorted(found.items()) if RunRecord(path).status == "done"}
        if not done:
            raise UsageError(f"{directory} holds no finished run of arm {arm}; `reproduce` trains it")
        return done

    def check(self, least: int = 1) -> None:
        """Raises UsageError for options that can be seen to be wrong before anything is trained: amounts below `least`
        among them.
        """
        for option, value in self.options.items():
            if option == "tasks_dir" and not Path(value).expanduser().is_dir():
                raise UsageError(f"{option}={value} is no folder")
            if option in PATHS:
                self.path(option)
            elif option in AMOUNTS and not (value.isdecimal() and int(value) >= least):
                raise UsageError(f"{option}={value} must be a whole number of at least {least}")

    def path(self, option: str) -> Path | None:
        """The file or folder that an option names; None without one. Raises UsageError when it is not there."""
        value = self.options.get(option)
        if not value:
            return None
        path = Path(value).expanduser()
        if not path.exists():
            raise UsageError(f"{option}={value}: there is no such file or folder")
        return path


@dataclass(frozen=True)
class Findings:
    """What `measure` found. `sections` follow on the tables in a report; `summary` is what a command prints and a
    tracker's page shows, the first table unless given.
    """

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()  # on this measurement: data used, what could not be measured and why
    setup: Mapping[str, Any] = field(default_factory=dict)  # into provenance.json: batch, dtype, repeats, seeds
    answer: str = ""  # to the question, in words: the first line of a report
    verdict: tuple[str, ...] = ()  # sentences that follow from the numbers and are no claims
    sections: Mapping[str, Sequence[str | Table]] = field(default_factory=dict)
    summary: Table | None = None
    data: tuple[Table, ...] = ()  # saved, not shown
    metrics: Mapping[str, float] = field(default_factory=dict)  # the few that a tracker's parent run shows
    arm_runs: Mapping[str, ArmRun] = field(default_factory=dict)  # what a tracker shows of each arm
    standing: tuple[Standing, ...] = ()  # what the trained models can do, of each sweep; `reproduce` fills it in


@dataclass(frozen=True)
class Experiment:
    """`options` are keys of the command line that only this experiment knows (`pos=FILE`), each with its help; every
    other `key=value` is a config value of the runs it needs.
    """

    name: str
    title: str
    question: str
    measure: Callable[[Context], Findings]
    expected: str = ""  # direction, said before anything was measured
    reference: str = ""  # where in the paper
    runs: tuple[Runs, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    paper: tuple[Table, ...] = ()  # the paper's numbers
    notes: tuple[str, ...] = ()  # what the paper leaves open and what was chosen here
    of_routing: bool = False  # what routers do with texts: mechanics only, where the models have not learnt their words
    scales: tuple[str, ...] = USUAL  # where there is but one, `--scale` changes nothing
