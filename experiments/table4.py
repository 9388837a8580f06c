"""Does the released checkpoint score what the paper reports?

Paper, Table 4 (MoE++ 7B/(16+4)E after 1T tokens, beside other open models): average 56.2 over eleven tasks. Expected:
acc or acc_norm of each task within two standard errors of the printed score; harness versions differ, so single tasks
may not agree.
"""

from moepp.analysis.study import Claim, Study, StudyContext, StudyReport, Table
from moepp.errors import UsageError

TASKS = (
    "sciq", "piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag", "logiqa", "boolq", "lambada_openai",
    "nq_open", "mmlu",
)  # fmt: skip
MOEPP = "MoE++ 7B/(16+4)E"
PUBLISHED = {  # model -> activated / total parameters, scores in %, None where not reported
    "LLaMA2-7B": ("7/7", (93.7, 78.1, 69.3, 76.4, 53.0, 78.6, 30.7, 82.1, 73.9, 28.8, 46.6)),
    "OPT-1.3B": ("1.3/1.3", (84.3, 71.7, 59.6, 57.0, 29.7, 54.5, 26.9, 57.5, 58.0, 6.9, 24.7)),
    "Pythia-1.4B": ("1.4/1.4", (86.4, 70.9, 57.4, 60.7, 31.2, 53.0, 27.3, 57.4, 61.6, 6.2, 25.7)),
    "TinyLlama-1.1B": ("1.1/1.1", (88.9, 73.3, 58.8, 55.3, 30.1, 60.3, 26.3, 60.9, 58.8, 12.1, 25.5)),
    "Sheared-LLaMA-1.3B": ("1.3/1.3", (87.3, 73.4, 57.9, 61.5, 33.5, 60.7, 26.9, 64.0, 61.0, 9.6, 25.7)),
    "OPT-2.7B": ("2.7/2.7", (85.8, 73.7, 60.8, 60.8, 34.0, 61.5, 26.0, 63.4, 63.6, 10.1, 25.9)),
    "Pythia-2.8B": ("2.8/2.8", (88.3, 74.0, 59.7, 64.4, 36.4, 60.8, 28.0, 66.0, 64.7, 9.0, 26.9)),
    "INCITE-Base-3B": ("3/3", (90.7, 74.6, 63.5, 67.7, 40.2, 64.8, 27.7, 65.9, 65.3, 14.9, 27.0)),
    "Open-LLaMA-3B-v1": ("3/3", (91.3, 73.7, 61.5, 67.6, 39.6, 62.6, 28.4, 70.0, 65.4, 18.6, 27.0)),
    "Open-LLaMA-3B-v2": ("3/3", (91.8, 76.2, 63.5, 66.5, 39.0, 67.6, 28.1, 69.6, 66.5, 17.1, 26.9)),
    "Sheared-LLaMA-2.7B": ("2.7/2.7", (90.8, 75.8, 64.2, 67.0, 41.2, 70.8, 28.9, 73.7, 68.4, 16.5, 26.4)),
    "OpenMoE-8B/32E": ("2.1/8", (None, 74.2, 60.3, 64.1, 30.3, 45.5, None, 61.2, None, None, None)),
    "LLaMA-MoE-3.0B": ("3.0/7", (89.9, 77.5, 63.6, 66.8, 40.9, 70.8, 30.6, 71.9, 66.6, 17.0, 26.8)),
    MOEPP: ("<=1.2/7", (89.7, 77.6, 63.1, 66.5, 42.3, 72.3, 28.4, 68.3, 67.4, 18.1, 24.6)),
}
AVERAGES = {
    "LLaMA2-7B": 64.7, "OPT-1.3B": 48.3, "Pythia-1.4B": 48.9, "TinyLlama-1.1B": 50.0, "Sheared-LLaMA-1.3B": 51.0,
    "OPT-2.7B": 51.4, "Pythia-2.8B": 52.6, "INCITE-Base-3B": 54.8, "Open-LLaMA-3B-v1": 55.1, "Open-LLaMA-3B-v2": 55.7,
    "Sheared-LLaMA-2.7B": 56.7, "OpenMoE-8B/32E": None, "LLaMA-MoE-3.0B": 56.6, MOEPP: 56.2,
}  # fmt: skip
ERRORS = 2  # standard errors within which a score counts as the paper's


def measure(context: StudyContext) -> StudyReport:
    weights = context.path("weights")
    if weights is None:
        raise UsageError("table4 scores the released checkpoint: give its folder, `reproduce table4 weights=DIR`")
    from moepp.evaluation.commands import scored

    options = context.options
    limit = options.get("limit")
    if limit is not None and not limit.isdecimal():
        raise UsageError(f"limit={limit} must be a whole number of examples")
    results = scored(weights, options.get("tasks", "paper"), context.path("tasks_dir"), int(limit) if limit else None)
    paper = dict(zip(TASKS, PUBLISHED[MOEPP][1], strict=True))
    rows, claims = [], []
    for result in results:
        task, scores = result.about.task, result.scores()
        printed = paper.get(task)
        values = {name: scores[name] for name in ("acc", "acc_norm", "exact_match") if name in scores}
        bits = scores["gold_bits_per_byte"]
        rows.append((
            task, result.about.shots, len(result.examples), result.about.cut, printed,
            *(100 * values[name].value if name in values else None for name in ("acc", "acc_norm", "exact_match")),
            100 * (values[result.accuracy_metric].error or 0.0), bits.value,
        ))  # fmt: skip
        if printed is not None:
            claims += [_claim(task, name, score, printed) for name, score in values.items()]
    columns = ("task", "shots", "n", "prompts cut", "paper, %", "acc, %", "acc_norm, %", "exact match, %",
               "standard error", "gold bits per byte")  # fmt: skip
    table = Table("scores", "The checkpoint's scores, measured here.", columns, tuple(rows))
    setup = {"weights": str(weights), "tasks": {result.about.task: result.about.data for result in results}}
    return StudyReport((table,), claims=tuple(claims), setup=setup)


def _claim(task, name, score, printed) -> Claim:
    """`holds` where the printed score lies within the interval of ours, which holds sampling noise alone."""
    effect, half = 100 * score.value - printed, 100 * ERRORS * (score.error or 0.0)
    verdict = "undecided" if score.error is None else "holds" if abs(effect) <= half else "fails"
    statement = f"{task}: {name} is the printed score, within {ERRORS} standard errors"
    return Claim(statement, verdict, effect, effect - half, effect + half, "points", paper=f"{printed}")


STUDY = Study(
    name="table4",
    title="The released checkpoint on the paper's tasks",
    question="Does the released checkpoint score what the paper reports?",
    expected="every score within sampling noise of the printed one, for acc or for acc_norm.",
    measure=measure,
    reference="Table 4",
    options={
        "weights": "folder of the released checkpoint with its tokenizer",
        "tasks": "the paper's eleven unless named",
        "tasks_dir": "local task data",
        "limit": "examples per task",
    },
    paper=(
        Table(
            "published",
            "Scores in % as the paper prints them, taken over and not measured here.",
            ("model (published)", "B activated/total", *TASKS, "average"),
            tuple((model, size, *scores, AVERAGES[model]) for model, (size, scores) in PUBLISHED.items()),
        ),
    ),
    notes=(
        "The paper states neither the harness's version nor whether acc or acc_norm is printed; both are shown.",
        "Which LAMBADA and which form of MMLU the paper scored is not stated; here lambada_openai and letters.",
        "Local task data without a training file takes the examples of the prompts from the evaluated split.",
    ),
    scales=("paper",),
)
