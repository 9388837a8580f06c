"""Does the capacity factor matter, and does training without dropping differ?

The paper trains with a capacity factor of 1.1 and does not vary it; its released code, for inference, drops nothing.
Expected here: few slots are dropped once the load is balanced, so that from 1.5 on nothing changes; 1.0 may cost a
little.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="capacity",
    title="The capacity factor",
    question="Does the capacity factor matter, and does training without dropping differ?",
    sweep="capacity",
    arms=("dropless", "capacity_1.0", "capacity_1.1", "capacity_1.5", "capacity_2.0"),
    contrasts={
        "tight capacity in place of none": Contrast(on=("capacity_1.0", "capacity_1.1"), off=("dropless",)),
        "wide capacity in place of none": Contrast(on=("capacity_1.5", "capacity_2.0"), off=("dropless",)),
    },
    notes=(
        "Capacity acts in training only: losses are of validation, where no slot is dropped in any arm.",
        "Capacity is a share of the tokens that a device sees at once: the fewer these are, the more their load strays"
        " from balance, and the more is dropped at the same factor.",
    ),
)
