"""Does MoE++ still compare with vanilla MoE as it does when each has its own best learning rate?

Every other sweep gives its arms one rate, chosen by hand for their size. Expected here: both have their best rate
within a factor of two of 5e-3, and the comparison between them keeps its sign.
"""

from moepp.reports.experiment import Contrast, Experiment

RATES = ("0.00125", "0.0025", "0.005", "0.01", "0.02")


def _both(rate: str) -> tuple[str, str]:
    return f"vanilla_{rate}", f"moepp_{rate}"


EXPERIMENT = Experiment(
    name="learning_rate",
    title="The learning rate of MoE++ and of vanilla MoE",
    question="Does MoE++ still compare with vanilla MoE as it does when each has its own best learning rate?",
    sweep="learning_rate",
    arms=(*(f"vanilla_{rate}" for rate in RATES), *(f"moepp_{rate}" for rate in RATES)),
    contrasts={
        "MoE++ in place of vanilla MoE, mean over rates": Contrast(
            on=tuple(f"moepp_{rate}" for rate in RATES), off=tuple(f"vanilla_{rate}" for rate in RATES)
        ),
        "half the rate": Contrast(on=_both("0.0025"), off=_both("0.005")),
        "twice the rate": Contrast(on=_both("0.01"), off=_both("0.005")),
    },
    notes=("Choosing the best of five rates on the seeds it is then judged by flatters both sides alike.",),
)
