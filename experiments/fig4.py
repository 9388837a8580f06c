"""Which experts do the tokens of different tasks choose, layer by layer?

Paper, Fig. 4 (layer 12 of the 7B/(16+4)E) and A to E (all layers): 1.49 to 1.59 FFN experts per token by task, the rest
shared by constant, copy and zero experts. Expected here: tasks differ by less than 0.2 FFN experts per token; a single
zero expert takes more slots than a single copy or constant expert, the constant pair more than the zero expert.
"""

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.statistics.tables import Table

# Fig. 4: FFN experts per token as printed; shares of slots read off the bars, within 0.004.
PAPER = {
    "SciQ": (1.486, 0.744, 0.119, 0.049, 0.094),
    "PIQA": (1.588, 0.795, 0.069, 0.034, 0.108),
    "WinoGrande": (1.582, 0.791, 0.092, 0.042, 0.083),
    "ARC-E": (1.569, 0.784, 0.081, 0.034, 0.108),
    "ARC-C": (1.515, 0.758, 0.116, 0.052, 0.079),
    "HellaSwag": (1.590, 0.795, 0.105, 0.045, 0.060),
    "LogiQA": (1.533, 0.766, 0.116, 0.056, 0.063),
    "BoolQ": (1.553, 0.777, 0.107, 0.049, 0.074),
    "LAMBADA": (1.564, 0.784, 0.105, 0.045, 0.070),
    "NQ": (1.519, 0.760, 0.123, 0.042, 0.079),
    "MMLU": (1.499, 0.749, 0.128, 0.056, 0.070),
}
SWEEP, ARM = "gating_residual", "moepp"
OPTIONS = {
    "tasks_dir": "folder of the paper's tasks as JSONL(.gz) in the columns of lm-evaluation-harness",
    "limit": "examples of each task",
    "subject_limit": "examples of each subject of MMLU, which `limit` leaves alone",
    "weights": "folder of a released checkpoint in place of trained runs",
}


def measure(context: Context) -> Findings:
    from moepp.routing.load_report import load_claims, load_plots, load_table
    from moepp.routing.measure import expert_loads
    from moepp.routing.topic_report import topic_plots, topic_tables

    loads, about = expert_loads(context, SWEEP, ARM)
    paper = {task: numbers[0] for task, numbers in PAPER.items()} if context.path("tasks_dir") else {}
    topics = topic_tables(loads)
    plots = (*load_plots(loads), *topic_plots(loads, topics))
    return Findings((load_table(loads, paper), *topics), plots, load_claims(loads), (about,))


EXPERIMENT = Experiment(
    name="fig4",
    title="Expert load by task and layer",
    question="Which experts do the tokens of different tasks choose, layer by layer?",
    expected="tasks differ by less than 0.2 FFN experts per token; one zero expert takes more slots than one copy or"
    " constant expert, and fewer than the constant experts together",
    measure=measure,
    reference="Fig. 4, A-E",
    runs=(Runs(SWEEP, (ARM,)),),
    of_routing=True,
    options=OPTIONS,
    paper=(
        Table("paper", "Layer 12 of the 7B/(16+4)E, tau 0.75.",
              ("task", "FFN experts per token", "FFN share", "constant share", "copy share", "zero share"),
              tuple((task, *numbers) for task, numbers in PAPER.items())),
    ),
    notes=(
        "A share is of all routed slots (two a token), so the bars of a task sum to 1.",
        "The middle layer (layer L / 2 of L) stands for the paper's layer 12 of 24; the figures show every layer.",
        "The paper does not say what text its figure counts; here it is the question and its gold answer.",
        "Topics are the four areas of MMLU's 57 subjects. Every subject weighs alike where it has examples enough.",
    ),
)  # fmt: skip
