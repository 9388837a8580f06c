"""What a sweep's report says: quality, effects, compute and speed, the noise floor, what is held equal."""

from dataclasses import replace

from moepp.reports import tables
from moepp.reports.answer import Answer
from moepp.reports.arm_runs import arm_runs, parent_metrics
from moepp.reports.comparison import Comparison
from moepp.reports.experiment import Findings
from moepp.reports.figures import figures
from moepp.reports.paper import PaperScores
from moepp.reports.provenance import disagreements
from moepp.reports.registration import deviations, registered, stamp, what_was_registered
from moepp.reports.report import bullets
from moepp.reports.results import SweepResults
from moepp.reports.tables import ALONE, CONFOUNDED, CORRECTED, UNSTABLE
from moepp.reports.task_tables import TaskTables, paper_accuracy, task_tables
from moepp.reports.verdict import held_equal, missing_runs, noise_floor, verdict
from moepp.statistics.tables import NONE, Table
from moepp.sweeps.spec import Exclusions, Primary

OVER_ROWS = "over all rows of its table"
OVER_CONTRASTS = "over all contrasts of the sweep but the primary one, which is judged alone"
HOW_TO_READ = f"""\
`±` is the half width of a 95 % t-interval over seeds, n the number of finished seeds. Losses are in nats per token,
lower is better. Differences are paired: both sides share the seed. `{ALONE}`: the interval of this difference
alone excludes 0. `{CORRECTED}`: it still differs at 5 % after Holm's correction {{family}};
only this counts as beyond noise. Where the records tell the error of the held-out text, its half width is in that of a
difference, as the root of the sum of squares. `{UNSTABLE}`: of an arm whose seeds scatter too unevenly for a
t-interval; p is then that of the sign test, and the typical seed is the median over seeds with an interval that any
distribution allows, at the level it attains. `{CONFOUNDED}`: the two sides differ in capacity, balance weight, warm-up,
rate or the like as well, which the sweep is not about. `{NONE}`: no value."""

SECOND = f"""\
The same differences in other measures. The training loss of the first epoch is the mean over its steps, of windows that
the model had not seen yet, the same for both sides; it counts how fast an arm learns and costs nothing. A mean of late
weights (`trainer.average_checkpoints`) loses less to the noise of the last steps. Neither decides anything here.
`{CORRECTED}` is here after Holm's correction over the arms of a measure."""

EFFECTIVE = """\
How much longer the baseline trains until it ends as low as the arm: in tokens, and, times the arm's training speed over
the baseline's, in time (whose interval leaves out the noise of timing). Above 1 the arm is ahead. Runs of the baseline
to {lengths} times its tokens stand for it, each with its schedule to its own end; between two of them the loss is taken
for a straight line in the logarithm of the tokens, and beyond them nothing is said. The interval holds the lengths that
a paired t-test over seeds cannot tell from the arm, `open` where these reach an end; `>` and `<` are bounds that the
longest or shortest run supports beyond noise. In equal time: the arm's loss minus that of the baseline when it has
trained for as long."""

ONE_LENGTH = """\
Not known: the baseline has finished runs of one length. `lengths: [0.75, 1, 1.25, 1.5]` in the sweep's file (or in one
of its scales) trains the others; a loss read off an unfinished schedule would flatter the arms."""

BESIDE = """\
The paper's columns are of its {size} model, one seed per row at another scale: its scores and our losses share a
direction, not a unit. Its speed-up is vanilla MoE's expert forward time over the arm's; batch, precision and what
exactly is timed are not stated."""

MEASURED = "Activated parameters and FLOPs are those of the FFN experts that tokens reached, not of the nominal top-k."


