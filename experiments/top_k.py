"""Is a larger k with zero-computation experts worth more than the same FFN compute without them?

The paper always chooses two experts. MoE++ spends 0.6 k FFN experts per token at balance with 8 FFN and 4
zero-computation experts, so one more choice than vanilla MoE costs about as much or less: 1.2, 1.8 and 2.4 against 1, 2
and 3. Expected here: loss falls with k on both sides, by less each time, and the two sides meet at equal compute.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="top_k",
    title="The number of chosen experts",
    question="Is a larger k with zero-computation experts worth more than the same FFN compute without them?",
    sweep="top_k",
    arms=("vanilla_1", "vanilla_2", "vanilla_3", "vanilla_4", "moepp_1", "moepp_2", "moepp_3", "moepp_4"),
    contrasts={
        "MoE++ with one more choice in place of vanilla MoE": Contrast(
            on=("moepp_2", "moepp_3", "moepp_4"), off=("vanilla_1", "vanilla_2", "vanilla_3")
        ),
        "a larger k in vanilla MoE": Contrast(on=("vanilla_3", "vanilla_4"), off=("vanilla_1", "vanilla_2")),
        "a larger k in MoE++": Contrast(on=("moepp_3", "moepp_4"), off=("moepp_1", "moepp_2")),
    },
    notes=("Gates are those of Eq. 1 in all arms. Elsewhere the released code's are the default, so losses differ.",),
)
