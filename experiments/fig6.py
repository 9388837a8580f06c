"""Does the gating residual make routing scores steadier?

Paper, Fig. 6 (1B/(16+4)E on WinoGrande): with the residual the two highest routing scores have a smaller variance and
the same mean and range. One seed, no numbers; read off the histograms the modes are .23 (with) and .27 (without) for
the highest score, .105 and .10 for the second. Expected here: the direction is open, for the residual adds
terms to the logits.
"""

from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.statistics.tables import Table

SWEEP, WITH, WITHOUT = "gating_residual", "moepp", "moepp_no_residual"
PAPER = {WITH: (0.23, 0.105), WITHOUT: (0.27, 0.10)}  # modes of the highest and the second score


def measure(context: Context) -> Findings:
    from moepp.routing.measure import score_distributions
    from moepp.routing.score_report import histogram_plot, layer_scores, score_claims, score_table

    scores, about = score_distributions(context, SWEEP, (WITH, WITHOUT), task="WinoGrande")
    tables = (score_table(scores, PAPER), layer_scores(scores))
    return Findings(tables, (histogram_plot(scores),), score_claims(scores, on=WITH, off=WITHOUT), (about,))


EXPERIMENT = Experiment(
    name="fig6",
    title="Routing scores with and without the gating residual",
    question="Does the gating residual make routing scores steadier?",
    expected="open: the paper finds a smaller variance at the same mean and range, in one pair of runs",
    measure=measure,
    reference="Fig. 6",
    runs=(Runs(SWEEP, (WITH, WITHOUT)),),
    of_routing=True,
    options={
        "tasks_dir": "folder with WinoGrande as JSONL(.gz) in the columns of lm-evaluation-harness",
        "limit": "examples of each group of texts",
    },
    paper=(
        Table("paper", "Modes read off the histograms, 1B/(16+4)E on WinoGrande.",
              ("arm", "highest score", "second score"), tuple((arm, *modes) for arm, modes in PAPER.items())),
    ),
    notes=(
        "Scores are the router's softmax over all experts (of normalised logits where logits_norm is set), before gates"
        " are formed.",
        "The highest minus the lowest score grows with the number of tokens; the test uses the percentiles 1 and 99.",
    ),
)  # fmt: skip
