"""Lightning strategies for MoE++ over many devices (docs/strategies.md), registered with Lightning by name."""

from moepp.strategies.ddp import ExpertParallelStrategy, MoEDDPStrategy
from moepp.strategies.fsdp import ExpertParallelFSDPStrategy, MoEFSDPStrategy
from moepp.strategies.registry import make_strategy
from moepp.strategies.single import CheckpointsOfAnyForm

__all__ = [
    "CheckpointsOfAnyForm",
    "ExpertParallelFSDPStrategy",
    "ExpertParallelStrategy",
    "MoEDDPStrategy",
    "MoEFSDPStrategy",
    "make_strategy",
]
