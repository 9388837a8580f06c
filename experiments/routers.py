"""What do other routers and ways to balance make of the same FFN compute?

MoE++ is compared in its paper with vanilla MoE alone. Its parts have rivals: AdaMoE and the shared null logit use zero
experts only, LongCat-Flash uses copy experts held by a bias, loss-free balancing needs no balance loss, ReMoE and top-p
choose a variable number of experts without any that cost nothing, RMoE carries a recurrent state where MoE++ carries
logits, DeepSeekMoE keeps one expert always on. Expected here: at equal FFN compute the methods lie closer to each other
than to vanilla MoE with 1.67 times as much, and most differences are within noise; top-p drifts to its own compute.
"""

from moepp.reports.experiment import Contrast, Experiment

EXPERIMENT = Experiment(
    name="routers",
    title="MoE++ beside other routers",
    question="What do other routers and ways to balance make of the same FFN compute?",
    sweep="routers",
    arms=("vanilla", "vanilla_matched", "dense", "moepp", "switch", "deepseek_moe", "shared_moepp", "adamoe",
          "shared_null", "longcat", "loss_free", "remoe", "top_p", "rmoe"),
    contrasts={  # <- each pair shares its expected FFN compute
        "MoE++ against vanilla MoE of equal compute": Contrast(on=("moepp",), off=("vanilla_matched",)),
        "constant and copy experts beside zero experts": Contrast(on=("moepp",), off=("adamoe", "shared_null")),
        "the balance loss in place of a bias": Contrast(on=("moepp",), off=("loss_free",)),
        "the gating residual in place of a recurrent router": Contrast(on=("moepp",), off=("rmoe",)),
        "zero-computation experts beside a shared expert": Contrast(on=("shared_moepp",), off=("deepseek_moe",)),
    },
    notes=(
        "`vanilla` and `dense` spend 2.0 FFN experts per token, the methods 1.2 (sweeps/routers.yaml says by which"
        " knob), `top_p` what it finds; compare losses with the measured FLOPs in view.",
        "FFN experts per token do not count shared experts and are of different widths in `vanilla_matched`, `switch`,"
        " `deepseek_moe` and `shared_moepp`. The dense model routes nothing: its expert time is that of its FFNs.",
        "Rates and weights are those of the papers where they state them, and not tuned for runs this short;"
        " docs/methods.md lists what of each method is not reproduced.",
    ),
)  # fmt: skip
