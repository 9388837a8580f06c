"""Which zero-computation expert earns its place at equal FFN compute?

Paper, Table 5: partial rows differ from the full set in their kinds and, at a fixed tau, in their FFN compute too; it
does not say whether freed places are refilled. Here all arms but vanilla MoE aim at the full set's share of 0.6, with
the places refilled or with a lower tau. Expected here: the kinds differ by less than in Table 5, within noise; zero
experts alone, which are no use to the output, do worst.
"""

from moepp.reports.experiment import Contrast, Experiment

PARTIAL = ("zero", "copy", "constant", "zero+copy", "zero+constant", "copy+constant")
REFILLED, HELD = (tuple(f"{kinds}_{way}" for kinds in PARTIAL) for way in ("refilled", "held"))


def _without(kind: str) -> Contrast:
    """The full set against the sets of the two other kinds."""
    return Contrast(
        on=("zero+copy+constant",),
        off=tuple(arm for arm in (*REFILLED, *HELD) if "+" in arm and kind not in arm.split("_")[0].split("+")),
    )


EXPERIMENT = Experiment(
    name="equal_compute",
    title="Each zero-computation expert, at equal FFN compute",
    question="Which zero-computation expert earns its place at equal FFN compute?",
    sweep="equal_compute",
    arms=("vanilla", "zero+copy+constant", *REFILLED, *HELD),
    contrasts={  # <- one kind taken from the full set, its compute kept
        **{f"{kind} experts in the full set": _without(kind) for kind in ("zero", "copy", "constant")},
        "refilled places in place of a lower tau": Contrast(on=REFILLED, off=HELD),
    },
    notes=(
        "Beside Table 5 of the paper, whose partial rows leave both the number of experts and the compute open.",
        "Compute is equal as far as the balance loss reached its balance: see the measured FFN share. Where one expert"
        " should take 0.4 of the slots, as in `zero_held`, top-2 bounds what it can take by 0.5.",
        "Vanilla MoE spends 1.67 times the FFN compute and carries no gating residual; all other arms carry it.",
    ),
)
