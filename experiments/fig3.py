"""How many constant experts are best, at a fixed tau and at equal FFN compute?

Paper, Fig. 3 (tau 0.75, 100B tokens): more constant experts, until zero-computation experts are as many as FFN experts;
the average score rises, then falls, which the paper takes for its rule max(N_FFN / 4 - N_zero - N_copy, 1). The figure
prints no numbers, so none stand beside ours. Expected here: at a fixed tau a rise, then a fall, since every constant
expert also takes FFN compute away; at equal FFN compute the fall should weaken or vanish. Both may be within noise.
"""

from moepp.reports.experiment import Contrast, Experiment, Trend

FIXED = {"constant_0": 0, "constant_1": 1, "constant_2": 2, "constant_4": 4, "constant_6": 6}
EQUAL = {"constant_0_half": 0, "constant_1_half": 1, "constant_2_half": 2, "constant_4": 4, "constant_6_half": 6}

EXPERIMENT = Experiment(
    name="fig3",
    title="The number of constant experts",
    question="How many constant experts are best, at a fixed tau and at equal FFN compute?",
    reference="Fig. 3",
    sweep="constant_experts",
    arms=tuple(FIXED | EQUAL),
    contrasts={  # <- the number of constant experts
        "2 constant experts in place of 0, tau 0.75": Contrast(on=("constant_2",), off=("constant_0",)),
        "6 constant experts in place of 2, tau 0.75": Contrast(on=("constant_6",), off=("constant_2",)),
        "2 constant experts in place of 0, equal compute": Contrast(on=("constant_2_half",), off=("constant_0_half",)),
        "6 constant experts in place of 2, equal compute": Contrast(on=("constant_6_half",), off=("constant_2_half",)),
    },
    trend=Trend("number of constant experts", {"tau 0.75": FIXED, "equal FFN compute": EQUAL}),
    notes=(
        "The number in an arm's name counts constant experts. Without a suffix tau is 0.75; `half` sets tau to"
        " N_ZC / N_FFN, so that a balanced layer sends half of all slots to FFN experts; `constant_4` does either way.",
        "The figure does not say which models, which numbers and which tasks it shows. With 8 FFN experts the paper's"
        " rule gives 1 constant expert, its Table 2 has 2.",
        "At equal compute tau still moves the load between the types; what stays equal is the FFN experts per token,"
        " and only as far as the balance loss reached its balance: see the measured FFN share.",
    ),
)
