"""Writes what an experiment found: report.md, table.csv, figures with their data, provenance.json.

No clock and no randomness: the same records give the same bytes.
"""

import csv
import io
import json
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from moepp.records import write_text
from moepp.reports import figures, tables
from moepp.reports.comparison import Comparison, compare
from moepp.reports.experiment import Experiment
from moepp.reports.rerun import reproduce_command
from moepp.reports.results import Run, SweepResults
from moepp.reports.task_tables import TaskTables, paper_accuracy, task_tables
from moepp.reports.verdict import held_equal, missing_runs, noise_floor, verdict

SAME_FOR_ALL = ("git", "versions", "hardware", "data")  # provenance that all runs of one table should share
HOW_TO_READ = f"""\
`±` is the half width of a 95 % t-interval over seeds, n the number of finished seeds. Losses are in nats per token,
lower is better. Differences are paired: both sides share the seed. `{tables.ALONE}`: the interval of this difference
alone excludes 0. `{tables.CORRECTED}`: it still differs at 5 % after Holm's correction over all rows of its table;
only this counts as beyond noise. `{tables.NONE}`: no value."""

EFFECTIVE = """\
How much longer the baseline trains until its validation loss is as low as the arm's final one: in tokens (geometric
mean over paired seeds, with its 95 % interval), times the arm's training speed over the baseline's, is the effective
speed-up in time. Above 1 the arm is ahead. `≥`: in some seed the baseline never got there, and its end is taken;
`≤`: it was there by its first validation. The baseline's earlier losses come from a learning rate not yet decayed, so
these numbers flatter the arm. A baseline's curve has {validations} validations, and between two of them the loss is
taken for a straight line."""

MEASURED = "Activated parameters and FLOPs are those of the FFN experts that tokens reached, not of the nominal top-k."


def write_report(experiment: Experiment, results: SweepResults, out: Path) -> list[Path]:
    """Fills `out` and returns the files, report.md first. Raises UsageError when sweep and experiment do not fit."""
    comparison, tasks = compare(experiment, results), task_tables(results, experiment.arms)
    out.mkdir(parents=True, exist_ok=True)
    for name, suffix in product(figures.FIGURES, (".svg", ".png", ".csv")):
        (out / f"{name}{suffix}").unlink(missing_ok=True)  # an earlier report may have had a figure that this one lacks
    (out / "tasks.csv").unlink(missing_ok=True)
    drawn = figures.draw(comparison, out)
    provenance = provenance_of(experiment, results) | ({"tasks": tasks.asked} if tasks else {})
    texts = {
        "report.md": _report(comparison, tasks, drawn),
        "table.csv": _csv(tables.csv_table(comparison)),
        **({"tasks.csv": _csv(tasks.csv)} if tasks else {}),
        "provenance.json": json.dumps(provenance, indent=1) + "\n",
        **{f"{figure.name}.csv": _csv(figure.rows) for figure in drawn},
    }
    for name, text in texts.items():
        write_text(out / name, text)
    images = [f"{figure.name}{suffix}" for figure in drawn for suffix in (".svg", ".png")]
    return [out / name for name in (*texts, *images)]


def provenance_of(experiment: Experiment, results: SweepResults) -> dict[str, Any]:
    """Where the numbers come from. A section on which runs disagree is a list of its values, each with its runs."""
    runs = _runs(experiment, results)
    return {
        "command": _command(experiment, results),
        "sweep": results.name,
        "scale": results.scale,
        "first_run_began": _utc(min(run.first_ms for run in runs)),
        "last_run_ended": _utc(max(run.last_ms for run in runs)),
        **{section: _agreed(runs, section) for section in SAME_FOR_ALL},
        "timing": results.timing_setup,
        "runs": [{"arm": run.arm, "seed": run.seed, "record": run.path.name} for run in runs],
        "missing": missing_runs(experiment, results),
    }


def report_metrics(comparison: Comparison) -> dict[str, float]:
    """The few numbers worth showing on a tracker's parent run."""
    found: dict[str, float] = {}
    for arm in comparison.experiment.arms:
        difference = comparison.differences.get(arm)
        values = {
            "val_loss": comparison.results.mean(arm, "val_loss"),
            "val_loss_minus_baseline": difference and difference.estimate.mean,
            "val_loss_minus_baseline_half_width": difference and difference.estimate.half_width,
        }
        found |= {f"report/{arm}/{name}": v for name, v in values.items() if v is not None}
    return found


def report_note(comparison: Comparison) -> str:
    """The short report for a tracker's page, in markdown: question, verdict, quality; the rest is in report.md."""
    experiment, results = comparison.experiment, comparison.results
    table = tables.markdown(tables.quality_table(comparison))
    made = f"Made by `{_command(experiment, results)}`; the whole report is the artifact `{experiment.name}/report.md`."
    return "\n\n".join([f"**{experiment.question}**", table, _bullets(verdict(comparison)), HOW_TO_READ, made])


