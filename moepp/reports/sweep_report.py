"""What a sweep's report says: quality, effects, compute and speed, the noise floor, what is held equal."""

from moepp.reports import tables
from moepp.reports.comparison import Comparison
from moepp.reports.experiment import Findings
from moepp.reports.figures import figures
from moepp.reports.paper import PaperScores
from moepp.reports.provenance import disagreements
from moepp.reports.report import bullets
from moepp.reports.results import SweepResults
from moepp.reports.tables import ALONE, CORRECTED
from moepp.reports.task_tables import TaskTables, paper_accuracy, task_tables
from moepp.reports.verdict import held_equal, missing_runs, noise_floor, verdict
from moepp.statistics.tables import NONE, Table

HOW_TO_READ = f"""\
`±` is the half width of a 95 % t-interval over seeds, n the number of finished seeds. Losses are in nats per token,
lower is better. Differences are paired: both sides share the seed. `{ALONE}`: the interval of this difference
alone excludes 0. `{CORRECTED}`: it still differs at 5 % after Holm's correction over all rows of its table;
only this counts as beyond noise. `{NONE}`: no value."""

EFFECTIVE = """\
How much longer the baseline trains until its validation loss is as low as the arm's final one: in tokens (geometric
mean over paired seeds, with its 95 % interval), times the arm's training speed over the baseline's, is the effective
speed-up in time. Above 1 the arm is ahead. `≥`: in some seed the baseline never got there, and its end is taken;
`≤`: it was there by its first validation. The baseline's earlier losses come from a learning rate not yet decayed, so
these numbers flatter the arm. A baseline's curve has {validations} validations, and between two of them the loss is
taken for a straight line."""

BESIDE = """\
The paper's columns are of its {size} model, one seed per row at another scale: its scores and our losses share a
direction, not a unit. Its speed-up is vanilla MoE's expert forward time over the arm's; batch, precision and what
exactly is timed are not stated."""

MEASURED = "Activated parameters and FLOPs are those of the FFN experts that tokens reached, not of the nominal top-k."


def findings(comparison: Comparison) -> Findings:
    """Everything that the report of a comparison says."""
    results, paper = comparison.results, comparison.design.paper
    tasks = task_tables(results, comparison.design.arms)
    beside = [BESIDE.format(size=paper.size.upper())] if paper else []
    sections = {
        "Quality": (tables.quality_table(comparison), HOW_TO_READ, *beside),
        **({"Effects": (tables.effects_table(comparison),)} if comparison.design.contrasts else {}),
        **({"Downstream tasks": _tasks(tasks, paper)} if tasks else {}),
        "Compute and speed": (tables.cost_table(comparison), _timing(results)),
        "Effective speed-up": (tables.effective_table(comparison), _effective(results)),
        "Noise floor": (bullets(noise_floor(comparison)),),
        "What is held equal, and what is not": (
            bullets([*held_equal(comparison), *disagreements(results)]),
            tables.budget_table(comparison),
            MEASURED,
        ),
        **({"Missing runs": (bullets(missing),)} if (missing := missing_runs(comparison)) else {}),
    }
    return Findings(
        figures=figures(comparison),
        verdict=tuple(verdict(comparison)),
        sections=sections,
        summary=tables.overview(comparison),
        data=(tables.full_table(comparison), *((tasks.full,) if tasks else ())),
        metrics=_metrics(comparison),
        setup={"timing": results.timing_setup, **({"tasks": tasks.asked} if tasks else {})},
    )


def _metrics(comparison: Comparison) -> dict[str, float]:
    """The few numbers worth showing on a tracker's parent run."""
    found: dict[str, float] = {}
    for arm in comparison.design.arms:
        difference = comparison.differences.get(arm)
        values = {
            "val_loss": comparison.results.mean(arm, "val_loss"),
            "val_loss_minus_baseline": difference and difference.estimate.mean,
            "val_loss_minus_baseline_half_width": difference and difference.estimate.half_width,
        }
        found |= {f"report/{arm}/{name}": v for name, v in values.items() if v is not None}
    return found


def _tasks(tasks: TaskTables, paper: PaperScores | None) -> tuple[str | Table, ...]:
    printed = paper and paper_accuracy(paper, tasks.tasks)
    return (*tasks.section, printed) if printed else tasks.section


def _effective(results: SweepResults) -> str:
    counts = sorted({len(run.curve) for run in results.runs.get(results.baseline, {}).values()})
    fewest_and_most = dict.fromkeys([*counts[:1], *counts[-1:]])
    return EFFECTIVE.format(validations=" to ".join(map(str, fewest_and_most)) or "no")


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
