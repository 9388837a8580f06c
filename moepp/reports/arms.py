"""Every sweep is an experiment that reports itself: its arms against its baseline, at the same seeds.

A file of experiments/ may choose arms and set the paper's scores beside them:

    EXPERIMENT = of_sweep("tau", PaperScores(...), name="table3", reference="Table 3", title=..., question=...)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.records import read_json
from moepp.reports.comparison import Design, compare
from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.reports.paper import PaperScores
from moepp.reports.search_report import SearchReport
from moepp.sweeps.space import search_space
from moepp.sweeps.spec import Contrast, Scale, Sweep, Trend, read_sweep

TASKS = {  # whose words are flags of `reproduce` too
    "tasks": "downstream tasks on which every trial is scored: `paper`, or names",
    "tasks_dir": "folder of local task data",
    "limit": "examples of each task at most",
}


def of_sweep(sweep: str, paper: PaperScores | None = None, **declared: Any) -> Experiment:
    """The experiment that a sweep is, by its name or the path of its file; with `paper` over the arms that it has.

    `declared` are fields of `Experiment` that differ; notes come before those of the sweep. Raises UsageError.
    """
    found = read_sweep(sweep)
    return _experiment(found, sweep, bool(search_space(found.space)), paper, declared)


def of_records(directory: Path) -> Experiment:
    """The same from what the records of a sweep say, for when its file is not at hand."""
    plan = read_json(directory / "sweep.json")
    searched = any("point" in trial for trial in plan["trials"])
    contrasts = {name: Contrast(**sides) for name, sides in plan.get("contrasts", {}).items()}
    trend = Trend(**plan["trend"]) if plan.get("trend") else None
    sweep = Sweep(
        **{key: plan[key] for key in ("name", "question", "paper", "baseline") if key in plan},
        scales={plan["scale"]: Scale()},
        arms={trial["arm"]: [] for trial in plan["trials"]},
        contrasts=contrasts,
        trend=trend,
        notes=plan.get("notes", []),
    )
    return _experiment(sweep, sweep.name, searched, None, {})


def _experiment(
    sweep: Sweep, word: str, searched: bool, paper: PaperScores | None, declared: Mapping[str, Any]
) -> Experiment:
    about = {"name": sweep.name, "title": sweep.title, "question": sweep.question, "scales": tuple(sweep.scales)}
    about |= {"reference": sweep.paper}
    notes = (*declared.get("notes", ()), *sweep.notes)
    if searched:
        return Experiment(**about, measure=SearchReport(word), runs=(Runs(word),), notes=notes)
    arms = tuple(paper.rows if paper else sweep.arms)
    contrasts = {name: c for name, c in sweep.contrasts.items() if {*c.arms, *c.minus} <= set(arms)}
    design = Design(arms, contrasts, sweep.trend, paper)
    about |= {"paper": (paper.table(),) if paper else (), **declared, "notes": notes}
    return Experiment(**about, measure=ArmReport(word, design), runs=(Runs(word, timed=True),), options=TASKS)


@dataclass(frozen=True)
class ArmReport:
    """`measure` of a sweep."""

    sweep: str  # `Runs.sweep`
    design: Design

    def __call__(self, context: Context) -> Findings:
        """Raises UsageError when sweep and design do not fit."""
        from moepp.reports.sweep_report import findings

        return findings(compare(self.design, context.results(self.sweep)))