def _report(comparison: Comparison, tasks: TaskTables | None, drawn: list[figures.Drawn]) -> str:
    experiment, results = comparison.experiment, comparison.results
    seeds = sorted({run.seed for run in _runs(experiment, results)})
    beside = f" Beside the paper's {experiment.reference} (MoE++, arXiv 2410.07348)" if experiment.paper else ""
    beside += f", its {experiment.paper_size.upper()} model." if experiment.paper else ""
    about = [
        f"**{experiment.question}**{beside}",
        f"Sweep `{results.name}`, scale `{results.scale}`, seeds {', '.join(map(str, seeds))},"
        f" baseline `{results.baseline}`. Made by `{_command(experiment, results)}`.",
        f"Hardware: {_hardware(_runs(experiment, results))}.",
    ]
    equal = _bullets([*held_equal(comparison), *_disagreements(experiment, results)])
    budgets = tables.markdown(tables.budget_table(comparison))
    sections = {
        "Verdict": _bullets(verdict(comparison)),
        "Quality": f"{tables.markdown(tables.quality_table(comparison))}\n\n{HOW_TO_READ}",
        "Effects": tables.markdown(tables.effects_table(comparison)),
        **({"Downstream tasks": _tasks(tasks, experiment)} if tasks else {}),
        "Compute and speed": f"{tables.markdown(tables.cost_table(comparison))}\n\n{_timing(results)}",
        "Effective speed-up": f"{tables.markdown(tables.effective_table(comparison))}\n\n{_effective(results)}",
        "Figures": "\n\n".join(f"![{f.caption}]({f.name}.svg)\n\n{f.caption} [Data]({f.name}.csv)." for f in drawn),
        "Noise floor": _bullets(noise_floor(comparison)),
        "What is held equal, and what is not": f"{equal}\n\n{budgets}\n\n{MEASURED}",
        **({"The paper's numbers": _paper(experiment)} if experiment.paper else {}),
        ("What the paper leaves open" if experiment.paper else "Notes"): _bullets(experiment.notes),
    }
    if missing := missing_runs(experiment, results):
        sections["Missing runs"] = _bullets(missing)
    body = [f"# {experiment.title}", *about, *(f"## {title}\n\n{text}" for title, text in sections.items())]
    return "\n\n".join(body) + "\n"


def _effective(results: SweepResults) -> str:
    counts = sorted({len(run.curve) for run in results.runs.get(results.baseline, {}).values()})
    fewest_and_most = dict.fromkeys([*counts[:1], *counts[-1:]])
    return EFFECTIVE.format(validations=" to ".join(map(str, fewest_and_most)) or "no")


def _paper(experiment: Experiment) -> str:
    said = "Scores in %, as printed; averages are over these tasks. FFN shares follow from its Eq. 8."
    if len(experiment.paper_sizes) > 1:
        said += f" The {experiment.paper_size.upper()} rows are those beside ours."
    return f"{said}\n\n{tables.markdown(tables.paper_table(experiment))}"


def _tasks(tasks: TaskTables, experiment: Experiment) -> str:
    paper = paper_accuracy(experiment, tasks.tasks)
    if not paper:
        return tasks.text
    return f"{tasks.text}\n\nThe paper's, of its {experiment.paper_size.upper()} model:\n\n{tables.markdown(paper)}"


def _timing(results: SweepResults) -> str:
    if not results.expert_times:
        return "No `timing.json` beside the sweep: expert forward times, speed-ups and training speeds are not shown."
    setup = ", ".join(f"{key} {value}" for key, value in results.timing_setup.items() if key != "runs")
    return (
        "Expert forward: sum over layers; training: forward and backward pass of a device's batch, without the"
        f" optimizer. Both are medians, of all arms interleaved in one process after training ({setup}). Speed-up:"
        f" {results.baseline}'s time over the arm's under the same routing. Ideal: inverse ratio of the hidden FFN"
        " units that a token passes. The paper's FFN shares are derived from its Eq. 8."
    )


def _disagreements(experiment: Experiment, results: SweepResults) -> list[str]:
    runs = _runs(experiment, results)
    differing = [section for section in SAME_FOR_ALL if isinstance(_agreed(runs, section), list)]
    said = [f"The runs differ in {', '.join(differing)}: see provenance.json."] if differing else []
    dirty = sum(bool(run.provenance.get("git", {}).get("dirty")) for run in runs)
    return [*said, f"{dirty} of {len(runs)} runs were made with uncommitted changes."] if dirty else said


def _hardware(runs: list[Run]) -> str:
    hardware = _agreed(runs, "hardware")
    if not isinstance(hardware, dict):
        return "see provenance.json"
    return ", ".join(f"{name} {value}" for name, value in hardware.items() if value)


def _agreed(runs: list[Run], section: str) -> Any:
    values: dict[str, list[str]] = {}
    for run in runs:
        key = json.dumps(run.provenance.get(section), sort_keys=True)
        values.setdefault(key, []).append(f"{run.arm}, seed {run.seed}")
    if len(values) == 1:
        return json.loads(next(iter(values)))
    return [{"value": json.loads(value), "runs": names} for value, names in values.items()]


def _runs(experiment: Experiment, results: SweepResults) -> list[Run]:
    return [results.runs[arm][seed] for arm in experiment.arms for seed in sorted(results.runs.get(arm, {}))]


def _command(experiment: Experiment, results: SweepResults) -> str:
    return reproduce_command(experiment.name, results.scale, results.overrides, results.seeds, results.scored)


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _bullets(lines: list[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _csv(rows: tables.Rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
