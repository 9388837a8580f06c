"""Does MoE++ beat vanilla MoE when no token is dropped, and which expert does it?

The paper trains with a capacity factor of 1.1, at which MoE++ drops several times as many slots as vanilla MoE until
its balance is learnt; its released code drops nothing. Expected here: without drops MoE++ is ahead, and the constant
expert contributes most, as in Table 5.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="dropless",
    title="MoE++ and its experts without dropping",
    question="Does MoE++ beat vanilla MoE when no token is dropped, and which expert does it?",
    sweep="dropless",
    arms=(
        "vanilla", "moepp", "zero", "copy", "constant", "zero+copy", "zero+constant", "copy+constant", "no_residual",
    ),
    contrasts={
        "MoE++ in place of vanilla MoE": Contrast(on=("moepp",), off=("vanilla",)),
        "the gating residual": Contrast(on=("moepp",), off=("no_residual",)),
    },
    notes=(
        "A kind of expert that is switched on keeps its number from MoE++, so partial arms spend more FFN compute.",
        "Where time did not suffice for all arms, vanilla and moepp have the most seeds: they are trained first.",
    ),
)  # fmt: skip
