"""Strategies by name: for configs, and for `Trainer(strategy=...)` once this package is imported."""

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from moepp.strategies.ddp import ExpertParallelStrategy, MoEDDPStrategy
from moepp.strategies.fsdp import ExpertParallelFSDPStrategy, MoEFSDPStrategy

# Lightning has a "ddp" and an "fsdp" of its own, which know nothing of experts.
for name, strategy, description in (
    ("moe_ddp", MoEDDPStrategy, "DDP with the load balance of the whole batch"),
    ("moe_fsdp", MoEFSDPStrategy, "FSDP2 with the load balance of the whole batch"),
    ("expert_parallel", ExpertParallelStrategy, "FFN experts divided among all devices, DDP for all else"),
    ("expert_parallel_fsdp", ExpertParallelFSDPStrategy, "FFN experts divided among all devices, FSDP2 for all else"),
):
    StrategyRegistry.register(name, strategy, description)


def make_strategy(
    name: str,
    expert_parallel_size: int = 0,
    timeout_s: float = 600.0,
    reduce_every_micro_batch: bool = False,
    shard_size: int = 0,
    checkpoints_in_parts: bool = False,
) -> Strategy | str:
    """What `Trainer(strategy=...)` takes for these settings. Raises UsageError for what this machine cannot run."""
    common = {"timeout_s": timeout_s, "checkpoints_in_parts": checkpoints_in_parts}
    match name:
        case "single":
            return "auto"
        case "ddp":
            return MoEDDPStrategy(**common)
        case "fsdp":
            return MoEFSDPStrategy(reduce_every_micro_batch=reduce_every_micro_batch, shard_size=shard_size, **common)
        case "expert_parallel":
            return ExpertParallelStrategy(expert_parallel_size, **common)
        case "expert_parallel_fsdp":
            return ExpertParallelFSDPStrategy(
                expert_parallel_size, reduce_every_micro_batch=reduce_every_micro_batch, **common
            )
