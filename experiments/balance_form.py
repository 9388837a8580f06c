"""Which form and weight of the balance loss reaches the FFN share of tau without costing quality?

The paper prints an un-normalised sum (Eq. 7) with beta 0.01; public code of the same authors multiplies by the number
of experts and averages over layers. The two differ by a factor alone, so the question is one of strength. Expected
here: without a loss the FFN share drifts and the load is uneven; from some strength on the share reaches its target,
and far above it quality falls.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="balance_form",
    title="Form and weight of the balance loss",
    question="Which form and weight of the balance loss reaches the FFN share of tau without costing quality?",
    sweep="balance_form",
    arms=("none", "switch_0.001", "paper_0.01", "switch_0.01", "paper_0.1", "switch_0.1"),
    contrasts={
        "ten times the weight": Contrast(on=("switch_0.1", "paper_0.1"), off=("switch_0.01", "paper_0.01")),
        "Switch's form in place of the paper's, equal beta": Contrast(
            on=("switch_0.01", "switch_0.1"), off=("paper_0.01", "paper_0.1")
        ),
    },
    notes=(
        "Switch's form is N / L times the paper's for N experts and L layers: 3 at size=tiny, 1 for the paper's 0.6B.",
        "tau 0.75 aims at an FFN share of 0.6 with 8 FFN and 4 zero-computation experts.",
    ),
)
