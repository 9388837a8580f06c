"""Table 5 (1B/(16+4)E, tau 0.75, 100B tokens, one seed): all on/off combinations of zero, copy and constant experts.

Expected here: constant helps most, zero least, and every arm with zero-computation experts is faster than vanilla MoE;
differences in loss may be within noise.
"""

from moepp.reports.arms import of_sweep
from moepp.reports.paper import PaperRow, PaperScores

from .table3 import PAPER as TABLE3

FIRST, LAST = (TABLE3["1b"][arm].expert_forward_ms for arm in ("vanilla", "tau_0.75"))  # the same two models
TASKS = ("PIQA", "WinoGrande", "ARC-E", "HellaSwag", "LogiQA", "BoolQ", "LAMBADA")
# Task scores in %. FFN share by Eq. 8: tau * N_FFN = 12 against 1 zero, 1 copy and 2 constant experts where present.
PAPER = {
    "vanilla": PaperRow((68.4, 54.2, 48.9, 43.7, 27.5, 41.2, 42.5), 1.0, FIRST),
    "zero": PaperRow((68.4, 52.2, 48.7, 44.0, 28.3, 45.7, 42.0), 12 / 13),
    "copy": PaperRow((69.4, 52.1, 50.0, 44.0, 27.7, 45.1, 42.3), 12 / 13),
    "constant": PaperRow((68.6, 51.3, 49.6, 44.4, 28.9, 46.4, 42.4), 12 / 14),
    "zero+copy": PaperRow((68.6, 52.6, 49.2, 44.1, 28.1, 45.8, 41.8), 12 / 14),
    "zero+constant": PaperRow((67.9, 52.4, 50.8, 44.0, 26.6, 47.1, 42.2), 12 / 15),
    "copy+constant": PaperRow((68.8, 53.6, 49.3, 44.6, 24.9, 47.3, 44.0), 12 / 15),
    "zero+copy+constant": PaperRow((70.3, 51.7, 49.7, 44.6, 27.6, 46.3, 43.9), 12 / 16, LAST),
}

EXPERIMENT = of_sweep(
    "zero_computation_experts",
    PaperScores(TASKS, "BoolQ", {"1b": PAPER}, "1b"),  # vanilla MoE's BoolQ is at 41.2, below chance
    name="table5",
    title="Each zero-computation expert, on and off",
    question="Which zero-computation expert earns its place?",
    reference="Table 5",
    notes=("The paper's FFN shares assume, as we do, that a kind that is on keeps its number from the full model.",),
)
