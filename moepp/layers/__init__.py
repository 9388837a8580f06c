"""The MoE++ layer in plain torch. This folder works wherever it is copied to, under any name:
`MoELayer(MoEConfig(dim=64, hidden=128))(x)` gives the output and what the router did.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .balance import expert_capacities, load_balance_loss
    from .dispatch import LocalDispatcher
    from .experts import AffineExperts, FFNExperts
    from .moe import MoELayer, MoEStats
    from .router import Router
    from .settings import BalanceConfig, ExpertCounts, MoEConfig

__all__ = [
    "AffineExperts", "BalanceConfig", "ExpertCounts", "FFNExperts", "LocalDispatcher", "MoEConfig", "MoELayer",
    "MoEStats", "Router", "expert_capacities", "load_balance_loss",
]  # fmt: skip
# Modules by the names they give; imported when first asked for, since a config is read without torch.
_MODULES = {
    "BalanceConfig": "settings", "ExpertCounts": "settings", "MoEConfig": "settings",
    "AffineExperts": "experts", "FFNExperts": "experts",
    "LocalDispatcher": "dispatch", "MoELayer": "moe", "MoEStats": "moe", "Router": "router",
    "expert_capacities": "balance", "load_balance_loss": "balance",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
