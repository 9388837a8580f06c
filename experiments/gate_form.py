"""Which form of the gates should MoE++ train with, and do normalised logits help?

The paper prints softmax gates that are not renormalised (Eq. 1); its released code zeroes the zero expert's gate and
renormalises, and its released model normalises the logits first. Which of them trained the paper's models is not known.
Expected here: renormalised gates learn faster in short runs, since the experts' output is two to three times larger;
normalised logits matter most where gates are not renormalised.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="gate_form",
    title="Forms of the gates",
    question="Which form of the gates should MoE++ train with, and do normalised logits help?",
    sweep="gate_form",
    arms=("released", "softmax", "renormalized", "released_norm", "softmax_norm", "renormalized_norm"),
    contrasts={  # <- one choice at a time, over both values of the other
        "gates as printed in place of the released code's": Contrast(
            on=("softmax", "softmax_norm"), off=("released", "released_norm")
        ),
        "the zero expert's share kept when renormalising": Contrast(
            on=("renormalized", "renormalized_norm"), off=("released", "released_norm")
        ),
        "normalised logits": Contrast(
            on=("released_norm", "softmax_norm", "renormalized_norm"), off=("released", "softmax", "renormalized")
        ),
    },
    notes=(
        "Weights are initialised alike in all arms and the rate is shared: a form that likes others may look worse.",
    ),
)