def findings(comparison: Comparison, answer: Answer | None = None) -> Findings:
    """Everything that the report of a comparison says, but for the answer's first line: that is `with_answer`'s."""
    results, paper = comparison.results, comparison.design.paper
    tasks = task_tables(results, comparison.design.arms)
    how_to_read = HOW_TO_READ.format(family=OVER_CONTRASTS if comparison.design.family else OVER_ROWS)
    beside = [BESIDE.format(size=paper.size.upper())] if paper else []
    sections = {
        "Quality": (tables.quality_table(comparison), how_to_read, *beside),
        **({"Second measures": (tables.second_table(comparison), SECOND)} if comparison.second else {}),
        **({"Effects": (tables.effects_table(comparison),)} if comparison.design.contrasts else {}),
        **({"Downstream tasks": _tasks(tasks, paper)} if tasks else {}),
        "Compute and speed": (tables.cost_table(comparison), _timing(results)),
        "Effective speed-up": _effective(comparison),
        "Noise floor": (tables.noise_table(comparison), bullets(noise_floor(comparison))),
        "What is held equal, and what is not": (
            bullets([*held_equal(comparison), *disagreements(results)]),
            tables.recipe_table(comparison),
            tables.budget_table(comparison),
            MEASURED,
        ),
        **({"Missing runs": (bullets(missing),)} if (missing := missing_runs(comparison)) else {}),
    }
    return Findings(
        figures=figures(comparison),
        verdict=tuple(verdict(comparison, answer and answer.secondary)),
        sections=sections,
        summary=tables.overview(comparison),
        data=(tables.full_table(comparison), *((tasks.full,) if tasks else ())),
        metrics=parent_metrics(comparison),
        arm_runs=arm_runs(comparison),
        setup={"timing": results.timing_setup, **({"tasks": tasks.asked} if tasks else {})},
    )


def with_answer(
    found: Findings, answer: Answer | None, results: SweepResults, primary: Primary | None, exclusions: Exclusions
) -> Findings:
    """The findings that begin with the answer, and say what was registered. `results` are those of all runs."""
    plan, sections = registered(results), {}
    if plan:
        said = ("What deviates:", bullets(deviations(plan, results, primary, exclusions)))
        sections["Registration"] = (bullets(what_was_registered(plan)), *said)
    if answer and answer.excluded:
        reasons = [f"{arm}, seed {seed}: {why}." for (arm, seed), why in answer.excluded.items()]
        sections["Excluded runs"] = (bullets(reasons),)
    if answer is None:
        return replace(found, sections={**sections, **found.sections})
    return replace(found, answer=f"{answer.first} {stamp(plan)}", sections={**sections, **found.sections})


def _tasks(tasks: TaskTables, paper: PaperScores | None) -> tuple[str | Table, ...]:
    printed = paper and paper_accuracy(paper, tasks.tasks)
    return (*tasks.section, printed) if printed else tasks.section


def _effective(comparison: Comparison) -> tuple[str | Table, ...]:
    lengths = comparison.results.at_lengths(comparison.results.baseline)
    if len(lengths) < 2:
        return (ONE_LENGTH,)
    said = EFFECTIVE.format(lengths=", ".join(f"{length:g}" for length in lengths))
    return tables.effective_table(comparison), said


def _timing(results: SweepResults) -> str:
    if not results.expert_times:
        return "No `timing.json` beside the sweep: expert forward times, speed-ups and training speeds are not shown."
    setup = ", ".join(f"{key} {value}" for key, value in results.timing_setup.items() if key != "runs")
    return (
        "Expert forward: sum over layers; training: forward and backward pass of a device's batch, without the"
        f" optimizer. Both are medians, of all arms interleaved in one process after training ({setup}). Speed-up:"
        f" {results.baseline}'s time over the arm's under the same routing. Ideal: inverse ratio of the hidden FFN"
        " units that a token passes. Over seeds: the same ratio as each pair of runs measured it when it ended,"
        " each in a process of its own, beside whatever else the machine did; geometric mean and 95 % t-interval of its"
        " logarithm. The paper's FFN shares are derived from its Eq. 8."
    )
