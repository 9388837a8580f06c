"""Table 6 (1B/(16+4)E, tau 0.75, 100B tokens, one seed): MoE++ with and without the gating residual.

Vanilla MoE's row is that of Table 5. Expected here: a small gain in loss and no measurable change in speed.
"""

from moepp.reports.arms import of_sweep
from moepp.reports.paper import PaperRow, PaperScores

from .table5 import PAPER as TABLE5
from .table5 import TASKS

PAPER = {
    "vanilla": TABLE5["vanilla"],
    "no_residual": PaperRow((69.0, 51.3, 50.8, 44.1, 27.5, 46.2, 43.8), 12 / 16),
    "zero+copy+constant": TABLE5["zero+copy+constant"],
}

EXPERIMENT = of_sweep(
    "zero_computation_experts",
    PaperScores(TASKS, "BoolQ", {"1b": PAPER}, "1b"),
    opening="the gating residual",
    name="table6",
    title="The gating residual, on and off",
    question="Does the gating residual help?",
    reference="Table 6",
    notes=(
        "The paper does not say whether its vanilla baseline carries the gating residual; its row equals the plain MoE"
        " of its Table 3, and ours has none.",
    ),
)
