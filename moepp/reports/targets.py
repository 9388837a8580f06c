"""The FFN share that a model's routers are steered to, from its config alone."""

from collections.abc import Mapping
from typing import Any

from moepp.layers.settings import TOP_K_SELECTIONS


def balanced_share(tau: float, ffn: int, zero_computation: float) -> float:
    """The share of all slots that a balanced layer sends to FFN experts: tau N_FFN / (tau N_FFN + N_ZC) (Table 1)."""
    return tau * ffn / (tau * ffn + zero_computation)


def target_share(model: Mapping[str, Any]) -> float | None:
    """The target of a model's resolved config; None where nothing aims at one: dense models, a number of experts that
    varies by threshold, zero-computation experts without any balance, or layers of different targets.
    """
    experts, balance = model.get("experts"), model.get("balance")
    varies = model.get("selection", "top_k") not in TOP_K_SELECTIONS or model.get("per_layer")
    if not experts or not model.get("moe_every", 1) or varies:
        return None
    zero_computation = sum(experts[kind] for kind in ("zero", "copy", "constant"))
    zero_computation += sum(experts.get("others", {}).values())
    if not zero_computation:
        return 1.0
    if not balance:
        return None
    if balance["form"] == "grouped" or balance["control"] == "longcat":
        return balance["expected_ffn"] / model["top_k"]
    if not balance["beta"] and balance["control"] is None:
        return None
    own = {kind: balance["tau"] / tau - 1 for kind, tau in balance.get("tau_of", {}).items()}
    counts = experts | experts.get("others", {})
    more = sum(counts[kind] * weight for kind, weight in own.items())  # than 1 to each
    return balanced_share(balance["tau"], experts["ffn"], zero_computation + more)
