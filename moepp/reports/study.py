"""What a study declares and returns. A study is an experiment that does not set arms against a baseline: it measures
something of its own (a layer's time, a model's routing, a checkpoint's scores) and states what follows.

    def measure(context: StudyContext) -> StudyReport: ...

    STUDY = Study(name="fig6", ..., measure=measure, runs=(Runs("gating_residual", arms=("moepp",)),))

Imports that cost time belong inside `measure`: the file itself is read for every listing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepp.errors import UsageError
from moepp.records import RunRecord, read_json
from moepp.reports.results import SweepResults, load_sweep_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("smoke", "laptop", "gpu", "paper")
Verdict = Literal["holds", "fails", "undecided"]
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Saved as `name`.csv at full precision; shown with four significant digits, None as a dash."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Plot:
    """Saved as `data.name`.svg and .png, and `data` as .csv: exactly what is drawn. `draw` is called in the common
    style (moepp/statistics/style.py) and makes its figure with `style.axes_of`.
    """

    data: Table
    draw: Callable[[], "Figure"]


@dataclass(frozen=True)
class Claim:
    """A statement and what the numbers make of it. `effect` with its interval is in `unit`; None where the statement is
    no estimate. `p` is corrected within its family, where there is one.
    """

    statement: str
    verdict: Verdict
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    p: float | None = None
    paper: str = ""  # what the paper reports for it
    note: str = ""  # how it was decided, or what stands against it


def judge(low: float | None, high: float | None, above: float | None = None, below: float | None = None) -> Verdict:
    """`holds` where the whole interval lies above (below) the bound, `fails` where all of it lies on the other side.

    Give one of the two bounds. Without an interval nothing is decided.
    """
    if (above is None) == (below is None):
        raise ValueError("give either above or below")
    if low is None or high is None:
        return "undecided"
    if above is not None:
        return "holds" if low > above else "fails" if high < above else "undecided"
    return "holds" if high < below else "fails" if low > below else "undecided"


@dataclass(frozen=True)
class StudyReport:
    """What `measure` found. The first table is the one that the command prints."""

    tables: tuple[Table, ...]
    plots: tuple[Plot, ...] = ()
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()  # on this measurement: data used, what could not be measured and why
    setup: Mapping[str, Any] = field(default_factory=dict)  # into provenance.json: batch, dtype, repeats, seeds


@dataclass(frozen=True)
class Runs:
    """Trained runs that a study needs: arms of a sweep, all of them unless named, and the sweep's seeds."""

    sweep: str
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()  # instead of the sweep's


@dataclass(frozen=True)
class StudyContext:
    """What a study may use. `options` holds only keys that the study declares."""

    scale: str
    directories: Mapping[str, Path] = field(default_factory=dict)  # sweep -> `runs/<sweep>-<scale>/`
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
class Study:
    """A file of experiments/ that holds `STUDY`. `options` are keys of the command line that only this study knows
    (`pos=FILE`), each with its help; every other `key=value` is a config value of the runs it needs.
    """

    name: str
    title: str
    question: str
    expected: str  # direction, said before anything was measured
    measure: Callable[[StudyContext], StudyReport]
    reference: str = ""  # where in the paper
    runs: tuple[Runs, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    paper: tuple[Table, ...] = ()  # the paper's numbers
    notes: tuple[str, ...] = ()  # what the paper leaves open and what was chosen here
    scales: tuple[str, ...] = SCALES  # where there is but one, `--scale` changes nothing
