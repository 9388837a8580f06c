"""Lightning strategies for MoE++ over many devices (docs/strategies.md).

`from moepp.strategies import ...` of any of them registers all with Lightning by name. The schema, in `settings`, must
load without Lightning, which takes seconds.
"""

from importlib import import_module
from typing import Any

__all__ = [
    "ExpertParallelFSDPStrategy",
    "ExpertParallelStrategy",
    "MoEDDPStrategy",
    "MoEDeepSpeedStrategy",
    "MoEFSDPStrategy",
    "make_strategy",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("moepp.strategies.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
