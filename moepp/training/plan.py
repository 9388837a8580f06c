"""What a run's strategy sends in a step, beside what its devices compute, and what the other strategies would: from the
config alone, as estimate.py.

Of a collective among n devices each sends (n - 1) / n of the tensor (all-gather, reduce-scatter, all-to-all), twice
that in an all-reduce.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moepp.models.budget import expected_ffn_per_token, forward_flops, parameters
from moepp.training.device_state import EXPERTS, FFN, WIDE, product_bytes
from moepp.training.estimate import MFU, PEAKS, device_memory, two_digits
from moepp.training.settings import RunConfig, StrategyConfig

# Bytes per second that a device sends: NVLink of an H100 in one direction (NVIDIA's data sheet: 900 GB/s in both), and
# a 400 Gbit/s card of its own.
WITHIN_NODE, BETWEEN_NODES = 450e9, 50e9
CARD = 80e9  # bytes of an A100's or H100's memory
USABLE = 0.9  # of it; the rest for the context, NCCL's buffers and fragments


def plan(config: RunConfig) -> list[str]:
    """Lines for a run on several devices: what a step sends, and every strategy beside the one that was asked for; none
    for one device or a model of transformers.
    """
    if config.trainer.devices * config.trainer.num_nodes == 1 or config.model.name == "hf":
        return []
    sent, seconds = PlannedTraffic(config), compute_seconds(config)
    lines = [
        f"{'sent in each step':<23}  per device {_gb(sent.within)} GB within nodes, {_gb(sent.between)} GB between"
        f" them: about {sent.seconds:.2g} s at {WITHIN_NODE / 1e9:g} and {BETWEEN_NODES / 1e9:g} GB/s, beside"
        f" {seconds:.2g} s of computing on an H100 at {MFU:.0%} of its peak",
        "other strategies, by what they send:",
    ]
    rows = sorted(alternatives(config), key=lambda row: PlannedTraffic(row[1]).seconds)
    width = max(len(words) for words, _ in rows)
    return lines + [f"  {words:<{width}}  {_row(asked)}" for words, asked in rows]


def _row(config: RunConfig) -> str:
    memory, sent = sum(device_memory(config).values()), PlannedTraffic(config)
    fits = "" if memory <= USABLE * CARD else f", too much for {CARD / 1e9:g} GB"
    held = two_digits(memory / 2**30)
    return f"{sent.seconds:5.2g} s, {_gb(sent.between)} GB between nodes; {held} GiB per device{fits}"


def _gb(size: float) -> str:
    return two_digits(size / 1e9)


def compute_seconds(config: RunConfig) -> float:
    """Of a step, on an H100 at the assumed share of its peak."""
    tokens = config.data.batch_size * config.data.seq_len / (config.trainer.devices * config.trainer.num_nodes)
    flops = 3 * sum(forward_flops(config.model, config.data.seq_len).values()) * tokens
    return flops / (MFU * PEAKS["H100 or H200"])


def alternatives(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Every strategy on these devices, by what would have to be typed: divided among a node's devices where these are
    not all.
    """
    per_node, nodes = config.trainer.devices, config.trainer.num_nodes
    choices = [StrategyConfig("ddp"), StrategyConfig("fsdp"), StrategyConfig("fsdp", reduce_every_micro_batch=True)]
    if nodes > 1 and per_node > 1:
        choices.append(StrategyConfig("fsdp", shard_size=per_node))
    experts = config.model.experts.ffn if config.model.moe_blocks else 1
    group = max(size for size in range(1, per_node + 1) if per_node % size == 0 and experts % size == 0)
    if group > 1:
        size = 0 if group == per_node * nodes else group
        choices += [StrategyConfig(name, size) for name in ("expert_parallel", "expert_parallel_fsdp")]
    for choice in choices:
        options = {key: value for key, value in vars(choice).items() if value != getattr(StrategyConfig(), key)}
        del options["name"]
        words = [f"strategy={choice.name}", *(f"strategy.{k}={str(v).lower()}" for k, v in options.items())]
        yield " ".join(words), replace(config, strategy=choice)


@dataclass
class PlannedTraffic:
    """Bytes that each device sends in an optimizer step, to others on its node and on other nodes."""

    config: RunConfig

    def __post_init__(self) -> None:
        config = self.config
        self.within = self.between = 0.0
        self.per_node = config.trainer.devices
        self.devices = self.per_node * config.trainer.num_nodes
        self.passes = config.trainer.accumulate
        counted = self.passes > 1 and config.model.balance.over == "step" and config.model.balance.beta > 0
        self.counting = self.passes if counted else 0  # forward passes more, which count the load of the step
        part = parameters(config.model)
        self.experts = part[EXPERTS]
        self.rest = sum(part.values()) - self.experts
        self.narrow = product_bytes(config.trainer.precision)
        self.gathered = self.narrow * sum(part[name] for name in FFN if name != EXPERTS)
        self.gathered += WIDE * (self.rest - sum(part[name] for name in FFN if name != EXPERTS))
        self._add_all()

    @property
    def seconds(self) -> float:
        """Without any overlap."""
        return self.within / WITHIN_NODE + self.between / BETWEEN_NODES

    def _add_all(self) -> None:
        strategy, world = self.config.strategy, self.devices
        match strategy.name:
            case "ddp":
                self._add(2 * WIDE * (self.experts + self.rest), world)
            case "fsdp":
                self._add_fsdp(strategy.shard_size or world)
            case "expert_parallel":
                group = strategy.expert_parallel_size or world
                self._add_rows(group)
                self._add(2 * WIDE * self.rest, world)
                self._add(2 * WIDE * self.experts / group, world // group, stride=group)
            case "expert_parallel_fsdp":
                group = strategy.expert_parallel_size or world
                self._add_rows(group)
                self._add(self.gathers * self.gathered + self.reductions * WIDE * self.rest, world)
                mine = (self.gathers * self.narrow + self.reductions * WIDE) * self.experts / group
                self._add(mine, world // group, stride=group)

    def _add(self, size: float, devices: int, stride: int = 1) -> None:
        """A tensor of `size` bytes among groups of `devices`, `stride` ranks from one to the next."""
        sent = size * (devices - 1) / devices
        if devices * stride <= self.per_node:
            self.within += sent
        else:
            self.between += sent

    def _add_fsdp(self, shards: int) -> None:
        whole = self.experts + self.rest
        self._add(self.gathers * (self.narrow * self.experts + self.gathered), shards)
        self._add(self.reductions * WIDE * whole, shards)
        self._add(2 * self.reductions * WIDE * whole / shards, self.devices // shards, stride=shards)

    def _add_rows(self, group: int) -> None:
        """To the experts and back, forward and backward; activation checkpointing keeps what has arrived."""
        config = self.config
        tokens = config.data.batch_size * config.data.seq_len / self.passes / self.devices
        rows = tokens * expected_ffn_per_token(config.model) * len(config.model.moe_blocks)
        self._add(rows * config.model.dim * self.narrow * (4 * self.passes + 2 * self.counting), group)

    @property
    def gathers(self) -> int:
        """Of all weights: in every forward and backward pass."""
        return 2 * self.passes + self.counting

    @property
    def reductions(self) -> int:
        return self.passes if self.config.strategy.reduce_every_micro_batch else 1
