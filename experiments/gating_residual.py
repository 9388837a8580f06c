"""Does the gating residual help, and only together with zero-computation experts?

The paper removes the residual from MoE++ (Table 6: 47.7 with, 47.5 without, one seed) and compares both with a vanilla
MoE that never had it; a reviewer asked whether the baselines were trained with it. Here it is on and off in both.
Expected here: no difference beyond noise on either side; if there is one, it should not need zero-computation experts,
since the residual carries logits of all experts alike.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="gating_residual",
    title="The gating residual, on MoE++ and on vanilla MoE",
    question="Does the gating residual help, and only together with zero-computation experts?",
    sweep="gating_residual",
    arms=("vanilla", "vanilla+residual", "moepp_no_residual", "moepp"),
    contrasts={  # <- the residual, on either side
        "the gating residual on vanilla MoE": Contrast(on=("vanilla+residual",), off=("vanilla",)),
        "the gating residual on MoE++": Contrast(on=("moepp",), off=("moepp_no_residual",)),
        "MoE++ in place of vanilla MoE, both with it": Contrast(on=("moepp",), off=("vanilla+residual",)),
    },
    notes=(
        "The first MoE layer has no residual: 3 of 4 layers carry it at size=tiny, 11 of 12 in the paper's models.",
    ),
)
