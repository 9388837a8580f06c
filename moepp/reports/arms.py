"""Every sweep is an experiment that reports itself: its arms against its baseline, at the same seeds.

A file of experiments/ may choose arms and set the paper's scores beside them:

    EXPERIMENT = of_sweep("tau", PaperScores(...), name="table3", reference="Table 3", title=..., question=...)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moepp.records import read_json
from moepp.reports.answer import answer, exclude
from moepp.reports.comparison import ContrastFamily, Design, compare
from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.reports.paper import PaperScores
from moepp.reports.recipe import keys_of_interest
from moepp.reports.search_report import SearchReport
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.registration import judged
from moepp.sweeps.space import search_space
from moepp.sweeps.spec import Contrast, Exclusions, Primary, Scale, Sweep, Trend

TASKS = {  # whose words are flags of `reproduce` too
    "tasks": "downstream tasks on which every trial is scored: `paper`, or names",
    "tasks_dir": "folder of local task data",
    "limit": "examples of each task at most",
}


def of_sweep(sweep: str, paper: PaperScores | None = None, opening: str = "", **declared: Any) -> Experiment:
    """The experiment that a sweep is, by its name or the path of its file; with `paper` over the arms that it has.

    `declared` are fields of `Experiment` that differ; notes come before those of the sweep. `opening` is the contrast
    that the report begins with where it is not the sweep's primary one. Raises UsageError.
    """
    found = read_sweep(sweep)
    return _experiment(found, sweep, bool(search_space(found.space)), paper, declared, opening)


def of_records(directory: Path) -> Experiment:
    """The same from what the records of a sweep say, for when its file is not at hand."""
    plan = read_json(directory / "sweep.json")
    searched = any("point" in trial for trial in plan["trials"])
    contrasts = {name: Contrast(**sides) for name, sides in plan.get("contrasts", {}).items()}
    trend = Trend(**plan["trend"]) if plan.get("trend") else None
    sweep = Sweep(
        **{key: plan[key] for key in ("name", "question", "paper", "baseline") if key in plan},
        scales={plan["scale"]: Scale()},
        arms={trial["arm"]: [] for trial in plan["trials"] if "length" not in trial},
        contrasts=contrasts,
        trend=trend,
        primary=Primary(**plan["primary"]) if plan.get("primary") else None,
        exclusions=Exclusions(**plan.get("exclusions", {})),
        notes=plan.get("notes", []),
    )
    return _experiment(sweep, sweep.name, searched, None, {})


def _experiment(
    sweep: Sweep,
    word: str,
    searched: bool,
    paper: PaperScores | None,
    declared: Mapping[str, Any],
    opening: str = "",
) -> Experiment:
    about = {"name": sweep.name, "title": sweep.title, "question": sweep.question, "scales": tuple(sweep.scales)}
    about |= {"reference": sweep.paper}
    notes = (*declared.get("notes", ()), *sweep.notes)
    if searched:
        return Experiment(**about, measure=SearchReport(word), runs=(Runs(word),), notes=notes)
    arms = tuple(paper.rows if paper else sweep.arms)
    contrasts = {name: c for name, c in sweep.contrasts.items() if {*c.arms, *c.minus} <= set(arms)}
    design = Design(arms, contrasts, sweep.trend, paper, keys_of_interest(sweep))
    about |= {"paper": (paper.table(),) if paper else (), **declared, "notes": notes}
    chosen = {name: tuple(scale.arms) for name, scale in sweep.scales.items() if scale.arms}
    measure = ArmReport(word, design, sweep.primary, sweep.exclusions, chosen, _families(sweep), opening)
    return Experiment(**about, measure=measure, runs=(Runs(word, timed=True),), options=TASKS)


def _families(sweep: Sweep) -> dict[str, ContrastFamily]:
    """What each scale compares; a scale without the primary contrast has none."""
    found, primary = {}, sweep.primary
    for scale in sweep.scales if primary else ():
        if primary.contrast in {*sweep.arms_at(scale), *sweep.contrasts_at(scale)}:
            first, others = judged(sweep, scale)
            found[scale] = ContrastFamily(first, tuple(others.values()))
    return found


@dataclass(frozen=True)
class ArmReport:
    """`measure` of a sweep."""

    sweep: str  # `Runs.sweep`
    design: Design
    primary: Primary | None = None
    exclusions: Exclusions = field(default_factory=Exclusions)
    chosen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # scale -> its choice of arms
    families: Mapping[str, ContrastFamily] = field(default_factory=dict)  # scale -> all that its sweep compares
    opening: str = ""  # the contrast of the first line, where it is not the primary one

    def __call__(self, context: Context) -> Findings:
        """Raises UsageError when sweep and design do not fit."""
        from moepp.reports.sweep_report import findings, with_answer

        design, results = self._design_at(context.scale), context.results(self.sweep)
        kept, excluded = exclude(results, self.exclusions)
        comparison = compare(design, kept)
        whole = compare(design, results) if excluded else comparison
        found = answer(self.primary, comparison, whole, excluded, self.opening) if self.primary else None
        return with_answer(findings(comparison, found), found, results, self.primary, self.exclusions)

    def _design_at(self, scale: str) -> Design:
        arms = tuple(arm for arm in self.design.arms if arm in self.chosen.get(scale, self.design.arms))
        contrasts = {name: c for name, c in self.design.contrasts.items() if {*c.arms, *c.minus} <= set(arms)}
        return replace(self.design, arms=arms, contrasts=contrasts, family=self.families.get(scale))
